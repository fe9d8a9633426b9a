//! What an operator does with queues and deliveries while the process runs.

use std::{collections::BTreeSet, time::Duration};

use super::{ClaimGuard, Queues};
use crate::{
    queue::{
        DeliveryId,
        store::{DeliveryState, Filter, StoreError},
    },
    resilience::queue::DeadReason,
};

/// Dead letters that one commit replays at most: accepted requests do not wait long for it.
const REPLAY_PAGE: usize = 500;

/// Why a change was not made.
#[derive(Clone, Debug, thiserror::Error)]
pub enum OperateError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("{id}: {error}")]
    Delivery { id: DeliveryId, error: StoreError },
    #[error("{0}: it is being delivered at the moment: try again")]
    UnderWay(DeliveryId),
}

/// Has the deliverer read these queues again, however their change ends: it may be in the store, also after an error, and
/// the client may leave before it hears of it.
struct Changed<'a> {
    of: &'a Queues,
    queues: &'a BTreeSet<String>,
}

impl Drop for Changed<'_> {
    fn drop(&mut self) {
        for queue in self.queues {
            self.of.invalidate(queue);
        }
    }
}

/// The same with the queues that operators have stopped.
struct HoldsChanged<'a>(&'a Queues);

impl Drop for HoldsChanged<'_> {
    fn drop(&mut self) {
        self.0.lock().holds_changed = true;
        self.0.changed.notify_one();
    }
}

impl Queues {
    /// Stops or resumes the deliveries of a queue. Requests are accepted all the while. It holds across restarts.
    pub async fn set_paused(&self, queue: &str, is_paused: bool) -> Result<(), StoreError> {
        let changed = HoldsChanged(self);
        self.store.set_paused(queue.to_owned(), is_paused).await?;
        drop(changed);
        tracing::info!(queue, is_paused, "an operator changed the queue");
        Ok(())
    }

    /// Queues these dead letters again: the first now, each of the others `spacing` later than the one before.
    pub async fn replay(&self, ids: &[DeliveryId], spacing: Duration) -> Result<u64, OperateError> {
        let mut queues = BTreeSet::new();
        for id in ids {
            let delivery =
                self.store.find(*id).await.map_err(|error| OperateError::Delivery { id: *id, error })?;
            if delivery.state != DeliveryState::Dead {
                let error = StoreError::WrongState(delivery.state.word());
                return Err(OperateError::Delivery { id: *id, error });
            }
            queues.insert(delivery.queue);
        }
        let mut at = self.store.now();
        let mut replayed = 0;
        for page in ids.chunks(REPLAY_PAGE) {
            let _changed = Changed { of: self, queues: &queues };
            replayed += self.store.replay(page.to_vec(), at, spacing).await?;
            at = at + spacing.saturating_mul(page.len() as u32);
        }
        tracing::info!(?queues, count = replayed, "an operator replayed dead letters");
        Ok(replayed)
    }

    /// The same with all dead letters that pass the filter.
    pub async fn replay_all(&self, filter: &Filter, spacing: Duration) -> Result<u64, OperateError> {
        let filter = Filter { state: Some(DeliveryState::Dead), ..filter.clone() };
        let (mut at, mut after, mut replayed) = (self.store.now(), 0, 0);
        let mut queues = BTreeSet::new();
        loop {
            let page = self.store.list(filter.clone(), after, REPLAY_PAGE).await?;
            let Some(last) = page.last() else { break };
            after = last.seq;
            let ids: Vec<DeliveryId> = page.iter().map(|delivery| delivery.id).collect();
            queues.extend(page.into_iter().map(|delivery| delivery.queue));
            let count = ids.len() as u32;
            let _changed = Changed { of: self, queues: &queues };
            replayed += self.store.replay(ids, at, spacing).await?;
            at = at + spacing.saturating_mul(count);
        }
        tracing::info!(?queues, count = replayed, "an operator replayed dead letters");
        Ok(replayed)
    }

    /// Makes a pending delivery a dead letter, deletes any other. Returns the state that it had.
    pub async fn drop_delivery(&self, id: DeliveryId) -> Result<DeliveryState, OperateError> {
        let of_delivery = |error| OperateError::Delivery { id, error };
        let delivery = self.store.find(id).await.map_err(of_delivery)?;
        let claim = ClaimGuard::change(self, id, &delivery.queue).ok_or(OperateError::UnderWay(id))?;
        let before = self.store.drop_delivery(id).await.map_err(of_delivery)?;
        drop(claim);
        if before.is_pending() {
            self.count_delivery(&delivery.queue, DeadReason::Operator.word());
            self.notify_end(id);
        }
        let (queue, before_word) = (&delivery.queue, before.word());
        tracing::info!(queue, delivery = %id, before = before_word, "an operator dropped a delivery");
        Ok(before)
    }
}
