//! A server on loopback that keeps connections open as its script says, and counts what arrives.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use rustls::{ServerConfig, crypto::aws_lc_rs};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpListener,
    task::JoinHandle,
    time::sleep,
};
use tokio_rustls::TlsAcceptor;

/// A response that keeps its connection open.
pub const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
/// The same in several packets: `|` is a pause.
pub const OK_IN_PIECES: &str = "HTTP/1.1 200 OK\r\n|content-length: 2\r\n\r\n|o|k";

/// What the server does on each connection.
#[derive(Clone, Copy)]
pub struct Script {
    /// One response for each request, in order.
    pub responses: &'static [&'static str],
    pub end: End,
}

#[derive(Clone, Copy)]
pub enum End {
    /// Waits until the client closes.
    Wait,
    Close,
    /// Reads another request, and closes without a response.
    CloseOnRequest,
}

#[derive(Clone, Default)]
pub struct Counts {
    pub connections: Arc<AtomicUsize>,
    pub open: Arc<AtomicUsize>,
    pub requests: Arc<Mutex<Vec<String>>>,
}

pub struct TestServer {
    pub address: SocketAddr,
    pub counts: Counts,
    task: JoinHandle<()>,
}

impl TestServer {
    pub async fn start(script: Script) -> Self {
        Self::at((Ipv4Addr::LOCALHOST, 0).into(), script).await
    }

    pub async fn at(address: SocketAddr, script: Script) -> Self {
        Self::new(address, script, None).await
    }

    pub async fn with_tls(script: Script, config: Arc<ServerConfig>) -> Self {
        Self::new((Ipv4Addr::LOCALHOST, 0).into(), script, Some(config.into())).await
    }

    async fn new(address: SocketAddr, script: Script, tls: Option<TlsAcceptor>) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let (address, counts) = (listener.local_addr().unwrap(), Counts::default());
        let of_server = counts.clone();
        let task = tokio::spawn(async move {
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                let (counts, tls) = (of_server.clone(), tls.clone());
                counts.connections.fetch_add(1, Ordering::SeqCst);
                counts.open.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(async move {
                    match tls {
                        None => serve(tcp, script, &counts).await,
                        Some(tls) => match tls.accept(tcp).await {
                            Ok(stream) => serve(stream, script, &counts).await,
                            Err(_refused) => {}
                        },
                    }
                    counts.open.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        Self { address, counts, task }
    }

    pub fn url(&self) -> String {
        format!("http://{}/", self.address)
    }

    pub fn connections(&self) -> usize {
        self.counts.connections.load(Ordering::SeqCst)
    }

    pub fn requests(&self) -> Vec<String> {
        self.counts.requests.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until the client has closed all but `left` connections.
    pub async fn wait_for_open(&self, left: usize) {
        for _ in 0..2_000 {
            if self.counts.open.load(Ordering::SeqCst) == left {
                return;
            }
            sleep(Duration::from_millis(10)).await;
        }
        panic!("{} connections are open, not {left}", self.counts.open.load(Ordering::SeqCst));
    }
}

impl Drop for TestServer {
    /// Stops to accept; connections stay.
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(mut stream: impl AsyncRead + AsyncWrite + Unpin, script: Script, counts: &Counts) {
    for response in script.responses {
        if !read_request(&mut stream, counts).await {
            return;
        }
        for piece in response.split('|') {
            let _ = stream.write_all(piece.as_bytes()).await;
            let _ = stream.flush().await;
            if response.contains('|') {
                sleep(Duration::from_millis(5)).await;
            }
        }
    }
    match script.end {
        End::Wait => while stream.read(&mut [0; 64]).await.is_ok_and(|read| read > 0) {},
        End::Close => {}
        End::CloseOnRequest => _ = read_request(&mut stream, counts).await,
    }
}

/// Reads a request whose body, if it has one, is `spans`.
async fn read_request(stream: &mut (impl AsyncRead + Unpin), counts: &Counts) -> bool {
    let mut seen = Vec::new();
    let complete = |seen: &[u8]| {
        if seen.starts_with(b"POST") { seen.ends_with(b"spans") } else { seen.ends_with(b"\r\n\r\n") }
    };
    while !complete(&seen) {
        if stream.read_buf(&mut seen).await.unwrap_or(0) == 0 {
            return false;
        }
    }
    let request = String::from_utf8_lossy(&seen).into_owned();
    counts.requests.lock().unwrap_or_else(PoisonError::into_inner).push(request);
    true
}

/// A TLS configuration with a new certificate for `localhost`, which is written to `pem`.
pub fn tls_config(pem: &Path) -> Arc<ServerConfig> {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    std::fs::write(pem, made.cert.pem()).unwrap();
    let key = rustls_pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    Arc::new(config)
}
