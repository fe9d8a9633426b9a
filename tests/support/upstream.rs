//! Well-behaved HTTP servers, for tests about something else.

use std::{convert::Infallible, future::Future, net::SocketAddr, rc::Rc, thread};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use hyper::{Request, Response, body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{net::TcpListener, runtime, sync::oneshot, task::LocalSet};

pub type UpstreamResponse = Response<UnsyncBoxBody<Bytes, Infallible>>;

/// A server on its own thread. Dropping it closes all its connections.
pub struct Upstream {
    address: SocketAddr,
    _stop: oneshot::Sender<()>,
}

/// 200 with this text.
pub fn text(body: impl Into<Bytes>) -> UpstreamResponse {
    Response::new(Full::new(body.into()).boxed_unsync())
}

impl Upstream {
    /// HTTP/1.1.
    pub fn http1<F, R>(handle: F) -> Self
    where
        F: Fn(Request<Incoming>) -> R + Send + 'static,
        R: Future<Output = UpstreamResponse> + 'static,
    {
        Self::start(handle, false)
    }

    /// HTTP/2 with prior knowledge.
    pub fn h2c<F, R>(handle: F) -> Self
    where
        F: Fn(Request<Incoming>) -> R + Send + 'static,
        R: Future<Output = UpstreamResponse> + 'static,
    {
        Self::start(handle, true)
    }

    fn start<F, R>(handle: F, h2: bool) -> Self
    where
        F: Fn(Request<Incoming>) -> R + Send + 'static,
        R: Future<Output = UpstreamResponse> + 'static,
    {
        Self::with_peer(h2, move |_, request| handle(request))
    }

    /// The same; `handle` also gets the client address.
    pub fn with_peer<F, R>(h2: bool, handle: F) -> Self
    where
        F: Fn(SocketAddr, Request<Incoming>) -> R + Send + 'static,
        R: Future<Output = UpstreamResponse> + 'static,
    {
        Self::at(([127, 0, 0, 1], 0).into(), h2, handle)
    }

    /// The same at an address, in the network namespace of the calling thread.
    pub fn at<F, R>(address: SocketAddr, h2: bool, handle: F) -> Self
    where
        F: Fn(SocketAddr, Request<Incoming>) -> R + Send + 'static,
        R: Future<Output = UpstreamResponse> + 'static,
    {
        let listener = std::net::TcpListener::bind(address).expect("bind");
        listener.set_nonblocking(true).expect("non-blocking");
        let address = listener.local_addr().expect("an address");
        let (stop, stopped) = oneshot::channel();
        thread::spawn(move || {
            let runtime = runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            LocalSet::new().block_on(&runtime, async move {
                let listener = TcpListener::from_std(listener).expect("a listener");
                tokio::select! {
                    () = accept(listener, Rc::new(handle), h2) => {}
                    _ = stopped => {}
                }
            });
        });
        Self { address, _stop: stop }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

async fn accept<F, R>(listener: TcpListener, handle: Rc<F>, h2: bool)
where
    F: Fn(SocketAddr, Request<Incoming>) -> R + 'static,
    R: Future<Output = UpstreamResponse> + 'static,
{
    while let Ok((stream, peer)) = listener.accept().await {
        let _ = stream.set_nodelay(true);
        let (io, handle) = (TokioIo::new(stream), handle.clone());
        tokio::task::spawn_local(async move {
            let service = service_fn(move |request| {
                let response = handle(peer, request);
                async move { Ok::<_, Infallible>(response.await) }
            });
            // A failed connection matters to the test, not to the server.
            let _ = if h2 {
                hyper::server::conn::http2::Builder::new(LocalExec).serve_connection(io, service).await
            } else {
                let mut builder = hyper::server::conn::http1::Builder::new();
                builder.timer(TokioTimer::new()).serve_connection(io, service).with_upgrades().await
            };
        });
    }
}

/// Spawns on the thread's own `LocalSet`.
#[derive(Clone, Copy)]
pub struct LocalExec;

impl<F: Future<Output = ()> + 'static> hyper::rt::Executor<F> for LocalExec {
    fn execute(&self, future: F) {
        tokio::task::spawn_local(future);
    }
}
