//! The admission webhook: an HTTPS server with limits on connections, bodies and time.
//!
//! It sends no requests to an API server and needs no permissions in the cluster: each review contains all it needs.
//! If it cannot respond, the `failurePolicy` of its configuration decides.

mod body_buffers;
mod certificate;
mod connection_slots;
pub mod review;

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body::Body;
use http_body_util::Full;
use hyper::{
    body::Incoming,
    server::conn::{http1, http2},
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tower::{ServiceBuilder, service_fn};
use tower_http::{catch_panic::CatchPanicLayer, limit::RequestBodyLimitLayer, timeout::TimeoutLayer};

use body_buffers::{BodyBuffers, BodyError};
use certificate::Certificate;
pub use certificate::CertificateError;
use connection_slots::{ConnectionSlot, ConnectionSlots};
use review::{ReviewKind, review_response};

use super::inject::{Defaults, InjectError};
use crate::{config::ListenAddr, identity::tls::ALPN_H2, proxy::accept};

/// The largest body. etcd limits objects to 1.5 MiB; an UPDATE contains the old one too.
const MAX_BODY: usize = 8 << 20;
/// Bodies up to this size have their own memory limit, so that large ones do not block them.
const SMALL_BODY: u64 = 64 << 10;
/// The memory limits for bodies, in bytes.
const SMALL_BODIES: usize = 4 << 20;
const LARGE_BODIES: usize = 20 << 20;
/// The flow-control window of HTTP/2.
const WINDOW: u32 = 64 << 10;
/// Most connections. An API server uses HTTP/1.1 with webhooks, one connection for each concurrent request.
const MAX_CONNECTIONS: usize = 128;
/// Concurrent HTTP/2 streams per connection. Responses that the client does not read occupy memory.
const MAX_STREAMS: u32 = 4;
/// The limit for a handshake and for a response; an API server's default timeout is 10 s.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The limit for a request head, and between requests. An API server closes connections that are idle for 90 s. It
/// must close first: a review that it sends while we close fails (`EOF`), and so does the pod. Slow clients are
/// evicted instead.
const IDLE: Duration = Duration::from_secs(120);
/// After this time a connection is closed gracefully, so that new replicas get their share.
const MAX_CONNECTION_AGE: Duration = Duration::from_secs(300);
/// How long to accept after SIGTERM, until all API servers know of the termination. Each response then closes its
/// connection, so that busy connections are gone at the end.
const DRAIN_TIME: Duration = Duration::from_secs(5);
/// The pause after accept failed, e.g. without free file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The command line options.
#[derive(Debug)]
pub struct Settings {
    pub listen: ListenAddr,
    pub certificate: PathBuf,
    pub key: PathBuf,
    pub defaults: Option<PathBuf>,
    /// The webhook's own namespace, whose pods are not injected.
    pub own_namespace: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum WebhookError {
    #[error("cannot listen on {address}: {source}")]
    Listen { address: String, source: io::Error },
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    #[error("{}: {source}", path.display())]
    Defaults { path: PathBuf, source: DefaultsError },
    #[error("cannot watch files: {0}")]
    Watch(io::Error),
}

#[derive(Debug, thiserror::Error)]
pub enum DefaultsError {
    #[error("cannot read it: {0}")]
    Read(#[from] io::Error),
    #[error(transparent)]
    Wrong(#[from] InjectError),
}

/// State shared by all requests.
struct WebhookState {
    defaults: ArcSwap<Defaults>,
    own_namespace: Option<String>,
    small: BodyBuffers,
    large: BodyBuffers,
}

/// Serves until `stop` completes, then drains.
///
/// # Errors
///
/// If it cannot start. Later errors in files are logged, and the last good version stays in use.
pub async fn serve(settings: Settings, stop: impl Future<Output = ()>) -> Result<(), WebhookError> {
    let certificate = Certificate::read(&settings.certificate, &settings.key)?;
    let defaults = settings.defaults.as_deref().map_or(Ok(Defaults::default()), read_defaults)?;
    let state = Arc::new(WebhookState {
        defaults: ArcSwap::from_pointee(defaults),
        own_namespace: settings.own_namespace,
        small: BodyBuffers::new(SMALL_BODIES),
        large: BodyBuffers::new(LARGE_BODIES),
    });
    let error_for = |source| WebhookError::Listen { address: settings.listen.to_string(), source };
    let listeners = accept::bind(&settings.listen).map_err(error_for)?;
    let listeners: Vec<TcpListener> =
        listeners.into_iter().map(TcpListener::from_std).collect::<Result<_, _>>().map_err(error_for)?;
    let bound: Vec<SocketAddr> = listeners.iter().filter_map(|listener| listener.local_addr().ok()).collect();

    let acceptor = Arc::new(ArcSwap::new(certificate.config()));
    let _certificates = certificate.watch(Arc::clone(&acceptor)).map_err(WebhookError::Watch)?;
    let _defaults = match settings.defaults {
        Some(path) => Some(watch_defaults(path, Arc::clone(&state)).map_err(WebhookError::Watch)?),
        None => None,
    };
    let (set_phase, phases) = watch::channel(Phase::Serving);
    let mut tasks = JoinSet::new();
    for listener in listeners {
        tasks.spawn(accept_all(listener, Arc::clone(&acceptor), Arc::clone(&state), phases.clone()));
    }
    tracing::info!(listen = %bound.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "), "webhook listening");
    stop.await;
    tracing::info!("draining: requests are still served for {} s", DRAIN_TIME.as_secs());
    set_phase.send_replace(Phase::Draining);
    sleep(DRAIN_TIME).await;
    set_phase.send_replace(Phase::Closing);
    let all = async { while tasks.join_next().await.is_some() {} };
    if timeout(TIMEOUT, all).await.is_err() {
        tracing::warn!("drain timed out with open connections");
    }
    Ok(())
}

fn read_defaults(path: &Path) -> Result<Defaults, WebhookError> {
    let error_for = |source| WebhookError::Defaults { path: path.to_owned(), source };
    let text = std::fs::read_to_string(path).map_err(|error| error_for(error.into()))?;
    Defaults::parse(&text).map_err(|error| error_for(error.into()))
}

fn watch_defaults(path: PathBuf, state: Arc<WebhookState>) -> io::Result<crate::watch::Watcher> {
    let (mut last, watched) = (std::fs::read(&path).ok(), [path.clone()]);
    crate::watch::watch("defaults-watch", &watched, move |_| {
        let now = std::fs::read(&path).ok();
        if now == last {
            return;
        }
        last = now;
        let emptied = last.as_ref().is_none_or(|text| text.trim_ascii().is_empty());
        match read_defaults(&path) {
            Ok(_) if emptied => {
                let path = path.display();
                tracing::error!("{path} is empty now: its previous content stays in use until a restart");
            }
            Ok(defaults) => {
                state.defaults.store(Arc::new(defaults));
                tracing::info!("new defaults loaded");
            }
            Err(error) => tracing::error!(%error, "new defaults rejected"),
        }
    })
}

/// The phases of shutdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Serving,
    /// Still accepting; connections close with the next response.
    Draining,
    /// Connections are closed.
    Closing,
}

type Tls = Arc<ArcSwap<rustls::ServerConfig>>;

/// Accepts until phase `Closing`, then waits for open connections.
async fn accept_all(
    listener: TcpListener,
    tls: Tls,
    state: Arc<WebhookState>,
    mut phases: watch::Receiver<Phase>,
) {
    let slots = Arc::new(ConnectionSlots::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let accepted = tokio::select! {
            accepted = async {
                let (stream, _) = listener.accept().await?;
                // Otherwise a response waits up to 40 ms for the acknowledgement of the last handshake message.
                let _ = stream.set_nodelay(true);
                Ok::<_, io::Error>((stream, slots.acquire().await))
            } => accepted,
            _ = phases.wait_for(|phase| *phase == Phase::Closing) => break,
        };
        match accepted {
            Ok((stream, slot)) => {
                let acceptor = TlsAcceptor::from(tls.load_full());
                let (state, phases, slot) = (Arc::clone(&state), phases.clone(), Arc::new(slot));
                connections.spawn(async move {
                    tokio::select! {
                        () = connection(stream, acceptor, state, Arc::clone(&slot), phases) => {}
                        () = slot.wait_for_eviction() => tracing::debug!("idle connection evicted"),
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "the webhook cannot accept a connection");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn connection(
    stream: TcpStream,
    acceptor: TlsAcceptor,
    state: Arc<WebhookState>,
    slot: Arc<ConnectionSlot>,
    mut phases: watch::Receiver<Phase>,
) {
    let started = Instant::now();
    let stream = match timeout(TIMEOUT, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::debug!(%error, "TLS handshake failed"),
        Err(_) => return tracing::debug!("TLS handshake timed out"),
    };
    let h2 = stream.get_ref().1.alpn_protocol() == Some(ALPN_H2);
    let phase = phases.clone();
    let service = ServiceBuilder::new()
        .layer(CatchPanicLayer::new())
        .layer(TimeoutLayer::with_status_code(StatusCode::GATEWAY_TIMEOUT, TIMEOUT))
        .layer(RequestBodyLimitLayer::new(MAX_BODY))
        .service(service_fn(move |request: Request<tower_http::body::Limited<Incoming>>| {
            let (state, slot) = (Arc::clone(&state), Arc::clone(&slot));
            let last = !h2 && (*phase.borrow() >= Phase::Draining || started.elapsed() >= MAX_CONNECTION_AGE);
            async move {
                let mut response = respond(request, &state, &slot).await;
                if last {
                    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
                }
                Ok::<_, Infallible>(response)
            }
        }));
    let (service, io) = (TowerToHyperService::new(service), TokioIo::new(stream));
    let ends = async {
        // GOAWAY loses no request. With HTTP/1 the next response has `close`; an idle connection ends with the process.
        let at = if h2 { Phase::Draining } else { Phase::Closing };
        tokio::select! {
            () = sleep(MAX_CONNECTION_AGE), if h2 => {}
            _ = phases.wait_for(|phase| *phase >= at) => {}
        }
    };
    // Both kinds of connection shut down gracefully: requests in flight are completed.
    macro_rules! serve {
        ($connection:expr) => {{
            let mut connection = std::pin::pin!($connection);
            tokio::select! {
                ended = connection.as_mut() => ended,
                () = ends => {
                    connection.as_mut().graceful_shutdown();
                    timeout(TIMEOUT, connection).await.unwrap_or(Ok(()))
                }
            }
        }};
    }
    let ended = if h2 {
        serve!(
            http2::Builder::new(TokioExecutor::new())
                .timer(TokioTimer::new())
                .max_concurrent_streams(MAX_STREAMS)
                .initial_stream_window_size(WINDOW)
                .initial_connection_window_size(WINDOW)
                .max_header_list_size(16 << 10)
                .serve_connection(io, service)
        )
    } else {
        serve!(
            http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(IDLE)
                .max_buf_size(16 << 10)
                .serve_connection(io, service)
        )
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "connection failed");
    }
}

type HttpResponse = Response<Full<Bytes>>;

async fn respond<B>(request: Request<B>, state: &WebhookState, slot: &ConnectionSlot) -> HttpResponse
where
    B: Body<Data: Send, Error: std::fmt::Display>,
{
    let question = match (request.uri().path(), request.method()) {
        ("/healthz", &Method::GET | &Method::HEAD) => return plain(StatusCode::OK, "ok\n"),
        ("/mutate", &Method::POST) => ReviewKind::Mutate,
        ("/validate", &Method::POST) => ReviewKind::Validate,
        ("/mutate" | "/validate", _) => return plain(StatusCode::METHOD_NOT_ALLOWED, "use POST\n"),
        _ => return plain(StatusCode::NOT_FOUND, "available paths: /mutate, /validate, /healthz\n"),
    };
    let json = |value: &HeaderValue| value.to_str().is_ok_and(|kind| kind.starts_with("application/json"));
    if !request.headers().get(header::CONTENT_TYPE).is_some_and(json) {
        return plain(StatusCode::UNSUPPORTED_MEDIA_TYPE, "Content-Type must be application/json\n");
    }
    // A body of unknown size counts as large.
    let small = request.body().size_hint().exact().is_some_and(|size| size <= SMALL_BODY);
    let buffers = if small { &state.small } else { &state.large };
    let body = match buffers.read(request.into_body()).await {
        Ok(body) => body,
        Err(error) => {
            let status = match error {
                BodyError::Broken(_) => StatusCode::PAYLOAD_TOO_LARGE,
                BodyError::Evicted => StatusCode::SERVICE_UNAVAILABLE,
            };
            return plain(status, &format!("{error}\n"));
        }
    };
    slot.mark_active();
    match review_response(question, &body.bytes, &state.defaults.load(), state.own_namespace.as_deref()) {
        Ok(review) => {
            let mut response = plain(StatusCode::OK, &review);
            response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
            response
        }
        Err(error) => {
            tracing::warn!(%error, "request rejected");
            plain(StatusCode::BAD_REQUEST, &format!("{error}\n"))
        }
    }
}

fn plain(status: StatusCode, text: &str) -> HttpResponse {
    let mut response = Response::new(Full::new(Bytes::from(text.to_owned())));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}
