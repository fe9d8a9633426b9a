//! A calendar date, `2027-06-01`: midnight UTC at its beginning.

use std::{
    fmt,
    str::FromStr,
    time::{Duration, SystemTime},
};

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// The newtype name with which [`Date`] deserializes: a deserializer that knows it passes a date of TOML as text.
pub const DATE_TYPE_NAME: &str = "outrigger::Date";

/// See the [module](self). From 1970 to 9999.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Date {
    days_since_1970: u32,
}

const SECONDS_PER_DAY: u64 = 86_400;

impl Date {
    /// Seconds since 1970-01-01.
    pub fn unix_seconds(self) -> u64 {
        u64::from(self.days_since_1970) * SECONDS_PER_DAY
    }

    /// Its beginning.
    pub fn midnight(self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(self.unix_seconds())
    }
}

impl FromStr for Date {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a date: write e.g. 2027-06-01");
        // YYYY-MM-DD: integers alone would also accept a sign.
        let has_form = text.len() == 10 && text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-');
        let days = Some(text).filter(|_| has_form).and_then(days);
        days.map(|days_since_1970| Self { days_since_1970 }).ok_or_else(wrong)
    }
}

/// Days from 1970-01-01 to a date of the Gregorian calendar (Hinnant, `days_from_civil`).
fn days(text: &str) -> Option<u32> {
    let mut parts = text.split('-').map(|part| part.parse::<i64>().ok());
    let (year, month, day) = (parts.next()??, parts.next()??, parts.next()??);
    if parts.next().is_some() || year < 1970 || !(1..=12).contains(&month) || day < 1 {
        return None;
    }
    let is_leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let length = match month {
        2 => 28 + i64::from(is_leap),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    };
    if day > length {
        return None;
    }
    // Years begin in March, so that the leap day is the last of the year.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let (era, year_of_era) = (year / 400, year % 400);
    let day_of_year = (153 * month + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    u32::try_from(era * 146_097 + day_of_era - 719_468).ok()
}

impl fmt::Display for Date {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // `Sun, 06 Nov 1994 08:49:37 GMT`: the parts of RFC 3339, in another order.
        let http = httpdate::fmt_http_date(self.midnight());
        let months = "JanFebMarAprMayJunJulAugSepOctNovDec";
        let month = months.find(&http[8..11]).map_or(0, |at| at / 3 + 1);
        write!(f, "{}-{month:02}-{}", &http[12..16], &http[5..7])
    }
}

impl Serialize for Date {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Date {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl<'de> de::Visitor<'de> for Text {
            type Value = Date;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a date, e.g. 2027-06-01")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Date, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_newtype_struct<D: Deserializer<'de>>(self, inner: D) -> Result<Date, D::Error> {
                inner.deserialize_str(Text)
            }
        }
        deserializer.deserialize_newtype_struct(DATE_TYPE_NAME, Text)
    }
}

impl JsonSchema for Date {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Date".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "description": "a date, e.g. 2027-06-01: midnight UTC",
            "pattern": super::or_variable(r"\d{4}-\d{2}-\d{2}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_midnight_utc_as_http_writes_them() {
        for (text, http) in [
            ("1970-01-01", "Thu, 01 Jan 1970 00:00:00 GMT"),
            ("2000-02-29", "Tue, 29 Feb 2000 00:00:00 GMT"),
            ("2026-12-01", "Tue, 01 Dec 2026 00:00:00 GMT"),
            ("2100-03-01", "Mon, 01 Mar 2100 00:00:00 GMT"),
            ("9999-12-31", "Fri, 31 Dec 9999 00:00:00 GMT"),
        ] {
            let date: Date = text.parse().expect(text);
            assert_eq!(httpdate::fmt_http_date(date.midnight()), http);
            assert_eq!(date.to_string(), text);
        }
        assert_eq!("2026-12-01".parse().map(Date::unix_seconds), Ok(1_796_083_200));
    }

    #[test]
    fn every_day_of_four_centuries_is_the_next_of_the_one_before() {
        let first: Date = "1970-01-01".parse().expect("a date");
        for days in 0..146_097 {
            let date = Date { days_since_1970: first.days_since_1970 + days };
            assert_eq!(date.to_string().parse(), Ok(date));
        }
    }

    #[test]
    fn other_texts_and_days_that_do_not_exist_are_no_dates() {
        for text in [
            "",
            "2027",
            "2027-6-1",
            "2027-06-31",
            "2027-02-29",
            "2100-02-29",
            "1969-12-31",
            "2027-13-01",
            "2027-00-10",
            "2027-06-00",
            "2027-06-01T00:00:00Z",
            "+027-06-01",
            "2027-06-0a",
            "２027-06-01",
        ] {
            assert!(text.parse::<Date>().is_err(), "{text}");
        }
    }
}
