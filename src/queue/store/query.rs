//! What is read from the store.

use rusqlite::{OptionalExtension, Row, params};

use super::{batch::Outcome, cipher::Part, database::Database, error::StoreError, state::DeliveryState};
use crate::{
    queue::{DeliveryId, StoredRequest},
    resilience::queue::{DeadReason, DueDelivery},
    unix_time::UnixMillis,
};

/// What is known of a delivery, without its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    pub id: DeliveryId,
    pub seq: i64,
    pub queue: String,
    pub identity: String,
    pub idempotency_key: Option<String>,
    pub order_key: Option<String>,
    pub state: DeliveryState,
    pub reason: Option<DeadReason>,
    /// That reached the service.
    pub attempts: u32,
    pub accepted: UnixMillis,
    /// The next attempt is not before; `None` if it has ended, or waits for another one of its order.
    pub next: Option<UnixMillis>,
    pub ended: Option<UnixMillis>,
    /// Of the request.
    pub bytes: u64,
    /// Of the last attempt.
    pub status: Option<u16>,
    pub cause: Option<String>,
}

/// Which deliveries to list.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    pub queue: Option<String>,
    pub state: Option<DeliveryState>,
    pub reason: Option<DeadReason>,
    /// Accepted before.
    pub accepted_before: Option<UnixMillis>,
}

/// What begins the name of a queue in `meta` that an operator has stopped.
pub(super) const PAUSED: &str = "paused:";

const SUMMARY: &str =
    "SELECT id, seq, queue, identity, idempotency_key, order_key, state, reason, attempts, accepted,
                              next, ended, bytes, outcome.status, outcome.cause
                       FROM delivery LEFT JOIN outcome USING (seq)";

fn summary(row: &Row<'_>) -> rusqlite::Result<Summary> {
    let reason: Option<String> = row.get(7)?;
    let time = |index| Ok::<_, rusqlite::Error>(row.get::<_, Option<u64>>(index)?.map(UnixMillis));
    Ok(Summary {
        id: DeliveryId::from_bytes(row.get(0)?),
        seq: row.get(1)?,
        queue: row.get(2)?,
        identity: row.get(3)?,
        idempotency_key: row.get(4)?,
        order_key: row.get(5)?,
        state: row.get(6)?,
        reason: reason.as_deref().and_then(DeadReason::from_word),
        attempts: row.get(8)?,
        accepted: UnixMillis(row.get(9)?),
        next: time(10)?,
        ended: time(11)?,
        bytes: row.get(12)?,
        status: row.get(13)?,
        cause: row.get(14)?,
    })
}

impl Database {
    /// The deliveries of a queue that are due first, at most `limit`. Of each order only the first is among them.
    pub(super) fn due(&self, queue: &str, limit: usize) -> Result<Vec<DueDelivery>, StoreError> {
        let mut statement = self.connection.prepare_cached(
            "SELECT id, seq, next, since, attempts, order_key FROM delivery
             WHERE queue = ?1 AND next IS NOT NULL ORDER BY next, seq LIMIT ?2",
        )?;
        let rows = statement.query_map(params![queue, limit], |row| {
            Ok(DueDelivery {
                id: DeliveryId::from_bytes(row.get(0)?),
                seq: row.get(1)?,
                next: UnixMillis(row.get(2)?),
                since: UnixMillis(row.get(3)?),
                attempts: row.get(4)?,
                order_key: row.get::<_, Option<String>>(5)?.map(Into::into),
            })
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    pub(super) fn find(&self, id: DeliveryId) -> Result<Summary, StoreError> {
        let mut statement = self.connection.prepare_cached(&format!("{SUMMARY} WHERE id = ?1"))?;
        statement.query_row([id.to_bytes()], summary).optional()?.ok_or(StoreError::NotFound)
    }

    /// In the order of acceptance, the ones after `after`, at most `limit`.
    pub(super) fn list(&self, filter: &Filter, after: i64, limit: usize) -> Result<Vec<Summary>, StoreError> {
        let mut statement = self.connection.prepare_cached(&format!(
            "{SUMMARY} WHERE seq > ?1 AND (?2 IS NULL OR queue = ?2) AND (?3 IS NULL OR state = ?3)
                         AND (?4 IS NULL OR reason = ?4) AND (?5 IS NULL OR accepted < ?5)
             ORDER BY seq LIMIT ?6"
        ))?;
        let rows = statement.query_map(
            params![
                after,
                filter.queue,
                filter.state,
                filter.reason.map(DeadReason::word),
                filter.accepted_before.map(|time| time.0),
                limit
            ],
            summary,
        )?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// The queues that an operator has stopped, and since when.
    pub(super) fn paused(&self) -> Result<Vec<(String, UnixMillis)>, StoreError> {
        let mut statement =
            self.connection.prepare_cached("SELECT name, value FROM meta WHERE name >= ?1 AND name < ?2")?;
        // `;` follows `:`.
        let rows = statement.query_map([PAUSED, "paused;"], |row| {
            let (name, since): (String, Vec<u8>) = (row.get(0)?, row.get(1)?);
            let since = since.first_chunk().copied().map(u64::from_be_bytes).unwrap_or_default();
            Ok((name.strip_prefix(PAUSED).unwrap_or_default().to_owned(), UnixMillis(since)))
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// Head and body of the request.
    pub(super) fn content(&self, id: DeliveryId) -> Result<(StoredRequest, Vec<u8>), StoreError> {
        let mut statement = self.connection.prepare_cached(
            "SELECT content.sealed, content.head, content.body FROM delivery JOIN content USING (seq) WHERE id = ?1",
        )?;
        let row = statement.query_row([id.to_bytes()], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)));
        let (sealed, head, body): (bool, Vec<u8>, Vec<u8>) = row.optional()?.ok_or(StoreError::NotFound)?;
        let head = self.unseal(id, Part::RequestHead, sealed, head)?;
        Ok((StoredRequest::decode(&head)?, self.unseal(id, Part::RequestBody, sealed, body)?))
    }

    /// The outcome of the last attempt; `None` before the first.
    pub(super) fn outcome(&self, id: DeliveryId) -> Result<Option<Outcome>, StoreError> {
        let mut statement = self.connection.prepare_cached(
            "SELECT outcome.sealed, status, cause, outcome.head, outcome.body, truncated
             FROM delivery JOIN outcome USING (seq) WHERE id = ?1",
        )?;
        let row = statement.query_row([id.to_bytes()], |row| {
            let outcome = Outcome {
                status: row.get(1)?,
                cause: row.get(2)?,
                head: row.get(3)?,
                body: row.get(4)?,
                truncated: row.get(5)?,
            };
            Ok((row.get::<_, bool>(0)?, outcome))
        });
        let Some((sealed, outcome)) = row.optional()? else { return Ok(None) };
        Ok(Some(Outcome {
            head: self.unseal(id, Part::ResponseHead, sealed, outcome.head)?,
            body: self.unseal(id, Part::ResponseBody, sealed, outcome.body)?,
            ..outcome
        }))
    }

    fn unseal(
        &self,
        id: DeliveryId,
        part: Part,
        sealed: bool,
        bytes: Vec<u8>,
    ) -> Result<Vec<u8>, StoreError> {
        match (&self.cipher, sealed) {
            (_, false) => Ok(bytes),
            (Some(cipher), true) => cipher.open(id, part, &bytes),
            (None, true) => Err(StoreError::Unreadable("it is encrypted, and no key was given".to_owned())),
        }
    }
}
