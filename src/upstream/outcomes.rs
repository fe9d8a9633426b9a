//! The outcomes of recent requests to one endpoint, shown in the status.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use crate::resilience::{
    classify::{AttemptOutcome, Health, OutcomeKind},
    window::{SLICES, SlidingCount},
};

/// The window of the success share.
const WINDOW: Duration = Duration::from_secs(10);

/// What all workers have observed at an endpoint. A success is one atomic addition; a failure takes a short lock.
#[derive(Debug)]
pub struct RecentOutcomes {
    successes: SlidingCount,
    failures: SlidingCount,
    last_error: Mutex<Option<LastError>>,
    epoch: Instant,
}

/// The last failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LastError {
    /// A cause of `docs/errors.md`, or the response status.
    pub reason: String,
    pub at: Instant,
}

impl Default for RecentOutcomes {
    fn default() -> Self {
        Self {
            successes: SlidingCount::default(),
            failures: SlidingCount::default(),
            last_error: Mutex::default(),
            epoch: Instant::now(),
        }
    }
}

impl RecentOutcomes {
    /// Records the outcome of an attempt. An outcome that says nothing about the endpoint does not count.
    pub fn record(&self, ending: OutcomeKind, now: Instant) {
        match AttemptOutcome::new(ending).health() {
            Health::Neutral => {}
            Health::Success => self.successes.add(self.slice(now)),
            Health::Failure => {
                self.failures.add(self.slice(now));
                let word = match ending {
                    OutcomeKind::Http(status) => status.as_str().to_owned(),
                    ending => AttemptOutcome::new(ending).label().to_owned(),
                };
                *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) =
                    Some(LastError { reason: word, at: now });
            }
        }
    }

    /// The share of successes in the last ten seconds, from 0 to 1; `None` without requests.
    pub fn success_share(&self, now: Instant) -> Option<f64> {
        let slice = self.slice(now);
        let (successes, failures) = (self.successes.sum(slice), self.failures.sum(slice));
        let all = successes + failures;
        (all > 0).then(|| successes as f64 / all as f64)
    }

    pub fn last_error(&self) -> Option<LastError> {
        self.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn slice(&self, now: Instant) -> u32 {
        let slice = WINDOW.as_nanos() / SLICES as u128;
        // Only closeness matters, so wrapping is fine. Not 0, which marks an unused slot.
        (now.saturating_duration_since(self.epoch).as_nanos() / slice) as u32 + SLICES as u32
    }
}

#[cfg(test)]
mod tests {
    use http::StatusCode;

    use super::*;
    use crate::resilience::classify::ConnectFailure;

    #[test]
    fn the_share_covers_the_last_window_and_the_last_error_stays() {
        let outcomes = RecentOutcomes::default();
        let at = |seconds| outcomes.epoch + Duration::from_secs(seconds);
        assert_eq!((outcomes.success_share(at(0)), outcomes.last_error()), (None, None));
        for n in 0..4 {
            let status = if n == 0 { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
            outcomes.record(OutcomeKind::Http(status), at(0));
        }
        outcomes.record(OutcomeKind::ClientGone, at(1));
        assert_eq!(outcomes.success_share(at(1)), Some(0.75));
        assert_eq!(outcomes.last_error().map(|error| error.reason).as_deref(), Some("503"));
        outcomes.record(OutcomeKind::Connect(ConnectFailure::Refused), at(20));
        assert_eq!(outcomes.success_share(at(20)), Some(0.0));
        assert_eq!(outcomes.success_share(at(40)), None);
        let last = outcomes.last_error().unwrap();
        assert_eq!((last.reason.as_str(), last.at), ("connect_refused", at(20)));
    }
}
