//! Sampling of the traces that start here.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

use super::TraceId;

/// Bits of a trace ID that are guaranteed to be random (W3C Trace Context, level 2, §4.1).
const RANDOM_BITS: u32 = 56;

/// Samples a share of the traces by their IDs, so that all samplers with the same share select the same ones, and at
/// least one a second, so that a service with few requests is visible too.
#[derive(Debug)]
pub struct Sampler {
    epoch: Instant,
    /// The second in which a trace was last sampled, plus 1.
    last_sampled: AtomicU64,
}

impl Sampler {
    pub fn new(now: Instant) -> Self {
        Self { epoch: now, last_sampled: AtomicU64::new(0) }
    }

    /// Whether to sample a trace that starts now. `share`: 0 (none at all) to 1.
    pub fn should_sample(&self, trace: TraceId, share: f64, now: Instant) -> bool {
        if share <= 0.0 {
            return false;
        }
        let second = now.saturating_duration_since(self.epoch).as_secs() + 1;
        if in_share(trace, share) {
            self.last_sampled.fetch_max(second, Ordering::Relaxed);
            return true;
        }
        // The load first: most requests are not the first of their second, and then nothing is written.
        self.last_sampled.load(Ordering::Relaxed) < second
            && self.last_sampled.fetch_max(second, Ordering::Relaxed) < second
    }
}

/// OpenTelemetry's consistent probability sampling: selects the trace IDs above a threshold.
fn in_share(trace: TraceId, share: f64) -> bool {
    let all = 1u64 << RANDOM_BITS;
    let number = trace.get() as u64 & (all - 1);
    number >= ((1.0 - share.min(1.0)) * all as f64) as u64
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::rng::Rng;

    #[test]
    fn samplers_select_their_share_and_the_same_traces() {
        let mut rng = Rng::from_seed(3);
        let traces: Vec<TraceId> = (0..100_000).map(|_| TraceId::random(&mut rng)).collect();
        for share in [0.01, 0.1, 0.5, 1.0] {
            let (a, b) = (Sampler::new(Instant::now()), Sampler::new(Instant::now()));
            let now = a.epoch;
            a.should_sample(traces[0], share, now);
            let kept =
                traces.iter().skip(1).filter(|trace| a.should_sample(**trace, share, now)).count() as f64;
            assert!((kept / 1e5 - share).abs() < 0.005, "{share}: {kept}");
            // A sampler with a larger share selects all that one with a smaller share selects.
            b.should_sample(traces[0], share, now);
            assert!(
                traces
                    .iter()
                    .all(|trace| !in_share(*trace, share / 2.0) || b.should_sample(*trace, share, now))
            );
        }
    }

    #[test]
    fn one_a_second_at_least_and_none_at_zero() {
        let sampler = Sampler::new(Instant::now());
        // Far below any share.
        let trace = TraceId::new(1).unwrap();
        let at = |millis| sampler.epoch + Duration::from_millis(millis);
        let kept: Vec<bool> = [0, 500, 999, 1000, 1999, 5000, 5001]
            .map(|millis| sampler.should_sample(trace, 0.000_1, at(millis)))
            .to_vec();
        assert_eq!(kept, [true, false, false, true, false, true, false]);
        assert!(!sampler.should_sample(trace, 0.0, at(9000)));
    }
}
