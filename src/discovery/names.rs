//! The names of an upstream's targets and the last good answer for each.

use std::{collections::HashMap, net::IpAddr, net::SocketAddr, sync::Arc};

use tokio::{task::JoinSet, time::Instant};

use super::{
    MAX_ENDPOINTS,
    source::{Target, retry_at},
};
use crate::{
    dns::{Answer, Family, LOOKUP_LIMIT, Resolver},
    rng::Rng,
    upstream::{DiscoveryError, Found},
};

/// Look-ups of one upstream at a time.
const CONCURRENT: usize = 16;

#[derive(Default)]
pub(super) struct Names {
    states: HashMap<String, State>,
}

struct State {
    host: Arc<str>,
    /// As of the last good answer.
    addresses: Vec<IpAddr>,
    due: Instant,
    failures: u32,
}

impl Names {
    /// Makes room for the names of `targets`, and forgets all others.
    pub fn follow(&mut self, targets: &[Target], now: Instant) {
        let asked = |target: &&Target| target.known.is_empty() && target.address.literal().is_none();
        let mut old = std::mem::take(&mut self.states);
        for target in targets.iter().filter(asked) {
            let host = &target.address.host;
            if !self.states.contains_key(host) {
                let fresh =
                    || State { host: Arc::from(host.as_str()), addresses: Vec::new(), due: now, failures: 0 };
                let state = old.remove(host).unwrap_or_else(fresh);
                self.states.insert(host.clone(), state);
            }
        }
    }

    /// When the next look-up is due.
    pub fn due(&self) -> Option<Instant> {
        self.states.values().map(|state| state.due).min()
    }

    /// Whether the last look-up of some name failed.
    pub fn failing(&self) -> bool {
        self.states.values().any(|state| state.failures > 0)
    }

    pub fn all_due(&mut self, now: Instant) {
        for state in self.states.values_mut() {
            state.due = state.due.min(now);
        }
    }

    /// Looks up what is due. Tells `progress` of each good answer as it comes; the last error comes back.
    pub async fn look_up(
        &mut self,
        resolver: &Arc<Resolver>,
        rng: &mut Rng,
        mut progress: impl FnMut(&Self),
    ) -> Option<DiscoveryError> {
        let now = Instant::now();
        let mut waiting: Vec<String> =
            self.states.iter().filter(|(_, s)| s.due <= now).map(|(host, _)| host.clone()).collect();
        let mut running = JoinSet::new();
        let mut last_error = None;
        loop {
            while running.len() < CONCURRENT
                && let Some(host) = waiting.pop()
            {
                if let Some(state) = self.states.get_mut(&host) {
                    // Should the look-up end without a result, this is when it is made again.
                    state.due = retry_at(now, state.failures.saturating_add(1), rng).max(now + LOOKUP_LIMIT);
                }
                let resolver = resolver.clone();
                running.spawn(async move {
                    let answer = resolver.addresses(&host).await;
                    (host, answer)
                });
            }
            let Some(done) = running.join_next().await else { return last_error };
            let Ok((host, answer)) = done else { continue };
            let Some(state) = self.states.get_mut(&host) else { continue };
            match answer {
                Ok(answer) => {
                    state.accept(answer, rng);
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

    /// The endpoints that `targets` have as far as is known.
    pub fn found(&self, targets: &[Target]) -> Vec<Found> {
        let mut priorities: Vec<u16> = targets.iter().map(|target| target.priority).collect();
        priorities.sort_unstable();
        priorities.dedup();
        for priority in priorities {
            let found: Vec<_> = targets
                .iter()
                .filter(|target| target.priority == priority)
                .flat_map(|target| self.of(target))
                .take(MAX_ENDPOINTS)
                .collect();
            if !found.is_empty() {
                return found;
            }
        }
        Vec::new()
    }

    fn of<'a>(&'a self, target: &'a Target) -> impl Iterator<Item = Found> + 'a {
        let state = self.states.get(&target.address.host);
        let literal = target.address.literal();
        let (host, addresses): (Option<Arc<str>>, &[IpAddr]) = match state {
            _ if literal.is_some() => (None, &[]),
            Some(state) => (Some(state.host.clone()), &state.addresses),
            None => (Some(Arc::from(target.address.host.as_str())), &target.known),
        };
        let port = target.address.port;
        let resolved = addresses.iter().map(move |ip| SocketAddr::new(*ip, port));
        let found = move |address| Found { address, host: host.clone(), weight: target.weight };
        literal.into_iter().chain(resolved).map(found)
    }
}

impl State {
    fn accept(&mut self, answer: Answer, rng: &mut Rng) {
        let Answer { mut addresses, valid_for, missing } = answer;
        if let Some(family) = missing {
            // The family that could not be asked for keeps what it had.
            addresses.extend(self.addresses.iter().filter(|ip| Family::of(**ip) == family));
            addresses.sort_by_key(|ip| (ip.is_ipv6(), *ip));
            addresses.dedup();
        }
        self.addresses = addresses;
        self.failures = 0;
        // A little late rather than early: a caching server would give the old answer again with a TTL of nothing.
        self.due = Instant::now() + valid_for.mul_f64(1.0 + rng.unit_f64() / 10.0);
    }
}
