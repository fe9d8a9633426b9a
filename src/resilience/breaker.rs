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
    #[serde(deserialize_with = "open_for")]
    pub open_for: Growing,
    /// Tries let through when half open; all must succeed.
    pub trial_requests: u32,
}

/// A duration that doubles from `base` up to `max`. Either may be left away where it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Growing {
    #[schemars(with = "Option<HumanDuration>")]
    pub base: HumanDuration,
    #[schemars(with = "Option<HumanDuration>")]
    pub max: HumanDuration,
}

impl Growing {
    /// Reads it; what is left away is as in `default`, which differs from key to key.
    pub fn read<'de, D: serde::Deserializer<'de>>(default: Self, deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Written {
            base: Option<HumanDuration>,
            max: Option<HumanDuration>,
        }
        let Written { base, max } = Written::deserialize(deserializer)?;
        Ok(Self { base: base.unwrap_or(default.base), max: max.unwrap_or(default.max) })
    }
}

fn open_for<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Growing, D::Error> {
    Growing::read(BreakerSettings::default().open_for, deserializer)
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
