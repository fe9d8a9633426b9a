//! Which delivery is next, of all queues: a state machine that gets time and randomness as arguments.
//!
//! Its driver asks [`Scheduler::next`] and does what it says, reports what became of it, and asks again. The store is the
//! memory: of each queue only the [`WINDOW`] deliveries that are due first are held, of each order only the first.
//!
//! ```text
//!            offer, loaded                  next                    finished                 settled
//!  (store) ───────────────▶ window ─────────────────▶ in flight ──────────────▶ settling ──────────────▶ (store)
//!                             ▲                           │                         │
//!                             └── the system is down ─────┘                         └─▶ window, for the next attempt
//! ```

use std::sync::Arc;

pub use super::lane::WINDOW;
use super::{
    DueDelivery, Verdict,
    lane::{Lane, LaneStep},
    policy::{DeliveryOutcome, DeliveryPolicy},
};
use crate::{delivery_id::DeliveryId, unix_time::UnixMillis};

/// See the [module](self).
#[derive(Debug, Default)]
pub struct Scheduler {
    queues: Vec<Lane>,
    /// The queue whose turn it is.
    turn: usize,
}

/// What the driver does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Send it; then [`Scheduler::finished`]. A probe is the only delivery of a paused queue.
    Deliver { queue: Arc<str>, due: DueDelivery, is_probe: bool },
    /// Write that it is dead, expired; then [`Scheduler::settled`].
    Expire { queue: Arc<str>, id: DeliveryId },
    /// Read so many that are due first from the store; then [`Scheduler::loaded`].
    Load { queue: Arc<str>, limit: usize },
    /// Nothing to do before this time (`None`: ever), or before something is reported.
    Wait(Option<UnixMillis>),
}

/// A queue, for status and metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueState {
    pub name: Arc<str>,
    pub is_paused: bool,
    pub in_flight: usize,
    /// Held in memory.
    pub held: usize,
}

impl Scheduler {
    /// The queues of the configuration. What is under way goes on; a queue that is no longer named begins nothing more.
    pub fn configure(&mut self, queues: Vec<(Arc<str>, DeliveryPolicy)>) {
        for queue in &mut self.queues {
            let removed = !queues.iter().any(|(name, _)| *name == queue.name);
            if queue.removed && !removed {
                // Meanwhile it took nothing that was accepted, or is due again.
                queue.reload();
            }
            queue.removed = removed;
        }
        for (name, policy) in queues {
            match self.queue(&name) {
                Some(queue) => queue.policy = policy,
                None => self.queues.push(Lane::new(name, policy)),
            }
        }
        self.drop_removed();
    }

    /// The queues that an operator has stopped begin nothing; all others do.
    pub fn hold(&mut self, is_held: impl Fn(&str) -> bool) {
        for queue in &mut self.queues {
            queue.held = is_held(&queue.name);
        }
    }

    pub fn next(&mut self, now: UnixMillis) -> Step {
        if let Some(queue) = self.queues.iter_mut().find(|queue| queue.needs_load()) {
            queue.begin_load();
            return Step::Load { queue: queue.name.clone(), limit: queue.load_limit() };
        }
        let count = self.queues.len();
        let mut earliest: Option<UnixMillis> = None;
        for offset in 0..count {
            let index = (self.turn + offset) % count;
            let Some(queue) = self.queues.get_mut(index) else { continue };
            let name = queue.name.clone();
            match queue.next(now) {
                LaneStep::Deliver { due, is_probe } => {
                    self.turn = index + 1;
                    return Step::Deliver { queue: name, due, is_probe };
                }
                LaneStep::Expire(id) => return Step::Expire { queue: name, id },
                LaneStep::Wait(Some(until)) => {
                    earliest = Some(earliest.map_or(until, |found| found.min(until)))
                }
                LaneStep::Wait(None) => {}
            }
        }
        Step::Wait(earliest)
    }

    /// What the store holds for a [`Step::Load`]; `None`: it could not be read.
    pub fn loaded(&mut self, queue: &str, found: Option<Vec<DueDelivery>>, limit: usize) {
        if let Some(queue) = self.queue(queue) {
            queue.loaded(found, limit);
        }
    }

    /// A delivery that has just been accepted or replayed.
    pub fn offer(&mut self, queue: &str, due: DueDelivery) {
        if let Some(queue) = self.queue(queue) {
            queue.offer(due);
        }
    }

    /// Deliveries were replayed or otherwise changed in the store: read it again.
    pub fn reload(&mut self, queue: &str) {
        if let Some(queue) = self.queue(queue) {
            queue.reload();
        }
    }

    /// Forgets a delivery that is to be cancelled or has expired. False: it is under way.
    pub fn remove(&mut self, queue: &str, id: DeliveryId) -> bool {
        self.queue(queue).is_none_or(|queue| queue.remove(id))
    }

    /// An attempt has ended: returns what is to be written; then [`Scheduler::settled`]. A [`Verdict::Release`] needs no
    /// write, unless a begin was noted. `random`: from 0 to 1. `None`: it was not under way.
    pub fn finished(
        &mut self,
        (queue, id): (&str, DeliveryId),
        outcome: DeliveryOutcome,
        now: UnixMillis,
        random: f64,
    ) -> Option<Verdict> {
        let verdict = self.queue(queue)?.finished(id, outcome, now, random);
        self.drop_removed();
        verdict
    }

    /// The verdict is on the disk. `next`: the delivery of the same order that may go now.
    pub fn settled(&mut self, queue: &str, id: DeliveryId, next: Option<DueDelivery>) {
        if let Some(queue) = self.queue(queue) {
            queue.settled(id, next);
        }
        self.drop_removed();
    }

    /// The verdict could not be written: the delivery will be repeated. While the store fails, do not ask for more.
    pub fn settle_failed(&mut self, queue: &str, id: DeliveryId) {
        if let Some(queue) = self.queue(queue) {
            queue.settle_failed(id);
        }
        self.drop_removed();
    }

    /// Of a queue: they must not be cancelled, and do not expire.
    pub fn in_flight(&self, queue: &str) -> Vec<DeliveryId> {
        let queue = self.queues.iter().find(|lane| *lane.name == *queue);
        queue.map(|queue| queue.in_flight().collect()).unwrap_or_default()
    }

    pub fn states(&self) -> impl Iterator<Item = QueueState> {
        self.queues.iter().map(|queue| QueueState {
            name: queue.name.clone(),
            is_paused: queue.is_paused(),
            in_flight: queue.in_flight().count(),
            held: queue.held(),
        })
    }

    fn queue(&mut self, name: &str) -> Option<&mut Lane> {
        self.queues.iter_mut().find(|queue| *queue.name == *name)
    }

    fn drop_removed(&mut self) {
        self.queues.retain(|queue| !queue.removed || !queue.is_idle());
    }
}
