//! The connections of one worker to one endpoint.
//!
//! HTTP/1.1: idle connections on a stack, the freshest first, so that the surplus grows old and is closed.
//! HTTP/2: a few connections that carry many streams; another is opened above [`STREAMS_PER_CONNECTION`].

use std::{
    cell::{Cell, RefCell},
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame};
use hyper::{body::Incoming, client::conn::http2};
use hyper_util::rt::TokioIo;
use tokio::{sync::Notify, task::spawn_local, time::Instant};

use super::{
    connect::{ConnectError, Connected, Proof, TlsTarget, connect},
    guards::{ConnectionSlot, Guards},
    http1::Http1,
    idle::{Learned, keep_alive_timeout},
    local::LocalEndpoint,
    stream::UpstreamIo,
};
use crate::{
    config::{HeaderCase, PoolIdle},
    http1,
    identity::{handshake::Speaks, tls::ClientTls},
    proxy::body::RequestBody,
    resilience::classify::Loss,
    runtime::LocalExecutor,
};

/// Idle HTTP/1.1 connections kept per worker and endpoint.
const MAX_IDLE: usize = 512;
/// Streams in flight on an HTTP/2 connection above which another connection is opened.
const STREAMS_PER_CONNECTION: u32 = 64;
/// How long an idle HTTP/1.1 connection is kept where nothing better is known: Node closes after 5 s.
const IDLE_UNKNOWN: Duration = Duration::from_secs(4);
const H2_IDLE: Duration = Duration::from_secs(50);
/// A connection that lay idle for less is not looked at again: its end would most likely have been seen.
const SURELY_FRESH: Duration = Duration::from_millis(1);

/// What a connection must be like.
#[derive(Clone, Debug)]
pub struct ConnectionSettings {
    pub connect_timeout: Option<Duration>,
    pub pool_idle: PoolIdle,
    pub header_case: HeaderCase,
    /// Drawn anew for each connection, so that not all end at once.
    pub max_age: Option<Duration>,
    /// None: plain.
    pub tls: Option<TlsTarget>,
}

/// The connections to one endpoint.
#[derive(Debug, Default)]
pub struct Pool {
    idle: RefCell<Vec<Http1>>,
    h2: RefCell<Vec<Rc<H2>>>,
    dialling: RefCell<Option<Rc<Dialling>>>,
    /// What the upstream's closes have taught about its idle time.
    learned: Cell<Learned>,
}

/// An HTTP/2 connection.
#[derive(Debug)]
pub struct H2 {
    sender: http2::SendRequest<RequestBody>,
    streams: Cell<u32>,
    idle_since: Cell<Instant>,
    retire_at: Option<Instant>,
    proof: Option<Box<Proof>>,
    loss: Loss,
}

/// One dial that several calls wait for.
#[derive(Debug, Default)]
struct Dialling {
    done: RefCell<Option<Result<Rc<H2>, ConnectError>>>,
    wake: Notify,
}

/// A connection, or a stream of one, held by a call.
#[derive(Debug)]
pub enum Lease {
    H1 {
        connection: Http1,
        endpoint: Rc<LocalEndpoint>,
        reused: bool,
    },
    /// `body`: of its answer, once that has begun.
    H2 {
        stream: Stream,
        reused: bool,
        body: Option<Incoming>,
    },
}

/// Counts a stream until it is dropped.
#[derive(Debug)]
pub struct Stream(Rc<H2>);

impl Stream {
    pub fn sender(&self) -> http2::SendRequest<RequestBody> {
        self.0.sender.clone()
    }
}

/// Why there is no answer, or no more of it.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    #[error(transparent)]
    Http1(#[from] http1::Error),
    #[error(transparent)]
    Http2(#[from] hyper::Error),
}

impl AnswerError {
    /// Whether what came is not HTTP.
    pub fn is_malformed(&self) -> bool {
        match self {
            Self::Http1(error) => error.is_malformed(),
            Self::Http2(error) => error.is_parse(),
        }
    }

    /// What HTTP/2 says of it.
    pub fn h2(&self) -> Option<&h2::Error> {
        match self {
            Self::Http1(_) => None,
            Self::Http2(error) => std::error::Error::source(error)?.downcast_ref(),
        }
    }
}

impl Pool {
    /// An HTTP/1.1 connection: an idle one that is still alive, else a new one.
    pub async fn h1(
        endpoint: &Rc<LocalEndpoint>,
        settings: &ConnectionSettings,
        guards: &Arc<Guards>,
        now: Instant,
    ) -> Result<Lease, ConnectError> {
        if let Some(connection) = endpoint.pool.pop_idle(settings, now) {
            return Ok(Lease::H1 { connection, endpoint: Rc::clone(endpoint), reused: true });
        }
        let connection = Box::pin(Http1::open(endpoint, settings, guards)).await?;
        Ok(Lease::H1 { connection, endpoint: Rc::clone(endpoint), reused: false })
    }

    /// Takes idle connections off the stack until one can be used.
    fn pop_idle(&self, settings: &ConnectionSettings, now: Instant) -> Option<Http1> {
        let mut idle = self.idle.borrow_mut();
        // One that leads to another name, by TLS, is left for calls to that.
        while let Some(at) = idle.iter().rposition(|connection| fits(connection.proof(), settings)) {
            let mut connection = idle.remove(at);
            let age = now.saturating_duration_since(connection.idle_since);
            if age >= self.idle_limit(&connection, settings.pool_idle, now) || connection.is_retired(now) {
                // All below on the stack are older.
                if !connection.is_retired(now) {
                    idle.clear();
                }
                continue;
            }
            if connection.is_closed() || (age >= SURELY_FRESH && !connection.is_quiet()) {
                self.learn_close(age, now);
                continue;
            }
            return Some(connection);
        }
        None
    }

    fn idle_limit(&self, connection: &Http1, setting: PoolIdle, now: Instant) -> Duration {
        match setting {
            PoolIdle::Fixed(limit) => *limit,
            PoolIdle::Auto => {
                let told = connection.told.unwrap_or(IDLE_UNKNOWN);
                self.learned.get().limit(now).map_or(told, |learned| learned.min(told))
            }
        }
    }

    fn learn_close(&self, age: Duration, now: Instant) {
        let mut learned = self.learned.get();
        learned.closed(age, now);
        self.learned.set(learned);
    }

    fn put_back(&self, mut connection: Http1, now: Instant) {
        let usable = connection.rest(now);
        let mut idle = self.idle.borrow_mut();
        if usable && idle.len() < MAX_IDLE {
            idle.push(connection);
        }
    }

    /// A stream of an HTTP/2 connection: of one that has room, else of a new one that all who wait share.
    pub async fn h2(
        endpoint: &Rc<LocalEndpoint>,
        settings: &ConnectionSettings,
        guards: &Arc<Guards>,
    ) -> Result<Lease, ConnectError> {
        loop {
            if let Some(connection) = endpoint.pool.h2_with_room(settings) {
                return Ok(Lease::H2 { stream: Stream::new(connection), reused: true, body: None });
            }
            let running = endpoint.pool.dialling.borrow().clone();
            let dialling = running.unwrap_or_else(|| Dialling::start(endpoint, settings.clone(), guards));
            let connection = dialling.finished().await?;
            if connection.streams.get() < STREAMS_PER_CONNECTION
                && fits(connection.proof.as_deref(), settings)
            {
                return Ok(Lease::H2 { stream: Stream::new(connection), reused: false, body: None });
            }
        }
    }

    /// Closes a connection that lies idle, if there is one; its place is free when its task has ended.
    pub fn close_idle(&self) {
        let mut idle = self.idle.borrow_mut();
        if !idle.is_empty() {
            // The one that has been idle for longest.
            drop(idle.remove(0));
            return;
        }
        let mut h2 = self.h2.borrow_mut();
        if let Some(index) = h2.iter().position(|connection| connection.streams.get() == 0) {
            drop(h2.remove(index));
        }
    }

    fn h2_with_room(&self, settings: &ConnectionSettings) -> Option<Rc<H2>> {
        let now = Instant::now();
        self.retire_h2(now);
        let connections = self.h2.borrow();
        let usable = |connection: &&Rc<H2>| {
            connection.streams.get() < STREAMS_PER_CONNECTION && fits(connection.proof.as_deref(), settings)
        };
        connections.iter().find(usable).cloned()
    }

    /// Old or closed connections get no new streams; they end when the streams they carry have.
    fn retire_h2(&self, now: Instant) {
        self.h2.borrow_mut().retain(|connection| {
            let old = connection.retire_at.is_some_and(|at| now >= at);
            let idle = connection.streams.get() == 0
                && now.saturating_duration_since(connection.idle_since.get()) >= H2_IDLE;
            !connection.sender.is_closed() && !old && !idle
        });
    }

    /// Closes what has been idle for too long. Called about once a second.
    pub fn sweep(&self, setting: PoolIdle, tls: Option<&Arc<ClientTls>>) {
        let now = Instant::now();
        self.idle.borrow_mut().retain(|connection| is_of(connection.proof(), tls));
        self.h2.borrow_mut().retain(|connection| is_of(connection.proof.as_deref(), tls));
        self.idle.borrow_mut().retain_mut(|connection| {
            let age = now.saturating_duration_since(connection.idle_since);
            connection.listen();
            if connection.is_closed() {
                self.learn_close(age, now);
                return false;
            }
            age < self.idle_limit(connection, setting, now) && !connection.is_retired(now)
        });
        self.retire_h2(now);
    }

    /// How many connections lie idle.
    pub fn idle_connections(&self) -> usize {
        self.idle.borrow().len() + self.h2.borrow().iter().filter(|c| c.streams.get() == 0).count()
    }
}

impl H2 {
    async fn open(
        endpoint: &LocalEndpoint,
        settings: &ConnectionSettings,
        guards: &Arc<Guards>,
    ) -> Result<Rc<Self>, ConnectError> {
        let address = endpoint.shared.address;
        let slot = ConnectionSlot::take(guards).await?;
        let connected = connect(address, settings.connect_timeout, settings.tls.as_ref(), Speaks::H2).await?;
        let slot = slot.opened(connected.protection());
        let Connected { io, proof, .. } = connected;
        let (sender, connection) = http2::Builder::new(LocalExecutor)
            .timer(hyper_util::rt::TokioTimer::new())
            .max_header_list_size(http1::MAX_HEAD_BYTES as u32)
            .initial_stream_window_size(1 << 20)
            .initial_connection_window_size(2 << 20)
            .keep_alive_interval(Duration::from_secs(60))
            .keep_alive_timeout(Duration::from_secs(20))
            .handshake(TokioIo::new(io))
            .await
            .map_err(|error| ConnectError::Handshake { address, reason: error.to_string() })?;
        spawn_local(async move {
            let _slot = slot;
            let _ = connection.await;
        });
        let now = Instant::now();
        Ok(Rc::new(Self {
            sender,
            streams: Cell::new(0),
            idle_since: Cell::new(now),
            retire_at: retire_at(settings, proof.as_deref(), now),
            proof,
            loss: Loss::default(),
        }))
    }
}

/// Whether a connection leads to whom a call wants.
fn fits(proof: Option<&Proof>, settings: &ConnectionSettings) -> bool {
    match (proof, &settings.tls) {
        (None, None) => true,
        (Some(proof), Some(target)) => proof.fits(target),
        _ => false,
    }
}

/// Whether a connection was made by the settings of now.
fn is_of(proof: Option<&Proof>, tls: Option<&Arc<ClientTls>>) -> bool {
    match (proof, tls) {
        (None, None) => true,
        (Some(proof), Some(client)) => proof.is_of(client),
        _ => false,
    }
}

/// No connection is used for longer than the certificate of who answered is good for.
pub(super) fn retire_at(
    settings: &ConnectionSettings,
    proof: Option<&Proof>,
    now: Instant,
) -> Option<Instant> {
    let proven = proof.and_then(|proof| now.checked_add(proof.expires_in()));
    let aged = settings.max_age.map(|age| now + age);
    match (proven, aged) {
        (Some(proven), Some(aged)) => Some(proven.min(aged)),
        (at, None) | (None, at) => at,
    }
}

impl Dialling {
    /// Dials in a task of its own: a call that gives up must not take the others' connection with it.
    fn start(endpoint: &Rc<LocalEndpoint>, settings: ConnectionSettings, guards: &Arc<Guards>) -> Rc<Self> {
        let dialling = Rc::new(Self::default());
        endpoint.pool.dialling.replace(Some(Rc::clone(&dialling)));
        let (endpoint, done, guards) = (Rc::clone(endpoint), Rc::clone(&dialling), Arc::clone(guards));
        spawn_local(async move {
            let result = H2::open(&endpoint, &settings, &guards).await;
            if let Ok(connection) = &result {
                endpoint.pool.h2.borrow_mut().push(Rc::clone(connection));
            }
            endpoint.pool.dialling.replace(None);
            done.done.replace(Some(result));
            done.wake.notify_waiters();
        });
        dialling
    }

    async fn finished(&self) -> Result<Rc<H2>, ConnectError> {
        loop {
            let woken = self.wake.notified();
            if let Some(result) = &*self.done.borrow() {
                return result.clone();
            }
            woken.await;
        }
    }
}

impl Stream {
    fn new(connection: Rc<H2>) -> Self {
        connection.streams.set(connection.streams.get() + 1);
        Self(connection)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.0.streams.set(self.0.streams.get().saturating_sub(1));
        self.0.idle_since.set(Instant::now());
    }
}

impl Lease {
    /// Whether the connection has carried a request before: then its silent end says nothing about the upstream.
    pub fn reused(&self) -> bool {
        match self {
            Self::H1 { reused, .. } => *reused,
            // With other streams on it, it did not lie idle.
            Self::H2 { stream, reused, .. } => *reused && stream.0.streams.get() == 1,
        }
    }

    /// What sees to it that the loss of a connection with many calls on it counts once.
    pub fn loss(&self) -> Option<&Loss> {
        match self {
            Self::H1 { .. } => None,
            Self::H2 { stream, .. } => Some(&stream.0.loss),
        }
    }

    /// Whether a byte of an answer came, where that can be told: what an HTTP/2 connection says may be for any stream.
    pub fn heard_anything(&self) -> bool {
        matches!(self, Self::H1 { connection, .. } if connection.heard_anything())
    }

    /// Whether any of the request may have reached the endpoint, where HTTP/1.1 carries it.
    pub fn sent_anything(&self) -> bool {
        matches!(self, Self::H1 { connection, .. } if connection.sent_anything())
    }

    /// Polls the next part of the answer's body.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, AnswerError>>> {
        match self {
            Self::H1 { connection, .. } => connection.poll_frame(cx).map_err(AnswerError::from),
            Self::H2 { body: Some(body), .. } => Pin::new(body).poll_frame(cx).map_err(AnswerError::from),
            Self::H2 { body: None, .. } => Poll::Ready(None),
        }
    }

    /// Whether the answer's body is over, as far as can be told without reading on.
    pub fn is_end_stream(&self) -> bool {
        match self {
            Self::H1 { connection, .. } => connection.is_end_stream(),
            Self::H2 { body, .. } => body.as_ref().is_none_or(Body::is_end_stream),
        }
    }

    /// How long the rest of the answer's body is, where that was told.
    pub fn length(&self) -> Option<u64> {
        match self {
            Self::H1 { connection, .. } => connection.length(),
            Self::H2 { body, .. } => body.as_ref().map_or(Some(0), |body| body.size_hint().exact()),
        }
    }

    /// What the connection is once it was upgraded, and what has come on it already. HTTP/2 has no such thing.
    pub fn take_stream(&mut self) -> Option<(UpstreamIo, Bytes)> {
        match self {
            Self::H1 { connection, .. } => connection.take_stream(),
            Self::H2 { .. } => None,
        }
    }

    /// Learns from the response's `Keep-Alive: timeout=`.
    pub fn heard(&mut self, headers: &HeaderMap) {
        if let Self::H1 { connection, .. } = self
            && let Some(told) =
                headers.get("keep-alive").and_then(|value| keep_alive_timeout(value.to_str().ok()?))
        {
            // The upstream counts from when it wrote, we from when we read; and our next request must still arrive.
            let margin = (told / 10).clamp(Duration::from_millis(100), Duration::from_secs(1));
            connection.told = Some(told.saturating_sub(margin));
        }
    }

    /// The response has been read to its end. `whole_request`: so has the request been written.
    pub fn finished(self, whole_request: bool, now: Instant) {
        if let Self::H1 { connection, endpoint, .. } = self
            && whole_request
        {
            endpoint.pool.put_back(connection, now);
        }
    }
}
