//! Timestamps of log lines and reports.

use std::{
    fmt,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::time::Instant;

const DAY: u64 = 24 * 60 * 60;

/// RFC 3339 in UTC, to the millisecond.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timestamp(SystemTime);

impl Timestamp {
    /// Converts an instant by the system clock's current offset.
    pub fn of(moment: Instant) -> Self {
        let ago = Instant::now().saturating_duration_since(moment);
        Self(SystemTime::now().checked_sub(ago).unwrap_or(UNIX_EPOCH))
    }
}

impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Self {
        Self(time)
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let since = self.0.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let (days, second) = (since.as_secs() / DAY, since.as_secs() % DAY);
        let (year, month, day) = date(days);
        let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
        let ms = u64::from(since.subsec_millis());
        // Digit by digit: each line of the access log has one, and formatting seven numbers takes a sixth of it.
        let mut text = *b"0000-00-00T00:00:00.000Z";
        for (at, number) in
            [(3, year), (6, month), (9, day), (12, hour), (15, minute), (18, second), (22, ms)]
        {
            put(&mut text, at, number);
        }
        f.write_str(str::from_utf8(&text).unwrap_or_default())
    }
}

/// Writes a number over the zeros that end at index `at`.
fn put(text: &mut [u8], mut at: usize, mut number: u64) {
    while number > 0 {
        text[at] = b'0' + (number % 10) as u8;
        number /= 10;
        at = at.saturating_sub(1);
    }
}

/// The date so many days after 1970-01-01, in the Gregorian calendar. Years are taken to begin in March, so that the
/// leap day is a year's last; 400 of them have 146,097 days.
fn date(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_follow_the_gregorian_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399, "2000-02-28T23:59:59.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (1_709_251_199, "2024-02-29T23:59:59.000Z"),
            (1_767_225_600, "2026-01-01T00:00:00.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(Timestamp(UNIX_EPOCH + Duration::from_secs(seconds)).to_string(), text);
        }
        // Compare with httpdate.
        for seconds in (0..4_000_000_000_u64).step_by(7_654_321) {
            let moment = UNIX_EPOCH + Duration::from_secs(seconds);
            let (rfc3339, imf) = (Timestamp(moment).to_string(), httpdate::fmt_http_date(moment));
            assert_eq!((&rfc3339[8..10], &rfc3339[..4]), (&imf[5..7], &imf[12..16]));
        }
    }
}
