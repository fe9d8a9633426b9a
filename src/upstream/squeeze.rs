//! Room for one more connection where `max_connections` is reached: one that lies idle is closed for it, at whichever
//! endpoint and worker it lies.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use tokio::sync::{Notify, futures::Notified};

/// How long a call waits for that. Workers answer in well below a millisecond unless they are very busy.
pub const PATIENCE: Duration = Duration::from_millis(100);

/// Tells the workers of this process that somebody wants room. They look where.
static WANTED: Notify = Notify::const_new();

/// Who wants room at an upstream, and whether there is some.
#[derive(Debug, Default)]
pub struct Squeeze {
    /// Connections to be closed, for which nobody has closed one yet.
    wanted: AtomicU32,
    waiting: AtomicU32,
    freed: Notify,
}

/// Somebody who wants room, until it is dropped.
#[derive(Debug)]
pub struct Want<'a>(&'a Squeeze);

/// Ends when somebody wants room at some upstream. Ask for it before looking, so that nobody is missed.
pub fn wanted() -> Notified<'static> {
    WANTED.notified()
}

impl Squeeze {
    /// Asks for room.
    pub fn want(&self) -> Want<'_> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        self.wanted.fetch_add(1, Ordering::SeqCst);
        WANTED.notify_waiters();
        Want(self)
    }

    /// Takes it upon oneself to close a connection; false where none is wanted. Only for who has one to close.
    pub fn claim(&self) -> bool {
        self.is_wanted() && less(&self.wanted)
    }

    /// One load.
    pub fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::SeqCst) > 0
    }

    /// Tells that a connection has ended.
    pub fn freed(&self) {
        if self.waiting.load(Ordering::SeqCst) > 0 {
            self.freed.notify_waiters();
        }
    }
}

impl Want<'_> {
    /// Ends when there may be room. Ask for it before looking.
    pub fn freed(&self) -> Notified<'_> {
        self.0.freed.notified()
    }

    /// Somebody else took what was freed: another is to be closed, unless one is for each that waits.
    pub fn again(&self) {
        let waiting = self.0.waiting.load(Ordering::SeqCst);
        let more = |wanted| (wanted < waiting).then_some(wanted + 1);
        if self.0.wanted.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more).is_ok() {
            WANTED.notify_waiters();
        }
    }
}

impl Drop for Want<'_> {
    fn drop(&mut self) {
        // What nobody could close need not be closed any more.
        if self.0.waiting.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.wanted.store(0, Ordering::SeqCst);
        }
    }
}

fn less(count: &AtomicU32) -> bool {
    count.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |count| count.checked_sub(1)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_connection_is_closed_for_each_that_wants_room() {
        let squeeze = Squeeze::default();
        assert!(!squeeze.claim(), "nobody wants any");
        let (one, two) = (squeeze.want(), squeeze.want());
        assert!(squeeze.claim() && squeeze.claim() && !squeeze.claim());
        one.again();
        assert!(squeeze.claim(), "somebody was quicker than the one that it was closed for");
        for _ in 0..5 {
            two.again();
        }
        assert!(squeeze.claim() && squeeze.claim() && !squeeze.claim(), "no more than wait");
        drop((one, two));
        let three = squeeze.want();
        assert!(squeeze.is_wanted());
        drop(three);
        assert!(!squeeze.claim(), "who has left wants nothing");
    }
}
