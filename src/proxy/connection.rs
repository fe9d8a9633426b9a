//! A caller's connection, from its first byte to its last.

use std::{
    cell::{Cell, OnceCell, RefCell},
    convert::Infallible,
    future::{Future, pending, poll_fn},
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    rc::Rc,
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::{HeaderValue, Request, Response};
use hyper::{
    body::Incoming,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls_pki_types::{CertificateDer, UnixTime};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    task::spawn_local,
    time::{Instant, sleep, timeout},
};

use super::{
    accept::Side,
    authorize,
    body::ResponseBody,
    call,
    connect::{self, Dialled},
    detect::{Detector, Spoken},
    error::ProxyError,
    io::{CallerIo, Prefixed, SharedTcp, Wire},
    progress::{Progress, Watchdog, poll_watched},
    redirected, target,
    tunnel::{self, relay},
};
use crate::{
    config::{HeaderCase, HostPort, Mtls, Protocol},
    identity::{
        Peer, SpiffeId,
        handshake::{self, FailureKind, Met, Proven, Speaks, TlsFailure},
        tls::Offer,
        trust::Role,
        xfcc,
    },
    runtime::{LocalCluster, Phase, Worker, drain_phase},
    telemetry::metrics::{Detected, Tls, Way},
    upstream::stream::UpstreamIo,
};

/// From the first byte of a request's head to its last (slowloris).
pub const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// A caller's connection that carries nothing. Long: who closes first loses the race against the next request.
const CALLER_IDLE: Duration = Duration::from_secs(3600);
/// How long an idle HTTP/1 connection is kept after it was asked to leave.
const LAST_CALL: Duration = Duration::from_secs(1);
/// A caller that takes nothing of what is written to it.
const WRITE_STALL: Duration = Duration::from_secs(300);
/// A caller that says nothing for this long may be waiting for the other side to speak first.
const SILENCE: Duration = Duration::from_millis(100);
/// Limits of §4.9: header block and number of fields.
pub const MAX_HEADER_BYTES: usize = 64 * 1024;
pub const MAX_HEADERS: usize = 100;
/// Streams a caller may have open on one HTTP/2 connection.
const MAX_STREAMS: u32 = 200;
/// Resets a caller may provoke or send before its connection is closed (rapid reset, MadeYouReset).
const MAX_RESETS: usize = 64;
/// How often a caller's certificate is looked at again.
const LOOK_AGAIN: Duration = Duration::from_secs(600);
const H2_STREAM_WINDOW: u32 = 256 * 1024;
const H2_CONNECTION_WINDOW: u32 = 1024 * 1024;

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
    pub wire: Arc<Wire>,
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
    /// The exchange that HTTP/1 carries now, or the one HTTP/2 has just begun.
    exchange: RefCell<Option<Rc<Progress>>>,
    /// Streams that HTTP/2 carries now.
    streams: Cell<u32>,
    http2: Cell<bool>,
    /// Asked to leave: answers tell the caller so.
    leaving: Cell<bool>,
    /// Since when nothing is under way.
    idle_since: Cell<Instant>,
}

/// Serves a connection to its end. What few connections need is boxed: each holds room for all the rest.
pub async fn run(worker: Rc<Worker>, stream: TcpStream, peer: SocketAddr, side: Side) {
    let redirected_to = redirected::destination(&stream, &side);
    if side == Side::Outbound && redirected_to.is_some_and(redirected::is_probe) {
        return worker.shared.interception.probe_arrived();
    }
    let metrics = match &side {
        Side::Inbound => &worker.shared.metrics.inbound,
        Side::Outbound | Side::Upstream(_) => &worker.shared.metrics.outbound,
    };
    let _open = metrics.opened();
    let _counted = Counted::new(&worker);
    let stream = SharedTcp::new(stream);
    let connection = Connection::new(&worker, side, peer, redirected_to);
    if let Err(error) = connection.serve(stream).await {
        tracing::debug!(%peer, %error, "connection ended");
    }
}

/// Why a connection ended other than well.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Http(#[from] hyper::Error),
    #[error(transparent)]
    Refused(#[from] ProxyError),
    #[error("{0}")]
    Cut(&'static str),
}

const SILENT: ConnectionError =
    ConnectionError::Cut("neither side has said anything for tunnel_idle_timeout");

fn not_ready() -> TlsFailure {
    let reason = "there is no valid certificate to show it yet".to_owned();
    TlsFailure { kind: FailureKind::NotReady, reason }
}

fn too_slow() -> TlsFailure {
    let reason = format!("its TLS handshake took longer than {HEADER_TIMEOUT:?}");
    TlsFailure { kind: FailureKind::Broken, reason }
}

/// Whoever might speak first has not done so for as long as a tunnel may stand still.
async fn silent_for_too_long(to: &LocalCluster) {
    match to.cluster.settings.policy.tunnel_idle_timeout.limit() {
        Some(limit) => sleep(limit).await,
        None => pending().await,
    }
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
        Rc::new(Self {
            worker: Rc::clone(worker),
            side,
            peer,
            address,
            tls: false,
            wire: Arc::default(),
            peer_identity: None,
            client_cert: OnceCell::new(),
            presented: None,
            refused_plaintext: Cell::default(),
            redirected_to,
            tunnel_to: None,
            exchange: RefCell::default(),
            streams: Cell::default(),
            http2: Cell::default(),
            leaving: Cell::default(),
            idle_since: Cell::new(Instant::now()),
        })
    }

    /// The connection inside a CONNECT tunnel of this one.
    pub fn inside_tunnel(&self, to: HostPort) -> Rc<Self> {
        Rc::new(Self {
            worker: Rc::clone(&self.worker),
            side: self.side.clone(),
            peer: self.peer.clone(),
            address: self.address,
            tls: self.tls,
            wire: Arc::default(),
            peer_identity: self.peer_identity.clone(),
            client_cert: OnceCell::new(),
            presented: None,
            refused_plaintext: Cell::default(),
            redirected_to: None,
            tunnel_to: Some(to),
            exchange: RefCell::default(),
            streams: Cell::default(),
            http2: Cell::default(),
            leaving: Cell::default(),
            idle_since: Cell::new(Instant::now()),
        })
    }

    /// The connection inside of TLS, which this one has turned out to be.
    fn inside_tls(&self, proven: Option<Proven>) -> Rc<Self> {
        let (peer, presented) = match proven {
            Some(Proven { peer, chain }) => (Some(Arc::new(peer)), Some(chain.into())),
            None => (None, None),
        };
        Rc::new(Self {
            worker: Rc::clone(&self.worker),
            side: self.side.clone(),
            address: self.address,
            peer: self.peer.clone(),
            tls: true,
            wire: Arc::default(),
            peer_identity: peer,
            client_cert: OnceCell::new(),
            presented,
            refused_plaintext: Cell::default(),
            redirected_to: self.redirected_to,
            tunnel_to: None,
            exchange: RefCell::default(),
            streams: Cell::default(),
            http2: Cell::default(),
            leaving: Cell::default(),
            idle_since: Cell::new(Instant::now()),
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
            return Box::pin(self.carry(stream, upstream, behind)).await;
        }
        match (self.serve_plain(stream, behind.as_ref(), mtls).await?, &behind) {
            (Some((stream, begun)), Some(behind)) => {
                Box::pin(self.serve_tls(stream, begun, mtls, behind)).await
            }
            _ => Ok(()),
        }
    }

    /// Meets a caller by TLS and serves what comes inside of it.
    async fn serve_tls(
        &self,
        stream: SharedTcp,
        begun: Bytes,
        mtls: Mtls,
        behind: &Rc<LocalCluster>,
    ) -> Result<(), ConnectionError> {
        let worker = &self.worker;
        let counts = &worker.shared.identity.handshakes.inbound;
        let offer = match behind.cluster.settings.protocol {
            Protocol::Auto | Protocol::Http1 => Offer::Http1First,
            Protocol::H2 => Offer::H2First,
            Protocol::Tcp => Offer::Nothing,
        };
        let handshake = async {
            let Ok(_leave) = worker.handshakes.acquire().await else { return Err(not_ready()) };
            let server = worker.shared.identity.server().clone().ok_or_else(not_ready)?;
            handshake::accept(&server, mtls == Mtls::Strict, offer, Prefixed::new(begun, stream)).await
        };
        let met = timeout(HEADER_TIMEOUT, handshake).await.unwrap_or_else(|_| Err(too_slow()));
        let Met { stream, proven, speaks, resumed } = met.map_err(|failure| {
            counts.failed(failure.kind);
            // Repetitions are held back by the log.
            tracing::warn!(peer = ?self.peer, "a caller was refused: {failure}");
            ConnectionError::Cut("no TLS")
        })?;
        counts.done(resumed);
        let by = if proven.is_some() { Tls::Mutual } else { Tls::Server };
        let _protected = worker.shared.metrics.inbound.protected(by);
        let inside = self.inside_tls(proven);
        let http = |stream| CallerIo::new(stream, Bytes::new(), Arc::clone(&inside.wire));
        match speaks {
            _ if offer == Offer::Nothing => {
                let (upstream, _in_use) = connect::dial(&inside, behind).await?;
                inside.carry(stream, upstream, behind).await
            }
            Some(Speaks::H2) => inside.serve_http2(http(stream)).await,
            Some(Speaks::Http1) => inside.serve_http1(http(stream)).await,
            Some(Speaks::Bytes) | None => inside.serve_plain(stream, Some(behind), Mtls::Off).await.map(drop),
        }
    }

    /// Tells a caller who came without TLS that only TLS is taken; in HTTP, if that is what it speaks.
    async fn refuse_plaintext<S>(
        self: &Rc<Self>,
        spoken: Spoken,
        stream: CallerIo<S>,
    ) -> Result<(), ConnectionError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        self.worker.shared.identity.handshakes.plaintext_refused.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(peer = ?self.peer, "a caller was refused: it came without TLS, and `inbound.mtls` is \"strict\"");
        self.refused_plaintext.set(true);
        match spoken {
            Spoken::Http1 => self.serve_http1(stream).await,
            Spoken::H2 => self.serve_http2(stream).await,
            _ => Err(ConnectionError::Cut("plaintext")),
        }
    }

    /// Whether calls are refused because they came without TLS.
    pub fn refused_plaintext(&self) -> bool {
        self.refused_plaintext.get()
    }

    /// Finds out what the caller speaks and serves it: HTTP call by call, anything else as bytes. TLS that is meant for
    /// us is given back, with what has been read of it.
    async fn serve_plain<S>(
        self: &Rc<Self>,
        mut stream: S,
        behind: Option<&Rc<LocalCluster>>,
        mtls: Mtls,
    ) -> Result<Option<(S, Bytes)>, ConnectionError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut detector = Detector::default();
        let mut leaving = pin!(self.closing());
        let spoken = match behind {
            Some(_) if mtls == Mtls::Strict => tokio::select! {
                spoken = detector.spoken(&mut stream) => spoken?,
                () = &mut leaving => return Ok(None),
                () = sleep(HEADER_TIMEOUT) => return Err(ConnectionError::Cut("the TLS handshake did not begin")),
            },
            None => tokio::select! {
                spoken = detector.spoken(&mut stream) => spoken?,
                () = &mut leaving => return Ok(None),
                () = sleep(CALLER_IDLE) => return Err(ConnectionError::Cut("idle")),
            },
            Some(behind) => {
                let silence = if self.redirected_to.is_some() { redirected::SILENCE } else { SILENCE };
                let protocol = behind.cluster.settings.protocol;
                let declared = matches!(protocol, Protocol::Http1 | Protocol::H2);
                tokio::select! {
                    spoken = detector.spoken(&mut stream) => spoken?,
                    // What is declared need not be found out.
                    () = sleep(CALLER_IDLE), if declared => return Err(ConnectionError::Cut("idle")),
                    () = sleep(silence), if !declared => {
                        // Perhaps the service is the one to speak first. Whichever does decides.
                        match Box::pin(connect::dial(self, behind)).await {
                            Ok((mut upstream, _in_use)) => {
                                let spoken = tokio::select! {
                                    biased;
                                    spoken = detector.spoken(&mut stream) => Some(spoken?),
                                    ready = upstream.readable() => { ready?; None }
                                    () = &mut leaving => return Ok(None),
                                    () = silent_for_too_long(behind) => return Err(SILENT),
                                };
                                match spoken {
                                    // Whom the greeting names may be another.
                                    Some(Spoken::Tls) if mtls != Mtls::Off || self.outward().is_some() => {
                                        Spoken::Tls
                                    }
                                    Some(Spoken::Http1 | Spoken::H2) => spoken.unwrap_or(Spoken::Nothing),
                                    Some(Spoken::Nothing) => return Ok(None),
                                    Some(Spoken::Other | Spoken::Tls) | None => {
                                        self.note_detected(match spoken {
                                            Some(Spoken::Tls) => Detected::Tls,
                                            Some(_) => Detected::Bytes,
                                            None => Detected::ServerFirst,
                                        });
                                        let stream = CallerIo::new(
                                            stream,
                                            detector.into_bytes(),
                                            Arc::clone(&self.wire),
                                        );
                                        let carried = Box::pin(self.carry(stream, upstream, behind)).await;
                                        return carried.map(|()| None);
                                    }
                                }
                            }
                            // A caller that speaks HTTP, if a little late, is told in an answer.
                            Err(error) => match timeout(HEADER_TIMEOUT, detector.spoken(&mut stream)).await {
                                Ok(Ok(spoken @ (Spoken::Http1 | Spoken::H2))) => spoken,
                                Ok(Ok(Spoken::Tls)) if mtls != Mtls::Off || self.outward().is_some() => Spoken::Tls,
                                _ => return Err(error.into()),
                            },
                        }
                    }
                }
            }
        };
        if spoken == Spoken::Tls && mtls != Mtls::Off {
            return Ok(Some((stream, detector.into_bytes())));
        }
        self.note_spoken(spoken);
        let named = match self.outward() {
            Some(original) if spoken == Spoken::Tls => {
                Box::pin(self.by_server_name(&mut detector, &mut stream, original, behind)).await?
            }
            _ => None,
        };
        let stream = CallerIo::new(stream, detector.into_bytes(), Arc::clone(&self.wire));
        let served = match (spoken, named.as_ref().or(behind)) {
            (Spoken::Nothing, _) => Ok(()),
            _ if mtls == Mtls::Strict => Box::pin(self.refuse_plaintext(spoken, stream)).await,
            (Spoken::Http1, _) => self.serve_http1(stream).await,
            (Spoken::H2, _) => Box::pin(self.serve_http2(stream)).await,
            (Spoken::Other | Spoken::Tls, Some(behind)) => {
                let bare = self.outward().is_some() && spoken == Spoken::Tls && redirected::is_simple(behind);
                let (upstream, _in_use) = match bare {
                    true => Box::pin(connect::dial_bare(self, behind)).await?,
                    false => Box::pin(connect::dial(self, behind)).await?,
                };
                Box::pin(self.carry(stream, upstream, behind)).await
            }
            (Spoken::Other | Spoken::Tls, None) => Err(self.nowhere()),
        };
        served.map(|()| None)
    }

    async fn carry<S>(
        &self,
        stream: S,
        upstream: UpstreamIo,
        to: &LocalCluster,
    ) -> Result<(), ConnectionError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        if self.side == Side::Inbound {
            authorize::bytes(self, &self.worker.view(), to)?;
        }
        // What a CONNECT led to has been counted with it.
        let way = match &self.side {
            Side::Inbound => Some(Way::Inbound),
            Side::Upstream(_) => Some(Way::Listen),
            Side::Outbound => self.redirected_to.map(|_| Way::Redirect),
        };
        if let Some(way) = way {
            self.worker.shared.metrics.ways.note(way, Instant::now().into_std());
        }
        let policy = &to.cluster.settings.policy;
        let over_at = policy.max_duration.limit().map(|limit| Instant::now() + limit);
        match relay(stream, upstream, policy.tunnel_idle_timeout.limit(), over_at).await {
            tunnel::End::Closed(result) => Ok(result.map(drop)?),
            tunnel::End::Idle => Err(ConnectionError::Cut("nothing moved for tunnel_idle_timeout")),
            tunnel::End::Over => Err(ConnectionError::Cut("max_duration is over")),
        }
    }

    /// Serves what came through a CONNECT tunnel; bytes go to `upstream`, which is connected already. Calls have
    /// connections of their own.
    pub async fn serve_tunnel<S>(
        self: &Rc<Self>,
        mut stream: S,
        (mut upstream, in_use): (UpstreamIo, Dialled),
        to: &LocalCluster,
    ) -> Result<(), ConnectionError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut detector = Detector::default();
        let spoken = tokio::select! {
            biased;
            spoken = detector.spoken(&mut stream) => spoken?,
            // The server speaks first: mail, databases.
            ready = upstream.readable() => { ready?; Spoken::Other }
            () = silent_for_too_long(to) => return Err(SILENT),
        };
        let stream = CallerIo::new(stream, detector.into_bytes(), Arc::clone(&self.wire));
        if matches!(spoken, Spoken::Http1 | Spoken::H2) {
            drop((upstream, in_use));
            return match spoken {
                Spoken::H2 => Box::pin(self.serve_http2(stream)).await,
                _ => self.serve_http1(stream).await,
            };
        }
        match spoken {
            Spoken::Other | Spoken::Tls => Box::pin(self.carry(stream, upstream, to)).await,
            _ => Ok(()),
        }
    }

    async fn serve_http1<S>(self: &Rc<Self>, stream: S) -> Result<(), ConnectionError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let preserve_case = self
            .worker
            .view()
            .clusters
            .iter()
            .any(|local| local.cluster.settings.header_case == HeaderCase::Preserve);
        let this = Rc::clone(self);
        let service = service_fn(move |request| Rc::clone(&this).call(request));
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            // Ours knows an idle connection from a slow head; see `cut_at`.
            .header_read_timeout(None)
            .max_headers(MAX_HEADERS)
            .max_header_size(MAX_HEADER_BYTES)
            .preserve_header_case(preserve_case)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        self.drive(connection, |connection| connection.graceful_shutdown()).await
    }

    async fn serve_http2<S>(self: &Rc<Self>, stream: S) -> Result<(), ConnectionError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        self.http2.set(true);
        let this = Rc::clone(self);
        let service = service_fn(move |request| Rc::clone(&this).call(request));
        let connection = http2::Builder::new(StreamExecutor(Rc::clone(self)))
            .timer(TokioTimer::new())
            .max_concurrent_streams(MAX_STREAMS)
            .max_pending_accept_reset_streams(MAX_RESETS)
            .max_local_error_reset_streams(MAX_RESETS)
            .max_header_list_size(MAX_HEADER_BYTES as u32)
            .initial_stream_window_size(H2_STREAM_WINDOW)
            .initial_connection_window_size(H2_CONNECTION_WINDOW)
            .keep_alive_interval(Duration::from_secs(60))
            .keep_alive_timeout(Duration::from_secs(20))
            .serve_connection(TokioIo::new(stream), service);
        self.drive(connection, |connection| connection.graceful_shutdown()).await
    }

    /// Runs hyper's connection; asks it to leave when the process does, and ends it when it stands still.
    async fn drive<C>(&self, connection: C, leave: impl Fn(Pin<&mut C>)) -> Result<(), ConnectionError>
    where
        C: Future<Output = hyper::Result<()>>,
    {
        let mut connection = pin!(connection);
        let mut leaving = pin!(self.closing());
        let mut watchdog = Watchdog::default();
        let mut left = false;
        poll_fn(|cx| {
            if !left && leaving.as_mut().poll(cx).is_ready() {
                left = true;
                leave(connection.as_mut());
            }
            let look = || (self.exchange.borrow().clone(), self.cut_at().0);
            let polled = poll_watched(cx, &mut watchdog, |cx| connection.as_mut().poll(cx), look);
            polled.map(|result| match result {
                Some(result) => result.map_err(ConnectionError::from),
                None => Err(ConnectionError::Cut(self.cut_at().1)),
            })
        })
        .await
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

    /// Waits until this connection is to be closed where nothing is under way on it.
    ///
    /// HTTP/2 says GOAWAY and loses nothing. On HTTP/1 a request may be on its way just now: for a while it is still
    /// answered, with `Connection: close`.
    async fn closing(&self) {
        self.asked_to_leave().await;
        self.leaving.set(true);
        if !self.http2.get() {
            sleep(LAST_CALL).await;
        }
    }

    /// Waits until connections of this side are asked to leave.
    async fn asked_to_leave(&self) {
        if self.refused_plaintext.get() {
            return;
        }
        let drains_at = drain_phase(&self.side);
        let mut phase = self.worker.shared.phase.subscribe();
        // The sender lives as long as the worker.
        let drained = phase.wait_for(|phase: &Phase| *phase >= drains_at);
        match &self.presented {
            None => drop(drained.await),
            Some(chain) => tokio::select! {
                _ = drained => {}
                () = Box::pin(self.distrusted(chain)) => {}
            },
        }
    }

    /// Waits until the caller's certificate has expired, or is not trusted any more.
    async fn distrusted(&self, chain: &[CertificateDer<'static>]) {
        let store = &self.worker.shared.identity;
        let mut changes = store.changes();
        let Some((peer, (leaf, intermediates))) = self.peer_identity.as_ref().zip(chain.split_first()) else {
            return pending().await;
        };
        loop {
            let left = peer.not_after.duration_since(SystemTime::now()).unwrap_or_default();
            let refusal = match &*store.server() {
                // Without an identity of our own nothing can be said of others.
                None => None,
                Some(server) => server.trust.verify(leaf, intermediates, UnixTime::now(), Role::Client).err(),
            };
            if let Some(refusal) = refusal {
                tracing::info!(%peer, "a caller is asked to leave: {refusal}");
                return;
            }
            tokio::select! {
                _ = changes.changed() => {}
                // Clocks are set and machines sleep: so not for all that is left.
                () = sleep(left.clamp(Duration::from_secs(1), LOOK_AGAIN)) => {}
            }
        }
    }

    /// When the connection is to be cut unless something moves, and what to say then.
    fn cut_at(&self) -> (Option<Instant>, &'static str) {
        if let Some(blocked) = self.wire.write_blocked() {
            return (Some(blocked + WRITE_STALL), "the caller takes nothing of what is written to it");
        }
        match &*self.exchange.borrow() {
            Some(exchange) if !exchange.is_done() => {
                return (
                    exchange.cut_at(),
                    "the exchange stood still for idle_timeout, or took max_duration",
                );
            }
            Some(exchange) => {
                self.idle_since.set(exchange.last_moved());
                self.wire.call_over(exchange.last_moved());
            }
            // HTTP/2, whose bytes are not ours to tell apart.
            None if self.streams.get() > 0 => return (None, ""),
            None => {}
        }
        if let (Some(begun), false) = (self.wire.head_begun(), self.http2.get()) {
            return (Some(begun + HEADER_TIMEOUT), "the request's head took too long");
        }
        (Some(self.idle_since.get() + CALLER_IDLE), "idle")
    }

    /// Begins a call. Not `async`: what is set here must be set before hyper hands the future on.
    fn call(
        self: Rc<Self>,
        request: Request<Incoming>,
    ) -> impl Future<Output = Result<Response<ResponseBody>, Infallible>> {
        let progress = Rc::new(Progress::new(Instant::now()));
        self.wire.head_read();
        self.exchange.replace(Some(Rc::clone(&progress)));
        async move { Ok(call::answer(&self, request, &progress).await) }
    }
}

/// Runs each HTTP/2 stream as a task, under its own watch: a stream that stands still is reset, the others go on.
#[derive(Clone, Debug)]
struct StreamExecutor(Rc<Connection>);

impl<F> hyper::rt::Executor<F> for StreamExecutor
where
    F: Future + 'static,
{
    fn execute(&self, stream: F) {
        let connection = Rc::clone(&self.0);
        let exchange = connection.exchange.take();
        connection.streams.set(connection.streams.get() + 1);
        spawn_local(async move {
            let open = OpenStream(connection);
            let mut stream = pin!(stream);
            let mut watchdog = Watchdog::default();
            poll_fn(|cx| {
                let look = || (exchange.clone(), exchange.as_ref().and_then(|exchange| exchange.cut_at()));
                poll_watched(cx, &mut watchdog, |cx| stream.as_mut().poll(cx).map(drop), look).map(drop)
            })
            .await;
            drop(open);
        });
    }
}

struct OpenStream(Rc<Connection>);

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.streams.set(self.0.streams.get().saturating_sub(1));
        self.0.idle_since.set(Instant::now());
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
        fn size<F: Future>(_: impl Fn(Rc<Worker>, TcpStream, SocketAddr, Side) -> F) -> usize {
            size_of::<F>()
        }
        let size = size(run);
        assert!(size <= 3000, "{size} bytes");
    }
}
