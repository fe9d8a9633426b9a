//! The admission webhook: HTTPS, everything about it bounded.
//!
//! It asks no API server anything and needs no right in the cluster: all that it knows comes with the question. It says
//! nothing about pods that it cannot do at all; whether the API server then lets them in is the `failurePolicy` of its
//! configuration.

mod arrivals;
mod certificate;
mod places;
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

use arrivals::{Arrivals, Failure};
use certificate::Certificate;
pub use certificate::CertificateError;
use places::{Place, Places};
use review::{Question, answer};

use super::inject::{Defaults, InjectError};
use crate::{config::ListenAddr, identity::tls::ALPN_H2, proxy::accept};

/// More than an API server's objects can be, which etcd holds to 1.5 MiB; an UPDATE comes with the old one too.
const BODY: usize = 8 << 20;
/// Bodies up to this size have a room of their own, so that large ones are not in their way.
const SMALL_BODY: u64 = 64 << 10;
/// What is held of bodies at a time.
const SMALL_BODIES: usize = 4 << 20;
const LARGE_BODIES: usize = 20 << 20;
/// What may wait to be read on a connection, over HTTP/2.
const WINDOW: u32 = 64 << 10;
/// An API server speaks HTTP/1.1 with webhooks, and opens one for each call that it makes at a time.
const CONNECTIONS: usize = 128;
/// Calls at a time on one of them, over HTTP/2; the answers to callers that do not read are held.
const STREAMS: u32 = 4;
/// To shake hands, to answer: the API server waits 10 s unless told otherwise.
const PATIENCE: Duration = Duration::from_secs(10);
/// To send a header, and between requests. An API server closes a connection that was idle for 90 s. It must be the one to
/// close: a review that it sends while we close is lost to it (`EOF`), and with it the pod. Who sends slowly gives way.
const IDLE: Duration = Duration::from_secs(120);
/// Then a connection is asked to end, so that after a scale-up all replicas get their share.
const CONNECTION_AGE: Duration = Duration::from_secs(300);
/// After SIGTERM callers still come: it takes as long until all API servers know. Each response then closes its connection, so
/// that those which are in use are gone when this is over.
const LEAVING: Duration = Duration::from_secs(5);
/// After accept failed, e.g. for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What it is started with.
#[derive(Debug)]
pub struct Settings {
    pub listen: ListenAddr,
    pub certificate: PathBuf,
    pub key: PathBuf,
    pub defaults: Option<PathBuf>,
    /// The namespace that it is in, whose pods get no sidecar.
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
    #[error("files cannot be watched: {0}")]
    Watch(io::Error),
}

#[derive(Debug, thiserror::Error)]
pub enum DefaultsError {
    #[error("it cannot be read: {0}")]
    Read(#[from] io::Error),
    #[error(transparent)]
    Wrong(#[from] InjectError),
}

/// What every answer needs.
struct Known {
    defaults: ArcSwap<Defaults>,
    own_namespace: Option<String>,
    small: Arrivals,
    large: Arrivals,
}

/// Serves until `stop` says so, and then for as long as callers may still come.
///
/// # Errors
///
/// Where it cannot begin; later, what is wrong with a file is logged, and the last good one holds.
pub async fn serve(settings: Settings, stop: impl Future<Output = ()>) -> Result<(), WebhookError> {
    let certificate = Certificate::read(&settings.certificate, &settings.key)?;
    let defaults = settings.defaults.as_deref().map_or(Ok(Defaults::default()), read_defaults)?;
    let known = Arc::new(Known {
        defaults: ArcSwap::from_pointee(defaults),
        own_namespace: settings.own_namespace,
        small: Arrivals::new(SMALL_BODIES),
        large: Arrivals::new(LARGE_BODIES),
    });
    let wrong = |source| WebhookError::Listen { address: settings.listen.to_string(), source };
    let listeners = accept::bind(&settings.listen).map_err(wrong)?;
    let listeners: Vec<TcpListener> =
        listeners.into_iter().map(TcpListener::from_std).collect::<Result<_, _>>().map_err(wrong)?;
    let bound: Vec<SocketAddr> = listeners.iter().filter_map(|listener| listener.local_addr().ok()).collect();

    let acceptor = Arc::new(ArcSwap::new(certificate.config()));
    let _certificates = certificate.watch(Arc::clone(&acceptor)).map_err(WebhookError::Watch)?;
    let _defaults = match settings.defaults {
        Some(path) => Some(watch_defaults(path, Arc::clone(&known)).map_err(WebhookError::Watch)?),
        None => None,
    };
    let (leave, leaving) = watch::channel(Phase::Serving);
    let mut tasks = JoinSet::new();
    for listener in listeners {
        tasks.spawn(accept_all(listener, Arc::clone(&acceptor), Arc::clone(&known), leaving.clone()));
    }
    tracing::info!(listen = %bound.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "), "the webhook is up");
    stop.await;
    tracing::info!("leaving: calls are still answered for {} s", LEAVING.as_secs());
    leave.send_replace(Phase::Leaving);
    sleep(LEAVING).await;
    leave.send_replace(Phase::Closing);
    let all = async { while tasks.join_next().await.is_some() {} };
    if timeout(PATIENCE, all).await.is_err() {
        tracing::warn!("calls were still open");
    }
    Ok(())
}

fn read_defaults(path: &Path) -> Result<Defaults, WebhookError> {
    let wrong = |source| WebhookError::Defaults { path: path.to_owned(), source };
    let text = std::fs::read_to_string(path).map_err(|error| wrong(error.into()))?;
    Defaults::parse(&text).map_err(|error| wrong(error.into()))
}

fn watch_defaults(path: PathBuf, known: Arc<Known>) -> io::Result<crate::watch::Watcher> {
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
                tracing::error!("{path} is empty now: what it held before is used until a restart");
            }
            Ok(defaults) => {
                known.defaults.store(Arc::new(defaults));
                tracing::info!("new defaults are used");
            }
            Err(error) => tracing::error!(%error, "the new defaults are not used"),
        }
    })
}

/// How far it is on its way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Serving,
    /// Still accepting; connections end with the next response.
    Leaving,
    /// Connections end.
    Closing,
}

type Tls = Arc<ArcSwap<rustls::ServerConfig>>;

/// Accepts until it is time to leave, and then waits for what it has accepted.
async fn accept_all(listener: TcpListener, tls: Tls, known: Arc<Known>, mut leaving: watch::Receiver<Phase>) {
    let places = Arc::new(Places::new(CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let accepted = tokio::select! {
            accepted = async {
                let (stream, _) = listener.accept().await?;
                // Else an answer waits for the acknowledgement of what the handshake said last: 40 ms.
                let _ = stream.set_nodelay(true);
                Ok::<_, io::Error>((stream, places.enter().await))
            } => accepted,
            _ = leaving.wait_for(|phase| *phase == Phase::Closing) => break,
        };
        match accepted {
            Ok((stream, place)) => {
                let acceptor = TlsAcceptor::from(tls.load_full());
                let (known, leaving, place) = (Arc::clone(&known), leaving.clone(), Arc::new(place));
                connections.spawn(async move {
                    tokio::select! {
                        () = connection(stream, acceptor, known, Arc::clone(&place), leaving) => {}
                        () = place.lost() => tracing::debug!("a connection that asked nothing gave way"),
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "the webhook could not accept");
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
    known: Arc<Known>,
    place: Arc<Place>,
    mut leaving: watch::Receiver<Phase>,
) {
    let began = Instant::now();
    let stream = match timeout(PATIENCE, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::debug!(%error, "no TLS handshake"),
        Err(_) => return tracing::debug!("the TLS handshake took too long"),
    };
    let h2 = stream.get_ref().1.alpn_protocol() == Some(ALPN_H2);
    let phase = leaving.clone();
    let service = ServiceBuilder::new()
        .layer(CatchPanicLayer::new())
        .layer(TimeoutLayer::with_status_code(StatusCode::GATEWAY_TIMEOUT, PATIENCE))
        .layer(RequestBodyLimitLayer::new(BODY))
        .service(service_fn(move |request: Request<tower_http::body::Limited<Incoming>>| {
            let (known, place) = (Arc::clone(&known), Arc::clone(&place));
            let last = !h2 && (*phase.borrow() >= Phase::Leaving || began.elapsed() >= CONNECTION_AGE);
            async move {
                let mut answer = reply(request, &known, &place).await;
                if last {
                    answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
                }
                Ok::<_, Infallible>(answer)
            }
        }));
    let (service, io) = (TowerToHyperService::new(service), TokioIo::new(stream));
    let ends = async {
        // GOAWAY loses nothing. Over HTTP/1 the next response says close; one that is idle ends with the process.
        let at = if h2 { Phase::Leaving } else { Phase::Closing };
        tokio::select! {
            () = sleep(CONNECTION_AGE), if h2 => {}
            _ = leaving.wait_for(|phase| *phase >= at) => {}
        }
    };
    // Both kinds of connection end in the same way: what is being answered is, then no more.
    macro_rules! serve {
        ($connection:expr) => {{
            let mut connection = std::pin::pin!($connection);
            tokio::select! {
                ended = connection.as_mut() => ended,
                () = ends => {
                    connection.as_mut().graceful_shutdown();
                    timeout(PATIENCE, connection).await.unwrap_or(Ok(()))
                }
            }
        }};
    }
    let ended = if h2 {
        serve!(
            http2::Builder::new(TokioExecutor::new())
                .timer(TokioTimer::new())
                .max_concurrent_streams(STREAMS)
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
        tracing::debug!(%error, "a connection ended badly");
    }
}

type Answer = Response<Full<Bytes>>;

async fn reply<B>(request: Request<B>, known: &Known, place: &Place) -> Answer
where
    B: Body<Data: Send, Error: std::fmt::Display>,
{
    let question = match (request.uri().path(), request.method()) {
        ("/healthz", &Method::GET | &Method::HEAD) => return plain(StatusCode::OK, "ok\n"),
        ("/mutate", &Method::POST) => Question::Mutate,
        ("/validate", &Method::POST) => Question::Validate,
        ("/mutate" | "/validate", _) => return plain(StatusCode::METHOD_NOT_ALLOWED, "POST is needed\n"),
        _ => return plain(StatusCode::NOT_FOUND, "there is /mutate, /validate and /healthz\n"),
    };
    let json = |value: &HeaderValue| value.to_str().is_ok_and(|kind| kind.starts_with("application/json"));
    if !request.headers().get(header::CONTENT_TYPE).is_some_and(json) {
        return plain(StatusCode::UNSUPPORTED_MEDIA_TYPE, "application/json is needed\n");
    }
    // What does not say how long it is counts as long.
    let small = request.body().size_hint().exact().is_some_and(|size| size <= SMALL_BODY);
    let room = if small { &known.small } else { &known.large };
    let body = match room.read(request.into_body()).await {
        Ok(body) => body,
        Err(error) => {
            let status = match error {
                Failure::Broken(_) => StatusCode::PAYLOAD_TOO_LARGE,
                Failure::GaveWay => StatusCode::SERVICE_UNAVAILABLE,
            };
            return plain(status, &format!("{error}\n"));
        }
    };
    place.used();
    match answer(question, &body.bytes, &known.defaults.load(), known.own_namespace.as_deref()) {
        Ok(review) => {
            let mut answer = plain(StatusCode::OK, &review);
            answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
            answer
        }
        Err(error) => {
            tracing::warn!(%error, "a request was refused");
            plain(StatusCode::BAD_REQUEST, &format!("{error}\n"))
        }
    }
}

fn plain(status: StatusCode, text: &str) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(text.to_owned())));
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    answer
}
