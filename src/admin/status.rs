//! The document of `GET /status`, which `outrigger status` shows.

mod hosts;
mod reporting;

use std::{collections::BTreeMap, path::PathBuf, sync::atomic::Ordering, time::Instant};

use serde::{Deserialize, Serialize};

pub use self::{
    hosts::{ServiceAddressesStatus, UnknownHostsStatus, UnresolvedNames},
    reporting::{AccessLogStatus, TracesStatus, TroubledRequest},
};
use super::{
    cache::CacheStatus,
    queues::{self, QueueStatus, StoreReport},
    token_status::JwksStatus,
    upstreams::UpstreamStatus,
};
use crate::{
    identity::{Date, material, store::IdentityReport},
    proxy::worker::Phase,
    runtime::lifecycle::Control,
    telemetry::metrics::{ConnectionCounters, EntryPoint, EntryPoints, WorkerLoad},
};

/// The state of a running sidecar.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub service: String,
    pub build: Build,
    pub pid: u32,
    pub uptime_seconds: u64,
    /// `running`, `leaving`, `draining_inbound` or `draining_all`.
    pub phase: String,
    pub ready: bool,
    /// Why it is not ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_ready: Option<String>,
    /// Whether the service listens; absent if no service is configured (`run -- CMD`, `--app`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_port: Option<ServicePortStatus>,
    pub config: ConfigStatus,
    pub listeners: Listeners,
    /// The identity of this service; absent without `[identity]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<IdentityStatus>,
    /// The keys that verify tokens of clients; absent without `[inbound.jwt]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jwt: Option<JwksStatus>,
    /// Connections from clients (`inbound`) and from the service (`outbound`).
    pub connections: BTreeMap<String, ConnectionCounts>,
    /// In the order of their threads. A new connection goes to the one that was least busy recently.
    #[serde(default)]
    pub workers: Vec<WorkerStatus>,
    /// Requests and byte streams by entry point: `inbound`, `proxy`, `host`, `redirect`, `listen`.
    pub ways: BTreeMap<String, EntryPointStatus>,
    /// The export of spans; absent if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traces: Option<TracesStatus>,
    /// The service, as the destination of inbound requests.
    pub inbound: UpstreamStatus,
    /// The service's addresses for redirected requests: each original destination has its own limits and breaker.
    #[serde(default)]
    pub inbound_addresses: ServiceAddressesStatus,
    pub upstreams: Vec<UpstreamStatus>,
    pub unknown: UnknownHostsStatus,
    /// Empty without `[store]`.
    #[serde(default)]
    pub queues: Vec<QueueStatus>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store: Option<StoreReport>,
    #[serde(default)]
    pub access_log: AccessLogStatus,
    /// Stored responses; absent if no route has a cache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheStatus>,
    /// The last requests that failed or needed more than one attempt, the latest first; `GET /requests` has more.
    #[serde(default)]
    pub trouble: Vec<TroubledRequest>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Build {
    pub version: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigStatus {
    pub files: Vec<PathBuf>,
    pub loaded_seconds_ago: u64,
    /// Changes applied and changes rejected since startup.
    pub reloads: u64,
    pub refused: u64,
    /// Why the current files were rejected; the last good configuration stays in use.
    pub rejected: Option<String>,
    /// Changed keys that take effect only after a restart.
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
    /// The file with the admin token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub admin_token_file: Option<PathBuf>,
}

/// The port of the service beside this sidecar.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServicePortStatus {
    /// `inbound.forward_to`.
    pub address: String,
    /// Whether it has accepted a connection since startup.
    pub accepts: bool,
}

/// The certificate of this service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdentityStatus {
    /// Its SPIFFE ID or DNS name; `None` while there is no valid certificate.
    pub id: Option<String>,
    /// The earliest expiry of each kind: leaf, intermediate, root, crl.
    pub expires: BTreeMap<String, String>,
    /// Updates of certificates and roots accepted and rejected since startup.
    pub accepted: u64,
    pub refused: u64,
    /// Why the newest files were rejected; the previous ones stay in use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl IdentityStatus {
    fn of(report: IdentityReport) -> Option<Self> {
        let soonest = |kind: material::ExpiryKind| {
            let of_kind = report.expiries.iter().filter(|expiry| expiry.kind == kind);
            Some((kind.word().to_owned(), Date(of_kind.map(|expiry| expiry.not_after).min()?).to_string()))
        };
        report.configured.then(|| Self {
            expires: material::ExpiryKind::ALL.into_iter().filter_map(soonest).collect(),
            id: report.id,
            accepted: report.accepted,
            refused: report.rejections,
            error: report.rejection,
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionCounts {
    pub open: u64,
    pub total: u64,
}

/// The load of one worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerStatus {
    /// Client connections that it serves now.
    pub connections: usize,
    /// Milliseconds that it was busy since startup.
    pub busy_ms: u64,
}

/// The traffic of one entry point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntryPointStatus {
    /// Requests and byte streams.
    pub count: u64,
    pub last_seconds_ago: Option<u64>,
}

impl Status {
    pub fn of(control: &Control) -> Self {
        let now = Instant::now();
        let snapshot = control.shared.snapshot.load();
        let reloads = control.reloads.state();
        let not_ready = control.not_ready();
        let admin = control.admin.get();
        let metrics = &control.shared.metrics;
        let to_strings =
            |addresses: &[std::net::SocketAddr]| addresses.iter().map(ToString::to_string).collect();
        let (queues, store) = queues::status(&control.shared);
        Self {
            service: snapshot.config.service.name.clone(),
            build: Build { version: env!("CARGO_PKG_VERSION").to_owned() },
            pid: std::process::id(),
            uptime_seconds: control.started.elapsed().as_secs(),
            phase: phase_word(control.phase()).to_owned(),
            ready: not_ready.is_none(),
            not_ready: not_ready.map(ToOwned::to_owned),
            service_port: control.service_port.accepts().map(|accepts| ServicePortStatus {
                address: snapshot.config.inbound.forward_to.to_string(),
                accepts,
            }),
            config: ConfigStatus {
                files: reloads.files,
                loaded_seconds_ago: reloads.loaded.elapsed().as_secs(),
                reloads: reloads.accepted_count,
                refused: reloads.rejected_count,
                rejected: reloads.rejection,
                restart_needed: reloads.restart_needed,
            },
            listeners: Listeners {
                outbound: to_strings(&control.addresses.outbound),
                inbound: to_strings(&control.addresses.inbound),
                upstreams: control
                    .addresses
                    .upstreams
                    .iter()
                    .map(|(name, addresses)| (name.clone(), to_strings(addresses)))
                    .collect(),
                admin: admin.map(|at| at.admin.clone()).unwrap_or_default(),
                probe: admin.and_then(|at| at.probe.clone()),
                admin_token_file: admin.and_then(|at| at.token_file.clone()),
            },
            identity: IdentityStatus::of(control.shared.identity.report()),
            jwt: JwksStatus::of(&snapshot),
            connections: [("inbound", &metrics.inbound), ("outbound", &metrics.outbound)]
                .map(|(direction, connections)| (direction.to_owned(), ConnectionCounts::of(connections)))
                .into(),
            workers: metrics.workers.iter().map(WorkerStatus::of).collect(),
            ways: EntryPoint::ALL
                .map(|way| (way.word().to_owned(), EntryPointStatus::of(&metrics.entry_points, way, now)))
                .into(),
            traces: TracesStatus::of(&control.shared.traces, &snapshot.config.telemetry),
            inbound: UpstreamStatus::of(&snapshot.inbound, now),
            inbound_addresses: ServiceAddressesStatus::of(&control.shared, now),
            upstreams: snapshot.clusters.iter().map(|cluster| UpstreamStatus::of(cluster, now)).collect(),
            unknown: UnknownHostsStatus::of(&control.shared, &snapshot, now),
            queues,
            store,
            access_log: AccessLogStatus::of(
                &control.shared.request_telemetry,
                snapshot.config.telemetry.access_log,
            ),
            cache: snapshot.cache.as_deref().map(CacheStatus::of),
            trouble: TroubledRequest::last(&control.shared.request_telemetry),
        }
    }
}

impl ConnectionCounts {
    fn of(connections: &ConnectionCounters) -> Self {
        Self {
            open: u64::try_from(connections.open.load(Ordering::Relaxed)).unwrap_or(0),
            total: connections.total.load(Ordering::Relaxed),
        }
    }
}

impl WorkerStatus {
    fn of(load: &WorkerLoad) -> Self {
        Self {
            connections: load.connections.load(Ordering::Relaxed),
            busy_ms: u64::try_from(load.busy().as_millis()).unwrap_or(u64::MAX),
        }
    }
}

impl EntryPointStatus {
    fn of(ways: &EntryPoints, way: EntryPoint, now: Instant) -> Self {
        let (count, last) = ways.read(way, now);
        Self { count, last_seconds_ago: last.map(|ago| ago.as_secs()) }
    }
}

const fn phase_word(phase: Phase) -> &'static str {
    match phase {
        Phase::Running => "running",
        Phase::DrainDelay => "leaving",
        Phase::DrainingInbound => "draining_inbound",
        Phase::DrainingAll => "draining_all",
    }
}
