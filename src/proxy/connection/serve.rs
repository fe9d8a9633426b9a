//! HTTP by hyper, and the watch over it: a connection that stands still is cut, one that drains is asked to leave, one
//! that idles is taken from hyper until more comes (`park.rs`).

use std::{
    cell::Cell,
    future::{Future, poll_fn},
    pin::{Pin, pin},
    rc::Rc,
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use hyper::{
    server::conn::{
        http1::{self, UpgradeableConnection},
        http2,
    },
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    task::spawn_local,
    time::Instant,
};

use super::{
    CALLER_IDLE, Connection, ConnectionError, HEADER_TIMEOUT, MAX_HEADER_BYTES,
    park::{Left, WARM_FOR, parked},
};
use crate::proxy::{
    io::CallerIo,
    progress::{Watchdog, poll_watched},
};

/// A caller that takes nothing of what is written to it.
const WRITE_STALL: Duration = Duration::from_secs(300);
/// Streams a caller may have open on one HTTP/2 connection.
const MAX_STREAMS: u32 = 200;
/// Resets a caller may provoke or send before its connection is closed (rapid reset, MadeYouReset).
const MAX_RESETS: usize = 64;
const H2_STREAM_WINDOW: u32 = 256 * 1024;
const H2_CONNECTION_WINDOW: u32 = 1024 * 1024;

impl Connection {
    pub(super) async fn serve_http1<S>(
        self: &Rc<Self>,
        mut stream: CallerIo<S>,
    ) -> Result<(), ConnectionError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (mut leaving, mut watchdog) = (pin!(self.closing()), Watchdog::default());
        loop {
            // Boxed: a parked connection holds no room for it.
            let warm = Box::pin(self.warm_http1(stream, leaving.as_mut(), &mut watchdog)).await?;
            let Some((idle, unread)) = warm else { return Ok(()) };
            stream = idle;
            if stream.unread(unread) {
                continue;
            }
            let until = self.idle_since.get() + CALLER_IDLE;
            if !parked(&mut stream, until, leaving.as_mut(), &mut watchdog).await? {
                return Ok(());
            }
        }
    }

    /// Serves calls until none has come for a while; then the stream comes back, with what was read and not used.
    async fn warm_http1<S>(
        self: &Rc<Self>,
        stream: CallerIo<S>,
        leaving: Pin<&mut impl Future<Output = ()>>,
        watchdog: &mut Watchdog,
    ) -> Result<Option<(CallerIo<S>, Bytes)>, ConnectionError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let this = Rc::clone(self);
        let service = service_fn(move |request| Rc::clone(&this).call(request));
        let mut connection = http1::Builder::new()
            // Ours knows an idle connection from a slow head; see `standstill`.
            .header_read_timeout(None)
            .max_header_size(MAX_HEADER_BYTES)
            .preserve_header_case(self.worker.view().preserves_case)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        let leave = |connection: Pin<&mut UpgradeableConnection<_, _>>| connection.graceful_shutdown();
        let left = self.drive(Pin::new(&mut connection), leaving, watchdog, leave).await?;
        self.exchange.take();
        Ok(match (left, connection.into_parts()) {
            (Left::Idle, Some(parts)) => Some((parts.io.into_inner(), parts.read_buf)),
            _ => None,
        })
    }

    pub(super) async fn serve_http2<S>(self: &Rc<Self>, stream: S) -> Result<(), ConnectionError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        self.http2.set(true);
        let this = Rc::clone(self);
        let service = service_fn(move |request| Rc::clone(&this).call(request));
        let connection = pin!(
            http2::Builder::new(StreamExecutor(Rc::clone(self)))
                .timer(TokioTimer::new())
                .max_concurrent_streams(MAX_STREAMS)
                .max_pending_accept_reset_streams(MAX_RESETS)
                .max_local_error_reset_streams(MAX_RESETS)
                .max_header_list_size(MAX_HEADER_BYTES as u32)
                .initial_stream_window_size(H2_STREAM_WINDOW)
                .initial_connection_window_size(H2_CONNECTION_WINDOW)
                .keep_alive_interval(Duration::from_secs(60))
                .keep_alive_timeout(Duration::from_secs(20))
                .serve_connection(TokioIo::new(stream), service)
        );
        let (leaving, mut watchdog) = (pin!(self.closing()), Watchdog::default());
        let leave = |connection: Pin<&mut _>| http2::Connection::graceful_shutdown(connection);
        self.drive(connection, leaving, &mut watchdog, leave).await.map(drop)
    }

    /// Runs hyper's connection; asks it to leave when the process does, ends it when it stands still, gives it back when
    /// it idles.
    async fn drive<C>(
        &self,
        mut connection: Pin<&mut C>,
        mut leaving: Pin<&mut impl Future<Output = ()>>,
        watchdog: &mut Watchdog,
        leave: impl Fn(Pin<&mut C>),
    ) -> Result<Left, ConnectionError>
    where
        C: Future<Output = hyper::Result<()>>,
    {
        let (mut left, mut seat) = (false, None);
        let idles = Cell::new(false);
        poll_fn(|cx| {
            if !left && leaving.as_mut().poll(cx).is_ready() {
                left = true;
                leave(connection.as_mut());
            }
            let look = || {
                let (due, standstill) = self.standstill();
                idles.set(matches!(standstill, Standstill::Park));
                (self.exchange.borrow().clone(), due)
            };
            match poll_watched(cx, watchdog, |cx| connection.as_mut().poll(cx), look) {
                Poll::Ready(Some(ended)) => return Poll::Ready(Ok(ended.map(|()| Left::Ended)?)),
                Poll::Ready(None) => match self.standstill().1 {
                    Standstill::Cut(why) => return Poll::Ready(Err(ConnectionError::Cut(why))),
                    Standstill::Park => {}
                },
                Poll::Pending if idles.get() => {
                    seat = seat.take().or_else(|| self.worker.warm.sit());
                    if seat.is_some() {
                        return Poll::Pending;
                    }
                }
                Poll::Pending => {
                    seat = None;
                    return Poll::Pending;
                }
            }
            // What is asked to leave while it idles is over at once, to hyper's own knowledge; the stream is left open.
            self.wire.keep_open(true);
            leave(connection.as_mut());
            let ended = connection.as_mut().poll(cx);
            self.wire.keep_open(false);
            if ended.is_pending() {
                // It was not quite idle, and closes after what comes next.
                self.stays.set(true);
                cx.waker().wake_by_ref();
            }
            ended.map(|ended| Ok(ended.map(|()| Left::Idle)?))
        })
        .await
    }

    /// When something becomes of the connection unless it moves, and what.
    fn standstill(&self) -> (Option<Instant>, Standstill) {
        if let Some(blocked) = self.wire.write_blocked() {
            let cut = Standstill::Cut("the caller takes nothing of what is written to it");
            return (Some(blocked + WRITE_STALL), cut);
        }
        let http2 = self.http2.get();
        let mut body_read = true;
        match &*self.exchange.borrow() {
            Some(exchange) if !exchange.is_done() => {
                let cut = Standstill::Cut("the exchange stood still for idle_timeout, or took max_duration");
                return (exchange.cut_at(), cut);
            }
            Some(exchange) => {
                self.idle_since.set(exchange.last_moved());
                self.wire.call_over(exchange.last_moved());
                body_read = self.bodiless.get() || exchange.request_sent_at().is_some();
            }
            // HTTP/2, whose bytes are not ours to tell apart.
            None if self.streams.get() > 0 => return (None, Standstill::Cut("")),
            None => {}
        }
        match self.wire.head_begun() {
            Some(begun) if !http2 => {
                (Some(begun + HEADER_TIMEOUT), Standstill::Cut("the request's head took too long"))
            }
            _ if http2 || !body_read || self.wire.is_flushing() || self.is_leaving() || self.stays.get() => {
                (Some(self.idle_since.get() + CALLER_IDLE), Standstill::Cut("idle"))
            }
            _ => (Some(self.idle_since.get() + WARM_FOR), Standstill::Park),
        }
    }
}

/// What becomes of a connection that stands still.
enum Standstill {
    /// It is cut, for this reason.
    Cut(&'static str),
    /// It idles, and is taken from hyper.
    Park,
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
