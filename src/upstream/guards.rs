//! The policy state of an upstream that all workers share and that outlives a reload: breaker, ejections, budget,
//! limits, rates. The machines are in [`crate::resilience`]; here they stand beside the upstream they guard.

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
    comeback::Absence,
    connect::ConnectError,
    squeeze::{self, Squeeze},
};
use crate::{
    config::Policy,
    resilience::{
        adaptive::Adaptive,
        breaker::{Breaker, BreakerSettings, Permit, State, Transition},
        budget::{BudgetSettings, RetryBudget},
        classify::Health,
        hedge::LiveQuantile,
        limit::{Bell, Counter, LimitSettings, RequestLimit},
        outlier::{OutlierSettings, Outliers},
        rate::{RateKey, RateLimit, RateSettings},
        retry::SharedLimits,
    },
    telemetry::{durations::Durations, metrics::Tls},
};

/// Where the adaptive limit starts: enough for most services, little for one that is not well.
const ADAPTIVE_START: u32 = 32;
/// In percent: how much of what an upstream answers is taken for usual.
const USUAL: u8 = 95;

/// Attempts a second that may move on to another endpoint, as the chosen one accepted no connection.
const MOVES: RateSettings = RateSettings { rate: 1000, burst: 1000, per: RateKey::Upstream };

/// What guards an upstream.
#[derive(Debug)]
pub struct Guards {
    pub breaker: Arc<Breaker>,
    /// Whether the breaker is open because its endpoints are absent: then it need not wait out its time.
    pub absence: Absence,
    pub outliers: Outliers,
    pub budget: RetryBudget,
    pub requests: RequestLimit<Woken>,
    pub connections: Counter,
    /// Those that have come about, by how they are protected.
    open: [AtomicI64; Tls::ALL.len()],
    /// Makes room for one more connection.
    pub squeeze: Squeeze,
    /// Moves the request limit by latency, where that is switched on.
    pub adaptive: ArcSwapOption<Adaptive>,
    /// Bounds attempts that move on to another endpoint without spending retry budget.
    moves: RateLimit,
    rates: Mutex<Vec<(RateSettings, Arc<RateLimit>)>>,
    /// By percent. Replaced as a whole when one is added, so that nobody who looks one up waits.
    quantiles: ArcSwap<Vec<(u8, Arc<LiveQuantile>)>>,
    /// The 95th percentile of all latencies, from when somebody first asked for it.
    usual: OnceLock<LiveQuantile>,
    pub counts: Counts,
    /// How long its calls took.
    pub durations: Durations,
}

/// Wakes a call that waits for a place.
#[derive(Debug)]
pub struct Woken(pub Waker);

impl Bell for Woken {
    fn ring(self) {
        self.0.wake();
    }
}

/// A place among the requests in flight, until it is dropped.
#[derive(Debug)]
pub struct Place(pub Arc<Guards>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.requests.release(Instant::now);
    }
}

/// One of the connections to an upstream, until it is dropped.
#[derive(Debug)]
pub struct ConnectionSlot {
    guards: Arc<Guards>,
    /// How it is protected, once it is open.
    opened: Option<Tls>,
}

impl ConnectionSlot {
    /// Leave for one more connection. At the limit an idle one is closed for it, where there is one.
    pub async fn take(guards: &Arc<Guards>) -> Result<Self, ConnectError> {
        if let Some(slot) = Self::try_take(guards) {
            return Ok(slot);
        }
        let want = guards.squeeze.want();
        let made = timeout(squeeze::PATIENCE, async {
            loop {
                let freed = want.freed();
                if let Some(slot) = Self::try_take(guards) {
                    return slot;
                }
                want.again();
                freed.await;
            }
        });
        Box::pin(made).await.map_err(|_| ConnectError::Limit { limit: guards.connections.limit() })
    }

    /// Whether a call wants its room, and no other connection gives way to it.
    pub fn is_claimed(&self) -> bool {
        self.guards.squeeze.claim()
    }

    fn try_take(guards: &Arc<Guards>) -> Option<Self> {
        guards.connections.try_take().then(|| Self { guards: Arc::clone(guards), opened: None })
    }

    /// The connection has come about.
    #[must_use]
    pub fn opened(mut self, protection: Tls) -> Self {
        self.guards.open[protection as usize].fetch_add(1, Ordering::Relaxed);
        self.opened = Some(protection);
        self
    }
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        if let Some(protection) = self.opened {
            self.guards.open[protection as usize].fetch_sub(1, Ordering::Relaxed);
        }
        self.guards.connections.give_back();
        self.guards.squeeze.freed();
    }
}

/// What the guards have done, for metrics.
#[derive(Debug)]
pub struct Counts {
    /// By what followed a failed try.
    pub retries: Tally,
    /// By the reason a call was refused here.
    pub rejected: Tally,
    /// By the state the breaker went to.
    pub transitions: Tally,
}

/// Counters for a fixed set of words. Stepped where something failed, so a short search is cheap enough.
#[derive(Debug)]
pub struct Tally(Vec<(&'static str, AtomicU64)>);

impl Tally {
    pub fn new(words: &[&'static str]) -> Self {
        Self(words.iter().map(|word| (*word, AtomicU64::new(0))).collect())
    }

    /// Counts a word; one that is not in the set is let go.
    pub fn add(&self, word: &str) {
        if let Some((_, count)) = self.0.iter().find(|(known, _)| *known == word) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn is_zero(&self) -> bool {
        self.read().all(|(_, count)| count == 0)
    }

    /// Takes over what another one has counted; it has the same words.
    fn absorb(&self, other: &Self) {
        for ((_, count), (_, more)) in self.0.iter().zip(other.read()) {
            count.fetch_add(more, Ordering::Relaxed);
        }
    }

    /// All words with their counts.
    pub fn read(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.0.iter().map(|(word, count)| (*word, count.load(Ordering::Relaxed)))
    }
}

impl Counts {
    pub fn is_zero(&self) -> bool {
        self.retries.is_zero() && self.rejected.is_zero() && self.transitions.is_zero()
    }

    /// Takes over what another upstream has counted, for one that is forgotten.
    pub fn absorb(&self, other: &Self) {
        self.retries.absorb(&other.retries);
        self.rejected.absorb(&other.rejected);
        self.transitions.absorb(&other.transitions);
    }
}

impl Default for Counts {
    fn default() -> Self {
        Self {
            retries: Tally::new(&[
                "sent",
                "hedge",
                "hedge_won",
                "reconnect",
                "next_endpoint",
                "observed",
                "not_retryable",
                "suppressed",
                "committed",
                "max_tries",
                "method",
                "body_gone",
                "deadline",
                "retry_after",
                "pushback",
                "budget",
                "breaker_open",
            ]),
            rejected: Tally::new(&[
                "breaker_open",
                "queue_full",
                "limit_full",
                "local_resource",
                "rate_limited",
                "fault_injected",
                "no_endpoint",
                "not_allowed",
                "jwt_invalid",
                "auth_unavailable",
                "malformed",
                // Where timeouts are only observed.
                "timeout",
                "attempt_timeout",
            ]),
            transitions: Tally::new(&["closed", "half_open", "open"]),
        }
    }
}

impl Guards {
    /// How many connections are open, by what protects them.
    pub fn open_by(&self) -> [(Tls, i64); Tls::ALL.len()] {
        Tls::ALL.map(|tls| (tls, self.open[tls as usize].load(Ordering::Relaxed)))
    }

    pub fn new(now: Instant) -> Arc<Self> {
        Arc::new(Self {
            breaker: Breaker::new(BreakerSettings::default(), now),
            absence: Absence::new(LimitSettings::default().max_pending),
            outliers: Outliers::new(OutlierSettings::default(), now),
            budget: RetryBudget::new(BudgetSettings::default()),
            requests: RequestLimit::new(LimitSettings::default()),
            connections: Counter::new(LimitSettings::default().max_connections),
            open: Default::default(),
            squeeze: Squeeze::default(),
            adaptive: ArcSwapOption::empty(),
            moves: RateLimit::new(&MOVES, now, RandomState::new()),
            rates: Mutex::default(),
            quantiles: ArcSwap::default(),
            usual: OnceLock::new(),
            counts: Counts::default(),
            durations: Durations::default(),
        })
    }

    /// Takes the settings of an upstream. Routes may only switch these off: the state is the upstream's.
    pub fn configure(&self, policy: &Policy, now: Instant) {
        if let Some(settings) = policy.breaker.0 {
            self.breaker.configure(settings);
        }
        // Switched off, it still counts, but ejects nobody.
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
                self.requests.adapt(ADAPTIVE_START, now);
                self.adaptive.store(Some(Arc::new(Adaptive::new(limits.max_requests, now))));
            } else if let Some(adaptive) = adaptive {
                // What was learned outlives a reload; `adapt` keeps it below the new `max_requests`.
                adaptive.configure(limits.max_requests);
                self.requests.adapt(learned, now);
            } else {
                self.adaptive.store(None);
            }
        }
        let connections = policy.limits.0.map_or(u32::MAX, |limits| limits.max_connections);
        self.connections.set_limit(connections);
        self.absence.set_most_waiting(policy.limits.0.unwrap_or_default().max_pending);
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

    /// The live latency at a quantile, in percent. Takes no lock.
    pub fn quantile(&self, percent: u8, now: Instant) -> Arc<LiveQuantile> {
        let find = |known: &[(u8, Arc<LiveQuantile>)]| {
            known.iter().find(|(of, _)| *of == percent).map(|(_, live)| Arc::clone(live))
        };
        if let Some(live) = find(&self.quantiles.load()) {
            return live;
        }
        let new = Arc::new(LiveQuantile::new(percent, now));
        self.quantiles.rcu(|known| {
            let added = (percent, Arc::clone(&new));
            // Another worker may have been first.
            let missing = find(known).is_none().then_some(added);
            known.iter().cloned().chain(missing).collect::<Vec<_>>()
        });
        find(&self.quantiles.load()).unwrap_or(new)
    }

    /// The latency that responses rarely exceed. Recorded from the first call on, so not known at once.
    pub fn watch_usual_latency(&self, now: Instant) -> &LiveQuantile {
        self.usual.get_or_init(|| LiveQuantile::new(USUAL, now))
    }

    /// The same, where somebody has asked for it.
    pub fn usual_latency(&self) -> Option<&LiveQuantile> {
        self.usual.get()
    }

    /// Tells the breaker what came of an attempt. `absent`: its endpoint is. `random` from 0 to 1.
    pub fn report(
        &self,
        upstream: &str,
        permit: Permit,
        (health, absent): (Health, bool),
        now: Instant,
        random: f64,
    ) -> Option<Transition> {
        let transition = self.breaker.report(permit, health, now, random);
        self.change(upstream, transition, absent);
        if transition.is_some_and(|transition| transition.to == State::Open)
            && self.outliers.awaits_probe(now)
        {
            self.offer_trial();
        }
        transition
    }

    /// One request may probe an endpoint: an open breaker lets it through, and those who wait look again. They may have
    /// been woken by the change to "open", and have found no trial.
    pub fn offer_trial(&self) {
        if self.breaker.offer_trial() {
            self.absence.wake();
        }
    }

    /// What bounds the attempts of all requests to this upstream together.
    pub fn attempt_limits(&self) -> SharedLimits<'_> {
        SharedLimits { budget: &self.budget, moves: &self.moves }
    }

    /// Counts and tells a change of the breaker.
    pub fn note(&self, upstream: &str, transition: Option<Transition>) {
        self.change(upstream, transition, false);
    }

    fn change(&self, upstream: &str, transition: Option<Transition>, absent: bool) {
        if let Some(transition) = transition {
            self.absence.note(&transition, absent);
            self.counts.transitions.add(transition.to.word());
            tracing::warn!(
                upstream,
                from = transition.from.word(),
                to = transition.to.word(),
                why = %transition.why,
                "circuit breaker"
            );
        }
    }
}

#[cfg(test)]
mod reload_tests;
#[cfg(test)]
mod tests;
