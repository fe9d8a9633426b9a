//! What `GET /status` says and `outrigger status` shows.

use std::{collections::BTreeMap, path::PathBuf, sync::atomic::Ordering};

use serde::{Deserialize, Serialize};

use crate::{
    runtime::{Phase, lifecycle::Control},
    telemetry::metrics::Connections,
    upstream::{Resolution, Upstream},
};

/// The state of a running sidecar.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    pub service: String,
    pub build: Build,
    pub pid: u32,
    pub uptime_seconds: u64,
    /// `running`, `leaving`, `draining_inbound` or `draining_all`.
    pub phase: String,
    pub ready: bool,
    /// Why it is not ready, where it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_ready: Option<String>,
    pub config: ConfigStatus,
    pub listeners: Listeners,
    pub connections: BTreeMap<String, ConnectionCounts>,
    /// Where inbound calls go.
    pub inbound: UpstreamStatus,
    pub upstreams: Vec<UpstreamStatus>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Build {
    pub version: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigStatus {
    pub files: Vec<PathBuf>,
    pub loaded_seconds_ago: u64,
    /// Changes that took effect since the start, and that were refused.
    pub reloads: u64,
    pub refused: u64,
    /// Why the files as they are now were refused; what was valid before holds.
    pub rejected: Option<String>,
    /// Keys that act after a restart only.
    pub restart_needed: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listeners {
    pub outbound: Vec<String>,
    pub inbound: Vec<String>,
    pub upstreams: BTreeMap<String, Vec<String>>,
    pub admin: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probe: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionCounts {
    pub open: u64,
    pub total: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpstreamStatus {
    pub name: String,
    /// Where its endpoints come from.
    pub source: String,
    /// `pending`, `ready`, or `failed: WHY`; what was found before a failure stays in use.
    pub discovery: String,
    pub endpoints: Vec<EndpointStatus>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointStatus {
    pub address: String,
    /// The name it was resolved from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    pub weight: u32,
    /// `healthy` or `unhealthy`, by active checks.
    pub state: String,
}

impl Status {
    pub fn of(control: &Control) -> Self {
        let snapshot = control.shared.snapshot.load();
        let reloads = control.reloads.state();
        let not_ready = control.not_ready();
        let admin = control.admin.get();
        let metrics = &control.shared.metrics;
        let all = |addresses: &[std::net::SocketAddr]| addresses.iter().map(ToString::to_string).collect();
        Self {
            service: snapshot.config.service.name.clone(),
            build: Build { version: env!("CARGO_PKG_VERSION").to_owned() },
            pid: std::process::id(),
            uptime_seconds: control.started.elapsed().as_secs(),
            phase: phase_word(control.phase()).to_owned(),
            ready: not_ready.is_none(),
            not_ready: not_ready.map(ToOwned::to_owned),
            config: ConfigStatus {
                files: reloads.files,
                loaded_seconds_ago: reloads.loaded.elapsed().as_secs(),
                reloads: reloads.accepted,
                refused: reloads.refused,
                rejected: reloads.rejected,
                restart_needed: reloads.restart_needed,
            },
            listeners: Listeners {
                outbound: all(&control.addresses.outbound),
                inbound: all(&control.addresses.inbound),
                upstreams: control
                    .addresses
                    .upstreams
                    .iter()
                    .map(|(name, addresses)| (name.clone(), all(addresses)))
                    .collect(),
                admin: admin.map(|at| at.admin.clone()).unwrap_or_default(),
                probe: admin.and_then(|at| at.probe.clone()),
            },
            connections: [("inbound", &metrics.inbound), ("outbound", &metrics.outbound)]
                .map(|(direction, connections)| (direction.to_owned(), ConnectionCounts::of(connections)))
                .into(),
            inbound: UpstreamStatus::of(&snapshot.inbound.upstream, &snapshot.inbound.settings.endpoints),
            upstreams: snapshot
                .clusters
                .iter()
                .map(|cluster| UpstreamStatus::of(&cluster.upstream, &cluster.settings.endpoints))
                .collect(),
        }
    }
}

impl ConnectionCounts {
    fn of(connections: &Connections) -> Self {
        Self {
            open: u64::try_from(connections.open.load(Ordering::Relaxed)).unwrap_or(0),
            total: connections.total.load(Ordering::Relaxed),
        }
    }
}

impl UpstreamStatus {
    fn of(upstream: &Upstream, source: &crate::config::Endpoints) -> Self {
        let set = upstream.endpoints();
        Self {
            name: upstream.name.to_string(),
            source: source.to_string(),
            discovery: match &set.resolution {
                Resolution::Pending => "pending".to_owned(),
                Resolution::Ready => "ready".to_owned(),
                Resolution::Failed(why) => format!("failed: {why}"),
            },
            endpoints: set
                .endpoints
                .iter()
                .map(|endpoint| EndpointStatus {
                    address: endpoint.address.to_string(),
                    host: endpoint.host.as_deref().map(ToOwned::to_owned),
                    weight: endpoint.weight(),
                    state: if endpoint.is_healthy() { "healthy" } else { "unhealthy" }.to_owned(),
                })
                .collect(),
        }
    }
}

const fn phase_word(phase: Phase) -> &'static str {
    match phase {
        Phase::Running => "running",
        Phase::Leaving => "leaving",
        Phase::DrainingInbound => "draining_inbound",
        Phase::DrainingAll => "draining_all",
    }
}
