//! The policy state of an upstream that all workers share and that outlives a reload: breaker, ejections, retry
//! budget, limits, rates. The state machines are in [`crate::resilience`].

use std::{
    collections::hash_map::RandomState,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    task::Waker,
    time::Instant,
};

use arc_swap::{ArcSwap, ArcSwapOption};
use tokio::time::timeout;

use super::{
    connect::ConnectError,
    eviction::{self, Eviction},
    reachability::Reachability,
};
use crate::{
    config::Policy,
    durations::Durations,
    net::alpn::ConnectionTls,
    resilience::{
        adaptive::AdaptiveLimit,
        breaker::{Breaker, BreakerPermit, BreakerSettings, BreakerState, BreakerTransition},
        budget::{BudgetSettings, RetryBudget},
        classify::Health,
        deprecation::DeprecatedRequests,
        hedge::LatencyQuantile,
        limit::{BoundedCounter, LimitSettings, NotifyWaiter, RequestLimit},
        outlier::{OutlierDetector, OutlierSettings},
        rate::{RateKey, RateLimit, RateSettings},
        retry::SharedLimits,
    },
};

/// Where the adaptive limit starts: enough for most services, and little for an overloaded one.
const ADAPTIVE_START: u32 = 32;
/// The percentile of the latencies that counts as usual.
const USUAL_PERCENTILE: u8 = 95;

/// Attempts per second that may switch to another endpoint because the chosen one accepted no connection.
const SWITCH_RATE: RateSettings = RateSettings { rate: 1000, burst: 1000, per: RateKey::Upstream };

/// What an attempt says to the breaker.
#[derive(Clone, Copy, Debug)]
pub struct BreakerOutcome {
    pub health: Health,
    /// The attempt found its endpoint absent.
    pub is_absence: bool,
}

/// The policy state of an upstream.
#[derive(Debug)]
pub struct PolicyState {
    pub breaker: Arc<Breaker>,
    /// Whether the breaker is open because the endpoints are absent: then it may close before its time is over.
    pub reachability: Reachability,
    pub outliers: OutlierDetector,
    pub budget: RetryBudget,
    pub requests: RequestLimit<QueuedWaker>,
    pub connections: BoundedCounter,
    /// Open connections by how they are protected.
    open: [AtomicI64; ConnectionTls::ALL.len()],
    /// Closes an idle connection when `max_connections` is reached and another one is needed.
    pub eviction: Eviction,
    /// Adjusts the request limit by latency, if enabled.
    pub adaptive: ArcSwapOption<AdaptiveLimit>,
    /// Bounds attempts that switch to another endpoint without using retry budget.
    switch_rate: RateLimit,
    rates: Mutex<Vec<(RateSettings, Arc<RateLimit>)>>,
    /// By percent. Replaced as a whole when one is added, so that a lookup never blocks.
    quantiles: ArcSwap<Vec<(u8, Arc<LatencyQuantile>)>>,
    /// The 95th percentile of all latencies, from its first use on.
    usual_latency: OnceLock<LatencyQuantile>,
    pub counters: PolicyCounters,
    /// Requests of its routes that are deprecated.
    pub deprecated: DeprecatedRequests,
    /// The durations of its requests.
    pub durations: Durations,
}

/// Wakes a request that is queued for a permit.
#[derive(Debug)]
pub struct QueuedWaker(pub Waker);

impl NotifyWaiter for QueuedWaker {
    fn notify(self) {
        self.0.wake();
    }
}

/// A permit for one request in flight; dropping it releases it.
#[derive(Debug)]
pub struct RequestPermit(pub Arc<PolicyState>);

impl Drop for RequestPermit {
    fn drop(&mut self) {
        self.0.requests.release(Instant::now);
    }
}

/// A slot for one connection to an upstream; dropping it releases it.
#[derive(Debug)]
pub struct ConnectionSlot {
    policy_state: Arc<PolicyState>,
    /// How the connection is protected, once it is open.
    opened: Option<ConnectionTls>,
}

impl ConnectionSlot {
    /// Acquires a slot for one more connection. At the limit an idle connection is closed for it, if there is one.
    pub async fn acquire(policy_state: &Arc<PolicyState>) -> Result<Self, ConnectError> {
        if let Some(slot) = Self::try_take(policy_state) {
            return Ok(slot);
        }
        let request = policy_state.eviction.request();
        let acquired = timeout(eviction::EVICTION_TIMEOUT, async {
            loop {
                let freed = request.slot_freed();
                if let Some(slot) = Self::try_take(policy_state) {
                    return slot;
                }
                request.request_another();
                freed.await;
            }
        });
        Box::pin(acquired)
            .await
            .map_err(|_| ConnectError::ConnectionLimit { limit: policy_state.connections.limit() })
    }

    /// Whether a request needs this slot, and no other connection has been closed for it. If so, this one must be.
    pub fn claim_eviction(&self) -> bool {
        self.policy_state.eviction.claim()
    }

    fn try_take(policy_state: &Arc<PolicyState>) -> Option<Self> {
        policy_state
            .connections
            .try_acquire()
            .then(|| Self { policy_state: Arc::clone(policy_state), opened: None })
    }

    /// Counts the connection as open.
    #[must_use]
    pub fn mark_open(mut self, protection: ConnectionTls) -> Self {
        self.policy_state.open[protection as usize].fetch_add(1, Ordering::Relaxed);
        self.opened = Some(protection);
        self
    }
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        if let Some(protection) = self.opened {
            self.policy_state.open[protection as usize].fetch_sub(1, Ordering::Relaxed);
        }
        self.policy_state.connections.release();
        self.policy_state.eviction.notify_slot_freed();
    }
}

/// Counters of the policies, for metrics.
#[derive(Debug)]
pub struct PolicyCounters {
    /// By what followed a failed attempt.
    pub retries: LabeledCounters,
    /// By the reason for which a request was rejected.
    pub rejected: LabeledCounters,
    /// By the new state of the breaker.
    pub transitions: LabeledCounters,
    /// Requests of routes with a cache, by where the response came from.
    pub cache: LabeledCounters,
}

/// Counters for a fixed set of labels. Incremented on failures only, so a linear search is cheap enough.
#[derive(Debug)]
pub struct LabeledCounters(Vec<(&'static str, AtomicU64)>);

impl LabeledCounters {
    pub fn new(words: &[&'static str]) -> Self {
        Self(words.iter().map(|word| (*word, AtomicU64::new(0))).collect())
    }

    /// Increments the counter of a label, which must be one of the set.
    pub fn increment(&self, word: &str) {
        debug_assert!(self.0.iter().any(|(known, _)| *known == word), "`{word}` is not counted");
        if let Some((_, count)) = self.0.iter().find(|(known, _)| *known == word) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn is_zero(&self) -> bool {
        self.iter().all(|(_, count)| count == 0)
    }

    /// Adds the counts of another one with the same labels.
    fn absorb(&self, other: &Self) {
        for ((_, count), (_, more)) in self.0.iter().zip(other.iter()) {
            count.fetch_add(more, Ordering::Relaxed);
        }
    }

    /// All labels with their counts.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.0.iter().map(|(word, count)| (*word, count.load(Ordering::Relaxed)))
    }
}

impl PolicyCounters {
    pub fn is_zero(&self) -> bool {
        self.retries.is_zero()
            && self.rejected.is_zero()
            && self.transitions.is_zero()
            && self.cache.is_zero()
    }

    /// Adds the counts of an upstream that is removed.
    pub fn absorb(&self, other: &Self) {
        self.retries.absorb(&other.retries);
        self.rejected.absorb(&other.rejected);
        self.transitions.absorb(&other.transitions);
        self.cache.absorb(&other.cache);
    }
}

impl Default for PolicyCounters {
    fn default() -> Self {
        Self {
            retries: LabeledCounters::new(&[
                "sent",
                "hedge",
                "hedge_won",
                "reconnect",
                "next_endpoint",
                "observed",
                "not_retryable",
                "suppressed",
                "committed",
                "max_attempts",
                "method",
                "body_not_kept",
                "deadline",
                "retry_after",
                "pushback",
                "budget",
                "breaker_open",
            ]),
            rejected: LabeledCounters::new(&[
                "breaker_open",
                "queue_full",
                "limit_full",
                "local_resource",
                "rate_limited",
                "fault_injected",
                "deadline",
                "no_endpoint",
                "dns_failure",
                "dns_timeout",
                "denied_network",
                "not_allowed",
                "sunset",
                "jwt_invalid",
                "auth_unavailable",
                "malformed",
                // Counted here if timeouts are only observed.
                "timeout",
                "attempt_timeout",
            ]),
            transitions: LabeledCounters::new(&["closed", "half_open", "open"]),
            cache: LabeledCounters::new(&["hit", "miss", "stale", "revalidated", "bypass"]),
        }
    }
}

impl PolicyState {
    /// The number of open connections by protection.
    pub fn open_connections(&self) -> [(ConnectionTls, i64); ConnectionTls::ALL.len()] {
        ConnectionTls::ALL.map(|tls| (tls, self.open[tls as usize].load(Ordering::Relaxed)))
    }

    pub fn new(now: Instant) -> Arc<Self> {
        Arc::new(Self {
            breaker: Breaker::new(BreakerSettings::default(), now),
            reachability: Reachability::new(LimitSettings::default().max_pending),
            outliers: OutlierDetector::new(OutlierSettings::default(), now),
            budget: RetryBudget::new(BudgetSettings::default()),
            requests: RequestLimit::new(LimitSettings::default()),
            connections: BoundedCounter::new(LimitSettings::default().max_connections),
            open: Default::default(),
            eviction: Eviction::default(),
            adaptive: ArcSwapOption::empty(),
            switch_rate: RateLimit::new(&SWITCH_RATE, now, RandomState::new()),
            rates: Mutex::default(),
            quantiles: ArcSwap::default(),
            usual_latency: OnceLock::new(),
            counters: PolicyCounters::default(),
            deprecated: DeprecatedRequests::default(),
            durations: Durations::default(),
        })
    }

    /// Applies the settings of an upstream. Routes may only switch policies off: the state belongs to the upstream.
    pub fn configure(&self, policy: &Policy, now: Instant) {
        if let Some(settings) = policy.breaker.0 {
            self.breaker.configure(settings);
        }
        // Disabled, it still counts, but ejects nothing.
        let off = OutlierSettings { consecutive_failures: 0, ..OutlierSettings::default() };
        self.outliers.configure(policy.outlier.0.unwrap_or(off));
        if let Some(retry) = &policy.retry.0 {
            self.budget.configure(retry.budget, now);
        }
        if let Some(limits) = policy.limits.0 {
            let learned = self.requests.limit();
            self.requests.configure(limits, now);
            let adaptive = self.adaptive.load_full().filter(|_| limits.adaptive);
            if limits.adaptive && adaptive.is_none() {
                self.requests.set_adaptive_limit(ADAPTIVE_START, now);
                self.adaptive.store(Some(Arc::new(AdaptiveLimit::new(limits.max_requests, now))));
            } else if let Some(adaptive) = adaptive {
                // The learned limit outlives a reload; the adaptive limit stays below the new `max_requests`.
                adaptive.configure(limits.max_requests);
                self.requests.set_adaptive_limit(learned, now);
            } else {
                self.adaptive.store(None);
            }
        }
        let connections = policy.limits.0.map_or(u32::MAX, |limits| limits.max_connections);
        self.connections.set_limit(connections);
        self.reachability.set_max_waiting(policy.limits.0.unwrap_or_default().max_pending);
        let mut rates = self.rates.lock().unwrap_or_else(PoisonError::into_inner);
        rates.retain(|(_, limit)| Arc::strong_count(limit) > 1);
    }

    /// The limiter with these settings: the same one after a reload, and for all routes that inherit it.
    pub fn rate_limit(&self, settings: &RateSettings, now: Instant) -> Arc<RateLimit> {
        let mut rates = self.rates.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, limit)) = rates.iter().find(|(known, _)| known == settings) {
            return Arc::clone(limit);
        }
        let limit = Arc::new(RateLimit::new(settings, now, RandomState::new()));
        rates.push((settings.clone(), Arc::clone(&limit)));
        limit
    }

    /// The live latency at a quantile, in percent. Lock-free.
    pub fn quantile(&self, percent: u8, now: Instant) -> Arc<LatencyQuantile> {
        let find = |known: &[(u8, Arc<LatencyQuantile>)]| {
            known.iter().find(|(of, _)| *of == percent).map(|(_, live)| Arc::clone(live))
        };
        if let Some(live) = find(&self.quantiles.load()) {
            return live;
        }
        let new = Arc::new(LatencyQuantile::new(percent, now));
        self.quantiles.rcu(|known| {
            let added = (percent, Arc::clone(&new));
            // Another worker may have added it first.
            let missing = find(known).is_none().then_some(added);
            known.iter().cloned().chain(missing).collect::<Vec<_>>()
        });
        find(&self.quantiles.load()).unwrap_or(new)
    }

    /// The latency that responses rarely exceed. Recorded from the first use on, so not known at once.
    pub fn track_p95_latency(&self, now: Instant) -> &LatencyQuantile {
        self.usual_latency.get_or_init(|| LatencyQuantile::new(USUAL_PERCENTILE, now))
    }

    /// The same, if it is in use.
    pub fn p95_latency(&self) -> Option<&LatencyQuantile> {
        self.usual_latency.get()
    }

    /// Reports the outcome of an attempt to the breaker. `absent`: its endpoint is absent. `random` from 0 to 1.
    pub fn report(
        &self,
        upstream: &str,
        permit: BreakerPermit,
        outcome: BreakerOutcome,
        now: Instant,
        random: f64,
    ) -> Option<BreakerTransition> {
        let transition = self.breaker.report(permit, outcome.health, now, random);
        self.apply_transition(upstream, transition, outcome.is_absence);
        if transition.is_some_and(|transition| transition.to == BreakerState::Open)
            && self.outliers.awaits_probe(now)
        {
            self.offer_trial();
        }
        transition
    }

    /// Lets one request through an open breaker to probe an endpoint, and notifies waiting requests. They may have
    /// been notified of the change to "open" before, when there was no trial yet.
    pub fn offer_trial(&self) {
        if self.breaker.allow_early_trial() {
            self.reachability.notify_waiters();
        }
    }

    /// What bounds the attempts of all requests to this upstream together.
    pub fn attempt_limits(&self) -> SharedLimits<'_> {
        SharedLimits { budget: &self.budget, moves: &self.switch_rate }
    }

    /// Counts and logs a transition of the breaker.
    pub fn record_transition(&self, upstream: &str, transition: Option<BreakerTransition>) {
        self.apply_transition(upstream, transition, false);
    }

    fn apply_transition(&self, upstream: &str, transition: Option<BreakerTransition>, absent: bool) {
        if let Some(transition) = transition {
            self.reachability.record_transition(&transition, absent);
            self.counters.transitions.increment(transition.to.word());
            tracing::warn!(
                upstream,
                from = transition.from.word(),
                to = transition.to.word(),
                why = %transition.reason,
                "circuit breaker"
            );
        }
    }
}

#[cfg(test)]
mod reload_tests;
#[cfg(test)]
mod tests;
