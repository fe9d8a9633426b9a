//! HTTP/2 by hyper, and the watch over it: a connection that stands still is cut, one that drains is asked to leave.

use std::{
    future::{Future, poll_fn},
    pin::pin,
    rc::Rc,
    task::{Poll, ready},
    time::Duration,
};

use hyper::{server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    task::spawn_local,
    time::Instant,
};

use super::{CALLER_IDLE, Connection, ConnectionError, Leaving, WRITE_STALL};
use crate::{
    http1::MAX_HEAD_BYTES,
    proxy::{
        io::Noted,
        progress::{Watchdog, poll_watched},
    },
};

/// Streams a caller may have open on one HTTP/2 connection.
const MAX_STREAMS: u32 = 200;
/// Resets a caller may provoke or send before its connection is closed (rapid reset, MadeYouReset).
const MAX_RESETS: usize = 64;
const H2_STREAM_WINDOW: u32 = 256 * 1024;
const H2_CONNECTION_WINDOW: u32 = 1024 * 1024;

impl Connection {
    pub(super) async fn serve_http2<S>(self: &Rc<Self>, stream: S) -> Result<(), ConnectionError>
    where
        S: AsyncRead + AsyncWrite + Unpin + 'static,
    {
        self.http2.set(true);
        let this = Rc::clone(self);
        let service = service_fn(move |request| Rc::clone(&this).call(request));
        let blocked = Rc::default();
        let mut connection = pin!(
            http2::Builder::new(StreamExecutor(Rc::clone(self)))
                .timer(TokioTimer::new())
                .max_concurrent_streams(MAX_STREAMS)
                .max_pending_accept_reset_streams(MAX_RESETS)
                .max_local_error_reset_streams(MAX_RESETS)
                .max_header_list_size(MAX_HEAD_BYTES as u32)
                .initial_stream_window_size(H2_STREAM_WINDOW)
                .initial_connection_window_size(H2_CONNECTION_WINDOW)
                .keep_alive_interval(Duration::from_secs(60))
                .keep_alive_timeout(Duration::from_secs(20))
                .serve_connection(TokioIo::new(Noted::new(stream, &blocked)), service)
        );
        let (mut leaving, mut watchdog) = (Leaving::new(self), Watchdog::default());
        let mut closing = pin!(self.closing());
        poll_fn(|cx| {
            if leaving.poll(cx, self, closing.as_mut()) {
                connection.as_mut().graceful_shutdown();
            }
            if let Poll::Ready(cut) = leaving.poll_cut(cx) {
                return Poll::Ready(Err(cut));
            }
            // Streams have tasks, and watches, of their own.
            let look = || (None, self.standstill(blocked.get()).0);
            let served = ready!(poll_watched(cx, &mut watchdog, |cx| connection.as_mut().poll(cx), look));
            let cut = || ConnectionError::Cut(self.standstill(blocked.get()).1);
            Poll::Ready(served.map_or_else(|| Err(cut()), |ended| Ok(ended?)))
        })
        .await
    }

    /// When it is cut unless something moves, and why.
    fn standstill(&self, blocked: Option<Instant>) -> (Option<Instant>, &'static str) {
        match blocked {
            Some(since) => (Some(since + WRITE_STALL), "the caller takes nothing of what is written to it"),
            None if self.streams.get() > 0 => (None, ""),
            None => (Some(self.idle_since.get() + CALLER_IDLE), "idle"),
        }
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
