//! The store as its callers see it. Crashes of real processes: `tests/it/queue`.

mod lifecycle_tests;

use std::{path::Path, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Uri};

use super::{
    settings::{Durability, StoreSettings},
    *,
};
use crate::{
    queue::request::Direction,
    resilience::queue::{
        DeadReason,
        settings::{DeadSettings, QueueLimits, Retention, WhenFull},
    },
    units::{ByteSize, HumanDuration},
};

const HOUR: Duration = Duration::from_secs(3600);
const NOON: UnixMillis = UnixMillis(1_800_000_000_000);

fn on_disk(path: &Path) -> StoreSettings {
    StoreSettings { path: path.to_owned(), reserve: ByteSize(64 << 10), ..StoreSettings::default() }
}

fn in_memory() -> StoreSettings {
    StoreSettings { durability: Durability::Memory, ..StoreSettings::default() }
}

fn open(settings: &StoreSettings) -> (Store, StoreThread) {
    Store::open(settings, SteadyClock::starting_at(NOON)).unwrap()
}

fn close((store, thread): (Store, StoreThread)) {
    drop(store);
    thread.join();
}

fn new_delivery(body: &str) -> NewDelivery {
    let mut headers = HeaderMap::new();
    headers.insert("content-type", HeaderValue::from_static("text/plain"));
    NewDelivery {
        queue: "orders".to_owned(),
        limits: QueueLimits::default(),
        identity: "spiffe://shop/checkout".to_owned(),
        idempotency_key: None,
        order_key: None,
        request: StoredRequest {
            direction: Direction::Outbound,
            method: Method::POST,
            uri: Uri::from_static("http://payments/charge"),
            headers,
        },
        body: Bytes::copy_from_slice(body.as_bytes()),
    }
}

fn keyed(body: &str, key: &str) -> NewDelivery {
    NewDelivery { idempotency_key: Some(key.to_owned()), ..new_delivery(body) }
}

fn ordered(body: &str, key: &str) -> NewDelivery {
    NewDelivery { order_key: Some(key.to_owned()), ..new_delivery(body) }
}

fn sweep() -> Sweep {
    Sweep {
        queue: "orders".to_owned(),
        expires: Some(HOUR),
        retention: Retention::default(),
        in_flight: Vec::new(),
    }
}

async fn accept(store: &Store, new: NewDelivery) -> DeliveryId {
    store.accept(new).await.unwrap().id
}

async fn due(store: &Store) -> Vec<DeliveryId> {
    store.due("orders".to_owned(), 1000).await.unwrap().into_iter().map(|due| due.id).collect()
}

#[tokio::test]
async fn what_was_accepted_is_there_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let opened = open(&on_disk(directory.path()));
    let accepted = opened.0.accept(new_delivery("order 1")).await.unwrap();
    assert!(accepted.id >= DeliveryId::new(NOON, [0; 10]));
    assert!(!accepted.repeated);
    let id = accepted.id;
    close(opened);
    let opened = open(&on_disk(directory.path()));
    let store = &opened.0;
    assert_eq!(due(store).await, [id]);
    let (request, body) = store.content(id).await.unwrap();
    assert_eq!((request, body.as_slice()), (new_delivery("").request, &b"order 1"[..]));
    let found = store.find(id).await.unwrap();
    assert_eq!((found.queue.as_str(), found.state, found.attempts), ("orders", DeliveryState::Queued, 0));
    assert_eq!(store.status().counts.of("orders").pending(), 1);
    close(opened);
}

#[tokio::test]
async fn a_repeated_key_gives_the_first_delivery() {
    let (store, _thread) = open(&in_memory());
    let first = store.accept(keyed("a", "k1")).await.unwrap();
    let again = store.accept(keyed("a", "k1")).await.unwrap();
    assert_eq!((again.id, again.repeated, again.due), (first.id, true, None));
    assert_eq!(store.accept(keyed("b", "k1")).await, Err(StoreError::KeyReused(first.id)));
    // Another key, another client, another queue: another delivery.
    let other_client = NewDelivery { identity: "spiffe://shop/cart".to_owned(), ..keyed("b", "k1") };
    let other_queue = NewDelivery { queue: "mails".to_owned(), ..keyed("b", "k1") };
    for new in [keyed("a", "k2"), other_client, other_queue] {
        assert!(!store.accept(new).await.unwrap().repeated);
    }
    // Until the delivery is deleted.
    store.settle(first.id, Verdict::Done, None).await.unwrap();
    assert!(store.accept(keyed("a", "k1")).await.unwrap().repeated);
    let retention = Retention { keep_done: HumanDuration::from_secs(0), ..Retention::default() };
    eventually_swept(&store, Sweep { retention, ..sweep() }).await;
    assert!(!store.accept(keyed("a", "k1")).await.unwrap().repeated);
}

/// Sweeps until something was deleted: the clock has to move by a millisecond.
async fn eventually_swept(store: &Store, sweep: Sweep) {
    while store.sweep(sweep.clone()).await.unwrap().deleted == 0 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn limits_refuse() {
    let (store, _thread) = open(&in_memory());
    let limited = |limits| NewDelivery { limits, ..new_delivery("12345") };
    let two = QueueLimits { max_messages: 2, ..QueueLimits::default() };
    let first = accept(&store, limited(two)).await;
    accept(&store, limited(two)).await;
    assert_eq!(store.accept(limited(two)).await, Err(StoreError::QueueFull));
    let few_bytes = QueueLimits { max_bytes: ByteSize(200), ..QueueLimits::default() };
    assert_eq!(store.accept(limited(few_bytes)).await, Err(StoreError::QueueFull));
    // What is done or dead does not count, unless dead letters are limited.
    store.settle(first, Verdict::Dead(DeadReason::Permanent), None).await.unwrap();
    accept(&store, limited(two)).await;
    let no_dead = QueueLimits { max_dead: Some(1), ..QueueLimits::default() };
    assert_eq!(store.accept(limited(no_dead)).await, Err(StoreError::QueueFull));

    let small = StoreSettings { max_bytes: ByteSize(256 << 10), ..in_memory() };
    let (store, _thread) = open(&small);
    let large = "x".repeat(50 << 10);
    let mut accepted = 0;
    while store.accept(new_delivery(&large)).await.is_ok() {
        accepted += 1;
    }
    assert!((2..5).contains(&accepted), "{accepted}");
    assert_eq!(store.accept(new_delivery(&large)).await, Err(StoreError::Full));
    let used = store.status().used_bytes;
    assert!(used <= 256 << 10, "{used}");
}

#[tokio::test]
async fn verdicts_are_written() {
    let (store, _thread) = open(&in_memory());
    let [done, waiting, dead, released] = [
        accept(&store, new_delivery("1")).await,
        accept(&store, new_delivery("2")).await,
        accept(&store, new_delivery("3")).await,
        accept(&store, new_delivery("4")).await,
    ];
    let response = Outcome {
        status: Some(201),
        cause: None,
        head: b"HTTP/1.1 201 Created\r\n\r\n".to_vec(),
        body: b"made".to_vec(),
        truncated: false,
    };
    let failed = Outcome { cause: Some("reset".to_owned()), ..Outcome::default() };
    store.settle(done, Verdict::Done, Some(response.clone())).await.unwrap();
    let until = NOON + HOUR;
    store.settle(waiting, Verdict::Wait { until }, Some(failed)).await.unwrap();
    store.settle(dead, Verdict::Dead(DeadReason::Attempts), None).await.unwrap();
    store.settle(released, Verdict::Release, None).await.unwrap();

    assert_eq!(store.outcome(done).await.unwrap(), Some(response));
    assert_eq!(store.outcome(released).await.unwrap(), None);
    let found = store.find(waiting).await.unwrap();
    assert_eq!((found.state, found.attempts, found.next), (DeliveryState::Waiting, 1, Some(until)));
    assert_eq!(found.cause.as_deref(), Some("reset"));
    let found = store.find(dead).await.unwrap();
    assert_eq!((found.state, found.reason), (DeliveryState::Dead, Some(DeadReason::Attempts)));
    assert_eq!(store.find(released).await.unwrap().attempts, 0);
    assert_eq!(due(&store).await, [released, waiting]);
    let status = store.status();
    let counts = status.counts.of("orders");
    assert_eq!(DeliveryState::ALL.map(|state| counts.messages(state)), [1, 1, 1, 1, 0]);
    // A late outcome never ends another delivery, and none twice.
    assert_eq!(store.settle(done, Verdict::Release, None).await, Err(StoreError::WrongState("done")));
    let unknown = DeliveryId::new(NOON, [0; 10]);
    assert_eq!(store.settle(unknown, Verdict::Done, None).await, Err(StoreError::NotFound));
}

#[tokio::test]
async fn of_an_order_only_the_first_is_due() {
    let (store, _thread) = open(&in_memory());
    let first = store.accept(ordered("1", "a")).await.unwrap();
    let second = store.accept(ordered("2", "a")).await.unwrap();
    let third = store.accept(ordered("3", "a")).await.unwrap();
    let other = accept(&store, ordered("4", "b")).await;
    assert!(first.due.is_some() && second.due.is_none());
    assert_eq!(due(&store).await, [first.id, other]);
    // It waits for its next attempt: the others of its order do too.
    store.settle(first.id, Verdict::Wait { until: NOON + HOUR }, None).await.unwrap();
    assert_eq!(due(&store).await, [other, first.id]);
    // Cancelling one that is not the first changes nothing.
    assert_eq!(store.cancel(second.id, new_delivery("").identity).await, Ok(None));
    // A dead letter frees its order.
    let next = store.settle(first.id, Verdict::Dead(DeadReason::Attempts), None).await.unwrap();
    assert_eq!(next.map(|due| due.id), Some(third.id));
    assert_eq!(due(&store).await, [other, third.id]);
    // Replayed, it waits for the one that took its place, which may be under way.
    assert_eq!(store.replay(vec![first.id], NOON, Duration::ZERO).await, Ok(1));
    assert_eq!(due(&store).await, [other, third.id]);
    let next = store.settle(third.id, Verdict::Done, None).await.unwrap();
    assert_eq!(next.map(|due| due.id), Some(first.id));
}

#[tokio::test]
async fn only_its_client_cancels() {
    let (store, _thread) = open(&in_memory());
    let id = accept(&store, new_delivery("1")).await;
    assert_eq!(store.cancel(id, "spiffe://shop/other".to_owned()).await, Err(StoreError::NotFound));
    let own = new_delivery("").identity;
    assert_eq!(store.cancel(id, own.clone()).await, Ok(None));
    assert_eq!(store.cancel(id, own).await, Err(StoreError::WrongState("cancelled")));
    assert!(due(&store).await.is_empty());
}

#[tokio::test]
async fn operators_replay_and_drop() {
    let (store, _thread) = open(&in_memory());
    let id = accept(&store, new_delivery("1")).await;
    store.settle(id, Verdict::Wait { until: NOON + HOUR }, None).await.unwrap();
    assert_eq!(store.replay(vec![id], NOON, Duration::ZERO).await, Ok(0), "it is waiting");
    assert_eq!(store.drop_delivery(id).await, Ok(DeliveryState::Waiting));
    let found = store.find(id).await.unwrap();
    assert_eq!((found.state, found.reason), (DeliveryState::Dead, Some(DeadReason::Operator)));
    assert_eq!(store.replay(vec![id], NOON, Duration::ZERO).await, Ok(1));
    let found = store.find(id).await.unwrap();
    assert_eq!((found.state, found.attempts, found.reason), (DeliveryState::Queued, 0, None));
    store.settle(id, Verdict::Done, None).await.unwrap();
    assert_eq!(store.drop_delivery(id).await, Ok(DeliveryState::Done));
    assert_eq!(store.find(id).await, Err(StoreError::NotFound));
    assert_eq!(store.status().counts, Counts::default());
}

#[tokio::test]
async fn what_is_over_expires_and_is_deleted() {
    let directory = tempfile::tempdir().unwrap();
    let settings = on_disk(directory.path());
    let opened = open(&settings);
    let [old, running, done] = [
        accept(&opened.0, new_delivery("1")).await,
        accept(&opened.0, new_delivery("2")).await,
        accept(&opened.0, new_delivery("3")).await,
    ];
    opened.0.settle(done, Verdict::Done, None).await.unwrap();
    assert_eq!(opened.0.sweep(sweep()).await, Ok(Swept::default()));
    close(opened);

    let at = |later| SteadyClock::starting_at(NOON + later);
    let (store, thread) = Store::open(&settings, at(HOUR * 2)).unwrap();
    let swept = store.sweep(Sweep { in_flight: vec![running], ..sweep() }).await.unwrap();
    assert_eq!(swept, Swept { expired: vec![old], deleted: 1, ..Swept::default() });
    assert_eq!(store.find(old).await.unwrap().reason, Some(DeadReason::Expired));
    assert_eq!((due(&store).await, store.find(done).await), (vec![running], Err(StoreError::NotFound)));
    // Dead letters make space for newer ones only where that is configured.
    let dead = DeadSettings { max: 0, ..DeadSettings::default() };
    let refuse = Sweep { retention: Retention { dead, ..Retention::default() }, expires: None, ..sweep() };
    assert_eq!(store.sweep(refuse.clone()).await.unwrap().dropped, 0);
    let dead = DeadSettings { when_full: WhenFull::DropOldest, ..dead };
    let drop_oldest = Sweep { retention: Retention { dead, ..Retention::default() }, ..refuse };
    assert_eq!(store.sweep(drop_oldest).await.unwrap().dropped, 1);
    close((store, thread));
}

#[tokio::test]
async fn a_queue_stays_paused_until_it_is_resumed() {
    let directory = tempfile::tempdir().unwrap();
    let opened = open(&on_disk(directory.path()));
    for queue in ["orders", "orders.eu"] {
        opened.0.set_paused(queue.to_owned(), true).await.unwrap();
    }
    close(opened);
    let opened = open(&on_disk(directory.path()));
    let store = &opened.0;
    let names = async || store.paused().await.unwrap().into_iter().map(|(name, _)| name).collect::<Vec<_>>();
    assert_eq!(names().await, ["orders", "orders.eu"]);
    assert!(store.paused().await.unwrap().iter().all(|(_, since)| *since >= NOON));
    store.set_paused("orders".to_owned(), false).await.unwrap();
    assert_eq!(names().await, ["orders.eu"]);
    close(opened);
}

/// Also long after the delivery was deleted, and after a restart.
#[tokio::test]
async fn an_id_is_recognised_for_the_client_that_got_it() {
    let directory = tempfile::tempdir().unwrap();
    let opened = open(&on_disk(directory.path()));
    let id = accept(&opened.0, new_delivery("1")).await;
    opened.0.settle(id, Verdict::Done, None).await.unwrap();
    opened.0.drop_delivery(id).await.unwrap();
    close(opened);
    let opened = open(&on_disk(directory.path()));
    let own = new_delivery("").identity;
    assert_eq!(opened.0.find(id).await, Err(StoreError::NotFound));
    assert_eq!(opened.0.has_issued(id, own.clone()).await, Ok(true));
    assert_eq!(opened.0.has_issued(id, "spiffe://shop/other".to_owned()).await, Ok(false));
    assert_eq!(opened.0.has_issued(DeliveryId::new(NOON, [7; 10]), own.clone()).await, Ok(false));
    close(opened);
    let other = open(&in_memory());
    assert_eq!(other.0.has_issued(id, own).await, Ok(false));
    close(other);
}

/// The reply to one caller does not depend on the fate of another in the same batch.
#[tokio::test]
async fn many_callers_share_commits() {
    let directory = tempfile::tempdir().unwrap();
    let opened = open(&on_disk(directory.path()));
    let callers: Vec<_> = (0..200)
        .map(|number| {
            let store = opened.0.clone();
            tokio::spawn(async move {
                // Every fourth uses the key of the one before, for another request.
                let key = if number % 4 == 1 { number - 1 } else { number };
                store.accept(keyed(&number.to_string(), &key.to_string())).await
            })
        })
        .collect();
    let mut accepted = 0;
    for caller in callers {
        accepted += usize::from(caller.await.unwrap().is_ok());
    }
    assert_eq!(accepted, 150);
    let commits = opened.0.status().commits;
    assert!(commits < 150, "{commits} commits");
    assert_eq!(due(&opened.0).await.len(), 150);
    close(opened);
}
