//! A caller's connection, from its first byte to its last.

mod first;
mod http1;
mod http2;
mod leaving;
mod spoken;
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
    connect, detect::RequestWatch, error::ProxyError, interim::Interim, progress::Progress, redirected,
    target,
};
use crate::{
    config::{HostPort, Mtls, Protocol},
    identity::{Peer, SpiffeId, xfcc},
    model::Side,
    net::io::{Io, SharedTcp},
    proxy::worker::{Phase, Worker, announce_phase, connections, drain_phase},
    telemetry::metrics::{Awaited, Detected},
};

use leaving::{Leaving, looked_at};
use spoken::{BegunBytes, Plain};

pub use http1::body::Body;
#[cfg(test)]
pub use http1::link::Link;
pub use upgraded::Upgrade;

/// From the first byte of a request's head to its last (slowloris).
pub const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// A caller's connection that carries nothing. Long: who closes first loses the race against the next request.
const CALLER_IDLE: Duration = Duration::from_secs(3600);
/// A caller that takes nothing of what is written to it.
const WRITE_STALL: Duration = Duration::from_secs(300);
/// How long an idle HTTP/1 connection is kept after it was asked to leave.
const LAST_CALL: Duration = Duration::from_secs(1);

/// What all calls of a connection share.
#[derive(Debug)]
pub struct Connection {
    pub worker: Rc<Worker>,
    pub side: Side,
    /// The peer's address, as `x-forwarded-for` has it.
    pub peer: HeaderValue,
    pub address: SocketAddr,
    /// Came by TLS that ended here.
    pub tls: bool,
    /// That was TLS 1.2.
    pub tls12: bool,
    /// Of the call that HTTP/1 carries now.
    pub interim: Interim,
    /// Whom the caller's certificate proved to be; `None`: plaintext, or TLS without a certificate.
    pub peer_identity: Option<Arc<Peer>>,
    /// The same as `x-forwarded-client-cert` has it, made when it is first needed.
    client_cert: OnceCell<Option<HeaderValue>>,
    /// The chain it showed.
    presented: Option<Box<[CertificateDer<'static>]>>,
    /// Came without TLS where only TLS is taken: its calls hear so, and nothing else becomes of them.
    refused_plaintext: Cell<bool>,
    /// Where it was going when the kernel led it here.
    pub redirected_to: Option<SocketAddr>,
    /// Inside a CONNECT tunnel, whom it leads to.
    pub tunnel_to: Option<HostPort>,
    /// The exchange that HTTP/1 carries now.
    exchange: RefCell<Option<Rc<Progress>>>,
    /// Takes the stream, once the answer to the call under way has changed the protocol.
    handover: RefCell<Option<oneshot::Sender<Box<dyn Io>>>>,
    /// Streams that HTTP/2 carries now.
    streams: Cell<u32>,
    http2: Cell<bool>,
    /// A request has come by HTTP/2.
    has_served: Cell<bool>,
    /// Asked to leave: answers tell the caller so.
    leaving: Cell<bool>,
    /// Since when nothing is under way.
    idle_since: Cell<Instant>,
}

/// What was found out about a connection before it is served.
#[derive(Debug, Default)]
struct Found {
    tls: bool,
    tls12: bool,
    peer_identity: Option<Arc<Peer>>,
    presented: Option<Box<[CertificateDer<'static>]>>,
    redirected_to: Option<SocketAddr>,
    tunnel_to: Option<HostPort>,
}

/// Serves a connection to its end. What few connections need is boxed: each holds room for all the rest.
pub async fn run(worker: Rc<Worker>, stream: TcpStream, peer: SocketAddr, side: Side, coming: Awaited) {
    let redirected_to = redirected::destination(&stream, &side);
    if side == Side::Outbound && redirected_to.is_some_and(redirected::is_probe) {
        return worker.shared.interception.probe_arrived();
    }
    let _open = connections(&worker.shared, &side).opened();
    drop(coming);
    let _counted = Counted::new(&worker);
    let stream = SharedTcp::new(stream);
    let connection = Connection::new(&worker, side, peer, redirected_to);
    if let Err(error) = connection.serve(stream).await {
        tracing::debug!(%peer, %error, "connection ended");
    }
}

const NO_CLIENT_CERTIFICATE: ConnectionError =
    ConnectionError::Cut("it shows no client certificate, which `inbound.mtls` asks for by now");
const OUTDATED: ConnectionError =
    ConnectionError::Cut("the configuration does not take it any more, and `drain_timeout` is over");
const TLS_TOO_OLD: ConnectionError =
    ConnectionError::Cut("it came by TLS 1.2, which `min_tls` does not allow by now");

const DISTRUSTED: ConnectionError =
    ConnectionError::Cut("its peer's certificate was revoked, and a byte stream cannot be asked to close");

/// Why a connection ended other than well.
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
        Self::begin(worker, side, (address, peer), Found { redirected_to, ..Found::default() })
    }

    fn begin(
        worker: &Rc<Worker>,
        side: Side,
        (address, peer): (SocketAddr, HeaderValue),
        found: Found,
    ) -> Rc<Self> {
        Rc::new(Self {
            worker: Rc::clone(worker),
            side,
            peer,
            address,
            tls: found.tls,
            tls12: found.tls12,
            interim: Interim::default(),
            peer_identity: found.peer_identity,
            client_cert: OnceCell::new(),
            presented: found.presented,
            refused_plaintext: Cell::default(),
            redirected_to: found.redirected_to,
            tunnel_to: found.tunnel_to,
            exchange: RefCell::default(),
            handover: RefCell::default(),
            streams: Cell::default(),
            http2: Cell::default(),
            has_served: Cell::default(),
            leaving: Cell::default(),
            idle_since: Cell::new(Instant::now()),
        })
    }

    /// The connection inside of this one.
    fn inside(&self, found: Found) -> Rc<Self> {
        Self::begin(&self.worker, self.side.clone(), (self.address, self.peer.clone()), found)
    }

    /// The connection inside a CONNECT tunnel of this one.
    pub fn inside_tunnel(&self, to: HostPort) -> Rc<Self> {
        self.inside(Found {
            tls: self.tls,
            tls12: self.tls12,
            peer_identity: self.peer_identity.clone(),
            presented: None,
            redirected_to: None,
            tunnel_to: Some(to),
        })
    }

    /// Serves the connection: what is TLS, and meant for us, from the inside.
    async fn serve(self: &Rc<Self>, stream: SharedTcp) -> Result<(), ConnectionError> {
        self.check_no_loop()?;
        // Whom bytes that are not HTTP go to; for the outbound port nobody, unless they were redirected.
        let behind = target::behind(self);
        let mtls = target::mtls(self);
        let protocol = behind.as_ref().map_or(Protocol::Auto, |behind| behind.cluster.settings.protocol);
        if let (Protocol::Tcp, Some(behind)) = (protocol, &behind) {
            if mtls == Mtls::Strict {
                return Box::pin(self.serve_tls(stream, Bytes::new(), mtls, behind)).await;
            }
            self.note_detected(Detected::Declared);
            // No wait for the caller, who may be waiting for the service: so it cannot be seen whether it speaks TLS.
            let (upstream, _in_use) = Box::pin(connect::dial(self, behind)).await?;
            return Box::pin(self.carry(
                stream,
                upstream,
                behind,
                (RequestWatch::off(), BegunBytes::default()),
            ))
            .await;
        }
        let plain = Plain { behind: behind.as_ref(), mtls, agreed: false };
        match (self.serve_plain(stream, plain).await?, &behind) {
            (Some((stream, begun)), Some(behind)) => {
                Box::pin(self.serve_tls(stream, begun, mtls, behind)).await
            }
            _ => Ok(()),
        }
    }

    /// Whether calls are refused because they came without TLS.
    pub fn refused_plaintext(&self) -> bool {
        self.refused_plaintext.get()
    }

    /// Who calls, for the service.
    pub fn client_cert(&self) -> Option<&HeaderValue> {
        let peer = self.peer_identity.as_deref()?;
        let value = || {
            let own = self.worker.shared.identity.own();
            let by = own.as_ref().and_then(|material| material.own.spiffe.as_ref());
            xfcc::value(peer, by.map(SpiffeId::as_str))
        };
        self.client_cert.get_or_init(value).as_ref()
    }

    pub fn is_leaving(&self) -> bool {
        self.leaving.get()
    }

    /// The connection ends with the response that is being made.
    pub fn refuse_further_requests(&self) {
        self.leaving.set(true);
    }

    /// Waits until this connection is to be closed where nothing is under way on it.
    ///
    /// From the announcement of the drain on, responses tell the client to close. HTTP/2 says GOAWAY and loses nothing. An
    /// HTTP/1 connection that is kept open serves on until its side drains; a request may be on its way even then, and is
    /// still answered for a while.
    async fn closing(&self) {
        let announced = announce_phase(&self.side);
        let accepted_late = *self.worker.shared.phase.borrow() >= announced;
        let trusted = self.asked_to_leave(announced).await;
        self.leaving.set(true);
        if self.http2.get() {
            if trusted && accepted_late {
                Box::pin(self.served_or_draining()).await;
            }
            return;
        }
        if trusted {
            Box::pin(self.reached(drain_phase(&self.side))).await;
        }
        sleep(LAST_CALL).await;
    }

    /// Waits until clients of this side are told to leave, or the peer is not trusted any more; false where it is not.
    async fn asked_to_leave(&self, announced: Phase) -> bool {
        if self.refused_plaintext.get() {
            return false;
        }
        // One place for the future that all wait for: a connection holds as much as its largest moment.
        let revoked: Pin<Box<dyn Future<Output = ()> + '_>> = match &self.presented {
            None if self.side == Side::Inbound => Box::pin(self.outdated()),
            None => Box::pin(std::future::pending()),
            Some(chain) if self.tls12 => Box::pin(async {
                tokio::select! {
                    () = self.distrusted(chain) => {}
                    () = self.outdated() => {}
                }
            }),
            Some(chain) => Box::pin(self.distrusted(chain)),
        };
        tokio::select! {
            () = self.reached(announced) => true,
            () = revoked => false,
        }
    }

    /// Waits until the process has come to a phase.
    async fn reached(&self, wanted: Phase) {
        let phase = &self.worker.shared.phase;
        looked_at(phase, || (*phase.borrow() >= wanted).then_some(())).await;
    }

    /// A client that connects while the drain is announced may wait for SETTINGS before it sends a request. GOAWAY right
    /// behind them would make it connect again and again; so it comes behind the first request. [`Leaving`] polls this
    /// whenever the connection is polled.
    async fn served_or_draining(&self) {
        let served = poll_fn(|_| if self.has_served.get() { Poll::Ready(()) } else { Poll::Pending });
        tokio::select! {
            () = served => {}
            () = self.reached(drain_phase(&self.side)) => {}
        }
    }

    /// Why the configuration of now does not take this connection any more, whatever it carries.
    pub fn refusal_by_now(&self) -> Option<ConnectionError> {
        if target::lacks_identity(self) {
            Some(NO_CLIENT_CERTIFICATE)
        } else if target::has_outdated_tls(self) {
            Some(TLS_TOO_OLD)
        } else {
            None
        }
    }
}

/// Counts a connection for its worker.
struct Counted<'a>(&'a Worker);

impl<'a> Counted<'a> {
    fn new(worker: &'a Worker) -> Self {
        if let Some(load) = worker.load() {
            load.connections.fetch_add(1, Ordering::Relaxed);
        }
        Self(worker)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        if let Some(load) = self.0.load() {
            load.connections.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ten thousand idle callers hold one each.
    #[test]
    fn a_connection_is_small() {
        fn size<F: Future>(_: impl Fn(Rc<Worker>, TcpStream, SocketAddr, Side, Awaited) -> F) -> usize {
            size_of::<F>()
        }
        let size = size(run);
        assert!(size <= 1490, "{size} bytes");
    }
}
