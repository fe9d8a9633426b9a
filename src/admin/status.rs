//! What `GET /status` says and `outrigger status` shows.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use serde::{Deserialize, Serialize};

use super::{tokens::KeysStatus, upstreams::UpstreamStatus};
use crate::{
    config::{AccessLog, Telemetry},
    identity::{Date, material, store::Report},
    model::{Cluster, Snapshot},
    proxy::{
        connect::may_be_reached,
        worker::{Phase, Shared},
    },
    runtime::lifecycle::Control,
    telemetry::{
        calls::Calls,
        metrics::{Connections, Way, Ways, WorkerLoad},
        record::Record,
        traces::Traces,
        verdict::Kind,
    },
    upstream::Resolution,
};

/// Calls that are shown of those that did not go well.
const SHOWN_CALLS: usize = 5;
/// Unknown hosts that are shown in full, and addresses of the service.
const SHOWN_HOSTS: usize = 50;
/// Names that lead nowhere: enough to see a misspelt one, too few to fill a screen with what callers make up.
const SHOWN_NOT_FOUND: usize = 5;

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
    /// Why it is not ready, where it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_ready: Option<String>,
    /// Whether the service listens; none where the sidecar was not told of one (`run -- CMD`, `--app`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_port: Option<ServicePortStatus>,
    pub config: ConfigStatus,
    pub listeners: Listeners,
    /// Who this service is; none where it has no certificate to be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<IdentityStatus>,
    /// What tokens of callers are checked by; none where none are asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jwt: Option<KeysStatus>,
    /// Of callers, and of the service itself.
    pub connections: BTreeMap<String, ConnectionCounts>,
    /// In the order of their threads. A new connection goes to the one that was least busy of late.
    #[serde(default)]
    pub workers: Vec<WorkerStatus>,
    /// What went through, by way in: `inbound`, `proxy`, `host`, `redirect`, `listen`.
    pub ways: BTreeMap<String, WayStatus>,
    /// Where spans go; none where nothing is exported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traces: Option<TracesStatus>,
    /// Where inbound calls go.
    pub inbound: UpstreamStatus,
    /// Where redirected ones go: each address that they called has limits and a breaker of its own.
    #[serde(default)]
    pub inbound_addresses: AddressesStatus,
    pub upstreams: Vec<UpstreamStatus>,
    pub unknown: UnknownStatus,
    #[serde(default)]
    pub access_log: AccessLogStatus,
    /// The last calls that failed or took more than one try, the latest first; `GET /requests` has more of them.
    #[serde(default)]
    pub trouble: Vec<Trouble>,
}

/// Lines of the access log since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccessLogStatus {
    /// `off`, `errors` or `all`.
    pub mode: String,
    pub written: u64,
    /// Lost, as they were not read fast enough.
    pub dropped: u64,
    /// Lost, as they could not be written.
    pub failed: u64,
}

/// A call that did not go well.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trouble {
    pub ended_seconds_ago: u64,
    pub direction: String,
    pub method: String,
    pub upstream: Option<String>,
    /// None: there was no answer.
    pub status: Option<u16>,
    pub attempts: u32,
    pub trace_id: String,
    pub why: Option<String>,
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
    /// Where the token is that changes need.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub admin_token_file: Option<PathBuf>,
}

/// The port of the service beside this sidecar.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServicePortStatus {
    /// `inbound.forward_to`.
    pub address: String,
    /// It has accepted a connection since the start.
    pub accepts: bool,
}

/// The certificate of this service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdentityStatus {
    /// Its SPIFFE ID, or DNS name; none while there is no valid certificate.
    pub id: Option<String>,
    /// What expires first, of each kind: leaf, intermediate, root, crl.
    pub expires: BTreeMap<String, String>,
    /// New certificates and roots that were taken since the start, and that were refused.
    pub accepted: u64,
    pub refused: u64,
    /// Why the newest files are refused; what was valid before holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl IdentityStatus {
    fn of(report: Report) -> Option<Self> {
        let soonest = |kind: material::Kind| {
            let of_kind = report.expiries.iter().filter(|expiry| expiry.kind == kind);
            Some((kind.word().to_owned(), Date(of_kind.map(|expiry| expiry.at).min()?).to_string()))
        };
        report.configured.then(|| Self {
            expires: material::Kind::ALL.into_iter().filter_map(soonest).collect(),
            id: report.id,
            accepted: report.accepted,
            refused: report.refusals,
            error: report.refused,
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionCounts {
    pub open: u64,
    pub total: u64,
}

/// What one worker has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerStatus {
    /// Callers' connections that it serves now.
    pub connections: usize,
    /// Milliseconds that it was busy since the start.
    pub busy_ms: u64,
}

/// The way of spans to the collector.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TracesStatus {
    /// The collector's URL, and the protocol.
    pub to: String,
    /// Share of the traces that begin here.
    pub sample: f64,
    pub sample_errors: bool,
    /// Calls that wait to be sent, and how many may.
    pub waiting: usize,
    pub queue: usize,
    /// Spans by what became of them: `exported`, `queue_full`, `failed`.
    pub spans: BTreeMap<String, u64>,
    /// Why the last batch was not taken, and when; none where it was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failed_seconds_ago: Option<u64>,
}

/// What came in by one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WayStatus {
    /// Calls; and connections that carried bytes.
    pub count: u64,
    pub last_seconds_ago: Option<u64>,
}

/// Addresses of the service that redirected calls went to of late.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AddressesStatus {
    /// How many are known now.
    pub known: usize,
    /// Those that were called last.
    pub addresses: Vec<UpstreamStatus>,
}

/// Hosts that no upstream names, met since the start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UnknownStatus {
    /// How many are known now.
    pub known: usize,
    /// Those that were used last.
    pub hosts: Vec<UpstreamStatus>,
    /// Names that calls asked for and that lead nowhere.
    #[serde(default)]
    pub not_found: NotFound,
}

/// Names without an address: asked for in the last five minutes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotFound {
    /// How many there are.
    pub count: usize,
    /// Why, for each of those that were asked for last.
    pub last: Vec<String>,
}

impl Status {
    pub fn of(control: &Control) -> Self {
        let now = Instant::now();
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
            service_port: control.service_port.accepts().map(|accepts| ServicePortStatus {
                address: snapshot.config.inbound.forward_to.to_string(),
                accepts,
            }),
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
                admin_token_file: admin.and_then(|at| at.token_file.clone()),
            },
            identity: IdentityStatus::of(control.shared.identity.report()),
            jwt: KeysStatus::of(&snapshot),
            connections: [("inbound", &metrics.inbound), ("outbound", &metrics.outbound)]
                .map(|(direction, connections)| (direction.to_owned(), ConnectionCounts::of(connections)))
                .into(),
            workers: metrics.workers.iter().map(WorkerStatus::of).collect(),
            ways: Way::ALL.map(|way| (way.word().to_owned(), WayStatus::of(&metrics.ways, way, now))).into(),
            traces: TracesStatus::of(&control.shared.traces, &snapshot.config.telemetry),
            inbound: UpstreamStatus::of(&snapshot.inbound, now),
            inbound_addresses: AddressesStatus::of(&control.shared, now),
            upstreams: snapshot.clusters.iter().map(|cluster| UpstreamStatus::of(cluster, now)).collect(),
            unknown: UnknownStatus::of(&control.shared, &snapshot, now),
            access_log: AccessLogStatus::of(&control.shared.calls, snapshot.config.telemetry.access_log),
            trouble: Trouble::last(&control.shared.calls),
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

impl WorkerStatus {
    fn of(load: &WorkerLoad) -> Self {
        Self {
            connections: load.connections.load(Ordering::Relaxed),
            busy_ms: u64::try_from(load.busy().as_millis()).unwrap_or(u64::MAX),
        }
    }
}

impl TracesStatus {
    fn of(traces: &Traces, telemetry: &Telemetry) -> Option<Self> {
        let export = traces.export()?;
        let (waiting, queue) = export.waiting();
        let failed = export.state.last_error();
        Some(Self {
            to: export.destination.to_string(),
            sample: *telemetry.sample,
            sample_errors: telemetry.sample_errors,
            waiting,
            queue,
            spans: export.state.counts.read().map(|(word, count)| (word.to_owned(), count)).into(),
            failed_seconds_ago: failed.as_ref().map(|(_, ago)| ago.as_secs()),
            last_error: failed.map(|(error, _)| error),
        })
    }
}

impl AccessLogStatus {
    fn of(calls: &Calls, mode: AccessLog) -> Self {
        let lines = calls.access_log.lines();
        Self {
            mode: mode.word().to_owned(),
            written: lines.written.load(Ordering::Relaxed),
            dropped: lines.dropped.load(Ordering::Relaxed),
            failed: lines.failed.load(Ordering::Relaxed),
        }
    }
}

impl Trouble {
    fn last(calls: &Calls) -> Vec<Self> {
        let calls = calls.requests.read();
        calls
            .iter()
            .filter(|record| record.kind() != Kind::Slow)
            .take(SHOWN_CALLS)
            .map(|r| Self::of(r))
            .collect()
    }

    fn of(record: &Record) -> Self {
        Self {
            ended_seconds_ago: record.ended.map_or(0, |ended| ended.elapsed().as_secs()),
            direction: record.direction().to_owned(),
            method: record.method.to_string(),
            upstream: record.upstream().map(ToOwned::to_owned),
            status: record.status.map(|status| status.as_u16()),
            attempts: record.tries.made(),
            trace_id: record.context.trace.to_string(),
            why: record.why(),
        }
    }
}

impl WayStatus {
    fn of(ways: &Ways, way: Way, now: Instant) -> Self {
        let (count, last) = ways.read(way, now);
        Self { count, last_seconds_ago: last.map(|ago| ago.as_secs()) }
    }
}

impl AddressesStatus {
    fn of(shared: &Shared, now: Instant) -> Self {
        let known = shared.inbound_addresses.read().0;
        let shown = known.iter().take(SHOWN_HOSTS).map(|cluster| UpstreamStatus::of(cluster, now));
        Self { known: known.len(), addresses: shown.collect() }
    }
}

impl UnknownStatus {
    /// Hosts are those that a call can have reached; names that lead nowhere are told apart from them.
    fn of(shared: &Shared, snapshot: &Snapshot, now: Instant) -> Self {
        let reached = |cluster: &Arc<Cluster>| {
            let set = cluster.upstream.endpoints();
            set.endpoints.iter().any(|endpoint| may_be_reached(shared, snapshot, cluster, endpoint.address))
        };
        let (known, others): (Vec<_>, Vec<_>) = shared.unknown.read().0.into_iter().partition(reached);
        let shown = known.iter().take(SHOWN_HOSTS).map(|cluster| UpstreamStatus::of(cluster, now));
        Self { known: known.len(), hosts: shown.collect(), not_found: NotFound::of(&others) }
    }
}

impl NotFound {
    fn of(clusters: &[Arc<Cluster>]) -> Self {
        let why = |cluster: &Arc<Cluster>| {
            let set = cluster.upstream.endpoints();
            match &set.resolution {
                Resolution::Failed(error) if set.endpoints.is_empty() => Some(error.to_string()),
                _ => None,
            }
        };
        let mut all = clusters.iter().filter_map(why);
        let last: Vec<_> = all.by_ref().take(SHOWN_NOT_FOUND).collect();
        Self { count: last.len() + all.count(), last }
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
