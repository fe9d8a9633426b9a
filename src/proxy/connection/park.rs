//! Idle HTTP/1 connections are taken from hyper, which holds some kilobytes for each, and given back when more comes.

use std::{
    cell::Cell,
    future::{Future, poll_fn},
    pin::Pin,
    task::Poll,
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::Instant,
};

use super::ConnectionError;
use crate::proxy::{io::CallerIo, progress::Watchdog};

/// How long an idle connection stays with hyper: the next request may be near.
pub(super) const WARM_FOR: Duration = Duration::from_secs(1);
/// Idle connections of a worker that stay for that long. With more of them each is rarely used, and is parked at once;
/// else all would hold their kilobytes at one time, and what is freed piecemeal goes back to the system badly.
const MAX_WARM: u32 = 128;

/// Counts a worker's idle connections that hyper still has.
#[derive(Debug, Default)]
pub struct Warm(Cell<u32>);

/// Counts one until it is dropped.
#[derive(Debug)]
pub(super) struct Seat<'a>(&'a Cell<u32>);

impl Warm {
    /// `None`: there are enough of them.
    pub(super) fn sit(&self) -> Option<Seat<'_>> {
        let taken = self.0.get();
        (taken < MAX_WARM).then(|| {
            self.0.set(taken + 1);
            Seat(&self.0)
        })
    }
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get().saturating_sub(1));
    }
}

/// How a connection left hyper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Left {
    Ended,
    /// Nothing is under way, and all is written.
    Idle,
}

/// Waits until the caller says more, holding no buffer for it meanwhile. False: it is over, as the caller left or
/// `leaving` came.
pub(super) async fn parked<S>(
    stream: &mut CallerIo<S>,
    until: Instant,
    mut leaving: Pin<&mut impl Future<Output = ()>>,
    watchdog: &mut Watchdog,
) -> Result<bool, ConnectionError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    poll_fn(|cx| {
        let more = match stream.poll_more(cx)? {
            Poll::Ready(more) => more,
            Poll::Pending if leaving.as_mut().poll(cx).is_ready() => false,
            Poll::Pending => {
                return watchdog.poll_due(cx, Some(until)).map(|()| Err(ConnectionError::Cut("idle")));
            }
        };
        if !more {
            // All else is written, so there is room for the little that TLS has to say.
            let _ = Pin::new(&mut *stream).poll_shutdown(cx)?;
        }
        Poll::Ready(Ok(more))
    })
    .await
}

#[cfg(test)]
mod tests {
    use std::{future::pending, pin::pin, sync::Arc};

    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    use super::*;
    use crate::proxy::{connection::CALLER_IDLE, io::Wire};

    fn connection() -> (DuplexStream, CallerIo<DuplexStream>, Arc<Wire>) {
        let ((caller, stream), wire) = (duplex(10_000), Arc::<Wire>::default());
        (caller, CallerIo::new(stream, bytes::Bytes::new(), Arc::clone(&wire)), wire)
    }

    #[tokio::test(start_paused = true)]
    async fn what_comes_to_a_parked_connection_is_read_once_and_in_order() {
        let (mut caller, mut stream, wire) = connection();
        let sent: Vec<u8> = (0..5000_u32).map(|n| (n % 251) as u8).collect();
        let until = Instant::now() + CALLER_IDLE;
        let asks = async {
            tokio::time::sleep(CALLER_IDLE / 2).await;
            caller.write_all(&sent).await.unwrap();
        };
        let (mut watchdog, leaving) = (Watchdog::default(), pin!(pending()));
        let (more, ()) = tokio::join!(parked(&mut stream, until, leaving, &mut watchdog), asks);
        assert!(more.unwrap());
        assert!(wire.head_begun().is_some(), "its clock runs");
        let mut got = vec![0; sent.len()];
        stream.read_exact(&mut got).await.unwrap();
        assert_eq!(got, sent);
    }

    #[tokio::test(start_paused = true)]
    async fn a_parked_connection_ends_with_its_time_its_caller_or_the_process() {
        let begun = Instant::now();
        let until = begun + CALLER_IDLE;
        let (_caller, mut stream, _) = connection();
        let cut = parked(&mut stream, until, pin!(pending()), &mut Watchdog::default()).await;
        assert!(matches!(cut, Err(ConnectionError::Cut("idle"))));
        assert_eq!(begun.elapsed(), CALLER_IDLE);

        let (caller, mut stream, _) = connection();
        drop(caller);
        assert!(!parked(&mut stream, until, pin!(pending()), &mut Watchdog::default()).await.unwrap());

        let (mut caller, mut stream, _) = connection();
        assert!(!parked(&mut stream, until, pin!(async {}), &mut Watchdog::default()).await.unwrap());
        assert_eq!(caller.read(&mut [0]).await.unwrap(), 0, "the caller is told");
    }

    #[test]
    fn only_so_many_connections_are_kept_warm() {
        let warm = Warm::default();
        let mut seats: Vec<_> = std::iter::from_fn(|| warm.sit()).collect();
        assert_eq!(seats.len(), MAX_WARM as usize);
        seats.pop();
        assert!(warm.sit().is_some());
    }
}
