//! What `/status` says of one upstream.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use super::tokens::TokenStatus;
use crate::{
    model::Cluster,
    resilience::breaker::Mode,
    upstream::{Endpoint, EndpointState, Resolution, guards::Tally},
};

/// An upstream, or the service itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UpstreamStatus {
    pub name: String,
    /// Where its endpoints come from.
    pub source: String,
    /// `pending`, `ready`, or `failed: WHY`; what was found before a failure stays in use.
    pub discovery: String,
    pub endpoints: Vec<EndpointStatus>,
    pub breaker: BreakerStatus,
    /// Of retries; none where retries are off.
    pub budget: Option<BudgetStatus>,
    /// None where limits are off: then requests are not counted.
    pub limits: Option<LimitsStatus>,
    /// What followed failed tries, by outcome; only what happened.
    pub retries: BTreeMap<String, u64>,
    /// Calls refused here, by reason; only what happened.
    pub rejected: BTreeMap<String, u64>,
    /// The token that its calls carry, where it has `oauth2`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<TokenStatus>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EndpointStatus {
    pub address: String,
    /// The name it was resolved from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    pub weight: u32,
    /// `healthy`, `unhealthy` (active checks), `ejected` (what calls saw of it) or `absent` (it accepts no connections, or
    /// its sidecar has no service behind it).
    pub state: String,
    /// When an ejected one comes back, in whole seconds, rounded up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub until_in_seconds: Option<u64>,
    /// The share of its attempts in the last ten seconds that went well, from 0 to 1; none where there were none.
    #[serde(default)]
    pub success: Option<f64>,
    /// The last failure: a cause of `docs/errors.md`, or the status that it answered.
    #[serde(default)]
    pub last_error: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error_seconds_ago: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BreakerStatus {
    /// `closed`, `half_open` or `open`.
    pub state: String,
    /// `auto`; `open` or `closed` where it is forced; `off` where the configuration has none.
    pub mode: String,
    pub since_seconds_ago: u64,
    pub why: String,
    /// When it changes by itself, in whole seconds, rounded up.
    pub until_in_seconds: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BudgetStatus {
    /// Retries that would be granted now.
    pub available: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LimitsStatus {
    pub in_flight: u32,
    /// Waiting for a place.
    pub pending: u32,
    /// As it is now, where it is adaptive.
    pub max_requests: u32,
    pub connections: u32,
    pub max_connections: u32,
}

impl UpstreamStatus {
    pub fn of(cluster: &Cluster, now: Instant) -> Self {
        let upstream = &cluster.upstream;
        let set = upstream.endpoints();
        let guards = &upstream.guards;
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
            budget: policy.retry.as_ref().map(|_| BudgetStatus { available: guards.budget.available(now) }),
            limits: policy.limits.as_ref().map(|_| LimitsStatus {
                in_flight: guards.requests.in_flight(),
                pending: guards.requests.pending(),
                max_requests: guards.requests.limit(),
                connections: guards.connections.taken(),
                max_connections: guards.connections.limit(),
            }),
            retries: happened(&guards.counts.retries),
            rejected: happened(&guards.counts.rejected),
            token: cluster.token.as_deref().map(TokenStatus::of),
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
            last_error: last_error.map(|error| error.word),
            last_error_seconds_ago: ago,
        }
    }

    /// How requests fare, in words, where some fail; else empty.
    pub fn failures_in_words(&self) -> String {
        let mut text = String::new();
        if let Some(success) = self.success.filter(|success| *success < 1.0) {
            // Rounded down, so that only what never fails shows 100 %.
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
        let report = cluster.upstream.guards.breaker.report_state();
        let mode = if cluster.has_breaker() { mode_word(report.mode) } else { "off" };
        Self {
            state: report.state.word().to_owned(),
            mode: mode.to_owned(),
            since_seconds_ago: now.saturating_duration_since(report.since).as_secs(),
            why: report.why.to_string(),
            until_in_seconds: report.until.map(|until| seconds_to(until, now)),
        }
    }
}

pub const fn mode_word(mode: Mode) -> &'static str {
    match mode {
        Mode::Auto => "auto",
        Mode::Open => "open",
        Mode::Closed => "closed",
    }
}

fn happened(tally: &Tally) -> BTreeMap<String, u64> {
    tally.read().filter(|(_, count)| *count > 0).map(|(word, count)| (word.to_owned(), count)).collect()
}

/// Rounded up: what has not come yet is not 0 away.
fn seconds_to(until: Instant, now: Instant) -> u64 {
    let left = until.saturating_duration_since(now);
    left.as_secs() + u64::from(left > Duration::from_secs(left.as_secs()))
}
