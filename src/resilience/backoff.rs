//! How long to wait before a further try: full jitter, `Retry-After` obeyed.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::units::HumanDuration;

/// `retry.backoff`: the n-th wait is drawn evenly from 0 to `min(max, base × 2ⁿ⁻¹)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BackoffSettings {
    pub base: HumanDuration,
    pub max: HumanDuration,
}

impl Default for BackoffSettings {
    fn default() -> Self {
        Self { base: HumanDuration::from_millis(25), max: HumanDuration::from_secs(1) }
    }
}
