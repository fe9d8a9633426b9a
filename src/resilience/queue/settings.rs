//! The keys of `[[queue]]` that limit what a queue holds and how long.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::units::{ByteSize, HumanDuration};

/// How much a queue accepts. Dead, done and cancelled deliveries do not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueLimits {
    pub max_messages: u64,
    pub max_bytes: ByteSize,
    /// Refuse new deliveries while this many dead letters are there: `dead.max` with `when_full = "refuse"`.
    pub max_dead: Option<u64>,
}

impl Default for QueueLimits {
    fn default() -> Self {
        Self {
            max_messages: 100_000,
            max_bytes: ByteSize(256 << 20),
            max_dead: Some(DeadSettings::default().max),
        }
    }
}

/// How long what has ended is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// For done and cancelled deliveries; so long their `Idempotency-Key` is remembered.
    pub keep_done: HumanDuration,
    pub dead: DeadSettings,
}

impl Default for Retention {
    fn default() -> Self {
        Self { keep_done: HumanDuration::from_secs(3600), dead: DeadSettings::default() }
    }
}

/// `dead`: how long and how many dead letters a queue keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DeadSettings {
    /// How long a dead letter is kept.
    pub keep: HumanDuration,
    /// How many are kept.
    pub max: u64,
    /// What happens when there are as many as `max`.
    pub when_full: WhenFull,
}

impl Default for DeadSettings {
    fn default() -> Self {
        Self { keep: HumanDuration::from_secs(7 * 86_400), max: 10_000, when_full: WhenFull::Refuse }
    }
}

/// `dead.when_full`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum WhenFull {
    /// The queue accepts nothing until an operator has replayed or dropped some.
    #[default]
    Refuse,
    /// The oldest dead letters are deleted, and counted.
    DropOldest,
}
