//! A client's connection, from its first byte to its last.

mod drain_watch;
mod first_bytes;
mod http1;
mod http2;
mod protocol;
mod tls;
mod upgraded;

use std::{
    cell::{Cell, OnceCell, RefCell},
    future::{Future, poll_fn},
    io,
    net::SocketAddr,
    pin::Pin,
    rc::Rc,
    sync::{Arc, atomic::Ordering},
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use http::HeaderValue;
use rustls_pki_types::CertificateDer;
use tokio::{
    net::TcpStream,
    sync::oneshot,
    time::{Instant, sleep},
};

use super::{
    detect::RequestWatch, dial, error::ProxyError, interim::InterimQueue, progress::Progress, redirection,
    target,
};
use crate::{
    config::{HostPort, Mtls, Protocol},
    identity::{Peer, SpiffeId, xfcc},
    model::Side,
    net::io::{Io, SharedTcp},
    proxy::worker::{Phase, Worker, announce_phase, connection_counts, drain_phase},
    telemetry::metrics::{DetectionOutcome, PendingGuard},
};

use drain_watch::{DrainWatch, wait_until_some};
use protocol::{ByteStreamOrigin, PlaintextOptions};

pub use http1::body::Body;
#[cfg(test)]
pub use http1::server_connection::ServerConnection;
pub use upgraded::Upgrade;

/// The limit from the first byte of a request's head to its last (slowloris).
pub const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// The limit for an idle client connection. Long: closing one races with the client's next request.
const CLIENT_IDLE_TIMEOUT: Duration = Duration::from_secs(3600);
/// The limit for a client that reads nothing of what is written to it.
const WRITE_STALL_TIMEOUT: Duration = Duration::from_secs(300);
/// How long an idle HTTP/1 connection stays open after its close was requested.
const CLOSE_GRACE: Duration = Duration::from_secs(1);

/// The state that all requests of a connection share.
#[derive(Debug)]
pub struct Connection {
    pub worker: Rc<Worker>,
    pub side: Side,
    /// The peer's IP address, as a value for `x-forwarded-for`.
    pub peer: HeaderValue,
    pub address: SocketAddr,
    /// TLS was terminated here.
    pub tls: bool,
    /// The version was TLS 1.2.
    pub tls12: bool,
    /// The interim responses of the HTTP/1 request in progress.
    pub interim: InterimQueue,
    /// The identity in the client's verified certificate; `None`: plaintext, or TLS without a certificate.
    pub peer_identity: Option<Arc<Peer>>,
    /// The same as a value for `x-forwarded-client-cert`, made when it is first needed.
    client_cert: OnceCell<Option<HeaderValue>>,
    /// The certificate chain that the client presented.
    presented_chain: Option<Box<[CertificateDer<'static>]>>,
    /// Plaintext on a port that requires mutual TLS: every request gets an error response.
    refused_plaintext: Cell<bool>,
    /// The original destination, if kernel rules redirected the connection here.
    pub original_destination: Option<SocketAddr>,
    /// The destination of the CONNECT tunnel that this connection is inside of.
    pub tunnel_destination: Option<HostPort>,
    /// The HTTP/1 request in progress.
    exchange: RefCell<Option<Rc<Progress>>>,
    /// Receives the stream after a response that changes the protocol (101, 2xx to CONNECT).
    handover: RefCell<Option<oneshot::Sender<Box<dyn Io>>>>,
    /// Open HTTP/2 streams.
    streams: Cell<u32>,
    http2: Cell<bool>,
    /// A request has arrived over HTTP/2.
    has_served: Cell<bool>,
    /// The connection is to be closed: responses say `Connection: close`.
    close_requested: Cell<bool>,
    /// When the last request ended.
    idle_since: Cell<Instant>,
}

/// What is known of a connection before it is served.
#[derive(Debug, Default)]
struct ConnectionInfo {
    tls: bool,
    tls12: bool,
    peer_identity: Option<Arc<Peer>>,
    presented_chain: Option<Box<[CertificateDer<'static>]>>,
    original_destination: Option<SocketAddr>,
    tunnel_destination: Option<HostPort>,
}

/// Serves a connection to its end. Rare steps are boxed, to keep the future of every connection small.
pub async fn run(worker: Rc<Worker>, stream: TcpStream, peer: SocketAddr, side: Side, coming: PendingGuard) {
    let redirected_to = redirection::original_destination(&stream, &side);
    if side == Side::Outbound && redirected_to.is_some_and(redirection::is_probe) {
        return worker.shared.interception.probe_arrived();
    }
    let _open = connection_counts(&worker.shared, &side).count_open();
    drop(coming);
    let _load = LoadGuard::new(&worker);
    let stream = SharedTcp::new(stream);
    let connection = Connection::new(&worker, side, peer, redirected_to);
    if let Err(error) = connection.serve(stream).await {
        tracing::debug!(%peer, %error, "connection ended");
    }
}

const NO_CLIENT_CERTIFICATE: ConnectionError =
    ConnectionError::Cut("the client presented no certificate, and `inbound.mtls` now requires one");
const OUTDATED: ConnectionError = ConnectionError::Cut(
    "the configuration no longer allows this connection, and `drain_timeout` has elapsed",
);
const TLS_TOO_OLD: ConnectionError =
    ConnectionError::Cut("the connection uses TLS 1.2, and `min_tls` now requires 1.3");

const PEER_REVOKED: ConnectionError = ConnectionError::Cut("the peer's certificate was revoked");

/// Why a connection ended with an error.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Http(#[from] h2::Error),
    #[error(transparent)]
    Refused(#[from] ProxyError),
    #[error("{0}")]
    Cut(&'static str),
}

impl Connection {
    fn new(
        worker: &Rc<Worker>,
        side: Side,
        address: SocketAddr,
        redirected_to: Option<SocketAddr>,
    ) -> Rc<Self> {
        let address = SocketAddr::new(address.ip().to_canonical(), address.port());
        let peer =
            HeaderValue::try_from(address.ip().to_string()).unwrap_or(HeaderValue::from_static("unknown"));
        Self::begin(
            worker,
            side,
            address,
            peer,
            ConnectionInfo { original_destination: redirected_to, ..ConnectionInfo::default() },
        )
    }

    fn begin(
        worker: &Rc<Worker>,
        side: Side,
        address: SocketAddr,
        peer: HeaderValue,
        found: ConnectionInfo,
    ) -> Rc<Self> {
        Rc::new(Self {
            worker: Rc::clone(worker),
            side,
            peer,
            address,
            tls: found.tls,
            tls12: found.tls12,
            interim: InterimQueue::default(),
            peer_identity: found.peer_identity,
            client_cert: OnceCell::new(),
            presented_chain: found.presented_chain,
            refused_plaintext: Cell::default(),
            original_destination: found.original_destination,
            tunnel_destination: found.tunnel_destination,
            exchange: RefCell::default(),
            handover: RefCell::default(),
            streams: Cell::default(),
            http2: Cell::default(),
            has_served: Cell::default(),
            close_requested: Cell::default(),
            idle_since: Cell::new(Instant::now()),
        })
    }

    /// The connection inside this one (TLS, CONNECT).
    fn inner(&self, found: ConnectionInfo) -> Rc<Self> {
        Self::begin(&self.worker, self.side.clone(), self.address, self.peer.clone(), found)
    }

    /// The connection inside a CONNECT tunnel on this one.
    pub fn inner_for_tunnel(&self, to: HostPort) -> Rc<Self> {
        self.inner(ConnectionInfo {
            tls: self.tls,
            tls12: self.tls12,
            peer_identity: self.peer_identity.clone(),
            presented_chain: None,
            original_destination: None,
            tunnel_destination: Some(to),
        })
    }

    /// Serves the connection; where TLS is terminated here, the connection inside it.
    async fn serve(self: &Rc<Self>, stream: SharedTcp) -> Result<(), ConnectionError> {
        self.check_no_loop()?;
        // The destination of bytes that are not HTTP; none on the outbound port, unless the connection was redirected.
        let destination = target::byte_stream_destination(self);
        let mtls = target::mtls_mode(self);
        let protocol =
            destination.as_ref().map_or(Protocol::Auto, |destination| destination.cluster.settings.protocol);
        if let (Protocol::Tcp, Some(destination)) = (protocol, &destination) {
            if mtls == Mtls::Strict {
                return Box::pin(self.serve_tls(stream, Bytes::new(), mtls, destination)).await;
            }
            self.note_detected(DetectionOutcome::Declared);
            // Does not wait for the client, which may be waiting for the server; so TLS cannot be detected.
            let (upstream, _in_use) = Box::pin(dial::dial(self, destination)).await?;
            return Box::pin(self.relay_byte_stream(
                stream,
                upstream,
                destination,
                RequestWatch::off(),
                ByteStreamOrigin::default(),
            ))
            .await;
        }
        let plain = PlaintextOptions { destination: destination.as_ref(), mtls, is_negotiated: false };
        match (self.serve_plain(stream, plain).await?, &destination) {
            (Some((stream, read_ahead)), Some(destination)) => {
                Box::pin(self.serve_tls(stream, read_ahead, mtls, destination)).await
            }
            _ => Ok(()),
        }
    }

    /// Whether every request is refused because the connection has no TLS.
    pub fn refused_plaintext(&self) -> bool {
        self.refused_plaintext.get()
    }

    /// The peer identity as a value for `x-forwarded-client-cert`.
    pub fn client_cert(&self) -> Option<&HeaderValue> {
        let peer = self.peer_identity.as_deref()?;
        let value = || {
            let own = self.worker.shared.identity.material();
            let by = own.as_ref().and_then(|material| material.identity.spiffe.as_ref());
            xfcc::header_value(peer, by.map(SpiffeId::as_str))
        };
        self.client_cert.get_or_init(value).as_ref()
    }

    pub fn is_close_requested(&self) -> bool {
        self.close_requested.get()
    }

    /// Closes the connection after the current response.
    pub fn close_after_response(&self) {
        self.close_requested.set(true);
    }

    /// Waits until this connection is to be closed as soon as no request is in progress.
    ///
    /// From the announcement of the drain on, responses say `Connection: close`. HTTP/2 sends GOAWAY and loses no
    /// request. An HTTP/1 connection that stays open serves requests until its side drains, and then for
    /// [`CLOSE_GRACE`], as a request may be in transit.
    async fn wait_for_close(&self) {
        let announced = announce_phase(&self.side);
        let accepted_late = *self.worker.shared.phase.borrow() >= announced;
        let trusted = self.wait_for_close_request(announced).await;
        self.close_requested.set(true);
        if self.http2.get() {
            if trusted && accepted_late {
                Box::pin(self.first_request_or_drain()).await;
            }
            return;
        }
        if trusted {
            Box::pin(self.wait_for_phase(drain_phase(&self.side))).await;
        }
        sleep(CLOSE_GRACE).await;
    }

    /// Waits until the drain of this side is announced (true), or the connection is no longer allowed or trusted
    /// (false).
    async fn wait_for_close_request(&self, announced: Phase) -> bool {
        if self.refused_plaintext.get() {
            return false;
        }
        // One boxed future for all cases keeps the connection's own future small.
        let no_longer_allowed: Pin<Box<dyn Future<Output = ()> + '_>> = match &self.presented_chain {
            None if self.side == Side::Inbound => Box::pin(self.wait_until_outdated()),
            None => Box::pin(std::future::pending()),
            Some(chain) if self.tls12 => Box::pin(async {
                tokio::select! {
                    () = self.wait_until_distrusted(chain) => {}
                    () = self.wait_until_outdated() => {}
                }
            }),
            Some(chain) => Box::pin(self.wait_until_distrusted(chain)),
        };
        tokio::select! {
            () = self.wait_for_phase(announced) => true,
            () = no_longer_allowed => false,
        }
    }

    /// Waits until the process has reached a phase.
    async fn wait_for_phase(&self, wanted: Phase) {
        let phase = &self.worker.shared.phase;
        wait_until_some(phase, || (*phase.borrow() >= wanted).then_some(())).await;
    }

    /// A client that connects after the drain was announced may wait for SETTINGS before it sends a request. A GOAWAY
    /// right after them would make it reconnect again and again, so GOAWAY follows the first request. [`DrainWatch`]
    /// polls this whenever the connection is polled.
    async fn first_request_or_drain(&self) {
        let served = poll_fn(|_| if self.has_served.get() { Poll::Ready(()) } else { Poll::Pending });
        tokio::select! {
            () = served => {}
            () = self.wait_for_phase(drain_phase(&self.side)) => {}
        }
    }

    /// Why the current configuration no longer allows this connection; `None` if it does.
    pub fn refusal_by_current_config(&self) -> Option<ConnectionError> {
        if target::lacks_identity(self) {
            Some(NO_CLIENT_CERTIFICATE)
        } else if target::has_outdated_tls(self) {
            Some(TLS_TOO_OLD)
        } else {
            None
        }
    }
}

/// Counts a connection in its worker's load.
struct LoadGuard<'a>(&'a Worker);

impl<'a> LoadGuard<'a> {
    fn new(worker: &'a Worker) -> Self {
        if let Some(load) = worker.load() {
            load.connections.fetch_add(1, Ordering::Relaxed);
        }
        Self(worker)
    }
}

impl Drop for LoadGuard<'_> {
    fn drop(&mut self) {
        if let Some(load) = self.0.load() {
            load.connections.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ten thousand idle clients hold one each.
    #[test]
    fn the_future_of_a_connection_is_small() {
        fn size<F: Future>(_: impl Fn(Rc<Worker>, TcpStream, SocketAddr, Side, PendingGuard) -> F) -> usize {
            size_of::<F>()
        }
        let size = size(run);
        assert!(size <= 1490, "{size} bytes");
    }
}
