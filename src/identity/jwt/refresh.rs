//! When the keys of an issuer are fetched. A machine: time and an event in, the next moment out.

use std::time::Duration;

use http::HeaderMap;

/// Keys are looked at again after this long where the issuer does not say,
const DEFAULT_AGE: Duration = Duration::from_secs(10 * 60);
/// never sooner than this, whatever it says,
const MIN_AGE: Duration = Duration::from_secs(60);
/// and never later: a key that the issuer withdrew must stop counting some day.
const MAX_AGE: Duration = Duration::from_secs(60 * 60);
/// However many tokens name keys that are not known: no two fetches begin closer together.
pub const MIN_INTERVAL: Duration = Duration::from_secs(5);
/// After a failure: doubled from the first to the second.
const FIRST_RETRY: Duration = Duration::from_secs(5);
const LAST_RETRY: Duration = Duration::from_secs(5 * 60);
/// Intervals are shortened by up to this share, so that a fleet does not ask in step.
const JITTER: f64 = 0.1;

/// Times are counted from any fixed moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Refresh {
    begun: Option<Duration>,
    due: Duration,
    failures: u32,
}

impl Refresh {
    /// When the next fetch is due if nobody asks; at first at once.
    pub const fn due(&self) -> Duration {
        self.due
    }

    /// From when on a fetch that somebody asks for may begin.
    pub fn allowed(&self) -> Duration {
        self.begun.map_or(Duration::ZERO, |begun| begun + MIN_INTERVAL)
    }

    /// A fetch begins.
    pub fn begin(&mut self, now: Duration) {
        self.begun = Some(now);
    }

    /// It brought keys, which hold for `age`. `random`: 0..1.
    pub fn succeeded(&mut self, now: Duration, age: Option<Duration>, random: f64) {
        self.failures = 0;
        let age = age.unwrap_or(DEFAULT_AGE).clamp(MIN_AGE, MAX_AGE);
        self.due = now + shortened(age, random);
    }

    /// It failed.
    pub fn failed(&mut self, now: Duration, random: f64) {
        let wait = FIRST_RETRY.saturating_mul(1 << self.failures.min(16)).min(LAST_RETRY);
        self.failures += 1;
        self.due = (now + shortened(wait, random)).max(self.allowed());
    }
}

fn shortened(interval: Duration, random: f64) -> Duration {
    interval.mul_f64(1.0 - JITTER * random.clamp(0.0, 1.0))
}

/// For how long an answer holds (RFC 9111 §5.2.2): `max-age`, less the `Age` it has; nothing with `no-cache` and
/// `no-store`. `None`: it does not say.
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
    fn the_issuers_word_holds_within_bounds() {
        for (says, holds) in [(None, 600), (Some(0), 60), (Some(300), 300), (Some(86_400), 3600)] {
            let mut refresh = Refresh::default();
            assert_eq!(refresh.due(), S(0));
            refresh.begin(S(100));
            refresh.succeeded(S(101), says.map(S), 0.0);
            assert_eq!(refresh.due(), S(101 + holds), "{says:?}");
        }
    }

    #[test]
    fn failures_are_repeated_ever_more_rarely() {
        let mut refresh = Refresh::default();
        let mut now = S(0);
        let mut waits = Vec::new();
        for _ in 0..8 {
            refresh.begin(now);
            refresh.failed(now, 0.0);
            waits.push((refresh.due() - now).as_secs());
            now = refresh.due();
        }
        assert_eq!(waits, [5, 10, 20, 40, 80, 160, 300, 300]);
        refresh.begin(now);
        refresh.succeeded(now, None, 0.0);
        refresh.begin(now + S(600));
        refresh.failed(now + S(600), 0.0);
        assert_eq!(refresh.due(), now + S(605));
    }

    #[test]
    fn cache_control_is_read() {
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
        /// Whatever callers ask for, and however fetches end, the issuer is asked at most once in MIN_INTERVAL.
        #[test]
        fn a_storm_of_unknown_keys_costs_few_fetches(
            asked in proptest::collection::vec((0_u64..2_000, any::<bool>(), 0.0..1.0_f64), 1..200),
        ) {
            let mut refresh = Refresh::default();
            let (mut now, mut begun) = (S(0), Vec::new());
            for (wait, good, random) in asked {
                now += Duration::from_millis(wait);
                if now >= refresh.allowed() || now >= refresh.due() {
                    refresh.begin(now);
                    begun.push(now);
                    if good {
                        refresh.succeeded(now, None, random);
                    } else {
                        refresh.failed(now, random);
                    }
                }
            }
            for pair in begun.windows(2) {
                prop_assert!(pair[1] - pair[0] >= MIN_INTERVAL);
            }
        }
    }
}
