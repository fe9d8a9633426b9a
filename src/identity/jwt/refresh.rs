//! The schedule for fetching an issuer's keys. A pure state machine: time and events in, the next due time out.

use std::time::Duration;

use http::HeaderMap;

/// How long keys are fresh if the issuer does not say.
const DEFAULT_AGE: Duration = Duration::from_secs(10 * 60);
/// The lower limit of what the issuer says.
const MIN_AGE: Duration = Duration::from_secs(60);
/// The upper limit: a withdrawn key must become invalid eventually.
const MAX_AGE: Duration = Duration::from_secs(60 * 60);
/// Two fetches start at least this far apart, however many tokens have unknown keys.
pub const MIN_INTERVAL: Duration = Duration::from_secs(5);
/// Back-off after a failure: doubles from the first to the second.
const FIRST_RETRY: Duration = Duration::from_secs(5);
const LAST_RETRY: Duration = Duration::from_secs(5 * 60);
/// Intervals are shortened by up to this share, so that a fleet does not fetch at the same time.
const JITTER: f64 = 0.1;

/// Times count from any fixed moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct RefreshSchedule {
    started: Option<Duration>,
    due: Duration,
    failures: u32,
}

impl RefreshSchedule {
    /// When the next periodic fetch is due; the first at once.
    pub const fn due(&self) -> Duration {
        self.due
    }

    /// The earliest start of a fetch on demand.
    pub fn earliest_start(&self) -> Duration {
        self.started.map_or(Duration::ZERO, |started| started + MIN_INTERVAL)
    }

    /// Records the start of a fetch.
    pub fn record_start(&mut self, now: Duration) {
        self.started = Some(now);
    }

    /// Records a successful fetch of keys that are fresh for `age`. `random`: 0..1.
    pub fn record_success(&mut self, now: Duration, age: Option<Duration>, random: f64) {
        self.failures = 0;
        let age = age.unwrap_or(DEFAULT_AGE).clamp(MIN_AGE, MAX_AGE);
        self.due = now + shortened(age, random);
    }

    /// Records a failed fetch.
    pub fn record_failure(&mut self, now: Duration, random: f64) {
        let wait = FIRST_RETRY.saturating_mul(1 << self.failures.min(16)).min(LAST_RETRY);
        self.failures += 1;
        self.due = (now + shortened(wait, random)).max(self.earliest_start());
    }
}

fn shortened(interval: Duration, random: f64) -> Duration {
    interval.mul_f64(1.0 - JITTER * random.clamp(0.0, 1.0))
}

/// The freshness of a response (RFC 9111 §5.2.2): `max-age` minus `Age`; zero with `no-cache` and `no-store`. `None`:
/// the response does not say.
pub fn freshness(headers: &HeaderMap) -> Option<Duration> {
    let control = headers.get_all("cache-control").iter().filter_map(|value| value.to_str().ok());
    let mut max_age = None;
    for directive in control.flat_map(|value| value.split(',')).map(str::trim) {
        let (name, value) = directive.split_once('=').unwrap_or((directive, ""));
        if name.eq_ignore_ascii_case("no-cache") || name.eq_ignore_ascii_case("no-store") {
            return Some(Duration::ZERO);
        }
        if name.eq_ignore_ascii_case("max-age") {
            max_age = value.trim_matches('"').parse().ok().map(Duration::from_secs);
        }
    }
    let age = headers.get("age").and_then(|age| age.to_str().ok()?.parse().ok()).map(Duration::from_secs);
    max_age.map(|max_age| max_age.saturating_sub(age.unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    const S: fn(u64) -> Duration = Duration::from_secs;

    #[test]
    fn the_issuers_max_age_is_clamped() {
        for (max_age, expected) in [(None, 600), (Some(0), 60), (Some(300), 300), (Some(86_400), 3600)] {
            let mut refresh = RefreshSchedule::default();
            assert_eq!(refresh.due(), S(0));
            refresh.record_start(S(100));
            refresh.record_success(S(101), max_age.map(S), 0.0);
            assert_eq!(refresh.due(), S(101 + expected), "{max_age:?}");
        }
    }

    #[test]
    fn failures_back_off_exponentially() {
        let mut refresh = RefreshSchedule::default();
        let mut now = S(0);
        let mut waits = Vec::new();
        for _ in 0..8 {
            refresh.record_start(now);
            refresh.record_failure(now, 0.0);
            waits.push((refresh.due() - now).as_secs());
            now = refresh.due();
        }
        assert_eq!(waits, [5, 10, 20, 40, 80, 160, 300, 300]);
        refresh.record_start(now);
        refresh.record_success(now, None, 0.0);
        refresh.record_start(now + S(600));
        refresh.record_failure(now + S(600), 0.0);
        assert_eq!(refresh.due(), now + S(605));
    }

    #[test]
    fn cache_control_is_parsed() {
        for (control, age, fresh) in [
            ("max-age=300", None, Some(300)),
            ("public, Max-Age=\"300\", must-revalidate", Some("100"), Some(200)),
            ("max-age=300", Some("400"), Some(0)),
            ("max-age=300, no-store", None, Some(0)),
            ("public", None, None),
            ("max-age=soon", None, None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert("cache-control", HeaderValue::from_static(control));
            if let Some(age) = age {
                headers.insert("age", HeaderValue::from_static(age));
            }
            assert_eq!(freshness(&headers), fresh.map(S), "{control}");
        }
        assert_eq!(freshness(&HeaderMap::new()), None);
    }

    proptest! {
        /// Whatever clients send, and however fetches end, they start at most once in MIN_INTERVAL.
        #[test]
        fn many_unknown_keys_cause_few_fetches(
            requests in proptest::collection::vec((0_u64..2_000, any::<bool>(), 0.0..1.0_f64), 1..200),
        ) {
            let mut refresh = RefreshSchedule::default();
            let (mut now, mut started) = (S(0), Vec::new());
            for (wait, good, random) in requests {
                now += Duration::from_millis(wait);
                if now >= refresh.earliest_start() || now >= refresh.due() {
                    refresh.record_start(now);
                    started.push(now);
                    if good {
                        refresh.record_success(now, None, random);
                    } else {
                        refresh.record_failure(now, random);
                    }
                }
            }
            for pair in started.windows(2) {
                prop_assert!(pair[1] - pair[0] >= MIN_INTERVAL);
            }
        }
    }
}
