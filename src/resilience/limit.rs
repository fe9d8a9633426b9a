//! Limits: how much of an upstream may be in use at a time, and who waits.
//!
//! A place is taken and given back by one atomic step. Only who finds none, and who gives one back while others wait,
//! takes the lock of the queue. Who waits is served in the order of coming; nobody overtakes.

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
    /// Requests in flight; more wait.
    pub max_requests: u32,
    /// How many may wait.
    pub max_pending: u32,
    /// How long they wait; then 503.
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

/// A number that may not pass its limit: connections, or requests in flight.
#[derive(Debug)]
pub struct Counter {
    taken: AtomicU32,
    limit: AtomicU32,
}

impl Counter {
    pub fn new(limit: u32) -> Self {
        Self { taken: AtomicU32::new(0), limit: AtomicU32::new(limit) }
    }

    /// Takes one, to be given back by [`Self::give_back`]; false where there is none.
    pub fn try_take(&self) -> bool {
        let limit = self.limit.load(Ordering::Relaxed);
        // SeqCst: whoever queues up after this failed must see the place that is given back meanwhile.
        self.taken
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |taken| (taken < limit).then(|| taken + 1))
            .is_ok()
    }

    pub fn give_back(&self) {
        // More given back than taken would be a bug; it must not turn into four billion in use.
        let _ = self
            .taken
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |taken| Some(taken.saturating_sub(1)));
    }

    pub fn taken(&self) -> u32 {
        self.taken.load(Ordering::Relaxed)
    }

    pub fn limit(&self) -> u32 {
        self.limit.load(Ordering::Relaxed)
    }

    /// Where more than that are taken already, they stay until they are given back.
    pub fn set_limit(&self, limit: u32) {
        self.limit.store(limit, Ordering::SeqCst);
    }
}

/// How one who waits is told that there is news. Called under the queue's lock: it must not call back.
pub trait Bell {
    fn ring(self);
}

/// Why a request may not even wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// `max_requests` are in flight and nobody may wait.
    Limit,
    /// `max_pending` are waiting already.
    Queue,
    /// Its deadline is over.
    Deadline,
}

/// A place in the queue. Wait for the bell or `gives_up`, whichever is first, and then (also where the caller went
/// away) ask [`RequestLimit::settle`]; a ticket that is dropped instead may take a place with it.
#[derive(Debug)]
#[must_use]
pub struct Ticket {
    number: u64,
    granted: Arc<AtomicBool>,
    pub gives_up: Instant,
}

impl Ticket {
    /// Whether a place has come; [`RequestLimit::settle`] takes it.
    pub fn is_granted(&self) -> bool {
        self.granted.load(Ordering::Relaxed)
    }
}

/// The pure queue: bounded, first come first served.
#[derive(Debug)]
struct Queue<B> {
    settings: LimitSettings,
    waiting: VecDeque<Entry<B>>,
    next_number: u64,
}

#[derive(Debug)]
struct Entry<B> {
    number: u64,
    granted: Arc<AtomicBool>,
    gives_up: Instant,
    bell: B,
}

impl<B: Bell> Queue<B> {
    fn push(&mut self, now: Instant, deadline: Option<Instant>, bell: B) -> Result<Ticket, Full> {
        let patience = now.checked_add(self.settings.pending_timeout.0);
        let gives_up = match (patience, deadline) {
            (Some(patience), Some(deadline)) => patience.min(deadline),
            (patience, deadline) => patience.or(deadline).unwrap_or(now),
        };
        if deadline.is_some_and(|deadline| deadline <= now) {
            return Err(Full::Deadline);
        }
        if self.settings.max_pending == 0 || gives_up <= now {
            return Err(Full::Limit);
        }
        if self.waiting.len() >= self.settings.max_pending as usize {
            // Only now, since it looks at all of them.
            self.drop_hopeless(now);
        }
        if self.waiting.len() >= self.settings.max_pending as usize {
            return Err(Full::Queue);
        }
        let number = self.next_number;
        self.next_number += 1;
        let granted = Arc::new(AtomicBool::new(false));
        self.waiting.push_back(Entry { number, granted: Arc::clone(&granted), gives_up, bell });
        Ok(Ticket { number, granted, gives_up })
    }

    /// The first that can still make use of a place.
    fn pop(&mut self, now: Instant) -> Option<Entry<B>> {
        while let Some(entry) = self.waiting.pop_front() {
            if entry.gives_up > now {
                return Some(entry);
            }
            entry.bell.ring();
        }
        None
    }

    fn drop_hopeless(&mut self, now: Instant) {
        for entry in std::mem::take(&mut self.waiting) {
            if entry.gives_up > now { self.waiting.push_back(entry) } else { entry.bell.ring() }
        }
    }

    fn remove(&mut self, number: u64) -> bool {
        // Numbers only grow towards the end.
        let found = self.waiting.binary_search_by_key(&number, |entry| entry.number);
        found.is_ok_and(|index| self.waiting.remove(index).is_some())
    }
}

/// `max_requests` and its queue, of one upstream, shared by all workers. Outlives a reload.
#[derive(Debug)]
pub struct RequestLimit<B> {
    places: Counter,
    /// The length of the queue, to be looked at without its lock.
    pending: AtomicU32,
    queue: Mutex<Queue<B>>,
}

impl<B: Bell> RequestLimit<B> {
    pub fn new(settings: LimitSettings) -> Self {
        Self {
            places: Counter::new(settings.max_requests),
            pending: AtomicU32::new(0),
            queue: Mutex::new(Queue { settings, waiting: VecDeque::new(), next_number: 0 }),
        }
    }

    /// Takes a place, to be given back by [`Self::release`]. False where there is none or others wait for it:
    /// then [`Self::wait`].
    pub fn try_acquire(&self) -> bool {
        self.pending.load(Ordering::SeqCst) == 0 && self.places.try_take()
    }

    /// Queues up. The bell may have rung when this returns.
    pub fn wait(&self, now: Instant, deadline: Option<Instant>, bell: B) -> Result<Ticket, Full> {
        let mut queue = self.lock();
        let ticket = queue.push(now, deadline, bell);
        self.hand_out(&mut queue, now);
        ticket
    }

    /// Ends the wait: true with a place, to be given back by [`Self::release`]; false without.
    pub fn settle(&self, ticket: Ticket) -> bool {
        let mut queue = self.lock();
        let waited = queue.remove(ticket.number);
        self.pending.store(len(&queue.waiting), Ordering::SeqCst);
        !waited && ticket.granted.load(Ordering::Relaxed)
    }

    /// Gives a place back; the first who waits gets it. The time is asked for only then.
    pub fn release(&self, now: impl FnOnce() -> Instant) {
        self.places.give_back();
        if self.pending.load(Ordering::SeqCst) > 0 {
            self.hand_out(&mut self.lock(), now());
        }
    }

    pub fn in_flight(&self) -> u32 {
        self.places.taken()
    }

    pub fn pending(&self) -> u32 {
        self.pending.load(Ordering::Relaxed)
    }

    pub fn limit(&self) -> u32 {
        self.places.limit()
    }

    /// Moves the limit below `max_requests` (the adaptive one); never above it, never to none.
    pub fn adapt(&self, limit: u32, now: Instant) {
        let mut queue = self.lock();
        self.places.set_limit(limit.max(1).min(queue.settings.max_requests));
        self.hand_out(&mut queue, now);
    }

    /// Takes new settings over from a reload. Who waits goes on waiting.
    pub fn configure(&self, settings: LimitSettings, now: Instant) {
        let mut queue = self.lock();
        queue.settings = settings;
        self.places.set_limit(settings.max_requests);
        self.hand_out(&mut queue, now);
    }

    fn hand_out(&self, queue: &mut Queue<B>, now: Instant) {
        // Published before the places are looked at: who gives one back now either sees the queue, or we its place.
        self.pending.store(len(&queue.waiting), Ordering::SeqCst);
        while !queue.waiting.is_empty() && self.places.try_take() {
            match queue.pop(now) {
                Some(entry) => {
                    entry.granted.store(true, Ordering::Relaxed);
                    entry.bell.ring();
                }
                None => self.places.give_back(),
            }
        }
        self.pending.store(len(&queue.waiting), Ordering::SeqCst);
    }

    fn lock(&self) -> MutexGuard<'_, Queue<B>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn len<T>(queue: &VecDeque<T>) -> u32 {
    u32::try_from(queue.len()).unwrap_or(u32::MAX)
}

impl LimitSettings {
    /// How long a refused caller does well to wait: until those who wait now have been served or have given up.
    pub fn retry_after(&self) -> Duration {
        self.pending_timeout.0.max(Duration::from_secs(1))
    }
}

#[cfg(test)]
mod tests;
