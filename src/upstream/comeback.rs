//! Waiting for an upstream, or for some of its endpoints, that takes no connections.
//!
//! Whoever asks does so on the control thread. An endpoint that was ejected because nobody could connect to it is back as
//! soon as somebody can: in instances that restart in turn the next one goes as soon as the first is back.
//!
//! A breaker that opened because nobody listened need not wait out its time: a connection costs the upstream next to
//! nothing, and says at once that it is back. Trials then decide, as always. Until then a call may wait for a moment,
//! too: no longer than it would have waited between tries that are refused, and without sending anything.

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
    time::{Instant, sleep, sleep_until, timeout},
};

use super::Upstream;
use crate::{
    descriptors,
    resilience::{
        breaker::{State, Transition, Why},
        limit::Counter,
    },
};

/// Endpoints of an upstream that are asked at a time.
const MOST: usize = 3;
/// Likewise, of those that were ejected.
const MOST_EJECTED: usize = 16;
const PATIENCE: Duration = Duration::from_millis(500);
/// How often is asked: in proportion to how long it has been gone, so that a short outage is not made a long one.
const SHARE: u32 = 100;
const SHORTEST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// Whether nobody could connect to an upstream, and who waits for it.
#[derive(Debug)]
pub struct Absence {
    /// The breaker opened because no connection came about, and has not closed since.
    absent: AtomicBool,
    watched: AtomicBool,
    /// Endpoints that were ejected are being asked.
    recalling: AtomicBool,
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
            recalling: AtomicBool::new(false),
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

    /// Takes in a change of the breaker. `unreachable`: the try that caused it found no connection.
    pub fn note(&self, transition: &Transition, unreachable: bool) {
        match (transition.to, transition.why) {
            (State::Closed, _) | (_, Why::Manual | Why::ManualExpired | Why::ManualEnded) => {
                self.absent.store(false, Ordering::Relaxed);
            }
            (State::Open, _) => self.absent.store(unreachable, Ordering::Relaxed),
            (State::HalfOpen, _) => {}
        }
        self.changed.notify_waiters();
    }

    /// A place among those who wait; `None` where all are taken.
    pub fn wait(&self) -> Option<Waiting<'_>> {
        self.waiting.try_take().then_some(Waiting(self))
    }

    /// Ends with the next change of the breaker. Ask for it before looking at the breaker, so that none is missed.
    pub fn changed(&self) -> Notified<'_> {
        self.changed.notified()
    }
}

/// Asks from now on, until it is back, unless somebody asks already.
pub fn watch(upstream: &Arc<Upstream>, control: &Handle) {
    if upstream.guards.absence.watched.swap(true, Ordering::Relaxed) {
        return;
    }
    let (guards, upstream) = (Arc::clone(&upstream.guards), Arc::downgrade(upstream));
    control.spawn(async move {
        let absence = &guards.absence;
        let began = Instant::now();
        loop {
            // One that the configuration does not have any more is not waited for.
            while let Some(upstream) = upstream.upgrade()
                && absence.is_absent()
            {
                if guards.breaker.report_state().state == State::Open && answers(&upstream).await {
                    let transition = guards.breaker.reachable(Instant::now().into_std());
                    guards.note(&upstream.name, transition);
                }
                drop(upstream);
                sleep(pause(began.elapsed())).await;
            }
            absence.watched.store(false, Ordering::Relaxed);
            // It may have gone again in between, when it still seemed to be watched.
            let gone_again = upstream.strong_count() > 0 && absence.is_absent();
            if !gone_again || absence.watched.swap(true, Ordering::Relaxed) {
                return;
            }
        }
    });
}

/// Asks the endpoints that were ejected because nobody could connect to them, until all of them are back in one way or
/// another. Calls them back as they accept connections.
pub fn recall(upstream: &Arc<Upstream>, control: &Handle) {
    if upstream.guards.absence.recalling.swap(true, Ordering::AcqRel) {
        return;
    }
    let (guards, upstream) = (Arc::clone(&upstream.guards), Arc::downgrade(upstream));
    control.spawn(async move {
        let next = || guards.outliers.next_question(Instant::now().into_std());
        let recalling = &guards.absence.recalling;
        loop {
            while let Some(at) = next()
                && upstream.strong_count() > 0
            {
                sleep_until(at.into()).await;
                if let Some(upstream) = upstream.upgrade() {
                    ask_ejected(&upstream).await;
                }
            }
            recalling.swap(false, Ordering::AcqRel);
            // One more may have been ejected in between, when all were still being asked.
            let more = upstream.strong_count() > 0 && next().is_some();
            if !more || recalling.swap(true, Ordering::AcqRel) {
                return;
            }
        }
    });
}

async fn ask_ejected(upstream: &Upstream) {
    let outliers = &upstream.guards.outliers;
    let mut asked = JoinSet::new();
    for address in outliers.questions(MOST_EJECTED, Instant::now().into_std()) {
        asked.spawn(async move { (address, accepts(address).await) });
    }
    while let Some(answer) = asked.join_next().await {
        if let Ok((address, true)) = answer {
            back(upstream, address);
        }
    }
}

/// An endpoint accepts connections: if that was why it is out, it is out no more.
fn back(upstream: &Upstream, address: SocketAddr) {
    if upstream.guards.outliers.recall(&address, Instant::now().into_std()) {
        tracing::info!(upstream = &*upstream.name, endpoint = %address, "endpoint accepts connections again");
    }
}

async fn accepts(address: SocketAddr) -> bool {
    matches!(timeout(PATIENCE, descriptors::connect(address)).await, Ok(Ok(_)))
}

fn pause(gone_for: Duration) -> Duration {
    (gone_for / SHARE).clamp(SHORTEST_PAUSE, LONGEST_PAUSE)
}

async fn answers(upstream: &Upstream) -> bool {
    let addresses: Vec<_> =
        upstream.endpoints().endpoints.iter().map(|endpoint| endpoint.address).take(MOST).collect();
    for address in addresses {
        if accepts(address).await {
            back(upstream, address);
            return true;
        }
    }
    false
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

    #[test]
    fn a_short_outage_is_looked_at_more_often() {
        assert_eq!(pause(Duration::ZERO), SHORTEST_PAUSE);
        assert_eq!(pause(Duration::from_secs(2)), Duration::from_millis(20));
        assert_eq!(pause(Duration::from_secs(3600)), LONGEST_PAUSE);
    }
}
