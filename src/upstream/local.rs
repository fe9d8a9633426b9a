//! What one worker knows of an upstream: its endpoints with their pools and latencies, and whose turn it is.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Endpoint, Upstream,
    balance::{Balancer, Candidate, PeakEwma, hash_key},
    pool::Pool,
};
use crate::{
    config::Balance,
    resilience::{
        classify::Health,
        outlier::{Change, EndpointHealth, Evidence},
    },
    rng::Rng,
};

/// An upstream, as one worker sees it.
#[derive(Debug)]
pub struct LocalUpstream {
    pub shared: Arc<Upstream>,
    /// The generation of `endpoints`.
    seen: Cell<u64>,
    endpoints: RefCell<Rc<[Rc<LocalEndpoint>]>>,
    balance: RefCell<(Balance, Balancer)>,
    /// Whose turn it is where all endpoints are absent.
    turn: Cell<usize>,
}

/// What an attempt's endpoint should be like.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// Endpoints to avoid, by index, as they have failed this request.
    pub tried: &'a [usize],
    /// What balances by hash.
    pub hash: Option<u64>,
    /// Whether the attempt may probe an absent endpoint.
    pub probe: Option<Probe>,
}

/// By which request an absent endpoint is probed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// One that may be sent again if it fails.
    Repeatable,
    /// Any other: only where no repeatable one has come for a while.
    Any,
}

/// An endpoint, as one worker sees it.
#[derive(Debug)]
pub struct LocalEndpoint {
    pub shared: Arc<Endpoint>,
    pub pool: Pool,
    /// What requests saw of it: whether it is ejected, absent, or avoided.
    health: Option<Arc<EndpointHealth>>,
    latency: Cell<PeakEwma>,
    in_flight: Cell<u32>,
    waiting: Cell<Waiting>,
    key: u64,
}

/// Calls that an endpoint has not answered yet. An average learns from answers only: of one that gives none it would
/// go on to expect the best.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    calls: u32,
    /// When the first of them was sent, or anything was answered.
    since: Instant,
}

/// A call in flight at an endpoint, until it is dropped.
#[derive(Debug)]
pub struct InFlight {
    endpoint: Rc<LocalEndpoint>,
    /// It waits for its answer's head.
    waits: Cell<bool>,
}

impl LocalUpstream {
    pub fn new(shared: Arc<Upstream>, balance: &Balance) -> Rc<Self> {
        Rc::new(Self {
            shared,
            seen: Cell::new(0),
            endpoints: RefCell::new(Rc::new([])),
            balance: RefCell::new((balance.clone(), Balancer::new(balance))),
            turn: Cell::new(0),
        })
    }

    /// Takes a changed way to balance; pools and latencies stay.
    pub fn set_balance(&self, balance: &Balance) {
        let mut current = self.balance.borrow_mut();
        if current.0 != *balance {
            *current = (balance.clone(), Balancer::new(balance));
        }
    }

    /// The endpoints as of now. Those that stayed keep their pools; of those that are gone, idle connections are
    /// closed here and calls in flight go on.
    pub fn endpoints(&self, rng: &mut Rng) -> Rc<[Rc<LocalEndpoint>]> {
        let set = self.shared.endpoints();
        if set.generation != self.seen.get() {
            let old = Rc::clone(&self.endpoints.borrow());
            let now = Instant::now();
            let known: HashMap<_, _> = old.iter().map(|local| (Arc::as_ptr(&local.shared), local)).collect();
            let local = |endpoint: &Arc<Endpoint>| {
                let same = known.get(&Arc::as_ptr(endpoint)).map(|local| Rc::clone(local));
                same.unwrap_or_else(|| {
                    let health = self.shared.guards.outliers.endpoint(&endpoint.address);
                    Rc::new(LocalEndpoint::new(Arc::clone(endpoint), health, now))
                })
            };
            let endpoints: Rc<[_]> = set.endpoints.iter().map(local).collect();
            self.balance.borrow_mut().1.rebuild(&endpoints, rng);
            self.endpoints.replace(endpoints);
            self.seen.set(set.generation);
        }
        Rc::clone(&self.endpoints.borrow())
    }

    /// The index of the endpoint for the next attempt.
    pub fn pick(
        &self,
        endpoints: &[Rc<LocalEndpoint>],
        wanted: &Wanted<'_>,
        now: Instant,
        rng: &mut Rng,
    ) -> Option<usize> {
        let tried = wanted.tried;
        // One endpoint needs no choice.
        if let [only] = endpoints {
            return only.shared.is_healthy().then_some(0);
        }
        if self.shared.guards.outliers.any_absent()
            && let Some(index) = self.claim_probe(endpoints, wanted, now)
        {
            return Some(index);
        }
        let picked = self.balance.borrow_mut().1.pick(endpoints, now, rng, tried, wanted.hash);
        let index = picked.filter(|index| !tried.contains(index));
        let index = index.or_else(|| self.second_best(endpoints, tried, picked, now))?;
        endpoints[index].chosen(now);
        Some(index)
    }

    /// The absent endpoint that the request is to probe, if there is one. By hash, only the one that the hash names: requests
    /// that belong together stay together.
    fn claim_probe(
        &self,
        endpoints: &[Rc<LocalEndpoint>],
        wanted: &Wanted<'_>,
        now: Instant,
    ) -> Option<usize> {
        let repeatable = wanted.probe? == Probe::Repeatable;
        let named = self.balance.borrow().1.named(wanted.hash);
        let may_probe =
            |index: &usize| !wanted.tried.contains(index) && named.is_none_or(|named| named == *index);
        let mut candidates = (0..endpoints.len()).filter(may_probe);
        candidates.find(|index| endpoints[*index].claim_probe(repeatable, now))
    }

    /// Where every endpoint that can be used has failed this very request. An ejected endpoint is better then, as when
    /// instances restart in turn and the first is back before its ejection ends; and so is an absent one that accepts
    /// connections again. Also where health checks have taken out the rest.
    fn second_best(
        &self,
        endpoints: &[Rc<LocalEndpoint>],
        tried: &[usize],
        picked: Option<usize>,
        now: Instant,
    ) -> Option<usize> {
        let healthy = || (0..endpoints.len()).filter(|index| endpoints[*index].shared.is_healthy());
        let untried = || healthy().filter(|index| !tried.contains(index));
        let absent = |index: &usize| endpoints[*index].is_absent();
        untried()
            .find(|index| !absent(index))
            .or_else(|| untried().find(|index| endpoints[*index].awaits_probe(now)))
            .or(picked)
            .or_else(|| healthy().find(|index| !absent(index)))
            .or_else(|| self.next_of(&mut untried()))
            .or_else(|| self.next_of(&mut healthy()))
    }

    /// All are absent: they are tried in turn.
    fn next_of(&self, candidates: &mut dyn Iterator<Item = usize>) -> Option<usize> {
        let turn = self.turn.get();
        self.turn.set(turn.wrapping_add(1));
        let candidates: Vec<usize> = candidates.collect();
        candidates.get(turn.checked_rem(candidates.len())?).copied()
    }

    /// What an outcome at this endpoint counts for the breaker, which is for the upstream as a whole: a failure where the
    /// endpoint is ejected, absent or failing counts for nothing as long as another one serves.
    pub fn blame(&self, endpoint: &LocalEndpoint, health: Health, now: Instant) -> Health {
        let serves = |other: &Rc<LocalEndpoint>| !std::ptr::eq(&**other, endpoint) && other.is_serving(now);
        let excused = health == Health::Failure
            && !endpoint.is_serving(now)
            && self.endpoints.borrow().iter().any(serves);
        if excused { Health::Neutral } else { health }
    }

    /// The endpoints this worker has used, without looking for new ones.
    pub fn known(&self) -> Rc<[Rc<LocalEndpoint>]> {
        Rc::clone(&self.endpoints.borrow())
    }
}

impl LocalEndpoint {
    pub(super) fn new(shared: Arc<Endpoint>, health: Option<Arc<EndpointHealth>>, now: Instant) -> Self {
        let key = hash_key(shared.address.to_string().as_bytes());
        Self {
            shared,
            pool: Pool::default(),
            health,
            latency: Cell::new(PeakEwma::new(now)),
            in_flight: Cell::new(0),
            waiting: Cell::new(Waiting { calls: 0, since: now }),
            key,
        }
    }

    pub fn address(&self) -> SocketAddr {
        self.shared.address
    }

    /// Counts something that gets no answer of its own, a tunnel, until the guard is dropped.
    pub fn enter(self: &Rc<Self>) -> InFlight {
        self.in_flight.set(self.in_flight.get() + 1);
        InFlight { endpoint: Rc::clone(self), waits: Cell::new(false) }
    }

    /// Counts a call until the guard is dropped. Its answer is waited for from `now` on.
    pub fn ask(self: &Rc<Self>, now: Instant) -> InFlight {
        let waiting = self.waiting.get();
        let since = if waiting.calls == 0 { now } else { waiting.since };
        self.waiting.set(Waiting { calls: waiting.calls + 1, since });
        let in_flight = self.enter();
        in_flight.waits.set(true);
        in_flight
    }

    /// Tells outlier detection what came of an attempt here that began at `began`, and logs what changed by it. `random`
    /// draws from 0 to 1.
    pub fn report(
        &self,
        upstream: &Upstream,
        evidence: Evidence,
        (began, now): (Instant, Instant),
        random: impl FnOnce() -> f64,
    ) -> Option<Change> {
        let (health, name, endpoint) = (self.health.as_ref()?, &*upstream.name, self.address());
        let random = if evidence.is_failure() { random() } else { 0.0 };
        let outliers = &upstream.guards.outliers;
        let change = outliers.report(&endpoint, health, evidence, (began, now), random)?;
        match &change {
            Change::Ejected(ejection) => {
                tracing::warn!(
                    upstream = name,
                    %endpoint,
                    failures = ejection.failures_in_a_row,
                    "endpoint ejected"
                );
                // It may have been replaced. One that accepts no connections is asked for by whoever looks after it.
                upstream.refresh();
            }
            Change::Absent if evidence == Evidence::NoService => {
                tracing::warn!(upstream = name, %endpoint, "endpoint has no service behind it");
            }
            Change::Absent => tracing::warn!(upstream = name, %endpoint, "endpoint accepts no connections"),
            Change::Present => tracing::info!(upstream = name, %endpoint, "endpoint serves again"),
            Change::StillAbsent => {}
        }
        Some(change)
    }

    /// Whether it may be chosen, as far as is known: it is healthy, and neither ejected nor absent.
    pub fn is_usable(&self, now: Instant) -> bool {
        self.shared.is_healthy() && self.health.as_ref().is_none_or(|health| health.is_available(now))
    }

    fn is_serving(&self, now: Instant) -> bool {
        self.shared.is_healthy() && self.health.as_ref().is_none_or(|health| health.is_serving(now))
    }

    /// Whether it is absent, until a request succeeds.
    pub fn is_absent(&self) -> bool {
        self.health.as_ref().is_some_and(|health| health.is_absent())
    }

    fn awaits_probe(&self, now: Instant) -> bool {
        self.health.as_ref().is_some_and(|health| health.awaits_probe(now))
    }

    fn claim_probe(&self, repeatable: bool, now: Instant) -> bool {
        let claim = |health: &Arc<EndpointHealth>| health.claim_probe(repeatable, now);
        self.shared.is_healthy() && self.health.as_ref().is_some_and(claim)
    }

    /// It was chosen for an attempt.
    fn chosen(&self, now: Instant) {
        if let Some(health) = &self.health {
            health.chosen(now);
        }
    }

    /// A request failed after this long. Failing fast must not look like answering fast, nor slow failures like fast ones.
    pub fn observe_failure(&self, took: Duration, now: Instant) {
        if took.as_secs_f64() > self.latency.get().cost(now) {
            self.observe(took, now);
        } else {
            self.waiting.set(Waiting { since: now, ..self.waiting.get() });
        }
    }

    /// A call took this long to response headers, or to fail.
    pub fn observe(&self, latency: Duration, now: Instant) {
        let mut average = self.latency.get();
        average.observe(latency, now);
        self.latency.set(average);
        self.waiting.set(Waiting { since: now, ..self.waiting.get() });
    }
}

impl InFlight {
    /// Its answer's head is there.
    pub fn answered(&self) {
        if self.waits.take() {
            let waiting = self.endpoint.waiting.get();
            let calls = waiting.calls.saturating_sub(1);
            self.endpoint.waiting.set(Waiting { calls, ..waiting });
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.answered();
        self.endpoint.in_flight.set(self.endpoint.in_flight.get().saturating_sub(1));
    }
}

impl Candidate for Rc<LocalEndpoint> {
    fn usable(&self, now: Instant) -> bool {
        self.is_usable(now)
    }
    fn avoided(&self, now: Instant) -> bool {
        self.health.as_ref().is_some_and(|health| health.is_avoided(now))
    }
    fn suspected(&self) -> bool {
        self.health.as_ref().is_some_and(|health| health.is_suspected())
    }
    fn latency(&self, now: Instant) -> f64 {
        let expected = self.latency.get().cost(now);
        match self.waiting.get() {
            Waiting { calls: 0, .. } => expected,
            Waiting { since, .. } => expected.max(now.saturating_duration_since(since).as_secs_f64()),
        }
    }
    fn in_flight(&self) -> u32 {
        self.in_flight.get()
    }
    fn weight(&self) -> u32 {
        self.shared.weight()
    }
    fn key(&self) -> u64 {
        self.key
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upstream::endpoint::Found;

    /// Else an endpoint that fails at once attracts requests: by its speed, or, if a failure cost a fixed time, as soon as
    /// those that serve have more than that to do.
    #[test]
    fn a_failure_changes_the_expected_latency_only_where_it_took_longer() {
        let now = Instant::now();
        let found = Found { address: "127.0.0.1:1".parse().unwrap(), host: None, weight: 1 };
        let endpoint = Rc::new(LocalEndpoint::new(Arc::new(Endpoint::new(found)), None, now));
        endpoint.observe(Duration::from_millis(120), now);
        for _ in 0..100 {
            endpoint.observe_failure(Duration::from_millis(1), now);
        }
        assert!((endpoint.latency(now) - 0.12).abs() < 1e-6, "{}", endpoint.latency(now));
        endpoint.observe_failure(Duration::from_millis(300), now);
        assert!((endpoint.latency(now) - 0.3).abs() < 1e-6, "{}", endpoint.latency(now));
    }

    /// An endpoint that takes calls and never answers is seen to be slow while they wait, not only once they have
    /// failed; a long answer that has begun is no wait.
    #[test]
    fn an_endpoint_is_as_slow_as_it_has_been_silent() {
        let start = Instant::now();
        let at = |seconds: f64| start + Duration::from_secs_f64(seconds);
        let found = Found { address: "127.0.0.1:1".parse().unwrap(), host: None, weight: 1 };
        let shared = Arc::new(Endpoint::new(found));
        let endpoint = Rc::new(LocalEndpoint::new(shared, None, start));
        endpoint.observe(Duration::from_millis(50), at(0.0));
        assert!(endpoint.latency(at(5.0)) < 0.05, "nobody waits");

        let first = endpoint.ask(at(5.0));
        assert!(endpoint.latency(at(5.01)) < 0.05);
        assert!((endpoint.latency(at(7.0)) - 2.0).abs() < 1e-6, "silent for two seconds");
        let second = endpoint.ask(at(8.0));
        assert!((endpoint.latency(at(8.0)) - 3.0).abs() < 1e-6, "a new call is no sign of life");

        second.answered();
        endpoint.observe(Duration::from_millis(50), at(8.05));
        assert!(endpoint.latency(at(8.06)) < 0.06, "an answer is");
        drop(first);
        assert!(
            endpoint.latency(at(60.0)) < 0.05,
            "the answer of the second is still coming, but it has begun"
        );
        assert_eq!(endpoint.in_flight(), 1);
        let _tunnel = endpoint.enter();
        assert!(endpoint.latency(at(90.0)) < 0.05);
    }
}
