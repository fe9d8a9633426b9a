//! The state of an HTTP/2 connection as its frames show it, which `h2` does not expose: when bytes were received,
//! which errors were sent, how much of the peer's window is left.

use std::{
    cell::{Cell, RefCell},
    io,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use h2::Reason;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};

use super::{
    frames::{self, FrameHead, FrameScanner},
    pending_requests::PendingRequests,
};

/// The initial connection window (RFC 9113 §6.9.2).
const INITIAL_WINDOW: i64 = 65_535;
/// A header block above this may have a field that `h2` drops silently: a decoded field can be 1.6 times as long as a
/// compressed one. One below cannot, unless what `h2` keeps is above [`crate::http1::framing::MAX_TRAILERS`] as well.
const LARGE_BLOCK: u32 = crate::http1::framing::MAX_HEADER_LIST / 2;
/// How many streams with a fault or a large block are remembered.
const MAX_REMEMBERED: usize = 64;

/// The state of a connection as its frames show it. [`ObservedIo`] writes it, the task that serves the connection
/// reads it.
#[derive(Debug)]
pub struct WireState {
    /// Since when the peer has accepted none of the bytes to be written.
    blocked: Cell<Option<Instant>>,
    /// When bytes were last received; `None` before the first.
    heard: Cell<Option<Instant>>,
    /// HEADERS and DATA frames received.
    messages: Cell<u64>,
    /// The peer has sent GOAWAY.
    going_away: Cell<bool>,
    /// Streams reset here because of a fault of the peer.
    faults: Cell<u32>,
    /// Streams reset here because they were refused, or because of late frames.
    refusals: Cell<u32>,
    /// The remaining send window of the connection.
    window: Cell<i64>,
    /// Since when it is exhausted.
    window_empty: Cell<Option<Instant>>,
    incoming: RefCell<FrameScanner>,
    outgoing: RefCell<FrameScanner>,
    /// Bytes of the last header block received.
    block: Cell<u32>,
    /// Streams with a header block larger than [`LARGE_BLOCK`].
    large_blocks: RefCell<Vec<u32>>,
    /// The last streams reset here because of a fault of the peer.
    faulted: RefCell<Vec<u32>>,
    /// Used for connections of clients only.
    pub pending_requests: PendingRequests,
}

impl WireState {
    fn new(incoming: FrameScanner, outgoing: FrameScanner) -> Rc<Self> {
        Rc::new(Self {
            blocked: Cell::default(),
            heard: Cell::default(),
            messages: Cell::default(),
            going_away: Cell::default(),
            faults: Cell::default(),
            refusals: Cell::default(),
            window: Cell::new(INITIAL_WINDOW),
            window_empty: Cell::default(),
            incoming: RefCell::new(incoming),
            outgoing: RefCell::new(outgoing),
            block: Cell::default(),
            large_blocks: RefCell::default(),
            faulted: RefCell::default(),
            pending_requests: PendingRequests::default(),
        })
    }

    /// For a connection of a client.
    pub fn server() -> Rc<Self> {
        Self::new(FrameScanner::skipping(frames::PREFACE_LENGTH), FrameScanner::default())
    }

    /// For a connection to an endpoint.
    pub fn client() -> Rc<Self> {
        Self::new(FrameScanner::default(), FrameScanner::skipping(frames::PREFACE_LENGTH))
    }

    /// Since when the peer has accepted no bytes; `None` if it does.
    pub fn write_blocked_since(&self) -> Option<Instant> {
        self.blocked.get()
    }

    /// When bytes were last received; `None` before the first.
    pub fn last_received(&self) -> Option<Instant> {
        self.heard.get()
    }

    /// How many HEADERS and DATA frames were received.
    pub fn messages_received(&self) -> u64 {
        self.messages.get()
    }

    /// Whether the peer has sent GOAWAY.
    pub fn is_going_away(&self) -> bool {
        self.going_away.get()
    }

    /// Since when the connection's send window is exhausted; `None` if it is not.
    pub fn window_empty_since(&self) -> Option<Instant> {
        self.window_empty.get()
    }

    /// Returns and resets the count of streams reset for a fault of the peer.
    pub fn take_faults(&self) -> u32 {
        self.faults.take()
    }

    /// Returns and resets the count of refused streams and late frames.
    pub fn take_refusals(&self) -> u32 {
        self.refusals.take()
    }

    fn received(&self, bytes: &[u8]) {
        self.heard.set(Some(Instant::now()));
        self.incoming.borrow_mut().scan(bytes, |frame| match frame.kind {
            frames::DATA => self.messages.set(self.messages.get() + 1),
            frames::HEADERS => {
                self.messages.set(self.messages.get() + 1);
                self.block.set(frame.length);
            }
            frames::CONTINUATION => self.add_continuation(frame),
            frames::WINDOW_UPDATE if frame.stream == 0 => {
                self.add_window(i64::from(frame.value & 0x7fff_ffff))
            }
            frames::GOAWAY => self.going_away.set(true),
            _ => {}
        });
    }

    fn sent(&self, bytes: &[u8]) {
        self.outgoing.borrow_mut().scan(bytes, |frame| match frame.kind {
            frames::DATA => self.add_window(-i64::from(frame.length)),
            frames::RST_STREAM => self.was_reset(frame),
            frames::HEADERS => self.pending_requests.record_response(frame.stream),
            _ => {}
        });
    }

    fn add_continuation(&self, frame: FrameHead) {
        let before = self.block.get();
        let now = before.saturating_add(frame.length);
        self.block.set(now);
        if before <= LARGE_BLOCK && now > LARGE_BLOCK {
            remember(&mut self.large_blocks.borrow_mut(), frame.stream);
        }
    }

    /// Whether a header block of a stream was so large that fields of it may be missing.
    pub fn may_lack_fields(&self, stream: u32) -> bool {
        self.large_blocks.borrow().contains(&stream)
    }

    fn add_window(&self, change: i64) {
        self.window.set(self.window.get().saturating_add(change));
        let empty = (self.window.get() <= 0).then(|| self.window_empty.get().unwrap_or_else(Instant::now));
        self.window_empty.set(empty);
    }

    /// Whether a stream was reset here because of what the peer sent on it.
    pub fn has_peer_fault(&self, stream: u32) -> bool {
        self.faulted.borrow().contains(&stream)
    }

    /// Other codes end a message early without a fault.
    fn was_reset(&self, frame: FrameHead) {
        let reason = Reason::from(frame.value);
        self.pending_requests.record_reset(frame.stream, reason);
        if reason == Reason::PROTOCOL_ERROR {
            remember(&mut self.faulted.borrow_mut(), frame.stream);
        }
        let count = match Reason::from(frame.value) {
            Reason::REFUSED_STREAM | Reason::STREAM_CLOSED => &self.refusals,
            Reason::PROTOCOL_ERROR | Reason::FLOW_CONTROL_ERROR | Reason::FRAME_SIZE_ERROR => &self.faults,
            _ => return,
        };
        count.set(count.get().saturating_add(1));
    }

    fn record_blocked<T>(&self, polled: Poll<T>) -> Poll<T> {
        match &polled {
            Poll::Pending => self.blocked.set(Some(self.blocked.get().unwrap_or_else(Instant::now))),
            Poll::Ready(_) => self.blocked.set(None),
        }
        polled
    }
}

fn remember(streams: &mut Vec<u32>, stream: u32) {
    if streams.len() == MAX_REMEMBERED {
        streams.remove(0);
    }
    streams.push(stream);
}

/// An I/O stream whose frames are recorded in a [`WireState`].
#[derive(Debug)]
pub struct ObservedIo<S> {
    stream: S,
    wire: Rc<WireState>,
}

impl<S> ObservedIo<S> {
    pub fn new(stream: S, wire: &Rc<WireState>) -> Self {
        Self { stream, wire: Rc::clone(wire) }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for ObservedIo<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        if let Some(bytes) = buf.filled().get(before..).filter(|bytes| !bytes.is_empty()) {
            self.wire.received(bytes);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for ObservedIo<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        let count = ready!(self.wire.record_blocked(written))?;
        self.wire.sent(buf.get(..count).unwrap_or(buf));
        Poll::Ready(Ok(count))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        let count = ready!(self.wire.record_blocked(written))?;
        let mut left = count;
        for buf in bufs {
            let part = left.min(buf.len());
            self.wire.sent(buf.get(..part).unwrap_or(buf));
            left -= part;
            if left == 0 {
                break;
            }
        }
        Poll::Ready(Ok(count))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let closed = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.wire.record_blocked(closed)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    fn frame(kind: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        bytes.extend([kind, 0]);
        bytes.extend(stream.to_be_bytes());
        bytes.extend(payload);
        bytes
    }

    #[tokio::test(start_paused = true)]
    async fn the_start_of_a_write_stall_is_recorded() {
        let (mut client, stream) = duplex(10);
        let wire = WireState::server();
        let mut io = ObservedIo::new(stream, &wire);
        io.write_all(&[0; 10]).await.unwrap();
        assert_eq!(wire.write_blocked_since(), None);
        let start = Instant::now();
        let reads = async {
            tokio::time::sleep(Duration::from_secs(7)).await;
            assert_eq!(wire.write_blocked_since(), Some(start));
            client.read_exact(&mut [0; 20]).await
        };
        let (written, read) = tokio::join!(io.write_all(&[0; 10]), reads);
        written.unwrap();
        assert_eq!(read.unwrap(), 20);
        assert_eq!(wire.write_blocked_since(), None);
    }

    /// An early end is no fault, a protocol violation is, and late frames are counted separately.
    #[tokio::test]
    async fn resets_are_counted_by_their_code() {
        let (_client, stream) = duplex(1 << 16);
        let wire = WireState::server();
        let mut io = ObservedIo::new(stream, &wire);
        for (code, times) in [(0_u32, 7), (8, 7), (2, 7), (1, 3), (3, 2), (5, 4), (7, 1)] {
            for _ in 0..times {
                io.write_all(&frame(frames::RST_STREAM, 1, &code.to_be_bytes())).await.unwrap();
            }
        }
        assert_eq!((wire.take_faults(), wire.take_refusals()), (5, 5));
        assert_eq!((wire.take_faults(), wire.take_refusals()), (0, 0));
    }

    #[tokio::test]
    async fn large_header_blocks_are_remembered() {
        let (mut server, stream) = duplex(1 << 21);
        let wire = WireState::client();
        let mut io = ObservedIo::new(stream, &wire);
        let mut sent = Vec::new();
        for (stream, count) in [(1, 20), (3, 40), (5, 1)] {
            sent.extend(frame(frames::HEADERS, stream, &[0; 16_384]));
            for _ in 0..count {
                sent.extend(frame(frames::CONTINUATION, stream, &[0; 16_384]));
            }
        }
        server.write_all(&sent).await.unwrap();
        drop(server);
        io.read_to_end(&mut Vec::new()).await.unwrap();
        assert_eq!([1, 3, 5].map(|stream| wire.may_lack_fields(stream)), [false, true, false]);
    }

    #[tokio::test]
    async fn the_connection_window_is_tracked() {
        let (mut server, stream) = duplex(1 << 20);
        let wire = WireState::client();
        let mut io = ObservedIo::new(stream, &wire);
        io.write_all(&[b'P'; frames::PREFACE_LENGTH as usize]).await.unwrap();
        for _ in 0..4 {
            assert_eq!(wire.window_empty_since(), None);
            io.write_all(&frame(frames::DATA, 1, &[0; 16_384])).await.unwrap();
        }
        assert!(wire.window_empty_since().is_some(), "65,536 of 65,535 bytes are sent");
        server.write_all(&frame(frames::WINDOW_UPDATE, 1, &1000_u32.to_be_bytes())).await.unwrap();
        io.read_exact(&mut [0; 13]).await.unwrap();
        assert!(wire.window_empty_since().is_some(), "that was the window of a stream");
        server.write_all(&frame(frames::WINDOW_UPDATE, 0, &1000_u32.to_be_bytes())).await.unwrap();
        io.read_exact(&mut [0; 13]).await.unwrap();
        assert_eq!(wire.window_empty_since(), None);
    }
}
