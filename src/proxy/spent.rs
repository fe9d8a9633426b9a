//! Which traces have had their tries spent by an outbound call of this service.
//!
//! Sidecars in a row must not multiply each other's retries: when the service then fails the call it was serving, its
//! inbound side says `x-outrigger-retry: no`, and the caller's sidecar does not try again what was tried enough.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Traces remembered at a time.
const MOST: usize = 4096;
/// For how long. A call that fails later than this after its own call failed did so for another reason.
const KEPT: Duration = Duration::from_secs(60);

/// Stepped only where something failed.
#[derive(Debug, Default)]
pub struct SpentTraces(Mutex<HashMap<u128, Instant>>);

impl SpentTraces {
    fn lock(&self) -> MutexGuard<'_, HashMap<u128, Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An outbound call of this trace failed after its tries, budget or breaker were spent.
    pub fn note(&self, trace: u128, now: Instant) {
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
        spent.note(1, now);
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
