//! Hosts that no upstream names, met at run time: each gets an upstream of its own, with the policy of `[defaults]`.
//! Likewise addresses of the service that redirected calls go to, with the policy of `[inbound]`.

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
    model::{Cluster, inbound_settings},
    upstream::{Upstream, guards::Counts},
};

/// How many are known at a time; the one unused for longest makes room.
pub const MAX_UNKNOWN_HOSTS: usize = 1024;

/// A host nobody has asked for in so many milliseconds is forgotten, and not looked up any more.
const IDLE_MS: u64 = 5 * 60 * 1000;

/// The hosts met so far, shared by the workers. Looked at only when a worker meets a host for the first time.
#[derive(Debug)]
pub struct UnknownHosts {
    met: Met,
    resolver: Arc<Resolver>,
    started: Instant,
    hosts: Mutex<HashMap<HostPort, Arc<UnknownHost>>>,
    /// What those that are forgotten had counted: counters must not go back. Moved here under the lock of `hosts`.
    forgotten: Counts,
}

/// Who led to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Met {
    /// The service called it.
    ByService,
    /// It is the service, by a port or address beside `forward_to`.
    ByCallers,
}

/// A host that no upstream names.
#[derive(Debug)]
pub struct UnknownHost {
    pub cluster: Arc<Cluster>,
    /// The configuration it was made under; another one makes it anew.
    config: Arc<Config>,
    last_used: AtomicU64,
    _discovery: Discovery,
}

impl UnknownHosts {
    pub fn new(resolver: Arc<Resolver>, met: Met) -> Self {
        Self { met, resolver, started: Instant::now(), hosts: Mutex::default(), forgotten: Counts::default() }
    }

    /// The state for a host, made and looked up when it is met for the first time.
    pub fn get(&self, host: &HostPort, config: &Arc<Config>) -> Arc<UnknownHost> {
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        let known = hosts.get(host).filter(|known| Arc::ptr_eq(&known.config, config)).cloned();
        let found = known.unwrap_or_else(|| {
            // What is known of its endpoints outlives a reload.
            let upstream = hosts
                .get(host)
                .map_or_else(|| Upstream::new(host.to_string()), |old| Arc::clone(&old.cluster.upstream));
            if hosts.len() >= MAX_UNKNOWN_HOSTS && !hosts.contains_key(host) {
                let oldest = hosts
                    .iter()
                    .min_by_key(|(_, h)| h.last_used.load(Ordering::Relaxed))
                    .map(|(k, _)| k.clone());
                if let Some(host) = oldest.and_then(|oldest| hosts.remove(&oldest)) {
                    self.forgotten.absorb(host.counts());
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
        let settings = match self.met {
            Met::ByService => {
                let endpoints = Endpoints::Dns(host.clone());
                config::Upstream::new(host.to_string(), endpoints, config.defaults.clone())
            }
            Met::ByCallers => inbound_settings(config, host.clone()),
        };
        let discovery =
            discovery::spawn(&settings.endpoints, Arc::clone(&upstream), Arc::clone(&self.resolver));
        let cluster = Arc::new(Cluster::new(settings, upstream, None, |_| None));
        UnknownHost {
            cluster,
            config: Arc::clone(config),
            last_used: AtomicU64::new(self.now()),
            _discovery: discovery,
        }
    }

    /// Ends the look-ups of hosts that nobody has asked for in a while.
    pub fn forget_idle(&self) {
        self.forget_idle_at(self.now());
    }

    fn forget_idle_at(&self, now: u64) {
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        hosts.retain(|_, host| {
            let keep = !host.is_idle(now);
            if !keep {
                self.forgotten.absorb(host.counts());
            }
            keep
        });
    }

    /// Those that are known now, the last used first, and what all the others had counted.
    pub fn read(&self) -> (Vec<Arc<Cluster>>, Counts) {
        let hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        let forgotten = Counts::default();
        forgotten.absorb(&self.forgotten);
        let mut known: Vec<_> = hosts.values().cloned().collect();
        drop(hosts);
        known.sort_by_key(|host| std::cmp::Reverse(host.last_used.load(Ordering::Relaxed)));
        (known.iter().map(|host| Arc::clone(&host.cluster)).collect(), forgotten)
    }

    /// Counts a request that was refused before it was known which host it is for.
    pub fn count_rejected(&self, reason: &str) {
        self.forgotten.rejected.add(reason);
    }

    fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Whether a host is still of interest.
    pub fn is_kept(&self, host: &UnknownHost) -> bool {
        !host.is_idle(self.now())
    }

    /// Notes that a host was asked for, by who holds it already. False: it was forgotten meanwhile.
    pub fn touch(&self, host: &UnknownHost) -> bool {
        let kept = self.is_kept(host);
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
    fn counts(&self) -> &Counts {
        &self.cluster.upstream.guards.counts
    }

    fn is_idle(&self, now: u64) -> bool {
        now.saturating_sub(self.last_used.load(Ordering::Relaxed)) > IDLE_MS
    }

    /// Whether it was made under this configuration.
    pub fn is_current(&self, config: &Arc<Config>) -> bool {
        Arc::ptr_eq(&self.config, config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_a_forgotten_host_had_counted_stays_counted() {
        let hosts = UnknownHosts::new(Arc::new(Resolver::from_system().unwrap()), Met::ByService);
        let config = Arc::new(Config::default());
        let host = hosts.get(&HostPort::new("127.0.0.1", 9), &config);
        host.counts().retries.add("sent");
        let sent =
            |counts: &Counts| counts.retries.read().find(|(word, _)| *word == "sent").map(|(_, count)| count);
        let (known, forgotten) = hosts.read();
        assert_eq!((known.len(), sent(&forgotten)), (1, Some(0)));

        hosts.forget_idle_at(hosts.now() + IDLE_MS + 1000);
        let (known, forgotten) = hosts.read();
        assert_eq!((known.len(), sent(&forgotten)), (0, Some(1)));
    }
}
