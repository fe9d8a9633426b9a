//! Connections to the servers that the proxy itself requests: by TCP to an address of the host, then TLS for `https`.
//!
//! The host is resolved for each new connection, and its addresses are tried in turn, except those of [`DENIED`]. No
//! environment variable names a proxy for them.
//!
//! A connection that is dropped before its response is complete is reset. `close` would leave what the server has not
//! read to the kernel, which offers it to a server that reads nothing for minutes, with up to `net.ipv4.tcp_wmem` bytes.

use std::{
    future::Future,
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{Arc, LazyLock, OnceLock},
    task::{Context, Poll},
    time::Duration,
};

use http::Uri;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use socket2::{SockRef, TcpKeepalive};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tower::Service;

use super::{Destination, FetchError, connection::FetchConnection, roots};
use crate::{config::Network, descriptors, dns::Resolver};

/// TCP keep-alive: the idle time before the first probe, and the interval. It detects a server that has gone silently,
/// although nothing more is sent to it.
const ALIVE_AFTER: Duration = Duration::from_secs(30);
const ALIVE_EVERY: Duration = Duration::from_secs(10);
/// Limit for a connection that its request no longer waits for: the client completes it for the pool if another
/// connection becomes idle first. A request has a limit of its own.
const CONNECT_LIMIT: Duration = Duration::from_secs(60);

/// The networks that no name may lead to. Fixed, because `outbound.deny_networks` is for the requests of clients: it may
/// contain the private network in which the identity provider or the collector is.
static DENIED: LazyLock<Vec<Network>> = LazyLock::new(Network::denied_by_default);

/// Connects to the server of a URL.
#[derive(Clone)]
pub struct Connector {
    resolver: Arc<Resolver>,
    /// Created on first use: reading the system's roots takes milliseconds, which a start without TLS saves.
    tls: Arc<OnceLock<Arc<ClientConfig>>>,
}

impl Connector {
    /// Trusts the system's roots.
    pub fn new(resolver: Arc<Resolver>) -> Self {
        Self { resolver, tls: Arc::default() }
    }

    pub fn with_tls(resolver: Arc<Resolver>, tls: ClientConfig) -> Self {
        Self { resolver, tls: Arc::new(OnceLock::from(Arc::new(tls))) }
    }

    async fn connect(&self, to: &Destination) -> Result<FetchConnection, FetchError> {
        let tcp = self.connect_tcp(to).await?;
        if to.tls {
            Ok(FetchConnection::tls(self.secure(to, tcp).await?))
        } else {
            Ok(FetchConnection::plain(tcp))
        }
    }

    /// Connects to the first address that accepts.
    async fn connect_tcp(&self, to: &Destination) -> Result<TcpStream, FetchError> {
        let (mut refused, mut denied) = (None, None);
        // An address in the URL is the choice of who wrote the configuration.
        let is_name = to.host.parse::<IpAddr>().is_err();
        for ip in self.resolver.addresses(&to.host).await?.addresses {
            if is_name && let Some(network) = Network::find(&DENIED, ip) {
                denied = Some((ip, network));
                continue;
            }
            match descriptors::connect(SocketAddr::new(ip, to.port)).await {
                Ok(stream) => {
                    // Without the options the connection still works.
                    let _ = stream.set_nodelay(true);
                    let keepalive = TcpKeepalive::new().with_time(ALIVE_AFTER).with_interval(ALIVE_EVERY);
                    let _ = SockRef::from(&stream).set_tcp_keepalive(&keepalive);
                    return Ok(stream);
                }
                Err(error) => refused = Some(error),
            }
        }
        let authority = to.authority.clone();
        Err(match (refused, denied) {
            (None, Some((address, network))) => FetchError::Denied { authority, address, network },
            (refused, _) => {
                let none = || io::ErrorKind::AddrNotAvailable.into();
                FetchError::Connect { authority, source: Arc::new(refused.unwrap_or_else(none)) }
            }
        })
    }

    async fn secure(&self, to: &Destination, tcp: TcpStream) -> Result<TlsStream<TcpStream>, FetchError> {
        let refused = |source| FetchError::Tls { authority: to.authority.clone(), source: Arc::new(source) };
        let name = ServerName::try_from(to.host.clone())
            .map_err(|error| refused(io::Error::new(io::ErrorKind::InvalidInput, error)))?;
        let config = self.tls.get_or_init(|| Arc::new(roots::client_config(roots::system())));
        TlsConnector::from(Arc::clone(config)).connect(name, tcp).await.map_err(refused)
    }
}

impl Service<Uri> for Connector {
    type Response = TokioIo<FetchConnection>;
    type Error = FetchError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, FetchError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), FetchError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connector = self.clone();
        Box::pin(async move {
            let to = Destination::of(&uri)?;
            let expired = FetchError::Timeout { authority: to.authority.clone(), limit: CONNECT_LIMIT };
            let connection = timeout(CONNECT_LIMIT, connector.connect(&to)).await.unwrap_or(Err(expired));
            connection.map(TokioIo::new)
        })
    }
}
