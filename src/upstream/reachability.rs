//! Probes absent endpoints, and queues requests for an upstream whose endpoints are all absent.
//!
//! The control thread probes with connections. An endpoint that accepts a connection again is not restored yet: one
//! request is sent to it and decides. While the breaker is open, that request is an early trial: it is sent before
//! the open time is over, and its failure changes nothing. `src/resilience/outlier/probe_schedule.rs` decides when to probe.
//!
//! A request that the breaker rejects may wait for such a trial, no longer than it would have waited between rejected
//! attempts, and without sending anything.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    runtime::Handle,
    sync::{Notify, futures::Notified},
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};

use super::Upstream;
use crate::{
    descriptors,
    resilience::{
        breaker::{BreakerState, BreakerTransition, TransitionReason},
        limit::BoundedCounter,
        outlier::DueProbe,
    },
};

/// The most endpoints of an upstream that are probed at a time.
const MAX_CONCURRENT: usize = 16;
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// While an endpoint is absent, discovery refreshes its address: every second at first, later after each tenth of the
/// time that has passed.
const REFRESH_SHARE: u32 = 10;
const MIN_REFRESH: Duration = Duration::from_secs(1);
const MAX_REFRESH: Duration = Duration::from_secs(60);

/// Whether an upstream's breaker is open because its endpoints are absent, and the requests that wait for it.
#[derive(Debug)]
pub struct Reachability {
    /// The attempt that opened the breaker found its endpoint absent, and the breaker has not closed since.
    absent: AtomicBool,
    /// A task probes the absent endpoints.
    is_probing: AtomicBool,
    /// A probe is due earlier than scheduled.
    probe_due: Notify,
    changed: Notify,
    waiting: BoundedCounter,
}

/// A waiting request, until it is dropped.
#[derive(Debug)]
pub struct ReachabilityWaiter<'a>(&'a Reachability);

impl Drop for ReachabilityWaiter<'_> {
    fn drop(&mut self) {
        self.0.waiting.release();
    }
}

impl Reachability {
    /// `max`: how many requests may wait.
    pub fn new(max: u32) -> Self {
        Self {
            absent: AtomicBool::new(false),
            is_probing: AtomicBool::new(false),
            probe_due: Notify::new(),
            changed: Notify::new(),
            waiting: BoundedCounter::new(max),
        }
    }

    pub fn set_max_waiting(&self, max: u32) {
        self.waiting.set_limit(max);
    }

    pub fn is_unreachable(&self) -> bool {
        self.absent.load(Ordering::Relaxed)
    }

    /// Records a transition of the breaker. `absent`: the attempt that caused it found its endpoint absent.
    pub fn record_transition(&self, transition: &BreakerTransition, absent: bool) {
        match (transition.to, transition.reason) {
            (BreakerState::Closed, _)
            | (
                _,
                TransitionReason::Manual | TransitionReason::ManualExpired | TransitionReason::ManualReset,
            ) => {
                self.absent.store(false, Ordering::Relaxed);
            }
            (BreakerState::Open, _) => self.absent.store(absent, Ordering::Relaxed),
            (BreakerState::HalfOpen, _) => {}
        }
        self.notify_waiters();
    }

    /// Notifies the waiting requests so that they check again.
    pub fn notify_waiters(&self) {
        self.changed.notify_waiters();
    }

    /// Registers a waiting request; `None` if the limit is reached.
    pub fn try_wait(&self) -> Option<ReachabilityWaiter<'_>> {
        self.waiting.try_acquire().then_some(ReachabilityWaiter(self))
    }

    /// Completes with the next transition of the breaker, or when it admits a trial. Call it before checking the
    /// breaker, so that no notification is lost.
    pub fn changed(&self) -> Notified<'_> {
        self.changed.notified()
    }
}

/// Starts probing the absent endpoints of an upstream, until none is absent.
pub fn watch_absent_endpoints(upstream: &Arc<Upstream>, control: &Handle) {
    let absence = &upstream.policy_state.reachability;
    absence.probe_due.notify_one();
    if absence.is_probing.swap(true, Ordering::AcqRel) {
        return;
    }
    let (policy_state, upstream) = (Arc::clone(&upstream.policy_state), Arc::downgrade(upstream));
    control.spawn(async move {
        let (outliers, absence) = (&policy_state.outliers, &policy_state.reachability);
        let mut refresh = Refresh::new(Instant::now());
        loop {
            // Do not probe for an upstream that was removed from the configuration.
            while outliers.any_absent() && upstream.strong_count() > 0 {
                let due = absence.probe_due.notified();
                match outliers.next_probe_at() {
                    Some(at) => tokio::select! {
                        () = sleep_until(at.into()) => {}
                        () = due => continue,
                    },
                    // A request has to probe the endpoint. Offer a trial again at intervals, in case that request is
                    // cancelled.
                    None => {
                        let _ = timeout(MIN_REFRESH, due).await;
                        if let Some(upstream) = upstream.upgrade()
                            && outliers.awaits_probe(Instant::now().into_std())
                        {
                            upstream.policy_state.offer_trial();
                        }
                        continue;
                    }
                }
                if let Some(upstream) = upstream.upgrade() {
                    probe(&upstream).await;
                    refresh.absent(&upstream, Instant::now());
                }
            }
            absence.is_probing.store(false, Ordering::Release);
            // An endpoint may have become absent in between, while `is_probing` was still set.
            let more = upstream.strong_count() > 0 && outliers.any_absent();
            if !more || absence.is_probing.swap(true, Ordering::AcqRel) {
                return;
            }
        }
    });
}

async fn probe(upstream: &Upstream) {
    let outliers = &upstream.policy_state.outliers;
    let (mut probes, mut due) = (JoinSet::new(), false);
    for question in outliers.take_due_probes(MAX_CONCURRENT, Instant::now().into_std()) {
        match question {
            DueProbe::Request(_) => due = true,
            DueProbe::Connection(address) => {
                probes.spawn(async move { (address, accepts(address).await) });
            }
        }
    }
    if due {
        upstream.policy_state.offer_trial();
    }
    while let Some(result) = probes.join_next().await {
        if let Ok((address, accepted)) = result
            && outliers.record_connection_probe(&address, accepted, Instant::now().into_std())
        {
            tracing::debug!(upstream = &*upstream.name, endpoint = %address, "endpoint accepts connections again");
            upstream.policy_state.offer_trial();
        }
    }
}

async fn accepts(address: SocketAddr) -> bool {
    matches!(timeout(CONNECT_TIMEOUT, descriptors::connect(address)).await, Ok(Ok(_)))
}

/// When discovery refreshes the address of an absent endpoint.
struct Refresh {
    started: Instant,
    next: Instant,
}

impl Refresh {
    fn new(now: Instant) -> Self {
        Self { started: now, next: now }
    }

    fn absent(&mut self, upstream: &Upstream, now: Instant) {
        if now >= self.next {
            let pause = ((now - self.started) / REFRESH_SHARE).clamp(MIN_REFRESH, MAX_REFRESH);
            self.next = now + pause;
            upstream.refresh();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transition(to: BreakerState, why: TransitionReason) -> BreakerTransition {
        BreakerTransition { from: BreakerState::Closed, to, reason: why, until: None }
    }

    #[test]
    fn it_is_absent_from_opening_on_an_absent_endpoint_until_closed() {
        let absence = Reachability::new(1);
        let open = |why| transition(BreakerState::Open, why);
        for (step, unreachable, absent) in [
            (open(TransitionReason::ConsecutiveFailures(10)), false, false),
            (open(TransitionReason::TrialFailed), true, true),
            (transition(BreakerState::HalfOpen, TransitionReason::Reachable), false, true),
            (open(TransitionReason::TrialFailed), false, false),
            (open(TransitionReason::TrialFailed), true, true),
            (transition(BreakerState::Closed, TransitionReason::TrialsSucceeded), false, false),
            (open(TransitionReason::ConsecutiveFailures(10)), true, true),
            (open(TransitionReason::Manual), false, false),
        ] {
            absence.record_transition(&step, unreachable);
            assert_eq!(absence.is_unreachable(), absent, "{step:?}");
        }
    }

    #[test]
    fn waiting_requests_are_limited() {
        let absence = Reachability::new(1);
        let one = absence.try_wait();
        assert!(one.is_some() && absence.try_wait().is_none());
        drop(one);
        assert!(absence.try_wait().is_some());
    }
}
