//! Divides the requests of a route among upstreams by weight.
//!
//! Weighted rendezvous hashing (Schindelhauer and Schomaker, 2005): for each target a number is derived from the key and the
//! target's name, scaled by its weight; the smallest wins. So equal keys get equal targets in every process, and a changed
//! weight moves only the keys that it must: raising one target's weight moves keys to it alone. Without a key the caller
//! passes a random one.

use std::{
    fmt,
    str::FromStr,
    sync::atomic::{AtomicU8, AtomicU64, Ordering},
};

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::text_value;

/// `to` of a route: the upstream, or the upstreams, that serve its requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RouteTo {
    One(String),
    Split(Vec<SplitTarget>),
}

/// One item of `to`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SplitTarget {
    /// The name of an upstream.
    pub upstream: String,
    /// Its share: this weight of the sum of all. 0: no requests.
    pub weight: u32,
}

impl RouteTo {
    /// The names of all upstreams.
    pub fn upstreams(&self) -> impl Iterator<Item = &str> {
        let (one, several) = match self {
            Self::One(name) => (Some(name.as_str()), &[][..]),
            Self::Split(targets) => (None, targets.as_slice()),
        };
        one.into_iter().chain(several.iter().map(|target| target.upstream.as_str()))
    }
}

impl Serialize for RouteTo {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::One(name) => serializer.serialize_str(name),
            Self::Split(targets) => targets.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for RouteTo {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = RouteTo;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the name of an upstream, or [{ upstream = \"NAME\", weight = 90 }, …]")
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<RouteTo, E> {
                Ok(RouteTo::One(name.to_owned()))
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut items: A) -> Result<RouteTo, A::Error> {
                let mut targets = Vec::new();
                while let Some(target) = items.next_element()? {
                    targets.push(target);
                }
                Ok(RouteTo::Split(targets))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl JsonSchema for RouteTo {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "RouteTo".into()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        let target = generator.subschema_for::<SplitTarget>();
        schemars::json_schema!({
            "description": "The name of an upstream, or several with their weights",
            "anyOf": [{ "type": "string" }, { "type": "array", "minItems": 1, "items": target }],
        })
    }
}

/// What keeps a client on one target: `none`, `peer`, `header:NAME` or `cookie:NAME`.
#[derive(Clone, PartialEq, Eq, Default)]
pub enum StickyKey {
    /// Each request is assigned by itself.
    #[default]
    None,
    /// The client's identity, else its address.
    Peer,
    Header(String),
    Cookie(String),
}

impl FromStr for StickyKey {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.split_once(':')) {
            ("none", _) => Ok(Self::None),
            ("peer", _) => Ok(Self::Peer),
            (_, Some(("header", name))) if !name.is_empty() => Ok(Self::Header(name.to_ascii_lowercase())),
            (_, Some(("cookie", name))) if !name.is_empty() => Ok(Self::Cookie(name.to_owned())),
            _ => Err(format!("`{text}` is not a sticky key: use header:NAME, cookie:NAME, peer or none")),
        }
    }
}

impl fmt::Display for StickyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Peer => f.write_str("peer"),
            Self::Header(name) => write!(f, "header:{name}"),
            Self::Cookie(name) => write!(f, "cookie:{name}"),
        }
    }
}

text_value!(
    StickyKey,
    "StickyKey",
    "what keeps a client on one target: header:NAME, cookie:NAME, peer or none",
    r"none|peer|(?:header|cookie):.+"
);

/// The targets of one route with their current weights. All workers share it.
#[derive(Debug)]
pub struct Split {
    targets: Box<[Share]>,
    /// Percent of the last target; [`CONFIGURED`]: the weights are those of the configuration.
    last_percent: AtomicU8,
}

#[derive(Debug)]
struct Share {
    name: String,
    /// Derived from the name, so that targets draw different numbers for one key.
    seed: u64,
    weight: u32,
    /// How many requests it was chosen for.
    chosen: AtomicU64,
}

const CONFIGURED: u8 = u8::MAX;

/// A target's current share, for status and metrics.
#[derive(Clone, Debug, PartialEq)]
pub struct ShareReport {
    pub upstream: String,
    /// Of all requests, 0 to 1.
    pub share: f64,
    pub chosen: u64,
}

impl Split {
    pub fn new(targets: &[SplitTarget]) -> Self {
        let share = |target: &SplitTarget| Share {
            name: target.upstream.clone(),
            seed: seed(&target.upstream),
            weight: target.weight,
            chosen: AtomicU64::new(0),
        };
        Self { targets: targets.iter().map(share).collect(), last_percent: AtomicU8::new(CONFIGURED) }
    }

    /// The index of the target for this key; `None` if no target has a weight.
    pub fn choose(&self, key: u64) -> Option<usize> {
        let last_percent = self.last_percent();
        let weights = self.targets.iter().enumerate().map(|(at, _)| self.weight(at, last_percent));
        let arrivals = self.targets.iter().zip(weights).enumerate().filter(|(_, (_, weight))| *weight > 0.0);
        // The first arrival of Poisson processes with these rates: each is the first with its share of the rates.
        let arrivals = arrivals.map(|(at, (share, weight))| (at, -uniform(key ^ share.seed).ln() / weight));
        let (at, _) = arrivals.min_by(|(_, one), (_, other)| one.total_cmp(other))?;
        self.targets[at].chosen.fetch_add(1, Ordering::Relaxed);
        Some(at)
    }

    /// Gives the last target this percentage, at most 100, and the rest to the others in proportion to their configured
    /// weights; `None`: the configured weights again.
    pub fn set_last(&self, percent: Option<u8>) {
        self.last_percent.store(percent.map_or(CONFIGURED, |percent| percent.min(100)), Ordering::Relaxed);
    }

    /// The percentage of the last target, if it was set.
    pub fn last_percent(&self) -> Option<u8> {
        Some(self.last_percent.load(Ordering::Relaxed)).filter(|percent| *percent != CONFIGURED)
    }

    pub fn report(&self) -> Vec<ShareReport> {
        let last_percent = self.last_percent();
        let weights: Vec<f64> = (0..self.targets.len()).map(|at| self.weight(at, last_percent)).collect();
        let sum: f64 = weights.iter().sum();
        let report = |(share, weight): (&Share, f64)| ShareReport {
            upstream: share.name.clone(),
            share: if sum > 0.0 { weight / sum } else { 0.0 },
            chosen: share.chosen.load(Ordering::Relaxed),
        };
        self.targets.iter().zip(weights).map(report).collect()
    }

    fn weight(&self, at: usize, last_percent: Option<u8>) -> f64 {
        let configured = f64::from(self.targets[at].weight);
        let Some(percent) = last_percent else { return configured };
        let Some((_, others)) = self.targets.split_last() else { return configured };
        if at == others.len() {
            return f64::from(percent);
        }
        let sum: u64 = others.iter().map(|share| u64::from(share.weight)).sum();
        let share = if sum == 0 { 1.0 / others.len() as f64 } else { configured / sum as f64 };
        f64::from(100 - percent) * share
    }
}

/// FNV-1a: the same in every process and version.
fn seed(name: &str) -> u64 {
    let fnv = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    name.bytes().fold(0xcbf2_9ce4_8422_2325, fnv)
}

/// A number above 0 and at most 1, uniform over all keys.
fn uniform(key: u64) -> f64 {
    // SplitMix64's finaliser.
    let mut x = key.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^= x >> 31;
    // The upper 53 bits are all that a double holds.
    ((x >> 11) + 1) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests;
