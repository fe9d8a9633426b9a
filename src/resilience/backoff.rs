//! The wait before a retry: exponential back-off with full jitter; `Retry-After` is obeyed.

use std::time::{Duration, SystemTime};

use http::{HeaderMap, header::RETRY_AFTER};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::units::HumanDuration;

/// `retry.backoff`: the n-th wait is uniformly random between 0 and `min(max, base × 2ⁿ⁻¹)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BackoffSettings {
    /// Upper limit of the first wait, which is a random part of it.
    pub base: HumanDuration,
    /// Upper limit of every wait.
    pub max: HumanDuration,
}

impl Default for BackoffSettings {
    fn default() -> Self {
        Self { base: HumanDuration::from_millis(25), max: HumanDuration::from_secs(1) }
    }
}

/// A longer wait that the server asks for is obeyed only if the request has a deadline that allows it.
const LONGEST_WAIT_WITHOUT_DEADLINE: Duration = Duration::from_secs(60);

/// When the upstream allows a retry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RetryHint {
    #[default]
    None,
    /// `Retry-After`: not earlier.
    After(Duration),
    /// `grpc-retry-pushback-ms`: exactly then.
    Exactly(Duration),
    /// `grpc-retry-pushback-ms`, negative or unreadable: not at all.
    Never,
}

/// The wait before a retry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackoffWait {
    For(Duration),
    /// The wait would pass the deadline.
    TooLong,
    /// The server forbids a retry.
    Forbidden,
}

impl BackoffSettings {
    /// The longest wait before the n-th retry, from 1.
    pub fn ceiling(&self, n: u32) -> Duration {
        // 2³¹ times a microsecond is 36 minutes: more doublings make no difference below any sensible `max`.
        let factor = 1u32 << n.saturating_sub(1).min(31);
        self.base.0.saturating_mul(factor).min(self.max.0)
    }

    /// The wait before the n-th retry, from 1. `time_left`: until the request's deadline, if it has one; `random` from
    /// 0 to 1.
    pub fn wait(&self, n: u32, hint: RetryHint, time_left: Option<Duration>, random: f64) -> BackoffWait {
        let jitter = self.ceiling(n).mul_f64(random.clamp(0.0, 1.0));
        let fits = |wait: Duration| wait < time_left.unwrap_or(LONGEST_WAIT_WITHOUT_DEADLINE);
        match hint {
            RetryHint::Never => BackoffWait::Forbidden,
            RetryHint::Exactly(wait) | RetryHint::After(wait) if !fits(wait) => BackoffWait::TooLong,
            RetryHint::Exactly(wait) => BackoffWait::For(wait),
            // Jitter is only added: all clients got the same time, and the server refuses earlier requests.
            RetryHint::After(wait) => {
                let spread = wait.saturating_add(jitter);
                BackoffWait::For(if fits(spread) { spread } else { wait })
            }
            RetryHint::None if fits(jitter) => BackoffWait::For(jitter),
            RetryHint::None => BackoffWait::TooLong,
        }
    }
}

impl RetryHint {
    /// Reads `grpc-retry-pushback-ms` (gRPC A6) and `Retry-After` (RFC 9110 §10.2.3). `wall` is the time of day.
    pub fn from_headers(headers: &HeaderMap, wall: SystemTime) -> Self {
        if let Some(value) = headers.get("grpc-retry-pushback-ms") {
            // A signed 32-bit integer; any other value forbids the retry too.
            let millis = value.to_str().ok().and_then(|text| text.parse::<i32>().ok());
            return match millis.map(u64::try_from) {
                Some(Ok(millis)) => Self::Exactly(Duration::from_millis(millis)),
                _ => Self::Never,
            };
        }
        headers
            .get(RETRY_AFTER)
            .and_then(|value| value.to_str().ok())
            .and_then(|text| retry_after(text, wall))
            .map_or(Self::None, Self::After)
    }
}

/// `None` if the text is neither seconds nor a date, or the date is past.
fn retry_after(text: &str, wall: SystemTime) -> Option<Duration> {
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        // More seconds than a `u64` holds pass any deadline.
        return Some(Duration::from_secs(text.parse().unwrap_or(u64::MAX)));
    }
    httpdate::parse_http_date(text).ok()?.duration_since(wall).ok()
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn hint(name: &'static str, value: &'static str, wall: SystemTime) -> RetryHint {
        let mut headers = HeaderMap::new();
        headers.insert(name, HeaderValue::from_static(value));
        RetryHint::from_headers(&headers, wall)
    }

    #[test]
    fn doubles_up_to_max() {
        let backoff = BackoffSettings::default();
        let ceilings: Vec<u128> = (1..=8).map(|n| backoff.ceiling(n).as_millis()).collect();
        assert_eq!(ceilings, [25, 50, 100, 200, 400, 800, 1000, 1000]);
        assert_eq!(backoff.ceiling(u32::MAX), MS * 1000);
        assert_eq!(backoff.ceiling(0), MS * 25);
    }

    #[test]
    fn jitter_only_adds_to_retry_after() {
        let backoff = BackoffSettings::default();
        let after = RetryHint::After(MS * 2000);
        let left = |ms| Some(MS * ms);
        assert_eq!(backoff.wait(1, after, left(5000), 0.0), BackoffWait::For(MS * 2000));
        assert_eq!(backoff.wait(1, after, left(5000), 1.0), BackoffWait::For(MS * 2025));
        assert_eq!(backoff.wait(1, after, left(2010), 1.0), BackoffWait::For(MS * 2000));
        assert_eq!(backoff.wait(1, after, left(2000), 0.5), BackoffWait::TooLong);
        assert_eq!(backoff.wait(1, after, None, 0.0), BackoffWait::For(MS * 2000));
        assert_eq!(
            backoff.wait(1, RetryHint::After(Duration::from_secs(3600)), None, 0.0),
            BackoffWait::TooLong
        );
    }

    #[test]
    fn grpc_pushback_is_exact_or_forbids() {
        let backoff = BackoffSettings::default();
        assert_eq!(backoff.wait(1, RetryHint::Exactly(MS * 7), None, 1.0), BackoffWait::For(MS * 7));
        assert_eq!(backoff.wait(1, RetryHint::Never, None, 0.5), BackoffWait::Forbidden);
        let now = SystemTime::UNIX_EPOCH;
        assert_eq!(hint("grpc-retry-pushback-ms", "250", now), RetryHint::Exactly(MS * 250));
        assert_eq!(hint("grpc-retry-pushback-ms", "0", now), RetryHint::Exactly(Duration::ZERO));
        for forbids in ["-1", "soon", "", "99999999999"] {
            assert_eq!(hint("grpc-retry-pushback-ms", forbids, now), RetryHint::Never, "{forbids}");
        }
    }

    #[test]
    fn reads_both_forms_of_retry_after() {
        let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        assert_eq!(hint("retry-after", "120", wall), RetryHint::After(MS * 120_000));
        let date = "Sun, 06 Nov 1994 08:49:40 GMT";
        assert_eq!(hint("retry-after", date, wall), RetryHint::After(MS * 3000));
        assert_eq!(hint("retry-after", date, wall + MS * 60_000), RetryHint::None);
        for nonsense in ["", "-3", "1.5", "tomorrow"] {
            assert_eq!(hint("retry-after", nonsense, wall), RetryHint::None, "{nonsense}");
        }
        let huge = hint("retry-after", "99999999999999999999999", wall);
        assert_eq!(BackoffSettings::default().wait(1, huge, Some(MS * 1000), 0.5), BackoffWait::TooLong);
    }

    proptest! {
        #[test]
        fn a_wait_fits_its_ceiling_and_the_time_left(
            n in 0u32..100, random in 0.0f64..1.0, left in 0u32..2000, base in 0u64..5000, max in 0u64..5000,
        ) {
            let backoff = BackoffSettings {
                base: HumanDuration::from_millis(base), max: HumanDuration::from_millis(max),
            };
            if let BackoffWait::For(wait) = backoff.wait(n, RetryHint::None, Some(MS * left), random) {
                prop_assert!(wait <= backoff.ceiling(n) && wait <= MS * u32::try_from(max).unwrap());
                prop_assert!(wait < MS * left);
            }
        }
    }
}
