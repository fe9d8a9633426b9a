//! What the tasks of a worker thread share, and what all threads share.

use std::{
    cell::RefCell,
    collections::HashMap,
    hash::Hash,
    net::{IpAddr, SocketAddr, UdpSocket},
    rc::Rc,
    sync::Arc,
};

use arc_swap::ArcSwap;
use tokio::{
    runtime::Handle,
    sync::{Semaphore, watch},
};

use super::{
    exhausted_traces::ExhaustedTraces, headers::LastNumber, interception::Interception, queue::Queues,
};
use crate::{
    config::{Config, HostPort},
    durations::DurationCell,
    identity::{jwt::TokenCache, store::IdentityStore, trust::provider},
    model::{
        Side, Snapshot, View, WorkerCluster,
        unknown::{MAX_UNKNOWN_HOSTS, UnknownHost, UnknownHosts},
    },
    rng::Rng,
    telemetry::{
        metrics::{ConnectionCounters, Metrics, WorkerLoad},
        reporter::{Reporter, RequestTelemetry},
        traces::{RequestsInFlight, Traces},
    },
};

/// Concurrent TLS handshakes with clients per worker; further ones wait.
const HANDSHAKES: usize = 512;

/// The state that all threads share.
#[derive(Debug)]
pub struct Shared {
    pub snapshot: ArcSwap<Snapshot>,
    pub metrics: Metrics,
    /// The consumers of request records.
    pub request_telemetry: Arc<RequestTelemetry>,
    /// The phase of the drain. Also marked as changed when a configuration is applied, so that connections check
    /// whether it still allows them.
    pub phase: watch::Sender<Phase>,
    /// The process's own listeners; never dialled for a forward-proxy or Host request.
    pub own_addresses: OwnAddresses,
    /// The hosts that no upstream names, requested so far.
    pub unknown_hosts: UnknownHosts,
    /// The addresses of the service that redirected inbound requests were sent to so far.
    pub inbound_addresses: UnknownHosts,
    /// Whether kernel rules redirect the pod's traffic here.
    pub interception: Interception,
    /// Traces whose retries were already spent by requests of this service.
    pub spent_traces: ExhaustedTraces,
    pub traces: Traces,
    /// This service's certificates, and the trusted roots.
    pub identity: Arc<IdentityStore>,
    /// Durable deliveries; `None`: no store.
    pub queues: Option<Arc<Queues>>,
    /// The control runtime, where workers spawn work that is not part of a request.
    pub control_runtime: Handle,
    /// Identifies this process in `Via`.
    pub instance: String,
}

/// The phases of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    Running,
    /// `drain_delay`: not ready, still accepting, because clients learn late of the shutdown. Each response asks its
    /// client to close the connection.
    DrainDelay,
    /// Inbound connections finish the requests in flight; outbound continues.
    DrainingInbound,
    /// Outbound connections finish as well.
    DrainingAll,
}

/// The addresses this process listens on.
#[derive(Debug, Default)]
pub struct OwnAddresses(ArcSwap<Vec<SocketAddr>>);

impl OwnAddresses {
    pub fn add(&self, addresses: &[SocketAddr]) {
        self.0.rcu(|known| known.iter().chain(addresses).copied().collect::<Vec<_>>());
    }

    /// Whether a connection to `address` would come back to this process.
    pub fn contains(&self, address: SocketAddr) -> bool {
        let ip = address.ip().to_canonical();
        self.0.load().iter().any(|own| {
            let own_ip = own.ip().to_canonical();
            own.port() == address.port()
                && (own_ip == ip || ip.is_unspecified() || (own_ip.is_unspecified() && is_local_address(ip)))
        })
    }
}

/// Whether an address belongs to this machine (or pod): only those can be bound. Called only where the port is one of
/// the process's own.
pub fn is_local_address(ip: IpAddr) -> bool {
    ip.is_loopback() || UdpSocket::bind((ip, 0)).is_ok()
}

/// The state of a worker. It stays on the worker's thread and is shared by its tasks.
#[derive(Debug)]
pub struct Worker {
    pub shared: Arc<Shared>,
    view: RefCell<Rc<View>>,
    unknown: RefCell<UnknownCache>,
    rng: RefCell<Rng>,
    /// The inbound requests in flight, for trace links.
    pub inbound_in_flight: Arc<RequestsInFlight>,
    /// Where records of requests are reported.
    pub reporter: Rc<Reporter>,
    /// Index among the workers.
    index: usize,
    /// Verified tokens of end users.
    pub tokens: RefCell<TokenCache>,
    /// Permits for TLS handshakes with clients.
    pub handshake_permits: Semaphore,
    /// The formatted timeout that the last request was forwarded with, reused where the number repeats.
    pub forwarded_timeout: LastNumber,
}

type ClusterCache<K> = HashMap<K, (Arc<UnknownHost>, Rc<WorkerCluster>)>;

/// This worker's clusters for destinations that are no configured upstream.
#[derive(Debug, Default)]
struct UnknownCache {
    hosts: ClusterCache<HostPort>,
    /// Original destinations of redirected outbound connections.
    outbound: ClusterCache<SocketAddr>,
    /// Original destinations of redirected inbound connections: addresses of the service.
    inbound: ClusterCache<SocketAddr>,
}

impl UnknownCache {
    fn all(&self) -> impl Iterator<Item = &Rc<WorkerCluster>> {
        let addresses = self.outbound.values().chain(self.inbound.values());
        self.hosts.values().chain(addresses).map(|(_, local)| local)
    }
}

/// A look-up of a host that no upstream names.
struct Lookup<'a, K> {
    key: &'a K,
    /// The hosts of all workers.
    table: &'a UnknownHosts,
    config: &'a Arc<Config>,
    /// This worker's duration histogram of such hosts.
    durations: &'a Arc<DurationCell>,
}

/// Looks a key up in this worker's cache, else in the table of all workers, which decides about eviction.
fn lookup_unknown<K: Clone + Eq + Hash>(
    cache: &mut ClusterCache<K>,
    Lookup { key, table, config, durations }: Lookup<'_, K>,
    host: impl FnOnce() -> HostPort,
) -> Rc<WorkerCluster> {
    if let Some((shared, local)) = cache.get(key)
        && shared.is_current(config)
        && table.touch(shared)
    {
        return Rc::clone(local);
    }
    if cache.len() >= MAX_UNKNOWN_HOSTS {
        // Safe to clear: the shared table holds the state.
        cache.clear();
    }
    let shared = table.get(&host(), config);
    let old = cache.get(key).map(|(_, local)| Rc::clone(local));
    let old = old.filter(|old| Arc::ptr_eq(&old.upstream.shared, &shared.cluster.upstream));
    let local = WorkerCluster::new(&shared.cluster, old.as_ref(), || Arc::clone(durations));
    cache.insert(key.clone(), (shared, Rc::clone(&local)));
    local
}

impl Worker {
    pub(crate) fn new(shared: Arc<Shared>, index: usize) -> Rc<Self> {
        if shared.snapshot.load().config.identity.is_some() {
            // The library's first random bytes take tens of milliseconds, unless it was built as in
            // `.cargo/config.toml`. Draw them here rather than in the first client's handshake.
            let _ = provider().secure_random.fill(&mut [0]);
        }
        let view = View::new(shared.snapshot.load_full(), &shared.instance, None);
        let in_flight = shared.traces.register_worker();
        let reporter = Rc::new(Reporter::new(&shared.request_telemetry));
        Rc::new(Self {
            reporter,
            shared,
            inbound_in_flight: in_flight,
            view: RefCell::new(view),
            unknown: RefCell::default(),
            rng: RefCell::new(Rng::new()),
            index,
            tokens: RefCell::default(),
            handshake_permits: Semaphore::new(HANDSHAKES),
            forwarded_timeout: LastNumber::default(),
        })
    }

    /// Its load counters, which other threads read.
    pub fn load(&self) -> Option<&WorkerLoad> {
        self.shared.metrics.workers.get(self.index)
    }

    /// The current configuration, with this worker's state.
    pub fn view(&self) -> Rc<View> {
        let now = self.shared.snapshot.load();
        if !Arc::ptr_eq(&now, &self.view.borrow().snapshot) {
            let next = View::new(Arc::clone(&now), &self.shared.instance, Some(&self.view.borrow()));
            self.view.replace(next);
        }
        Rc::clone(&self.view.borrow())
    }

    /// The state for a host that no upstream names.
    pub fn unknown_host(&self, host: &HostPort, config: &Arc<Config>) -> Rc<WorkerCluster> {
        let cache = &mut self.unknown.borrow_mut().hosts;
        let (table, durations) = (&self.shared.unknown_hosts, &self.reporter.other);
        lookup_unknown(cache, Lookup { key: host, table, config, durations }, || host.clone())
    }

    /// The state for an original destination of the service's redirected traffic that no upstream has.
    pub fn unknown_address(&self, address: SocketAddr, config: &Arc<Config>) -> Rc<WorkerCluster> {
        let cache = &mut self.unknown.borrow_mut().outbound;
        let host = || HostPort::new(address.ip().to_string(), address.port());
        let (table, durations) = (&self.shared.unknown_hosts, &self.reporter.other);
        lookup_unknown(cache, Lookup { key: &address, table, config, durations }, host)
    }

    /// The service at the original destination of redirected inbound traffic.
    pub fn service_at(&self, address: SocketAddr, view: &View) -> Rc<WorkerCluster> {
        let cache = &mut self.unknown.borrow_mut().inbound;
        let host = || HostPort::new(address.ip().to_string(), address.port());
        let (table, config) = (&self.shared.inbound_addresses, &view.snapshot.config);
        let durations = &view.inbound.destination.durations;
        lookup_unknown(cache, Lookup { key: &address, table, config, durations }, host)
    }

    pub fn with_rng<T>(&self, draw: impl FnOnce(&mut Rng) -> T) -> T {
        draw(&mut self.rng.borrow_mut())
    }

    /// Closes what has been idle for too long, and forgets hosts that are no longer used.
    pub fn sweep(&self) {
        let view = self.view();
        let mut unknown = self.unknown.borrow_mut();
        // An entry that no worker holds any more is no longer resolved.
        let UnknownCache { hosts, outbound, inbound } = &mut *unknown;
        hosts.retain(|_, (host, _)| self.shared.unknown_hosts.is_active(host));
        outbound.retain(|_, (host, _)| self.shared.unknown_hosts.is_active(host));
        inbound.retain(|_, (host, _)| self.shared.inbound_addresses.is_active(host));
        for local in view.clusters.iter().chain([&view.inbound]).chain(unknown.all()) {
            // An upstream that was never requested has no connections.
            if local.upstream.known_endpoints().is_empty() {
                continue;
            }
            for endpoint in self.with_rng(|rng| local.upstream.endpoints(rng)).iter() {
                let tls = local.cluster.tls.as_ref().map(|tls| &tls.target.client);
                endpoint.pool.sweep(local.cluster.settings.pool_idle_timeout, tls);
            }
        }
    }

    /// Closes an idle connection for each one that another worker needs below `max_connections`.
    pub fn release_idle(&self) {
        let view = self.view();
        let unknown = self.unknown.borrow();
        for local in view.clusters.iter().chain([&view.inbound]).chain(unknown.all()) {
            let eviction = &local.upstream.shared.policy_state.eviction;
            while eviction.is_requested() {
                let known = local.upstream.known_endpoints();
                let Some(endpoint) = known.iter().find(|it| it.pool.idle_count() > 0) else { break };
                if eviction.claim() {
                    endpoint.pool.close_one_idle();
                }
            }
        }
    }
}

/// The phase from which on responses of a side carry `Connection: close` and HTTP/2 gets GOAWAY, so that clients
/// connect elsewhere. Outbound only at its own drain: the service has no other sidecar.
pub fn announce_phase(side: &Side) -> Phase {
    match side {
        Side::Inbound => Phase::DrainDelay,
        Side::Outbound | Side::Upstream(_) => Phase::DrainingAll,
    }
}

/// The phase from which on connections of a side are asked to close.
pub fn drain_phase(side: &Side) -> Phase {
    match side {
        Side::Inbound => Phase::DrainingInbound,
        Side::Outbound | Side::Upstream(_) => Phase::DrainingAll,
    }
}

/// The connection counters of a side.
pub fn connection_counts<'a>(shared: &'a Shared, side: &Side) -> &'a Arc<ConnectionCounters> {
    match side {
        Side::Inbound => &shared.metrics.inbound,
        Side::Outbound | Side::Upstream(_) => &shared.metrics.outbound,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_ports_are_recognised_at_every_local_address() {
        let own = OwnAddresses::default();
        own.add(&["[::]:4143".parse().unwrap(), "127.0.0.1:4140".parse().unwrap()]);
        for local in ["127.0.0.1:4143", "[::1]:4143", "127.0.0.9:4143", "127.0.0.1:4140", "0.0.0.0:4140"] {
            assert!(own.contains(local.parse().unwrap()), "{local}");
        }
        for other in ["192.0.2.1:4143", "127.0.0.1:8080", "127.0.0.2:4140"] {
            assert!(!own.contains(other.parse().unwrap()), "{other}");
        }
    }
}
