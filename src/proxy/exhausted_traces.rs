//! Traces in which an outbound request of this service has exhausted its retries.
//!
//! Sidecars in a chain must not multiply each other's retries. When the service then fails the inbound request of the
//! same trace, its sidecar adds `x-outrigger-retry: no`, and the client's sidecar does not retry.

use std::{
    collections::HashMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// The most traces that are remembered at a time. A storm of failures may bring more; then the oldest are dropped.
const MAX_TRACES: usize = 8192;
/// How long a trace is remembered. An inbound request that fails later than this failed for another reason.
const RETENTION: Duration = Duration::from_secs(60);

/// Updated only on a failure, and never scanned: there are two tables, and the older one is dropped as a whole when the
/// newer one is full or [`RETENTION`] old.
#[derive(Debug)]
pub struct ExhaustedTraces {
    traces: Mutex<Generations>,
    /// When a trace was added last, in milliseconds after the epoch; 0 = never.
    last: AtomicU64,
    epoch: Instant,
}

#[derive(Debug, Default)]
struct Generations {
    newer: HashMap<u128, Instant>,
    older: HashMap<u128, Instant>,
    /// When the first trace was added to `newer`.
    filled_since: Option<Instant>,
}

impl Default for ExhaustedTraces {
    fn default() -> Self {
        Self { traces: Mutex::default(), last: AtomicU64::new(0), epoch: Instant::now() }
    }
}

impl ExhaustedTraces {
    fn lock(&self) -> MutexGuard<'_, Generations> {
        self.traces.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether any trace is remembered. One atomic load while nothing fails.
    pub fn is_in_use(&self, now: Instant) -> bool {
        let last = self.last.load(Ordering::Relaxed);
        last != 0 && self.millis(now).saturating_sub(last) < RETENTION.as_millis() as u64
    }

    fn millis(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.epoch).as_millis() as u64
    }

    /// Remembers a trace whose outbound request failed with retries or budget exhausted, or with the breaker open.
    pub fn insert(&self, trace: u128, now: Instant) {
        self.last.store(self.millis(now).max(1), Ordering::Relaxed);
        let mut traces = self.lock();
        let filled_since = *traces.filled_since.get_or_insert(now);
        let dropped = (traces.newer.len() >= MAX_TRACES / 2
            || now.saturating_duration_since(filled_since) >= RETENTION)
            .then(|| traces.rotate(now));
        traces.newer.insert(trace, now);
        drop(traces);
        // Memory is freed after the lock is released.
        drop(dropped);
    }

    pub fn contains(&self, trace: u128, now: Instant) -> bool {
        let traces = self.lock();
        let at = traces.newer.get(&trace).or_else(|| traces.older.get(&trace));
        at.is_some_and(|at| now.saturating_duration_since(*at) < RETENTION)
    }
}

impl Generations {
    fn rotate(&mut self, now: Instant) -> HashMap<u128, Instant> {
        self.filled_since = Some(now);
        let full = std::mem::take(&mut self.newer);
        std::mem::replace(&mut self.older, full)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_is_remembered_for_a_minute() {
        let (traces, now) = (ExhaustedTraces::default(), Instant::now());
        assert!(!traces.is_in_use(now));
        traces.insert(1, now);
        assert!(traces.is_in_use(now) && !traces.is_in_use(now + RETENTION + Duration::from_millis(2)));
        assert!(traces.contains(1, now) && !traces.contains(2, now));
        for second in (1..60).map(Duration::from_secs) {
            traces.insert(u128::from(second.as_secs()) + 100, now + second);
            assert!(traces.contains(1, now + second), "after {second:?}");
        }
        assert!(!traces.contains(1, now + RETENTION));
    }

    #[test]
    fn a_storm_of_failures_is_bounded_and_keeps_the_newest_traces() {
        let (traces, now) = (ExhaustedTraces::default(), Instant::now());
        for trace in 0..50_000 {
            traces.insert(trace, now);
            assert!(
                traces.contains(trace, now)
                    && traces.contains(trace.saturating_sub(MAX_TRACES as u128 / 2), now)
            );
        }
        let traces = traces.lock();
        assert!(traces.newer.len() + traces.older.len() <= MAX_TRACES);
    }

    /// Issue 14, fault 26: once the table was full, each further failure scanned it.
    #[test]
    fn a_failure_costs_the_same_however_many_there_were() {
        // CPU time: what other processes do does not count.
        let cpu_time = || {
            let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
            Duration::try_from(time).expect("not negative")
        };
        let cost = |failures: u128| {
            let (traces, now, before) = (ExhaustedTraces::default(), Instant::now(), cpu_time());
            (0..failures).for_each(|trace| traces.insert(trace, now));
            cpu_time() - before
        };
        let (few, many) = (cost(MAX_TRACES as u128 / 2), cost(MAX_TRACES as u128 * 4));
        // Eight times as many. A scan of the table costs ten thousand times as much.
        assert!(many < few * 100, "{few:?} and {many:?}");
    }
}
