//! One upstream in `/status`.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use super::{mirror::MirrorStatus, split::SplitStatus, token_status::TokenStatus};
use crate::{
    model::Cluster,
    resilience::breaker::BreakerMode,
    upstream::{Endpoint, EndpointState, Resolution, policy_state::LabeledCounters},
};

/// An upstream, or the service itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UpstreamStatus {
    pub name: String,
    /// The source of its endpoints.
    pub source: String,
    /// `pending`, `ready`, or `failed: WHY`; endpoints from before a failure stay in use.
    pub discovery: String,
    pub endpoints: Vec<EndpointStatus>,
    pub breaker: BreakerStatus,
    /// The retry budget; `None` if retries are off.
    pub budget: Option<BudgetStatus>,
    /// `None` if limits are off: then requests are not counted.
    pub limits: Option<LimitsStatus>,
    /// Retry decisions by outcome; zeros are omitted.
    pub retries: BTreeMap<String, u64>,
    /// Requests rejected by the proxy, by reason; zeros are omitted.
    pub rejected: BTreeMap<String, u64>,
    /// Requests of routes with a cache, by where the response came from; zeros are omitted.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub cache: BTreeMap<String, u64>,
    /// The token for its requests, with `oauth2`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<TokenStatus>,
    /// Its routes whose requests are divided among upstreams.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub splits: Vec<SplitStatus>,
    /// Its routes whose requests are copied to another upstream.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mirrors: Vec<MirrorStatus>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EndpointStatus {
    pub address: String,
    /// The name it was resolved from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    pub weight: u32,
    /// `healthy`, `unhealthy` (active checks), `ejected` (outlier detection) or `absent` (it accepts no connections, or
    /// its sidecar has no service behind it).
    pub state: String,
    /// When an ejected endpoint is restored, in whole seconds, rounded up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub until_in_seconds: Option<u64>,
    /// The share of successful attempts in the last ten seconds, from 0 to 1; `None` without attempts.
    #[serde(default)]
    pub success: Option<f64>,
    /// The last failure: a cause of `docs/errors.md`, or the status of the response.
    #[serde(default)]
    pub last_error: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error_seconds_ago: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BreakerStatus {
    /// `closed`, `half_open` or `open`.
    pub state: String,
    /// `auto`; `open` or `closed` if it is forced; `off` if it is disabled.
    pub mode: String,
    pub since_seconds_ago: u64,
    pub why: String,
    /// When its state changes without further requests, in whole seconds, rounded up.
    pub until_in_seconds: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BudgetStatus {
    /// Retries that are available now.
    pub available: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LimitsStatus {
    pub in_flight: u32,
    /// Requests that wait for a permit.
    pub pending: u32,
    /// The current value, if it is adaptive.
    pub max_requests: u32,
    pub connections: u32,
    pub max_connections: u32,
}

impl UpstreamStatus {
    pub fn of(cluster: &Cluster, now: Instant) -> Self {
        let upstream = &cluster.upstream;
        let set = upstream.endpoints();
        let policy_state = &upstream.policy_state;
        let policy = &cluster.settings.policy;
        Self {
            name: upstream.name.to_string(),
            source: cluster.settings.endpoints.to_string(),
            discovery: match &set.resolution {
                Resolution::Pending => "pending".to_owned(),
                Resolution::Ready => "ready".to_owned(),
                Resolution::Failed(why) => format!("failed: {why}"),
            },
            endpoints: set
                .endpoints
                .iter()
                .map(|endpoint| EndpointStatus::of(endpoint, upstream.state_of(endpoint, now), now))
                .collect(),
            breaker: BreakerStatus::of(cluster, now),
            budget: policy
                .retry
                .as_ref()
                .map(|_| BudgetStatus { available: policy_state.budget.available(now) }),
            limits: policy.limits.as_ref().map(|_| LimitsStatus {
                in_flight: policy_state.requests.in_flight(),
                pending: policy_state.requests.pending(),
                max_requests: policy_state.requests.limit(),
                connections: policy_state.connections.in_use(),
                max_connections: policy_state.connections.limit(),
            }),
            retries: nonzero(&policy_state.counters.retries),
            rejected: nonzero(&policy_state.counters.rejected),
            cache: nonzero(&policy_state.counters.cache),
            token: cluster.token.as_deref().map(TokenStatus::of),
            splits: SplitStatus::all_of(cluster),
            mirrors: MirrorStatus::all_of(cluster),
        }
    }
}

impl EndpointStatus {
    fn of(endpoint: &Endpoint, state: EndpointState, now: Instant) -> Self {
        let last_error = endpoint.outcomes.last_error();
        let ago = last_error.as_ref().map(|error| now.saturating_duration_since(error.at).as_secs());
        Self {
            address: endpoint.address.to_string(),
            host: endpoint.host.as_deref().map(ToOwned::to_owned),
            weight: endpoint.weight(),
            state: state.word().to_owned(),
            until_in_seconds: match state {
                EndpointState::Ejected { until } => Some(seconds_to(until, now)),
                _ => None,
            },
            success: endpoint.outcomes.success_share(now).map(|share| (share * 1000.0).round() / 1000.0),
            last_error: last_error.map(|error| error.reason),
            last_error_seconds_ago: ago,
        }
    }

    /// The success rate and last error as text, if some requests fail; else empty.
    pub fn describe_failures(&self) -> String {
        let mut text = String::new();
        if let Some(success) = self.success.filter(|success| *success < 1.0) {
            // Rounded down, so that 100 % means no failure.
            text.push_str(&format!(", {:.0} % succeed", (success * 100.0).floor()));
            if let Some(error) = &self.last_error {
                text.push_str(&format!(", last error {error}"));
            }
        }
        text
    }
}

impl BreakerStatus {
    pub fn of(cluster: &Cluster, now: Instant) -> Self {
        let report = cluster.upstream.policy_state.breaker.state_report();
        let mode = if cluster.has_breaker() { mode_word(report.mode) } else { "off" };
        Self {
            state: report.state.word().to_owned(),
            mode: mode.to_owned(),
            since_seconds_ago: now.saturating_duration_since(report.since).as_secs(),
            why: report.reason.to_string(),
            until_in_seconds: report.until.map(|until| seconds_to(until, now)),
        }
    }
}

pub const fn mode_word(mode: BreakerMode) -> &'static str {
    match mode {
        BreakerMode::Auto => "auto",
        BreakerMode::Open => "open",
        BreakerMode::Closed => "closed",
    }
}

fn nonzero(tally: &LabeledCounters) -> BTreeMap<String, u64> {
    tally.iter().filter(|(_, count)| *count > 0).map(|(word, count)| (word.to_owned(), count)).collect()
}

/// Rounded up, so that a time in the future is never 0 s away.
fn seconds_to(until: Instant, now: Instant) -> u64 {
    let left = until.saturating_duration_since(now);
    left.as_secs() + u64::from(left > Duration::from_secs(left.as_secs()))
}
