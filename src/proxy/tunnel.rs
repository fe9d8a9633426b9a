//! Bytes both ways: CONNECT, upgrades, and every protocol that is not HTTP.

use std::{
    cell::Cell,
    future::poll_fn,
    io,
    pin::{Pin, pin},
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf, copy_bidirectional_with_sizes},
    time::Instant,
};

use super::progress::Watchdog;

const BUFFER: usize = 16 * 1024;

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
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let moved = Cell::new(Instant::now());
    let (mut a, mut b) =
        (Watched { stream: &mut a, moved: &moved }, Watched { stream: &mut b, moved: &moved });
    let mut copy = pin!(copy_bidirectional_with_sizes(&mut a, &mut b, BUFFER, BUFFER));
    let mut watchdog = Watchdog::default();
    poll_fn(|cx| {
        if let Poll::Ready(result) = copy.as_mut().poll(cx) {
            return Poll::Ready(End::Closed(result));
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

/// Notes when bytes move.
struct Watched<'a, S> {
    stream: &'a mut S,
    moved: &'a Cell<Instant>,
}

impl<S> Watched<'_, S> {
    fn note<T>(&self, result: Poll<T>) -> Poll<T> {
        if result.is_ready() {
            self.moved.set(Instant::now());
        }
        result
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<'_, S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut *self.stream).poll_read(cx, buf);
        self.note(result)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<'_, S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut *self.stream).poll_write(cx, buf);
        self.note(result)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_quiet_tunnel_ends_and_a_busy_one_does_not() {
        let (mut left, a) = duplex(64);
        let (b, mut right) = duplex(64);
        let relay = relay(a, b, Some(Duration::from_secs(10)), None);
        let talk = async {
            for _ in 0..5 {
                tokio::time::sleep(Duration::from_secs(8)).await;
                left.write_all(b"x").await.unwrap();
                let mut byte = [0];
                right.read_exact(&mut byte).await.unwrap();
            }
            Instant::now()
        };
        let (end, last) = tokio::join!(relay, talk);
        assert!(matches!(end, End::Idle));
        assert_eq!(last.elapsed().as_secs(), 10);
    }

    #[tokio::test]
    async fn half_a_close_is_passed_on() {
        let (mut left, a) = duplex(64);
        let (b, mut right) = duplex(64);
        let relay = relay(a, b, None, None);
        let talk = async {
            left.write_all(b"question").await.unwrap();
            left.shutdown().await.unwrap();
            let mut text = String::new();
            right.read_to_string(&mut text).await.unwrap();
            right.write_all(b"answer").await.unwrap();
            drop(right);
            let mut answer = String::new();
            left.read_to_string(&mut answer).await.unwrap();
            (text, answer)
        };
        let (end, said) = tokio::join!(relay, talk);
        assert_eq!(said, ("question".to_owned(), "answer".to_owned()));
        assert!(matches!(end, End::Closed(Ok((8, 6)))));
    }
}
