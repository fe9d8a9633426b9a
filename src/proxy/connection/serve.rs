//! HTTP by hyper, and the watch over it: a connection that stands still is cut, one that drains is asked to leave.

use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    rc::Rc,
    time::Duration,
};

use hyper::{
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    task::spawn_local,
    time::Instant,
};

use super::{CALLER_IDLE, Connection, ConnectionError, HEADER_TIMEOUT, MAX_HEADER_BYTES};
use crate::{
    config::HeaderCase,
    proxy::progress::{Watchdog, poll_watched},
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
    pub(super) async fn serve_http1<S>(self: &Rc<Self>, stream: S) -> Result<(), ConnectionError>
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
            .max_header_size(MAX_HEADER_BYTES)
            .preserve_header_case(preserve_case)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        self.drive(connection, |connection| connection.graceful_shutdown()).await
    }

    pub(super) async fn serve_http2<S>(self: &Rc<Self>, stream: S) -> Result<(), ConnectionError>
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
