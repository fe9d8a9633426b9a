//! An HTTP/2 server with arbitrary settings, and a client.

use std::{
    future::Future,
    net::SocketAddr,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use bytes::Bytes;
use h2::{RecvStream, client::SendRequest, server::SendResponse};
use http::{Request, Response};
use tokio::{
    net::{TcpListener, TcpStream},
    runtime,
    sync::oneshot,
    task::{LocalSet, spawn_local},
};

/// A server on its own thread. Dropping it closes all its connections.
pub struct H2Server {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
    requests: Arc<AtomicUsize>,
    _stop: oneshot::Sender<()>,
}

impl H2Server {
    /// Serves each request by `handle`, with prior knowledge.
    pub fn start<F, R>(builder: h2::server::Builder, handle: F) -> Self
    where
        F: Fn(Request<RecvStream>, SendResponse<Bytes>) -> R + Send + 'static,
        R: Future<Output = ()> + 'static,
    {
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("bind");
        listener.set_nonblocking(true).expect("non-blocking");
        let address = listener.local_addr().expect("an address");
        let (stop, stopped) = oneshot::channel();
        let (connections, requests) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let counts = (connections.clone(), requests.clone());
        thread::spawn(move || {
            let runtime = runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            LocalSet::new().block_on(&runtime, async move {
                let listener = TcpListener::from_std(listener).expect("a listener");
                tokio::select! {
                    () = accept(listener, builder, Rc::new(handle), counts) => {}
                    _ = stopped => {}
                }
            });
        });
        Self { address, connections, requests, _stop: stop }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    pub fn requests(&self) -> usize {
        self.requests.load(Ordering::Relaxed)
    }
}

async fn accept<F, R>(
    listener: TcpListener,
    builder: h2::server::Builder,
    handle: Rc<F>,
    (connections, requests): (Arc<AtomicUsize>, Arc<AtomicUsize>),
) where
    F: Fn(Request<RecvStream>, SendResponse<Bytes>) -> R + 'static,
    R: Future<Output = ()> + 'static,
{
    while let Ok((stream, _)) = listener.accept().await {
        connections.fetch_add(1, Ordering::Relaxed);
        let _ = stream.set_nodelay(true);
        let (handshake, handle, requests) = (builder.handshake(stream), handle.clone(), requests.clone());
        spawn_local(async move {
            let Ok(mut connection) = handshake.await else { return };
            while let Some(Ok((request, respond))) = connection.accept().await {
                requests.fetch_add(1, Ordering::Relaxed);
                spawn_local(handle(request, respond));
            }
        });
    }
}

/// Responds without a body.
pub fn send_status(respond: &mut SendResponse<Bytes>, status: u16) {
    let mut response = Response::new(());
    *response.status_mut() = status.try_into().expect("a status");
    let _ = respond.send_response(response, true);
}

/// A client with prior knowledge. Its connection lives as long as it does, on the runtime of the calling test.
pub async fn client(address: SocketAddr, builder: h2::client::Builder) -> SendRequest<Bytes> {
    let stream = TcpStream::connect(address).await.expect("connect");
    let _ = stream.set_nodelay(true);
    let (sender, connection) = builder.handshake(stream).await.expect("a handshake");
    tokio::spawn(async move {
        let _ = connection.await;
    });
    sender
}

/// A request to the upstream `host`.
pub fn request(method: &str, host: &str, path: &str) -> Request<()> {
    let uri = format!("http://{host}{path}");
    Request::builder().method(method).uri(uri).body(()).expect("a request")
}
