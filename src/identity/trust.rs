//! Certificate verification: roots, as one bundle for all or one per trust domain, and revocation lists.

#[cfg(test)]
mod tests;

use std::{
    borrow::Cow,
    fmt,
    sync::{Arc, OnceLock},
    time::SystemTime,
};

use rustls::{CertificateError, OtherError, crypto::CryptoProvider};
use rustls_pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use webpki::{CertRevocationList, EndEntityCert, KeyUsage, RevocationOptionsBuilder, UnknownStatusPolicy};

use super::{IdentityPattern, Peer, PeerError, SpiffeId, TrustDomain, time::Date};

/// The crypto provider for all TLS: aws-lc-rs, X25519MLKEM768 first.
pub fn provider() -> &'static Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    PROVIDER.get_or_init(|| Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
}

/// The role of the certificate's owner, which decides the required extended key usage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Server,
    Client,
}

impl Role {
    pub const fn word(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::Client => "client",
        }
    }
}

/// The roots of one trust domain, or of all.
#[derive(Clone, Debug)]
pub struct Bundle {
    /// `None`: the roots may issue for any trust domain.
    pub trust_domain: Option<TrustDomain>,
    /// Its source, for people.
    pub source: Box<str>,
    pub anchors: Vec<TrustAnchor<'static>>,
}

/// What certificates are verified against: roots and revocation lists.
#[derive(Clone, Debug)]
pub struct Trust {
    bundles: Arc<[Bundle]>,
    crls: Arc<[CertRevocationList<'static>]>,
}

/// Why a certificate is rejected.
#[derive(Clone, Debug, thiserror::Error)]
pub enum VerifyError {
    #[error("its certificate cannot be used: {0}")]
    Peer(#[from] PeerError),
    #[error("its certificate expired on {}", Date(*.0))]
    Expired(SystemTime),
    #[error("its certificate is not valid before {}", Date(*.0))]
    NotYetValid(SystemTime),
    #[error("its certificate was not issued by a trusted CA (roots: {0})")]
    UnknownIssuer(String),
    #[error("its certificate has been revoked")]
    Revoked,
    #[error("its certificate may not be used by a {0} (extended key usage)")]
    Purpose(&'static str),
    #[error("it is {id}, whose trust domain is not trusted (trusted: {known})")]
    TrustDomain { id: SpiffeId, known: String },
    #[error("it is {is}; expected {expected}")]
    UnexpectedIdentity { is: String, expected: String },
    #[error("its certificate names {presented}; expected {expected}")]
    NameMismatch { presented: String, expected: String },
    #[error("it showed no certificate")]
    NoCertificate,
    #[error("its certificate is not valid ({0:?})")]
    Invalid(webpki::Error),
}

impl Trust {
    /// Checks nothing: [`super::material`] has checked bundles and lists.
    pub fn new(bundles: Vec<Bundle>, crls: Vec<CertRevocationList<'static>>) -> Self {
        Self { bundles: bundles.into(), crls: crls.into() }
    }

    /// These roots with the revocation lists of `other`. A list covers its own issuer only, so lists of other issuers
    /// have no effect here.
    pub fn with_revocations_of(&self, other: &Self) -> Self {
        Self { bundles: Arc::clone(&self.bundles), crls: Arc::clone(&other.crls) }
    }

    pub fn bundles(&self) -> &[Bundle] {
        &self.bundles
    }

    /// Verifies a chain: names, path to a root that may issue them, validity at `now`, revocation, key usage.
    ///
    /// # Errors
    ///
    /// Why the certificate is rejected.
    pub fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        role: Role,
    ) -> Result<Peer, VerifyError> {
        let peer = Peer::from_leaf(leaf)?;
        let anchors = self.anchors(&peer)?;
        let parsed = EndEntityCert::try_from(leaf).map_err(|error| self.refusal(error, role))?;
        let crls: Vec<&CertRevocationList<'_>> = self.crls.iter().collect();
        // A list covers its own issuer only. An outdated list is still better than none.
        let revocation = RevocationOptionsBuilder::new(&crls)
            .ok()
            .map(|options| options.with_status_policy(UnknownStatusPolicy::Allow).build());
        let usage = match role {
            Role::Server => KeyUsage::server_auth(),
            Role::Client => KeyUsage::client_auth(),
        };
        let algorithms = provider().signature_verification_algorithms.all;
        parsed
            .verify_for_usage(algorithms, &anchors, intermediates, now, usage, revocation, None)
            .map_err(|error| self.refusal(error, role))?;
        Ok(peer)
    }

    /// The roots that may issue the peer's names. Only its own trust domain's roots may issue a SPIFFE ID.
    fn anchors(&self, peer: &Peer) -> Result<Cow<'_, [TrustAnchor<'static>]>, VerifyError> {
        let may_issue = |bundle: &&Bundle| match (&bundle.trust_domain, &peer.spiffe) {
            (Some(domain), Some(id)) => domain.as_str() == id.trust_domain(),
            _ => true,
        };
        let matching: Vec<&Bundle> = self.bundles.iter().filter(may_issue).collect();
        match (&matching[..], &peer.spiffe) {
            ([], Some(id)) => {
                let known = self.bundles.iter().filter_map(|bundle| bundle.trust_domain.as_ref());
                let known: Vec<&str> = known.map(TrustDomain::as_str).collect();
                Err(VerifyError::TrustDomain { id: id.clone(), known: known.join(", ") })
            }
            ([one], _) => Ok(Cow::Borrowed(&one.anchors)),
            _ => Ok(matching.iter().flat_map(|bundle| bundle.anchors.iter().cloned()).collect()),
        }
    }

    fn refusal(&self, error: webpki::Error, role: Role) -> VerifyError {
        use webpki::Error as E;
        let time = |time: UnixTime| {
            crate::authorization::peer::from_unix_seconds(i64::try_from(time.as_secs()).unwrap_or(i64::MAX))
        };
        match error {
            E::CertExpired { not_after, .. } => VerifyError::Expired(time(not_after)),
            E::CertNotValidYet { not_before, .. } => VerifyError::NotYetValid(time(not_before)),
            // A root with the same name and another key is another issuer.
            E::UnknownIssuer | E::InvalidSignatureForPublicKey => {
                VerifyError::UnknownIssuer(self.to_string())
            }
            E::CertRevoked => VerifyError::Revoked,
            E::CaUsedAsEndEntity => VerifyError::Peer(PeerError::Ca),
            E::RequiredEkuNotFoundContext(_) => VerifyError::Purpose(role.word()),
            error => VerifyError::Invalid(error),
        }
    }
}

/// The sources of the roots.
impl fmt::Display for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, bundle) in self.bundles.iter().enumerate() {
            let comma = if at > 0 { ", " } else { "" };
            match &bundle.trust_domain {
                Some(domain) => write!(f, "{comma}{} for {domain}", bundle.source)?,
                None => write!(f, "{comma}{}", bundle.source)?,
            }
        }
        Ok(())
    }
}

/// Checks that `peer` is one of the expected identities.
///
/// # Errors
///
/// Names the actual and the expected identities.
pub fn check_identity(
    peer: &Peer,
    leaf: &CertificateDer<'_>,
    expected: &[IdentityPattern],
) -> Result<(), VerifyError> {
    let named = |pattern: &IdentityPattern| match (&peer.spiffe, pattern) {
        (Some(id), pattern) => pattern.matches(id),
        (None, IdentityPattern::Dns(name)) => is_valid_for(leaf, name),
        (None, _) => false,
    };
    if expected.iter().any(named) {
        return Ok(());
    }
    let expected: Vec<String> = expected.iter().map(ToString::to_string).collect();
    Err(VerifyError::UnexpectedIdentity { is: peer.to_string(), expected: expected.join(" or ") })
}

/// Checks that the certificate is valid for a server name.
///
/// # Errors
///
/// Names the names in the certificate and the expected one.
pub fn check_name(peer: &Peer, leaf: &CertificateDer<'_>, name: &ServerName<'_>) -> Result<(), VerifyError> {
    let valid = EndEntityCert::try_from(leaf).and_then(|leaf| leaf.verify_is_valid_for_subject_name(name));
    valid.map_err(|_| VerifyError::NameMismatch {
        presented: match (&peer.spiffe, &peer.dns[..]) {
            (Some(id), []) => format!("{id} (set `identity`)"),
            (None, []) => "no host".to_owned(),
            (_, names) => names.join(", "),
        },
        expected: name.to_str().into_owned(),
    })
}

fn is_valid_for(leaf: &CertificateDer<'_>, name: &str) -> bool {
    let Ok(name) = ServerName::try_from(name) else { return false };
    EndEntityCert::try_from(leaf).is_ok_and(|leaf| leaf.verify_is_valid_for_subject_name(&name).is_ok())
}

/// Wraps the error for rustls, which derives the alert for the peer. Variants that rustls lacks travel as
/// `CertificateError::Other`.
impl From<VerifyError> for rustls::Error {
    fn from(refusal: VerifyError) -> Self {
        let now = UnixTime::now();
        let unix = |time: SystemTime| {
            let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            UnixTime::since_unix_epoch(since)
        };
        Self::InvalidCertificate(match refusal {
            VerifyError::Expired(at) => CertificateError::ExpiredContext { time: now, not_after: unix(at) },
            VerifyError::NotYetValid(at) => {
                CertificateError::NotValidYetContext { time: now, not_before: unix(at) }
            }
            VerifyError::UnknownIssuer(_) => CertificateError::UnknownIssuer,
            VerifyError::Revoked => CertificateError::Revoked,
            VerifyError::Purpose(_) => CertificateError::InvalidPurpose,
            other => CertificateError::Other(OtherError(Arc::new(other))),
        })
    }
}

/// Unwraps a certificate error of a handshake; `None` for other errors.
pub fn from_rustls_error(error: &rustls::Error, trust: &Trust, role: Role) -> Option<VerifyError> {
    let rustls::Error::InvalidCertificate(error) = error else { return None };
    let time = |time: &UnixTime| {
        crate::authorization::peer::from_unix_seconds(i64::try_from(time.as_secs()).unwrap_or(i64::MAX))
    };
    Some(match error {
        CertificateError::ExpiredContext { not_after, .. } => VerifyError::Expired(time(not_after)),
        CertificateError::NotValidYetContext { not_before, .. } => VerifyError::NotYetValid(time(not_before)),
        CertificateError::UnknownIssuer => VerifyError::UnknownIssuer(trust.to_string()),
        CertificateError::Revoked => VerifyError::Revoked,
        CertificateError::InvalidPurpose => VerifyError::Purpose(role.word()),
        CertificateError::Other(OtherError(other)) => other.downcast_ref::<VerifyError>()?.clone(),
        _ => return None,
    })
}
