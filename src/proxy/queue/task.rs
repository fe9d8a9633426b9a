//! What the deliverer has done: an attempt, and writing what it means.

use std::{rc::Rc, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::time::{Instant, sleep};

use super::{
    Claim, Queues,
    attempt::{self, Report},
};
use crate::{
    proxy::worker::Worker,
    queue::{
        DeliveryId,
        store::{Outcome, StoreError},
    },
    resilience::queue::{DueDelivery, Verdict, policy::DeliveryOutcome},
    telemetry::access_log::DeliveryEnd,
    unix_time::UnixMillis,
};

/// How long after a failure of the store an outcome is written again.
const STORE_RETRY: Duration = Duration::from_secs(1);
/// A verdict that could not be stored for this long is given up: the delivery is repeated.
const LONGEST_WRITE: Duration = Duration::from_secs(300);

/// The cause where an attempt began whose outcome was never written.
const OUTCOME_LOST: &str = "outcome_lost";

/// How a task ended.
pub enum TaskEnd {
    /// Boxed: a report holds the whole response.
    Attempted(Box<Report>),
    /// It was cancelled or has ended meanwhile, or is being cancelled: nothing was sent, and nothing is to be written.
    Skipped,
    /// The store could not be read: nothing was sent.
    StoreFailed(StoreError),
    /// The verdict is stored. `next`: the next of the same order.
    Settled {
        next: Option<DueDelivery>,
        /// What the access log says of it.
        end: Option<DeliveryEnd>,
    },
    NotSettled,
}

/// A verdict that is to be written.
pub struct Settlement {
    pub id: DeliveryId,
    pub queue: Arc<str>,
    pub verdict: Verdict,
    pub outcome: Option<Outcome>,
    /// The number of the attempt; `None`: there was none.
    pub attempt: Option<u32>,
}

impl Settlement {
    /// For the access log, if this ends the delivery.
    fn end(&self, now: UnixMillis) -> Option<DeliveryEnd> {
        let dead = match self.verdict {
            Verdict::Done => None,
            Verdict::Dead(reason) => Some(reason.word()),
            Verdict::Wait { .. } | Verdict::Release => return None,
        };
        Some(DeliveryEnd {
            at: now.into(),
            id: self.id,
            queue: self.queue.to_string(),
            dead,
            attempts: self.attempt,
            status: self.outcome.as_ref().and_then(|outcome| outcome.status),
            cause: self.outcome.as_ref().and_then(|outcome| outcome.cause.clone()),
        })
    }
}

/// Writes a verdict. While the store fails it is tried again for some time: else the delivery would be repeated.
pub async fn write(queues: &Queues, settlement: Settlement) -> TaskEnd {
    let Settlement { id, verdict, .. } = settlement;
    let begin = Instant::now();
    let mut is_reported = false;
    loop {
        match queues.store.settle(id, verdict, settlement.outcome.clone()).await {
            Ok(next) => {
                if matches!(verdict, Verdict::Done | Verdict::Dead(_)) {
                    queues.notify_end(id);
                }
                return TaskEnd::Settled { next, end: settlement.end(queues.store.now()) };
            }
            // Cancelled or dropped meanwhile.
            Err(StoreError::NotFound | StoreError::WrongState(_)) => {
                return TaskEnd::Settled { next: None, end: None };
            }
            Err(StoreError::Closed) => return TaskEnd::NotSettled,
            Err(error) => {
                if !std::mem::replace(&mut is_reported, true) {
                    tracing::error!(delivery = %id, %error, "the outcome of a delivery cannot be stored; trying again");
                }
                if begin.elapsed() > LONGEST_WRITE {
                    return TaskEnd::NotSettled;
                }
                sleep(STORE_RETRY).await;
            }
        }
    }
}

/// One attempt of a delivery.
pub struct Attempt {
    pub worker: Rc<Worker>,
    pub queues: Arc<Queues>,
    /// Whether it is claimed already, so that the drain waits for it from the beginning.
    pub is_claimed: bool,
    /// Whether to note in the store that it begins.
    pub starts: bool,
    pub result_limit: u64,
    pub due: DueDelivery,
}

impl Attempt {
    pub async fn run(self) -> TaskEnd {
        let Self { queues, due, .. } = &self;
        let mut is_claimed = self.is_claimed;
        while !is_claimed {
            // It is being cancelled. If that fails, the store still has it.
            queues.wait_unclaimed(due.id).await;
            is_claimed = queues.claim(due.id, Claim::Attempt);
        }
        self.send().await.unwrap_or_else(TaskEnd::StoreFailed)
    }

    async fn send(&self) -> Result<TaskEnd, StoreError> {
        let Self { worker, queues, due, .. } = self;
        let found = match queues.store.find(due.id).await {
            Err(StoreError::NotFound) => return Ok(TaskEnd::Skipped),
            found => found?,
        };
        if !found.state.is_pending() {
            return Ok(TaskEnd::Skipped);
        }
        let (stored, body) = match queues.store.content(due.id).await {
            Err(StoreError::Unreadable(reason)) => {
                tracing::error!(delivery = %due.id, reason, "a stored request cannot be read");
                let report = Report::failed(DeliveryOutcome::Unreadable, "unreadable");
                return Ok(TaskEnd::Attempted(Box::new(report)));
            }
            content => content?,
        };
        if self.starts && !queues.store.start(due.id).await? {
            // An earlier attempt may have been processed: its outcome could not be written.
            let mut report = Report::failed(DeliveryOutcome::Interrupted { sent: true }, OUTCOME_LOST);
            report.attempt = Some(due.attempts + 1);
            return Ok(TaskEnd::Attempted(Box::new(report)));
        }
        let mut report = attempt::perform(worker, due, stored, Bytes::from(body), self.result_limit).await;
        report.attempt = Some(due.attempts + 1);
        if report.is_stale && !self.starts {
            // A pooled connection that the service had most likely closed before: another one is used at once.
            report.end = DeliveryOutcome::Interrupted { sent: false };
        }
        Ok(TaskEnd::Attempted(Box::new(report)))
    }
}
