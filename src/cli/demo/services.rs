//! The two services: `shop`, which calls, and `payments`, which fails in the ways that services do.

use std::{
    convert::Infallible,
    future::Future,
    io,
    net::SocketAddr,
    sync::{
        Arc,
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

use super::http::call_for;

/// After an answer, before its connection is reset: so that the answer has left.
const BEFORE_RESET: Duration = Duration::from_millis(5);

/// A running service; it stops when this is dropped.
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

/// What is wrong with an instance of `payments`, and what came of it. Shared with its connections.
#[derive(Debug, Default)]
pub struct Trouble {
    /// Resets the connection after every so many answers; 0 = never.
    pub reset_every: AtomicU32,
    pub slow_ms: AtomicU64,
    /// Answers everything with 503.
    pub fails: AtomicBool,
    pub arrived: AtomicU32,
    pub answers: AtomicU32,
    pub resets: AtomicU32,
}

/// An instance of `payments`: `GET /price`, `GET /report`, `POST /charge`.
pub async fn payments(at: SocketAddr, trouble: Arc<Trouble>) -> io::Result<Service> {
    serve(at, move |stream| payments_connection(stream, Arc::clone(&trouble))).await
}

async fn payments_connection(stream: TcpStream, trouble: Arc<Trouble>) {
    // Closing with a linger of 0 sends a reset instead of a farewell.
    let may_reset = SockRef::from(&stream).set_linger(Some(Duration::ZERO)).is_ok();
    let reset = Notify::new();
    let served = hyper::server::conn::http1::Builder::new().serve_connection(
        TokioIo::new(stream),
        service_fn(|_: Request<Incoming>| async {
            trouble.arrived.fetch_add(1, Ordering::Relaxed);
            sleep(Duration::from_millis(trouble.slow_ms.load(Ordering::Relaxed))).await;
            let answers = trouble.answers.fetch_add(1, Ordering::Relaxed) + 1;
            let every = trouble.reset_every.load(Ordering::Relaxed);
            if may_reset && every > 0 && answers.is_multiple_of(every) {
                reset.notify_one();
            }
            Ok::<_, Infallible>(if trouble.fails.load(Ordering::Relaxed) {
                answer(StatusCode::SERVICE_UNAVAILABLE, Bytes::from_static(b"{\"paid\":false}\n"))
            } else {
                answer(StatusCode::OK, Bytes::from_static(b"{\"paid\":true}\n"))
            })
        }),
    );
    tokio::select! {
        _ = served => {}
        () = async { reset.notified().await; sleep(BEFORE_RESET).await } => {
            trouble.resets.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// `shop`: `GET /price`, `GET /report` and `POST /checkout`, each one call to `payments` by way of the proxy in `proxy`, as a library
/// that reads `http_proxy` would make it. What it gets it passes on, so that the visitor sees it too.
pub async fn shop(proxy: SocketAddr, listener: TcpListener) -> io::Result<Service> {
    serve_on(listener, move |stream| async move {
        let service = service_fn(|request: Request<Incoming>| async move {
            let (host, target) = match (request.method(), request.uri().path()) {
                (&Method::GET, "/price") => ("payments", "http://payments/price"),
                (&Method::GET, "/report") => ("reports", "http://reports/report"),
                (&Method::POST, "/checkout") => ("payments", "http://payments/charge"),
                _ => return Ok::<_, Infallible>(answer(StatusCode::NOT_FOUND, Bytes::new())),
            };
            Ok(match call_for(request.headers(), proxy, request.method().clone(), target, host).await {
                Ok(reply) => {
                    let mut passed_on = answer(reply.status, reply.body);
                    for name in ["content-type", "proxy-status"] {
                        if let Some(value) = reply.headers.get(name) {
                            passed_on.headers_mut().insert(name, value.clone());
                        }
                    }
                    passed_on
                }
                Err(error) => answer(StatusCode::INTERNAL_SERVER_ERROR, error.to_string().into()),
            })
        });
        let _ =
            hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
    })
    .await
}

fn answer(status: StatusCode, body: Bytes) -> Response<Full<Bytes>> {
    let mut answer = Response::new(Full::new(body));
    *answer.status_mut() = status;
    answer
}

async fn serve<F, C>(at: SocketAddr, connection: F) -> io::Result<Service>
where
    F: Fn(TcpStream) -> C + Send + 'static,
    C: Future<Output = ()> + Send + 'static,
{
    let socket =
        if at.is_ipv4() { tokio::net::TcpSocket::new_v4()? } else { tokio::net::TcpSocket::new_v6()? };
    // It comes back to the port it had.
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
        // Dropped with the task: a service that stops takes its connections along.
        let mut connections = JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            while connections.try_join_next().is_some() {}
            connections.spawn(connection(stream));
        }
    });
    Ok(Service { address, task })
}
