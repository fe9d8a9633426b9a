//! Requests that wait for a stream on one endpoint's connections.

use std::cell::Cell;

use tokio::sync::{Notify, futures::Notified};

/// The waiting requests. A freed stream notifies one of them, which passes the notification on if it cannot use the
/// stream: it may be of another TLS name, or of a connection whose send window is exhausted.
#[derive(Debug, Default)]
pub(super) struct Waiters {
    notify: Notify,
    waiting: Cell<u32>,
    /// How many more may be notified of the last freed stream.
    passes: Cell<u32>,
}

/// A waiting request, until it is dropped.
#[derive(Debug)]
pub(super) struct Waiter<'a>(&'a Waiters);

impl Waiters {
    pub fn register(&self) -> Waiter<'_> {
        self.waiting.set(self.waiting.get() + 1);
        Waiter(self)
    }

    /// A stream was freed.
    pub fn notify_one(&self) {
        self.passes.set(self.waiting.get());
        self.notify.notify_one();
    }

    /// Something has changed that may serve any waiting request.
    pub fn notify_all(&self) {
        self.notify.notify_waiters();
    }

    /// Call it before checking for a stream, so that no notification is lost.
    pub fn notified(&self) -> Notified<'_> {
        self.notify.notified()
    }
}

impl Waiter<'_> {
    /// The notification was of no use here: pass it on. Each request is notified at most once per freed stream.
    pub fn notify_next(&self) {
        let waiters = self.0;
        if let Some(passes) = waiters.passes.get().checked_sub(1) {
            waiters.passes.set(passes);
            if passes > 0 {
                waiters.notify.notify_one();
            }
        }
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.0.waiting.set(self.0.waiting.get().saturating_sub(1));
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::Future,
        pin::pin,
        task::{Context, Waker},
    };

    use super::*;

    #[tokio::test]
    async fn an_unused_notification_reaches_each_waiting_request_once() {
        let waiters = Waiters::default();
        let mut cx = Context::from_waker(Waker::noop());
        let (first, second, third) = (waiters.register(), waiters.register(), waiters.register());
        let mut changed =
            [Box::pin(waiters.notified()), Box::pin(waiters.notified()), Box::pin(waiters.notified())];
        let mut notified = |at: usize| {
            let is_ready = changed[at].as_mut().poll(&mut cx).is_ready();
            if is_ready {
                changed[at].set(waiters.notified());
                let _ = changed[at].as_mut().poll(&mut cx);
            }
            is_ready
        };
        for at in 0..3 {
            assert!(!notified(at));
        }
        waiters.notify_one();
        assert_eq!([notified(0), notified(1), notified(2)], [true, false, false]);
        first.notify_next();
        assert_eq!([notified(0), notified(1), notified(2)], [false, true, false]);
        second.notify_next();
        assert_eq!([notified(0), notified(1), notified(2)], [false, false, true]);
        third.notify_next();
        assert_eq!([notified(0), notified(1), notified(2)], [false, false, false], "none is left");
        drop((second, third));
        waiters.notify_one();
        assert!(notified(0) || notified(1) || notified(2));
        first.notify_next();
        assert!(pin!(waiters.notified()).poll(&mut cx).is_pending(), "it does not notify itself forever");
    }
}
