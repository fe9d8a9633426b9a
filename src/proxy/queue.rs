//! Durable deliveries on the data path: requests of a route with `queue` are kept, and delivered when the service is there.
//!
//! ```text
//!  request ─▶ accept: read the body ▶ store ▶ 202          worker 0: deliverer ─ due? ─▶ attempt ─▶ ordinary exchange
//!  GET …/deliveries/ID ─▶ resource: state, response, cancel            ▲                    │
//!                                                                     └──── verdict ◀──────┘ (in the store)
//! ```
//!
//! Which delivery is next, and what an attempt means, is decided in [`crate::resilience::queue`].

mod accept;
mod attempt;
pub mod deliverer;
pub mod operate;
mod prefer;
mod resource;
mod stored;
mod task;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use http::{Request, Response};
use tokio::sync::{Notify, Semaphore, oneshot};

pub use accept::why_not_queued;

use super::{
    authorize::EndUser,
    body::{ClientBody, ResponseBody},
    cached,
    error::ProxyError,
    origin::Origin,
    target::RouteTarget,
};
use crate::{
    cause::Cause,
    field_set::FieldSet,
    identity::Peer,
    model::{Side, queue_route::QueueRoute},
    queue::{
        DeliveryId,
        store::{Store, StoreError, Summary},
    },
    resilience::queue::DueDelivery,
    unix_time::UnixMillis,
};

/// Accepted deliveries that the deliverer has not taken yet; with more it reads the store again.
const MAX_ACCEPTED: usize = 4096;
/// Bodies in memory at most, of requests that are being read and stored.
const INTAKE_KIB: u32 = 64 << 10;
/// How long a request waits for a share of it.
const INTAKE_WAIT: Duration = Duration::from_secs(1);
/// When a client may try again where a queue is full, or the store is.
const RETRY_WHEN_FULL: Duration = Duration::from_secs(5);
/// The same where the store has failed: it is opened again within this time.
const RETRY_WHEN_FAILED: Duration = Duration::from_secs(10);
/// The same during the drain: until then there is another process.
const RETRY_WHEN_DRAINING: Duration = Duration::from_secs(5);
/// When to ask for the state of a delivery.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// The store, and what its users on all threads tell each other.
#[derive(Debug)]
pub struct Queues {
    pub store: Store,
    /// Of [`INTAKE_KIB`].
    intake: Semaphore,
    inner: Mutex<Inner>,
    /// The deliverer has something new to look at.
    changed: Notify,
    /// A delivery has ended.
    ended: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    accepted: Vec<(String, DueDelivery)>,
    /// Queues that must be read from the store again.
    stale: Vec<String>,
    /// An operator has stopped a queue, or let it go on: the store has which.
    holds_changed: bool,
    /// Deliveries that are attempted or cancelled at the moment: never both.
    claims: HashMap<DeliveryId, Claim>,
    /// Clients that wait for the end of a delivery.
    waiters: HashMap<DeliveryId, Vec<oneshot::Sender<()>>>,
    counters: QueueCounters,
    states: BTreeMap<String, QueueState>,
}

impl Inner {
    fn mark_stale(&mut self, queue: &str) {
        if !self.stale.iter().any(|stale| stale == queue) {
            self.stale.push(queue.to_owned());
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Claim {
    Attempt,
    Change,
}

/// Since the start, by queue and outcome.
#[derive(Clone, Debug, Default)]
pub struct QueueCounters {
    pub accepted: BTreeMap<(String, &'static str), u64>,
    pub deliveries: BTreeMap<(String, &'static str), u64>,
}

/// What the deliverer knows of a queue.
#[derive(Clone, Debug, Default)]
pub struct QueueState {
    pub in_flight: usize,
    /// The service is away.
    pub pause: Option<Pause>,
    /// The age of the delivery that is due first.
    pub oldest: Option<Duration>,
}

/// Why a queue is paused.
#[derive(Clone, Copy, Debug)]
pub struct Pause {
    pub since: UnixMillis,
    /// The stable word.
    pub cause: &'static str,
}

impl Queues {
    pub fn new(store: Store) -> Self {
        let intake = Semaphore::new(INTAKE_KIB as usize);
        Self { store, intake, inner: Mutex::default(), changed: Notify::new(), ended: Notify::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn counters(&self) -> QueueCounters {
        self.lock().counters.clone()
    }

    pub fn states(&self) -> BTreeMap<String, QueueState> {
        self.lock().states.clone()
    }

    /// Why the store keeps the process from being ready.
    pub fn not_ready(&self) -> Option<&'static str> {
        let healthy = self.store.status().is_healthy();
        (!healthy).then_some(
            "store: it cannot be used, or a corrupt file was renamed; the log and /status say more",
        )
    }

    /// Waits until no delivery is attempted. Meaningful once none begins: during the drain.
    pub async fn wait_idle(&self) {
        loop {
            let ended = self.ended.notified();
            if !self.lock().claims.values().any(|claim| *claim == Claim::Attempt) {
                return;
            }
            ended.await;
        }
    }

    /// Reads a queue from the store again: it was changed there.
    pub fn invalidate(&self, queue: &str) {
        self.lock().mark_stale(queue);
        self.changed.notify_one();
    }

    /// Gives an accepted delivery to the deliverer.
    fn announce(&self, queue: &str, due: DueDelivery) {
        let mut inner = self.lock();
        if inner.accepted.len() < MAX_ACCEPTED {
            inner.accepted.push((queue.to_owned(), due));
        } else {
            inner.mark_stale(queue);
        }
        drop(inner);
        self.changed.notify_one();
    }

    /// Claims a delivery; false where another one has.
    fn claim(&self, id: DeliveryId, claim: Claim) -> bool {
        match self.lock().claims.entry(id) {
            std::collections::hash_map::Entry::Occupied(_) => false,
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(claim);
                true
            }
        }
    }

    fn release(&self, id: DeliveryId) {
        self.lock().claims.remove(&id);
        self.ended.notify_waiters();
    }

    /// Waits until a delivery that another one has claimed is free.
    async fn wait_unclaimed(&self, id: DeliveryId) {
        loop {
            let ended = self.ended.notified();
            if !self.lock().claims.contains_key(&id) {
                return;
            }
            ended.await;
        }
    }

    /// The stable word for the state, also while it is being delivered.
    pub fn state_word(&self, delivery: &Summary) -> &'static str {
        if delivery.state.is_pending() && self.is_attempted(delivery.id) {
            return "delivering";
        }
        delivery.state.word()
    }

    fn is_attempted(&self, id: DeliveryId) -> bool {
        self.lock().claims.get(&id) == Some(&Claim::Attempt)
    }

    /// Completes when the delivery ends. One that has ended before is not noticed.
    fn wait_for_end(&self, id: DeliveryId) -> EndWaiter<'_> {
        let (ended, receiver) = oneshot::channel();
        let waiters = &mut self.lock().waiters;
        let list = waiters.entry(id).or_default();
        list.retain(|other| !other.is_closed());
        list.push(ended);
        EndWaiter { queues: self, id, ended: receiver }
    }

    fn notify_end(&self, id: DeliveryId) {
        for waiter in self.lock().waiters.remove(&id).into_iter().flatten() {
            // A client that no longer waits asks for the state.
            let _ = waiter.send(());
        }
    }

    fn count_accepted(&self, queue: &str, outcome: &'static str) {
        *self.lock().counters.accepted.entry((queue.to_owned(), outcome)).or_default() += 1;
    }

    fn count_delivery(&self, queue: &str, outcome: &'static str) {
        *self.lock().counters.deliveries.entry((queue.to_owned(), outcome)).or_default() += 1;
    }
}

/// A client that waits for the end of a delivery. It may leave at any time.
struct EndWaiter<'a> {
    queues: &'a Queues,
    id: DeliveryId,
    ended: oneshot::Receiver<()>,
}

impl EndWaiter<'_> {
    async fn wait(&mut self) {
        // The sender lives in `queues`.
        let _ = (&mut self.ended).await;
    }
}

impl Drop for EndWaiter<'_> {
    fn drop(&mut self) {
        self.ended.close();
        let waiters = &mut self.queues.lock().waiters;
        if let Some(list) = waiters.get_mut(&self.id) {
            list.retain(|other| !other.is_closed());
            if list.is_empty() {
                waiters.remove(&self.id);
            }
        }
    }
}

/// Releases a claim however its request ends: a client may leave at any time.
struct ClaimGuard<'a> {
    queues: &'a Queues,
    id: DeliveryId,
    queue: &'a str,
}

impl<'a> ClaimGuard<'a> {
    /// Claims a delivery for a change; `None` where another one has claimed it.
    fn change(queues: &'a Queues, id: DeliveryId, queue: &'a str) -> Option<Self> {
        queues.claim(id, Claim::Change).then_some(Self { queues, id, queue })
    }
}

impl Drop for ClaimGuard<'_> {
    fn drop(&mut self) {
        self.queues.release(self.id);
        // The next of the same order may be due, and the deliverer forgets this one.
        self.queues.invalidate(self.queue);
    }
}

/// Has the deliverer read the store if the client leaves while its request is being stored: it may be there then.
struct StoringGuard<'a> {
    queues: &'a Queues,
    queue: &'a str,
    is_stored: bool,
}

impl Drop for StoringGuard<'_> {
    fn drop(&mut self) {
        if !self.is_stored {
            self.queues.invalidate(self.queue);
        }
    }
}

/// Serves a request whose route has a [`QueueRoute`].
pub async fn serve(
    origin: &Origin<'_>,
    target: &RouteTarget,
    request: &mut Request<ClientBody>,
    present: FieldSet,
) -> Result<Response<ResponseBody>, ProxyError> {
    match target.queue_route() {
        Some(QueueRoute::Accept(route)) => {
            accept::Intake { origin, target, route, present }.serve(request).await
        }
        Some(QueueRoute::Deliveries) => resource::serve(origin, request).await,
        None => cached::forward(origin, target, request, present).await,
    }
}

/// The store's handle, if it was opened at the start.
fn queues<'a>(origin: &Origin<'a>) -> Result<&'a Queues, ProxyError> {
    origin.worker.shared.queues.as_deref().ok_or_else(|| {
        let detail = "[store] was added while the process ran, and is opened at the next start";
        ProxyError::new(Cause::StoreFailed, detail).retry_after(RETRY_WHEN_FAILED)
    })
}

/// Who a delivery belongs to: the service itself, or the peer that sent it, and the user behind it whose token it carried.
fn identity(origin: &Origin<'_>, user: Option<&EndUser>) -> String {
    let sender = match (origin.side, origin.client.and_then(|client| client.peer_identity.as_deref())) {
        (Side::Inbound, Some(peer)) => Peer::to_string(peer),
        (Side::Inbound, None) => "anonymous".to_owned(),
        _ => "service".to_owned(),
    };
    match user {
        Some(user) => format!("{sender} {}", user.name()),
        None => sender,
    }
}

fn store_error(error: &StoreError) -> ProxyError {
    match error {
        StoreError::Full => ProxyError::new(
            Cause::StoreFull,
            "the store or its disk is full: what is stored goes on being delivered",
        )
        .retry_after(RETRY_WHEN_FULL),
        StoreError::QueueFull => {
            ProxyError::new(Cause::QueueFull, error.to_string()).retry_after(RETRY_WHEN_FULL)
        }
        StoreError::KeyReused(_) => ProxyError::new(
            Cause::KeyReused,
            "the Idempotency-Key was used before, with another request: use a new key for each request",
        ),
        StoreError::NotFound => ProxyError::new(Cause::DeliveryUnknown, error.to_string()),
        StoreError::WrongState(_) => ProxyError::new(Cause::DeliveryState, error.to_string()),
        _ => ProxyError::new(Cause::StoreFailed, error.to_string()).retry_after(RETRY_WHEN_FAILED),
    }
}
