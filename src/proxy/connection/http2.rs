//! HTTP/2 from clients: a task for the connection, one for each stream, and a watch over both. A connection that stands
//! still is cut, one that drains is asked to leave, and one that is abused is closed ([`crate::resilience::conduct`]).

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

use super::{CALLER_IDLE, Connection, ConnectionError, Leaving, WRITE_STALL};
use crate::{
    http1::MAX_HEAD_BYTES,
    http2::{
        ERRORS_TO_RETIRE, MOST_STREAM_ERRORS, PING_CLOSES_AFTER, REMEMBERED_RESETS, RESET_MEMORY,
        guard::Guarded,
        wire::{Wire, Wired},
    },
    net::watchdog::Watchdog,
    proxy::progress::poll_watched,
    resilience::conduct::{Conduct, Verdict},
};

/// Streams a client may have open on one connection.
const MAX_STREAMS: u32 = 100;
/// Streams that the client may have taken back before they were looked at: what one reading of the socket can bring.
const MOST_RESET_UNSEEN: usize = 1024;
/// What a stream may send before any of it is read. With 64 KiB a client without TCP_NODELAY waits for a delayed
/// acknowledgement (40 ms) at every window.
const STREAM_WINDOW: u32 = 128 * 1024;
/// All streams may have their windows full, and the next one still gets through. It bounds the memory of a connection.
const CONNECTION_WINDOW: u32 = STREAM_WINDOW * MAX_STREAMS;
/// A client that says nothing for this long is asked for a sign of life.
const PING_INTERVAL: Duration = Duration::from_secs(60);

/// What the task of a connection shares with those of its streams.
#[derive(Debug)]
struct Session {
    connection: Rc<Connection>,
    wire: Rc<Wire>,
    conduct: RefCell<Conduct>,
}

/// The connection's side of a session.
struct Driver<S> {
    session: Rc<Session>,
    h2: server::Connection<Wired<Guarded<S>>, Bytes>,
    ping: Option<PingPong>,
    ping_sent: Option<Instant>,
    watchdog: Watchdog,
    verdict: Verdict,
}

impl Connection {
    pub(super) async fn serve_http2<S>(self: &Rc<Self>, stream: S) -> Result<(), ConnectionError>
    where
        S: AsyncRead + AsyncWrite + Unpin + 'static,
    {
        self.http2.set(true);
        let wire = Wire::server();
        let conduct = RefCell::new(Conduct::new(ERRORS_TO_RETIRE, std::time::Instant::now()));
        let session = Rc::new(Session { connection: Rc::clone(self), wire, conduct });
        let mut leaving = Leaving::new(self);
        let mut closing = pin!(self.closing());
        let mut handshake =
            builder().handshake(Wired::new(Guarded::new(stream, &session.wire), &session.wire));
        let (mut watchdog, mut asked_to_leave) = (Watchdog::default(), false);
        let h2 = poll_fn(|cx| {
            asked_to_leave |= leaving.poll(cx, self, closing.as_mut());
            if let Poll::Ready(cut) = leaving.poll_cut(cx) {
                return Poll::Ready(Err(cut));
            }
            let look = || (None, session.standstill().0);
            let made = ready!(poll_watched(cx, &mut watchdog, |cx| Pin::new(&mut handshake).poll(cx), look));
            Poll::Ready(made.map_or_else(|| Err(session.cut()), |made| Ok(made?)))
        });
        let mut h2 = h2.await?;
        if asked_to_leave {
            h2.graceful_shutdown();
        }
        let ping = h2.ping_pong();
        let verdict = Verdict::Proper;
        let mut driver = Driver { session, h2, ping, ping_sent: None, watchdog, verdict };
        poll_fn(|cx| {
            if leaving.poll(cx, self, closing.as_mut()) {
                driver.h2.graceful_shutdown();
            }
            if let Poll::Ready(cut) = leaving.poll_cut(cx) {
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
        .max_pending_accept_reset_streams(MOST_RESET_UNSEEN)
        .max_local_error_reset_streams(Some(MOST_STREAM_ERRORS))
        .max_concurrent_reset_streams(REMEMBERED_RESETS)
        .reset_stream_duration(RESET_MEMORY);
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
            let (silent_at, cut_at) = (self.poll_ping(cx), self.session.standstill().0);
            let due = cut_at.map_or(silent_at, |cut| cut.min(silent_at));
            ready!(self.watchdog.poll_due(cx, Some(due)));
            if cut_at.is_some_and(|cut| cut <= silent_at) {
                return Poll::Ready(Err(self.session.cut()));
            }
            if self.ping_sent.is_some() {
                return Poll::Ready(Err(ConnectionError::Cut("the client answers no PING")));
            }
            self.send_ping();
        }
    }

    /// Acts on the client's conduct. True where the connection has to be polled for that.
    fn judge(&mut self) -> bool {
        let now = std::time::Instant::now();
        let (faults, refusals) = (self.session.wire.take_faults(), self.session.wire.take_refusals());
        let mut conduct = self.session.conduct.borrow_mut();
        if faults > 0 {
            conduct.faults(faults, now);
        }
        if refusals > 0 {
            conduct.refusals(refusals);
        }
        let verdict = conduct.verdict();
        if verdict <= self.verdict {
            return false;
        }
        self.verdict = verdict;
        let peer = self.session.connection.address;
        match verdict {
            Verdict::Proper => return false,
            Verdict::Retire => {
                tracing::info!(%peer, "HTTP/2 connection retired: too many stream errors or resets");
                self.h2.graceful_shutdown();
            }
            Verdict::Close => {
                tracing::warn!(%peer, "HTTP/2 connection closed: the client floods it with stream errors or resets");
                self.h2.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
            }
        }
        true
    }

    /// When a PING is due; or, where one has been sent, when its answer is.
    fn poll_ping(&mut self, cx: &mut Context<'_>) -> Instant {
        if let (Some(ping), Some(sent)) = (&mut self.ping, self.ping_sent) {
            if ping.poll_pong(cx).is_pending() {
                return sent + PING_CLOSES_AFTER;
            }
            self.ping_sent = None;
        }
        self.session.wire.heard().unwrap_or_else(Instant::now) + PING_INTERVAL
    }

    fn send_ping(&mut self) {
        // Without a handle, or on a connection that has just broken: the end is near, and is seen then.
        let _ = self.ping.as_mut().map(|ping| ping.send_ping(Ping::opaque()));
        self.ping_sent = Some(Instant::now());
    }
}

impl Session {
    /// When the connection is cut unless something moves, and why.
    fn standstill(&self) -> (Option<Instant>, &'static str) {
        match self.wire.blocked() {
            Some(since) => (Some(since + WRITE_STALL), "the client takes nothing of what is written to it"),
            None if self.connection.streams.get() > 0 => (None, ""),
            None => (Some(self.connection.idle_since.get() + CALLER_IDLE), "idle"),
        }
    }

    fn cut(&self) -> ConnectionError {
        ConnectionError::Cut(self.standstill().1)
    }
}
