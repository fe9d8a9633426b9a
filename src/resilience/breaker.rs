//! The circuit breaker of an upstream: closed, open, half open.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::units::{HumanDuration, Ratio};

/// `[defaults.breaker]`, per upstream; counts tries.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BreakerSettings {
    /// Failures in a row that open it. 0 = off.
    pub consecutive_failures: u32,
    /// Share of failures in the last `window`, from `min_requests` up, that opens it. 0 = off.
    pub failure_rate: Ratio,
    pub window: HumanDuration,
    pub min_requests: u32,
    /// How long it stays open; doubles, with jitter, each time the trial fails.
    pub open_for: Growing,
    /// Tries let through when half open; all must succeed.
    pub trial_requests: u32,
}

/// A duration that doubles from `base` up to `max`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Growing {
    pub base: HumanDuration,
    pub max: HumanDuration,
}

impl Default for BreakerSettings {
    fn default() -> Self {
        Self {
            consecutive_failures: 10,
            failure_rate: Ratio::constant(0.5),
            window: HumanDuration::from_secs(10),
            min_requests: 20,
            open_for: Growing { base: HumanDuration::from_secs(5), max: HumanDuration::from_secs(60) },
            trial_requests: 3,
        }
    }
}
