//! Taking an endpoint that keeps failing out of the balancer for a while.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::breaker::Growing;
use crate::units::{HumanDuration, Ratio};

/// `[defaults.outlier]`, per endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct OutlierSettings {
    /// Failures in a row that eject the endpoint. 0 = off.
    pub consecutive_failures: u32,
    #[serde(deserialize_with = "eject_for")]
    pub eject_for: Growing,
    /// Share of an upstream's endpoints that may be out at a time.
    pub max_ejected: Ratio,
}

fn eject_for<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Growing, D::Error> {
    Growing::read(OutlierSettings::default().eject_for, deserializer)
}

impl Default for OutlierSettings {
    fn default() -> Self {
        Self {
            consecutive_failures: 5,
            eject_for: Growing { base: HumanDuration::from_secs(10), max: HumanDuration::from_secs(300) },
            max_ejected: Ratio::constant(0.5),
        }
    }
}
