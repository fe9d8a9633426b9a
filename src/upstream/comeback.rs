//! Asking absent endpoints whether they are back, and waiting for an upstream whose endpoints are all absent.
//!
//! The control thread asks. An endpoint that accepts a connection again is not believed: one request is sent to it, and
//! tells. While the breaker is open, that request is an early trial: it goes before the breaker's time is over, and changes
//! nothing if it fails. When to ask is decided in `src/resilience/outlier/absence.rs`.
//!
//! A request that the breaker refuses may wait for such a trial: no longer than it would have waited between attempts that
//! are refused, and without sending anything.

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

/// Endpoints of an upstream that are asked at a time.
const MOST: usize = 16;
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// While an endpoint is absent, discovery is asked for its address again: once a second, later every tenth of the time
/// that has passed.
const REFRESH_SHARE: u32 = 10;
const SHORTEST_REFRESH: Duration = Duration::from_secs(1);
const LONGEST_REFRESH: Duration = Duration::from_secs(60);

/// Whether an upstream's breaker is open since its endpoints are absent, and who waits for it.
#[derive(Debug)]
pub struct Absence {
    /// The attempt that opened the breaker found its endpoint absent, and it has not closed since.
    absent: AtomicBool,
    /// Absent endpoints are being asked.
    watched: AtomicBool,
    /// A question is due earlier than was known.
    asked: Notify,
    changed: Notify,
    waiting: Counter,
}

/// A call that waits, until it is dropped.
#[derive(Debug)]
pub struct Waiting<'a>(&'a Absence);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.give_back();
    }
}

impl Absence {
    /// `most`: how many calls may wait.
    pub fn new(most: u32) -> Self {
        Self {
            absent: AtomicBool::new(false),
            watched: AtomicBool::new(false),
            asked: Notify::new(),
            changed: Notify::new(),
            waiting: Counter::new(most),
        }
    }

    pub fn set_most_waiting(&self, most: u32) {
        self.waiting.set_limit(most);
    }

    pub fn is_absent(&self) -> bool {
        self.absent.load(Ordering::Relaxed)
    }

    /// Takes in a change of the breaker. `absent`: the attempt that caused it found its endpoint absent.
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

    /// Has those who wait look again.
    pub fn wake(&self) {
        self.changed.notify_waiters();
    }

    /// A place among those who wait; `None` where all are taken.
    pub fn wait(&self) -> Option<Waiting<'_>> {
        self.waiting.try_take().then_some(Waiting(self))
    }

    /// Ends with the next change of the breaker, or when it lets a trial go. Ask for it before looking at the breaker, so
    /// that none is missed.
    pub fn changed(&self) -> Notified<'_> {
        self.changed.notified()
    }
}

/// Asks the absent endpoints of an upstream from now on, until none is absent.
pub fn watch(upstream: &Arc<Upstream>, control: &Handle) {
    let absence = &upstream.guards.absence;
    absence.asked.notify_one();
    if absence.watched.swap(true, Ordering::AcqRel) {
        return;
    }
    let (guards, upstream) = (Arc::clone(&upstream.guards), Arc::downgrade(upstream));
    control.spawn(async move {
        let (outliers, absence) = (&guards.outliers, &guards.absence);
        let mut refresh = Refresh::new(Instant::now());
        loop {
            // An upstream that the configuration does not have any more is not asked for.
            while outliers.any_absent() && upstream.strong_count() > 0 {
                let asked = absence.asked.notified();
                match outliers.next_question() {
                    Some(at) => tokio::select! {
                        () = sleep_until(at.into()) => {}
                        () = asked => continue,
                    },
                    // A request is to prove the endpoint. Looked after now and then, should it have left.
                    None => {
                        let _ = timeout(SHORTEST_REFRESH, asked).await;
                        if let Some(upstream) = upstream.upgrade()
                            && outliers.awaits_probe(Instant::now().into_std())
                        {
                            upstream.guards.offer_trial();
                        }
                        continue;
                    }
                }
                if let Some(upstream) = upstream.upgrade() {
                    ask(&upstream).await;
                    refresh.absent(&upstream, Instant::now());
                }
            }
            absence.watched.store(false, Ordering::Release);
            // One more may have become absent in between, when it still seemed to be watched.
            let more = upstream.strong_count() > 0 && outliers.any_absent();
            if !more || absence.watched.swap(true, Ordering::AcqRel) {
                return;
            }
        }
    });
}

async fn ask(upstream: &Upstream) {
    let outliers = &upstream.guards.outliers;
    let (mut asked, mut due) = (JoinSet::new(), false);
    for question in outliers.questions(MOST, Instant::now().into_std()) {
        match question {
            Question::Request(_) => due = true,
            Question::Connection(address) => {
                asked.spawn(async move { (address, accepts(address).await) });
            }
        }
    }
    if due {
        upstream.guards.offer_trial();
    }
    while let Some(answer) = asked.join_next().await {
        if let Ok((address, accepted)) = answer
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

/// When discovery is asked whether an absent endpoint has another address.
struct Refresh {
    began: Instant,
    next: Instant,
}

impl Refresh {
    fn new(now: Instant) -> Self {
        Self { began: now, next: now }
    }

    fn absent(&mut self, upstream: &Upstream, now: Instant) {
        if now >= self.next {
            let pause = ((now - self.began) / REFRESH_SHARE).clamp(SHORTEST_REFRESH, LONGEST_REFRESH);
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
    fn it_is_absent_from_the_opening_that_found_nobody_until_it_has_closed() {
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
    fn only_so_many_wait() {
        let absence = Absence::new(1);
        let one = absence.wait();
        assert!(one.is_some() && absence.wait().is_none());
        drop(one);
        assert!(absence.wait().is_some());
    }
}
