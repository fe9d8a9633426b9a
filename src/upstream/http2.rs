//! An HTTP/2 connection to an endpoint, and its streams.

mod driver;
pub mod pool;
mod waiters;

use std::{
    cell::{Cell, RefCell},
    future::{Future, poll_fn},
    pin::{Pin, pin},
    rc::Rc,
    task::{Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use h2::{
    PingPong,
    client::{Builder, SendRequest},
};
use http::{
    Method, Request, Response,
    header::{CONTENT_LENGTH, HeaderMap},
};
use http_body::Body as _;
use tokio::{
    task::{AbortHandle, spawn_local},
    time::Instant,
};

use self::waiters::Waiters;
use super::{
    RequestBody,
    connect::{ConnectError, NewConnection, PeerVerification, connect},
    local::LocalEndpoint,
    policy_state::ConnectionSlot,
    pool::{ConnectionSettings, retire_at},
};
use crate::{
    http1::framing::MAX_HEADER_LIST,
    http2::{
        MAX_RESET_STREAMS, MAX_STREAM_ERRORS, RESET_STREAM_DURATION,
        body::StreamBody,
        fields,
        header_filter::HeaderFilter,
        send::BodySender,
        wire_state::{ObservedIo, WireState},
    },
    net::alpn::ApplicationProtocol,
    resilience::classify::ConnectionLoss,
};

/// Streams in flight on a connection above which another connection is opened.
const MAX_STREAMS: u32 = 64;
/// What a stream may receive before any of it is read: the memory that a slow client holds.
const STREAM_WINDOW: u32 = 256 * 1024;
/// All streams may fill their windows, and the next one still gets data. It bounds the memory of a connection.
const CONNECTION_WINDOW: u32 = STREAM_WINDOW * MAX_STREAMS;
/// Streams that `h2` opens before the endpoint's SETTINGS arrive. Requests wait for them, for a limited time.
const STREAMS_BEFORE_SETTINGS: usize = 1;
/// A connection whose send window has been exhausted for this long gets no further request with a body.
const WINDOW_EXHAUSTED_FOR: Duration = Duration::from_millis(100);

/// When a connection is probed with PING.
#[derive(Clone, Copy, Debug)]
pub struct PingSettings {
    /// After this long without a received byte while streams are open; `None` = never.
    pub interval: Option<Duration>,
    /// How long to wait for the PING response before the connection gets no more requests.
    pub timeout: Duration,
}

/// A connection. Its task ends when this and all its streams are dropped.
#[derive(Debug)]
pub struct Http2Connection {
    sender: SendRequest<Bytes>,
    state: Rc<ConnectionState>,
    retire_at: Option<Instant>,
    verification: Option<Box<PeerVerification>>,
    loss: ConnectionLoss,
}

/// The state that a connection's task shares with its streams and the pool.
#[derive(Debug)]
struct ConnectionState {
    wire: Rc<WireState>,
    /// Streams in flight, including those whose request is still being sent.
    streams: Cell<u32>,
    /// The most concurrent streams that the endpoint allows; 0 until anything was received.
    limit: Cell<u32>,
    idle_since: Cell<Instant>,
    closed: Cell<bool>,
    /// It has not answered a PING in time, or has seen too many errors: no new streams.
    retired: Cell<bool>,
    /// A PING is to be sent at once.
    ping_wanted: Cell<bool>,
    /// When the unanswered PING was sent.
    ping_sent: Cell<Option<Instant>>,
    /// The waker of the connection's task.
    task: RefCell<Option<Waker>>,
    /// The requests that wait for a stream.
    changed: Rc<Waiters>,
}

/// A stream of a connection, counted until it is dropped.
#[derive(Debug)]
pub struct Http2Stream {
    connection: Rc<Http2Connection>,
    slot: Rc<StreamSlot>,
    upload: Option<AbortHandle>,
    sent_at: Option<Instant>,
    response_started: bool,
    /// The response body, once its head has arrived.
    body: Option<StreamBody>,
    /// The response has been read to its end.
    complete: bool,
}

#[derive(Debug)]
struct StreamSlot(Rc<ConnectionState>);

/// Why there is no response.
#[derive(Debug)]
pub struct RequestError {
    pub error: h2::Error,
    /// Nothing of the request was sent, and nothing of its body was read.
    pub is_unsent: bool,
}

impl Http2Connection {
    async fn open(
        endpoint: &LocalEndpoint,
        settings: &ConnectionSettings,
        slot: ConnectionSlot,
        changed: &Rc<Waiters>,
    ) -> Result<Rc<Self>, ConnectError> {
        let address = endpoint.shared.address;
        let connected =
            connect(address, settings.tcp, settings.tls.as_ref(), ApplicationProtocol::H2).await?;
        let slot = slot.mark_open(connected.protection());
        let NewConnection { io, verification: proof, .. } = connected;
        let wire = WireState::client();
        let made = builder().handshake(ObservedIo::new(HeaderFilter::for_server(io, &wire), &wire)).await;
        let (sender, mut h2) =
            made.map_err(|error| ConnectError::Handshake { address, reason: error.to_string() })?;
        let now = Instant::now();
        let state = Rc::new(ConnectionState {
            wire,
            streams: Cell::new(0),
            limit: Cell::new(0),
            idle_since: Cell::new(now),
            closed: Cell::new(false),
            retired: Cell::new(false),
            ping_wanted: Cell::new(false),
            ping_sent: Cell::new(None),
            task: RefCell::new(None),
            changed: Rc::clone(changed),
        });
        let ping: Option<PingPong> = h2.ping_pong();
        let driver = driver::Driver::new(h2, Rc::clone(&state), ping, settings.ping);
        spawn_local(async move {
            let _slot = slot;
            driver.await;
        });
        Ok(Rc::new(Self {
            sender,
            state,
            retire_at: retire_at(settings, proof.as_deref(), now),
            verification: proof,
            loss: ConnectionLoss::default(),
        }))
    }

    /// Whether it may get new streams at all.
    fn is_usable(&self, now: Instant) -> bool {
        let state = &self.state;
        !(state.closed.get()
            || state.retired.get()
            || state.wire.is_going_away()
            || self.retire_at.is_some_and(|at| now >= at))
    }

    /// Whether one more stream may be opened now.
    fn has_free_stream(&self) -> bool {
        self.state.ping_sent.get().is_none() && self.state.streams.get() < self.state.limit.get()
    }

    /// Whether request bodies have exhausted its send window, and the endpoint does not extend it.
    fn is_window_exhausted(&self, now: Instant) -> bool {
        let since = self.state.wire.window_empty_since();
        since.is_some_and(|since| now.saturating_duration_since(since) >= WINDOW_EXHAUSTED_FOR)
    }

    /// Whether it has no free stream only because the endpoint has not allowed any yet: another connection would have
    /// none either.
    fn awaits_stream_limit(&self) -> bool {
        let state = &self.state;
        !state.closed.get() && state.limit.get() == 0 && state.streams.get() == 0
    }

    fn is_idle(&self) -> bool {
        self.state.streams.get() == 0
    }
}

impl Drop for Http2Connection {
    fn drop(&mut self) {
        self.state.wake_task();
    }
}

fn builder() -> Builder {
    let mut builder = Builder::new();
    builder
        .enable_push(false)
        .initial_max_send_streams(STREAMS_BEFORE_SETTINGS)
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(MAX_HEADER_LIST)
        .max_local_error_reset_streams(Some(MAX_STREAM_ERRORS))
        .max_concurrent_reset_streams(MAX_RESET_STREAMS)
        .reset_stream_duration(RESET_STREAM_DURATION);
    builder
}

impl ConnectionState {
    /// Stores the waker of the connection's task, mostly the same as before.
    fn store_waker(&self, waker: &Waker) {
        let mut task = self.task.borrow_mut();
        if !task.as_ref().is_some_and(|task| task.will_wake(waker)) {
            *task = Some(waker.clone());
        }
    }

    fn wake_task(&self) {
        if let Some(task) = self.task.take() {
            task.wake();
        }
    }
}

impl StreamSlot {
    fn new(state: &Rc<ConnectionState>) -> Rc<Self> {
        state.streams.set(state.streams.get() + 1);
        Rc::new(Self(Rc::clone(state)))
    }
}

impl Drop for StreamSlot {
    fn drop(&mut self) {
        let state = &self.0;
        state.streams.set(state.streams.get().saturating_sub(1));
        state.idle_since.set(Instant::now());
        state.changed.notify_one();
    }
}

impl Http2Stream {
    fn new(connection: Rc<Http2Connection>) -> Self {
        let slot = StreamSlot::new(&connection.state);
        Self {
            connection,
            slot,
            upload: None,
            sent_at: None,
            response_started: false,
            body: None,
            complete: false,
        }
    }

    /// Sends a request and waits for its response head. A task of its own sends the request body unless it can be
    /// sent at once.
    pub async fn send(
        &mut self,
        mut request: Request<()>,
        body: RequestBody,
    ) -> Result<Response<()>, RequestError> {
        adapt_request(&mut request, &body);
        let ends = body.is_end_stream();
        let now = Instant::now();
        let sent = self.connection.sender.clone().send_request(request, ends);
        let (response, stream) = sent.map_err(|error| RequestError { error, is_unsent: true })?;
        self.sent_at = Some(now);
        if !ends {
            self.upload(BodySender::new(body, stream)).await;
        }
        let response = response.await.map_err(|error| RequestError { error, is_unsent: false })?;
        self.response_started = true;
        let (head, stream) = response.into_parts();
        let body = StreamBody::of_response(stream, &head.headers, &self.connection.state.wire);
        self.complete = body.is_end_stream();
        self.body = Some(body);
        Ok(Response::from_parts(head, ()))
    }

    async fn upload(&mut self, mut sender: BodySender<RequestBody>) {
        let done = poll_fn(|cx| Poll::Ready(Pin::new(&mut sender).poll(cx).is_ready())).await;
        if done {
            return;
        }
        // The endpoint counts a stream until both its directions have ended.
        let slot = Rc::clone(&self.slot);
        let task = spawn_local(async move {
            let _slot = slot;
            if let Err(error) = pin!(sender).await {
                tracing::debug!(%error, "request body not sent completely");
            }
        });
        self.upload = Some(task.abort_handle());
    }

    /// Whether it is the only stream of its connection.
    pub fn is_only_stream(&self) -> bool {
        self.connection.state.streams.get() == 1
    }

    /// The verified server identity, if TLS.
    pub fn peer_verification(&self) -> Option<&PeerVerification> {
        self.connection.verification.as_deref()
    }

    pub fn loss(&self) -> &ConnectionLoss {
        &self.connection.loss
    }

    pub fn body(&mut self) -> Option<&mut StreamBody> {
        self.body.as_mut()
    }

    pub fn peek_body(&self) -> Option<&StreamBody> {
        self.body.as_ref()
    }

    /// Marks the response as read to its end: the rest of the request is still sent.
    pub fn mark_complete(&mut self) {
        self.complete = true;
    }
}

impl Drop for Http2Stream {
    fn drop(&mut self) {
        if !self.complete
            && let Some(upload) = &self.upload
        {
            upload.abort();
        }
        // Cancelled by its client, or by a deadline here. If the endpoint has sent anything meanwhile, it is alive.
        let state = &self.connection.state;
        let silent =
            self.sent_at.is_some_and(|sent| state.wire.last_received().is_none_or(|heard| heard <= sent));
        if !self.response_started && silent && !state.closed.get() {
            state.ping_wanted.set(true);
            state.wake_task();
        }
    }
}

/// Adapts a request to HTTP/2.
fn adapt_request(request: &mut Request<()>, body: &RequestBody) {
    let has_payload =
        !matches!(*request.method(), Method::GET | Method::HEAD | Method::DELETE | Method::CONNECT);
    let fields: &mut HeaderMap = request.headers_mut();
    fields::strip_connection_fields(fields);
    if !fields.contains_key(CONTENT_LENGTH)
        && let Some(length) = body.size_hint().exact()
        && (length > 0 || has_payload)
    {
        fields.insert(CONTENT_LENGTH, length.into());
    }
}
