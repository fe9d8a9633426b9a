//! TLS handshakes in both directions, and readable reasons for their failures.

use std::{io, sync::Arc, time::SystemTime};

use rustls::{AlertDescription, HandshakeKind, ProtocolVersion, server::Acceptor};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{LazyConfigAcceptor, TlsConnector, client, server};

use crate::{authorization::peer, config::TlsMode, net::alpn::ApplicationProtocol};

use super::{
    Peer,
    time::Date,
    tls::{ALPN_BYTE_STREAM, ALPN_H2, ALPN_HTTP1, AlpnOffer, ClientTls, ClientTlsConfig, ServerTls},
    trust::{Role, Trust, VerifyError, from_rustls_error},
};

const MIN_TLS: &str = "`min_tls` of `[identity]`, or of the upstream, sets the oldest version";

/// Why a TLS connection could not be established.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct TlsFailure {
    pub kind: FailureKind,
    /// What happened, with the peer as "it": "its certificate expired on …".
    pub reason: String,
}

/// The class of a handshake failure; a metric label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// The peer's certificate is invalid, untrusted or not the expected identity.
    PeerIdentity,
    /// The peer presented no certificate.
    NoCertificate,
    /// The peer rejects our certificate or our TLS parameters.
    Refused,
    /// No common application protocol (ALPN).
    NoProtocol,
    /// The peer does not speak TLS.
    NotTls,
    /// The connection broke.
    Broken,
    /// This side has no valid certificate, or no roots to verify the peer.
    NotReady,
}

impl FailureKind {
    pub const ALL: [Self; 7] = [
        Self::PeerIdentity,
        Self::NoCertificate,
        Self::Refused,
        Self::NoProtocol,
        Self::NotTls,
        Self::Broken,
        Self::NotReady,
    ];

    /// Whether the failure is about the peer's identity: the cause is `peer_identity`.
    pub const fn is_about_identity(self) -> bool {
        matches!(self, Self::PeerIdentity | Self::NoCertificate)
    }

    /// The metric label.
    pub const fn word(self) -> &'static str {
        match self {
            Self::PeerIdentity => "peer_identity",
            Self::NoCertificate => "no_certificate",
            Self::Refused => "refused",
            Self::NoProtocol => "no_protocol",
            Self::NotTls => "not_tls",
            Self::Broken => "broken",
            Self::NotReady => "not_ready",
        }
    }
}

/// A verified peer and the chain it presented.
#[derive(Debug)]
pub struct VerifiedPeer {
    pub peer: Peer,
    pub chain: Vec<CertificateDer<'static>>,
    /// When the first certificate of the chain expires and the chain has to be verified again.
    pub valid_until: SystemTime,
}

/// Performs the client handshake on an open connection.
///
/// # Errors
///
/// Why the handshake failed, and on which side.
pub async fn connect<IO>(
    client: &ClientTls,
    name: &ServerName<'static>,
    protocol: ApplicationProtocol,
    io: IO,
) -> Result<(client::TlsStream<IO>, VerifiedPeer), TlsFailure>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let connected = async {
        let now: ClientTlsConfig = match &**client.current() {
            Ok(now) => now.clone(),
            Err(reason) => return Err(TlsFailure { kind: FailureKind::NotReady, reason: reason.clone() }),
        };
        let own_expired = now.own_certificate_expired_at();
        let config = if own_expired.is_some() { now.without_resumption() } else { Arc::clone(&now.config) };
        let connector = TlsConnector::from(config);
        let connecting = match protocol {
            ApplicationProtocol::Http1 => {
                connector.with_alpn(vec![ALPN_HTTP1.to_vec()]).connect(name.clone(), io)
            }
            ApplicationProtocol::H2 => connector.with_alpn(vec![ALPN_H2.to_vec()]).connect(name.clone(), io),
            ApplicationProtocol::ByteStream if client.settings.mode == TlsMode::Mutual => {
                connector.with_alpn(vec![ALPN_BYTE_STREAM.to_vec()]).connect(name.clone(), io)
            }
            ApplicationProtocol::Opaque | ApplicationProtocol::ByteStream => {
                connector.connect(name.clone(), io)
            }
        };
        let stream = connecting.await.map_err(|error| {
            let failure = describe_failure(&error, &now.trust, Role::Server);
            match own_expired {
                // Only a rejection by the server: errors in the server's certificate are reported as they are.
                Some(at) if matches!(failure.kind, FailureKind::Refused | FailureKind::Broken) => {
                    own_certificate_expired(at)
                }
                _ => failure,
            }
        })?;
        let (_, tls) = stream.get_ref();
        if protocol == ApplicationProtocol::H2 && tls.alpn_protocol() != Some(ALPN_H2) {
            let reason = "it does not offer HTTP/2 over TLS (ALPN h2): set `protocol = \"http1\"`".to_owned();
            return Err(TlsFailure { kind: FailureKind::NoProtocol, reason });
        }
        let verified = verified_peer(tls.peer_certificates(), &now.trust, Role::Server)?
            .ok_or_else(|| certificate_failure(&VerifyError::NoCertificate))?;
        Ok((stream, verified))
    };
    let connected = connected.await;
    let counts = &client.handshakes.outbound;
    match &connected {
        Ok((stream, _)) => {
            counts.record_success(stream.get_ref().1.handshake_kind() == Some(HandshakeKind::Resumed))
        }
        Err(failure) => counts.record_failure(failure.kind),
    }
    connected
}

/// The verified identity of the peer, from the chain that it presented.
///
/// A resumed session has the chain of its first handshake, which rustls does not verify again. Sessions of revoked or
/// no longer trusted certificates cannot be resumed: tickets and sessions are replaced together with roots and
/// revocation lists. Certificates that expired meanwhile, intermediates as well as the leaf, are detected here.
fn verified_peer(
    chain: Option<&[CertificateDer<'_>]>,
    trust: &Trust,
    role: Role,
) -> Result<Option<VerifiedPeer>, TlsFailure> {
    let Some(chain) = chain else { return Ok(None) };
    let chain: Vec<_> = chain.iter().map(|certificate| certificate.clone().into_owned()).collect();
    let refused = |refusal: VerifyError| certificate_failure(&refusal);
    let (leaf, intermediates) = chain.split_first().ok_or_else(|| refused(VerifyError::NoCertificate))?;
    let peer = Peer::from_leaf(leaf).map_err(|error| refused(error.into()))?;
    let now = SystemTime::now();
    let expiries: Vec<_> = chain.iter().filter_map(|certificate| peer::not_after(certificate)).collect();
    if expiries.len() < chain.len() || expiries.iter().any(|end| *end <= now) {
        // The path may not need the expired one, for example an old cross-signed certificate.
        trust.verify(leaf, intermediates, UnixTime::now(), role).map_err(refused)?;
    }
    let valid_until = expiries.into_iter().filter(|end| *end > now).min().unwrap_or(peer.not_after);
    Ok(Some(VerifiedPeer { peer, chain, valid_until }))
}

/// An accepted connection after the TLS handshake.
#[derive(Debug)]
pub struct AcceptedTls<IO> {
    pub stream: server::TlsStream<IO>,
    /// `None`: it presented no certificate, and none was required.
    pub verified: Option<VerifiedPeer>,
    pub protocol: Option<ApplicationProtocol>,
    /// Negotiated TLS 1.2, which a later `min_tls` may forbid.
    pub tls12: bool,
    /// A resumed session: no certificate was presented again.
    pub resumed: bool,
}

/// What a port offers to clients by ALPN.
#[derive(Clone, Copy, Debug)]
pub struct PortAlpn {
    pub http: AlpnOffer,
    /// Whether the port accepts byte streams of other sidecars.
    pub byte_streams: bool,
}

/// Performs the server handshake with a client that has sent the beginning of a ClientHello.
///
/// # Errors
///
/// Why the handshake failed.
pub async fn accept<IO>(
    server: &ServerTls,
    mandatory: bool,
    offer: PortAlpn,
    io: IO,
) -> Result<AcceptedTls<IO>, TlsFailure>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let explain = |error: &io::Error| describe_failure(error, &server.trust, Role::Client);
    let hello = LazyConfigAcceptor::new(Acceptor::default(), io).await.map_err(|error| explain(&error))?;
    let is_http = |name: &[u8]| name == ALPN_H2 || name == ALPN_HTTP1;
    let offers = |wanted: &dyn Fn(&[u8]) -> bool| hello.client_hello().alpn().map(|mut all| all.any(wanted));
    let wants_http = offers(&is_http);
    let wants_stream = offers(&|name| name == ALPN_BYTE_STREAM) == Some(true);
    let offer = match wants_http {
        _ if wants_stream && offer.byte_streams => AlpnOffer::ByteStream,
        Some(false) if wants_stream => {
            // Fails the handshake with an alert that gives the other sidecar the reason.
            let config = server.config(mandatory, AlpnOffer::Http1First);
            let _ = hello.into_stream(config).await;
            let reason = "it opened a byte stream, and this port accepts HTTP only: \
                          `protocol = \"tcp\"` in an `[[inbound.port]]` of that port allows it"
                .to_owned();
            return Err(TlsFailure { kind: FailureKind::NoProtocol, reason });
        }
        // Another protocol is for the service, and must not fail the handshake.
        Some(false) => AlpnOffer::NoAlpn,
        _ => offer.http,
    };
    let stream = hello.into_stream(server.config(mandatory, offer)).await.map_err(|error| explain(&error))?;
    let (_, tls) = stream.get_ref();
    let protocol = match tls.alpn_protocol() {
        Some(ALPN_H2) => Some(ApplicationProtocol::H2),
        Some(ALPN_HTTP1) => Some(ApplicationProtocol::Http1),
        Some(ALPN_BYTE_STREAM) => Some(ApplicationProtocol::ByteStream),
        _ => None,
    };
    let tls12 = tls.protocol_version() == Some(ProtocolVersion::TLSv1_2);
    let resumed = tls.handshake_kind() == Some(HandshakeKind::Resumed);
    let verified = verified_peer(tls.peer_certificates(), &server.trust, Role::Client)?;
    if mandatory && verified.is_none() {
        return Err(certificate_failure(&VerifyError::NoCertificate));
    }
    Ok(AcceptedTls { stream, verified, protocol, tls12, resumed })
}

fn certificate_failure(refusal: &VerifyError) -> TlsFailure {
    let kind = match refusal {
        VerifyError::NoCertificate => FailureKind::NoCertificate,
        _ => FailureKind::PeerIdentity,
    };
    TlsFailure { kind, reason: refusal.to_string() }
}

/// The peer rejects our certificate because it has expired.
pub fn own_certificate_expired(at: SystemTime) -> TlsFailure {
    let reason = format!("it does not accept our certificate, which expired on {}: renew it", Date(at));
    TlsFailure { kind: FailureKind::NotReady, reason }
}

/// Describes an error of a handshake, or of a connection after it. `role`: the peer's.
pub fn describe_failure(error: &io::Error, trust: &Trust, role: Role) -> TlsFailure {
    let Some(tls) = tls_error(error) else {
        let reason = match error.kind() {
            io::ErrorKind::UnexpectedEof => "it closed the connection during the TLS handshake".to_owned(),
            _ => format!("the connection broke during the TLS handshake ({error})"),
        };
        return TlsFailure { kind: FailureKind::Broken, reason };
    };
    if let Some(refusal) = from_rustls_error(tls, trust, role) {
        return certificate_failure(&refusal);
    }
    let failure = |kind, reason: String| TlsFailure { kind, reason };
    match tls {
        rustls::Error::AlertReceived(alert @ AlertDescription::NoApplicationProtocol) => {
            failure(FailureKind::NoProtocol, describe_alert(*alert))
        }
        rustls::Error::AlertReceived(alert) => failure(FailureKind::Refused, describe_alert(*alert)),
        rustls::Error::NoCertificatesPresented => {
            failure(FailureKind::NoCertificate, VerifyError::NoCertificate.to_string())
        }
        rustls::Error::InvalidMessage(_) => {
            failure(FailureKind::NotTls, "it does not speak TLS on this port".to_owned())
        }
        rustls::Error::InvalidCertificate(error) => {
            failure(FailureKind::PeerIdentity, format!("its certificate is not valid ({error})"))
        }
        rustls::Error::PeerIncompatible(incompatibility) => {
            let reason =
                format!("it supports no TLS version or cipher allowed here ({incompatibility:?}); {MIN_TLS}");
            failure(FailureKind::Refused, reason)
        }
        rustls::Error::NoApplicationProtocol => {
            failure(FailureKind::NoProtocol, "no application protocol in common (ALPN)".to_owned())
        }
        other => failure(FailureKind::Refused, format!("the TLS handshake failed: {other}")),
    }
}

/// The alert with which the peer closed an established connection. With TLS 1.3 a server verifies the client
/// certificate after the client has finished the handshake. Nothing sent until then has reached a service.
pub fn rejected_after_handshake(error: &(dyn std::error::Error + 'static)) -> Option<TlsFailure> {
    let mut error = Some(error);
    while let Some(this) = error {
        if let Some(rustls::Error::AlertReceived(alert)) =
            this.downcast_ref::<io::Error>().and_then(tls_error)
            && is_about_certificates(*alert)
        {
            return Some(TlsFailure { kind: FailureKind::Refused, reason: describe_alert(*alert) });
        }
        error = this.source();
    }
    None
}

fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

const fn is_about_certificates(alert: AlertDescription) -> bool {
    use AlertDescription as A;
    matches!(
        alert,
        A::NoCertificate
            | A::BadCertificate
            | A::UnsupportedCertificate
            | A::CertificateRevoked
            | A::CertificateExpired
            | A::CertificateUnknown
            | A::UnknownCA
            | A::AccessDenied
            | A::CertificateRequired
            | A::DecryptError
            | A::HandshakeFailure
    )
}

fn describe_alert(alert: AlertDescription) -> String {
    use AlertDescription as A;
    match alert {
        A::CertificateRequired | A::NoCertificate => {
            "it requires a client certificate and got none: set `tls = \"mutual\"`".to_owned()
        }
        A::UnknownCA => "it does not trust the issuer of our certificate (alert unknown_ca)".to_owned(),
        A::CertificateExpired => {
            "it reports that our certificate has expired or is not valid yet: is its clock right?".to_owned()
        }
        A::CertificateRevoked => "it reports that our certificate has been revoked".to_owned(),
        A::ProtocolVersion => format!("it supports no TLS version allowed here (alert protocol_version); {MIN_TLS}"),
        A::UnrecognisedName => "it does not know the requested name (alert unrecognized_name): `server_name` sets it".to_owned(),
        A::NoApplicationProtocol => "it does not accept the protocol that we offered (alert no_application_protocol): set `protocol` here, or, for bytes that are not HTTP, `protocol = \"tcp\"` in its sidecar's `[[inbound.port]]`".to_owned(),
        alert if is_about_certificates(alert) => {
            format!("it does not accept our certificate (alert {alert:?}); its own log says why")
        }
        alert => format!("it ended the handshake (alert {alert:?})"),
    }
}
