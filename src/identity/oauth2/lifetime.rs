//! When a token is fetched, and how long it is used. A pure state machine: time and events in, the next due time out.

use std::time::Duration;

/// The lifetime of a token without `expires_in` (RFC 6749 §5.1 only recommends it).
const DEFAULT_LIFETIME: Duration = Duration::from_secs(5 * 60);
/// The upper limit of `expires_in`.
const MAX_LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);
/// A token is not used for the last part of its lifetime, so that it is still valid on arrival: a tenth, at most this.
const MARGIN: Duration = Duration::from_secs(5);
/// A token is renewed between these shares of its lifetime: jitter, so that a fleet does not fetch at the same time.
const RENEW_FROM: f64 = 0.7;
const RENEW_TO: f64 = 0.85;
/// Back-off after a failure: doubles from the first to the second.
const FIRST_RETRY: Duration = Duration::from_millis(500);
const LAST_RETRY: Duration = Duration::from_secs(60);
/// The minimum age at which a token rejected by the upstream is replaced.
const MIN_AGE: Duration = Duration::from_secs(10);

/// Times count from any fixed moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Lifetime {
    fetched: Option<Duration>,
    usable_until: Duration,
    due: Duration,
    failures: u32,
}

impl Lifetime {
    /// When the next fetch is due, if the token is in use; the first at once.
    pub const fn due(&self) -> Duration {
        self.due
    }

    pub const fn usable_until(&self) -> Duration {
        self.usable_until
    }

    /// Records a token that arrived at `now`, requested at `requested` and valid for `expires_in` from then on.
    /// `random`: 0..1.
    pub fn record_success(
        &mut self,
        requested: Duration,
        now: Duration,
        expires_in: Option<Duration>,
        random: f64,
    ) {
        let lifetime = expires_in.unwrap_or(DEFAULT_LIFETIME).min(MAX_LIFETIME);
        let share = RENEW_FROM + (RENEW_TO - RENEW_FROM) * random.clamp(0.0, 1.0);
        self.failures = 0;
        self.fetched = Some(now);
        self.usable_until = requested + lifetime - MARGIN.min(lifetime / 10);
        // Avoids a fetch loop with very short lifetimes.
        self.due = (requested + lifetime.mul_f64(share)).max(now + FIRST_RETRY);
    }

    /// Records a failed request.
    pub fn record_failure(&mut self, now: Duration, random: f64) {
        let wait = FIRST_RETRY.saturating_mul(1 << self.failures.min(16)).min(LAST_RETRY);
        self.failures += 1;
        self.due = now + wait.mul_f64(1.0 - 0.2 * random.clamp(0.0, 1.0));
    }

    /// Records that the upstream rejects the token; a new one is due unless this one is itself new.
    pub fn record_rejection(&mut self, now: Duration) {
        if self.failures == 0 && self.fetched.is_some_and(|fetched| now >= fetched + MIN_AGE) {
            self.due = self.due.min(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const S: fn(u64) -> Duration = Duration::from_secs;

    #[test]
    fn a_token_is_renewed_before_it_expires() {
        for (seconds, until, from, to) in [
            (Some(3600), 3595, 2520, 3060),
            (None, 295, 210, 255),
            (Some(10), 9, 7, 9),
            (Some(1 << 40), 86_395, 60_480, 73_440),
        ] {
            for (random, due) in [(0.0, from), (1.0, to)] {
                let mut lifetime = Lifetime::default();
                assert_eq!(lifetime.due(), S(0));
                lifetime.record_success(S(100), S(100), seconds.map(S), random);
                assert_eq!(lifetime.usable_until(), S(100 + until));
                assert!(lifetime.due().abs_diff(S(100 + due)) <= S(1), "{:?}", lifetime.due());
            }
        }
    }

    #[test]
    fn failures_back_off_and_keep_the_token() {
        let mut lifetime = Lifetime::default();
        lifetime.record_success(S(0), S(0), Some(S(100)), 0.0);
        let (mut now, mut waits) = (lifetime.due(), Vec::new());
        for _ in 0..9 {
            lifetime.record_failure(now, 0.0);
            waits.push((lifetime.due() - now).as_millis());
            now = lifetime.due();
        }
        assert_eq!(waits, [500, 1000, 2000, 4000, 8000, 16_000, 32_000, 60_000, 60_000]);
        assert_eq!(lifetime.usable_until(), S(95));
    }

    #[test]
    fn a_rejected_token_is_replaced_unless_it_is_new() {
        let mut lifetime = Lifetime::default();
        lifetime.record_success(S(0), S(0), Some(S(3600)), 0.0);
        let due = lifetime.due();
        lifetime.record_rejection(S(9));
        assert_eq!(lifetime.due(), due);
        lifetime.record_rejection(S(10));
        assert_eq!(lifetime.due(), S(10));
    }

    proptest! {
        /// Whatever the issuer says, a token is renewed while it is still usable, if its lifetime is long enough.
        #[test]
        fn renewal_comes_before_expiry(seconds in 2_u64..1_000_000, took in 0_u64..2, random in 0.0..1.0_f64) {
            let mut lifetime = Lifetime::default();
            lifetime.record_success(S(5), S(5 + took), Some(S(seconds)), random);
            prop_assert!(lifetime.due() > S(5));
            if seconds >= 20 {
                prop_assert!(lifetime.due() < lifetime.usable_until());
            }
        }
    }
}
