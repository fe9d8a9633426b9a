//! What the store's users tell each other, also when one of them leaves.

use std::{future::Future, pin::Pin, task::Context};

use bytes::Bytes;
use http::{HeaderMap, Method, Uri};

use super::*;
use crate::{
    queue::{
        StoredRequest,
        request::Direction,
        store::{
            DeliveryState, NewDelivery, Outcome, StoreThread,
            settings::{Durability, StoreSettings},
        },
    },
    resilience::queue::{DeadReason, Verdict, settings::QueueLimits},
    unix_time::SteadyClock,
};

const LONG: Duration = Duration::from_secs(60);

fn open() -> (Queues, StoreThread) {
    let settings = StoreSettings { durability: Durability::Memory, ..StoreSettings::default() };
    let (store, thread) = Store::open(&settings, SteadyClock::default()).unwrap();
    (Queues::new(store), thread)
}

async fn accept(queues: &Queues) -> DeliveryId {
    let new = NewDelivery {
        queue: "orders".to_owned(),
        limits: QueueLimits::default(),
        identity: "service".to_owned(),
        idempotency_key: None,
        order_key: None,
        request: StoredRequest {
            direction: Direction::Outbound,
            method: Method::POST,
            uri: Uri::from_static("http://payments/orders"),
            headers: HeaderMap::new(),
        },
        body: Bytes::new(),
    };
    queues.store.accept(new).await.unwrap().id
}

fn failed() -> Option<Outcome> {
    Some(Outcome { status: Some(500), head: b"HTTP/1.1 500 \r\n\r\n".to_vec(), ..Outcome::default() })
}

/// Polls once; false: it has ended. A job that it has sent is done before the next one of this test.
fn poll<T>(future: &mut Pin<Box<impl Future<Output = T>>>) -> bool {
    future.as_mut().poll(&mut Context::from_waker(std::task::Waker::noop())).is_pending()
}

#[tokio::test]
async fn a_replay_whose_client_leaves_is_read_again() {
    let (queues, _thread) = open();
    let id = accept(&queues).await;
    queues.store.settle(id, Verdict::Dead(DeadReason::Attempts), failed()).await.unwrap();
    for all in [false, true] {
        let ids = [id];
        let filter = crate::queue::store::Filter::default();
        let mut replay = Box::pin(async {
            if all {
                queues.replay_all(&filter, Duration::ZERO).await
            } else {
                queues.replay(&ids, Duration::ZERO).await
            }
        });
        // Until the change is in the store. The answer may come with the same poll: then the client has not left, and the queue is
        // read again just the same.
        while queues.store.find(id).await.unwrap().state == DeliveryState::Dead && poll(&mut replay) {}
        drop(replay);
        assert_eq!(std::mem::take(&mut queues.lock().stale), ["orders"], "{all}");
        queues.store.settle(id, Verdict::Dead(DeadReason::Attempts), None).await.unwrap();
    }
}

#[tokio::test]
async fn a_pause_whose_client_leaves_is_noticed() {
    let (queues, _thread) = open();
    let mut pause = Box::pin(queues.set_paused("orders", true));
    assert!(poll(&mut pause), "it waits for the store");
    assert_eq!(queues.store.paused().await.unwrap().len(), 1);
    drop(pause);
    assert!(queues.lock().holds_changed);
}

/// The response of an earlier attempt is no result.
#[tokio::test]
async fn a_client_that_waits_for_a_cancelled_delivery_gets_no_response() {
    let (queues, _thread) = open();
    let id = accept(&queues).await;
    let until = queues.store.now() + LONG;
    queues.store.settle(id, Verdict::Wait { until }, failed()).await.unwrap();
    let cancel = async {
        queues.store.cancel(id, "service".to_owned()).await.unwrap();
        queues.notify_end(id);
    };
    let (result, ()) = tokio::join!(accept::wait_for_result(&queues, id, LONG), cancel);
    assert!(result.is_none());
    let dead = accept(&queues).await;
    queues.store.settle(dead, Verdict::Dead(DeadReason::Attempts), failed()).await.unwrap();
    let result = accept::wait_for_result(&queues, dead, LONG).await;
    assert_eq!(result.map(|response| response.status().as_u16()), Some(500));
}

#[tokio::test]
async fn a_waiting_client_that_leaves_is_forgotten() {
    let (queues, _thread) = open();
    let id = accept(&queues).await;
    let mut waits = Box::pin(accept::wait_for_result(&queues, id, LONG));
    assert!(poll(&mut waits), "there is no result yet");
    assert_eq!(queues.lock().waiters.len(), 1);
    drop(waits);
    assert_eq!(queues.lock().waiters.len(), 0);
}
