//! Connections to the servers that the proxy itself requests: by TCP to an address of the host, then TLS for `https`.
//!
//! The host is resolved for each new connection, and its addresses are tried in turn. No environment variable names a
//! proxy for them.

use std::{
    future::Future,
    io::{self, IoSlice},
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use http::Uri;
use hyper_util::{
    client::legacy::connect::{Connected, Connection},
    rt::TokioIo,
};
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tower::Service;

use super::{Destination, FetchError, roots};
use crate::{descriptors, dns::Resolver};

/// TCP keep-alive: the idle time before the first probe, and the interval. It detects a server that has gone silently,
/// although nothing more is sent to it.
const ALIVE_AFTER: Duration = Duration::from_secs(30);
const ALIVE_EVERY: Duration = Duration::from_secs(10);
/// Limit for a connection that its request no longer waits for: the client completes it for the pool if another
/// connection becomes idle first. A request has a limit of its own.
const CONNECT_LIMIT: Duration = Duration::from_secs(60);

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
            Ok(FetchConnection::new(self.secure(to, tcp).await?))
        } else {
            Ok(FetchConnection::new(tcp))
        }
    }

    /// Connects to the first address that accepts.
    async fn connect_tcp(&self, to: &Destination) -> Result<TcpStream, FetchError> {
        let mut refused = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for ip in self.resolver.addresses(&to.host).await?.addresses {
            match descriptors::connect(SocketAddr::new(ip, to.port)).await {
                Ok(stream) => {
                    // Without the options the connection still works.
                    let _ = stream.set_nodelay(true);
                    let keepalive = TcpKeepalive::new().with_time(ALIVE_AFTER).with_interval(ALIVE_EVERY);
                    let _ = SockRef::from(&stream).set_tcp_keepalive(&keepalive);
                    return Ok(stream);
                }
                Err(error) => refused = error,
            }
        }
        Err(FetchError::Connect { authority: to.authority.clone(), source: Arc::new(refused) })
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

trait ByteStream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> ByteStream for S {}

/// A connection to a server, with or without TLS.
pub struct FetchConnection {
    stream: Box<dyn ByteStream>,
    usage: ConnectionUsage,
}

/// Whether a connection has carried a response. The client attaches it to responses and errors.
#[derive(Clone, Default)]
pub struct ConnectionUsage(Arc<AtomicBool>);

impl ConnectionUsage {
    pub fn record_response(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub fn had_response(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl FetchConnection {
    fn new(stream: impl ByteStream + 'static) -> Self {
        Self { stream: Box::new(stream), usage: ConnectionUsage::default() }
    }
}

impl Connection for FetchConnection {
    fn connected(&self) -> Connected {
        Connected::new().extra(self.usage.clone())
    }
}

impl AsyncRead for FetchConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for FetchConnection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    /// Sends TLS's `close_notify` if the socket accepts it now: a server that has stopped reading must not keep the
    /// connection open.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match Pin::new(&mut self.stream).poll_shutdown(cx) {
            Poll::Pending => Poll::Ready(Ok(())),
            finished => finished,
        }
    }
}
