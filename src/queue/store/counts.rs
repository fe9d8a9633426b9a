//! How many deliveries each queue holds, by state: kept while the store is open, so that no limit costs a query.

use std::collections::BTreeMap;

use rusqlite::Connection;

use super::{error::StoreError, state::DeliveryState};

/// The deliveries of one queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueCounts {
    messages: [u64; DeliveryState::ALL.len()],
    /// Bytes of the requests that are still to be delivered.
    pub pending_bytes: u64,
}

/// All queues with a delivery, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts(pub BTreeMap<String, QueueCounts>);

impl QueueCounts {
    pub fn messages(&self, state: DeliveryState) -> u64 {
        self.messages[state as usize]
    }

    pub fn pending(&self) -> u64 {
        self.messages(DeliveryState::Queued) + self.messages(DeliveryState::Waiting)
    }
}

impl Counts {
    pub(super) fn read(connection: &Connection) -> Result<Self, StoreError> {
        let mut counts = Self::default();
        let mut statement = connection
            .prepare("SELECT queue, state, count(*), sum(bytes) FROM delivery GROUP BY queue, state")?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let (state, messages, bytes): (DeliveryState, u64, u64) = (row.get(1)?, row.get(2)?, row.get(3)?);
            let queue = counts.0.entry(row.get(0)?).or_default();
            queue.messages[state as usize] += messages;
            if state.is_pending() {
                queue.pending_bytes += bytes;
            }
        }
        Ok(counts)
    }

    pub fn of(&self, queue: &str) -> QueueCounts {
        self.0.get(queue).copied().unwrap_or_default()
    }

    pub(super) fn add(&mut self, queue: &str, state: DeliveryState, bytes: u64) {
        if !self.0.contains_key(queue) {
            self.0.insert(queue.to_owned(), QueueCounts::default());
        }
        let Some(counts) = self.0.get_mut(queue) else { return };
        counts.messages[state as usize] += 1;
        if state.is_pending() {
            counts.pending_bytes += bytes;
        }
    }

    pub(super) fn remove(&mut self, queue: &str, state: DeliveryState, bytes: u64) {
        let Some(counts) = self.0.get_mut(queue) else { return };
        let messages = &mut counts.messages[state as usize];
        *messages = messages.saturating_sub(1);
        if state.is_pending() {
            counts.pending_bytes = counts.pending_bytes.saturating_sub(bytes);
        }
        if counts.messages == [0; DeliveryState::ALL.len()] {
            self.0.remove(queue);
        }
    }
}
