//! The rate limit: GCRA, a token bucket that stores one instant per key.

use std::{fmt, str::FromStr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::text_value;

/// `[defaults.rate_limit]`; absent = none.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RateSettings {
    /// Requests a second.
    pub rate: u32,
    /// How many may come at once.
    #[serde(default = "one")]
    pub burst: u32,
    /// What shares one allowance.
    #[serde(default)]
    pub per: RateKey,
}

const fn one() -> u32 {
    1
}

/// What shares one allowance: `upstream`, `peer` or `header:NAME`.
#[derive(Clone, PartialEq, Eq, Default)]
pub enum RateKey {
    #[default]
    Upstream,
    Peer,
    Header(String),
}

impl FromStr for RateKey {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("header:")) {
            ("upstream", _) => Ok(Self::Upstream),
            ("peer", _) => Ok(Self::Peer),
            (_, Some(name)) if !name.is_empty() => Ok(Self::Header(name.to_ascii_lowercase())),
            _ => Err(format!("`{text}` is not a rate limit key: use upstream, peer or header:NAME")),
        }
    }
}

impl fmt::Display for RateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Upstream => f.write_str("upstream"),
            Self::Peer => f.write_str("peer"),
            Self::Header(name) => write!(f, "header:{name}"),
        }
    }
}

text_value!(RateKey, "RateKey", "upstream, peer or header:NAME");
