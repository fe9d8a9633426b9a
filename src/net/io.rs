//! The byte streams that connections run on.

use std::{
    fmt, io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use rustix::net::{RecvFlags, recv};
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::TcpStream,
};

use crate::platform;

/// A TCP stream that can be inspected while something else owns its reading and writing: the pool checks whether an
/// idle connection is still alive.
#[derive(Clone, Debug)]
pub struct SharedTcp(Arc<TcpStream>);

/// After this long without traffic the kernel sends TCP keep-alive probes.
const TCP_KEEP_ALIVE: Duration = Duration::from_secs(60);

impl SharedTcp {
    /// Takes a connected stream: no Nagle delay, keep-alive on.
    pub fn new(stream: TcpStream) -> Self {
        // A socket without these options still works.
        let _ = stream.set_nodelay(true);
        let _ = SockRef::from(&stream).set_tcp_keepalive(&TcpKeepalive::new().with_time(TCP_KEEP_ALIVE));
        Self(Arc::new(stream))
    }

    /// Bounds how long sent bytes may stay unacknowledged (RFC 5482). `None`: the kernel's default.
    pub fn set_user_timeout(&self, limit: Option<Duration>) {
        let _ = platform::set_user_timeout(&SockRef::from(&*self.0), limit);
    }

    /// Sets whether closing this stream resets the connection; a shutdown still ends it in an orderly way.
    pub fn set_reset_on_close(&self, resets: bool) {
        let _ = SockRef::from(&*self.0).set_linger(resets.then_some(Duration::ZERO));
    }

    /// Copies the first unread bytes without consuming them and returns their number; 0: the peer has closed.
    ///
    /// # Errors
    ///
    /// `WouldBlock` where nothing has arrived; any other error means that the connection is broken.
    pub fn peek_now(&self, into: &mut [u8]) -> io::Result<usize> {
        self.receive_now(into, RecvFlags::PEEK)
    }

    /// Reads what has arrived, as [`io::Read`] on a non-blocking socket.
    pub const fn reader_now(&self) -> ReaderNow<'_> {
        ReaderNow(self)
    }

    /// Receives from the kernel, past tokio's cached readiness, which is that of the worker's last epoll: bytes that
    /// have arrived since would be overlooked. No wake-up is lost by that: epoll is edge-triggered and reports bytes
    /// that arrive later whether or not those before them were read.
    fn receive_now(&self, into: &mut [u8], flags: RecvFlags) -> io::Result<usize> {
        Ok(recv(&*self.0, into, flags | RecvFlags::DONTWAIT)?.0)
    }

    /// Clears tokio's readiness after a read that did not fill the buffer: nothing is left, and the next edge reports
    /// more. Saves the system call that would return `WouldBlock`. (tokio does the same for a stream that is not
    /// shared.)
    fn clear_readiness(&self) {
        let _ = self.0.try_io(Interest::READABLE, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
    }

    /// Calls `read` as soon as there is something to read.
    pub fn poll_reading<T>(
        &self,
        cx: &mut Context<'_>,
        mut read: impl FnMut(&TcpStream) -> io::Result<T>,
    ) -> Poll<io::Result<T>> {
        self.poll_until_ready(
            |tcp| tcp.poll_read_ready(cx),
            |tcp| tcp.try_io(Interest::READABLE, || read(tcp)),
        )
    }

    /// Calls `write` as soon as the socket's buffer has space.
    pub fn poll_writing<T>(
        &self,
        cx: &mut Context<'_>,
        mut write: impl FnMut(&TcpStream) -> io::Result<T>,
    ) -> Poll<io::Result<T>> {
        self.poll_until_ready(
            |tcp| tcp.poll_write_ready(cx),
            |tcp| tcp.try_io(Interest::WRITABLE, || write(tcp)),
        )
    }

    /// Calls `attempt` whenever the stream may be ready, until it does not block. `attempt` goes through tokio's
    /// `try_…` functions, which clear the readiness where it does.
    fn poll_until_ready<T>(
        &self,
        mut may_be_ready: impl FnMut(&TcpStream) -> Poll<io::Result<()>>,
        mut attempt: impl FnMut(&TcpStream) -> io::Result<T>,
    ) -> Poll<io::Result<T>> {
        loop {
            ready!(may_be_ready(&self.0))?;
            match attempt(&self.0) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return Poll::Ready(done),
            }
        }
    }

    /// Waits until the peer has sent something or closed.
    pub async fn readable(&self) -> io::Result<()> {
        self.0.readable().await
    }

    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.0.peer_addr()
    }
}

/// See [`SharedTcp::reader_now`].
#[derive(Debug)]
pub struct ReaderNow<'a>(&'a SharedTcp);

impl io::Read for ReaderNow<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.0.receive_now(into, RecvFlags::empty())
    }
}

impl AsyncRead for SharedTcp {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let space = buf.remaining();
        let count =
            ready!(self.poll_until_ready(|tcp| tcp.poll_read_ready(cx), |tcp| tcp.try_read_buf(buf)))?;
        if (1..space).contains(&count) {
            self.clear_readiness();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for SharedTcp {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_until_ready(|tcp| tcp.poll_write_ready(cx), |tcp| tcp.try_write(buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_until_ready(|tcp| tcp.poll_write_ready(cx), |tcp| tcp.try_write_vectored(bufs))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match SockRef::from(&*self.0).shutdown(std::net::Shutdown::Write) {
            // The peer has already closed.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Poll::Ready(Ok(())),
            done => Poll::Ready(done),
        }
    }
}

/// A byte stream over any transport.
pub trait Io: AsyncRead + AsyncWrite + Unpin {}

impl<S: AsyncRead + AsyncWrite + Unpin> Io for S {}

impl fmt::Debug for dyn Io {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Io")
    }
}

/// A stream whose first bytes have been read already.
#[derive(Debug)]
pub struct Prefixed<S> {
    prefix: Bytes,
    stream: S,
}

impl<S> Prefixed<S> {
    pub const fn stream(&self) -> &S {
        &self.stream
    }

    pub fn new(prefix: Bytes, stream: S) -> Self {
        Self { prefix, stream }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Prefixed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.prefix.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buf);
        }
        let take = self.prefix.len().min(buf.remaining());
        buf.put_slice(&self.prefix.split_to(take));
        if self.prefix.is_empty() {
            // Release the buffer that it was a slice of.
            self.prefix = Bytes::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Prefixed<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
