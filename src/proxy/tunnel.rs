//! Bytes both ways: CONNECT, upgrades, and every protocol that is not HTTP.

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

use super::detect::{ReadsAsRequest, RequestWatch};
use crate::{
    http1::intake::with_room,
    net::{
        io::{Prefixed, SharedTcp},
        watchdog::Watchdog,
    },
    upstream::stream::UpstreamIo,
};
use splice::Pipe;

/// A direction that has carried this much is left to the system, where that can do it alone: it copies nothing then,
/// but for little it takes more calls and two descriptors.
const BULK: u64 = 256 * 1024;

/// How a tunnel ended.
#[derive(Debug)]
pub enum End {
    /// Both sides had said all, or one broke.
    Closed(io::Result<(u64, u64)>),
    Idle,
    /// Cut by `max_duration`.
    Over,
    /// The client's bytes could be read as a request, which had to be looked at as one.
    Request(ReadsAsRequest),
}

/// Why a direction ended early.
#[derive(Debug)]
enum Broken {
    Io(io::Error),
    Request(ReadsAsRequest),
}

impl From<io::Error> for Broken {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<ReadsAsRequest> for Broken {
    fn from(error: ReadsAsRequest) -> Self {
        Self::Request(error)
    }
}

/// What both directions note.
struct Noted<'a> {
    moved: &'a Cell<Instant>,
    watch: &'a RefCell<RequestWatch>,
}

impl Noted<'_> {
    fn moves(&self) {
        self.moved.set(Instant::now());
    }
}

/// Who sends what a direction carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sender {
    Client,
    Server,
}

/// Carries bytes between the client `a` and the server `b` until both sides are done, nothing has moved for `idle`, or
/// `over_at`. A side that has said all is passed on as such; the other may go on speaking. What `watch` stops does not
/// reach the server; while it watches, the connection to the server ends by a reset, unless the client ends it.
pub async fn relay<A, B>(
    mut a: A,
    mut b: B,
    watch: RequestWatch,
    idle: Option<Duration>,
    over_at: Option<Instant>,
) -> End
where
    A: AsyncRead + AsyncWrite + Unpin + 'static,
    B: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let moved = Cell::new(Instant::now());
    let watch = RefCell::new(watch);
    let noted = Noted { moved: &moved, watch: &watch };
    let bare = bare_tcp(&a).zip(bare_tcp(&b));
    let there = bare.as_ref().map(|(a, b)| (a, b));
    let back = bare.as_ref().map(|(a, b)| (b, a));
    let (mut to_b, mut to_a) = (Flow::of(Sender::Client), Flow::of(Sender::Server));
    let mut resets = (!noted.watch.borrow().is_over()).then(|| ResetOnClose::new(&b));
    let mut watchdog = Watchdog::default();
    poll_fn(|cx| {
        let said =
            (to_b.poll(cx, &mut a, &mut b, there, &noted), to_a.poll(cx, &mut b, &mut a, back, &noted));
        if let Some(resets) = resets.take_if(|_| noted.watch.borrow().is_over()) {
            resets.end();
        }
        match said {
            (Poll::Ready(Err(broken)), _) | (_, Poll::Ready(Err(broken))) => {
                return Poll::Ready(match broken {
                    Broken::Io(error) => End::Closed(Err(error)),
                    Broken::Request(error) => End::Request(error),
                });
            }
            (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => {
                return Poll::Ready(End::Closed(Ok((to_b.carried, to_a.carried))));
            }
            _ => {}
        }
        let idle_at = idle.map(|idle| moved.get() + idle);
        let due = match (idle_at, over_at) {
            (Some(idle), Some(over)) => Some(idle.min(over)),
            (due, None) | (None, due) => due,
        };
        watchdog.poll_due(cx, due).map(|()| if due == over_at { End::Over } else { End::Idle })
    })
    .await
}

/// Makes the end of a connection a reset for as long as this lives. Some servers take an orderly end for that of a line
/// and of a header: when a watched connection breaks (cut, idle, revoked, even by the death of the process), what they
/// have got of a request must not become a whole one.
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
    /// Was read and not written yet.
    kept: Bytes,
    carried: u64,
    carries: Carries,
}

#[derive(Debug, Default)]
enum Carries {
    /// By room that the thread's tunnels share: one that waits holds none.
    #[default]
    Copies,
    /// By the system.
    Pipe(Pipe),
    /// The one side has said all, and the other is to be told.
    End,
    Nothing,
}

impl Flow {
    fn of(sender: Sender) -> Self {
        Self { sender, kept: Bytes::new(), carried: 0, carries: Carries::default() }
    }

    /// Carries what there is. Ready when one side has said all and the other has it.
    fn poll<A, B>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut A,
        to: &mut B,
        bare: Option<(&SharedTcp, &SharedTcp)>,
        noted: &Noted<'_>,
    ) -> Poll<Result<(), Broken>>
    where
        A: AsyncRead + Unpin,
        B: AsyncWrite + Unpin,
    {
        loop {
            match (&mut self.carries, bare) {
                (Carries::Nothing, _) => return Poll::Ready(Ok(())),
                (Carries::Pipe(pipe), Some((from, to))) => {
                    let count = ready!(pipe.poll_carry(cx, from, to))?;
                    noted.moves();
                    if count == 0 {
                        self.carries = Carries::End;
                    }
                    self.carried += count;
                    continue;
                }
                _ => {}
            }
            while !self.kept.is_empty() {
                let count = written(ready!(Pin::new(&mut *to).poll_write(cx, &self.kept))?)?;
                self.kept.advance(count);
                noted.moves();
            }
            if let Carries::End = self.carries {
                ready!(Pin::new(&mut *to).poll_shutdown(cx))?;
                self.carries = Carries::Nothing;
                continue;
            }
            let Poll::Ready(count) = self.poll_copy(cx, from, to, noted.watch)? else {
                // TLS may hold some of it back, for more.
                ready!(Pin::new(&mut *to).poll_flush(cx))?;
                return Poll::Pending;
            };
            noted.moves();
            self.carried += count;
            if count == 0 {
                self.carries = Carries::End;
            } else if self.carried >= BULK
                && self.kept.is_empty()
                && bare.is_some()
                && noted.watch.borrow().is_over()
            {
                // Without descriptors left it goes on as it is.
                self.carries = Pipe::new().map_or(Carries::Copies, Carries::Pipe);
            }
        }
    }

    /// Reads, and writes of it what can be written at once. 0: nothing comes any more.
    fn poll_copy<A, B>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut A,
        to: &mut B,
        watch: &RefCell<RequestWatch>,
    ) -> Poll<Result<u64, Broken>>
    where
        A: AsyncRead + Unpin,
        B: AsyncWrite + Unpin,
    {
        with_room(|room| {
            let mut read = ReadBuf::new(room);
            ready!(Pin::new(from).poll_read(cx, &mut read))?;
            let came = read.filled();
            match self.sender {
                Sender::Client if came.is_empty() => watch.borrow_mut().client_ends()?,
                Sender::Client => watch.borrow_mut().client_sends(came)?,
                Sender::Server => watch.borrow_mut().server_answers(came),
            }
            let at_once = match came {
                [] => 0,
                came => match Pin::new(to).poll_write(cx, came) {
                    Poll::Ready(count) => written(count?)?,
                    Poll::Pending => 0,
                },
            };
            self.kept = Bytes::copy_from_slice(came.get(at_once..).unwrap_or_default());
            Poll::Ready(Ok(came.len() as u64))
        })
    }
}

fn written(count: usize) -> io::Result<usize> {
    if count == 0 { Err(io::ErrorKind::WriteZero.into()) } else { Ok(count) }
}

/// The TCP stream that a connection to a server runs over.
fn tcp_under(stream: &dyn Any) -> Option<SharedTcp> {
    let prefixed = stream.downcast_ref::<Prefixed<UpstreamIo>>().map(Prefixed::stream);
    prefixed.or_else(|| stream.downcast_ref()).map(|upstream: &UpstreamIo| upstream.tcp().clone())
}

/// The TCP stream that this is, where it is nothing else.
fn bare_tcp(stream: &dyn Any) -> Option<SharedTcp> {
    let plain = |upstream: &UpstreamIo| match upstream {
        UpstreamIo::Plain(tcp) => Some(tcp.clone()),
        UpstreamIo::Tls(_) => None,
    };
    // What is put before a stream has gone before there is much.
    if let Some(prefixed) = stream.downcast_ref::<Prefixed<UpstreamIo>>() {
        return plain(prefixed.stream());
    }
    if let Some(upstream) = stream.downcast_ref() {
        return plain(upstream);
    }
    let prefixed = stream.downcast_ref::<Prefixed<SharedTcp>>().map(Prefixed::stream);
    prefixed.or_else(|| stream.downcast_ref()).cloned()
}
