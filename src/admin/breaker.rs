//! `POST /upstreams/NAME/breaker`: forces a circuit breaker open or closed for a limited time.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use http::StatusCode;
use serde::{Deserialize, Serialize};

use super::{
    api::{ApiResponse, json, problem},
    upstreams::{BreakerStatus, mode_word},
};
use crate::{
    model::Cluster, resilience::breaker::BreakerMode, runtime::lifecycle::Control, units::HumanDuration,
};

/// How long a forced state lasts if the request does not say. It always ends, so that a state forced in an incident is
/// not forgotten.
pub const DEFAULT_DURATION: Duration = Duration::from_secs(3600);
/// The longest time for which a state can be forced.
const MAX_DURATION: Duration = Duration::from_secs(30 * 86_400);

/// The body of the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BreakerOverride {
    pub state: OverrideState,
    #[serde(rename = "for", default, skip_serializing_if = "Option::is_none")]
    pub duration: Option<HumanDuration>,
}

impl BreakerOverride {
    pub fn to_json(self) -> String {
        // Cannot fail: two plain values.
        serde_json::to_string(&self).unwrap_or_default()
    }
}

/// The state to force; `auto` ends forcing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OverrideState {
    /// Reject all requests
    Open,
    /// Allow all requests
    Closed,
    /// Let the breaker decide
    Auto,
}

impl From<OverrideState> for BreakerMode {
    fn from(state: OverrideState) -> Self {
        match state {
            OverrideState::Open => Self::Open,
            OverrideState::Closed => Self::Closed,
            OverrideState::Auto => Self::Auto,
        }
    }
}

/// The path for the breaker of an upstream. Upstream names contain only characters that are valid in a path.
pub fn path(name: &str) -> String {
    format!("/upstreams/{name}/breaker")
}

/// The NAME in `/upstreams/NAME/breaker`.
pub fn upstream_from_path(path: &str) -> Option<&str> {
    let name = path.strip_prefix("/upstreams/")?.strip_suffix("/breaker")?;
    (!name.is_empty() && !name.contains('/')).then_some(name)
}

/// Forces the breaker of the upstream `name`, or of an unknown host or a service address discovered at run time.
pub fn force(control: &Control, name: &str, body: &[u8]) -> ApiResponse {
    let Some(cluster) = find(control, name) else {
        let snapshot = control.shared.snapshot.load();
        let names: Vec<&str> = snapshot.clusters.iter().map(|cluster| &*cluster.upstream.name).collect();
        let available = if names.is_empty() { "none is configured".to_owned() } else { names.join(", ") };
        let detail = format!("there is no upstream `{name}`; available: {available}");
        return problem(StatusCode::NOT_FOUND, "No such upstream", &detail);
    };
    let request: BreakerOverride = match serde_json::from_slice(body) {
        Ok(request) => request,
        Err(error) => {
            let detail = format!(
                "{error}; send e.g. {{\"state\":\"open\",\"for\":\"1h\"}}, with state one of open, closed, auto"
            );
            return problem(StatusCode::BAD_REQUEST, "Invalid breaker state", &detail);
        }
    };
    let duration = request.duration.map_or(DEFAULT_DURATION, |duration| duration.0);
    if duration.is_zero() || duration > MAX_DURATION {
        let detail = "`for` must be more than 0 and at most 30d: a forced state always ends";
        return problem(StatusCode::BAD_REQUEST, "Invalid duration", detail);
    }
    if request.state == OverrideState::Auto && request.duration.is_some() {
        let detail = "`auto` has no end: omit `for`";
        return problem(StatusCode::BAD_REQUEST, "Invalid duration", detail);
    }
    if !cluster.has_breaker() {
        let detail = format!(
            "{name} has no circuit breaker (`breaker = false`), so forcing it has no effect; configure `breaker` first"
        );
        return problem(StatusCode::CONFLICT, "No circuit breaker", &detail);
    }
    let now = Instant::now();
    let mode = BreakerMode::from(request.state);
    let policy_state = &cluster.upstream.policy_state;
    let until = if mode == BreakerMode::Auto { None } else { now.checked_add(duration) };
    let transition = policy_state.breaker.force(mode, until, now);
    policy_state.record_transition(name, transition);
    // `auto` has no end.
    let forced_for = until.map(|_| tracing::field::debug(duration));
    tracing::info!(
        upstream = name,
        state = mode_word(mode),
        forced_for,
        "circuit breaker forced through the admin server"
    );
    json(StatusCode::OK, &BreakerStatus::of(&cluster, now))
}

fn find(control: &Control, name: &str) -> Option<Arc<Cluster>> {
    let snapshot = control.shared.snapshot.load();
    let configured = snapshot.clusters.iter().find(|cluster| &*cluster.upstream.name == name).cloned();
    configured.or_else(|| {
        let discovered = [&control.shared.unknown_hosts, &control.shared.inbound_addresses];
        discovered
            .into_iter()
            .flat_map(|hosts| hosts.read().0)
            .find(|cluster| &*cluster.upstream.name == name)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_names_one_upstream() {
        assert_eq!(upstream_from_path(&path("payments")), Some("payments"));
        assert_eq!(upstream_from_path("/upstreams/a.example:80/breaker"), Some("a.example:80"));
        for other in
            ["/upstreams//breaker", "/upstreams/a/b/breaker", "/upstreams/a", "/upstreams/breaker", "/"]
        {
            assert_eq!(upstream_from_path(other), None, "{other}");
        }
    }
}
