//! Relays bytes in both directions: CONNECT, upgrades, and every protocol that is not HTTP.

mod splice;
#[cfg(test)]
mod tests;

use std::{
    any::Any,
    cell::{Cell, RefCell},
    future::poll_fn,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};

use super::detect::{HiddenRequest, RequestWatch};
use crate::{
    http1::read_buffer::with_shared_buffer,
    net::{
        io::{Prefixed, SharedTcp},
        watchdog::Watchdog,
    },
    upstream::stream::UpstreamIo,
};
use splice::Pipe;

/// A direction that has carried this many bytes is moved by `splice`, where both sides are plain TCP (Linux). That
/// copies nothing, but takes two descriptors, and for few bytes more system calls.
const SPLICE_FROM: u64 = 256 * 1024;

/// How a tunnel ended.
#[derive(Debug)]
pub enum TunnelEnd {
    /// Both sides have closed, or one broke; with the bytes in each direction.
    Closed(io::Result<(u64, u64)>),
    Idle,
    /// `max_duration` has elapsed.
    MaxDuration,
    /// The client's bytes could be read as a request, which may not pass unchecked.
    HiddenRequest(HiddenRequest),
}

/// Why a direction ended early.
#[derive(Debug)]
enum FlowError {
    Io(io::Error),
    Request(HiddenRequest),
}

impl From<io::Error> for FlowError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<HiddenRequest> for FlowError {
    fn from(error: HiddenRequest) -> Self {
        Self::Request(error)
    }
}

/// The state that both directions share.
struct RelayState<'a> {
    moved: &'a Cell<Instant>,
    watch: &'a RefCell<RequestWatch>,
}

impl RelayState<'_> {
    fn note_moved(&self) {
        self.moved.set(Instant::now());
    }
}

/// The sender of a direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sender {
    Client,
    Server,
}

/// Relays bytes between the client `a` and the server `b` until both have closed, nothing has moved for `idle`, or
/// `over_at`. Half-closes are forwarded. What `watch` stops does not reach the server; while it watches, the connection
/// to the server ends with a reset, unless the client closes it.
pub async fn relay<A, B>(
    mut a: A,
    mut b: B,
    watch: RequestWatch,
    idle: Option<Duration>,
    over_at: Option<Instant>,
) -> TunnelEnd
where
    A: AsyncRead + AsyncWrite + Unpin + 'static,
    B: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let moved = Cell::new(Instant::now());
    let watch = RefCell::new(watch);
    let noted = RelayState { moved: &moved, watch: &watch };
    let plain_tcp = plain_tcp_of(&a).zip(plain_tcp_of(&b));
    let a_to_b = plain_tcp.as_ref().map(|(a, b)| (a, b));
    let b_to_a = plain_tcp.as_ref().map(|(a, b)| (b, a));
    let (mut to_b, mut to_a) = (Flow::of(Sender::Client), Flow::of(Sender::Server));
    let mut reset_on_close = (!noted.watch.borrow().is_over()).then(|| ResetOnClose::new(&b));
    let mut watchdog = Watchdog::default();
    poll_fn(|cx| {
        let polled =
            (to_b.poll(cx, &mut a, &mut b, a_to_b, &noted), to_a.poll(cx, &mut b, &mut a, b_to_a, &noted));
        if let Some(reset_on_close) = reset_on_close.take_if(|_| noted.watch.borrow().is_over()) {
            reset_on_close.end();
        }
        match polled {
            (Poll::Ready(Err(error)), _) | (_, Poll::Ready(Err(error))) => {
                return Poll::Ready(match error {
                    FlowError::Io(error) => TunnelEnd::Closed(Err(error)),
                    FlowError::Request(error) => TunnelEnd::HiddenRequest(error),
                });
            }
            (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => {
                return Poll::Ready(TunnelEnd::Closed(Ok((to_b.bytes, to_a.bytes))));
            }
            _ => {}
        }
        let idle_at = idle.map(|idle| moved.get() + idle);
        let due = match (idle_at, over_at) {
            (Some(idle), Some(over)) => Some(idle.min(over)),
            (due, None) | (None, due) => due,
        };
        watchdog
            .poll_due(cx, due)
            .map(|()| if due == over_at { TunnelEnd::MaxDuration } else { TunnelEnd::Idle })
    })
    .await
}

/// Makes closing a connection a reset for as long as this lives. Some servers take an orderly end of the stream for the
/// end of a line and of a header: when a watched connection breaks (cut, idle, revoked, even by the death of the
/// process), the part of a request that they have must not become a whole one.
struct ResetOnClose(Option<SharedTcp>);

impl ResetOnClose {
    fn new(stream: &dyn Any) -> Self {
        let tcp = tcp_under(stream);
        if let Some(tcp) = &tcp {
            tcp.set_reset_on_close(true);
        }
        Self(tcp)
    }

    fn end(self) {
        if let Some(tcp) = &self.0 {
            tcp.set_reset_on_close(false);
        }
    }
}

/// One direction.
#[derive(Debug)]
struct Flow {
    sender: Sender,
    /// Bytes that were read and not written yet.
    pending: Bytes,
    bytes: u64,
    mode: FlowMode,
}

#[derive(Debug, Default)]
enum FlowMode {
    /// Through a buffer that the thread's tunnels share: an idle tunnel holds none.
    #[default]
    Copy,
    /// By `splice`.
    Splice(Pipe),
    /// The sender has closed, which has to be forwarded.
    ShutDown,
    Done,
}

impl Flow {
    fn of(sender: Sender) -> Self {
        Self { sender, pending: Bytes::new(), bytes: 0, mode: FlowMode::default() }
    }

    /// Moves what is available. Ready when the sender has closed and the receiver has everything.
    fn poll<A, B>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut A,
        to: &mut B,
        plain_tcp: Option<(&SharedTcp, &SharedTcp)>,
        noted: &RelayState<'_>,
    ) -> Poll<Result<(), FlowError>>
    where
        A: AsyncRead + Unpin,
        B: AsyncWrite + Unpin,
    {
        loop {
            match (&mut self.mode, plain_tcp) {
                (FlowMode::Done, _) => return Poll::Ready(Ok(())),
                (FlowMode::Splice(pipe), Some((from, to))) => {
                    let count = ready!(pipe.poll_splice(cx, from, to))?;
                    noted.note_moved();
                    if count == 0 {
                        self.mode = FlowMode::ShutDown;
                    }
                    self.bytes += count;
                    continue;
                }
                _ => {}
            }
            while !self.pending.is_empty() {
                let count = written(ready!(Pin::new(&mut *to).poll_write(cx, &self.pending))?)?;
                self.pending.advance(count);
                noted.note_moved();
            }
            if let FlowMode::ShutDown = self.mode {
                ready!(Pin::new(&mut *to).poll_shutdown(cx))?;
                self.mode = FlowMode::Done;
                continue;
            }
            let Poll::Ready(count) = self.poll_copy(cx, from, to, noted.watch)? else {
                // TLS may have buffered some of it.
                ready!(Pin::new(&mut *to).poll_flush(cx))?;
                return Poll::Pending;
            };
            noted.note_moved();
            self.bytes += count;
            if count == 0 {
                self.mode = FlowMode::ShutDown;
            } else if self.bytes >= SPLICE_FROM
                && self.pending.is_empty()
                && plain_tcp.is_some()
                && noted.watch.borrow().is_over()
            {
                // Else keep copying.
                self.mode = Pipe::new().map_or(FlowMode::Copy, FlowMode::Splice);
            }
        }
    }

    /// Reads once, and writes what can be written at once. 0: the sender has closed.
    fn poll_copy<A, B>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut A,
        to: &mut B,
        watch: &RefCell<RequestWatch>,
    ) -> Poll<Result<u64, FlowError>>
    where
        A: AsyncRead + Unpin,
        B: AsyncWrite + Unpin,
    {
        with_shared_buffer(|buffer| {
            let mut read = ReadBuf::new(buffer);
            ready!(Pin::new(from).poll_read(cx, &mut read))?;
            let received = read.filled();
            match self.sender {
                Sender::Client if received.is_empty() => watch.borrow_mut().end_client()?,
                Sender::Client => watch.borrow_mut().follow_client(received)?,
                Sender::Server => watch.borrow_mut().follow_server(received),
            }
            let at_once = match received {
                [] => 0,
                received => match Pin::new(to).poll_write(cx, received) {
                    Poll::Ready(count) => written(count?)?,
                    Poll::Pending => 0,
                },
            };
            self.pending = Bytes::copy_from_slice(received.get(at_once..).unwrap_or_default());
            Poll::Ready(Ok(received.len() as u64))
        })
    }
}

fn written(count: usize) -> io::Result<usize> {
    if count == 0 { Err(io::ErrorKind::WriteZero.into()) } else { Ok(count) }
}

/// The TCP stream under a connection to a server.
fn tcp_under(stream: &dyn Any) -> Option<SharedTcp> {
    let prefixed = stream.downcast_ref::<Prefixed<UpstreamIo>>().map(Prefixed::stream);
    prefixed.or_else(|| stream.downcast_ref()).map(|upstream: &UpstreamIo| upstream.tcp().clone())
}

/// The TCP stream of a plaintext connection; `None` for TLS and others.
fn plain_tcp_of(stream: &dyn Any) -> Option<SharedTcp> {
    let plain = |upstream: &UpstreamIo| match upstream {
        UpstreamIo::Plain(tcp) => Some(tcp.clone()),
        UpstreamIo::Tls(_) => None,
    };
    // A prefix has been written before `SPLICE_FROM` bytes have passed.
    if let Some(prefixed) = stream.downcast_ref::<Prefixed<UpstreamIo>>() {
        return plain(prefixed.stream());
    }
    if let Some(upstream) = stream.downcast_ref() {
        return plain(upstream);
    }
    let prefixed = stream.downcast_ref::<Prefixed<SharedTcp>>().map(Prefixed::stream);
    prefixed.or_else(|| stream.downcast_ref()).cloned()
}
