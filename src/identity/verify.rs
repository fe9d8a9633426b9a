//! The certificate verifiers for rustls: of clients and of servers.

use std::sync::Arc;

use rustls::{
    DigitallySignedStruct, DistinguishedName, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{verify_tls12_signature, verify_tls13_signature},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::{
    IdentityPattern,
    trust::{Role, Trust, check_identity, check_name, provider},
};

/// With more roots than this, no root hints are sent: the list would be too large for the first flight.
const MAX_HINTS: usize = 16;

/// The methods common to both: the crypto provider verifies signatures.
macro_rules! impl_verify_signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            message: &[u8],
            leaf: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            verify_tls12_signature(message, leaf, signature, &provider().signature_verification_algorithms)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            leaf: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            verify_tls13_signature(message, leaf, signature, &provider().signature_verification_algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            provider().signature_verification_algorithms.supported_schemes()
        }
    };
}

/// Accepts clients whose chain leads to a root.
#[derive(Debug)]
pub struct ClientVerifier {
    trust: Arc<Trust>,
    /// Reject clients without a certificate.
    mandatory: bool,
    hints: Vec<DistinguishedName>,
}

impl ClientVerifier {
    pub fn new(trust: Arc<Trust>, mandatory: bool) -> Self {
        let roots = trust.bundles().iter().flat_map(|bundle| &bundle.anchors);
        let hints: Vec<_> = roots.map(|root| DistinguishedName::in_sequence(&root.subject)).collect();
        let hints = if hints.len() > MAX_HINTS { Vec::new() } else { hints };
        Self { trust, mandatory, hints }
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn client_auth_mandatory(&self) -> bool {
        self.mandatory
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &self.hints
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.trust.verify(leaf, intermediates, now, Role::Client)?;
        Ok(ClientCertVerified::assertion())
    }

    impl_verify_signatures!();
}

/// Accepts servers with an expected identity; if none is expected, those whose certificate has the host name.
#[derive(Debug)]
pub struct ServerVerifier {
    pub trust: Arc<Trust>,
    pub expected: Vec<IdentityPattern>,
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let peer = self.trust.verify(leaf, intermediates, now, Role::Server)?;
        if self.expected.is_empty() {
            check_name(&peer, leaf, name)?;
        } else {
            check_identity(&peer, leaf, &self.expected)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    impl_verify_signatures!();
}
