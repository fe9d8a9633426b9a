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

/// Traces remembered at a time: a storm of failures may bring more, and then the oldest are forgotten.
const MOST: usize = 8192;
/// For how long. A call that fails later than this after its own call failed did so for another reason.
const KEPT: Duration = Duration::from_secs(60);

/// Stepped only where something failed, and never scanned: traces lie in two tables, of which the older one is dropped whole
/// when the newer one is full or has been filled for [`KEPT`].
#[derive(Debug)]
pub struct SpentTraces {
    traces: Mutex<Generations>,
    /// When one was noted last, in milliseconds after the epoch; 0 = never.
    last: AtomicU64,
    epoch: Instant,
}

#[derive(Debug, Default)]
struct Generations {
    newer: HashMap<u128, Instant>,
    older: HashMap<u128, Instant>,
    /// When `newer` was begun.
    since: Option<Instant>,
}

impl Default for SpentTraces {
    fn default() -> Self {
        Self { traces: Mutex::default(), last: AtomicU64::new(0), epoch: Instant::now() }
    }
}

impl SpentTraces {
    fn lock(&self) -> MutexGuard<'_, Generations> {
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
        let since = *traces.since.get_or_insert(now);
        let dropped = (traces.newer.len() >= MOST / 2 || now.saturating_duration_since(since) >= KEPT)
            .then(|| traces.renew(now));
        traces.newer.insert(trace, now);
        drop(traces);
        // Its memory is given back when nobody waits for the lock.
        drop(dropped);
    }

    pub fn contains(&self, trace: u128, now: Instant) -> bool {
        let traces = self.lock();
        let at = traces.newer.get(&trace).or_else(|| traces.older.get(&trace));
        at.is_some_and(|at| now.saturating_duration_since(*at) < KEPT)
    }
}

impl Generations {
    fn renew(&mut self, now: Instant) -> HashMap<u128, Instant> {
        self.since = Some(now);
        let full = std::mem::take(&mut self.newer);
        std::mem::replace(&mut self.older, full)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remembers_for_a_while() {
        let (spent, now) = (SpentTraces::default(), Instant::now());
        assert!(!spent.is_in_use(now));
        spent.note(1, now);
        assert!(spent.is_in_use(now) && !spent.is_in_use(now + KEPT + Duration::from_millis(2)));
        assert!(spent.contains(1, now) && !spent.contains(2, now));
        for second in (1..60).map(Duration::from_secs) {
            spent.note(u128::from(second.as_secs()) + 100, now + second);
            assert!(spent.contains(1, now + second), "after {second:?}");
        }
        assert!(!spent.contains(1, now + KEPT));
    }

    #[test]
    fn a_storm_is_bounded_and_its_newest_traces_are_known() {
        let (spent, now) = (SpentTraces::default(), Instant::now());
        for trace in 0..50_000 {
            spent.note(trace, now);
            assert!(
                spent.contains(trace, now) && spent.contains(trace.saturating_sub(MOST as u128 / 2), now)
            );
        }
        let traces = spent.lock();
        assert!(traces.newer.len() + traces.older.len() <= MOST);
    }

    /// Issue 14, fault 26: once the table was full, each further failure scanned it.
    #[test]
    fn a_failure_costs_the_same_however_many_there_were() {
        // What other processes do to the clock on the wall does not count.
        let cpu_time = || {
            let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
            Duration::try_from(time).expect("not negative")
        };
        let cost = |failures: u128| {
            let (spent, now, before) = (SpentTraces::default(), Instant::now(), cpu_time());
            (0..failures).for_each(|trace| spent.note(trace, now));
            cpu_time() - before
        };
        let (few, many) = (cost(MOST as u128 / 2), cost(MOST as u128 * 4));
        // Eight times as many. With a scan of the table they cost ten thousand times as much.
        assert!(many < few * 100, "{few:?} and {many:?}");
    }
}
