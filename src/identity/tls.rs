//! rustls configurations for inbound connections and for upstreams.
//!
//! TLS 1.3 unless `min_tls` allows 1.2, X25519MLKEM768 preferred, no early data. Sessions are resumed with tickets
//! that all workers can read. Tickets are dropped when the trusted roots change, because a resumed session has the
//! certificate of its first handshake and rustls does not verify it again.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use arc_swap::ArcSwap;
use rustls::{
    ClientConfig, ServerConfig, SupportedProtocolVersion,
    client::Resumption,
    server::{NoServerSessionStorage, ProducesTickets},
    sign::SingleCertAndKey,
    version::{TLS12, TLS13},
};
use rustls_pki_types::CertificateDer;

use super::{
    IdentityPattern, Peer,
    counts::Handshakes,
    material::Material,
    trust::{Role, Trust, VerifyError, check_identity, provider},
    verify::{ClientVerifier, ServerVerifier},
};
use crate::config::{MinTls, TlsMode, UpstreamTls};

/// The ALPN names of HTTP.
pub const ALPN_H2: &[u8] = b"h2";
pub const ALPN_HTTP1: &[u8] = b"http/1.1";
/// The ALPN name of a byte stream between sidecars: the server forwards it without protocol detection.
pub const ALPN_BYTE_STREAM: &[u8] = b"outrigger-tcp";
/// Servers whose sessions are kept for each upstream.
const SESSIONS: usize = 64;

const BOTH: &[&SupportedProtocolVersion] = &[&TLS13, &TLS12];
const NEWEST: &[&SupportedProtocolVersion] = &[&TLS13];

fn versions(min: MinTls) -> &'static [&'static SupportedProtocolVersion] {
    match min {
        MinTls::V12 => BOTH,
        MinTls::V13 => NEWEST,
    }
}

/// Session ticket keys. Strict and permissive mode have separate ones, so a session that began without a client
/// certificate cannot be resumed where one is required.
#[derive(Clone, Debug)]
pub struct Tickets {
    strict: Arc<dyn ProducesTickets>,
    permissive: Arc<dyn ProducesTickets>,
}

impl Tickets {
    /// # Errors
    ///
    /// If the system has no randomness.
    pub fn new() -> Result<Self, rustls::Error> {
        let ticketer = rustls::crypto::aws_lc_rs::Ticketer::new;
        Ok(Self { strict: ticketer()?, permissive: ticketer()? })
    }
}

/// What a client that sends ALPN is offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AlpnOffer {
    /// HTTP/2 only if the client offers nothing else. A service that needs HTTP/2 sets its `protocol`.
    Http1First,
    H2First,
    /// No ALPN: the protocol is between client and service.
    NoAlpn,
    /// A byte stream of another sidecar.
    ByteStream,
}

#[derive(Debug)]
struct Configs {
    http1_first: Arc<ServerConfig>,
    h2_first: Arc<ServerConfig>,
    nothing: Arc<ServerConfig>,
    byte_stream: Arc<ServerConfig>,
}

/// Server TLS for inbound connections.
#[derive(Debug)]
pub struct ServerTls {
    strict: Configs,
    permissive: Configs,
    pub trust: Arc<Trust>,
}

impl ServerTls {
    /// # Errors
    ///
    /// If rustls rejects the configuration, which would be a bug.
    pub fn new(material: &Material, min: MinTls, tickets: &Tickets) -> Result<Self, rustls::Error> {
        let config = |mandatory, alpn: &[&[u8]]| {
            let verifier = ClientVerifier::new(Arc::clone(&material.trust), mandatory);
            let mut config = ServerConfig::builder_with_provider(Arc::clone(provider()))
                .with_protocol_versions(versions(min))?
                .with_client_cert_verifier(Arc::new(verifier))
                .with_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(&material.key))));
            config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
            config.ticketer = Arc::clone(if mandatory { &tickets.strict } else { &tickets.permissive });
            config.session_storage = Arc::new(NoServerSessionStorage {});
            // With TLS 1.2 an old client may prefer weak cipher suites. Those of 1.3 are all strong.
            config.ignore_client_order = min == MinTls::V12;
            // Each ticket is some kilobytes with the client's chain; pools open several connections only under load.
            config.send_tls13_tickets = 1;
            Ok::<_, rustls::Error>(Arc::new(config))
        };
        let configs = |mandatory| {
            Ok::<_, rustls::Error>(Configs {
                http1_first: config(mandatory, &[ALPN_HTTP1, ALPN_H2])?,
                h2_first: config(mandatory, &[ALPN_H2, ALPN_HTTP1])?,
                nothing: config(mandatory, &[])?,
                byte_stream: config(mandatory, &[ALPN_BYTE_STREAM])?,
            })
        };
        Ok(Self { strict: configs(true)?, permissive: configs(false)?, trust: Arc::clone(&material.trust) })
    }

    pub fn config(&self, mandatory: bool, offer: AlpnOffer) -> Arc<ServerConfig> {
        let configs = if mandatory { &self.strict } else { &self.permissive };
        Arc::clone(match offer {
            AlpnOffer::Http1First => &configs.http1_first,
            AlpnOffer::H2First => &configs.h2_first,
            AlpnOffer::NoAlpn => &configs.nothing,
            AlpnOffer::ByteStream => &configs.byte_stream,
        })
    }
}

/// Client TLS of one upstream. Lives as long as its settings; its content changes with certificates and roots.
#[derive(Debug)]
pub struct ClientTls {
    pub settings: UpstreamTls,
    pub min: MinTls,
    current: ArcSwap<Result<ClientTlsConfig, String>>,
    pub(super) handshakes: Arc<Handshakes>,
    /// Counts the changes of `current`.
    generation: AtomicU64,
}

/// The TLS configuration for new connections to an upstream.
#[derive(Clone, Debug)]
pub struct ClientTlsConfig {
    pub config: Arc<ClientConfig>,
    pub trust: Arc<Trust>,
    /// The accepted identities of the server; empty: its certificate must have the host name.
    pub expected: Arc<[IdentityPattern]>,
    /// When our client certificate expires; `None` if none is presented.
    own_expires: Option<SystemTime>,
}

impl ClientTlsConfig {
    /// When our client certificate expired, if it has.
    pub fn own_certificate_expired_at(&self) -> Option<SystemTime> {
        self.own_expires.filter(|at| *at <= SystemTime::now())
    }

    /// The same without session resumption, for one connection. A resumed session would hide the expired certificate
    /// from the server.
    pub fn without_resumption(&self) -> Arc<ClientConfig> {
        let mut config = ClientConfig::clone(&self.config);
        config.resumption = Resumption::disabled();
        Arc::new(config)
    }

    /// Verifies the chain of an established connection again.
    ///
    /// # Errors
    ///
    /// Why it is no longer accepted.
    pub fn reverify(&self, chain: &[CertificateDer<'_>]) -> Result<Peer, VerifyError> {
        let (leaf, intermediates) = chain.split_first().ok_or(VerifyError::NoCertificate)?;
        let peer = self.trust.verify(leaf, intermediates, rustls_pki_types::UnixTime::now(), Role::Server)?;
        if !self.expected.is_empty() {
            check_identity(&peer, leaf, &self.expected)?;
        }
        Ok(peer)
    }
}

impl ClientTls {
    pub fn new(settings: UpstreamTls, min: MinTls, handshakes: Arc<Handshakes>) -> Self {
        let none = Err("its certificates are not loaded yet".to_owned());
        Self {
            settings,
            min,
            current: ArcSwap::from_pointee(none),
            handshakes,
            generation: AtomicU64::new(0),
        }
    }

    /// The configuration for new connections, or why there can be none.
    pub fn current(&self) -> arc_swap::Guard<Arc<Result<ClientTlsConfig, String>>> {
        self.current.load()
    }

    /// Applies another certificate or other roots. `own`: for mutual TLS.
    pub fn update(&self, trust: Result<Arc<Trust>, String>, own: Option<&Material>) {
        self.current.store(Arc::new(self.build(trust, own)));
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// Changes with every update of the certificate or the roots.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    fn build(
        &self,
        trust: Result<Arc<Trust>, String>,
        own: Option<&Material>,
    ) -> Result<ClientTlsConfig, String> {
        let trust = trust?;
        let describe = |error: rustls::Error| format!("cannot set up TLS: {error}");
        let patterns = self.settings.identity.iter().map(|text| {
            text.parse::<IdentityPattern>()
                .map_err(|error| format!("invalid pattern `{text}` in `identity`: {error}"))
        });
        let expected: Vec<IdentityPattern> = patterns.collect::<Result<_, _>>()?;
        let verifier = ServerVerifier { trust: Arc::clone(&trust), expected: expected.clone() };
        let builder = ClientConfig::builder_with_provider(Arc::clone(provider()))
            .with_protocol_versions(versions(self.min))
            .map_err(describe)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier));
        let mut config = match (self.settings.mode, own) {
            (TlsMode::Mutual, Some(own)) => {
                builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(&own.key))))
            }
            (TlsMode::Mutual, None) => return Err("this service has no valid certificate yet".to_owned()),
            (TlsMode::Simple | TlsMode::Off, _) => builder.with_no_client_auth(),
        };
        // A new cache with each change: a resumed session would present the old certificate.
        config.resumption = Resumption::in_memory_sessions(SESSIONS);
        let own_expires =
            own.filter(|_| self.settings.mode == TlsMode::Mutual).map(|own| own.identity.not_after);
        Ok(ClientTlsConfig { config: Arc::new(config), trust, expected: expected.into(), own_expires })
    }
}
