//! Limits: how much of an upstream may be in use at a time, and who waits.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::units::HumanDuration;

/// `[defaults.limits]`, per upstream, all workers together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LimitSettings {
    /// Connections; tunnels and upgrades count only here.
    pub max_connections: u32,
    /// Requests in flight; more wait.
    pub max_requests: u32,
    /// How many may wait.
    pub max_pending: u32,
    /// How long they wait; then 503.
    pub pending_timeout: HumanDuration,
    /// A limit below `max_requests` that follows the measured latency.
    pub adaptive: bool,
}

impl Default for LimitSettings {
    fn default() -> Self {
        Self {
            max_connections: 1024,
            max_requests: 1024,
            max_pending: 256,
            pending_timeout: HumanDuration::from_secs(1),
            adaptive: false,
        }
    }
}
