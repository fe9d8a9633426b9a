//! Evicts an idle connection, at any endpoint and worker of the upstream, when `max_connections` is reached and a
//! request needs a new one.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use tokio::sync::{Notify, futures::Notified};

/// How long a request waits for that. Workers react in well below a millisecond unless they are very busy.
pub const EVICTION_TIMEOUT: Duration = Duration::from_millis(100);

/// Notifies the workers of this process that some upstream needs an eviction. They find out which.
static REQUESTED: Notify = Notify::const_new();

/// The eviction requests of an upstream.
#[derive(Debug, Default)]
pub struct Eviction {
    /// Connections to be closed that no worker has claimed yet.
    wanted: AtomicU32,
    waiting: AtomicU32,
    freed: Notify,
}

/// A request for a connection slot, until it is dropped.
#[derive(Debug)]
pub struct EvictionRequest<'a>(&'a Eviction);

/// Completes when some upstream needs an eviction. Call it before checking, so that no notification is lost.
pub fn requested() -> Notified<'static> {
    REQUESTED.notified()
}

impl Eviction {
    /// Requests that a connection be closed.
    pub fn request(&self) -> EvictionRequest<'_> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        self.wanted.fetch_add(1, Ordering::SeqCst);
        REQUESTED.notify_waiters();
        EvictionRequest(self)
    }

    /// Claims the closing of one connection; `false` if none is requested. Only for callers that have one to close.
    pub fn claim(&self) -> bool {
        self.is_requested() && decrement(&self.wanted)
    }

    /// Costs one atomic load.
    pub fn is_requested(&self) -> bool {
        self.wanted.load(Ordering::SeqCst) > 0
    }

    /// Notifies the waiting requests that a connection has ended.
    pub fn notify_slot_freed(&self) {
        if self.waiting.load(Ordering::SeqCst) > 0 {
            self.freed.notify_waiters();
        }
    }
}

impl EvictionRequest<'_> {
    /// Completes when a slot may be free. Call it before checking.
    pub fn slot_freed(&self) -> Notified<'_> {
        self.0.freed.notified()
    }

    /// Another request took the freed slot: one more connection must be closed, unless there is already one for each
    /// waiting request.
    pub fn request_another(&self) {
        let waiting = self.0.waiting.load(Ordering::SeqCst);
        let more = |wanted| (wanted < waiting).then_some(wanted + 1);
        if self.0.wanted.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more).is_ok() {
            REQUESTED.notify_waiters();
        }
    }
}

impl Drop for EvictionRequest<'_> {
    fn drop(&mut self) {
        // Evictions that no worker could make are not needed any more.
        if self.0.waiting.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.wanted.store(0, Ordering::SeqCst);
        }
    }
}

fn decrement(count: &AtomicU32) -> bool {
    count.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |count| count.checked_sub(1)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_connection_is_closed_for_each_waiting_request() {
        let eviction = Eviction::default();
        assert!(!eviction.claim(), "none is requested");
        let (one, two) = (eviction.request(), eviction.request());
        assert!(eviction.claim() && eviction.claim() && !eviction.claim());
        one.request_another();
        assert!(eviction.claim(), "another request took the slot");
        for _ in 0..5 {
            two.request_another();
        }
        assert!(
            eviction.claim() && eviction.claim() && !eviction.claim(),
            "no more than there are waiting requests"
        );
        drop((one, two));
        let three = eviction.request();
        assert!(eviction.is_requested());
        drop(three);
        assert!(!eviction.claim(), "a dropped request needs no eviction");
    }
}
