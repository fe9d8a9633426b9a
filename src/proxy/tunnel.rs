//! Bytes both ways: CONNECT, upgrades, and every protocol that is not HTTP.

mod splice;
#[cfg(test)]
mod tests;

use std::{
    any::Any,
    cell::Cell,
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

use super::{
    io::{Prefixed, SharedTcp},
    progress::Watchdog,
};
use crate::{http1::intake::with_room, upstream::stream::UpstreamIo};
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
}

/// Carries bytes both ways until both sides are done, nothing has moved for `idle`, or `over_at`. A side that has
/// said all is passed on as such; the other may go on speaking.
pub async fn relay<A, B>(mut a: A, mut b: B, idle: Option<Duration>, over_at: Option<Instant>) -> End
where
    A: AsyncRead + AsyncWrite + Unpin + 'static,
    B: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let moved = Cell::new(Instant::now());
    let bare = bare_tcp(&a).zip(bare_tcp(&b));
    let there = bare.as_ref().map(|(a, b)| (a, b));
    let back = bare.as_ref().map(|(a, b)| (b, a));
    let (mut to_b, mut to_a) = (Flow::default(), Flow::default());
    let mut watchdog = Watchdog::default();
    poll_fn(|cx| {
        let said =
            (to_b.poll(cx, &mut a, &mut b, there, &moved), to_a.poll(cx, &mut b, &mut a, back, &moved));
        match said {
            (Poll::Ready(Err(error)), _) | (_, Poll::Ready(Err(error))) => {
                return Poll::Ready(End::Closed(Err(error)));
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

/// One direction.
#[derive(Debug, Default)]
struct Flow {
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
    /// Carries what there is. Ready when one side has said all and the other has it.
    fn poll<A, B>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut A,
        to: &mut B,
        bare: Option<(&SharedTcp, &SharedTcp)>,
        moved: &Cell<Instant>,
    ) -> Poll<io::Result<()>>
    where
        A: AsyncRead + Unpin,
        B: AsyncWrite + Unpin,
    {
        loop {
            match (&mut self.carries, bare) {
                (Carries::Nothing, _) => return Poll::Ready(Ok(())),
                (Carries::Pipe(pipe), Some((from, to))) => {
                    let count = ready!(pipe.poll_carry(cx, from, to))?;
                    moved.set(Instant::now());
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
                moved.set(Instant::now());
            }
            if let Carries::End = self.carries {
                ready!(Pin::new(&mut *to).poll_shutdown(cx))?;
                self.carries = Carries::Nothing;
                continue;
            }
            let Poll::Ready(count) = self.poll_copy(cx, from, to)? else {
                // TLS may hold some of it back, for more.
                ready!(Pin::new(&mut *to).poll_flush(cx))?;
                return Poll::Pending;
            };
            moved.set(Instant::now());
            self.carried += count;
            if count == 0 {
                self.carries = Carries::End;
            } else if self.carried >= BULK && self.kept.is_empty() && bare.is_some() {
                // Without descriptors left it goes on as it is.
                self.carries = Pipe::new().map_or(Carries::Copies, Carries::Pipe);
            }
        }
    }

    /// Reads, and writes of it what can be written at once. 0: nothing comes any more.
    fn poll_copy<A, B>(&mut self, cx: &mut Context<'_>, from: &mut A, to: &mut B) -> Poll<io::Result<u64>>
    where
        A: AsyncRead + Unpin,
        B: AsyncWrite + Unpin,
    {
        with_room(|room| {
            let mut read = ReadBuf::new(room);
            ready!(Pin::new(from).poll_read(cx, &mut read))?;
            let came = read.filled();
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

/// The TCP stream that this is, where it is nothing else.
fn bare_tcp(stream: &dyn Any) -> Option<SharedTcp> {
    if let Some(UpstreamIo::Plain(tcp)) = stream.downcast_ref() {
        return Some(tcp.clone());
    }
    // What comes first there has gone before there is much.
    let prefixed = stream.downcast_ref::<Prefixed<SharedTcp>>().map(Prefixed::stream);
    prefixed.or_else(|| stream.downcast_ref()).cloned()
}
