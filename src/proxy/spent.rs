//! Which traces have had their tries spent by an outbound call of this service.
//!
//! Sidecars in a row must not multiply each other's retries: when the service then fails the call it was serving, its
//! inbound side says `x-outrigger-retry: no`, and the caller's sidecar does not try again what was tried enough.

use std::{
    collections::HashMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Traces remembered at a time.
const MOST: usize = 4096;
/// For how long. A call that fails later than this after its own call failed did so for another reason.
const KEPT: Duration = Duration::from_secs(60);

/// Stepped only where something failed.
#[derive(Debug)]
pub struct SpentTraces {
    traces: Mutex<HashMap<u128, Instant>>,
    /// When one was noted last, in milliseconds after the epoch; 0 = never.
    last: AtomicU64,
    epoch: Instant,
}

impl Default for SpentTraces {
    fn default() -> Self {
        Self { traces: Mutex::default(), last: AtomicU64::new(0), epoch: Instant::now() }
    }
}

impl SpentTraces {
    fn lock(&self) -> MutexGuard<'_, HashMap<u128, Instant>> {
        self.traces.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether any trace is remembered. One load while nothing fails.
    pub fn is_in_use(&self, now: Instant) -> bool {
        let last = self.last.load(Ordering::Relaxed);
        last != 0 && self.millis(now).saturating_sub(last) < KEPT.as_millis() as u64
    }

    fn millis(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.epoch).as_millis() as u64
    }

    /// An outbound call of this trace failed after its tries, budget or breaker were spent.
    pub fn note(&self, trace: u128, now: Instant) {
        self.last.store(self.millis(now).max(1), Ordering::Relaxed);
        let mut traces = self.lock();
        if traces.len() >= MOST {
            traces.retain(|_, at| now.saturating_duration_since(*at) < KEPT);
        }
        // Still full: under such a storm advice for some is enough.
        if traces.len() < MOST {
            traces.insert(trace, now);
        }
    }

    pub fn contains(&self, trace: u128, now: Instant) -> bool {
        self.lock().get(&trace).is_some_and(|at| now.saturating_duration_since(*at) < KEPT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remembers_for_a_while_and_never_too_many() {
        let (spent, now) = (SpentTraces::default(), Instant::now());
        assert!(!spent.is_in_use(now));
        spent.note(1, now);
        assert!(spent.is_in_use(now) && !spent.is_in_use(now + KEPT + Duration::from_millis(2)));
        assert!(spent.contains(1, now) && !spent.contains(2, now));
        assert!(!spent.contains(1, now + KEPT));
        for trace in 0..10_000 {
            spent.note(trace, now);
        }
        assert_eq!(spent.lock().len(), MOST);
        spent.note(99_999, now + KEPT);
        assert!(spent.contains(99_999, now + KEPT), "old ones make room");
    }
}
