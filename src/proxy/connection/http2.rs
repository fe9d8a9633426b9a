//! HTTP/2 from clients: a task for the connection, one for each stream, and a watchdog for both. A stalled connection
//! is cut, a draining one gets GOAWAY, and an abused one is closed ([`crate::resilience::http2_abuse`]).

mod refused;
mod stream;

use std::{
    cell::RefCell,
    future::{Future, poll_fn},
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use h2::{
    Ping, PingPong, Reason,
    server::{self, Builder},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::Instant,
};

use super::{CLIENT_IDLE_TIMEOUT, Connection, ConnectionError, DrainWatch, WRITE_STALL_TIMEOUT};
use crate::{
    http1::MAX_HEAD_BYTES,
    http2::{
        ERRORS_TO_RETIRE, MAX_RESET_STREAMS, MAX_STREAM_ERRORS, PING_TIMEOUT, RESET_STREAM_DURATION,
        header_filter::HeaderFilter,
        wire_state::{ObservedIo, WireState},
    },
    net::watchdog::Watchdog,
    proxy::progress::poll_watched,
    resilience::http2_abuse::{AbuseDetector, AbuseVerdict},
};

/// The streams that a client may have open on one connection.
const MAX_STREAMS: u32 = 100;
/// The streams that the client may reset before they are accepted: as many as one read of the socket can bring.
const MAX_RESET_BEFORE_ACCEPT: usize = 1024;
/// What a client may send on a stream before any of it is read. With 64 KiB a client without TCP_NODELAY waits for a
/// delayed acknowledgement (40 ms) at every window.
const STREAM_WINDOW: u32 = 128 * 1024;
/// Full windows of all streams do not block a connection. Bounds the memory of a connection.
const CONNECTION_WINDOW: u32 = STREAM_WINDOW * MAX_STREAMS;
/// A client that sends nothing for this long gets a PING.
const PING_INTERVAL: Duration = Duration::from_secs(60);

/// The state that a connection's task shares with those of its streams.
#[derive(Debug)]
struct Session {
    connection: Rc<Connection>,
    wire: Rc<WireState>,
    conduct: RefCell<AbuseDetector>,
}

/// The connection's task.
struct Driver<S> {
    session: Rc<Session>,
    h2: server::Connection<ObservedIo<HeaderFilter<S>>, Bytes>,
    ping: Option<PingPong>,
    ping_sent: Option<Instant>,
    watchdog: Watchdog,
    verdict: AbuseVerdict,
}

impl Connection {
    pub(super) async fn serve_http2<S>(self: &Rc<Self>, stream: S) -> Result<(), ConnectionError>
    where
        S: AsyncRead + AsyncWrite + Unpin + 'static,
    {
        self.http2.set(true);
        let wire = WireState::server();
        let conduct = RefCell::new(AbuseDetector::new(ERRORS_TO_RETIRE, std::time::Instant::now()));
        let session = Rc::new(Session { connection: Rc::clone(self), wire, conduct });
        let mut drain = DrainWatch::new(self);
        let mut closing = pin!(self.wait_for_close());
        let mut handshake = builder()
            .handshake(ObservedIo::new(HeaderFilter::for_client(stream, &session.wire), &session.wire));
        let (mut watchdog, mut close_requested) = (Watchdog::default(), false);
        let h2 = poll_fn(|cx| {
            close_requested |= drain.poll(cx, self, closing.as_mut());
            if let Poll::Ready(cut) = drain.poll_cut(cx) {
                return Poll::Ready(Err(cut));
            }
            let look = || (None, session.stall().0);
            let made = ready!(poll_watched(cx, &mut watchdog, |cx| Pin::new(&mut handshake).poll(cx), look));
            Poll::Ready(made.map_or_else(|| Err(session.cut()), |made| Ok(made?)))
        });
        let mut h2 = h2.await?;
        if close_requested {
            h2.graceful_shutdown();
        }
        let ping = h2.ping_pong();
        let verdict = AbuseVerdict::Acceptable;
        let mut driver = Driver { session, h2, ping, ping_sent: None, watchdog, verdict };
        poll_fn(|cx| {
            if drain.poll(cx, self, closing.as_mut()) {
                driver.h2.graceful_shutdown();
            }
            if let Poll::Ready(cut) = drain.poll_cut(cx) {
                return Poll::Ready(Err(cut));
            }
            driver.poll(cx)
        })
        .await
    }
}

fn builder() -> Builder {
    let mut builder = Builder::new();
    builder
        .max_concurrent_streams(MAX_STREAMS)
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(MAX_HEAD_BYTES as u32)
        .max_pending_accept_reset_streams(MAX_RESET_BEFORE_ACCEPT)
        .max_local_error_reset_streams(Some(MAX_STREAM_ERRORS))
        .max_concurrent_reset_streams(MAX_RESET_STREAMS)
        .reset_stream_duration(RESET_STREAM_DURATION);
    builder
}

impl<S> Driver<S>
where
    S: AsyncRead + AsyncWrite + Unpin + 'static,
{
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConnectionError>> {
        loop {
            loop {
                match self.h2.poll_accept(cx) {
                    Poll::Ready(Some(Ok((request, respond)))) => self.session.open(cx, request, respond),
                    Poll::Ready(Some(Err(error))) => {
                        self.session.report_refused();
                        return Poll::Ready(Err(error.into()));
                    }
                    Poll::Ready(None) => {
                        self.session.report_refused();
                        return Poll::Ready(Ok(()));
                    }
                    Poll::Pending => break,
                }
            }
            self.session.report_refused();
            if self.judge() {
                continue;
            }
            let (silent_at, cut_at) = (self.poll_ping(cx), self.session.stall().0);
            let due = cut_at.map_or(silent_at, |cut| cut.min(silent_at));
            ready!(self.watchdog.poll_due(cx, Some(due)));
            if cut_at.is_some_and(|cut| cut <= silent_at) {
                return Poll::Ready(Err(self.session.cut()));
            }
            if self.ping_sent.is_some() {
                return Poll::Ready(Err(ConnectionError::Cut("the client does not answer PING")));
            }
            self.send_ping();
        }
    }

    /// Retires or closes the connection of a client that abuses it. True if the connection has to be polled.
    fn judge(&mut self) -> bool {
        let now = std::time::Instant::now();
        let (faults, refusals) = (self.session.wire.take_faults(), self.session.wire.take_refusals());
        let mut conduct = self.session.conduct.borrow_mut();
        if faults > 0 {
            conduct.record_client_errors(faults, now);
        }
        if refusals > 0 {
            conduct.record_refusals(refusals);
        }
        let verdict = conduct.verdict();
        if verdict <= self.verdict {
            return false;
        }
        self.verdict = verdict;
        let peer = self.session.connection.address;
        match verdict {
            AbuseVerdict::Acceptable => return false,
            AbuseVerdict::Retire => {
                tracing::info!(%peer, "HTTP/2 connection retired: too many stream errors or resets");
                self.h2.graceful_shutdown();
            }
            AbuseVerdict::Close => {
                tracing::warn!(%peer, "HTTP/2 connection closed: the client floods it with stream errors or resets");
                self.h2.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
            }
        }
        true
    }

    /// When the next PING is due, or the acknowledgement of the one that was sent.
    fn poll_ping(&mut self, cx: &mut Context<'_>) -> Instant {
        if let (Some(ping), Some(sent)) = (&mut self.ping, self.ping_sent) {
            if ping.poll_pong(cx).is_pending() {
                return sent + PING_TIMEOUT;
            }
            self.ping_sent = None;
        }
        self.session.wire.last_received().unwrap_or_else(Instant::now) + PING_INTERVAL
    }

    fn send_ping(&mut self) {
        // It fails on a connection that has just broken, which the next poll reports.
        let _ = self.ping.as_mut().map(|ping| ping.send_ping(Ping::opaque()));
        self.ping_sent = Some(Instant::now());
    }
}

impl Session {
    /// When the connection is cut unless there is progress, and why.
    fn stall(&self) -> (Option<Instant>, &'static str) {
        match self.wire.write_blocked_since() {
            Some(since) => {
                (Some(since + WRITE_STALL_TIMEOUT), "the client reads nothing of what is written to it")
            }
            None if self.connection.streams.get() > 0 => (None, ""),
            None => (Some(self.connection.idle_since.get() + CLIENT_IDLE_TIMEOUT), "idle"),
        }
    }

    fn cut(&self) -> ConnectionError {
        ConnectionError::Cut(self.stall().1)
    }
}
