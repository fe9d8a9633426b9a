//! On a store that no process uses.

use std::{path::Path, time::Duration};

use super::QueueError;
use crate::{
    admin::deliveries::{
        DeliveryFilter, DroppedDelivery, Rate,
        report::{DeliveryDetail, DeliveryReport},
    },
    queue::{
        DeliveryId,
        store::{DeliveryState, Filter, StoreError, offline::OfflineStore},
    },
    resilience::queue::DeadReason,
    unix_time::UnixMillis,
};

/// The words of the filter come from the command line, where they were checked.
fn filter(filter: &DeliveryFilter) -> Filter {
    Filter {
        queue: filter.queue.clone(),
        state: filter.state.as_ref().map(|_| DeliveryState::Dead),
        reason: filter.reason.as_deref().and_then(DeadReason::from_word),
        accepted_before: filter.older.map(|age| UnixMillis::now().before(age.0)),
    }
}

pub fn list(
    path: &Path,
    wanted: &DeliveryFilter,
    each: &mut impl FnMut(DeliveryReport) -> bool,
) -> Result<(), QueueError> {
    let now = UnixMillis::now();
    let store = OfflineStore::open(path, None)?;
    Ok(store
        .list(&filter(wanted), |delivery| each(DeliveryReport::of(&delivery, delivery.state.word(), now)))?)
}

pub fn show(
    path: &Path,
    key_file: Option<&Path>,
    id: DeliveryId,
    shows_bodies: bool,
) -> Result<DeliveryDetail, QueueError> {
    let store = OfflineStore::open(path, key_file)?;
    let read = || {
        let delivery = store.find(id)?;
        let (request, body) = store.content(id)?;
        let outcome = store.outcome(id)?;
        let report = DeliveryReport::of(&delivery, delivery.state.word(), UnixMillis::now());
        Ok(DeliveryDetail::new(report, (&request, &body), outcome.as_ref(), shows_bodies))
    };
    read().map_err(|error| QueueError::Delivery { id, error })
}

/// `all`: what passes it, in place of `ids`.
pub fn replay(
    path: &Path,
    ids: &[DeliveryId],
    all: Option<&DeliveryFilter>,
    rate: Option<Rate>,
) -> Result<usize, QueueError> {
    let mut store = OfflineStore::open(path, None)?;
    for id in ids {
        let delivery = store.find(*id).map_err(|error| QueueError::Delivery { id: *id, error })?;
        if delivery.state != DeliveryState::Dead {
            let error = StoreError::WrongState(delivery.state.word());
            return Err(QueueError::Delivery { id: *id, error });
        }
    }
    let mut ids = ids.to_vec();
    if let Some(wanted) = all {
        store.list(&filter(wanted), |delivery| {
            ids.push(delivery.id);
            true
        })?;
    }
    store.replay(&ids, rate.map_or(Duration::ZERO, |rate| rate.0))?;
    Ok(ids.len())
}

pub fn drop_deliveries(path: &Path, ids: &[DeliveryId]) -> Result<Vec<DroppedDelivery>, QueueError> {
    let mut store = OfflineStore::open(path, None)?;
    let drop_one = |id: &DeliveryId| {
        let before = store.drop_delivery(*id).map_err(|error| QueueError::Delivery { id: *id, error })?;
        let (was, is_dead_letter) = (before.word().to_owned(), before.is_pending());
        Ok(DroppedDelivery { id: id.to_string(), was, is_dead_letter })
    };
    ids.iter().map(drop_one).collect()
}

pub fn pause(path: &Path, queue: &str, is_paused: bool) -> Result<(), QueueError> {
    Ok(OfflineStore::open(path, None)?.set_paused(queue, is_paused)?)
}
