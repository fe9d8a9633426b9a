//! The store without its thread, for `outrigger queue --store DIR`: while no process owns it.

use std::{path::Path, time::Duration};

use super::{
    batch::{Batch, Outcome},
    cipher::Cipher,
    database::{Database, KeyCheck},
    directory::StoreDirectory,
    error::StoreError,
    query::{Filter, Summary},
    state::DeliveryState,
};
use crate::{
    queue::{DeliveryId, StoredRequest},
    unix_time::UnixMillis,
};

/// Rows that are read or changed at a time.
const PAGE: usize = 1000;

/// A store that this process has locked.
pub struct OfflineStore {
    database: Database,
    _directory: StoreDirectory,
}

impl OfflineStore {
    /// Opens an existing store. The key is needed only for contents.
    pub fn open(path: &Path, key_file: Option<&Path>) -> Result<Self, StoreError> {
        let cipher = key_file.map(Cipher::from_file).transpose()?;
        let directory = StoreDirectory::open(path)?;
        let database = Database::open(&directory.database(), cipher, KeyCheck::IfGiven)?;
        Ok(Self { database, _directory: directory })
    }

    /// Calls `each` for every delivery that passes the filter, in the order of acceptance, until it returns false.
    pub fn list(&self, filter: &Filter, mut each: impl FnMut(Summary) -> bool) -> Result<(), StoreError> {
        let mut after = 0;
        loop {
            let page = self.database.list(filter, after, PAGE)?;
            let Some(last) = page.last() else { return Ok(()) };
            after = last.seq;
            for summary in page {
                if !each(summary) {
                    return Ok(());
                }
            }
        }
    }

    pub fn find(&self, id: DeliveryId) -> Result<Summary, StoreError> {
        self.database.find(id)
    }

    pub fn content(&self, id: DeliveryId) -> Result<(StoredRequest, Vec<u8>), StoreError> {
        self.database.content(id)
    }

    pub fn outcome(&self, id: DeliveryId) -> Result<Option<Outcome>, StoreError> {
        self.database.outcome(id)
    }

    /// Queues these dead letters again: the first now, each of the others `spacing` later than the one before.
    pub fn replay(&mut self, ids: &[DeliveryId], spacing: Duration) -> Result<(), StoreError> {
        let mut at = UnixMillis::now();
        for page in ids.chunks(PAGE) {
            self.write(|batch| {
                for id in page {
                    batch.replay(*id, at)?;
                    at = at + spacing;
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Makes a pending delivery a dead letter, deletes any other. Returns the state that it had.
    pub fn drop_delivery(&mut self, id: DeliveryId) -> Result<DeliveryState, StoreError> {
        self.write(|batch| batch.drop_delivery(id))
    }

    /// Notes that an operator has stopped the deliveries of a queue, or that they go on.
    pub fn set_paused(&mut self, queue: &str, is_paused: bool) -> Result<(), StoreError> {
        self.write(|batch| batch.set_paused(queue, is_paused))
    }

    fn write<T>(
        &mut self,
        change: impl FnOnce(&mut Batch<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let database = &self.database;
        let transaction = database.connection.unchecked_transaction()?;
        let counts = database.counts.clone();
        let mut batch = Batch { database, counts, now: UnixMillis::now(), space: 0 };
        let result = change(&mut batch)?;
        let counts = batch.counts;
        transaction.commit()?;
        self.database.counts = counts;
        Ok(result)
    }
}
