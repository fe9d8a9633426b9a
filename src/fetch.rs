//! HTTP requests that the proxy itself makes: JWKS, OAuth 2 tokens, export of spans.
//!
//! HTTP/1.1, plaintext or over TLS, one connection per request, on the control thread; never through the proxy's own
//! ports. Redirects are not followed: only the configured URL is requested.

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    pin::pin,
    sync::{Arc, OnceLock},
    time::Duration,
};

use bytes::Bytes;
use http::{
    HeaderValue, Request, Response, Uri,
    header::{AUTHORIZATION, HOST},
    uri::{Authority, PathAndQuery, Scheme},
};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore, crypto::aws_lc_rs};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject};
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    task::JoinHandle,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{descriptors, dns::DnsError, dns::Resolver, redact};

/// TCP keep-alive of streaming responses: the idle time before the first probe, and the interval.
const ALIVE_AFTER: Duration = Duration::from_secs(30);
const ALIVE_EVERY: Duration = Duration::from_secs(10);

/// An HTTP client; cheap to clone.
#[derive(Clone, Debug)]
pub struct Fetcher {
    resolver: Arc<Resolver>,
    /// Created on first use: reading the system's roots takes milliseconds, which a start without TLS saves.
    tls: Arc<OnceLock<Arc<ClientConfig>>>,
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
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error("`{}` is not an http:// or https:// URL with a host", redact::url(&uri.to_string()))]
    Url { uri: Uri },
    #[error(transparent)]
    Name(#[from] DnsError),
    #[error("{authority} cannot be reached: {source}")]
    Connect { authority: Authority, source: io::Error },
    #[error("TLS handshake with {authority} failed: {source}")]
    Tls { authority: Authority, source: io::Error },
    #[error("{authority} sent no valid response: {source}")]
    Http { authority: Authority, source: hyper::Error },
    #[error("{authority} did not respond within {limit:?}")]
    Timeout { authority: Authority, limit: Duration },
    #[error("the response of {authority} is longer than {limit} bytes")]
    TooLong { authority: Authority, limit: usize },
    #[error("{path}: {reason}")]
    Roots { path: PathBuf, reason: String },
}

impl Fetcher {
    /// Trusts the system's roots.
    pub fn new(resolver: Arc<Resolver>) -> Self {
        Self { resolver, tls: Arc::default() }
    }

    /// Trusts the certificates in a PEM file and nothing else.
    ///
    /// # Errors
    /// [`FetchError::Roots`] if the file cannot be read or contains no certificate.
    pub fn with_roots_from(&self, path: &Path) -> Result<Self, FetchError> {
        let bad = |reason: String| FetchError::Roots { path: path.to_owned(), reason };
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_file_iter(path).map_err(|error| bad(error.to_string()))? {
            let certificate = certificate.map_err(|error| bad(error.to_string()))?;
            roots.add(certificate).map_err(|error| bad(error.to_string()))?;
        }
        if roots.is_empty() {
            return Err(bad("no certificate in it".to_owned()));
        }
        let tls = OnceLock::from(Arc::new(client_config(roots)));
        Ok(Self { resolver: Arc::clone(&self.resolver), tls: Arc::new(tls) })
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
        let (destination, request) = prepare(request)?;
        let exchange = async {
            let tcp = self.connect(&destination).await?;
            if !destination.tls {
                return destination.exchange(tcp, request, limits.max_body).await;
            }
            let tls = self.secure(&destination, tcp).await?;
            destination.exchange(tls, request, limits.max_body).await
        };
        let expired = FetchError::Timeout { authority: destination.authority.clone(), limit: limits.timeout };
        timeout(limits.timeout, exchange).await.unwrap_or(Err(expired))
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
        let (destination, request) = prepare(request)?;
        let exchange = async {
            let tcp = self.connect(&destination).await?;
            // Keep-alive detects a server that has gone silently, although nothing more is sent to it.
            let keepalive = TcpKeepalive::new().with_time(ALIVE_AFTER).with_interval(ALIVE_EVERY);
            let _ = SockRef::from(&tcp).set_tcp_keepalive(&keepalive);
            if !destination.tls {
                return destination.begin(tcp, request).await;
            }
            let tls = self.secure(&destination, tcp).await?;
            destination.begin(tls, request).await
        };
        let expired = FetchError::Timeout { authority: destination.authority.clone(), limit };
        timeout(limit, exchange).await.unwrap_or(Err(expired))
    }

    async fn secure(&self, to: &Destination, tcp: TcpStream) -> Result<TlsStream<TcpStream>, FetchError> {
        let refused = |source| FetchError::Tls { authority: to.authority.clone(), source };
        let name = ServerName::try_from(to.host.clone())
            .map_err(|error| refused(io::Error::new(io::ErrorKind::InvalidInput, error)))?;
        TlsConnector::from(self.tls()).connect(name, tcp).await.map_err(refused)
    }

    /// Connects to the first address that accepts.
    async fn connect(&self, to: &Destination) -> Result<TcpStream, FetchError> {
        let mut refused = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for ip in self.resolver.addresses(&to.host).await?.addresses {
            match descriptors::connect(SocketAddr::new(ip, to.port)).await {
                Ok(stream) => {
                    // Without the option the connection still works.
                    let _ = stream.set_nodelay(true);
                    return Ok(stream);
                }
                Err(error) => refused = error,
            }
        }
        Err(FetchError::Connect { authority: to.authority.clone(), source: refused })
    }

    fn tls(&self) -> Arc<ClientConfig> {
        Arc::clone(self.tls.get_or_init(|| Arc::new(client_config(system_roots()))))
    }
}

/// The destination of a request, and the request in the form for it.
fn prepare(request: Request<Bytes>) -> Result<(Destination, Request<Full<Bytes>>), FetchError> {
    let (mut head, body) = request.into_parts();
    let destination = Destination::of(&head.uri)?;
    if let Some(credentials) = head.uri.authority().and_then(redact::basic_credentials)
        && !head.headers.contains_key(AUTHORIZATION)
    {
        head.headers.insert(AUTHORIZATION, credentials);
    }
    // Origin-form, since it goes to a server and not to a proxy (RFC 9112 §3.2.1).
    let path = head.uri.path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/"));
    head.uri = Uri::from(path);
    if !head.headers.contains_key(HOST)
        && let Ok(host) = HeaderValue::from_str(destination.authority.as_str())
    {
        head.headers.insert(HOST, host);
    }
    Ok((destination, Request::from_parts(head, Full::new(body))))
}

/// The body of a streaming response.
#[derive(Debug)]
pub struct ResponseStream {
    body: Incoming,
    connection: JoinHandle<()>,
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
        Ok(None)
    }
}

impl Drop for ResponseStream {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// The system's roots. A part that cannot be read is omitted with a warning.
fn system_roots() -> RootCertStore {
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        tracing::warn!(%error, "a part of the system's certificates cannot be read");
    }
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    roots
}

fn client_config(roots: RootCertStore) -> ClientConfig {
    let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()));
    let mut config = match builder.with_safe_default_protocol_versions() {
        Ok(builder) => builder.with_root_certificates(roots).with_no_client_auth(),
        // Never reached: the provider has cipher suites for every version.
        Err(_) => ClientConfig::builder().with_root_certificates(roots).with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    config
}

/// The server that a URL names.
#[derive(Debug)]
struct Destination {
    authority: Authority,
    /// Without the brackets of an IPv6 address.
    host: String,
    port: u16,
    tls: bool,
}

impl Destination {
    fn of(uri: &Uri) -> Result<Self, FetchError> {
        let bad = || FetchError::Url { uri: uri.clone() };
        let tls = match uri.scheme() {
            Some(scheme) if *scheme == Scheme::HTTP => false,
            Some(scheme) if *scheme == Scheme::HTTPS => true,
            _ => return Err(bad()),
        };
        let authority = uri.authority().filter(|authority| !authority.host().is_empty()).ok_or_else(bad)?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        let port = authority.port_u16().unwrap_or(if tls { 443 } else { 80 });
        // Without userinfo, which belongs into a field of its own (RFC 9110 §4.2.4).
        let bare =
            authority.as_str().rsplit_once('@').map_or(Ok(authority.clone()), |(_, bare)| bare.parse());
        Ok(Self { authority: bare.map_err(|_| bad())?, host, port, tls })
    }

    async fn begin<S>(
        &self,
        stream: S,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<ResponseStream>, FetchError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let http = |source| FetchError::Http { authority: self.authority.clone(), source };
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(http)?;
        let connection = tokio::spawn(async move { drop(connection.await) });
        match sender.send_request(request).await {
            Ok(response) => Ok(response.map(|body| ResponseStream { body, connection })),
            Err(error) => {
                connection.abort();
                Err(http(error))
            }
        }
    }

    async fn exchange<S>(
        &self,
        stream: S,
        request: Request<Full<Bytes>>,
        limit: usize,
    ) -> Result<Response<Bytes>, FetchError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let http = |source| FetchError::Http { authority: self.authority.clone(), source };
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(http)?;
        let exchange = async {
            let (head, body) = sender.send_request(request).await.map_err(http)?.into_parts();
            let body = Limited::new(body, limit).collect().await.map_err(|error| {
                match error.downcast::<hyper::Error>() {
                    Ok(source) => http(*source),
                    Err(error) => {
                        debug_assert!(error.is::<LengthLimitError>());
                        FetchError::TooLong { authority: self.authority.clone(), limit }
                    }
                }
            })?;
            Ok(Response::from_parts(head, body.to_bytes()))
        };
        let (mut connection, mut exchange) = (pin!(connection), pin!(exchange));
        tokio::select! {
            biased;
            response = &mut exchange => response,
            // The response may have arrived completely before the connection closed.
            _ = &mut connection => exchange.await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{future::Future, net::Ipv4Addr};

    use rustls::{ServerConfig, ServerConnection};
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };
    use tokio_rustls::TlsAcceptor;

    use super::*;

    const LIMITS: FetchLimits = FetchLimits { timeout: Duration::from_secs(20), max_body: 1024 };

    fn fetcher() -> Fetcher {
        Fetcher::new(Arc::new(Resolver::from_system().unwrap()))
    }

    fn get(url: &str) -> Request<Bytes> {
        Request::get(url).body(Bytes::new()).unwrap()
    }

    /// Reads a request head and responds with a copy of it, and `extra` more bytes.
    async fn respond(mut stream: impl AsyncRead + AsyncWrite + Unpin, extra: usize) {
        let mut seen = Vec::new();
        while !seen.ends_with(b"\r\n\r\n") {
            let read = stream.read_buf(&mut seen).await.unwrap_or(0);
            if read == 0 {
                return;
            }
        }
        let head = format!("HTTP/1.1 418 teapot\r\ncontent-length: {}\r\n\r\n", seen.len() + extra);
        seen.resize(seen.len() + extra, b'.');
        let _ = stream.write_all(head.as_bytes()).await;
        let _ = stream.write_all(&seen).await;
        let _ = stream.shutdown().await;
    }

    async fn plain_server(extra: usize) -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { respond(listener.accept().await.unwrap().0, extra).await });
        address
    }

    /// A server with a certificate for `localhost`, and the PEM file of its CA.
    async fn tls_server(directory: &Path) -> (SocketAddr, PathBuf) {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let ca = directory.join("ca.pem");
        std::fs::write(&ca, made.cert.pem()).unwrap();
        let key = rustls_pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                if let Ok(stream) = acceptor.accept_with(tcp, |_: &mut ServerConnection| ()).await {
                    respond(stream, 0).await;
                }
            }
        });
        (address, ca)
    }

    #[tokio::test]
    async fn returns_a_response_of_any_status() {
        let address = plain_server(0).await;
        let response = fetcher().fetch(get(&format!("http://{address}/keys?a=b")), LIMITS).await.unwrap();
        assert_eq!(response.status(), 418);
        let seen = String::from_utf8(response.into_body().to_vec()).unwrap();
        assert!(seen.starts_with("GET /keys?a=b HTTP/1.1\r\n"), "{seen}");
        assert!(seen.contains(&format!("host: {address}\r\n")), "{seen}");
    }

    #[tokio::test]
    async fn a_too_long_response_is_not_read() {
        let address = plain_server(4096).await;
        let error = fetcher().fetch(get(&format!("http://{address}/")), LIMITS).await.unwrap_err();
        assert_eq!(error.to_string(), format!("the response of {address} is longer than 1024 bytes"));
    }

    #[tokio::test]
    async fn connects_only_to_trusted_servers() {
        let directory = tempfile::tempdir().unwrap();
        let (address, ca) = tls_server(directory.path()).await;
        let url = format!("https://localhost:{}/", address.port());
        let untrusted = fetcher().fetch(get(&url), LIMITS).await.unwrap_err();
        assert!(untrusted.to_string().contains("UnknownIssuer"), "{untrusted}");
        let trusting = fetcher().with_roots_from(&ca).unwrap();
        assert_eq!(trusting.fetch(get(&url), LIMITS).await.unwrap().status(), 418);
        let by_address = trusting.fetch(get(&format!("https://{address}/")), LIMITS).await.unwrap_err();
        assert!(by_address.to_string().contains("not valid for name"), "{by_address}");
    }

    #[tokio::test(start_paused = true)]
    async fn times_out() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let error = fetcher().fetch(get(&format!("http://{address}/")), LIMITS).await.unwrap_err();
        assert_eq!(error.to_string(), format!("{address} did not respond within 20s"));
    }

    #[tokio::test]
    async fn errors_name_the_cause() {
        for (url, message) in [
            ("/keys", "`/keys` is not an http:// or https:// URL with a host"),
            ("ftp://a/", "`ftp://a/` is not an http:// or https:// URL with a host"),
            ("http://127.0.0.1:1/", "127.0.0.1:1 cannot be reached"),
        ] {
            let error = fetcher().fetch(get(url), LIMITS).await.unwrap_err();
            assert!(error.to_string().contains(message), "{error}");
        }
        let directory = tempfile::tempdir().unwrap();
        let empty = directory.path().join("empty.pem");
        std::fs::write(&empty, "").unwrap();
        let error = fetcher().with_roots_from(&empty).unwrap_err();
        assert_eq!(error.to_string(), format!("{}: no certificate in it", empty.display()));
    }

    #[tokio::test]
    async fn fetch_is_send() {
        fn is_send<F: Future + Send>(future: F) -> F {
            future
        }
        let address = plain_server(0).await;
        is_send(fetcher().fetch(get(&format!("http://{address}/")), LIMITS)).await.unwrap();
    }
}
