//! Requests that wait for a stream of one endpoint's connections.

use std::cell::Cell;

use tokio::sync::{Notify, futures::Notified};

/// Who waits. A stream that has become free wakes one of them, which passes the wake on where it cannot use the stream: it
/// may be one of another TLS name, or of a connection whose window uploads have used up.
#[derive(Debug, Default)]
pub(super) struct Waiters {
    notify: Notify,
    waiting: Cell<u32>,
    /// How many more may be woken for the last stream that became free.
    passes: Cell<u32>,
}

/// One who waits, until it is dropped.
#[derive(Debug)]
pub(super) struct Waiter<'a>(&'a Waiters);

impl Waiters {
    pub fn enter(&self) -> Waiter<'_> {
        self.waiting.set(self.waiting.get() + 1);
        Waiter(self)
    }

    /// A stream is free.
    pub fn wake_one(&self) {
        self.passes.set(self.waiting.get());
        self.notify.notify_one();
    }

    /// Something has changed that may be what any of them waits for.
    pub fn wake_all(&self) {
        self.notify.notify_waiters();
    }

    /// Ask for it before looking for a stream, so that nothing is missed.
    pub fn changed(&self) -> Notified<'_> {
        self.notify.notified()
    }
}

impl Waiter<'_> {
    /// It was woken and has found nothing: another may have more luck. Each is woken at most once for a stream.
    pub fn pass_on(&self) {
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
    async fn a_wake_that_cannot_be_used_reaches_each_who_waits_once() {
        let waiters = Waiters::default();
        let mut cx = Context::from_waker(Waker::noop());
        let (first, second, third) = (waiters.enter(), waiters.enter(), waiters.enter());
        let mut changed =
            [Box::pin(waiters.changed()), Box::pin(waiters.changed()), Box::pin(waiters.changed())];
        let mut woken = |at: usize| {
            let is_woken = changed[at].as_mut().poll(&mut cx).is_ready();
            if is_woken {
                changed[at].set(waiters.changed());
                let _ = changed[at].as_mut().poll(&mut cx);
            }
            is_woken
        };
        for at in 0..3 {
            assert!(!woken(at));
        }
        waiters.wake_one();
        assert_eq!([woken(0), woken(1), woken(2)], [true, false, false]);
        first.pass_on();
        assert_eq!([woken(0), woken(1), woken(2)], [false, true, false]);
        second.pass_on();
        assert_eq!([woken(0), woken(1), woken(2)], [false, false, true]);
        third.pass_on();
        assert_eq!([woken(0), woken(1), woken(2)], [false, false, false], "nobody is left");
        drop((second, third));
        waiters.wake_one();
        assert!(woken(0) || woken(1) || woken(2));
        first.pass_on();
        assert!(pin!(waiters.changed()).poll(&mut cx).is_pending(), "it does not wake itself for ever");
    }
}
