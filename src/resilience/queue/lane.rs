//! One queue: the deliveries that are due next, those under way, and whether the queue is paused.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};

use super::{
    DueDelivery, Verdict,
    policy::{DeliveryOutcome, DeliveryPolicy},
};
use crate::{delivery_id::DeliveryId, unix_time::UnixMillis};

/// Deliveries of a queue that are held in memory; all others are only in the store.
pub const WINDOW: usize = 1000;
/// From here on the next ones are loaded.
const LOW_WATER: usize = WINDOW / 4;
/// Outcomes that may be on their way to the disk beyond the deliveries under way.
const MAX_SETTLING: usize = 256;

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) name: Arc<str>,
    pub(super) policy: DeliveryPolicy,
    /// By time and order of acceptance.
    window: BTreeMap<(UnixMillis, i64), DueDelivery>,
    positions: HashMap<DeliveryId, (UnixMillis, i64)>,
    in_flight: HashMap<DeliveryId, Flight>,
    /// Ended here, but not yet on the disk; those that will be due again with their new time.
    settling: HashMap<DeliveryId, Settling>,
    /// Order keys of deliveries in flight or settling.
    busy: HashSet<Arc<str>>,
    pause: Option<Pause>,
    /// The rate allows the next delivery from here on, in microseconds.
    rate_allows: u64,
    /// The store may hold more than the window.
    has_more: bool,
    loading: bool,
    /// A delivery was left to the store while a read of it was under way: the read may not have seen it.
    missed: bool,
    /// An operator has stopped it: begins nothing.
    pub(super) held: bool,
    /// No longer configured: begins nothing.
    pub(super) removed: bool,
}

#[derive(Debug)]
struct Flight {
    due: DueDelivery,
    is_probe: bool,
}

#[derive(Debug)]
struct Settling {
    order_key: Option<Arc<str>>,
    again: Option<DueDelivery>,
}

/// The system is down.
#[derive(Debug)]
struct Pause {
    /// Of probes in a row.
    failures: u32,
    until: UnixMillis,
    probing: bool,
    /// Which of the deliveries that are due is the next probe, from 0 to 1. Those of a queue may be for several services, of
    /// which some are there: each gets its turn.
    pick: f64,
}

/// What a queue does next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum LaneStep {
    Deliver {
        due: DueDelivery,
        is_probe: bool,
    },
    Expire(DeliveryId),
    /// Nothing before then, or before something else happens.
    Wait(Option<UnixMillis>),
}

impl Lane {
    /// What the store holds is not known yet.
    pub(super) fn new(name: Arc<str>, policy: DeliveryPolicy) -> Self {
        Self {
            name,
            policy,
            window: BTreeMap::new(),
            positions: HashMap::new(),
            in_flight: HashMap::new(),
            settling: HashMap::new(),
            busy: HashSet::new(),
            pause: None,
            rate_allows: 0,
            has_more: true,
            loading: false,
            missed: false,
            held: false,
            removed: false,
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.in_flight.is_empty() && self.settling.is_empty()
    }

    pub(super) fn is_paused(&self) -> bool {
        self.pause.is_some()
    }

    pub(super) fn in_flight(&self) -> impl Iterator<Item = DeliveryId> {
        self.in_flight.keys().copied()
    }

    pub(super) fn held(&self) -> usize {
        self.window.len()
    }

    /// Whether the next ones are to be read from the store.
    pub(super) fn needs_load(&self) -> bool {
        self.has_more && !self.loading && !self.removed && self.window.len() <= LOW_WATER
    }

    pub(super) fn begin_load(&mut self) {
        self.loading = true;
    }

    /// The store has changed: what is held may not be what is due first.
    pub(super) fn reload(&mut self) {
        self.window.clear();
        self.positions.clear();
        self.has_more = true;
        self.missed |= self.loading;
    }

    /// How many to read: those under way are among the first.
    pub(super) fn load_limit(&self) -> usize {
        WINDOW + self.in_flight.len() + self.settling.len()
    }

    /// `None`: the store could not be read; it is asked again.
    pub(super) fn loaded(&mut self, found: Option<Vec<DueDelivery>>, limit: usize) {
        self.loading = false;
        let missed = std::mem::take(&mut self.missed);
        let Some(found) = found else { return };
        self.has_more = false;
        let is_complete = found.len() < limit;
        for due in found {
            self.offer(due);
        }
        self.has_more |= missed || !is_complete;
    }

    /// A delivery that is due at some time. One that is known already is not taken twice.
    pub(super) fn offer(&mut self, due: DueDelivery) {
        let known = self.positions.contains_key(&due.id)
            || self.in_flight.contains_key(&due.id)
            || self.settling.contains_key(&due.id);
        if known || self.removed {
            return;
        }
        let position = (due.next, due.seq);
        if self.has_more && self.window.last_key_value().is_none_or(|(last, _)| position > *last) {
            // Others, which are only in the store, may come before it.
            self.missed |= self.loading;
            return;
        }
        self.insert(due);
        if self.window.len() > WINDOW
            && let Some((_, last)) = self.window.pop_last()
        {
            self.positions.remove(&last.id);
            self.has_more = true;
        }
    }

    fn insert(&mut self, due: DueDelivery) {
        let position = (due.next, due.seq);
        self.positions.insert(due.id, position);
        self.window.insert(position, due);
    }

    /// Forgets a delivery that was cancelled or has expired. False: it is under way.
    pub(super) fn remove(&mut self, id: DeliveryId) -> bool {
        if self.in_flight.contains_key(&id) {
            return false;
        }
        if let Some(position) = self.positions.remove(&id) {
            self.window.remove(&position);
        }
        true
    }

    pub(super) fn next(&mut self, now: UnixMillis) -> LaneStep {
        if self.removed
            || self.held
            || self.in_flight.len() >= self.policy.concurrency
            || self.settling.len() >= MAX_SETTLING
            || self.pause.as_ref().is_some_and(|pause| pause.probing)
        {
            return LaneStep::Wait(None);
        }
        let paused = self.pause.as_ref().map_or(UnixMillis(0), |pause| pause.until);
        let gate = paused.max(UnixMillis(self.rate_allows.div_ceil(1000)));
        let is_free = |due: &DueDelivery| due.order_key.as_ref().is_none_or(|key| !self.busy.contains(key));
        let mut free = self.window.iter().filter(|(_, due)| is_free(due));
        let Some((mut position, mut due)) = free.next() else { return LaneStep::Wait(None) };
        if let Some(pause) = &self.pause
            && pause.until <= now
            && self.policy.expiry(due.since) > now
        {
            let others: Vec<_> = free.take_while(|(_, due)| due.next <= now).collect();
            let place = (pause.pick * (others.len() + 1) as f64) as usize;
            if let Some(other) = place.checked_sub(1).and_then(|place| others.get(place)) {
                (position, due) = *other;
            }
        }
        let position = *position;
        let expiry = self.policy.expiry(due.since);
        let expired = expiry <= now;
        let earliest = due.next.max(gate);
        if !expired && earliest > now {
            return LaneStep::Wait(Some(earliest.min(expiry)));
        }
        let Some(due) = self.window.remove(&position) else { return LaneStep::Wait(None) };
        self.positions.remove(&due.id);
        self.busy.extend(due.order_key.clone());
        if expired {
            self.settling.insert(due.id, Settling { order_key: due.order_key, again: None });
            return LaneStep::Expire(due.id);
        }
        if self.policy.rate > 0 {
            // GCRA without a burst.
            self.rate_allows = self.rate_allows.max(now.0 * 1000) + 1_000_000 / u64::from(self.policy.rate);
        }
        let is_probe = self.pause.is_some();
        if let Some(pause) = &mut self.pause {
            pause.probing = true;
        }
        self.in_flight.insert(due.id, Flight { due: due.clone(), is_probe });
        LaneStep::Deliver { due, is_probe }
    }

    /// An attempt has ended. The verdict is to be written; then [`Lane::settled`].
    pub(super) fn finished(
        &mut self,
        id: DeliveryId,
        outcome: DeliveryOutcome,
        now: UnixMillis,
        random: f64,
    ) -> Option<Verdict> {
        let Flight { due, is_probe } = self.in_flight.remove(&id)?;
        self.note_system(outcome, is_probe, now, random);
        let verdict = self.policy.judge(outcome, due.attempts, now, random);
        if verdict == Verdict::Release {
            // Nothing of it has changed: it is due as before.
            if let Some(key) = &due.order_key {
                self.busy.remove(key);
            }
            self.insert(due);
            return Some(verdict);
        }
        let order_key = due.order_key.clone();
        let again = match verdict {
            Verdict::Wait { until } => Some(DueDelivery { next: until, attempts: due.attempts + 1, ..due }),
            _ => None,
        };
        self.settling.insert(id, Settling { order_key, again });
        Some(verdict)
    }

    /// Pauses the queue while the system is down, and ends the pause.
    fn note_system(&mut self, outcome: DeliveryOutcome, is_probe: bool, now: UnixMillis, random: f64) {
        if let Some(retry_after) = outcome.is_down() {
            match &mut self.pause {
                None => {
                    let until = now + self.policy.wait(1, retry_after, random);
                    // The probe of the pause before may still be under way: there is one at a time.
                    let probing = self.in_flight.values().any(|flight| flight.is_probe);
                    self.pause = Some(Pause { failures: 1, until, probing, pick: random });
                }
                Some(pause) if is_probe => {
                    pause.failures = pause.failures.saturating_add(1);
                    pause.until = now + self.policy.wait(pause.failures, retry_after, random);
                    pause.probing = false;
                    pause.pick = random;
                }
                // Begun before the pause: it says the same again.
                Some(pause) if retry_after.is_some() => {
                    pause.until = pause.until.max(now + self.policy.wait(1, retry_after, 0.0));
                }
                Some(_) => {}
            }
        } else if outcome.is_up() {
            self.pause = None;
        } else if is_probe && let Some(pause) = &mut self.pause {
            // It showed nothing: the next delivery is the probe.
            pause.probing = false;
        }
    }

    /// The verdict is on the disk. `next`: the one of the same order that may go now.
    pub(super) fn settled(&mut self, id: DeliveryId, next: Option<DueDelivery>) {
        let Some(settling) = self.settling.remove(&id) else { return };
        if let Some(key) = &settling.order_key {
            self.busy.remove(key);
        }
        for due in settling.again.into_iter().chain(next) {
            self.offer(due);
        }
    }

    /// The verdict could not be written: the delivery is in the store as it was, and will be repeated.
    pub(super) fn settle_failed(&mut self, id: DeliveryId) {
        if let Some(Settling { order_key: Some(key), .. }) = self.settling.remove(&id) {
            self.busy.remove(&key);
        }
        self.has_more = true;
    }
}
