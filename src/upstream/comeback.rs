//! Probes absent endpoints, and queues requests for an upstream whose endpoints are all absent.
//!
//! The control thread probes with connections. An endpoint that accepts a connection again is not restored yet: one
//! request is sent to it and decides. While the breaker is open, that request is an early trial: it is sent before
//! the open time is over, and its failure changes nothing. `src/resilience/outlier/absence.rs` decides when to probe.
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
        breaker::{State, Transition, Why},
        limit::Counter,
        outlier::Question,
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
pub struct Absence {
    /// The attempt that opened the breaker found its endpoint absent, and the breaker has not closed since.
    absent: AtomicBool,
    /// A task probes the absent endpoints.
    is_probing: AtomicBool,
    /// A probe is due earlier than scheduled.
    probe_due: Notify,
    changed: Notify,
    waiting: Counter,
}

/// A waiting request, until it is dropped.
#[derive(Debug)]
pub struct Waiting<'a>(&'a Absence);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.give_back();
    }
}

impl Absence {
    /// `max`: how many requests may wait.
    pub fn new(max: u32) -> Self {
        Self {
            absent: AtomicBool::new(false),
            is_probing: AtomicBool::new(false),
            probe_due: Notify::new(),
            changed: Notify::new(),
            waiting: Counter::new(max),
        }
    }

    pub fn set_most_waiting(&self, max: u32) {
        self.waiting.set_limit(max);
    }

    pub fn is_absent(&self) -> bool {
        self.absent.load(Ordering::Relaxed)
    }

    /// Records a transition of the breaker. `absent`: the attempt that caused it found its endpoint absent.
    pub fn note(&self, transition: &Transition, absent: bool) {
        match (transition.to, transition.why) {
            (State::Closed, _) | (_, Why::Manual | Why::ManualExpired | Why::ManualEnded) => {
                self.absent.store(false, Ordering::Relaxed);
            }
            (State::Open, _) => self.absent.store(absent, Ordering::Relaxed),
            (State::HalfOpen, _) => {}
        }
        self.wake();
    }

    /// Notifies the waiting requests so that they check again.
    pub fn wake(&self) {
        self.changed.notify_waiters();
    }

    /// Registers a waiting request; `None` if the limit is reached.
    pub fn wait(&self) -> Option<Waiting<'_>> {
        self.waiting.try_take().then_some(Waiting(self))
    }

    /// Completes with the next transition of the breaker, or when it admits a trial. Call it before checking the
    /// breaker, so that no notification is lost.
    pub fn changed(&self) -> Notified<'_> {
        self.changed.notified()
    }
}

/// Starts probing the absent endpoints of an upstream, until none is absent.
pub fn watch(upstream: &Arc<Upstream>, control: &Handle) {
    let absence = &upstream.guards.absence;
    absence.probe_due.notify_one();
    if absence.is_probing.swap(true, Ordering::AcqRel) {
        return;
    }
    let (guards, upstream) = (Arc::clone(&upstream.guards), Arc::downgrade(upstream));
    control.spawn(async move {
        let (outliers, absence) = (&guards.outliers, &guards.absence);
        let mut refresh = Refresh::new(Instant::now());
        loop {
            // Do not probe for an upstream that was removed from the configuration.
            while outliers.any_absent() && upstream.strong_count() > 0 {
                let due = absence.probe_due.notified();
                match outliers.next_question() {
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
                            upstream.guards.offer_trial();
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
            // An endpoint may have become absent in between, while `watched` was still set.
            let more = upstream.strong_count() > 0 && outliers.any_absent();
            if !more || absence.is_probing.swap(true, Ordering::AcqRel) {
                return;
            }
        }
    });
}

async fn probe(upstream: &Upstream) {
    let outliers = &upstream.guards.outliers;
    let (mut probes, mut due) = (JoinSet::new(), false);
    for question in outliers.questions(MAX_CONCURRENT, Instant::now().into_std()) {
        match question {
            Question::Request(_) => due = true,
            Question::Connection(address) => {
                probes.spawn(async move { (address, accepts(address).await) });
            }
        }
    }
    if due {
        upstream.guards.offer_trial();
    }
    while let Some(result) = probes.join_next().await {
        if let Ok((address, accepted)) = result
            && outliers.answered(&address, accepted, Instant::now().into_std())
        {
            tracing::debug!(upstream = &*upstream.name, endpoint = %address, "endpoint accepts connections again");
            upstream.guards.offer_trial();
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

    fn transition(to: State, why: Why) -> Transition {
        Transition { from: State::Closed, to, why, until: None }
    }

    #[test]
    fn it_is_absent_from_opening_on_an_absent_endpoint_until_closed() {
        let absence = Absence::new(1);
        let open = |why| transition(State::Open, why);
        for (step, unreachable, absent) in [
            (open(Why::ConsecutiveFailures(10)), false, false),
            (open(Why::TrialFailed), true, true),
            (transition(State::HalfOpen, Why::Reachable), false, true),
            (open(Why::TrialFailed), false, false),
            (open(Why::TrialFailed), true, true),
            (transition(State::Closed, Why::TrialsSucceeded), false, false),
            (open(Why::ConsecutiveFailures(10)), true, true),
            (open(Why::Manual), false, false),
        ] {
            absence.note(&step, unreachable);
            assert_eq!(absence.is_absent(), absent, "{step:?}");
        }
    }

    #[test]
    fn waiting_requests_are_limited() {
        let absence = Absence::new(1);
        let one = absence.wait();
        assert!(one.is_some() && absence.wait().is_none());
        drop(one);
        assert!(absence.wait().is_some());
    }
}
