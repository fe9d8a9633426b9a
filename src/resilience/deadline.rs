//! The deadline of a request and of each attempt, and its propagation to the next hop.
//!
//! A deadline is one moment in time. Attempts, waits and hops use it up; nothing extends it.

use std::{
    fmt,
    num::NonZeroU64,
    str::FromStr,
    time::{Duration, Instant},
};

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::{text_value, units::HumanDuration};

/// The time in milliseconds within which the client needs the response headers.
pub const REQUEST_TIMEOUT: HeaderName = HeaderName::from_static("x-request-timeout-ms");
/// The same for gRPC, for the whole call.
pub const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// The time that one attempt may take until response headers.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub enum AttemptTimeout {
    /// Half of what is left of `timeout` while another attempt is possible, else all of it. A client's shorter deadline
    /// is halved only if the upstream's usual latency fits into the half.
    #[default]
    Auto,
    /// 0 = none.
    Fixed(HumanDuration),
}

impl FromStr for AttemptTimeout {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" { Ok(Self::Auto) } else { text.parse().map(Self::Fixed) }
    }
}

impl fmt::Display for AttemptTimeout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Fixed(duration) => duration.fmt(f),
        }
    }
}

text_value!(
    AttemptTimeout,
    "AttemptTimeout",
    "\"auto\" or a duration",
    r"auto|\s*(?:0|(?:[0-9][0-9.]*\s*(?:us|ms|s|m|h|d)\s*)+)\s*"
);

/// When a request must be complete.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Deadline {
    client: Option<Instant>,
    /// From the policy's `timeout`.
    timeout: Option<Instant>,
}

/// Which limit ends an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeadlineLimit {
    /// `attempt_timeout`: another attempt may follow.
    Attempt,
    /// Half of the time to the client's deadline: another attempt may follow, and the endpoint is not to blame.
    ClientShare,
    /// `timeout`: the request fails.
    Timeout,
    /// The client's deadline, shorter than `timeout`: the request fails, and the service is not to blame.
    ClientDeadline,
}

impl Deadline {
    /// From the client's header, which counts from the arrival of the request. [`Self::start`] adds `timeout`, which
    /// counts from when the request body has been sent.
    pub fn from_client(arrived: Instant, left: Option<Duration>) -> Self {
        Self { client: left.and_then(|left| arrived.checked_add(left)), timeout: None }
    }

    /// The client's deadline without the policy's `timeout`.
    #[must_use]
    pub fn client_only(&self) -> Self {
        Self { client: self.client, timeout: None }
    }

    /// Starts `timeout`, once; `None` or zero = no timeout. A second call changes nothing.
    pub fn start(&mut self, now: Instant, timeout: Option<Duration>) {
        if self.timeout.is_none() {
            self.timeout = timeout.filter(|timeout| !timeout.is_zero()).and_then(|t| now.checked_add(t));
        }
    }

    /// The moment, and which limit it belongs to.
    pub fn at(&self) -> Option<(Instant, DeadlineLimit)> {
        match (self.client, self.timeout) {
            (Some(client), Some(timeout)) if client < timeout => {
                Some((client, DeadlineLimit::ClientDeadline))
            }
            (_, Some(timeout)) => Some((timeout, DeadlineLimit::Timeout)),
            (Some(client), None) => Some((client, DeadlineLimit::ClientDeadline)),
            (None, None) => None,
        }
    }

    /// The time left; `None` = no deadline.
    pub fn time_left(&self, now: Instant) -> Option<Duration> {
        self.at().map(|(at, _)| at.saturating_duration_since(now))
    }

    /// The time left until the client's deadline, if that is nearer than `timeout`.
    pub fn client_time_left(&self, now: Instant) -> Option<Duration> {
        self.client_deadline().map(|at| at.saturating_duration_since(now))
    }

    /// The client's deadline, if it is nearer than `timeout`.
    pub fn client_deadline(&self) -> Option<Instant> {
        self.at().and_then(|(at, limit)| (limit == DeadlineLimit::ClientDeadline).then_some(at))
    }

    pub fn is_expired(&self, now: Instant) -> bool {
        self.at().is_some_and(|(at, _)| at <= now)
    }

    /// When an attempt that begins now must end, and by which limit. `more`: another attempt is possible after it.
    /// `usual`: the latency that the upstream's responses rarely exceed, if it is known.
    pub fn attempt(
        &self,
        now: Instant,
        timeout: AttemptTimeout,
        more: bool,
        usual: Option<Duration>,
    ) -> Option<(Instant, DeadlineLimit)> {
        let half_to = |at: Instant| now.checked_add(at.saturating_duration_since(now) / 2);
        let own = match timeout {
            AttemptTimeout::Auto if more => self.timeout.and_then(half_to),
            AttemptTimeout::Auto => None,
            AttemptTimeout::Fixed(timeout) => timeout.limit().and_then(|own| now.checked_add(own)),
        };
        let own = own.map(|at| (at, DeadlineLimit::Attempt));
        let share = match (timeout, self.client_deadline()) {
            (AttemptTimeout::Auto, Some(client)) if more => half_to(client)
                .filter(|half| {
                    usual.is_some_and(|usual| now.checked_add(usual).is_some_and(|at| at <= *half))
                })
                .map(|half| (half, DeadlineLimit::ClientShare)),
            _ => None,
        };
        // Of limits at the same moment, the last in this order applies.
        own.into_iter().chain(share).chain(self.at()).rev().min_by_key(|(at, _)| *at)
    }
}

/// The client's time left from `x-request-timeout-ms`. Anything but one positive number is ignored: some clients send
/// zero for "no timeout", and a client without time left has gone.
pub fn request_timeout(headers: &HeaderMap) -> Option<Duration> {
    let millis = digits(only_value(headers, &REQUEST_TIMEOUT)?, 18)?;
    (millis > 0).then(|| Duration::from_millis(millis))
}

/// The client's time left from `grpc-timeout`; `None` if it is missing or malformed.
pub fn grpc_timeout(headers: &HeaderMap) -> Option<Duration> {
    parse_grpc_timeout(only_value(headers, &GRPC_TIMEOUT)?)
}

/// The value of `x-request-timeout-ms`: rounded down, so that a later hop does not count on time that is not there.
/// `None` with less than a millisecond left: the attempt is not worth sending.
pub fn timeout_header_millis(left: Duration) -> Option<NonZeroU64> {
    NonZeroU64::new(u64::try_from(left.as_millis()).unwrap_or(u64::MAX))
}

/// The value of `grpc-timeout`.
pub fn grpc_timeout_value(left: Duration) -> HeaderValue {
    // Digits and a letter always form a valid field value.
    HeaderValue::from_str(&format_grpc_timeout(left)).unwrap_or(HeaderValue::from_static("0n"))
}

/// In nanoseconds, largest last.
const GRPC_UNITS: [(char, u64); 6] = [
    ('n', 1),
    ('u', 1_000),
    ('m', 1_000_000),
    ('S', 1_000_000_000),
    ('M', 60_000_000_000),
    ('H', 3_600_000_000_000),
];

/// The specification allows eight digits.
const GRPC_DIGITS: usize = 8;
const GRPC_LARGEST: u128 = 99_999_999;

/// `TimeoutValue TimeoutUnit` of the gRPC protocol: 1 to 8 digits and one of `H M S m u n`.
pub fn parse_grpc_timeout(text: &str) -> Option<Duration> {
    let unit = text.chars().next_back()?;
    let (_, nanos) = GRPC_UNITS.iter().find(|(letter, _)| *letter == unit)?;
    let value = digits(&text[..text.len() - 1], GRPC_DIGITS)?;
    Some(Duration::from_nanos(*nanos).saturating_mul(u32::try_from(value).ok()?))
}

/// In the finest unit that fits eight digits, rounded down.
pub fn format_grpc_timeout(left: Duration) -> String {
    let nanos = left.as_nanos();
    GRPC_UNITS
        .iter()
        .map(|(letter, unit)| (letter, nanos / u128::from(*unit)))
        .find(|(_, value)| *value <= GRPC_LARGEST)
        .map_or_else(|| format!("{GRPC_LARGEST}H"), |(letter, value)| format!("{value}{letter}"))
}

fn only_value<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (Some(value), None) => value.to_str().ok(),
        _ => None,
    }
}

/// Digits and nothing else: `u64::parse` would take a plus sign.
fn digits(text: &str, most: usize) -> Option<u64> {
    let fine = (1..=most).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    if fine { text.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn fixed(duration: Duration) -> AttemptTimeout {
        AttemptTimeout::Fixed(HumanDuration(duration))
    }

    #[test]
    fn the_nearer_deadline_applies() {
        let now = Instant::now();
        let mut both = Deadline::from_client(now, Some(S * 2));
        both.start(now, Some(S * 15));
        assert_eq!(both.at(), Some((now + S * 2, DeadlineLimit::ClientDeadline)));
        assert_eq!(both.client_time_left(now + S), Some(S));

        let mut generous = Deadline::from_client(now, Some(S * 60));
        assert_eq!(generous.time_left(now), Some(S * 60));
        generous.start(now + S, Some(S * 15));
        assert_eq!(generous.at(), Some((now + S * 16, DeadlineLimit::Timeout)), "a client can only shorten");
        generous.start(now + S * 9, Some(S * 15));
        assert_eq!(generous.time_left(now + S * 6), Some(S * 10), "started once");
        assert_eq!(generous.client_time_left(now), None);
        assert!(!generous.is_expired(now + S * 15) && generous.is_expired(now + S * 16));

        let mut none = Deadline::default();
        none.start(now, Some(Duration::ZERO));
        assert_eq!((none.at(), none.time_left(now), none.is_expired(now + S * 9999)), (None, None, false));
    }

    #[test]
    fn auto_reserves_time_for_another_attempt() {
        let now = Instant::now();
        let mut deadline = Deadline::default();
        deadline.start(now, Some(S * 8));
        assert_eq!(
            deadline.attempt(now, AttemptTimeout::Auto, true, None),
            Some((now + S * 4, DeadlineLimit::Attempt))
        );
        let later = now + S * 4;
        assert_eq!(
            deadline.attempt(later, AttemptTimeout::Auto, true, None),
            Some((now + S * 6, DeadlineLimit::Attempt))
        );
        assert_eq!(
            deadline.attempt(later, AttemptTimeout::Auto, false, None),
            Some((now + S * 8, DeadlineLimit::Timeout))
        );
        assert_eq!(deadline.attempt(now, fixed(S), true, None), Some((now + S, DeadlineLimit::Attempt)));
        assert_eq!(
            deadline.attempt(now, fixed(S * 20), true, None),
            Some((now + S * 8, DeadlineLimit::Timeout))
        );
        assert_eq!(
            deadline.attempt(now, fixed(Duration::ZERO), true, None),
            Some((now + S * 8, DeadlineLimit::Timeout))
        );
        let endless = Deadline::default();
        assert_eq!(endless.attempt(now, AttemptTimeout::Auto, true, None), None);
        assert_eq!(endless.attempt(now, fixed(S), false, None), Some((now + S, DeadlineLimit::Attempt)));
    }

    /// A client that allows 400 ms is served by a service that takes 300 ms. If half of the deadline is enough for the
    /// usual latency, the other half is reserved for another attempt.
    #[test]
    fn a_clients_short_deadline_is_halved_only_where_the_usual_latency_fits() {
        let now = Instant::now();
        let ms = Duration::from_millis;
        let mut deadline = Deadline::from_client(now, Some(ms(400)));
        deadline.start(now, Some(S * 15));
        let attempt =
            |usual: Option<Duration>, more| deadline.attempt(now, AttemptTimeout::Auto, more, usual);
        let whole = Some((now + ms(400), DeadlineLimit::ClientDeadline));
        assert_eq!(attempt(None, true), whole, "nothing is known yet");
        assert_eq!(attempt(Some(ms(300)), true), whole);
        assert_eq!(attempt(Some(ms(201)), true), whole);
        assert_eq!(attempt(Some(ms(200)), true), Some((now + ms(200), DeadlineLimit::ClientShare)));
        assert_eq!(attempt(Some(ms(50)), false), whole, "no other attempt can follow");
        // Half of `timeout` is the nearer limit: `timeout` is divided.
        let mut deadline = Deadline::from_client(now, Some(ms(900)));
        deadline.start(now, Some(S));
        let half = deadline.attempt(now, AttemptTimeout::Auto, true, None);
        assert_eq!(half, Some((now + ms(500), DeadlineLimit::Attempt)));
        // Without `timeout` only the client's deadline applies.
        let deadline = Deadline::from_client(now, Some(ms(400)));
        assert_eq!(
            deadline.attempt(now, AttemptTimeout::Auto, true, None),
            Some((now + ms(400), DeadlineLimit::ClientDeadline))
        );
        assert_eq!(
            deadline.attempt(now, fixed(ms(100)), true, None),
            Some((now + ms(100), DeadlineLimit::Attempt))
        );
    }

    #[test]
    fn an_invalid_header_is_ignored() {
        let read = |values: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(REQUEST_TIMEOUT, HeaderValue::from_static(value));
            }
            request_timeout(&headers)
        };
        assert_eq!(read(&["1500"]), Some(S * 3 / 2));
        for invalid in ["", "0", "-1", "+5", "1.5", "5s", "1e3", "99999999999999999999"] {
            assert_eq!(read(&[invalid]), None, "{invalid}");
        }
        assert_eq!(read(&["100", "200"]), None, "two of them mean nothing");
        assert_eq!(read(&[]), None);
        assert_eq!(timeout_header_millis(Duration::from_micros(1999)), NonZeroU64::new(1));
        assert_eq!(timeout_header_millis(Duration::from_micros(999)), None);
    }

    #[test]
    fn parses_grpc_timeouts_as_specified() {
        for (text, expected) in [
            ("1H", S * 3600),
            ("2M", S * 120),
            ("3S", S * 3),
            ("4m", Duration::from_millis(4)),
            ("5u", Duration::from_micros(5)),
            ("6n", Duration::from_nanos(6)),
            ("0n", Duration::ZERO),
            ("00000001S", S),
            ("99999999H", S * 3600 * 99_999_999),
        ] {
            assert_eq!(parse_grpc_timeout(text), Some(expected), "{text}");
        }
        for invalid in ["", "S", "5", "5s", "5h", "123456789S", "-5S", "+5S", "5 S", "5.0S", "5é", "٣S"] {
            assert_eq!(parse_grpc_timeout(invalid), None, "{invalid}");
        }
    }

    #[test]
    fn grpc_timeouts_are_written_in_the_finest_unit_that_fits() {
        for (left, expected) in [
            (Duration::ZERO, "0n"),
            (Duration::from_nanos(99_999_999), "99999999n"),
            (Duration::from_nanos(100_000_999), "100000u"),
            (S * 15, "15000000u"),
            (S * 100, "100000m"),
            (S * 100_000, "100000S"),
            (S * 100_000_000, "1666666M"),
            (S * 60 * 100_000_000, "1666666H"),
            (Duration::MAX, "99999999H"),
        ] {
            assert_eq!(format_grpc_timeout(left), expected);
        }
    }

    proptest! {
        #[test]
        fn never_propagates_more_than_the_time_left(nanos in any::<u64>()) {
            let left = Duration::from_nanos(nanos);
            let text = format_grpc_timeout(left);
            prop_assert!(text.len() <= GRPC_DIGITS + 1);
            let read = parse_grpc_timeout(&text);
            prop_assert!(read.is_some_and(|read| read <= left));
            // Eight digits lose no more than this share (a unit is at most 1,000 of the next finer one).
            prop_assert!(read.is_some_and(|read| left - read <= left / 10_000));
        }

        #[test]
        fn parsing_takes_anything(text in ".*") {
            let _ = parse_grpc_timeout(&text);
        }

        #[test]
        fn an_attempt_never_outlasts_the_request(
            (client, usual) in (prop::option::of(0u64..5000), prop::option::of(0u64..5000)),
            timeout in 0u64..5000, begun in 0u64..6000,
            attempt in prop_oneof![Just(None), (0u64..5000).prop_map(Some)], more: bool,
        ) {
            let arrived = Instant::now();
            let ms = Duration::from_millis;
            let mut deadline = Deadline::from_client(arrived, client.map(ms));
            deadline.start(arrived, Some(ms(timeout)));
            let attempt = attempt.map_or(AttemptTimeout::Auto, |attempt| fixed(ms(attempt)));
            let end = deadline.attempt(arrived + ms(begun), attempt, more, usual.map(ms));
            if let Some((at, _)) = deadline.at() {
                prop_assert!(end.is_some_and(|(end, _)| end <= at));
            }
        }
    }
}
