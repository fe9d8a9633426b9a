//! The two services of the demo: `shop`, a client of `payments`, and `payments`, with faults that can be switched on.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    future::Future,
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use socket2::SockRef;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Notify,
    task::{JoinHandle, JoinSet},
    time::sleep,
};

use super::http::send_within;

/// Delay between a response and the reset of its connection, so that the response has been sent.
const BEFORE_RESET: Duration = Duration::from_millis(5);

/// A running service. Dropping this stops it.
#[derive(Debug)]
pub struct Service {
    pub address: SocketAddr,
    task: JoinHandle<()>,
}

impl Drop for Service {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The faults of an instance of `payments`, and its counters. Shared with its connections.
#[derive(Debug, Default)]
pub struct Faults {
    /// Resets the connection after every so many responses; 0 = never.
    pub reset_every: AtomicU32,
    pub slow_ms: AtomicU64,
    /// Responds to everything with 503.
    pub fails: AtomicBool,
    pub arrived: AtomicU32,
    pub responses: AtomicU32,
    pub resets: AtomicU32,
    /// How often each order was accepted, by its `Idempotency-Key`.
    pub orders: Mutex<BTreeMap<String, u32>>,
}

impl Faults {
    /// Accepts an order; false for one that can never be.
    fn order(&self, request: &Request<Incoming>) -> bool {
        if request.uri().path().ends_with("/broken") {
            return false;
        }
        let key =
            request.headers().get("idempotency-key").and_then(|key| key.to_str().ok()).unwrap_or_default();
        *self.orders.lock().unwrap_or_else(PoisonError::into_inner).entry(key.to_owned()).or_default() += 1;
        true
    }
}

/// An instance of `payments`: `GET /price`, `GET /report`, `POST /charge`, `POST /orders`.
pub async fn payments(at: SocketAddr, faults: Arc<Faults>) -> io::Result<Service> {
    serve(at, move |stream| payments_connection(stream, Arc::clone(&faults))).await
}

async fn payments_connection(stream: TcpStream, faults: Arc<Faults>) {
    // Closing with a linger of 0 sends RST instead of FIN.
    let may_reset = SockRef::from(&stream).set_linger(Some(Duration::ZERO)).is_ok();
    let reset = Notify::new();
    let served = hyper::server::conn::http1::Builder::new().serve_connection(
        TokioIo::new(stream),
        service_fn(async |request: Request<Incoming>| {
            faults.arrived.fetch_add(1, Ordering::Relaxed);
            sleep(Duration::from_millis(faults.slow_ms.load(Ordering::Relaxed))).await;
            let responses = faults.responses.fetch_add(1, Ordering::Relaxed) + 1;
            let every = faults.reset_every.load(Ordering::Relaxed);
            if may_reset && every > 0 && responses.is_multiple_of(every) {
                reset.notify_one();
            }
            if request.uri().path().starts_with("/orders") && !faults.order(&request) {
                let body = Bytes::from_static(b"{\"error\":\"no such article\"}\n");
                return Ok(respond(StatusCode::UNPROCESSABLE_ENTITY, body));
            }
            Ok::<_, Infallible>(if faults.fails.load(Ordering::Relaxed) {
                respond(StatusCode::SERVICE_UNAVAILABLE, Bytes::from_static(b"{\"paid\":false}\n"))
            } else {
                respond(StatusCode::OK, Bytes::from_static(b"{\"paid\":true}\n"))
            })
        }),
    );
    tokio::select! {
        _ = served => {}
        () = async { reset.notified().await; sleep(BEFORE_RESET).await } => {
            faults.resets.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// `shop`: `GET /price`, `GET /report`, `POST /checkout` and `POST /order`, each of which sends one request to `payments` through
/// `proxy`, as a library that honours `http_proxy` does. It forwards the response, so that the visitor sees it too.
pub async fn shop(proxy: SocketAddr, listener: TcpListener) -> io::Result<Service> {
    serve_on(listener, move |stream| async move {
        let service = service_fn(|request: Request<Incoming>| async move {
            let (host, target) = match (request.method(), request.uri().path()) {
                (&Method::GET, "/price") => ("payments", "http://payments/price"),
                (&Method::GET, "/report") => ("reports", "http://reports/report"),
                (&Method::POST, "/checkout") => ("payments", "http://payments/charge"),
                (&Method::POST, "/order") => ("payments", "http://payments/orders"),
                (&Method::POST, "/order/broken") => ("payments", "http://payments/orders/broken"),
                _ => return Ok::<_, Infallible>(respond(StatusCode::NOT_FOUND, Bytes::new())),
            };
            Ok(match send_within(request.headers(), proxy, request.method().clone(), target, host).await {
                Ok(reply) => {
                    let mut forwarded = respond(reply.status, reply.body);
                    for name in ["content-type", "proxy-status"] {
                        if let Some(value) = reply.headers.get(name) {
                            forwarded.headers_mut().insert(name, value.clone());
                        }
                    }
                    forwarded
                }
                Err(error) => respond(StatusCode::INTERNAL_SERVER_ERROR, error.to_string().into()),
            })
        });
        let _ =
            hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
    })
    .await
}

fn respond(status: StatusCode, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response
}

async fn serve<F, C>(at: SocketAddr, connection: F) -> io::Result<Service>
where
    F: Fn(TcpStream) -> C + Send + 'static,
    C: Future<Output = ()> + Send + 'static,
{
    let socket =
        if at.is_ipv4() { tokio::net::TcpSocket::new_v4()? } else { tokio::net::TcpSocket::new_v6()? };
    // A restarted instance binds the same port.
    socket.set_reuseaddr(true)?;
    socket.bind(at)?;
    serve_on(socket.listen(64)?, connection).await
}

async fn serve_on<F, C>(listener: TcpListener, connection: F) -> io::Result<Service>
where
    F: Fn(TcpStream) -> C + Send + 'static,
    C: Future<Output = ()> + Send + 'static,
{
    let address = listener.local_addr()?;
    let task = tokio::spawn(async move {
        // Dropped with the task, so that stopping the service closes its connections.
        let mut connections = JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            while connections.try_join_next().is_some() {}
            connections.spawn(connection(stream));
        }
    });
    Ok(Service { address, task })
}
