//! Durations that double from one failure to the next: how long a breaker stays open, an endpoint ejected.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::units::HumanDuration;

/// A duration that doubles from `base` up to `max`. Either may be omitted in the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct GrowingDuration {
    /// The first time.
    #[schemars(with = "Option<HumanDuration>")]
    pub base: HumanDuration,
    /// The longest time.
    #[schemars(with = "Option<HumanDuration>")]
    pub max: HumanDuration,
}

impl GrowingDuration {
    /// Deserializes it; an omitted part is taken from `default`, which differs from key to key.
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

    /// The n-th consecutive duration, from 0. The first is exactly `base`; later ones are up to a fifth shorter, so
    /// that breakers and endpoints that failed together do not return together. `random` from 0 to 1.
    pub fn nth(&self, n: u32, random: f64) -> Duration {
        let whole = self.base.0.saturating_mul(1 << n.min(31)).min(self.max.0.max(self.base.0));
        let jitter = if n == 0 { 0.0 } else { 0.2 * random.clamp(0.0, 1.0) };
        whole.mul_f64(1.0 - jitter)
    }
}
