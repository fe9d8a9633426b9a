//! Durations, sizes and ratios as written in the configuration.

mod date;

use std::{borrow::Cow, fmt, ops::Deref, str::FromStr, time::Duration};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

pub use date::{DATE_TYPE_NAME, Date};

/// A duration written `"250ms"`, `"10s"`, `"1m30s"`, `"1h"`; units `us`, `ms`, `s`, `m`, `h`, `d`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Hash)]
pub struct HumanDuration(pub Duration);

/// A number of bytes written `"64KiB"`, `"1MiB"`, `"512"`; units `B`, `KiB`, `MiB`, `GiB`, `KB`, `MB`, `GB`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Hash)]
pub struct ByteSize(pub u64);

/// A number from 0 to 1.
#[derive(Clone, Copy, PartialEq, PartialOrd, Default)]
pub struct Ratio(f64);

/// A policy table that can be switched off by writing `false` in its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Toggle<T>(pub Option<T>);

impl HumanDuration {
    pub const fn from_millis(ms: u64) -> Self {
        Self(Duration::from_millis(ms))
    }

    pub const fn from_secs(s: u64) -> Self {
        Self(Duration::from_secs(s))
    }

    /// `None` for zero, which the configuration uses for "no limit".
    pub fn limit(self) -> Option<Duration> {
        (!self.0.is_zero()).then_some(self.0)
    }
}

impl Ratio {
    /// `None` outside 0..=1.
    pub fn new(value: f64) -> Option<Self> {
        (0.0..=1.0).contains(&value).then_some(Self(value))
    }

    /// For constants in the source: clamped, so that it cannot fail.
    pub const fn constant(value: f64) -> Self {
        Self(value.clamp(0.0, 1.0))
    }
}

impl<T> Toggle<T> {
    pub const fn on(value: T) -> Self {
        Self(Some(value))
    }

    pub const fn off() -> Self {
        Self(None)
    }
}

impl Deref for HumanDuration {
    type Target = Duration;
    fn deref(&self) -> &Duration {
        &self.0
    }
}

impl Deref for ByteSize {
    type Target = u64;
    fn deref(&self) -> &u64 {
        &self.0
    }
}

impl Deref for Ratio {
    type Target = f64;
    fn deref(&self) -> &f64 {
        &self.0
    }
}

impl<T> Deref for Toggle<T> {
    type Target = Option<T>;
    fn deref(&self) -> &Option<T> {
        &self.0
    }
}

const DURATION_UNITS: [(&str, u64); 6] = [
    // Longest first, so that "ms" is not read as "m".
    ("us", 1),
    ("ms", 1_000),
    ("s", 1_000_000),
    ("m", 60_000_000),
    ("h", 3_600_000_000),
    ("d", 86_400_000_000),
];

/// In microseconds. Longer durations are hardly intended, and could overflow in calculations.
const LONGEST: u64 = 365 * 86_400_000_000;

const SIZE_UNITS: [(&str, u64); 7] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("B", 1),
];

impl FromStr for HumanDuration {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("`{text}` is not a duration: write e.g. \"250ms\", \"10s\", \"1m30s\", \"1h\"");
        let mut rest = text.trim();
        let mut micros: u64 = 0;
        if rest.is_empty() {
            return Err(wrong());
        }
        if rest == "0" {
            return Ok(Self::default());
        }
        while !rest.is_empty() {
            let (number, unit, tail) = number_and_unit(rest, &DURATION_UNITS).ok_or_else(wrong)?;
            let part = scale(number, unit).ok_or_else(wrong)?;
            micros = micros.checked_add(part).ok_or_else(wrong)?;
            rest = tail;
        }
        if micros > LONGEST {
            return Err(format!(
                "`{text}` is longer than a year: write \"365d\" at most, or \"0s\" where it means none"
            ));
        }
        Ok(Self(Duration::from_micros(micros)))
    }
}

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a size: write e.g. \"64KiB\", \"1MiB\", \"512B\"");
        let trimmed = text.trim();
        if let Ok(bytes) = trimmed.parse() {
            return Ok(Self(bytes));
        }
        match number_and_unit(trimmed, &SIZE_UNITS) {
            Some((number, unit, "")) => scale(number, unit).map(Self).ok_or_else(wrong),
            _ => Err(wrong()),
        }
    }
}

/// Splits `"1.5s…"` into number, size of the unit and the rest.
fn number_and_unit<'a>(text: &'a str, units: &[(&str, u64)]) -> Option<(&'a str, u64, &'a str)> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let (number, rest) = text.split_at(end);
    let rest = rest.trim_start();
    let (name, unit_size) = units.iter().find(|(name, _)| rest.starts_with(name))?;
    (!number.is_empty()).then(|| (number, *unit_size, rest[name.len()..].trim_start()))
}

/// `number × unit_size`, exact for whole numbers; fractions are rounded to the smallest unit.
fn scale(number: &str, unit_size: u64) -> Option<u64> {
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(unit_size);
    }
    let value = number.parse::<f64>().ok()? * unit_size as f64;
    (value.is_finite() && value < u64::MAX as f64).then_some(value.round() as u64)
}

impl fmt::Display for HumanDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = u64::try_from(self.0.as_micros()).unwrap_or(u64::MAX);
        if rest == 0 {
            return f.write_str("0s");
        }
        for (name, unit_size) in DURATION_UNITS.iter().rev() {
            if rest >= *unit_size {
                write!(f, "{}{name}", rest / unit_size)?;
                rest %= unit_size;
            }
        }
        Ok(())
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let binary = SIZE_UNITS[..3].iter().rev();
        match binary
            .into_iter()
            .find(|(_, unit_size)| self.0 >= *unit_size && self.0.is_multiple_of(*unit_size))
        {
            Some((name, unit_size)) => write!(f, "{}{name}", self.0 / unit_size),
            None => write!(f, "{}B", self.0),
        }
    }
}

impl fmt::Display for Ratio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Reads a value with `FromStr`, whether the file holds a string or a bare number.
pub fn deserialize_from_text<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err = String>,
{
    struct Text;
    impl de::Visitor<'_> for Text {
        type Value = String;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a string")
        }
        fn visit_str<E>(self, text: &str) -> Result<String, E> {
            Ok(text.to_owned())
        }
        fn visit_i64<E>(self, number: i64) -> Result<String, E> {
            Ok(number.to_string())
        }
        fn visit_u64<E>(self, number: u64) -> Result<String, E> {
            Ok(number.to_string())
        }
    }
    deserializer.deserialize_any(Text)?.parse().map_err(de::Error::custom)
}

/// Implements `Debug`, `Serialize`, `Deserialize` and a JSON Schema for a type that is text in the file.
#[macro_export]
#[doc(hidden)]
macro_rules! text_value {
    ($type:ty, $name:literal, $description:literal, $pattern:literal) => {
        impl ::std::fmt::Debug for $type {
            fn fmt(&self, f: &mut ::std::fmt::Formatter<'_>) -> ::std::fmt::Result {
                ::std::fmt::Display::fmt(self, f)
            }
        }
        impl ::serde::Serialize for $type {
            fn serialize<S: ::serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
        impl<'de> ::serde::Deserialize<'de> for $type {
            fn deserialize<D: ::serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                $crate::units::deserialize_from_text(deserializer)
            }
        }
        impl ::schemars::JsonSchema for $type {
            fn schema_name() -> ::std::borrow::Cow<'static, str> {
                $name.into()
            }
            fn json_schema(_: &mut ::schemars::SchemaGenerator) -> ::schemars::Schema {
                ::schemars::json_schema!({
                    "type": ["string", "integer"],
                    "description": $description,
                    "pattern": $crate::units::or_variable($pattern),
                })
            }
        }
    };
}

/// The pattern of a text, which may also contain `${VAR}`.
pub fn or_variable(pattern: &str) -> String {
    format!("\\$\\{{|^(?:{pattern})$")
}

text_value!(
    HumanDuration,
    "Duration",
    "e.g. \"250ms\", \"10s\", \"1m30s\"; \"0s\" where it means no limit",
    r"\s*(?:0|(?:[0-9][0-9.]*\s*(?:us|ms|s|m|h|d)\s*)+)\s*"
);
text_value!(
    ByteSize,
    "Size",
    "e.g. \"64KiB\", \"1MiB\", or a number of bytes",
    r"\s*(?:[0-9]+|[0-9][0-9.]*\s*(?:KiB|MiB|GiB|KB|MB|GB|B))\s*"
);

impl fmt::Debug for Ratio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Serialize for Ratio {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.0)
    }
}

impl<'de> Deserialize<'de> for Ratio {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = f64::deserialize(deserializer)?;
        Self::new(value)
            .ok_or_else(|| de::Error::custom(format!("{value} is not a ratio: write a number from 0 to 1")))
    }
}

impl JsonSchema for Ratio {
    fn schema_name() -> Cow<'static, str> {
        "Ratio".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "number", "minimum": 0, "maximum": 1 })
    }
}

impl<T: Serialize> Serialize for Toggle<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.0 {
            Some(value) => value.serialize(serializer),
            None => serializer.serialize_bool(false),
        }
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Toggle<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TableOrFalse<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> de::Visitor<'de> for TableOrFalse<T> {
            type Value = Toggle<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a table, or false to switch it off")
            }
            fn visit_bool<E: de::Error>(self, on: bool) -> Result<Toggle<T>, E> {
                if on { Err(E::invalid_value(de::Unexpected::Bool(true), &self)) } else { Ok(Toggle(None)) }
            }
            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<Toggle<T>, A::Error> {
                T::deserialize(de::value::MapAccessDeserializer::new(map)).map(Toggle::on)
            }
        }
        deserializer.deserialize_any(TableOrFalse(std::marker::PhantomData))
    }
}

impl<T: JsonSchema> JsonSchema for Toggle<T> {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> Cow<'static, str> {
        format!("{}_or_false", T::schema_name()).into()
    }
    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let table = generator.subschema_for::<T>();
        json_schema!({ "anyOf": [table, { "const": false }] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_durations() {
        for (text, ms) in [
            ("250ms", 250),
            ("10s", 10_000),
            ("1m30s", 90_000),
            ("1.5s", 1_500),
            ("1h", 3_600_000),
            ("0", 0),
            ("0s", 0),
        ] {
            assert_eq!(text.parse::<HumanDuration>().map(|d| d.0.as_millis()), Ok(ms), "{text}");
        }
        for text in ["", "10", "ten", "1x", "-1s", "1s1", "99999999999999999999s", "s", "366d"] {
            assert!(text.parse::<HumanDuration>().is_err(), "{text}");
        }
    }

    #[test]
    fn displays_durations_as_written() {
        for text in ["250ms", "10s", "1m30s", "1h", "1d", "500us", "0s"] {
            assert_eq!(text.parse::<HumanDuration>().map(|d| d.to_string()), Ok(text.to_owned()));
        }
    }

    #[test]
    fn parses_and_displays_sizes() {
        for (text, bytes) in
            [("64KiB", 65_536), ("1MiB", 1 << 20), ("512", 512), ("512B", 512), ("1KB", 1000)]
        {
            assert_eq!(text.parse::<ByteSize>().map(|s| s.0), Ok(bytes), "{text}");
        }
        assert!("64 parsecs".parse::<ByteSize>().is_err());
        assert_eq!(ByteSize(65_536).to_string(), "64KiB");
        assert_eq!(ByteSize(1000).to_string(), "1000B");
    }
}
