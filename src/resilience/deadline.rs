//! Until when a call, and one try of it, may take; and what of that is told to the next hop.
//!
//! A deadline is one moment in time. Tries, waits and hops use it up; nothing prolongs it.

use std::{
    fmt,
    num::NonZeroU64,
    str::FromStr,
    time::{Duration, Instant},
};

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::{text_value, units::HumanDuration};

/// Milliseconds to response headers that the caller still has.
pub const REQUEST_TIMEOUT: HeaderName = HeaderName::from_static("x-request-timeout-ms");
/// The same for gRPC, of the whole call.
pub const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// How long one try may take to response headers.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub enum AttemptTimeout {
    /// Half of what is left of `timeout` while another attempt is possible, else all of it. A client's shorter deadline is
    /// halved only where the upstream's usual latency fits into the half.
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

/// When a call must be over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Deadline {
    callers: Option<Instant>,
    ours: Option<Instant>,
}

/// Which limit ends a try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// `attempt_timeout`: another try may follow.
    Attempt,
    /// The half of what is left of the client's deadline: another attempt may follow, and the endpoint is not to blame.
    ClientShare,
    /// `timeout`: the call is over.
    Timeout,
    /// The caller's deadline, shorter than ours: the call is over and the service is not to blame.
    Caller,
}

impl Deadline {
    /// From the caller's header, which counts from when the request arrived. `timeout` is added by
    /// [`Self::start`], since it counts from when the request's body has been sent.
    pub fn from_caller(arrived: Instant, left: Option<Duration>) -> Self {
        Self { callers: left.and_then(|left| arrived.checked_add(left)), ours: None }
    }

    /// Without our own clock.
    #[must_use]
    pub fn callers_only(&self) -> Self {
        Self { callers: self.callers, ours: None }
    }

    /// Starts our own clock, once; `None` or zero = no limit of our own. A second call changes nothing.
    pub fn start(&mut self, now: Instant, timeout: Option<Duration>) {
        if self.ours.is_none() {
            self.ours = timeout.filter(|timeout| !timeout.is_zero()).and_then(|t| now.checked_add(t));
        }
    }

    /// The moment itself, and whose it is.
    pub fn at(&self) -> Option<(Instant, Limit)> {
        match (self.callers, self.ours) {
            (Some(callers), Some(ours)) if callers < ours => Some((callers, Limit::Caller)),
            (_, Some(ours)) => Some((ours, Limit::Timeout)),
            (Some(callers), None) => Some((callers, Limit::Caller)),
            (None, None) => None,
        }
    }

    /// What is left; `None` = no end.
    pub fn left(&self, now: Instant) -> Option<Duration> {
        self.at().map(|(at, _)| at.saturating_duration_since(now))
    }

    /// What is left of the caller's own deadline where it is the one that will end the call.
    pub fn callers_time_left(&self, now: Instant) -> Option<Duration> {
        self.callers().map(|at| at.saturating_duration_since(now))
    }

    /// The caller's own deadline where it is the one that will end the call.
    pub fn callers(&self) -> Option<Instant> {
        self.at().and_then(|(at, limit)| (limit == Limit::Caller).then_some(at))
    }

    pub fn expired(&self, now: Instant) -> bool {
        self.at().is_some_and(|(at, _)| at <= now)
    }

    /// When an attempt that begins now must be over, and by which limit. `more`: another one is possible after it.
    /// `usual`: the latency that the upstream's responses rarely exceed, where it is known.
    pub fn attempt(
        &self,
        now: Instant,
        timeout: AttemptTimeout,
        more: bool,
        usual: Option<Duration>,
    ) -> Option<(Instant, Limit)> {
        let half_to = |at: Instant| now.checked_add(at.saturating_duration_since(now) / 2);
        let own = match timeout {
            AttemptTimeout::Auto if more => self.ours.and_then(half_to),
            AttemptTimeout::Auto => None,
            AttemptTimeout::Fixed(timeout) => timeout.limit().and_then(|own| now.checked_add(own)),
        };
        let own = own.map(|at| (at, Limit::Attempt));
        let share = match (timeout, self.callers()) {
            (AttemptTimeout::Auto, Some(callers)) if more => half_to(callers)
                .filter(|half| {
                    usual.is_some_and(|usual| now.checked_add(usual).is_some_and(|at| at <= *half))
                })
                .map(|half| (half, Limit::ClientShare)),
            _ => None,
        };
        // Of limits at the same moment the later in this order holds.
        own.into_iter().chain(share).chain(self.at()).rev().min_by_key(|(at, _)| *at)
    }
}

/// The caller's time left from `x-request-timeout-ms`. Anything but one number above zero is ignored: zero is what
/// some clients write for "no timeout", and a caller with truly no time left has gone.
pub fn request_timeout(headers: &HeaderMap) -> Option<Duration> {
    let millis = digits(only_value(headers, &REQUEST_TIMEOUT)?, 18)?;
    (millis > 0).then(|| Duration::from_millis(millis))
}

/// The caller's time left from `grpc-timeout`; `None` where there is none or it is malformed.
pub fn grpc_timeout(headers: &HeaderMap) -> Option<Duration> {
    parse_grpc_timeout(only_value(headers, &GRPC_TIMEOUT)?)
}

/// What to send as `x-request-timeout-ms`: rounded down, since a later hop must not believe in time that we don't
/// have. `None` with less than a millisecond left: the try is not worth sending.
pub fn millis_to_tell(left: Duration) -> Option<NonZeroU64> {
    NonZeroU64::new(u64::try_from(left.as_millis()).unwrap_or(u64::MAX))
}

/// What to send as `grpc-timeout`.
pub fn grpc_timeout_value(left: Duration) -> HeaderValue {
    // Digits and a letter are always a valid field value.
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
    fn the_nearer_deadline_holds_and_says_whose_it_is() {
        let now = Instant::now();
        let mut both = Deadline::from_caller(now, Some(S * 2));
        both.start(now, Some(S * 15));
        assert_eq!(both.at(), Some((now + S * 2, Limit::Caller)));
        assert_eq!(both.callers_time_left(now + S), Some(S));

        let mut generous = Deadline::from_caller(now, Some(S * 60));
        assert_eq!(generous.left(now), Some(S * 60));
        generous.start(now + S, Some(S * 15));
        assert_eq!(generous.at(), Some((now + S * 16, Limit::Timeout)), "a caller can only shorten");
        generous.start(now + S * 9, Some(S * 15));
        assert_eq!(generous.left(now + S * 6), Some(S * 10), "started once");
        assert_eq!(generous.callers_time_left(now), None);
        assert!(!generous.expired(now + S * 15) && generous.expired(now + S * 16));

        let mut none = Deadline::default();
        none.start(now, Some(Duration::ZERO));
        assert_eq!((none.at(), none.left(now), none.expired(now + S * 9999)), (None, None, false));
    }

    #[test]
    fn auto_leaves_time_for_another_try() {
        let now = Instant::now();
        let mut call = Deadline::default();
        call.start(now, Some(S * 8));
        assert_eq!(call.attempt(now, AttemptTimeout::Auto, true, None), Some((now + S * 4, Limit::Attempt)));
        let later = now + S * 4;
        assert_eq!(
            call.attempt(later, AttemptTimeout::Auto, true, None),
            Some((now + S * 6, Limit::Attempt))
        );
        assert_eq!(
            call.attempt(later, AttemptTimeout::Auto, false, None),
            Some((now + S * 8, Limit::Timeout))
        );
        assert_eq!(call.attempt(now, fixed(S), true, None), Some((now + S, Limit::Attempt)));
        assert_eq!(call.attempt(now, fixed(S * 20), true, None), Some((now + S * 8, Limit::Timeout)));
        assert_eq!(call.attempt(now, fixed(Duration::ZERO), true, None), Some((now + S * 8, Limit::Timeout)));
        let endless = Deadline::default();
        assert_eq!(endless.attempt(now, AttemptTimeout::Auto, true, None), None);
        assert_eq!(endless.attempt(now, fixed(S), false, None), Some((now + S, Limit::Attempt)));
    }

    /// A client that allows 400 ms of a service that takes 300 ms is served; one whose half is enough for what is usual
    /// keeps time for another attempt.
    #[test]
    fn a_clients_short_deadline_is_halved_only_where_the_usual_latency_fits() {
        let now = Instant::now();
        let ms = Duration::from_millis;
        let mut call = Deadline::from_caller(now, Some(ms(400)));
        call.start(now, Some(S * 15));
        let attempt = |usual: Option<Duration>, more| call.attempt(now, AttemptTimeout::Auto, more, usual);
        let whole = Some((now + ms(400), Limit::Caller));
        assert_eq!(attempt(None, true), whole, "nothing is known yet");
        assert_eq!(attempt(Some(ms(300)), true), whole);
        assert_eq!(attempt(Some(ms(201)), true), whole);
        assert_eq!(attempt(Some(ms(200)), true), Some((now + ms(200), Limit::ClientShare)));
        assert_eq!(attempt(Some(ms(50)), false), whole, "no other attempt can follow");
        // Our own half is the shorter one: what is divided is `timeout`.
        let mut call = Deadline::from_caller(now, Some(ms(900)));
        call.start(now, Some(S));
        let half = call.attempt(now, AttemptTimeout::Auto, true, None);
        assert_eq!(half, Some((now + ms(500), Limit::Attempt)));
        // Without a `timeout` of ours the client's deadline is all there is.
        let call = Deadline::from_caller(now, Some(ms(400)));
        assert_eq!(call.attempt(now, AttemptTimeout::Auto, true, None), Some((now + ms(400), Limit::Caller)));
        assert_eq!(call.attempt(now, fixed(ms(100)), true, None), Some((now + ms(100), Limit::Attempt)));
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
        assert_eq!(millis_to_tell(Duration::from_micros(1999)), NonZeroU64::new(1));
        assert_eq!(millis_to_tell(Duration::from_micros(999)), None);
    }

    #[test]
    fn grpc_timeouts_are_read_by_the_letter_of_the_specification() {
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
        fn what_is_sent_on_is_never_more_than_what_is_left(nanos in any::<u64>()) {
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
        fn a_try_never_outlasts_the_call(
            callers in prop::option::of(0u64..5000), timeout in 0u64..5000, begun in 0u64..6000,
            attempt in 0u64..5000, auto: bool, more: bool, usual in prop::option::of(0u64..5000),
        ) {
            let arrived = Instant::now();
            let ms = Duration::from_millis;
            let mut call = Deadline::from_caller(arrived, callers.map(ms));
            call.start(arrived, Some(ms(timeout)));
            let attempt = if auto { AttemptTimeout::Auto } else { fixed(ms(attempt)) };
            let end = call.attempt(arrived + ms(begun), attempt, more, usual.map(ms));
            if let Some((at, _)) = call.at() {
                prop_assert!(end.is_some_and(|(end, _)| end <= at));
            }
        }
    }
}
