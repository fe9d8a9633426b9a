//! Handshakes, and what went wrong in them, in plain words.

use std::{io, sync::Arc, time::SystemTime};

use rustls::{AlertDescription, HandshakeKind, ProtocolVersion, server::Acceptor};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{LazyConfigAcceptor, TlsConnector, client, server};

use crate::{authorization::peer, config::TlsMode, net::alpn::Speaks};

use super::{
    Peer,
    time::Date,
    tls::{ALPN_BYTE_STREAM, ALPN_H2, ALPN_HTTP1, ClientNow, ClientTls, Offer, ServerTls},
    trust::{Refusal, Role, Trust, refused},
};

const MIN_TLS: &str = "`min_tls` of `[identity]`, or of the upstream, sets the oldest";

/// Why there is no TLS connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct TlsFailure {
    pub kind: FailureKind,
    /// What happened, of whom it is told that something happened to: "its certificate expired on …".
    pub reason: String,
}

/// What went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// The other side is not who it should be, or cannot prove it.
    PeerIdentity,
    /// It showed no certificate.
    NoCertificate,
    /// It does not believe us, or does not speak our TLS.
    Refused,
    /// It and we have no protocol in common (ALPN).
    NoProtocol,
    /// It speaks something else.
    NotTls,
    /// The connection broke.
    Broken,
    /// There is nothing to prove ourselves with, or to check the other side by.
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

    /// Whether the peer did not prove the identity that is expected of it: the cause is `peer_identity`.
    pub const fn is_about_identity(self) -> bool {
        matches!(self, Self::PeerIdentity | Self::NoCertificate)
    }

    /// As metrics say it.
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

/// A server that was believed.
#[derive(Debug)]
pub struct Proven {
    pub peer: Peer,
    pub chain: Vec<CertificateDer<'static>>,
    /// When a certificate of the chain expires, so that it has to be verified again.
    pub valid_until: SystemTime,
}

/// Connects by TLS over a connection that is open already.
///
/// # Errors
///
/// Says in plain words what was wrong with whom.
pub async fn connect<IO>(
    client: &ClientTls,
    name: &ServerName<'static>,
    speaks: Speaks,
    io: IO,
) -> Result<(client::TlsStream<IO>, Proven), TlsFailure>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let connected = async {
        let now: ClientNow = match &**client.now() {
            Ok(now) => now.clone(),
            Err(reason) => return Err(TlsFailure { kind: FailureKind::NotReady, reason: reason.clone() }),
        };
        let own_expired = now.own_expired();
        let config = if own_expired.is_some() { now.without_resumption() } else { Arc::clone(&now.config) };
        let connector = TlsConnector::from(config);
        let connecting = match speaks {
            Speaks::Http1 => connector.with_alpn(vec![ALPN_HTTP1.to_vec()]).connect(name.clone(), io),
            Speaks::H2 => connector.with_alpn(vec![ALPN_H2.to_vec()]).connect(name.clone(), io),
            Speaks::ByteStream if client.settings.mode == TlsMode::Mutual => {
                connector.with_alpn(vec![ALPN_BYTE_STREAM.to_vec()]).connect(name.clone(), io)
            }
            Speaks::Bytes | Speaks::ByteStream => connector.connect(name.clone(), io),
        };
        let stream = connecting.await.map_err(|error| {
            let failure = explain(&error, &now.trust, Role::Server);
            match own_expired {
                // Not what we find wrong with the server.
                Some(at) if matches!(failure.kind, FailureKind::Refused | FailureKind::Broken) => {
                    own_has_expired(at)
                }
                _ => failure,
            }
        })?;
        let (_, tls) = stream.get_ref();
        if speaks == Speaks::H2 && tls.alpn_protocol() != Some(ALPN_H2) {
            let reason =
                "it does not offer HTTP/2 over TLS (ALPN h2): say so by `protocol = \"http1\"`".to_owned();
            return Err(TlsFailure { kind: FailureKind::NoProtocol, reason });
        }
        let proven = proven(tls.peer_certificates(), &now.trust, Role::Server)?
            .ok_or_else(|| of_certificate(&Refusal::Unknown))?;
        Ok((stream, proven))
    };
    let connected = connected.await;
    let counts = &client.handshakes.outbound;
    match &connected {
        Ok((stream, _)) => counts.done(stream.get_ref().1.handshake_kind() == Some(HandshakeKind::Resumed)),
        Err(failure) => counts.failed(failure.kind),
    }
    connected
}

/// Who the other side proved to be, by the chain that it showed.
///
/// A resumed session shows the chain of its first handshake, which rustls does not verify again. What has been revoked, or
/// is no longer trusted, cannot be resumed: tickets and sessions are renewed with roots and revocation lists. What has
/// expired meanwhile is found here, an intermediate as well as the leaf.
fn proven(
    chain: Option<&[CertificateDer<'_>]>,
    trust: &Trust,
    role: Role,
) -> Result<Option<Proven>, TlsFailure> {
    let Some(chain) = chain else { return Ok(None) };
    let chain: Vec<_> = chain.iter().map(|certificate| certificate.clone().into_owned()).collect();
    let refused = |refusal: Refusal| of_certificate(&refusal);
    let (leaf, intermediates) = chain.split_first().ok_or_else(|| refused(Refusal::Unknown))?;
    let peer = Peer::of(leaf).map_err(|error| refused(error.into()))?;
    let now = SystemTime::now();
    let ends: Vec<_> = chain.iter().filter_map(|certificate| peer::not_after(certificate)).collect();
    if ends.len() < chain.len() || ends.iter().any(|end| *end <= now) {
        // One that has expired may be of no use for the path, as old cross-signed ones are.
        trust.verify(leaf, intermediates, UnixTime::now(), role).map_err(refused)?;
    }
    let valid_until = ends.into_iter().filter(|end| *end > now).min().unwrap_or(peer.not_after);
    Ok(Some(Proven { peer, chain, valid_until }))
}

/// A caller that was met by TLS.
#[derive(Debug)]
pub struct Met<IO> {
    pub stream: server::TlsStream<IO>,
    /// None: it showed no certificate, and needed none.
    pub proven: Option<Proven>,
    pub speaks: Option<Speaks>,
    /// By TLS 1.2, which `min_tls` may rule out later.
    pub tls12: bool,
    /// It had been met before, and no certificate was shown anew.
    pub resumed: bool,
}

/// What a port offers to clients by ALPN.
#[derive(Clone, Copy, Debug)]
pub struct PortOffer {
    pub http: Offer,
    /// Whether the port takes byte streams of other sidecars.
    pub byte_streams: bool,
}

/// Meets a caller that has begun to speak TLS.
///
/// # Errors
///
/// Says in plain words what was wrong with the caller.
pub async fn accept<IO>(
    server: &ServerTls,
    mandatory: bool,
    offer: PortOffer,
    io: IO,
) -> Result<Met<IO>, TlsFailure>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let explain = |error: &io::Error| explain(error, &server.trust, Role::Client);
    let hello = LazyConfigAcceptor::new(Acceptor::default(), io).await.map_err(|error| explain(&error))?;
    let is_http = |name: &[u8]| name == ALPN_H2 || name == ALPN_HTTP1;
    let offers = |wanted: &dyn Fn(&[u8]) -> bool| hello.client_hello().alpn().map(|mut all| all.any(wanted));
    let wants_http = offers(&is_http);
    let wants_stream = offers(&|name| name == ALPN_BYTE_STREAM) == Some(true);
    let offer = match wants_http {
        _ if wants_stream && offer.byte_streams => Offer::ByteStream,
        Some(false) if wants_stream => {
            // Ends the handshake by an alert that tells the other sidecar why.
            let config = server.config(mandatory, Offer::Http1First);
            let _ = hello.into_stream(config).await;
            let reason = "it opened a byte stream, and this port takes HTTP only: \
                          `protocol = \"tcp\"` in an `[[inbound.port]]` of that port lets it in"
                .to_owned();
            return Err(TlsFailure { kind: FailureKind::NoProtocol, reason });
        }
        // Another protocol is for the service to understand, and must not end the handshake.
        Some(false) => Offer::Nothing,
        _ => offer.http,
    };
    let stream = hello.into_stream(server.config(mandatory, offer)).await.map_err(|error| explain(&error))?;
    let (_, tls) = stream.get_ref();
    let speaks = match tls.alpn_protocol() {
        Some(ALPN_H2) => Some(Speaks::H2),
        Some(ALPN_HTTP1) => Some(Speaks::Http1),
        Some(ALPN_BYTE_STREAM) => Some(Speaks::ByteStream),
        _ => None,
    };
    let tls12 = tls.protocol_version() == Some(ProtocolVersion::TLSv1_2);
    let resumed = tls.handshake_kind() == Some(HandshakeKind::Resumed);
    let proven = proven(tls.peer_certificates(), &server.trust, Role::Client)?;
    if mandatory && proven.is_none() {
        return Err(of_certificate(&Refusal::Unknown));
    }
    Ok(Met { stream, proven, speaks, tls12, resumed })
}

fn of_certificate(refusal: &Refusal) -> TlsFailure {
    let kind = match refusal {
        Refusal::Unknown => FailureKind::NoCertificate,
        _ => FailureKind::PeerIdentity,
    };
    TlsFailure { kind, reason: refusal.to_string() }
}

/// The other side does not accept our certificate, and that is no wonder.
pub fn own_has_expired(at: SystemTime) -> TlsFailure {
    let reason = format!("it does not accept our certificate, which expired on {}: renew it", Date(at));
    TlsFailure { kind: FailureKind::NotReady, reason }
}

/// What an error of a handshake, or of a connection after it, means. `role`: what the other side is.
pub fn explain(error: &io::Error, trust: &Trust, role: Role) -> TlsFailure {
    let Some(tls) = tls_error(error) else {
        let reason = match error.kind() {
            io::ErrorKind::UnexpectedEof => "it closed the connection during the TLS handshake".to_owned(),
            _ => format!("the connection broke during the TLS handshake ({error})"),
        };
        return TlsFailure { kind: FailureKind::Broken, reason };
    };
    if let Some(refusal) = refused(tls, trust, role) {
        return of_certificate(&refusal);
    }
    let failure = |kind, reason: String| TlsFailure { kind, reason };
    match tls {
        rustls::Error::AlertReceived(alert @ AlertDescription::NoApplicationProtocol) => {
            failure(FailureKind::NoProtocol, alert_in_words(*alert))
        }
        rustls::Error::AlertReceived(alert) => failure(FailureKind::Refused, alert_in_words(*alert)),
        rustls::Error::NoCertificatesPresented => {
            failure(FailureKind::NoCertificate, Refusal::Unknown.to_string())
        }
        rustls::Error::InvalidMessage(_) => {
            failure(FailureKind::NotTls, "what it speaks on this port is not TLS".to_owned())
        }
        rustls::Error::InvalidCertificate(error) => {
            failure(FailureKind::PeerIdentity, format!("its certificate is not valid ({error})"))
        }
        rustls::Error::PeerIncompatible(why) => {
            let reason = format!("it speaks no TLS that is spoken here ({why:?}); {MIN_TLS}");
            failure(FailureKind::Refused, reason)
        }
        rustls::Error::NoApplicationProtocol => {
            failure(FailureKind::NoProtocol, "it and we have no protocol in common (ALPN)".to_owned())
        }
        other => failure(FailureKind::Refused, format!("the TLS handshake failed: {other}")),
    }
}

/// The alert by which the other side ended a connection that was open already: with TLS 1.3 a server looks at our
/// certificate when we believe to be done. None of what was sent then has reached a service.
pub fn refused_after(error: &(dyn std::error::Error + 'static)) -> Option<TlsFailure> {
    let mut error = Some(error);
    while let Some(this) = error {
        if let Some(rustls::Error::AlertReceived(alert)) =
            this.downcast_ref::<io::Error>().and_then(tls_error)
            && is_about_certificates(*alert)
        {
            return Some(TlsFailure { kind: FailureKind::Refused, reason: alert_in_words(*alert) });
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

fn alert_in_words(alert: AlertDescription) -> String {
    use AlertDescription as A;
    match alert {
        A::CertificateRequired | A::NoCertificate => {
            "it wants a client certificate, and was shown none: `tls = \"mutual\"` shows ours".to_owned()
        }
        A::UnknownCA => "it does not trust who issued our certificate (alert unknown_ca)".to_owned(),
        A::CertificateExpired => {
            "it says that our certificate has expired or is not valid yet: is its clock right?".to_owned()
        }
        A::CertificateRevoked => "it says that our certificate has been revoked".to_owned(),
        A::ProtocolVersion => format!("it speaks no TLS that is spoken here (alert protocol_version); {MIN_TLS}"),
        A::UnrecognisedName => "it does not know the name it was asked for (alert unrecognized_name): `server_name` sets it".to_owned(),
        A::NoApplicationProtocol => "it does not take the protocol we offered (alert no_application_protocol): set `protocol` here, or, for bytes that are not HTTP, `protocol = \"tcp\"` in its sidecar's `[[inbound.port]]`".to_owned(),
        alert if is_about_certificates(alert) => {
            format!("it does not accept our certificate (alert {alert:?}); its own log says why")
        }
        alert => format!("it ended the handshake (alert {alert:?})"),
    }
}
