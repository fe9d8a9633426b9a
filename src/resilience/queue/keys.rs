//! The keys of `[[queue]]`, and of `queue` in a route.

use std::{fmt, str::FromStr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    policy::{AmbiguousPolicy, DeliveryPolicy, PermanentStatus},
    settings::{DeadSettings, QueueLimits, Retention, WhenFull},
};
use crate::{
    resilience::{backoff::BackoffSettings, growing_duration::GrowingDuration},
    text_value,
    units::{ByteSize, HumanDuration},
};

/// `[[queue]]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QueueSettings {
    /// Its name in routes, metrics and the store.
    pub name: String,
    /// Deliveries at a time, all worker threads together.
    #[serde(default = "concurrency")]
    pub concurrency: u32,
    /// Deliveries that begin in a second; 0 = no limit.
    #[serde(default)]
    pub rate: u32,
    /// Which deliveries go one at a time, in the order in which they were accepted: none, all, or those with the same
    /// value of a header field.
    #[serde(default)]
    pub order: DeliveryOrder,
    /// Attempts that reached the service, before a delivery is a dead letter.
    #[serde(default = "attempts")]
    pub attempts: u32,
    /// The wait before another attempt, and before a paused queue is probed.
    #[serde(default = "backoff", deserialize_with = "read_backoff")]
    pub backoff: GrowingDuration,
    /// Statuses after which a delivery is a dead letter at once. 408, 409, 423, 425 and 429 never are.
    #[serde(default = "permanent")]
    pub permanent: Vec<PermanentStatus>,
    /// Whether to repeat an attempt that the service may have processed.
    #[serde(default)]
    pub ambiguous: AmbiguousPolicy,
    /// A delivery that takes longer is a dead letter. 0 = never.
    #[serde(default = "expires")]
    pub expires: HumanDuration,
    /// How long the result of a delivery can be read, and its Idempotency-Key is remembered.
    #[serde(default = "keep_done")]
    pub keep_done: HumanDuration,
    /// The most of a response's body that is kept.
    #[serde(default = "result_limit")]
    pub result_limit: ByteSize,
    /// The largest request body that is queued.
    #[serde(default = "body_limit")]
    pub body_limit: ByteSize,
    /// Deliveries that wait at most.
    #[serde(default = "max_messages")]
    pub max_messages: u64,
    /// Bytes of requests that wait at most.
    #[serde(default = "max_bytes")]
    pub max_bytes: ByteSize,
    /// Its dead letters.
    #[serde(default)]
    pub dead: DeadSettings,
    /// Header fields that are not stored.
    #[serde(default = "strip")]
    pub strip: Vec<String>,
    /// Where its deliveries are kept.
    #[serde(default)]
    pub backend: QueueBackend,
}

fn concurrency() -> u32 {
    5
}
fn attempts() -> u32 {
    DeliveryPolicy::default().attempts
}
fn backoff() -> GrowingDuration {
    GrowingDuration { base: HumanDuration::from_secs(1), max: HumanDuration::from_secs(600) }
}
fn read_backoff<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<GrowingDuration, D::Error> {
    GrowingDuration::read(backoff(), deserializer)
}
fn permanent() -> Vec<PermanentStatus> {
    DeliveryPolicy::default().permanent
}
fn expires() -> HumanDuration {
    DeliveryPolicy::default().expires
}
fn keep_done() -> HumanDuration {
    Retention::default().keep_done
}
const fn result_limit() -> ByteSize {
    ByteSize(64 << 10)
}
const fn body_limit() -> ByteSize {
    ByteSize(1 << 20)
}
fn max_messages() -> u64 {
    QueueLimits::default().max_messages
}
fn max_bytes() -> ByteSize {
    QueueLimits::default().max_bytes
}
fn strip() -> Vec<String> {
    ["cookie", "authorization"].map(str::to_owned).to_vec()
}

/// `backend`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum QueueBackend {
    /// The file of `[store]`.
    #[default]
    Store,
}

/// `order`: `none`, `all` or `header:NAME`.
#[derive(Clone, PartialEq, Eq, Default)]
pub enum DeliveryOrder {
    #[default]
    None,
    All,
    Header(String),
}

impl FromStr for DeliveryOrder {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("header:")) {
            ("none", _) => Ok(Self::None),
            ("all", _) => Ok(Self::All),
            (_, Some(name)) if !name.is_empty() => Ok(Self::Header(name.to_ascii_lowercase())),
            _ => Err(format!("`{text}` is not an order: use none, all or header:NAME")),
        }
    }
}

impl fmt::Display for DeliveryOrder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::All => f.write_str("all"),
            Self::Header(name) => write!(f, "header:{name}"),
        }
    }
}

text_value!(DeliveryOrder, "DeliveryOrder", "none, all or header:NAME", r"none|all|header:.+");

/// `queue` of a route.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RouteQueue {
    /// The `[[queue]]`.
    pub name: String,
    /// Which requests are queued.
    #[serde(default)]
    pub when: QueueWhen,
    /// The longest that a client with `Prefer: wait` waits for its result.
    #[serde(default)]
    pub wait: HumanDuration,
}

/// `when`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum QueueWhen {
    /// Those with `Prefer: respond-async`.
    #[default]
    Asked,
    Always,
    /// Those that the service could not be given now.
    Unavailable,
}

impl QueueSettings {
    /// The keys by which deliveries are made.
    pub fn policy(&self) -> DeliveryPolicy {
        DeliveryPolicy {
            concurrency: self.concurrency as usize,
            rate: self.rate,
            attempts: self.attempts,
            backoff: BackoffSettings { base: self.backoff.base, max: self.backoff.max },
            permanent: self.permanent.clone(),
            ambiguous: self.ambiguous,
            expires: self.expires,
        }
    }

    pub fn limits(&self) -> QueueLimits {
        QueueLimits {
            max_messages: self.max_messages,
            max_bytes: self.max_bytes,
            max_dead: (self.dead.when_full == WhenFull::Refuse).then_some(self.dead.max),
        }
    }

    pub fn retention(&self) -> Retention {
        Retention { keep_done: self.keep_done, dead: self.dead }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_of_the_keys_are_those_of_the_policy() {
        let queue: QueueSettings = toml::from_str("name = \"orders\"").unwrap();
        assert_eq!(queue.policy(), DeliveryPolicy::default());
        assert_eq!((queue.limits(), queue.retention()), (QueueLimits::default(), Retention::default()));
        let partial: QueueSettings =
            toml::from_str("name = \"orders\"\nbackoff = { max = \"5s\" }\norder = \"header:X-User\"")
                .unwrap();
        assert_eq!(partial.backoff.base, HumanDuration::from_secs(1));
        assert_eq!(partial.order, DeliveryOrder::Header("x-user".to_owned()));
    }
}
