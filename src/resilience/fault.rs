//! Faults injected before the upstream, to rehearse failures.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::units::{HumanDuration, Ratio};

/// `[defaults.fault]`; absent = none. Never counted against the upstream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct FaultSettings {
    pub delay: HumanDuration,
    /// Share of the calls that are delayed.
    pub delay_ratio: Ratio,
    /// The status of an aborted call.
    pub abort: Option<u16>,
    /// Share of the calls that are aborted.
    pub abort_ratio: Ratio,
}
