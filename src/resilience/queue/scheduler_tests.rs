//! The scheduler by hand, step by step.

use std::collections::BTreeSet;

use super::{
    policy::{DeliveryOutcome, DeliveryPolicy},
    scheduler::{Scheduler, Step, WINDOW},
    *,
};
use crate::rng::Rng;

const START: UnixMillis = UnixMillis(1_800_000_000_000);
const DONE: DeliveryOutcome = DeliveryOutcome::Response { status: 200, retry_after: None };

/// A delivery that was never attempted.
fn due_now(seq: i64) -> DueDelivery {
    DueDelivery {
        id: DeliveryId::new(START, [seq as u8; 10]),
        seq,
        next: START,
        since: START,
        attempts: 0,
        order_key: None,
    }
}

#[test]
fn a_hundred_thousand_queued_are_held_in_the_store() {
    let policy = DeliveryPolicy { concurrency: 50, ..DeliveryPolicy::default() };
    let mut scheduler = Scheduler::default();
    scheduler.configure(vec![("orders".into(), policy)]);
    let mut rng = Rng::from_seed(7);
    let all: Vec<DueDelivery> = (0..100_000)
        .map(|seq| DueDelivery { id: DeliveryId::new(START, rng.bytes()), ..due_now(seq) })
        .collect();
    for due in &all {
        scheduler.offer("orders", due.clone());
    }
    let (mut done, mut loads): (BTreeSet<i64>, usize) = (BTreeSet::new(), 0);
    loop {
        assert!(scheduler.states().all(|state| state.held <= WINDOW));
        match scheduler.next(START) {
            Step::Deliver { queue, due, .. } => {
                assert!(done.insert(due.seq), "{} twice", due.seq);
                scheduler.finished((&queue, due.id), DONE, START, 0.5);
                scheduler.settled(&queue, due.id, None);
            }
            Step::Load { queue, limit } => {
                loads += 1;
                assert!(limit <= WINDOW + 50);
                // In order, so what is done is a prefix.
                let found = all[done.len()..].iter().take(limit).cloned().collect();
                scheduler.loaded(&queue, Some(found), limit);
            }
            Step::Expire { .. } => unreachable!(),
            Step::Wait(_) => break,
        }
    }
    assert_eq!(done.len(), all.len());
    assert!((100..200).contains(&loads), "{loads} reads");
}

#[test]
fn a_queue_that_is_no_longer_configured_ends_what_it_began() {
    let mut scheduler = Scheduler::default();
    scheduler.configure(vec![("orders".into(), DeliveryPolicy::default())]);
    let due = due_now(1);
    let Step::Load { queue, limit } = scheduler.next(START) else { panic!() };
    scheduler.loaded(&queue, Some(vec![due.clone()]), limit);
    assert!(matches!(scheduler.next(START), Step::Deliver { .. }));
    assert!(!scheduler.remove("orders", due.id), "it is under way");
    scheduler.configure(Vec::new());
    assert_eq!(scheduler.next(START), Step::Wait(None));
    assert_eq!(scheduler.finished(("orders", due.id), DONE, START, 0.5), Some(Verdict::Done));
    scheduler.settled("orders", due.id, None);
    assert_eq!(scheduler.states().count(), 0);
    // A late report changes nothing.
    assert_eq!(scheduler.finished(("orders", due.id), DONE, START, 0.5), None);
}

#[test]
fn a_queue_that_is_configured_again_reads_what_it_missed() {
    let mut scheduler = Scheduler::default();
    let orders = || vec![("orders".into(), DeliveryPolicy::default())];
    scheduler.configure(orders());
    let Step::Load { queue, limit } = scheduler.next(START) else { panic!() };
    let [first, second] = [1, 2].map(due_now);
    scheduler.loaded(&queue, Some(vec![first.clone(), second]), limit);
    for _ in 0..2 {
        assert!(matches!(scheduler.next(START), Step::Deliver { .. }));
    }
    scheduler.configure(Vec::new());
    let failed = DeliveryOutcome::Response { status: 500, retry_after: None };
    let verdict = scheduler.finished(("orders", first.id), failed, START, 0.0);
    assert_eq!(verdict, Some(Verdict::Wait { until: START }));
    // It is not forgotten, though the queue takes nothing now.
    scheduler.settled("orders", first.id, None);
    scheduler.configure(orders());
    let Step::Load { queue, limit } = scheduler.next(START) else { panic!("the store is not read again") };
    scheduler.loaded(&queue, Some(vec![first.clone()]), limit);
    assert!(matches!(scheduler.next(START), Step::Deliver { due, .. } if due.id == first.id));
}

/// A delivery that is accepted while the store is being read is not forgotten.
#[test]
fn an_acceptance_during_a_read_is_seen() {
    let mut scheduler = Scheduler::default();
    scheduler.configure(vec![("orders".into(), DeliveryPolicy::default())]);
    let Step::Load { queue, limit } = scheduler.next(START) else { panic!() };
    scheduler.offer("orders", due_now(1));
    // The read was made before.
    scheduler.loaded(&queue, Some(Vec::new()), limit);
    let Step::Load { queue, limit } = scheduler.next(START) else { panic!("the store is not read again") };
    scheduler.loaded(&queue, Some(vec![due_now(1)]), limit);
    assert!(matches!(scheduler.next(START), Step::Deliver { .. }));
}
