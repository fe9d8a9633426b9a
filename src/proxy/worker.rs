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

use super::{headers::LastNumber, interception::Interception, spent::SpentTraces};
use crate::{
    config::{Config, HostPort},
    durations::Cell,
    identity::{jwt::TokenCache, store::Store, trust::provider},
    model::{
        LocalCluster, Side, Snapshot, View,
        unknown::{MAX_UNKNOWN_HOSTS, UnknownHost, UnknownHosts},
    },
    rng::Rng,
    telemetry::{
        calls::{Calls, Teller},
        metrics::{Connections, Metrics, WorkerLoad},
        traces::{InFlight, Traces},
    },
};

/// TLS handshakes with callers at a time, per worker; more wait.
const HANDSHAKES: usize = 512;

/// What every thread sees.
#[derive(Debug)]
pub struct Shared {
    pub snapshot: ArcSwap<Snapshot>,
    pub metrics: Metrics,
    /// What is told of calls when they are over.
    pub calls: Arc<Calls>,
    /// How far the process is on its way out. Marked as changed when a configuration is applied, too: connections look
    /// whether they are still allowed.
    pub phase: watch::Sender<Phase>,
    /// Where it listens itself; never dialled for a forward-proxy or Host request.
    pub own: OwnAddresses,
    /// The hosts that no upstream names, met so far.
    pub unknown: UnknownHosts,
    /// The addresses of the service that redirected calls were going to, met so far.
    pub inbound_addresses: UnknownHosts,
    /// Whether the kernel leads traffic here.
    pub interception: Interception,
    /// Traces whose tries were spent by calls of this service.
    pub spent: SpentTraces,
    pub traces: Traces,
    /// Who this service is, and who is trusted.
    pub identity: Arc<Store>,
    /// Where workers have done what is not a call's own work.
    pub control: Handle,
    /// Tells this process from every other in `Via`.
    pub instance: String,
}

/// The way of a process from start to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    Running,
    /// Not ready any more, still accepting: clients learn late that it leaves. Each response tells them to reconnect elsewhere.
    Leaving,
    /// Inbound connections finish what is in flight; outbound goes on.
    DrainingInbound,
    /// Outbound connections finish too.
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
                && (own_ip == ip
                    || ip.is_unspecified()
                    || (own_ip.is_unspecified() && is_of_this_machine(ip)))
        })
    }
}

/// Whether an address is one of this machine's (or pod's): only those can be bound. Asked only where the port is ours.
pub fn is_of_this_machine(ip: IpAddr) -> bool {
    ip.is_loopback() || UdpSocket::bind((ip, 0)).is_ok()
}

/// What a worker knows. Lives on its thread and is shared by its tasks.
#[derive(Debug)]
pub struct Worker {
    pub shared: Arc<Shared>,
    view: RefCell<Rc<View>>,
    unknown: RefCell<UnknownCache>,
    rng: RefCell<Rng>,
    /// The calls to the service that it carries, for traces.
    pub in_flight: Arc<InFlight>,
    /// Whom calls are told of.
    pub teller: Rc<Teller>,
    /// Which of them it is.
    index: usize,
    /// Tokens of end users that were found good.
    pub tokens: RefCell<TokenCache>,
    /// Leave for a TLS handshake with a caller.
    pub handshakes: Semaphore,
    /// The time that the last call's next hop was told it has.
    pub time_told: LastNumber,
}

type Known<K> = HashMap<K, (Arc<UnknownHost>, Rc<LocalCluster>)>;

/// What is no upstream of the configuration, as far as this worker has met it.
#[derive(Debug, Default)]
struct UnknownCache {
    hosts: Known<HostPort>,
    /// Where the service's redirected connections were going.
    outward: Known<SocketAddr>,
    /// Where callers' redirected connections were going: addresses of the service.
    inward: Known<SocketAddr>,
}

impl UnknownCache {
    fn all(&self) -> impl Iterator<Item = &Rc<LocalCluster>> {
        let addresses = self.outward.values().chain(self.inward.values());
        self.hosts.values().chain(addresses).map(|(_, local)| local)
    }
}

/// The state for a key, from this worker's cache or from the table of all workers, which decides who stays.
fn met<K: Clone + Eq + Hash>(
    known: &mut Known<K>,
    table: &UnknownHosts,
    (key, host): (&K, impl FnOnce() -> HostPort),
    config: &Arc<Config>,
    durations: &Arc<Cell>,
) -> Rc<LocalCluster> {
    if let Some((shared, local)) = known.get(key)
        && shared.is_current(config)
        && table.touch(shared)
    {
        return Rc::clone(local);
    }
    if known.len() >= MAX_UNKNOWN_HOSTS {
        // The shared table decides who stays; this is only a cache of it.
        known.clear();
    }
    let shared = table.get(&host(), config);
    let old = known.get(key).map(|(_, local)| Rc::clone(local));
    let old = old.filter(|old| Arc::ptr_eq(&old.upstream.shared, &shared.cluster.upstream));
    let local = LocalCluster::new(&shared.cluster, old.as_ref(), || Arc::clone(durations));
    known.insert(key.clone(), (shared, Rc::clone(&local)));
    local
}

impl Worker {
    pub(crate) fn new(shared: Arc<Shared>, index: usize) -> Rc<Self> {
        if shared.snapshot.load().config.identity.is_some() {
            // The first random bytes take the library some time, tens of milliseconds unless it was built as
            // `.cargo/config.toml` says: not that of the first caller.
            let _ = provider().secure_random.fill(&mut [0]);
        }
        let view = View::new(shared.snapshot.load_full(), &shared.instance, None);
        let in_flight = shared.traces.of_worker();
        let teller = Rc::new(Teller::new(&shared.calls));
        Rc::new(Self {
            teller,
            shared,
            in_flight,
            view: RefCell::new(view),
            unknown: RefCell::default(),
            rng: RefCell::new(Rng::new()),
            index,
            tokens: RefCell::default(),
            handshakes: Semaphore::new(HANDSHAKES),
            time_told: LastNumber::default(),
        })
    }

    /// How much it has to do, for all to see.
    pub fn load(&self) -> Option<&WorkerLoad> {
        self.shared.metrics.workers.get(self.index)
    }

    /// The configuration as of now, with this worker's state.
    pub fn view(&self) -> Rc<View> {
        let now = self.shared.snapshot.load();
        if !Arc::ptr_eq(&now, &self.view.borrow().snapshot) {
            let next = View::new(Arc::clone(&now), &self.shared.instance, Some(&self.view.borrow()));
            self.view.replace(next);
        }
        Rc::clone(&self.view.borrow())
    }

    /// The state for a host that no upstream names.
    pub fn unknown_host(&self, host: &HostPort, config: &Arc<Config>) -> Rc<LocalCluster> {
        let known = &mut self.unknown.borrow_mut().hosts;
        met(known, &self.shared.unknown, (host, || host.clone()), config, &self.teller.other)
    }

    /// The state for an address that the service called and no upstream has.
    pub fn address(&self, address: SocketAddr, config: &Arc<Config>) -> Rc<LocalCluster> {
        let known = &mut self.unknown.borrow_mut().outward;
        let host = || HostPort::new(address.ip().to_string(), address.port());
        met(known, &self.shared.unknown, (&address, host), config, &self.teller.other)
    }

    /// The service at an address that callers called.
    pub fn service_at(&self, address: SocketAddr, view: &View) -> Rc<LocalCluster> {
        let known = &mut self.unknown.borrow_mut().inward;
        let host = || HostPort::new(address.ip().to_string(), address.port());
        let durations = &view.inbound.whom.durations;
        met(known, &self.shared.inbound_addresses, (&address, host), &view.snapshot.config, durations)
    }

    pub fn with_rng<T>(&self, draw: impl FnOnce(&mut Rng) -> T) -> T {
        draw(&mut self.rng.borrow_mut())
    }

    /// Closes what has been idle for too long, and forgets hosts that are not used any more.
    pub fn sweep(&self) {
        let view = self.view();
        let mut unknown = self.unknown.borrow_mut();
        // Whoever is forgotten by all workers stops being looked up.
        let UnknownCache { hosts, outward, inward } = &mut *unknown;
        hosts.retain(|_, (host, _)| self.shared.unknown.is_kept(host));
        outward.retain(|_, (host, _)| self.shared.unknown.is_kept(host));
        inward.retain(|_, (host, _)| self.shared.inbound_addresses.is_kept(host));
        for local in view.clusters.iter().chain([&view.inbound]).chain(unknown.all()) {
            // One that was never called has nothing to be looked after.
            if local.upstream.known().is_empty() {
                continue;
            }
            for endpoint in self.with_rng(|rng| local.upstream.endpoints(rng)).iter() {
                let tls = local.cluster.tls.as_ref().map(|tls| &tls.target.client);
                endpoint.pool.sweep(local.cluster.settings.pool_idle_timeout, tls);
            }
        }
    }

    /// Closes an idle connection for each that is wanted elsewhere (`max_connections`).
    pub fn squeeze(&self) {
        let view = self.view();
        let unknown = self.unknown.borrow();
        for local in view.clusters.iter().chain([&view.inbound]).chain(unknown.all()) {
            let squeeze = &local.upstream.shared.guards.squeeze;
            while squeeze.is_wanted() {
                let known = local.upstream.known();
                let Some(endpoint) = known.iter().find(|it| it.pool.idle_connections() > 0) else { break };
                if squeeze.claim() {
                    endpoint.pool.close_idle();
                }
            }
        }
    }
}

/// From which phase on clients of a side are told to go elsewhere: responses say `Connection: close`, HTTP/2 gets GOAWAY.
/// Only inbound has clients that can: the service has no other sidecar.
pub fn announce_phase(side: &Side) -> Phase {
    match side {
        Side::Inbound => Phase::Leaving,
        Side::Outbound | Side::Upstream(_) => Phase::DrainingAll,
    }
}

/// From which phase on connections of a side are asked to leave.
pub fn drain_phase(side: &Side) -> Phase {
    match side {
        Side::Inbound => Phase::DrainingInbound,
        Side::Outbound | Side::Upstream(_) => Phase::DrainingAll,
    }
}

/// What counts the connections of a side.
pub fn connections<'a>(shared: &'a Shared, side: &Side) -> &'a Arc<Connections> {
    match side {
        Side::Inbound => &shared.metrics.inbound,
        Side::Outbound | Side::Upstream(_) => &shared.metrics.outbound,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_ports_are_known_by_every_address_of_the_machine() {
        let own = OwnAddresses::default();
        own.add(&["[::]:4143".parse().unwrap(), "127.0.0.1:4140".parse().unwrap()]);
        for mine in ["127.0.0.1:4143", "[::1]:4143", "127.0.0.9:4143", "127.0.0.1:4140", "0.0.0.0:4140"] {
            assert!(own.contains(mine.parse().unwrap()), "{mine}");
        }
        for other in ["192.0.2.1:4143", "127.0.0.1:8080", "127.0.0.2:4140"] {
            assert!(!own.contains(other.parse().unwrap()), "{other}");
        }
    }
}
