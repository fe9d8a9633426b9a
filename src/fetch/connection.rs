//! A connection of the proxy's own requests: bytes with or without TLS, and how it ends.
//!
//! The client drops a connection when it has been idle for too long, and when its request is given up. The first is
//! closed, the second is reset: see `Drop` below.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use http::Extensions;
use hyper_util::client::legacy::connect::{CaptureConnection, Connected, Connection};
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::client::TlsStream;

trait ByteStream: AsyncRead + AsyncWrite + Unpin + Send {
    fn tcp(&self) -> &TcpStream;
}

impl ByteStream for TcpStream {
    fn tcp(&self) -> &TcpStream {
        self
    }
}

impl ByteStream for TlsStream<TcpStream> {
    fn tcp(&self) -> &TcpStream {
        self.get_ref().0
    }
}

/// A connection to a server, with or without TLS.
pub struct FetchConnection {
    stream: Box<dyn ByteStream>,
    usage: ConnectionUsage,
    /// Whether the socket did not accept all bytes the last time. A response may end before its request.
    is_write_pending: bool,
}

/// What a connection has been used for. The client attaches it to responses and errors.
#[derive(Clone, Debug, Default)]
pub struct ConnectionUsage(Arc<UsageState>);

#[derive(Debug, Default)]
struct UsageState {
    had_response: AtomicBool,
    /// How many exchanges have begun.
    exchanges: AtomicU64,
    /// The number of the exchange that is not finished; 0 for none.
    unfinished: AtomicU64,
    is_aborted: AtomicBool,
    /// The task that reads and writes the connection.
    task: Mutex<Option<Waker>>,
}

impl ConnectionUsage {
    pub fn record_response(&self) {
        self.0.had_response.store(true, Ordering::Relaxed);
    }

    pub fn had_response(&self) -> bool {
        self.0.had_response.load(Ordering::Relaxed)
    }

    fn abort(&self) {
        self.0.is_aborted.store(true, Ordering::SeqCst);
        let task = self.0.task.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(task) = task {
            task.wake();
        }
    }

    /// Fails once the exchange has been given up. Registered first, then checked: an abort in between wakes the task.
    fn check(&self, cx: &Context<'_>) -> io::Result<()> {
        let mut task = self.0.task.lock().unwrap_or_else(PoisonError::into_inner);
        if !task.as_ref().is_some_and(|known| known.will_wake(cx.waker())) {
            *task = Some(cx.waker().clone());
        }
        drop(task);
        if self.0.is_aborted.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        Ok(())
    }
}

/// A request on a connection, and its response. Dropped before it is finished, it aborts the connection.
///
/// hyper notices by itself that nothing waits for the response, but before it closes it writes what it has buffered of
/// the request: to a server that reads nothing, for ever.
#[derive(Debug)]
pub struct Exchange {
    usage: ConnectionUsage,
    /// Tells it from the next exchange on the connection, which may begin before the end of this one has been read.
    number: u64,
}

impl Exchange {
    fn begin(usage: ConnectionUsage) -> Self {
        let number = usage.0.exchanges.fetch_add(1, Ordering::SeqCst) + 1;
        usage.0.unfinished.store(number, Ordering::SeqCst);
        Self { usage, number }
    }

    /// Begins an exchange when the client has chosen a connection: to be called after each poll of its request. It may
    /// choose another one if the first has been closed in the meantime.
    pub fn track(exchange: &mut Option<Self>, connection: &CaptureConnection) {
        let mut extras = Extensions::new();
        if let Some(connected) = connection.connection_metadata().as_ref() {
            connected.get_extras(&mut extras);
        }
        if let Some(usage) = extras.remove::<ConnectionUsage>()
            && !exchange.as_ref().is_some_and(|known| Arc::ptr_eq(&known.usage.0, &usage.0))
        {
            *exchange = Some(Self::begin(usage));
        }
    }

    /// The response has been read to its end.
    pub fn finish(self) {
        let unfinished = &self.usage.0.unfinished;
        let _ = unfinished.compare_exchange(self.number, 0, Ordering::SeqCst, Ordering::SeqCst);
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if self.usage.0.unfinished.load(Ordering::SeqCst) == self.number {
            self.usage.abort();
        }
    }
}

impl FetchConnection {
    pub fn plain(tcp: TcpStream) -> Self {
        Self::new(Box::new(tcp))
    }

    pub fn tls(stream: TlsStream<TcpStream>) -> Self {
        Self::new(Box::new(stream))
    }

    fn new(stream: Box<dyn ByteStream>) -> Self {
        Self { stream, usage: ConnectionUsage::default(), is_write_pending: false }
    }

    fn noting<T>(&mut self, outcome: Poll<T>) -> Poll<T> {
        self.is_write_pending = outcome.is_pending();
        outcome
    }
}

impl Drop for FetchConnection {
    /// Resets a connection with an unfinished exchange. `close` would leave the bytes that the server has not read to the
    /// kernel (`FIN_WAIT1`): a server that reads nothing keeps them, and the port, for minutes.
    fn drop(&mut self) {
        if self.is_write_pending || self.usage.0.unfinished.load(Ordering::SeqCst) != 0 {
            // If it fails, the kernel closes as usual.
            let _ = SockRef::from(self.stream.tcp()).set_linger(Some(Duration::ZERO));
        }
    }
}

impl Connection for FetchConnection {
    fn connected(&self) -> Connected {
        Connected::new().extra(self.usage.clone())
    }
}

impl AsyncRead for FetchConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.usage.check(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for FetchConnection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.usage.check(cx)?;
        let outcome = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.noting(outcome)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.usage.check(cx)?;
        let outcome = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.noting(outcome)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.usage.check(cx)?;
        let outcome = Pin::new(&mut self.stream).poll_flush(cx);
        self.noting(outcome)
    }

    /// Sends TLS's `close_notify` if the socket accepts it now: a server that has stopped reading must not keep the
    /// connection open.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.usage.check(cx)?;
        let outcome = Pin::new(&mut self.stream).poll_shutdown(cx);
        match self.noting(outcome) {
            Poll::Pending => Poll::Ready(Ok(())),
            finished => finished,
        }
    }
}
