//! Opening a connection to an endpoint.

use std::{
    cell::Cell,
    io,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, SystemTime},
};

use super::stream::UpstreamIo;
use crate::{
    config::TlsMode,
    descriptors,
    identity::{
        Peer,
        handshake::{self, TlsFailure, VerifiedPeer},
        tls::ClientTls,
    },
    net::{
        alpn::{ApplicationProtocol, ConnectionTls},
        io::SharedTcp,
    },
};
use rustls_pki_types::{CertificateDer, ServerName};

/// Why a connection could not be opened.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("{address} refused the connection ({source})")]
    Refused { address: SocketAddr, source: Rc<io::Error> },
    /// This process or machine lacked a resource for the attempt; it says nothing about the endpoint.
    #[error("no connection to {address}: {} ({source})", descriptors::missing_resource(source).unwrap_or("a local error"))]
    LocalResource { address: SocketAddr, source: Rc<io::Error> },
    #[error("{address} did not accept a connection within {limit:?}")]
    Timeout { address: SocketAddr, limit: Duration },
    #[error("{limit} connections to this upstream are open already (`limits.max_connections`)")]
    ConnectionLimit { limit: u32 },
    #[error(
        "no HTTP/2 stream was free within {waited:?}: the endpoint allows {limit} concurrent streams per connection \
         (SETTINGS_MAX_CONCURRENT_STREAMS), and {connections} connections are open"
    )]
    StreamLimit { limit: u32, connections: usize, waited: Duration },
    #[error("HTTP/2 handshake with {address} failed ({reason})")]
    Handshake { address: SocketAddr, reason: String },
    #[error("{address}: {failure}")]
    Tls { address: SocketAddr, failure: Rc<TlsFailure> },
}

impl ConnectError {
    fn from_io(address: SocketAddr, error: io::Error) -> Self {
        let is_local = descriptors::is_local_resource(&error);
        let source = Rc::new(error);
        if is_local { Self::LocalResource { address, source } } else { Self::Refused { address, source } }
    }
}

/// The TLS settings and server name of a connection.
#[derive(Clone, Debug)]
pub struct TlsTarget {
    pub client: Arc<ClientTls>,
    /// SNI; also the name that the certificate must match if no identity is expected.
    pub name: Arc<ServerName<'static>>,
}

impl PartialEq for TlsTarget {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.client, &other.client) && self.name == other.name
    }
}

/// An open connection.
#[derive(Debug)]
pub struct NewConnection {
    pub io: UpstreamIo,
    pub tcp: SharedTcp,
    /// The verified identity of the server; none without TLS.
    pub verification: Option<Box<PeerVerification>>,
}

impl NewConnection {
    /// How the connection is protected, for metrics.
    pub fn protection(&self) -> ConnectionTls {
        match &self.verification {
            None => ConnectionTls::None,
            Some(proof) if proof.client.settings.mode == TlsMode::Mutual => ConnectionTls::Mutual,
            Some(_) => ConnectionTls::Server,
        }
    }
}

/// The verified identity of a server, the settings that verified it, and when its certificates expire.
#[derive(Debug)]
pub struct PeerVerification {
    pub peer: Peer,
    chain: Vec<CertificateDer<'static>>,
    valid_until: SystemTime,
    client: Arc<ClientTls>,
    name: Arc<ServerName<'static>>,
    verified_generation: Cell<u64>,
}

impl PeerVerification {
    /// Whether a connection verified this way may carry a request that needs `target`. If the trusted roots have
    /// changed since, the certificate chain is verified again, once.
    pub fn matches_target(&self, target: &TlsTarget) -> bool {
        if !Arc::ptr_eq(&self.client, &target.client) || *self.name != *target.name {
            return false;
        }
        self.is_still_trusted()
    }

    /// Whether it was verified by these settings and is still trusted. The server name does not matter.
    pub fn uses_settings(&self, client: &Arc<ClientTls>) -> bool {
        Arc::ptr_eq(&self.client, client) && self.is_still_trusted()
    }

    fn is_still_trusted(&self) -> bool {
        let generation = self.client.generation();
        if self.verified_generation.get() == generation {
            return true;
        }
        let verdict = match &**self.client.current() {
            Ok(now) => now.reverify(&self.chain).map(drop).map_err(|refusal| refusal.to_string()),
            Err(reason) => Err(reason.clone()),
        };
        match verdict {
            Ok(()) => self.verified_generation.set(generation),
            Err(reason) => {
                tracing::info!(peer = %self.peer, %reason, "connection not reused: certificate no longer trusted");
            }
        }
        self.verified_generation.get() == generation
    }

    /// The remaining validity of its certificate chain.
    pub fn expires_in(&self) -> Duration {
        self.valid_until.duration_since(SystemTime::now()).unwrap_or_default()
    }

    /// When the client certificate of this sidecar expired, if it has.
    pub fn client_certificate_expired_at(&self) -> Option<SystemTime> {
        self.client.current().as_ref().as_ref().ok()?.own_certificate_expired_at()
    }
}

/// How long the kernel waits for the peer of a connection.
#[derive(Clone, Copy, Debug, Default)]
pub struct TcpTimeouts {
    /// To establish the connection, including TLS.
    pub connect: Option<Duration>,
    /// For the acknowledgement of sent bytes (TCP_USER_TIMEOUT).
    pub user_timeout: Option<Duration>,
}

/// Opens a connection within `limits`, with TLS if `tls` is given.
pub async fn connect(
    address: SocketAddr,
    limits: TcpTimeouts,
    tls: Option<&TlsTarget>,
    protocol: ApplicationProtocol,
) -> Result<NewConnection, ConnectError> {
    let connecting = async {
        let stream = descriptors::connect(address).await;
        let tcp = stream.map(SharedTcp::new).map_err(|error| ConnectError::from_io(address, error))?;
        if limits.user_timeout.is_some() {
            tcp.set_user_timeout(limits.user_timeout);
        }
        match tls {
            None => Ok(NewConnection { io: UpstreamIo::Plain(tcp.clone()), tcp, verification: None }),
            Some(target) => Box::pin(secure(address, tcp, target, protocol)).await,
        }
    };
    match limits.connect {
        Some(limit) => tokio::time::timeout(limit, connecting)
            .await
            .unwrap_or(Err(ConnectError::Timeout { address, limit })),
        None => connecting.await,
    }
}

async fn secure(
    address: SocketAddr,
    tcp: SharedTcp,
    target: &TlsTarget,
    protocol: ApplicationProtocol,
) -> Result<NewConnection, ConnectError> {
    // Read before the handshake: a change of the roots meanwhile leads to another verification.
    let generation = target.client.generation();
    let connecting = handshake::connect(&target.client, &target.name, protocol, tcp.clone());
    let (stream, VerifiedPeer { peer, chain, valid_until }) =
        connecting.await.map_err(|failure| ConnectError::Tls { address, failure: Rc::new(failure) })?;
    let proof = Box::new(PeerVerification {
        peer,
        chain,
        valid_until,
        client: Arc::clone(&target.client),
        name: Arc::clone(&target.name),
        verified_generation: Cell::new(generation),
    });
    Ok(NewConnection { io: UpstreamIo::Tls(Box::new(stream)), tcp, verification: Some(proof) })
}
