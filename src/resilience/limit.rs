//! Limits: how many connections and requests of an upstream may be open at a time, and the queue of waiting requests.
//!
//! Acquiring and releasing a slot is one atomic step each. The queue's lock is taken only if no slot is free, or if a
//! slot is released while requests wait. The queue is strictly first in, first out.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::units::HumanDuration;

/// `[defaults.limits]`, per upstream, all workers together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LimitSettings {
    /// Connections; tunnels and upgrades count only here.
    pub max_connections: u32,
    /// Requests in flight; further ones wait.
    pub max_requests: u32,
    /// How many requests may wait.
    pub max_pending: u32,
    /// How long a request waits; then 503.
    pub pending_timeout: HumanDuration,
    /// A limit below `max_requests` that follows the measured latency.
    pub adaptive: bool,
}

impl Default for LimitSettings {
    fn default() -> Self {
        Self {
            max_connections: 1024,
            max_requests: 1024,
            max_pending: 256,
            pending_timeout: HumanDuration::from_secs(1),
            adaptive: false,
        }
    }
}

/// A count that does not exceed its limit: connections, or requests in flight.
#[derive(Debug)]
pub struct BoundedCounter {
    in_use: AtomicU32,
    limit: AtomicU32,
}

impl BoundedCounter {
    pub fn new(limit: u32) -> Self {
        Self { in_use: AtomicU32::new(0), limit: AtomicU32::new(limit) }
    }

    /// Acquires one, to be returned by [`Self::release`]; false if the limit is reached.
    pub fn try_acquire(&self) -> bool {
        let limit = self.limit.load(Ordering::Relaxed);
        // SeqCst: a request that queues after this failed must see a slot that is released meanwhile.
        self.in_use
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |in_use| (in_use < limit).then(|| in_use + 1))
            .is_ok()
    }

    pub fn release(&self) {
        // More releases than acquisitions would be a bug; it must not wrap round to four billion in use.
        let _ = self
            .in_use
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |in_use| Some(in_use.saturating_sub(1)));
    }

    pub fn in_use(&self) -> u32 {
        self.in_use.load(Ordering::Relaxed)
    }

    pub fn limit(&self) -> u32 {
        self.limit.load(Ordering::Relaxed)
    }

    /// If more are in use already, they stay in use until they are released.
    pub fn set_limit(&self, limit: u32) {
        self.limit.store(limit, Ordering::SeqCst);
    }
}

/// Notifies a waiting request. Called under the queue's lock: it must not call back.
pub trait NotifyWaiter {
    fn notify(self);
}

/// Why a request cannot be queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LimitRefusal {
    /// `max_requests` are in flight and no request may wait.
    Limit,
    /// `max_pending` requests are waiting already.
    Queue,
    /// Its deadline has passed.
    Deadline,
}

/// A position in the queue. Wait for the notification or `expires_at`, whichever is first, and then call
/// [`RequestLimit::finish_wait`], also if the client has disconnected. Dropping the ticket instead may leak a slot.
#[derive(Debug)]
#[must_use]
pub struct QueueTicket {
    number: u64,
    granted: Arc<AtomicBool>,
    pub expires_at: Instant,
}

impl QueueTicket {
    /// Whether a slot has been granted; [`RequestLimit::finish_wait`] acquires it.
    pub fn is_granted(&self) -> bool {
        self.granted.load(Ordering::Relaxed)
    }
}

/// The queue: bounded; first in, first out.
#[derive(Debug)]
struct Queue<N> {
    settings: LimitSettings,
    waiting: VecDeque<Waiter<N>>,
    next_number: u64,
}

#[derive(Debug)]
struct Waiter<N> {
    number: u64,
    granted: Arc<AtomicBool>,
    expires_at: Instant,
    notify: N,
}

impl<N: NotifyWaiter> Queue<N> {
    fn push(
        &mut self,
        now: Instant,
        deadline: Option<Instant>,
        notify: N,
    ) -> Result<QueueTicket, LimitRefusal> {
        let timeout = now.checked_add(self.settings.pending_timeout.0);
        let expires_at = match (timeout, deadline) {
            (Some(timeout), Some(deadline)) => timeout.min(deadline),
            (timeout, deadline) => timeout.or(deadline).unwrap_or(now),
        };
        if deadline.is_some_and(|deadline| deadline <= now) {
            return Err(LimitRefusal::Deadline);
        }
        if self.settings.max_pending == 0 || expires_at <= now {
            return Err(LimitRefusal::Limit);
        }
        if self.waiting.len() >= self.settings.max_pending as usize {
            // Only when the queue is full, since it visits every waiter.
            self.drop_expired(now);
        }
        if self.waiting.len() >= self.settings.max_pending as usize {
            return Err(LimitRefusal::Queue);
        }
        let number = self.next_number;
        self.next_number += 1;
        let granted = Arc::new(AtomicBool::new(false));
        self.waiting.push_back(Waiter { number, granted: Arc::clone(&granted), expires_at, notify });
        Ok(QueueTicket { number, granted, expires_at })
    }

    /// The first waiter that has not expired.
    fn pop(&mut self, now: Instant) -> Option<Waiter<N>> {
        while let Some(waiter) = self.waiting.pop_front() {
            if waiter.expires_at > now {
                return Some(waiter);
            }
            waiter.notify.notify();
        }
        None
    }

    fn drop_expired(&mut self, now: Instant) {
        for waiter in std::mem::take(&mut self.waiting) {
            if waiter.expires_at > now { self.waiting.push_back(waiter) } else { waiter.notify.notify() }
        }
    }

    fn remove(&mut self, number: u64) -> bool {
        // Numbers only grow towards the end.
        let found = self.waiting.binary_search_by_key(&number, |waiter| waiter.number);
        found.is_ok_and(|index| self.waiting.remove(index).is_some())
    }
}

/// `max_requests` of one upstream and its queue, shared by all workers. Its state survives a reload.
#[derive(Debug)]
pub struct RequestLimit<N> {
    slots: BoundedCounter,
    /// The length of the queue, readable without its lock.
    pending: AtomicU32,
    queue: Mutex<Queue<N>>,
}

impl<N: NotifyWaiter> RequestLimit<N> {
    pub fn new(settings: LimitSettings) -> Self {
        Self {
            slots: BoundedCounter::new(settings.max_requests),
            pending: AtomicU32::new(0),
            queue: Mutex::new(Queue { settings, waiting: VecDeque::new(), next_number: 0 }),
        }
    }

    /// Acquires a slot, to be returned by [`Self::release`]. False if none is free or others wait for one: then call
    /// [`Self::enqueue`].
    pub fn try_acquire(&self) -> bool {
        self.pending.load(Ordering::SeqCst) == 0 && self.slots.try_acquire()
    }

    /// Queues a request. It may already be notified when this returns.
    pub fn enqueue(
        &self,
        now: Instant,
        deadline: Option<Instant>,
        notify: N,
    ) -> Result<QueueTicket, LimitRefusal> {
        let mut queue = self.lock();
        let ticket = queue.push(now, deadline, notify);
        self.grant_slots(&mut queue, now);
        ticket
    }

    /// Ends the wait: true with a slot, to be returned by [`Self::release`]; false without.
    pub fn finish_wait(&self, ticket: QueueTicket) -> bool {
        let mut queue = self.lock();
        let waited = queue.remove(ticket.number);
        self.pending.store(len(&queue.waiting), Ordering::SeqCst);
        !waited && ticket.granted.load(Ordering::Relaxed)
    }

    /// Returns a slot; the first waiter gets it. `now` is called only if one waits.
    pub fn release(&self, now: impl FnOnce() -> Instant) {
        self.slots.release();
        if self.pending.load(Ordering::SeqCst) > 0 {
            self.grant_slots(&mut self.lock(), now());
        }
    }

    pub fn in_flight(&self) -> u32 {
        self.slots.in_use()
    }

    pub fn pending(&self) -> u32 {
        self.pending.load(Ordering::Relaxed)
    }

    pub fn limit(&self) -> u32 {
        self.slots.limit()
    }

    /// Sets the adaptive limit: at least 1, at most `max_requests`.
    pub fn set_adaptive_limit(&self, limit: u32, now: Instant) {
        let mut queue = self.lock();
        self.slots.set_limit(limit.max(1).min(queue.settings.max_requests));
        self.grant_slots(&mut queue, now);
    }

    /// Applies the settings of a reload. Waiters stay in the queue.
    pub fn configure(&self, settings: LimitSettings, now: Instant) {
        let mut queue = self.lock();
        queue.settings = settings;
        self.slots.set_limit(settings.max_requests);
        self.grant_slots(&mut queue, now);
    }

    fn grant_slots(&self, queue: &mut Queue<N>, now: Instant) {
        // Published before the slots are checked: a concurrent release then sees the queue, or this sees its slot.
        self.pending.store(len(&queue.waiting), Ordering::SeqCst);
        while !queue.waiting.is_empty() && self.slots.try_acquire() {
            match queue.pop(now) {
                Some(waiter) => {
                    waiter.granted.store(true, Ordering::Relaxed);
                    waiter.notify.notify();
                }
                None => self.slots.release(),
            }
        }
        self.pending.store(len(&queue.waiting), Ordering::SeqCst);
    }

    fn lock(&self) -> MutexGuard<'_, Queue<N>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn len<T>(queue: &VecDeque<T>) -> u32 {
    u32::try_from(queue.len()).unwrap_or(u32::MAX)
}

impl LimitSettings {
    /// The `Retry-After` of a refusal: by then the requests that wait now have been served or have expired.
    pub fn retry_after(&self) -> Duration {
        self.pending_timeout.0.max(Duration::from_secs(1))
    }
}

#[cfg(test)]
mod tests;
