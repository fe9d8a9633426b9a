//! The threads of the process, and the state that they share.
//!
//! N workers, each a thread with a single-threaded runtime, serve the requests. The thread that calls [`start`] is the
//! control thread: discovery, health checks, admin, reload, signals. Nothing slow runs on a worker.

pub mod cgroup;
pub mod child;
pub mod failure;
pub mod lifecycle;
pub mod ready_file;
pub mod reload;
pub mod service_env;
pub mod service_port;
pub mod signals;
mod workers;

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwap;
use tokio::{
    runtime::Handle,
    sync::watch,
    time::{Instant, timeout_at},
};

use crate::{
    config::Config,
    descriptors,
    dns::Resolver,
    identity::{store::IdentityStore, workload},
    model::{
        Clusters, Side,
        unknown::{HostDirection, UnknownHosts},
    },
    proxy::{
        accept::{ListenError, Listener},
        exhausted_traces::ExhaustedTraces,
        interception::Interception,
        queue::Queues,
        worker::{OwnAddresses, Phase, Shared},
    },
    queue::store::{Store, StoreError},
    rng::Rng,
    telemetry::{metrics::Metrics, traces::Traces},
    unix_time::SteadyClock,
    watch::{Watcher, watch},
};
use failure::{CriticalFailure, FailureMonitor};

const TICK: Duration = Duration::from_millis(500);

/// The bound addresses of the listeners.
#[derive(Clone, Debug, Default)]
pub struct Addresses {
    pub outbound: Vec<SocketAddr>,
    pub inbound: Vec<SocketAddr>,
    /// By upstream name.
    pub upstreams: Vec<(String, Vec<SocketAddr>)>,
}

/// Why the proxy could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error("cannot start a worker thread: {0}")]
    Worker(std::io::Error),
    #[error("cannot read the system's DNS settings: {0}")]
    Resolver(String),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A running proxy. Created and used on the control thread.
#[derive(Debug)]
pub struct Proxy {
    pub shared: Arc<Shared>,
    pub addresses: Addresses,
    clusters: Mutex<Clusters>,
    /// Watches the certificate files, where there are any.
    certificates: Mutex<Option<(Vec<PathBuf>, Watcher)>>,
    /// Follows the agent of the Workload API.
    agent: Mutex<Option<(String, AbortOnDrop)>>,
    workers: workers::Workers,
    ticking: tokio::task::JoinHandle<()>,
    /// Failures of the threads and tasks that must live as long as the process.
    pub failures: FailureMonitor,
}

/// Aborts its task when it is dropped.
#[derive(Debug)]
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Binds the listeners and starts workers, discovery and health checks. Call it inside the control runtime, which runs
/// discovery. `worker_count` is the number of data-plane threads, at least 1.
pub fn start(
    config: Arc<Config>,
    identity: Arc<IdentityStore>,
    worker_count: u16,
) -> Result<Proxy, StartError> {
    let resolver = Arc::new(Resolver::from_system().map_err(|e| StartError::Resolver(e.to_string()))?);
    let worker_count = worker_count.max(1);
    let (clusters, snapshot) =
        Clusters::build(Arc::clone(&config), Arc::clone(&resolver), Arc::clone(&identity));
    let queues = match &config.store {
        // The thread ends with the last handle; what it has committed is on the disk.
        Some(settings) => Some(Arc::new(Queues::new(Store::open(settings, SteadyClock::default())?.0))),
        None => None,
    };
    let instance = format!("{:08x}", Rng::new().next_u64() >> 32);
    let shared = Arc::new(Shared {
        snapshot: ArcSwap::from_pointee(snapshot),
        metrics: Metrics::new(worker_count),
        request_telemetry: Arc::default(),
        phase: watch::Sender::new(Phase::Running),
        own_addresses: OwnAddresses::default(),
        unknown_hosts: UnknownHosts::new(Arc::clone(&resolver), HostDirection::Outbound),
        inbound_addresses: UnknownHosts::new(resolver, HostDirection::Inbound),
        interception: Interception::default(),
        spent_traces: ExhaustedTraces::default(),
        traces: Traces::start(&config, &instance),
        identity,
        queues,
        instance,
        control_runtime: Handle::current(),
    });

    let mut listeners = Vec::new();
    let mut addresses = Addresses::default();
    let listener = Listener::bind(Side::Inbound, &config.inbound.listen)?;
    addresses.inbound = listener.addresses();
    listeners.push(listener);
    let listener = Listener::bind(Side::Outbound, &config.outbound.listen)?;
    addresses.outbound = listener.addresses();
    listeners.push(listener);
    for upstream in &config.upstreams {
        if let Some(listen) = &upstream.listen {
            let listener = Listener::bind(Side::Upstream(upstream.name.as_str().into()), listen)?;
            addresses.upstreams.push((upstream.name.clone(), listener.addresses()));
            listeners.push(listener);
        }
    }
    for listener in &listeners {
        shared.own_addresses.add(&listener.addresses());
    }

    let failures = FailureMonitor::default();
    let workers = workers::start(&shared, listeners, worker_count, failures.clone())?;
    let guard = failures.guard("tick");
    let ticks = tick(Arc::clone(&shared));
    let ticking = tokio::spawn(async move {
        let _guard = guard;
        ticks.await;
    });
    let proxy = Proxy {
        shared,
        addresses,
        clusters: Mutex::new(clusters),
        certificates: Mutex::default(),
        agent: Mutex::default(),
        workers,
        ticking,
        failures,
    };
    proxy.watch_certificates();
    Ok(proxy)
}

/// Does periodically what must also happen without requests: a forced breaker falls back to auto after its time, and
/// idle unknown hosts are dropped.
async fn tick(shared: Arc<Shared>) {
    loop {
        tokio::time::sleep(TICK).await;
        descriptors::refresh_limit();
        let snapshot = shared.snapshot.load_full();
        for cluster in &snapshot.clusters {
            let policy_state = &cluster.upstream.policy_state;
            policy_state.record_transition(
                &cluster.upstream.name,
                policy_state.breaker.tick(Instant::now().into_std()),
            );
        }
        shared.unknown_hosts.drop_idle();
        shared.inbound_addresses.drop_idle();
    }
}

impl Proxy {
    /// Applies a new configuration. Connections, pools, endpoints and breakers of upstreams that remain are kept.
    pub fn reload(&self, config: Arc<Config>) {
        // Errors of certificates are logged and shown in the status; everything else takes effect.
        let _ = self.shared.identity.configure(&config);
        let mut clusters = self.clusters.lock().unwrap_or_else(PoisonError::into_inner);
        let snapshot = clusters.rebuild(config);
        self.shared.snapshot.store(Arc::new(snapshot));
        self.shared.phase.send_modify(|_| {});
        self.watch_certificates();
    }

    /// Watches the certificate files that the current configuration names.
    fn watch_certificates(&self) {
        self.follow_agent();
        let mut watched = self.certificates.lock().unwrap_or_else(PoisonError::into_inner);
        let store = &self.shared.identity;
        let paths = store.paths();
        if watched.as_ref().map_or(&[][..], |(paths, _)| paths) == paths {
            return;
        }
        *watched = None;
        if paths.is_empty() {
            return;
        }
        let reloading = Arc::clone(store);
        match watch("identity-watch", &paths, move |_| drop(reloading.reload())) {
            Ok(watcher) => *watched = Some((paths, watcher)),
            Err(error) => tracing::error!(%error, "cannot watch certificate files: new ones need a restart"),
        }
    }

    fn follow_agent(&self) {
        let mut agent = self.agent.lock().unwrap_or_else(PoisonError::into_inner);
        let store = &self.shared.identity;
        let socket = store.agent_socket();
        if agent.as_ref().map(|(socket, _)| socket) == socket.as_ref() {
            return;
        }
        *agent = socket.map(|socket| {
            let following = tokio::spawn(workload::watch_agent(Arc::clone(store), socket.clone()));
            (socket, AbortOnDrop(following))
        });
    }

    /// Waits until a thread or task that must live as long as the process fails.
    pub async fn wait_failure(&self) -> CriticalFailure {
        self.failures.wait().await
    }

    pub fn set_phase(&self, phase: Phase) {
        self.shared.phase.send_if_modified(|now| {
            let forward = phase > *now;
            if forward {
                *now = phase;
            }
            forward
        });
    }

    /// Waits until discovery has resolved every configured upstream once, at most `limit`.
    pub async fn wait_first_discovery(&self, limit: Duration) {
        let until = Instant::now() + limit;
        let snapshot = self.shared.snapshot.load_full();
        for cluster in &snapshot.clusters {
            let _ = timeout_at(until, cluster.upstream.wait_until_resolved()).await;
        }
    }

    /// Waits until no inbound connection is open and no listener accepts; false when `limit` elapsed first.
    pub async fn wait_inbound_drained(&self, limit: Duration) -> bool {
        tokio::time::timeout(limit, self.shared.metrics.inbound.wait_closed()).await.is_ok()
    }

    /// Waits until no outbound connection is open; listeners may accept more.
    pub async fn wait_outbound_idle(&self) {
        self.shared.metrics.outbound.wait_idle().await;
    }

    /// Waits until no outbound connection is open and no listener accepts; false when `limit` elapsed first.
    pub async fn wait_outbound_drained(&self, limit: Duration) -> bool {
        tokio::time::timeout(limit, self.shared.metrics.outbound.wait_closed()).await.is_ok()
    }

    /// Waits until no delivery is attempted. None begins during the drain.
    pub async fn wait_deliveries(&self, until: Instant) {
        let Some(queues) = &self.shared.queues else { return };
        if timeout_at(until, queues.wait_idle()).await.is_err() {
            tracing::warn!(
                "deliveries were cut off by the end of the drain: they are attempted again at the next start"
            );
        }
    }

    /// Stops the workers; requests in flight are cut off.
    pub fn stop(self) {
        self.ticking.abort();
        self.workers.stop();
    }
}
