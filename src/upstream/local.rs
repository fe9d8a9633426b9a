//! The view of one worker on an upstream: its endpoints with their pools and latencies, and the balancer.

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
        outlier::{AttemptTimes, EndpointChange, EndpointHealth, EndpointOutcome},
    },
    rng::Rng,
};

/// An upstream as one worker sees it.
#[derive(Debug)]
pub struct LocalUpstream {
    pub shared: Arc<Upstream>,
    /// The generation of `endpoints`.
    generation: Cell<u64>,
    endpoints: RefCell<Rc<[Rc<LocalEndpoint>]>>,
    balance: RefCell<(Balance, Balancer)>,
    /// The next endpoint in turn when all are absent.
    turn: Cell<usize>,
}

/// Criteria for the endpoint of an attempt.
#[derive(Clone, Copy, Debug)]
pub struct PickCriteria<'a> {
    /// Endpoints to avoid, by index, because they have failed this request.
    pub tried: &'a [usize],
    /// The key of hash balancing.
    pub hash: Option<u64>,
    /// Whether the attempt may probe an absent endpoint.
    pub probe: Option<Probe>,
}

/// Which requests may probe an absent endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// Those that may be sent again if they fail.
    Repeatable,
    /// Any other: only if no repeatable one has arrived for a while.
    Any,
}

/// An endpoint as one worker sees it.
#[derive(Debug)]
pub struct LocalEndpoint {
    pub shared: Arc<Endpoint>,
    pub pool: Pool,
    /// The result of outlier detection: whether it is ejected, absent, or avoided.
    health: Option<Arc<EndpointHealth>>,
    latency: Cell<PeakEwma>,
    in_flight: Cell<u32>,
    awaited: Cell<AwaitedResponses>,
    key: u64,
}

/// Requests that an endpoint has not responded to yet. A moving average learns from responses only: without them it
/// would keep expecting the best.
#[derive(Clone, Copy, Debug)]
struct AwaitedResponses {
    requests: u32,
    /// When the first of them was sent, or the last response came.
    since: Instant,
}

/// A request in flight at an endpoint, until it is dropped.
#[derive(Debug)]
pub struct InFlight {
    endpoint: Rc<LocalEndpoint>,
    /// Its response head has not been received.
    awaits_head: Cell<bool>,
}

impl LocalUpstream {
    pub fn new(shared: Arc<Upstream>, balance: &Balance) -> Rc<Self> {
        Rc::new(Self {
            shared,
            generation: Cell::new(0),
            endpoints: RefCell::new(Rc::new([])),
            balance: RefCell::new((balance.clone(), Balancer::new(balance))),
            turn: Cell::new(0),
        })
    }

    /// Applies a changed balancing algorithm; pools and latencies stay.
    pub fn set_balance(&self, balance: &Balance) {
        let mut current = self.balance.borrow_mut();
        if current.0 != *balance {
            *current = (balance.clone(), Balancer::new(balance));
        }
    }

    /// The current endpoints. Remaining endpoints keep their pools; removed ones have their idle connections closed
    /// here, while requests in flight continue.
    pub fn endpoints(&self, rng: &mut Rng) -> Rc<[Rc<LocalEndpoint>]> {
        let set = self.shared.endpoints();
        if set.generation != self.generation.get() {
            let old = Rc::clone(&self.endpoints.borrow());
            let now = Instant::now();
            let known: HashMap<_, _> = old.iter().map(|local| (Arc::as_ptr(&local.shared), local)).collect();
            let local = |endpoint: &Arc<Endpoint>| {
                let same = known.get(&Arc::as_ptr(endpoint)).map(|local| Rc::clone(local));
                same.unwrap_or_else(|| {
                    let health = self.shared.policy_state.outliers.endpoint(&endpoint.address);
                    Rc::new(LocalEndpoint::new(Arc::clone(endpoint), health, now))
                })
            };
            let endpoints: Rc<[_]> = set.endpoints.iter().map(local).collect();
            self.balance.borrow_mut().1.rebuild(&endpoints, rng);
            self.endpoints.replace(endpoints);
            self.generation.set(set.generation);
        }
        Rc::clone(&self.endpoints.borrow())
    }

    /// The index of the endpoint for the next attempt.
    pub fn pick(
        &self,
        endpoints: &[Rc<LocalEndpoint>],
        wanted: &PickCriteria<'_>,
        now: Instant,
        rng: &mut Rng,
    ) -> Option<usize> {
        let tried = wanted.tried;
        // A single endpoint needs no choice.
        if let [only] = endpoints {
            return only.shared.is_healthy().then_some(0);
        }
        if self.shared.policy_state.outliers.any_absent()
            && let Some(index) = self.claim_probe(endpoints, wanted, now)
        {
            return Some(index);
        }
        let picked = self.balance.borrow_mut().1.pick(endpoints, now, rng, tried, wanted.hash);
        let index = picked.filter(|index| !tried.contains(index));
        let index = index.or_else(|| self.pick_fallback(endpoints, tried, picked, now))?;
        endpoints[index].mark_chosen(now);
        Some(index)
    }

    /// The absent endpoint that the request is to probe, if there is one. With hash balancing only the endpoint of
    /// the hash, so that requests with the same key stay together.
    fn claim_probe(
        &self,
        endpoints: &[Rc<LocalEndpoint>],
        wanted: &PickCriteria<'_>,
        now: Instant,
    ) -> Option<usize> {
        let repeatable = wanted.probe? == Probe::Repeatable;
        let named = self.balance.borrow().1.hash_target(wanted.hash);
        let may_probe =
            |index: &usize| !wanted.tried.contains(index) && named.is_none_or(|named| named == *index);
        let mut candidates = (0..endpoints.len()).filter(may_probe);
        candidates.find(|index| endpoints[*index].claim_probe(repeatable, now))
    }

    /// The choice if every usable endpoint has failed this request, or health checks have failed for the rest. An
    /// ejected endpoint is better then, as in a rolling restart, when the first instance is back before its ejection
    /// ends; so is an absent one that accepts connections again.
    fn pick_fallback(
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
            .or_else(|| self.next_in_turn(&mut untried()))
            .or_else(|| self.next_in_turn(&mut healthy()))
    }

    /// All are absent: try them in turn.
    fn next_in_turn(&self, candidates: &mut dyn Iterator<Item = usize>) -> Option<usize> {
        let turn = self.turn.get();
        self.turn.set(turn.wrapping_add(1));
        let candidates: Vec<usize> = candidates.collect();
        candidates.get(turn.checked_rem(candidates.len())?).copied()
    }

    /// What an outcome at this endpoint means for the breaker, which covers the whole upstream: a failure at an
    /// endpoint that is ejected, absent or failing is neutral as long as another endpoint serves.
    pub fn health_for_breaker(&self, endpoint: &LocalEndpoint, health: Health, now: Instant) -> Health {
        let serves = |other: &Rc<LocalEndpoint>| !std::ptr::eq(&**other, endpoint) && other.is_serving(now);
        let excused = health == Health::Failure
            && !endpoint.is_serving(now)
            && self.endpoints.borrow().iter().any(serves);
        if excused { Health::Neutral } else { health }
    }

    /// The endpoints that this worker has used, without checking for a new generation.
    pub fn known_endpoints(&self) -> Rc<[Rc<LocalEndpoint>]> {
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
            awaited: Cell::new(AwaitedResponses { requests: 0, since: now }),
            key,
        }
    }

    pub fn address(&self) -> SocketAddr {
        self.shared.address
    }

    /// Counts something without a response of its own, a tunnel, until the guard is dropped.
    pub fn count_in_flight(self: &Rc<Self>) -> InFlight {
        self.in_flight.set(self.in_flight.get() + 1);
        InFlight { endpoint: Rc::clone(self), awaits_head: Cell::new(false) }
    }

    /// Counts a request until the guard is dropped. Its response is awaited from `now` on.
    pub fn start_request(self: &Rc<Self>, now: Instant) -> InFlight {
        let awaited = self.awaited.get();
        let since = if awaited.requests == 0 { now } else { awaited.since };
        self.awaited.set(AwaitedResponses { requests: awaited.requests + 1, since });
        let in_flight = self.count_in_flight();
        in_flight.awaits_head.set(true);
        in_flight
    }

    /// Reports the outcome of an attempt to outlier detection, and logs what it changed.
    /// `random` draws from 0 to 1.
    pub fn report(
        &self,
        upstream: &Upstream,
        evidence: EndpointOutcome,
        times: AttemptTimes,
        random: impl FnOnce() -> f64,
    ) -> Option<EndpointChange> {
        let (health, name, endpoint) = (self.health.as_ref()?, &*upstream.name, self.address());
        let random = if evidence.is_failure() { random() } else { 0.0 };
        let outliers = &upstream.policy_state.outliers;
        let change = outliers.report(&endpoint, health, evidence, times, random)?;
        match &change {
            EndpointChange::Ejected(ejection) => {
                tracing::warn!(
                    upstream = name,
                    %endpoint,
                    failures = ejection.consecutive_failures,
                    "endpoint ejected"
                );
                // It may have been replaced. For an endpoint that accepts no connections, the task in `reachability`
                // asks for a refresh.
                upstream.refresh();
            }
            EndpointChange::Absent if evidence == EndpointOutcome::NoService => {
                tracing::warn!(upstream = name, %endpoint, "endpoint has no service behind it");
            }
            EndpointChange::Absent => {
                tracing::warn!(upstream = name, %endpoint, "endpoint accepts no connections")
            }
            EndpointChange::Present => {
                tracing::info!(upstream = name, %endpoint, "endpoint serves again");
                // The breaker may have opened while the probe was in flight: with the endpoint restored, no further
                // probe would offer a trial, and a serving endpoint would wait out `open_for`.
                upstream.policy_state.offer_trial();
            }
            EndpointChange::StillAbsent => {}
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

    /// Records that it was chosen for an attempt.
    fn mark_chosen(&self, now: Instant) {
        if let Some(health) = &self.health {
            health.record_chosen(now);
        }
    }

    /// Records a failed request's duration. A fast failure must not look like a fast response, nor a slow failure
    /// like a fast one.
    pub fn observe_failure(&self, took: Duration, now: Instant) {
        if took.as_secs_f64() > self.latency.get().cost(now) {
            self.observe_latency(took, now);
        } else {
            self.awaited.set(AwaitedResponses { since: now, ..self.awaited.get() });
        }
    }

    /// Records how long a request took to response headers, or to fail.
    pub fn observe_latency(&self, latency: Duration, now: Instant) {
        let mut average = self.latency.get();
        average.observe(latency, now);
        self.latency.set(average);
        self.awaited.set(AwaitedResponses { since: now, ..self.awaited.get() });
    }
}

impl InFlight {
    /// Records that the response head was received.
    pub fn response_started(&self) {
        if self.awaits_head.take() {
            let awaited = self.endpoint.awaited.get();
            let requests = awaited.requests.saturating_sub(1);
            self.endpoint.awaited.set(AwaitedResponses { requests, ..awaited });
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.response_started();
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
    fn suspected(&self, now: Instant) -> bool {
        self.health.as_ref().is_some_and(|health| health.is_suspected(now))
    }
    fn latency(&self, now: Instant) -> f64 {
        let expected = self.latency.get().cost(now);
        match self.awaited.get() {
            AwaitedResponses { requests: 0, .. } => expected,
            AwaitedResponses { since, .. } => {
                expected.max(now.saturating_duration_since(since).as_secs_f64())
            }
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
    use crate::upstream::endpoint::DiscoveredEndpoint;

    /// Otherwise an endpoint that fails at once attracts requests: by its speed, or, if each failure cost a fixed time,
    /// as soon as the endpoints that serve have a higher latency than that.
    #[test]
    fn only_a_slower_failure_changes_the_expected_latency() {
        let now = Instant::now();
        let discovered =
            DiscoveredEndpoint { address: "127.0.0.1:1".parse().unwrap(), host: None, weight: 1 };
        let endpoint = Rc::new(LocalEndpoint::new(Arc::new(Endpoint::new(discovered)), None, now));
        endpoint.observe_latency(Duration::from_millis(120), now);
        for _ in 0..100 {
            endpoint.observe_failure(Duration::from_millis(1), now);
        }
        assert!((endpoint.latency(now) - 0.12).abs() < 1e-6, "{}", endpoint.latency(now));
        endpoint.observe_failure(Duration::from_millis(300), now);
        assert!((endpoint.latency(now) - 0.3).abs() < 1e-6, "{}", endpoint.latency(now));
    }

    /// An endpoint that accepts requests and never responds counts as slow while they wait, not only once they have
    /// failed; a long response that has started is no wait.
    #[test]
    fn an_endpoint_is_as_slow_as_its_silence() {
        let start = Instant::now();
        let at = |seconds: f64| start + Duration::from_secs_f64(seconds);
        let discovered =
            DiscoveredEndpoint { address: "127.0.0.1:1".parse().unwrap(), host: None, weight: 1 };
        let shared = Arc::new(Endpoint::new(discovered));
        let endpoint = Rc::new(LocalEndpoint::new(shared, None, start));
        endpoint.observe_latency(Duration::from_millis(50), at(0.0));
        assert!(endpoint.latency(at(5.0)) < 0.05, "no request waits");

        let first = endpoint.start_request(at(5.0));
        assert!(endpoint.latency(at(5.01)) < 0.05);
        assert!((endpoint.latency(at(7.0)) - 2.0).abs() < 1e-6, "silent for two seconds");
        let second = endpoint.start_request(at(8.0));
        assert!((endpoint.latency(at(8.0)) - 3.0).abs() < 1e-6, "a new request is no sign of life");

        second.response_started();
        endpoint.observe_latency(Duration::from_millis(50), at(8.05));
        assert!(endpoint.latency(at(8.06)) < 0.06, "a response is");
        drop(first);
        assert!(
            endpoint.latency(at(60.0)) < 0.05,
            "the second response is still in progress, but has started"
        );
        assert_eq!(endpoint.in_flight(), 1);
        let _tunnel = endpoint.count_in_flight();
        assert!(endpoint.latency(at(90.0)) < 0.05);
    }
}
