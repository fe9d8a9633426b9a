//! Detection of HTTP/2 connections whose client abuses them.
//!
//! Only events that cost more than ordinary requests count, and only over a window of time: streams that are reset as
//! soon as they are opened (rapid reset, CVE-2023-44487), and streams that the client makes the proxy reset
//! (MadeYouReset, CVE-2025-8671). Streams that the proxy resets on its own, such as an upload whose response came
//! early, do not count.

use std::time::{Duration, Instant};

/// Offences that are tolerated at once.
const BURST: f64 = 1000.0;
/// Offences per second that are tolerated for any length of time.
const PER_SECOND: f64 = 100.0;
/// A stream that lived longer cost no more than any request: `MAX_CONCURRENT_STREAMS` bounds how many there are.
const SHORT_LIFE: Duration = Duration::from_millis(50);

/// What to do with the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum AbuseVerdict {
    /// Keep it.
    Acceptable,
    /// Accept no new streams and finish the open ones. A well-behaved client opens another connection.
    Retire,
    /// Close it at once: the client continued after it was retired.
    Close,
}

/// The abuse detector of one connection.
#[derive(Clone, Copy, Debug)]
pub struct AbuseDetector {
    offences: LeakyBucket,
    /// Stream errors of all kinds, over the connection's life.
    errors: u32,
    errors_to_retire: u32,
}

/// A counter that drains at a steady rate.
#[derive(Clone, Copy, Debug)]
struct LeakyBucket {
    level: f64,
    at: Instant,
}

impl LeakyBucket {
    fn add(&mut self, count: u32, now: Instant) {
        let drained = now.saturating_duration_since(self.at).as_secs_f64() * PER_SECOND;
        self.level = (self.level - drained).max(0.0) + f64::from(count);
        self.at = now;
    }
}

impl AbuseDetector {
    /// `errors_to_retire`: stream errors over the connection's life, however slowly they come, after which it is
    /// retired.
    pub fn new(errors_to_retire: u32, now: Instant) -> Self {
        Self { offences: LeakyBucket { level: 0.0, at: now }, errors: 0, errors_to_retire }
    }

    /// The client has reset a stream of this age before its response.
    pub fn record_early_reset(&mut self, age: Duration, now: Instant) {
        if age < SHORT_LIFE {
            self.offences.add(1, now);
        }
    }

    /// The proxy had to reset streams because of errors of the client on them.
    pub fn record_client_errors(&mut self, count: u32, now: Instant) {
        self.offences.add(count, now);
        self.errors = self.errors.saturating_add(count);
    }

    /// Streams were refused, or frames arrived for closed streams. Neither is an offence: the client may not have known
    /// the limit, or the end of the stream, when it sent them.
    pub fn record_refusals(&mut self, count: u32) {
        self.errors = self.errors.saturating_add(count);
    }

    pub fn verdict(&self) -> AbuseVerdict {
        if self.offences.level > 2.0 * BURST {
            AbuseVerdict::Close
        } else if self.offences.level > BURST || self.errors >= self.errors_to_retire {
            AbuseVerdict::Retire
        } else {
            AbuseVerdict::Acceptable
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(start: Instant, seconds: f64) -> Instant {
        start + Duration::from_secs_f64(seconds)
    }

    #[test]
    fn a_flood_is_closed_and_a_burst_is_not() {
        let start = Instant::now();
        for flood in [
            |conduct: &mut AbuseDetector, now| conduct.record_early_reset(Duration::ZERO, now),
            |conduct: &mut AbuseDetector, now| conduct.record_client_errors(1, now),
        ] {
            let mut conduct = AbuseDetector::new(u32::MAX, start);
            for _ in 0..1000 {
                flood(&mut conduct, start);
            }
            assert_eq!(conduct.verdict(), AbuseVerdict::Acceptable, "a thousand at once");
            for _ in 0..1000 {
                flood(&mut conduct, at(start, 0.1));
            }
            assert_eq!(conduct.verdict(), AbuseVerdict::Retire);
            for _ in 0..1000 {
                flood(&mut conduct, at(start, 0.2));
            }
            assert_eq!(conduct.verdict(), AbuseVerdict::Close);
        }
    }

    /// A client whose requests occasionally contain errors keeps its connection.
    #[test]
    fn a_steady_trickle_is_tolerated() {
        let start = Instant::now();
        let mut conduct = AbuseDetector::new(u32::MAX, start);
        for turn in 0..100_000 {
            conduct.record_client_errors(1, at(start, f64::from(turn) / 99.0));
            assert_eq!(conduct.verdict(), AbuseVerdict::Acceptable, "after {turn}");
        }
    }

    /// Clients with short deadlines and a service that hangs: 200 streams at a time, each cancelled after 100 ms.
    #[test]
    fn deadlines_are_no_offence() {
        let start = Instant::now();
        let mut conduct = AbuseDetector::new(u32::MAX, start);
        for turn in 0..20_000 {
            conduct.record_early_reset(Duration::from_millis(100), at(start, f64::from(turn) / 2000.0));
        }
        assert_eq!(conduct.verdict(), AbuseVerdict::Acceptable);
    }

    #[test]
    fn refusals_can_only_retire_the_connection() {
        let start = Instant::now();
        let mut conduct = AbuseDetector::new(8192, start);
        conduct.record_refusals(8191);
        assert_eq!(conduct.verdict(), AbuseVerdict::Acceptable);
        conduct.record_refusals(100_000);
        assert_eq!(conduct.verdict(), AbuseVerdict::Retire, "never closed at once");
    }
}
