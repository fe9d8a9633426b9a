//! The byte streams that connections run on.

use std::{
    collections::VecDeque,
    io,
    mem::MaybeUninit,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use rustix::net::RecvFlags;
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::TcpStream,
    time::Instant,
};

/// A TCP stream that can be looked at while something else owns its reading and writing: the pool asks whether an
/// idle connection is still alive.
#[derive(Clone, Debug)]
pub struct SharedTcp(Arc<TcpStream>);

/// Interim responses held for a caller that does not take them; more are let go.
const MAX_INTERIM: usize = 16;
/// What most requests' heads fit into.
const MOST_OF_A_HEAD: usize = 2048;
/// After this long without traffic the kernel asks whether the peer is still there.
const TCP_KEEP_ALIVE: Duration = Duration::from_secs(60);

impl SharedTcp {
    /// Takes a connected stream: no Nagle delay, keep-alive on.
    pub fn new(stream: TcpStream) -> Self {
        // A socket that refuses an option is still a connection.
        let _ = stream.set_nodelay(true);
        let _ = SockRef::from(&stream).set_tcp_keepalive(&TcpKeepalive::new().with_time(TCP_KEEP_ALIVE));
        Self(Arc::new(stream))
    }

    /// Whether an idle connection can carry another request: not closed, and nothing unasked-for has come. The system
    /// is asked only where it has told that there is something.
    pub fn is_quiet(&self) -> bool {
        let mut byte = [MaybeUninit::uninit()];
        let peeked = self.0.try_io(Interest::READABLE, || SockRef::from(&*self.0).peek(&mut byte));
        matches!(peeked, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// The same for TLS, where new tickets may come unasked. Told by length, as their type is hidden: an alert is the
    /// shortest of records, a ticket a long one.
    pub fn is_quiet_tls(&self) -> bool {
        const SHORTEST: usize = 48;
        let mut bytes = [0_u8; 2048];
        let peeked = self.0.try_io(Interest::READABLE, || {
            Ok(rustix::net::recv(&*self.0, &mut bytes[..], RecvFlags::PEEK | RecvFlags::DONTWAIT)?)
        });
        let count = match peeked {
            Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
            // Gone.
            Ok((_, 0)) => return false,
            Ok((_, count)) => count.min(2048),
        };
        let mut records = &bytes[..count];
        while let [0x17, _, _, high, low, rest @ ..] = records {
            let length = usize::from(*high) << 8 | usize::from(*low);
            if length < SHORTEST {
                return false;
            }
            records = rest.get(length..).unwrap_or_default();
        }
        records.is_empty()
    }

    /// Less came than there was room for: nothing is left to read, and the next edge will tell when there is. Saves the
    /// system call that would say so. (tokio does the same for a stream that is not shared.)
    fn drained(&self) {
        let _ = self.0.try_io(Interest::READABLE, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
    }

    /// Waits until the peer has said something, or left.
    pub async fn readable(&self) -> io::Result<()> {
        self.0.readable().await
    }

    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.0.peer_addr()
    }
}

impl AsyncRead for SharedTcp {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.0.poll_read_ready(cx))?;
            let room = buf.remaining();
            match self.0.try_read_buf(buf) {
                Ok(count) => {
                    if (1..room).contains(&count) {
                        self.drained();
                    }
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl SharedTcp {
    fn poll_try<T>(
        &self,
        cx: &mut Context<'_>,
        mut write: impl FnMut(&TcpStream) -> io::Result<T>,
    ) -> Poll<io::Result<T>> {
        loop {
            ready!(self.0.poll_write_ready(cx))?;
            match write(&self.0) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return Poll::Ready(done),
            }
        }
    }
}

impl AsyncWrite for SharedTcp {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_try(cx, |tcp| tcp.try_write(buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_try(cx, |tcp| tcp.try_write_vectored(bufs))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match SockRef::from(&*self.0).shutdown(std::net::Shutdown::Write) {
            // The peer was faster.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Poll::Ready(Ok(())),
            done => Poll::Ready(done),
        }
    }
}

/// What a caller's connection tells the one who watches it, and takes from it. Shared because an upgraded connection
/// must be `Send`; all of it stays on one worker.
#[derive(Debug)]
pub struct Wire {
    epoch: Instant,
    /// Milliseconds after `epoch`, plus one; 0 = no.
    unanswered_since: AtomicU64,
    write_blocked_since: AtomicU64,
    /// What was written is not with the system yet.
    flushing: AtomicBool,
    /// Whether a shutdown by hyper leaves the stream open.
    kept_open: AtomicBool,
    interim: Mutex<Interim>,
}

/// Interim (1xx) responses of the call under way.
#[derive(Debug, Default)]
struct Interim {
    /// To be written before the final one.
    queue: VecDeque<Bytes>,
    said_continue: bool,
    /// The connection's task.
    waker: Option<Waker>,
}

impl Default for Wire {
    fn default() -> Self {
        Self {
            epoch: Instant::now(),
            unanswered_since: AtomicU64::new(0),
            write_blocked_since: AtomicU64::new(0),
            flushing: AtomicBool::new(false),
            kept_open: AtomicBool::new(false),
            interim: Mutex::default(),
        }
    }
}

impl Wire {
    fn stamp(&self, cell: &AtomicU64) {
        if cell.load(Ordering::Relaxed) == 0 {
            let ms = u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX - 1);
            cell.store(ms + 1, Ordering::Relaxed);
        }
    }

    fn instant(&self, cell: &AtomicU64) -> Option<Instant> {
        let ms = cell.load(Ordering::Relaxed).checked_sub(1)?;
        Some(self.epoch + Duration::from_millis(ms))
    }

    /// When the first byte came that no request has been made of yet.
    pub fn head_begun(&self) -> Option<Instant> {
        self.instant(&self.unanswered_since)
    }

    /// A request was read: what comes next belongs to its body or to the next one.
    pub fn head_read(&self) {
        self.unanswered_since.store(0, Ordering::Relaxed);
    }

    /// A call is over since `at`: what had come until then was its body.
    pub fn call_over(&self, at: Instant) {
        if self.head_begun().is_some_and(|begun| begun <= at) {
            self.head_read();
        }
    }

    /// Since when the peer has taken nothing of what is to be written.
    pub fn write_blocked(&self) -> Option<Instant> {
        self.instant(&self.write_blocked_since)
    }

    /// Whether something that was written is still on its way out.
    pub fn is_flushing(&self) -> bool {
        self.flushing.load(Ordering::Relaxed)
    }

    /// Whether hyper is to end without the stream.
    pub fn keep_open(&self, kept: bool) {
        self.kept_open.store(kept, Ordering::Relaxed);
    }

    fn interim(&self) -> MutexGuard<'_, Interim> {
        self.interim.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues an interim response and wakes the connection's task to write it.
    pub fn push_interim(&self, bytes: Bytes) {
        let mut interim = self.interim();
        if interim.queue.len() < MAX_INTERIM {
            interim.queue.push_back(bytes);
        }
        if let Some(waker) = &interim.waker {
            waker.wake_by_ref();
        }
    }

    /// The upstream said `100 Continue`.
    pub fn said_continue(&self) {
        let mut interim = self.interim();
        interim.said_continue = true;
        if let Some(waker) = &interim.waker {
            waker.wake_by_ref();
        }
    }

    /// Whether the upstream has said `100 Continue`; if not, the task is woken when it does. Asked whenever the call
    /// is polled.
    pub fn poll_continue(&self, cx: &mut Context<'_>) -> bool {
        let mut interim = self.interim();
        if !interim.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            interim.waker = Some(cx.waker().clone());
        }
        std::mem::take(&mut interim.said_continue)
    }
}

/// Writing to a wrapper that looks at what is read alone: to the stream that it has.
macro_rules! writes_pass_through {
    ($wrapper:ident) => {
        impl<S: AsyncWrite + Unpin> AsyncWrite for $wrapper<S> {
            fn poll_write(
                mut self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                buf: &[u8],
            ) -> Poll<io::Result<usize>> {
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
    };
}

/// A stream of which the beginning has been read already.
#[derive(Debug)]
pub struct Prefixed<S> {
    prefix: Bytes,
    stream: S,
}

impl<S> Prefixed<S> {
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
            // What it was cut from is not held any longer.
            self.prefix = Bytes::new();
        }
        Poll::Ready(Ok(()))
    }
}

writes_pass_through!(Prefixed);

/// A caller's connection: bytes that were read to detect the protocol come first again, and interim responses are
/// put between hyper's own writes.
#[derive(Debug)]
pub struct CallerIo<S> {
    stream: S,
    /// Read already.
    prefix: Bytes,
    wire: Arc<Wire>,
    /// Whether hyper has handed over whole messages only, so that something may be put in between.
    between_messages: bool,
}

impl<S> CallerIo<S> {
    pub fn new(stream: S, prefix: Bytes, wire: Arc<Wire>) -> Self {
        if !prefix.is_empty() {
            wire.stamp(&wire.unanswered_since);
        }
        Self { stream, prefix, wire, between_messages: true }
    }

    /// Takes back what was read and not used, to be read again. False: there is nothing to read.
    pub fn unread(&mut self, bytes: Bytes) -> bool {
        if !bytes.is_empty() {
            self.wire.stamp(&self.wire.unanswered_since);
            self.prefix =
                if self.prefix.is_empty() { bytes } else { [&bytes[..], &self.prefix].concat().into() };
        }
        !self.prefix.is_empty()
    }
}

impl<S: AsyncRead + Unpin> CallerIo<S> {
    /// Waits without a buffer; what has come then is read as usual. False: nothing will.
    pub fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        let mut room = [MaybeUninit::uninit(); MOST_OF_A_HEAD];
        let mut read = ReadBuf::uninit(&mut room);
        ready!(Pin::new(&mut *self).poll_read(cx, &mut read))?;
        self.prefix = Bytes::copy_from_slice(read.filled());
        Poll::Ready(Ok(!self.prefix.is_empty()))
    }
}

impl<S: AsyncWrite + Unpin> CallerIo<S> {
    fn poll_interim(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.between_messages {
            return Poll::Ready(Ok(()));
        }
        let queue = &mut self.wire.interim().queue;
        while let Some(bytes) = queue.front_mut() {
            let Poll::Ready(written) = Pin::new(&mut self.stream).poll_write(cx, bytes) else {
                self.wire.stamp(&self.wire.write_blocked_since);
                return Poll::Pending;
            };
            self.wire.write_blocked_since.store(0, Ordering::Relaxed);
            let written = written?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            bytes.advance(written);
            if bytes.is_empty() {
                queue.pop_front();
            }
        }
        Poll::Ready(Ok(()))
    }

    fn wrote(&mut self, result: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match &result {
            Poll::Pending => self.wire.stamp(&self.wire.write_blocked_since),
            Poll::Ready(_) => self.wire.write_blocked_since.store(0, Ordering::Relaxed),
        }
        if result.is_ready() {
            self.between_messages = false;
        }
        result
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for CallerIo<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.prefix.is_empty() {
            let take = self.prefix.len().min(buf.remaining());
            let bytes = self.prefix.split_to(take);
            buf.put_slice(&bytes);
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        let done = Pin::new(&mut self.stream).poll_read(cx, buf);
        if done.is_ready() && buf.filled().len() > before {
            self.wire.stamp(&self.wire.unanswered_since);
        }
        done
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for CallerIo<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_interim(cx))?;
        let result = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.wrote(result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_interim(cx))?;
        let result = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.wrote(result)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // hyper flushes only when all that it had to write is written.
        self.between_messages = true;
        ready!(self.poll_interim(cx))?;
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.wire.flushing.store(flushed.is_pending(), Ordering::Relaxed);
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.wire.kept_open.load(Ordering::Relaxed) {
            return Poll::Ready(Ok(()));
        }
        let closed = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.wire.flushing.store(closed.is_pending(), Ordering::Relaxed);
        if closed.is_pending() {
            self.wire.stamp(&self.wire.write_blocked_since);
        }
        closed
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, BufWriter, duplex};

    use super::*;

    /// TLS takes more than it can write, as a `BufWriter` does.
    #[tokio::test]
    async fn what_is_not_with_the_system_yet_is_known() {
        let (mut caller, stream) = duplex(10);
        let wire = Arc::<Wire>::default();
        let mut io = CallerIo::new(BufWriter::new(stream), Bytes::new(), Arc::clone(&wire));
        io.write_all(&[0; 20]).await.unwrap();
        assert!(wire.write_blocked().is_none() && !wire.is_flushing());
        let (flushed, read) = tokio::join!(biased; io.flush(), async {
            assert!(wire.is_flushing());
            caller.read_exact(&mut [0; 20]).await
        });
        flushed.unwrap();
        assert_eq!(read.unwrap(), 20);
        assert!(!wire.is_flushing());
    }
}
