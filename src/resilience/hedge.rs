//! Hedging: a second copy of an idempotent request whose first attempt is slow.

use std::{
    fmt,
    str::FromStr,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use http::Method;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::retry::is_idempotent;
use crate::{text_value, units::HumanDuration};

/// `[defaults.hedge]`; absent = none. Spends retry budget.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HedgeSettings {
    /// When the copy is sent: a quantile of the live latency (`p95`) or a duration.
    pub after: HedgeAfter,
}

/// `p50` … `p99`, or a duration.
#[derive(Clone, Copy, PartialEq)]
pub enum HedgeAfter {
    /// In percent, 1 to 99.
    Quantile(u8),
    Fixed(HumanDuration),
}

impl FromStr for HedgeAfter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix('p').map(str::parse) {
            Some(Ok(percent @ 1..=99)) => Ok(Self::Quantile(percent)),
            Some(_) => Err(format!("`{text}` is not a quantile from p1 to p99, nor a duration")),
            None => text.parse().map(Self::Fixed),
        }
    }
}

impl fmt::Display for HedgeAfter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Quantile(percent) => write!(f, "p{percent}"),
            Self::Fixed(duration) => duration.fmt(f),
        }
    }
}

text_value!(
    HedgeAfter,
    "HedgeAfter",
    "a quantile of the live latency, e.g. \"p95\", or a duration",
    r"p[0-9.]+|\s*(?:0|(?:[0-9][0-9.]*\s*(?:us|ms|s|m|h|d)\s*)+)\s*"
);

/// Eight buckets an octave: a quantile is at most an eighth too high.
const PER_OCTAVE_BITS: u32 = 3;
const PER_OCTAVE: usize = 1 << PER_OCTAVE_BITS;
/// From a microsecond to over two minutes.
const BUCKETS: usize = 28 * PER_OCTAVE;
/// With fewer samples the quantile is unknown.
const MIN_SAMPLES: u64 = 100;
/// How often the quantile is computed from the buckets.
const REFRESH: Duration = Duration::from_millis(500);
/// After how many refreshes all counts are halved.
const HALVE_EVERY: u64 = 20;

/// The live latency of an upstream's responses, shared by all workers: counts in buckets, halved every ten seconds.
///
/// Recording is one atomic addition; twice a second one recording also computes the quantile.
#[derive(Debug)]
pub struct LatencyQuantile {
    /// In percent.
    percent: u8,
    counts: Box<[AtomicU32]>,
    /// The quantile in microseconds; 0 = not known yet.
    current: AtomicU64,
    /// Number of refreshes so far; the next is due at (this + 1) × [`REFRESH`] after the epoch.
    refreshed: AtomicU64,
    epoch: Instant,
}

impl LatencyQuantile {
    pub fn new(percent: u8, now: Instant) -> Self {
        Self {
            percent,
            counts: (0..BUCKETS).map(|_| AtomicU32::new(0)).collect(),
            current: AtomicU64::new(0),
            refreshed: AtomicU64::new(0),
            epoch: now,
        }
    }

    /// Records the time to a response's headers. Successes only: fast failures would cause early hedges.
    pub fn record(&self, latency: Duration, now: Instant) {
        if let Some(count) = self.counts.get(bucket(latency)) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        self.refresh(now);
    }

    /// `None` while there are too few samples.
    pub fn get(&self) -> Option<Duration> {
        match self.current.load(Ordering::Relaxed) {
            0 => None,
            micros => Some(Duration::from_micros(micros)),
        }
    }

    fn refresh(&self, now: Instant) {
        let due = now.saturating_duration_since(self.epoch).as_nanos() / REFRESH.as_nanos();
        let due = u64::try_from(due).unwrap_or(u64::MAX);
        let seen = self.refreshed.load(Ordering::Relaxed);
        // The thread that advances the number computes the quantile; the others return.
        if due <= seen
            || self.refreshed.compare_exchange(seen, due, Ordering::Relaxed, Ordering::Relaxed).is_err()
        {
            return;
        }
        self.current.store(self.compute().unwrap_or(0), Ordering::Relaxed);
        let halvings = (due / HALVE_EVERY).saturating_sub(seen / HALVE_EVERY).min(31);
        if halvings > 0 {
            for count in &self.counts {
                let halved = |count: u32| Some(count >> halvings);
                // The closure never declines.
                let _ = count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, halved);
            }
        }
    }

    /// The upper end, in microseconds, of the bucket that holds the quantile.
    fn compute(&self) -> Option<u64> {
        let counts: Vec<u64> =
            self.counts.iter().map(|count| u64::from(count.load(Ordering::Relaxed))).collect();
        let total: u64 = counts.iter().sum();
        if total < MIN_SAMPLES {
            return None;
        }
        let rank = (total * u64::from(self.percent)).div_ceil(100);
        let mut below = 0;
        let index = counts.iter().position(|count| {
            below += count;
            below >= rank
        })?;
        Some(upper_end(index))
    }
}

/// Buckets of equal width within an octave (as in HDR histograms); the first octaves are single microseconds.
fn bucket(latency: Duration) -> usize {
    let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
    if micros < PER_OCTAVE as u64 {
        return micros as usize;
    }
    let octave = micros.ilog2() - PER_OCTAVE_BITS;
    let within = (micros >> octave) as usize - PER_OCTAVE;
    ((octave as usize + 1) * PER_OCTAVE + within).min(BUCKETS - 1)
}

/// The first microsecond beyond a bucket.
fn upper_end(index: usize) -> u64 {
    let (octaves, within) = (index / PER_OCTAVE, index % PER_OCTAVE);
    match octaves {
        0 => within as u64 + 1,
        _ => ((PER_OCTAVE + within + 1) as u64) << (octaves - 1),
    }
}

/// A request when its first attempt is sent.
#[derive(Clone, Copy, Debug)]
pub struct HedgeCandidate<'a> {
    pub method: &'a Method,
    /// It has an `Idempotency-Key`.
    pub idempotency_key: bool,
    /// A whole copy of the body can be sent: there is none, or it has been read and kept.
    pub body_ready: bool,
    /// Attempts of the request so far, the first included.
    pub attempts: u32,
    /// `retry.max`, which counts hedges; 0 also where retries are off.
    pub max_retries: u32,
    pub breaker_closed: bool,
}

impl HedgeSettings {
    /// How long after the start of the attempt to send a second copy; `None` = never. At that moment, call
    /// [`super::budget::RetryBudget::withdraw`] before sending.
    /// `live` returns the latency at a quantile, in percent, if it is known.
    pub fn delay(
        &self,
        candidate: &HedgeCandidate<'_>,
        live: impl FnOnce(u8) -> Option<Duration>,
    ) -> Option<Duration> {
        // `methods = "all"` allows repeating a failed request, not processing the same request twice at once.
        let idempotent = is_idempotent(candidate.method) || candidate.idempotency_key;
        let allowed = idempotent
            && candidate.body_ready
            && candidate.breaker_closed
            && candidate.attempts <= candidate.max_retries;
        if !allowed {
            return None;
        }
        match self.after {
            HedgeAfter::Quantile(percent) => live(percent),
            HedgeAfter::Fixed(after) => Some(after.0),
        }
    }

    /// The quantile to measure; `None` if the delay is fixed, when nothing need be recorded.
    pub fn percent(&self) -> Option<u8> {
        match self.after {
            HedgeAfter::Quantile(percent) => Some(percent),
            HedgeAfter::Fixed(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn p95() -> HedgeSettings {
        HedgeSettings { after: HedgeAfter::Quantile(95) }
    }

    fn candidate(method: &Method) -> HedgeCandidate<'_> {
        HedgeCandidate {
            method,
            idempotency_key: false,
            body_ready: true,
            attempts: 1,
            max_retries: 2,
            breaker_closed: true,
        }
    }

    #[test]
    fn hedges_only_idempotent_requests() {
        let fixed = HedgeSettings { after: HedgeAfter::Fixed(HumanDuration::from_millis(30)) };
        let live = |_| None;
        let get = candidate(&Method::GET);
        assert_eq!(fixed.delay(&get, live), Some(MS * 30));
        let post = candidate(&Method::POST);
        assert_eq!(fixed.delay(&post, live), None);
        assert_eq!(fixed.delay(&HedgeCandidate { idempotency_key: true, ..post }, live), Some(MS * 30));
        assert_eq!(fixed.delay(&HedgeCandidate { body_ready: false, ..get }, live), None);
        assert_eq!(fixed.delay(&HedgeCandidate { breaker_closed: false, ..get }, live), None);
        assert_eq!(fixed.delay(&HedgeCandidate { attempts: 3, ..get }, live), None);
        assert_eq!(fixed.delay(&HedgeCandidate { max_retries: 0, ..get }, live), None);
        assert_eq!(p95().delay(&get, live), None, "nothing is known yet");
    }

    #[test]
    fn follows_the_live_latency() {
        let start = Instant::now();
        let live = LatencyQuantile::new(95, start);
        let feed = |latency: Duration, from: u32, to: u32| {
            (from..to).for_each(|n| live.record(latency, start + MS * n * 10));
        };
        feed(MS * 10, 0, 99);
        assert_eq!(live.get(), None, "too few");
        feed(MS * 10, 99, 1000);
        let known = live.get().unwrap();
        assert!((MS * 10..=MS * 12).contains(&known), "{known:?}");
        feed(MS * 80, 1000, 12_000);
        let slower = live.get().unwrap();
        assert!((MS * 80..=MS * 91).contains(&slower), "old samples fade: {slower:?}");
        live.record(MS, start + Duration::from_secs(3600));
        live.record(MS, start + Duration::from_secs(3601));
        assert_eq!(live.get(), None, "after a quiet hour nothing is known");
    }

    #[test]
    fn buckets_have_no_gaps() {
        for index in 1..BUCKETS - 1 {
            let first = Duration::from_micros(upper_end(index - 1));
            let last = Duration::from_micros(upper_end(index) - 1);
            assert_eq!((bucket(first), bucket(last)), (index, index));
        }
        assert_eq!(bucket(Duration::MAX), BUCKETS - 1);
    }

    proptest! {
        #[test]
        fn a_quantile_is_at_most_an_eighth_off(
            mut micros in prop::collection::vec(1u64..60_000_000, 100..400), percent in 1u8..=99,
        ) {
            let start = Instant::now();
            let live = LatencyQuantile::new(percent, start);
            for sample in &micros { live.record(Duration::from_micros(*sample), start); }
            micros.sort_unstable();
            let exact = micros[(micros.len() * usize::from(percent)).div_ceil(100) - 1];
            let read = live.compute().unwrap_or(0);
            prop_assert!(read > exact && read as f64 <= exact as f64 * 1.125 + 1.0, "{exact} {read}");
        }
    }
}
