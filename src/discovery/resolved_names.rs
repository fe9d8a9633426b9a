//! The host names of an upstream's endpoints, with the last good addresses of each.

use std::{collections::HashMap, net::IpAddr, net::SocketAddr, sync::Arc};

use tokio::{task::JoinSet, time::Instant};

use super::{
    MAX_ENDPOINTS,
    source::{UnresolvedEndpoint, retry_at},
};
use crate::{
    dns::{AddressFamily, LOOKUP_LIMIT, ResolvedAddresses, Resolver},
    rng::Rng,
    upstream::{DiscoveredEndpoint, DiscoveryError},
};

/// The most concurrent lookups of one upstream.
const CONCURRENT: usize = 16;

#[derive(Default)]
pub(super) struct ResolvedNames {
    states: HashMap<String, NameState>,
}

struct NameState {
    host: Arc<str>,
    /// Of the last successful lookup.
    addresses: Vec<IpAddr>,
    due: Instant,
    failures: u32,
}

impl ResolvedNames {
    /// Adds the names of `targets`, and drops all others.
    pub fn sync(&mut self, targets: &[UnresolvedEndpoint], now: Instant) {
        let needs_lookup = |target: &&UnresolvedEndpoint| {
            target.known_addresses.is_empty() && target.address.socket_addr().is_none()
        };
        let mut old = std::mem::take(&mut self.states);
        for target in targets.iter().filter(needs_lookup) {
            let host = &target.address.host;
            if !self.states.contains_key(host) {
                let new_state = || NameState {
                    host: Arc::from(host.as_str()),
                    addresses: Vec::new(),
                    due: now,
                    failures: 0,
                };
                let state = old.remove(host).unwrap_or_else(new_state);
                self.states.insert(host.clone(), state);
            }
        }
    }

    /// When the next lookup is due.
    pub fn due(&self) -> Option<Instant> {
        self.states.values().map(|state| state.due).min()
    }

    /// Whether the last lookup of any name failed.
    pub fn has_failures(&self) -> bool {
        self.states.values().any(|state| state.failures > 0)
    }

    pub fn expire_all(&mut self, now: Instant) {
        for state in self.states.values_mut() {
            state.due = state.due.min(now);
        }
    }

    /// Looks up the names that are due. Calls `progress` after each successful lookup; returns the last error.
    pub async fn look_up(
        &mut self,
        resolver: &Arc<Resolver>,
        rng: &mut Rng,
        mut progress: impl FnMut(&Self),
    ) -> Option<DiscoveryError> {
        let now = Instant::now();
        let mut queued: Vec<String> =
            self.states.iter().filter(|(_, s)| s.due <= now).map(|(host, _)| host.clone()).collect();
        let mut running = JoinSet::new();
        let mut last_error = None;
        loop {
            while running.len() < CONCURRENT
                && let Some(host) = queued.pop()
            {
                if let Some(state) = self.states.get_mut(&host) {
                    // If the lookup ends without a result, it is repeated at this time.
                    state.due = retry_at(now, state.failures.saturating_add(1), rng).max(now + LOOKUP_LIMIT);
                }
                let resolver = resolver.clone();
                running.spawn(async move {
                    let result = resolver.addresses(&host).await;
                    (host, result)
                });
            }
            let Some(done) = running.join_next().await else { return last_error };
            let Ok((host, result)) = done else { continue };
            let Some(state) = self.states.get_mut(&host) else { continue };
            match result {
                Ok(result) => {
                    state.accept(result, rng);
                    progress(self);
                }
                Err(error) => {
                    state.failures = state.failures.saturating_add(1);
                    state.due = retry_at(Instant::now(), state.failures, rng);
                    last_error = Some(error.into());
                }
            }
        }
    }

    /// The endpoints of `targets` known so far.
    pub fn endpoints(&self, targets: &[UnresolvedEndpoint]) -> Vec<DiscoveredEndpoint> {
        let mut priorities: Vec<u16> = targets.iter().map(|target| target.priority).collect();
        priorities.sort_unstable();
        priorities.dedup();
        for priority in priorities {
            let endpoints: Vec<_> = targets
                .iter()
                .filter(|target| target.priority == priority)
                .flat_map(|target| self.endpoints_of(target))
                .take(MAX_ENDPOINTS)
                .collect();
            if !endpoints.is_empty() {
                return endpoints;
            }
        }
        Vec::new()
    }

    fn endpoints_of<'a>(
        &'a self,
        target: &'a UnresolvedEndpoint,
    ) -> impl Iterator<Item = DiscoveredEndpoint> + 'a {
        let state = self.states.get(&target.address.host);
        let literal = target.address.socket_addr();
        let (host, addresses): (Option<Arc<str>>, &[IpAddr]) = match state {
            _ if literal.is_some() => (None, &[]),
            Some(state) => (Some(state.host.clone()), &state.addresses),
            None => (Some(Arc::from(target.address.host.as_str())), &target.known_addresses),
        };
        let port = target.address.port;
        let resolved = addresses.iter().map(move |ip| SocketAddr::new(*ip, port));
        let endpoint =
            move |address| DiscoveredEndpoint { address, host: host.clone(), weight: target.weight };
        literal.into_iter().chain(resolved).map(endpoint)
    }
}

impl NameState {
    fn accept(&mut self, result: ResolvedAddresses, rng: &mut Rng) {
        let ResolvedAddresses { mut addresses, valid_for, failed_family: missing } = result;
        if let Some(family) = missing {
            // If the lookup of one family failed, its previous addresses stay.
            addresses.extend(self.addresses.iter().filter(|ip| AddressFamily::of(**ip) == family));
            addresses.sort_by_key(|ip| (ip.is_ipv6(), *ip));
            addresses.dedup();
        }
        self.addresses = addresses;
        self.failures = 0;
        // Slightly late rather than early: a caching server would return the old answer again with a TTL of almost
        // zero.
        self.due = Instant::now() + valid_for.mul_f64(1.0 + rng.unit_f64() / 10.0);
    }
}
