//! Slots for connections. If none is free, the connection with the longest time since its last request is evicted,
//! after a grace period. So clients cannot block others by holding connections open, and an API server, which opens
//! one for each concurrent request, is not rejected.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

/// How long a connection may be without a complete request before it can be evicted.
const GRACE: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub struct ConnectionSlots {
    state: Mutex<SlotState>,
    freed: Notify,
}

impl ConnectionSlots {
    pub fn new(limit: usize) -> Self {
        Self { state: Mutex::new(SlotState { limit, taken: HashMap::new(), next: 0 }), freed: Notify::new() }
    }

    /// Waits for a free slot.
    pub async fn acquire(self: &Arc<Self>) -> ConnectionSlot {
        loop {
            let freed = self.freed.notified();
            let result = self.state().enter(Instant::now());
            match result {
                Ok((number, evicted)) => return ConnectionSlot { slots: Arc::clone(self), number, evicted },
                Err(until) => tokio::select! {
                    () = freed => {}
                    () = sleep_until(until) => {}
                },
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, SlotState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection's slot; released when dropped.
#[derive(Debug)]
pub struct ConnectionSlot {
    slots: Arc<ConnectionSlots>,
    number: u64,
    evicted: Arc<Notify>,
}

impl ConnectionSlot {
    /// Records that a complete request has arrived.
    pub fn mark_active(&self) {
        if let Some(taken) = self.slots.state().taken.get_mut(&self.number) {
            taken.since = Instant::now();
        }
    }

    /// Waits until the slot is taken away for another connection.
    pub async fn wait_for_eviction(&self) {
        self.evicted.notified().await;
    }
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        self.slots.state().taken.remove(&self.number);
        self.slots.freed.notify_waiters();
    }
}

#[derive(Debug)]
struct SlotState {
    limit: usize,
    taken: HashMap<u64, SlotEntry>,
    next: u64,
}

#[derive(Debug)]
struct SlotEntry {
    since: Instant,
    evicted: Arc<Notify>,
}

impl SlotState {
    /// Takes a slot; `Err` is the time at which one may be free.
    fn enter(&mut self, now: Instant) -> Result<(u64, Arc<Notify>), Instant> {
        if self.taken.len() >= self.limit {
            let idlest = self.taken.iter().map(|(number, taken)| (taken.since, *number)).min();
            let Some((since, idlest)) = idlest else { return Err(now + GRACE) };
            if now < since + GRACE {
                return Err(since + GRACE);
            }
            if let Some(taken) = self.taken.remove(&idlest) {
                taken.evicted.notify_one();
            }
        }
        let (number, evicted) = (self.next, Arc::new(Notify::new()));
        self.next += 1;
        self.taken.insert(number, SlotEntry { since: now, evicted: Arc::clone(&evicted) });
        Ok((number, evicted))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_longest_idle_connection_is_evicted_after_the_grace_period() {
        let places = Arc::new(ConnectionSlots::new(2));
        let started = Instant::now();
        let (silent, busy) = (places.acquire().await, places.acquire().await);
        tokio::time::advance(GRACE / 2).await;
        busy.mark_active();
        let next = places.acquire().await;
        assert_eq!(started.elapsed(), GRACE);
        silent.wait_for_eviction().await;
        drop(silent);
        assert_eq!(places.state().taken.len(), 2, "evicted once, and not released a second time");
        let last = places.acquire().await;
        assert_eq!(started.elapsed(), GRACE * 3 / 2);
        busy.wait_for_eviction().await;
        drop((busy, next, last));
        assert!(places.state().taken.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_released_slot_is_free_at_once() {
        let places = Arc::new(ConnectionSlots::new(1));
        let started = Instant::now();
        let one = places.acquire().await;
        let (_two, ()) = tokio::join!(places.acquire(), async { drop(one) });
        assert_eq!(started.elapsed(), Duration::ZERO);
    }
}
