//! A second copy of an idempotent request where the first is slow.

use std::{fmt, str::FromStr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{text_value, units::HumanDuration};

/// `[defaults.hedge]`; absent = none. Spends retry budget.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HedgeSettings {
    /// When the copy is sent: a quantile of the live latency (`p95`) or a duration.
    pub after: HedgeAfter,
}

/// `p50` … `p99`, or a duration.
#[derive(Clone, Copy, PartialEq)]
pub enum HedgeAfter {
    /// In percent, 1 to 99.
    Quantile(u8),
    Fixed(HumanDuration),
}

impl FromStr for HedgeAfter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix('p').map(str::parse) {
            Some(Ok(percent @ 1..=99)) => Ok(Self::Quantile(percent)),
            Some(_) => Err(format!("`{text}` is not a quantile from p1 to p99, nor a duration")),
            None => text.parse().map(Self::Fixed),
        }
    }
}

impl fmt::Display for HedgeAfter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Quantile(percent) => write!(f, "p{percent}"),
            Self::Fixed(duration) => duration.fmt(f),
        }
    }
}

text_value!(HedgeAfter, "HedgeAfter", "a quantile of the live latency, e.g. \"p95\", or a duration");
