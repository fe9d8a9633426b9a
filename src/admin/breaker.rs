//! `POST /upstreams/NAME/breaker`: forces a circuit breaker, for a while.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use http::StatusCode;
use serde::{Deserialize, Serialize};

use super::{
    api::{Answer, json, problem},
    upstreams::{BreakerStatus, mode_word},
};
use crate::{model::Cluster, resilience::breaker::Mode, runtime::lifecycle::Control, units::HumanDuration};

/// How long a forced state holds where the request does not say. It always ends: what somebody forced at night must
/// not be found out weeks later.
pub const DEFAULT_FOR: Duration = Duration::from_secs(3600);
/// The longest that a state can be forced for.
const LONGEST: Duration = Duration::from_secs(30 * 86_400);

/// What the body asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wish {
    pub state: WishedState,
    #[serde(rename = "for", default, skip_serializing_if = "Option::is_none")]
    pub duration: Option<HumanDuration>,
}

impl Wish {
    pub fn to_json(self) -> String {
        // Two plain values: this cannot fail.
        serde_json::to_string(&self).unwrap_or_default()
    }
}

/// `auto` gives the decision back to the breaker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum WishedState {
    /// Nothing goes through
    Open,
    /// Everything goes through
    Closed,
    /// The breaker decides again
    Auto,
}

impl From<WishedState> for Mode {
    fn from(state: WishedState) -> Self {
        match state {
            WishedState::Open => Self::Open,
            WishedState::Closed => Self::Closed,
            WishedState::Auto => Self::Auto,
        }
    }
}

/// Where the breaker of an upstream is set. Names hold no character that a path could not.
pub fn path(name: &str) -> String {
    format!("/upstreams/{name}/breaker")
}

/// The upstream that a path like `/upstreams/NAME/breaker` names.
pub fn upstream_in(path: &str) -> Option<&str> {
    let name = path.strip_prefix("/upstreams/")?.strip_suffix("/breaker")?;
    (!name.is_empty() && !name.contains('/')).then_some(name)
}

/// Forces the breaker of the upstream `name`, or of a host or an address of the service met at run time.
pub fn force(control: &Control, name: &str, body: &[u8]) -> Answer {
    let Some(cluster) = find(control, name) else {
        let snapshot = control.shared.snapshot.load();
        let names: Vec<&str> = snapshot.clusters.iter().map(|cluster| &*cluster.upstream.name).collect();
        let there = if names.is_empty() { "none is configured".to_owned() } else { names.join(", ") };
        let detail = format!("there is no upstream `{name}`; there is: {there}");
        return problem(StatusCode::NOT_FOUND, "No such upstream", &detail);
    };
    let wish: Wish = match serde_json::from_slice(body) {
        Ok(wish) => wish,
        Err(error) => {
            let detail = format!(
                "{error}; send e.g. {{\"state\":\"open\",\"for\":\"1h\"}}, with state one of open, closed, auto"
            );
            return problem(StatusCode::BAD_REQUEST, "Not a breaker's state", &detail);
        }
    };
    let duration = wish.duration.map_or(DEFAULT_FOR, |duration| duration.0);
    if duration.is_zero() || duration > LONGEST {
        let detail = "`for` must be more than 0 and at most 30d: what is forced falls back by itself";
        return problem(StatusCode::BAD_REQUEST, "Not a time to force a breaker for", detail);
    }
    if wish.state == WishedState::Auto && wish.duration.is_some() {
        let detail = "`auto` has no end: leave `for` out";
        return problem(StatusCode::BAD_REQUEST, "Not a time to force a breaker for", detail);
    }
    if !cluster.has_breaker() {
        let detail = format!(
            "{name} has no circuit breaker (`breaker = false`), so nothing would heed it; give it one in the configuration first"
        );
        return problem(StatusCode::CONFLICT, "No circuit breaker", &detail);
    }
    let now = Instant::now();
    let mode = Mode::from(wish.state);
    let guards = &cluster.upstream.guards;
    let until = if mode == Mode::Auto { None } else { now.checked_add(duration) };
    let transition = guards.breaker.force(mode, until, now);
    guards.note(name, transition);
    // Nothing ends what is not forced.
    let forced_for = until.map(|_| tracing::field::debug(duration));
    tracing::info!(upstream = name, state = mode_word(mode), forced_for, "a circuit breaker was set by hand");
    json(StatusCode::OK, &BreakerStatus::of(&cluster, now))
}

fn find(control: &Control, name: &str) -> Option<Arc<Cluster>> {
    let snapshot = control.shared.snapshot.load();
    let configured = snapshot.clusters.iter().find(|cluster| &*cluster.upstream.name == name).cloned();
    configured.or_else(|| {
        let met = [&control.shared.unknown, &control.shared.inbound_addresses];
        met.into_iter().flat_map(|hosts| hosts.read().0).find(|cluster| &*cluster.upstream.name == name)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_names_one_upstream() {
        assert_eq!(upstream_in(&path("payments")), Some("payments"));
        assert_eq!(upstream_in("/upstreams/a.example:80/breaker"), Some("a.example:80"));
        for other in
            ["/upstreams//breaker", "/upstreams/a/b/breaker", "/upstreams/a", "/upstreams/breaker", "/"]
        {
            assert_eq!(upstream_in(other), None, "{other}");
        }
    }
}
