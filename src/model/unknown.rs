//! Unknown hosts: hosts that no upstream names. Each gets an upstream at run time, with the policy of `[defaults]`.
//! Likewise addresses of the service that redirected requests go to, with the policy of `[inbound]`.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use crate::{
    config::{self, Config, Endpoints, HostPort},
    discovery::{self, Discovery},
    dns::Resolver,
    model::{Cluster, inbound_settings, queue_route::queue_routes},
    upstream::{Upstream, policy_state::PolicyCounters},
};

/// The most hosts that are known at a time; the one that was unused for longest is dropped for a new one.
pub const MAX_UNKNOWN_HOSTS: usize = 1024;

/// A host without requests for so many milliseconds is dropped, and its name is no longer resolved.
const IDLE_MS: u64 = 5 * 60 * 1000;

/// The unknown hosts, shared by the workers. Used only for a worker's first request to a host.
#[derive(Debug)]
pub struct UnknownHosts {
    direction: HostDirection,
    resolver: Arc<Resolver>,
    started: Instant,
    hosts: Mutex<HashMap<HostPort, Arc<UnknownHost>>>,
    /// The sums of the counters of dropped hosts: counters must not decrease. Moved here under the lock of `hosts`.
    dropped_counts: PolicyCounters,
}

/// The direction of the requests to a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostDirection {
    /// The service sent a request to it.
    Outbound,
    /// It is the service, at another port or address than `forward_to`.
    Inbound,
}

/// A host that no upstream names.
#[derive(Debug)]
pub struct UnknownHost {
    pub cluster: Arc<Cluster>,
    /// The configuration that its settings come from; it is made anew for another one.
    config: Arc<Config>,
    last_used: AtomicU64,
    _discovery: Discovery,
}

impl UnknownHosts {
    pub fn new(resolver: Arc<Resolver>, met: HostDirection) -> Self {
        Self {
            direction: met,
            resolver,
            started: Instant::now(),
            hosts: Mutex::default(),
            dropped_counts: PolicyCounters::default(),
        }
    }

    /// The state of a host. The first request makes it and starts discovery.
    pub fn get(&self, host: &HostPort, config: &Arc<Config>) -> Arc<UnknownHost> {
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        let known = hosts.get(host).filter(|known| Arc::ptr_eq(&known.config, config)).cloned();
        let found = known.unwrap_or_else(|| {
            // Endpoints and policy state outlive a reload.
            let upstream = hosts
                .get(host)
                .map_or_else(|| Upstream::new(host.to_string()), |old| Arc::clone(&old.cluster.upstream));
            if hosts.len() >= MAX_UNKNOWN_HOSTS && !hosts.contains_key(host) {
                let oldest = hosts
                    .iter()
                    .min_by_key(|(_, h)| h.last_used.load(Ordering::Relaxed))
                    .map(|(k, _)| k.clone());
                if let Some(host) = oldest.and_then(|oldest| hosts.remove(&oldest)) {
                    self.dropped_counts.absorb(host.counts());
                }
            }
            let made = Arc::new(self.make(host, config, upstream));
            hosts.insert(host.clone(), Arc::clone(&made));
            made
        });
        found.last_used.store(self.now(), Ordering::Relaxed);
        found
    }

    fn make(&self, host: &HostPort, config: &Arc<Config>, upstream: Arc<Upstream>) -> UnknownHost {
        let settings = match self.direction {
            HostDirection::Outbound => {
                let endpoints = Endpoints::Dns(host.clone());
                config::Upstream::new(host.to_string(), endpoints, config.defaults.clone())
            }
            HostDirection::Inbound => inbound_settings(config, host.clone()),
        };
        let discovery =
            discovery::spawn(&settings.endpoints, Arc::clone(&upstream), Arc::clone(&self.resolver));
        let queue_routes = queue_routes(&settings.routes, config);
        let mut cluster = Cluster::new(settings, upstream, None);
        cluster.queue_routes = queue_routes;
        let cluster = Arc::new(cluster);
        UnknownHost {
            cluster,
            config: Arc::clone(config),
            last_used: AtomicU64::new(self.now()),
            _discovery: discovery,
        }
    }

    /// Drops idle hosts, which ends their discovery.
    pub fn drop_idle(&self) {
        self.drop_idle_at(self.now());
    }

    fn drop_idle_at(&self, now: u64) {
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        hosts.retain(|_, host| {
            let keep = !host.is_idle(now);
            if !keep {
                self.dropped_counts.absorb(host.counts());
            }
            keep
        });
    }

    /// The hosts that are known now, the last used first, and the counters of all others.
    pub fn read(&self) -> (Vec<Arc<Cluster>>, PolicyCounters) {
        let hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        let dropped_counts = PolicyCounters::default();
        dropped_counts.absorb(&self.dropped_counts);
        let mut known: Vec<_> = hosts.values().cloned().collect();
        drop(hosts);
        known.sort_by_key(|host| std::cmp::Reverse(host.last_used.load(Ordering::Relaxed)));
        (known.iter().map(|host| Arc::clone(&host.cluster)).collect(), dropped_counts)
    }

    /// Counts a request that was refused before its host was known.
    pub fn count_rejected(&self, reason: &str) {
        self.dropped_counts.rejected.increment(reason);
    }

    fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Whether a host is not idle.
    pub fn is_active(&self, host: &UnknownHost) -> bool {
        !host.is_idle(self.now())
    }

    /// Marks a host that a worker has kept as used. False: it was dropped meanwhile.
    pub fn touch(&self, host: &UnknownHost) -> bool {
        let kept = self.is_active(host);
        if kept {
            host.last_used.store(self.now(), Ordering::Relaxed);
        }
        kept
    }

    pub fn len(&self) -> usize {
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl UnknownHost {
    fn counts(&self) -> &PolicyCounters {
        &self.cluster.upstream.policy_state.counters
    }

    fn is_idle(&self, now: u64) -> bool {
        now.saturating_sub(self.last_used.load(Ordering::Relaxed)) > IDLE_MS
    }

    /// Whether it was made from this configuration.
    pub fn is_current(&self, config: &Arc<Config>) -> bool {
        Arc::ptr_eq(&self.config, config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_counters_of_a_dropped_host_are_kept() {
        let hosts = UnknownHosts::new(Arc::new(Resolver::from_system().unwrap()), HostDirection::Outbound);
        let config = Arc::new(Config::default());
        let host = hosts.get(&HostPort::new("127.0.0.1", 9), &config);
        host.counts().retries.increment("sent");
        let sent = |counts: &PolicyCounters| {
            counts.retries.iter().find(|(word, _)| *word == "sent").map(|(_, count)| count)
        };
        let (known, dropped_counts) = hosts.read();
        assert_eq!((known.len(), sent(&dropped_counts)), (1, Some(0)));

        hosts.drop_idle_at(hosts.now() + IDLE_MS + 1000);
        let (known, dropped_counts) = hosts.read();
        assert_eq!((known.len(), sent(&dropped_counts)), (0, Some(1)));
    }
}
