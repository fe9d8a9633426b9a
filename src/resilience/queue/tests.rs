//! The scheduler beside a model of the store, in virtual time.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use proptest::prelude::*;

use super::{
    policy::{DeliveryOutcome, DeliveryPolicy},
    scheduler::{Scheduler, Step},
    *,
};
use crate::{rng::Rng, units::HumanDuration};

const START: UnixMillis = UnixMillis(1_800_000_000_000);
const MINUTE: Duration = Duration::from_secs(60);

/// A stored delivery. `next` is `None` behind another one of its order.
#[derive(Clone, Debug)]
struct Row {
    id: DeliveryId,
    order: Option<Arc<str>>,
    since: UnixMillis,
    next: Option<UnixMillis>,
    attempts: u32,
    end: Option<Verdict>,
}

/// The scheduler, the store, and a service.
struct World {
    now: UnixMillis,
    rng: Rng,
    scheduler: Scheduler,
    rows: BTreeMap<(String, i64), Row>,
    seq: i64,
    /// Attempts under way, with the time at which they end.
    running: Vec<(UnixMillis, String, DueDelivery, bool)>,
    /// In the order in which they began, by queue.
    begun: Vec<(String, i64)>,
    most_running: HashMap<String, usize>,
    most_held: usize,
    probes: usize,
}

impl World {
    fn new(queues: &[(&str, DeliveryPolicy)], seed: u64) -> Self {
        let mut scheduler = Scheduler::default();
        scheduler.configure(queues.iter().map(|(name, policy)| ((*name).into(), policy.clone())).collect());
        Self {
            now: START,
            rng: Rng::from_seed(seed),
            scheduler,
            rows: BTreeMap::new(),
            seq: 0,
            running: Vec::new(),
            begun: Vec::new(),
            most_running: HashMap::new(),
            most_held: 0,
            probes: 0,
        }
    }

    fn accept(&mut self, queue: &str, order: Option<&str>) {
        self.seq += 1;
        let order: Option<Arc<str>> = order.map(Into::into);
        let waits = order.is_some()
            && self.rows.iter().any(|((of, _), row)| of == queue && row.order == order && row.end.is_none());
        let row = Row {
            id: DeliveryId::new(self.now, self.rng.bytes()),
            order,
            since: self.now,
            next: (!waits).then_some(self.now),
            attempts: 0,
            end: None,
        };
        if !waits {
            self.scheduler.offer(queue, due(self.seq, &row));
        }
        self.rows.insert((queue.to_owned(), self.seq), row);
    }

    fn load(&self, queue: &str, limit: usize) -> Vec<DueDelivery> {
        let rows = self.rows.iter().filter(|((of, _), row)| of == queue && row.next.is_some());
        let mut found: Vec<DueDelivery> = rows.map(|((_, seq), row)| due(*seq, row)).collect();
        found.sort_by_key(|due| (due.next, due.seq));
        found.truncate(limit);
        found
    }

    /// Runs for this long; `respond` says what becomes of an attempt, and how long it takes.
    fn run(
        &mut self,
        duration: Duration,
        mut respond: impl FnMut(&mut Rng, UnixMillis, &DueDelivery) -> (DeliveryOutcome, Duration),
    ) {
        let end = self.now + duration;
        let mut outcomes: HashMap<DeliveryId, DeliveryOutcome> = HashMap::new();
        loop {
            let wake = match self.scheduler.next(self.now) {
                Step::Deliver { queue, due, is_probe } => {
                    self.begin(&queue, &due, is_probe);
                    let (outcome, takes) = respond(&mut self.rng, self.now, &due);
                    outcomes.insert(due.id, outcome);
                    self.running.push((self.now + takes, queue.to_string(), due, is_probe));
                    continue;
                }
                Step::Expire { queue, id } => {
                    self.settle(&queue, id, Verdict::Dead(DeadReason::Expired));
                    continue;
                }
                Step::Load { queue, limit } => {
                    self.scheduler.loaded(&queue, Some(self.load(&queue, limit)), limit);
                    continue;
                }
                Step::Wait(wake) => wake,
            };
            let held = self.scheduler.states().map(|state| state.held).max();
            self.most_held = self.most_held.max(held.unwrap_or(0));
            let ends = self.running.iter().map(|(at, ..)| *at).min();
            let Some(moment) = wake.into_iter().chain(ends).min().filter(|moment| *moment <= end) else {
                self.now = end;
                return;
            };
            assert!(moment >= self.now);
            self.now = moment;
            while let Some(index) = self.running.iter().position(|(at, ..)| *at <= self.now) {
                let (_, queue, due, _) = self.running.swap_remove(index);
                let outcome = outcomes.remove(&due.id).unwrap();
                let random = self.rng.unit_f64();
                let verdict = self.scheduler.finished((&queue, due.id), outcome, self.now, random).unwrap();
                self.settle(&queue, due.id, verdict);
            }
        }
    }

    fn begin(&mut self, queue: &str, due: &DueDelivery, is_probe: bool) {
        let row = &self.rows[&(queue.to_owned(), due.seq)];
        assert!(row.end.is_none() && row.next.is_some_and(|next| next <= self.now), "{row:?} is not due");
        assert_eq!(row.attempts, due.attempts);
        let of_queue: Vec<_> = self.running.iter().filter(|(_, of, ..)| of == queue).collect();
        for (_, _, other, other_is_probe) in &of_queue {
            assert_ne!(other.id, due.id, "delivered twice at a time");
            assert!(
                due.order_key.is_none() || other.order_key != due.order_key,
                "two of one order at a time"
            );
            assert!(!(is_probe && *other_is_probe), "two probes");
        }
        let earlier = self.rows.iter().find(|((of, seq), other)| {
            of == queue
                && *seq < due.seq
                && row.order.is_some()
                && other.order == row.order
                && other.end.is_none()
        });
        assert!(earlier.is_none(), "{earlier:?} is before it in its order");
        let most = self.most_running.entry(queue.to_owned()).or_default();
        *most = (*most).max(of_queue.len() + 1);
        self.probes += usize::from(is_probe);
        self.begun.push((queue.to_owned(), due.seq));
    }

    /// What the store does with a verdict.
    fn settle(&mut self, queue: &str, id: DeliveryId, verdict: Verdict) {
        let (now, key) = (self.now, |row: &Row| row.order.clone());
        let (_, row) = self.rows.iter_mut().find(|(_, row)| row.id == id).unwrap();
        assert!(row.end.is_none());
        match verdict {
            Verdict::Release => return,
            Verdict::Wait { until } => {
                row.attempts += 1;
                row.next = Some(until);
            }
            Verdict::Done | Verdict::Dead(_) => {
                row.end = Some(verdict);
                row.next = None;
            }
        }
        let (order, ended) = (key(row), row.end.is_some());
        let mut next = None;
        if order.is_some() && ended {
            let of_order = self
                .rows
                .iter_mut()
                .find(|((of, _), row)| of == queue && row.order == order && row.end.is_none());
            if let Some(((_, seq), row)) = of_order {
                row.next = Some(now);
                next = Some(due(*seq, row));
            }
        }
        self.scheduler.settled(queue, id, next);
    }

    fn ends(&self) -> BTreeMap<&'static str, usize> {
        let mut ends = BTreeMap::new();
        for row in self.rows.values() {
            let word = match row.end {
                None => "pending",
                Some(Verdict::Done) => "done",
                Some(Verdict::Dead(reason)) => reason.word(),
                Some(_) => unreachable!(),
            };
            *ends.entry(word).or_default() += 1;
        }
        ends
    }
}

fn due(seq: i64, row: &Row) -> DueDelivery {
    DueDelivery {
        id: row.id,
        seq,
        next: row.next.unwrap(),
        since: row.since,
        attempts: row.attempts,
        order_key: row.order.clone(),
    }
}

const DOWN: DeliveryOutcome = DeliveryOutcome::NotSent { retry_after: None };

const fn response(status: u16) -> DeliveryOutcome {
    DeliveryOutcome::Response { status, retry_after: None }
}

#[test]
fn an_outage_of_an_hour_spends_nothing_and_kills_nothing() {
    let mut world = World::new(&[("orders", DeliveryPolicy::default())], 1);
    for _ in 0..500 {
        world.accept("orders", None);
    }
    let hour = MINUTE * 60;
    world.run(hour, |_, _, _| (DOWN, Duration::from_millis(2)));
    assert!(world.rows.values().all(|row| row.attempts == 0 && row.end.is_none()));
    // The first five, then single probes with back-off up to ten minutes.
    assert!((5..100).contains(&world.begun.len()), "{} attempts", world.begun.len());
    assert!(world.scheduler.states().all(|state| state.is_paused));
    world.run(MINUTE * 15, |rng, _, _| (response(200), Duration::from_millis(10 + rng.below(50) as u64)));
    assert_eq!(world.ends(), BTreeMap::from([("done", 500)]));
    assert_eq!(world.most_running["orders"], 5);
}

#[test]
fn a_service_that_says_how_long_it_is_away_is_not_asked_before() {
    let mut world = World::new(&[("orders", DeliveryPolicy::default())], 2);
    for _ in 0..20 {
        world.accept("orders", None);
    }
    let later = DeliveryOutcome::Response { status: 503, retry_after: Some(MINUTE * 5) };
    world.run(Duration::from_secs(1), |_, _, _| (later, Duration::from_millis(1)));
    assert_eq!(world.begun.len(), 5, "those that were begun before the first response");
    world.run(MINUTE * 4, |_, _, _| unreachable!());
    world.run(MINUTE * 2, |_, _, _| (response(200), Duration::from_millis(1)));
    assert_eq!((world.ends(), world.probes), (BTreeMap::from([("done", 20)]), 1));
    assert!(world.rows.values().all(|row| row.attempts == 0));
}

#[test]
fn a_bad_message_dies_alone() {
    let mut world = World::new(&[("orders", DeliveryPolicy::default())], 3);
    for _ in 0..100 {
        world.accept("orders", None);
    }
    world.run(MINUTE * 120, |_, _, due| {
        let status = if due.seq == 7 {
            500
        } else if due.seq == 8 {
            422
        } else {
            200
        };
        (response(status), Duration::from_millis(20))
    });
    assert_eq!(world.ends(), BTreeMap::from([("attempts", 1), ("done", 98), ("permanent", 1)]));
    assert_eq!(world.begun.iter().filter(|(_, seq)| *seq == 7).count(), 12);
    // The others did not wait for it.
    let last = world.begun.iter().take(101).filter(|(_, seq)| *seq > 8).count();
    assert!(last >= 91, "{last}");
}

/// One queue of several services: what is for those that are there is delivered.
#[test]
fn a_service_that_is_down_does_not_block_the_others_of_its_queue() {
    let mut world = World::new(&[("orders", DeliveryPolicy::default())], 9);
    for _ in 0..20 {
        world.accept("orders", None);
    }
    world.run(MINUTE * 60, |_, _, due| {
        (if due.seq <= 10 { DOWN } else { response(200) }, Duration::from_millis(5))
    });
    assert_eq!(world.ends(), BTreeMap::from([("done", 10), ("pending", 10)]));
    assert!(world.rows.values().all(|row| row.attempts == 0));
}

#[test]
fn a_delivery_without_an_upstream_dies_alone_and_pauses_nothing() {
    let mut world = World::new(&[("orders", DeliveryPolicy::default())], 10);
    for _ in 0..20 {
        world.accept("orders", None);
    }
    world.run(MINUTE, |_, _, due| {
        let outcome = if due.seq == 1 { DeliveryOutcome::NoUpstream } else { response(200) };
        (outcome, Duration::from_millis(5))
    });
    assert_eq!(world.ends(), BTreeMap::from([("done", 19), ("poison", 1)]));
    assert_eq!(world.probes, 0);
}

#[test]
fn queues_take_turns() {
    let policy = DeliveryPolicy { concurrency: 1000, ..DeliveryPolicy::default() };
    let mut world = World::new(&[("large", policy.clone()), ("small", policy)], 4);
    for _ in 0..500 {
        world.accept("large", None);
    }
    for _ in 0..20 {
        world.accept("small", None);
    }
    world.run(Duration::from_millis(1), |_, _, _| (response(200), Duration::from_secs(1)));
    let small = world.begun.iter().take(42).filter(|(queue, _)| queue == "small").count();
    assert_eq!(small, 20);
}

#[test]
fn a_rate_is_kept() {
    let policy = DeliveryPolicy { rate: 50, concurrency: 100, ..DeliveryPolicy::default() };
    let mut world = World::new(&[("orders", policy)], 5);
    for _ in 0..2000 {
        world.accept("orders", None);
    }
    world.run(Duration::from_secs(10), |_, _, _| (response(200), Duration::from_millis(5)));
    assert!((499..=501).contains(&world.begun.len()), "{}", world.begun.len());
}

#[test]
fn a_queue_that_an_operator_stopped_begins_nothing() {
    let mut world = World::new(&[("orders", DeliveryPolicy::default())], 8);
    world.scheduler.hold(|name| name == "orders");
    world.accept("orders", None);
    world.run(MINUTE, |_, _, _| (response(200), Duration::from_millis(5)));
    assert_eq!(world.ends(), BTreeMap::from([("pending", 1)]));
    world.scheduler.hold(|_| false);
    world.run(MINUTE, |_, _, _| (response(200), Duration::from_millis(5)));
    assert_eq!(world.ends(), BTreeMap::from([("done", 1)]));
}

#[test]
fn what_is_not_delivered_in_time_expires() {
    let policy = DeliveryPolicy { expires: HumanDuration::from_secs(600), ..DeliveryPolicy::default() };
    let mut world = World::new(&[("orders", policy)], 6);
    for _ in 0..50 {
        world.accept("orders", None);
    }
    world.run(MINUTE * 9, |_, _, _| (DOWN, Duration::from_millis(1)));
    world.accept("orders", None);
    world.run(MINUTE * 2, |_, _, _| (DOWN, Duration::from_millis(1)));
    assert_eq!(world.ends(), BTreeMap::from([("expired", 50), ("pending", 1)]));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the service does: `World::begin` checks each attempt (due, not twice at a time, in order, one probe).
    #[test]
    fn every_delivery_ends_and_the_rules_hold(
        seed: u64,
        concurrency in 1usize..8,
        attempts in 1u32..6,
        rate in prop_oneof![Just(0u32), 20u32..200],
        failing in 0.0f64..0.6,
        orders in 0usize..5,
    ) {
        let policy = DeliveryPolicy { concurrency, attempts, rate, ..DeliveryPolicy::default() };
        let mut world = World::new(&[("a", policy.clone()), ("b", policy)], seed);
        let mut names = Rng::from_seed(seed ^ 1);
        for number in 0..120 {
            let order = (orders > 0).then(|| format!("k{}", names.below(orders)));
            world.accept(if number % 3 == 0 { "b" } else { "a" }, order.as_deref());
        }
        let outage = START + MINUTE * 10;
        world.run(MINUTE * 60 * 20, |rng, now, _| {
            let takes = Duration::from_millis(1 + rng.below(500) as u64);
            let outcome = match rng.unit_f64() {
                _ if now < outage && now.0 % 2 == 0 => DOWN,
                draw if draw > failing => response(200),
                draw if draw < failing / 4.0 => DeliveryOutcome::NoResponse,
                draw if draw < failing / 3.0 => {
                    DeliveryOutcome::Response { status: 503, retry_after: Some(Duration::from_secs(3)) }
                }
                draw if draw < failing / 2.0 => response(429),
                _ => response(500),
            };
            (outcome, takes)
        });
        let ends = world.ends();
        prop_assert_eq!(ends.get("pending"), None, "{:?}", ends);
        prop_assert!(world.most_running.values().all(|most| *most <= concurrency));
        prop_assert!(world.rows.values().all(|row| row.attempts <= attempts));
    }
}
