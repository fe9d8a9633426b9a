//! HTTP requests that the proxy itself makes: JWKS, OAuth 2 tokens, export of spans, endpoints of Kubernetes services.
//!
//! HTTP/1.1, plaintext or over TLS, on the control thread; never through the proxy's own ports. Redirects are not
//! followed: only the configured URL is requested. Connections are pooled for each server.
//!
//! The configuration chooses the URL, DNS chooses the address: a name must not lead to link-local addresses or the
//! metadata service of a cloud, which hand out credentials (`src/fetch/connector.rs`).
//!
//! A server may close an idle connection just when a request is sent on it (RFC 9112 §9.3.1). The request is then sent
//! again on another connection, whatever its method: each request of the proxy itself reads, asks for a token or
//! exports spans, and a collector must accept spans that arrive twice (OTLP, "Duplicate Data").

mod connection;
mod connector;
mod destination;
#[cfg(test)]
mod pool_tests;
mod roots;
#[cfg(test)]
mod test_server;
#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    error::Error,
    fmt, fs,
    future::{Future, poll_fn},
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http::{Extensions, Request, Response, Uri, uri::Authority};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{self, Client, connect::capture_connection},
    rt::{TokioExecutor, TokioTimer},
};
use rustls_pki_types::pem;
use tokio::{task::yield_now, time::timeout};

use self::{
    connection::{ConnectionUsage, Exchange},
    connector::Connector,
    destination::{Destination, prepare},
};
use crate::{
    config::Network,
    dns::{DnsError, Resolver},
    redact,
};

/// How long a connection may be idle before it is closed: shorter than the limits of common servers.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Most idle connections to one server.
const MAX_IDLE: usize = 2;
/// Most files of roots whose connections are pooled.
const MAX_ROOTS_FILES: usize = 64;

type PooledClient = Client<Connector, Full<Bytes>>;

/// An HTTP client; cheap to clone. Clones share their connections.
#[derive(Clone, Debug)]
pub struct Fetcher {
    resolver: Arc<Resolver>,
    client: PooledClient,
    /// The clients that trust a file's certificates. Each has its own pool: a connection that one set of roots allows
    /// serves no request that trusts another.
    by_roots: Arc<Mutex<HashMap<PathBuf, RootsClient>>>,
}

/// A client, and the content of the file whose certificates it trusts.
struct RootsClient {
    pem: Vec<u8>,
    client: PooledClient,
}

impl fmt::Debug for RootsClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RootsClient").finish_non_exhaustive()
    }
}

/// Limits of a request.
#[derive(Clone, Copy, Debug)]
pub struct FetchLimits {
    /// For the whole exchange: resolving the name, connecting, and reading the response to its end.
    pub timeout: Duration,
    /// The most bytes of the response body.
    pub max_body: usize,
}

/// Why there is no response. A response with an error status is no `FetchError`.
///
/// `Clone`, because the client returns the connector's error by reference.
#[derive(Clone, Debug, thiserror::Error)]
pub enum FetchError {
    #[error("`{}` is not an http:// or https:// URL with a host", redact::url(&uri.to_string()))]
    Url { uri: Uri },
    #[error(transparent)]
    Name(#[from] DnsError),
    #[error("{authority} cannot be reached: {source}")]
    Connect { authority: Authority, source: Arc<io::Error> },
    #[error(
        "{authority} resolved to {address}, in {network} (link-local or cloud metadata): a URL that is to reach it must \
         contain the address instead of a name"
    )]
    Denied { authority: Authority, address: IpAddr, network: Network },
    #[error("TLS handshake with {authority} failed: {source}")]
    Tls { authority: Authority, source: Arc<io::Error> },
    #[error("{authority} sent no valid response: {source}")]
    Http { authority: Authority, source: ExchangeError },
    #[error("{authority} did not respond within {limit:?}")]
    Timeout { authority: Authority, limit: Duration },
    #[error("the response of {authority} is longer than {limit} bytes")]
    TooLong { authority: Authority, limit: usize },
    #[error("{path}: {reason}")]
    Roots { path: PathBuf, reason: String },
}

/// Why an exchange failed on an open connection.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ExchangeError {
    /// Before the response head. The client's own text says only that the request failed; its source says why.
    #[error("{}", .0.source().map_or_else(|| .0.to_string(), ToString::to_string))]
    Request(Arc<legacy::Error>),
    #[error(transparent)]
    Body(Arc<hyper::Error>),
}

impl Fetcher {
    /// Trusts the system's roots.
    pub fn new(resolver: Arc<Resolver>) -> Self {
        let client = pooled_client(Connector::new(Arc::clone(&resolver)));
        Self { resolver, client, by_roots: Arc::default() }
    }

    /// Trusts the certificates in a PEM file and nothing else. Connections are reused as long as the file's content is
    /// the same.
    ///
    /// # Errors
    /// [`FetchError::Roots`] if the file cannot be read or contains no certificate.
    pub fn with_roots_from(&self, path: &Path) -> Result<Self, FetchError> {
        let bad = |reason: String| FetchError::Roots { path: path.to_owned(), reason };
        let pem = fs::read(path).map_err(|error| bad(pem::Error::Io(error).to_string()))?;
        let mut clients = self.by_roots.lock().unwrap_or_else(PoisonError::into_inner);
        let client = match clients.get(path).filter(|known| known.pem == pem) {
            Some(known) => known.client.clone(),
            None => {
                let tls = roots::client_config(roots::from_pem(&pem).map_err(bad)?);
                let client = pooled_client(Connector::with_tls(Arc::clone(&self.resolver), tls));
                if clients.len() >= MAX_ROOTS_FILES {
                    // Files of a configuration that has been replaced. Others only lose their idle connections.
                    clients.clear();
                }
                clients.insert(path.to_owned(), RootsClient { pem, client: client.clone() });
                client
            }
        };
        drop(clients);
        Ok(Self { resolver: Arc::clone(&self.resolver), client, by_roots: Arc::clone(&self.by_roots) })
    }

    /// Sends a request, with an absolute URL, and reads the whole response.
    ///
    /// # Errors
    /// See [`FetchError`], which does not show whether anything was sent.
    pub async fn fetch(
        &self,
        request: Request<Bytes>,
        limits: FetchLimits,
    ) -> Result<Response<Bytes>, FetchError> {
        let (Destination { authority, .. }, request) = prepare(request)?;
        let exchange = async {
            let (response, exchange) = self.send(&authority, request).await?;
            let (head, body) = response.into_parts();
            let body = Limited::new(body, limits.max_body).collect().await.map_err(|error| {
                let authority = authority.clone();
                match error.downcast::<hyper::Error>() {
                    Ok(error) => {
                        FetchError::Http { authority, source: ExchangeError::Body(Arc::from(error)) }
                    }
                    Err(error) => {
                        debug_assert!(error.is::<LengthLimitError>());
                        FetchError::TooLong { authority, limit: limits.max_body }
                    }
                }
            })?;
            if let Some(exchange) = exchange {
                exchange.finish();
            }
            // The task that returns the connection to the pool runs before the next request of this task.
            yield_now().await;
            Ok(Response::from_parts(head, body.to_bytes()))
        };
        within(limits.timeout, &authority, exchange).await
    }

    /// Sends a request whose response has no end, and reads the response head within `limit`.
    ///
    /// # Errors
    /// See [`FetchError`].
    pub async fn stream(
        &self,
        request: Request<Bytes>,
        limit: Duration,
    ) -> Result<Response<ResponseStream>, FetchError> {
        let (Destination { authority, .. }, request) = prepare(request)?;
        let (response, exchange) = within(limit, &authority, self.send(&authority, request)).await?;
        Ok(response.map(|body| ResponseStream { body, exchange }))
    }

    /// Sends a request, again if its connection had been closed by the server since its last response.
    async fn send(
        &self,
        to: &Authority,
        request: Request<Full<Bytes>>,
    ) -> Result<(Response<Incoming>, Option<Exchange>), FetchError> {
        let mut closed = 0;
        loop {
            let mut request = request.clone();
            let (connection, mut exchange) = (capture_connection(&mut request), None);
            let mut response = pin!(self.client.request(request));
            let outcome = poll_fn(|cx| {
                let outcome = response.as_mut().poll(cx);
                Exchange::track(&mut exchange, &connection);
                outcome
            });
            match outcome.await {
                Ok(response) => {
                    if let Some(usage) = response.extensions().get::<ConnectionUsage>() {
                        usage.record_response();
                    }
                    return Ok((response, exchange));
                }
                // No more than there can be in the pool, then a new connection.
                Err(error) if closed < MAX_IDLE && is_stale_connection(&error) => closed += 1,
                Err(error) => return Err(request_error(to, error)),
            }
        }
    }
}

fn pooled_client(connector: Connector) -> PooledClient {
    Client::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE_TIMEOUT)
        .pool_max_idle_per_host(MAX_IDLE)
        .set_host(false)
        .build(connector)
}

async fn within<T>(
    limit: Duration,
    authority: &Authority,
    exchange: impl Future<Output = Result<T, FetchError>>,
) -> Result<T, FetchError> {
    let expired = || FetchError::Timeout { authority: authority.clone(), limit };
    timeout(limit, exchange).await.unwrap_or_else(|_| Err(expired()))
}

/// Whether a request failed because its connection, which has carried a response before, was closed.
fn is_stale_connection(error: &legacy::Error) -> bool {
    let mut extras = Extensions::new();
    if let Some(connection) = error.connect_info() {
        connection.get_extras(&mut extras);
    }
    let was_closed = |error: &hyper::Error| {
        error.is_incomplete_message()
            || error.is_canceled()
            || error.source().is_some_and(|source| source.is::<io::Error>())
    };
    extras.get::<ConnectionUsage>().is_some_and(ConnectionUsage::had_response)
        && error.source().and_then(|source| source.downcast_ref()).is_some_and(was_closed)
}

fn request_error(to: &Authority, error: legacy::Error) -> FetchError {
    match error.source().and_then(|source| source.downcast_ref::<FetchError>()) {
        Some(of_connector) => of_connector.clone(),
        None => FetchError::Http { authority: to.clone(), source: ExchangeError::Request(Arc::new(error)) },
    }
}

/// The body of a streaming response. Dropping it before its end resets the connection.
#[derive(Debug)]
pub struct ResponseStream {
    body: Incoming,
    exchange: Option<Exchange>,
}

impl ResponseStream {
    /// The next bytes; `None` at the end. Cancel-safe.
    ///
    /// # Errors
    /// If the connection is lost.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, hyper::Error> {
        while let Some(frame) = self.body.frame().await {
            if let Ok(bytes) = frame?.into_data() {
                return Ok(Some(bytes));
            }
        }
        if let Some(exchange) = self.exchange.take() {
            exchange.finish();
        }
        Ok(None)
    }
}
