//! The retry budget: what keeps retries from becoming the outage.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::units::{HumanDuration, Ratio};

/// `retry.budget`: retries in any `window` ≤ `ratio` × requests in it + `min_per_second` × its seconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BudgetSettings {
    pub ratio: Ratio,
    pub min_per_second: u32,
    pub window: HumanDuration,
}

impl Default for BudgetSettings {
    fn default() -> Self {
        Self { ratio: Ratio::constant(0.2), min_per_second: 1, window: HumanDuration::from_secs(10) }
    }
}
