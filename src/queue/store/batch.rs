//! What one transaction does: the changes of many callers, committed by one sync.
//!
//! A change that returns an error has written nothing, unless the error is the database's: then the whole batch is rolled
//! back.

use rusqlite::{OptionalExtension, params};

use super::{
    cipher::Part, counts::Counts, database::Database, error::StoreError, query::PAUSED, state::DeliveryState,
};
use crate::{
    queue::{DeliveryId, StoredRequest},
    resilience::queue::{DeadReason, DueDelivery, Verdict, settings::QueueLimits},
    unix_time::UnixMillis,
};

/// Bytes that a delivery takes in the database beside its request, estimated.
const OVERHEAD: u64 = 512;

/// A request to be kept.
#[derive(Clone, Debug)]
pub struct NewDelivery {
    pub queue: String,
    pub limits: QueueLimits,
    /// Of the client: only it may read the result or cancel.
    pub identity: String,
    /// The client's `Idempotency-Key`.
    pub idempotency_key: Option<String>,
    /// Deliveries of the queue with the same one are delivered one at a time, in the order in which they were accepted.
    pub order_key: Option<String>,
    pub request: StoredRequest,
    pub body: bytes::Bytes,
}

/// A delivery that is on the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Accepted {
    pub id: DeliveryId,
    /// For the scheduler; `None` if the request was accepted before (same key, same request), or waits for another one of
    /// its order.
    pub due: Option<DueDelivery>,
    /// Whether an earlier delivery has the same `Idempotency-Key` and request: `id` is that one's.
    pub repeated: bool,
}

/// The response of the last attempt, or why there was none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    pub status: Option<u16>,
    /// The stable word of the failure.
    pub cause: Option<String>,
    /// The response's head, as HTTP/1 writes it.
    pub head: Vec<u8>,
    pub body: Vec<u8>,
    /// Whether the body was longer than what is kept.
    pub truncated: bool,
}

/// An open transaction.
pub struct Batch<'a> {
    pub(super) database: &'a Database,
    /// As they are if this is committed.
    pub(super) counts: Counts,
    pub(super) now: UnixMillis,
    /// Bytes that may still be accepted.
    pub(super) space: u64,
}

/// The row of a delivery that a change needs.
struct Row {
    seq: i64,
    queue: String,
    identity: String,
    order_key: Option<String>,
    state: DeliveryState,
    attempts: u32,
    bytes: u64,
}

impl Batch<'_> {
    /// `random`: an ID with random bytes, which gets the code of this store.
    pub(super) fn accept(&mut self, random: DeliveryId, new: &NewDelivery) -> Result<Accepted, StoreError> {
        let id = self.database.ids.issue(random, &new.identity);
        let fingerprint = new.idempotency_key.as_ref().map(|_| new.request.fingerprint(&new.body));
        if let (Some(key), Some(fingerprint)) = (&new.idempotency_key, &fingerprint)
            && let Some((earlier, same)) = self.earlier(new, key, fingerprint)?
        {
            let accepted = Accepted { id: earlier, due: None, repeated: true };
            return if same { Ok(accepted) } else { Err(StoreError::KeyReused(earlier)) };
        }
        let head = new.request.encode();
        let bytes = (head.len() + new.body.len()) as u64;
        self.check_limits(new, bytes)?;
        self.space = self.space.saturating_sub(bytes + OVERHEAD);
        let next = match &new.order_key {
            Some(key) if self.has_pending(&new.queue, key)? => None,
            _ => Some(self.now),
        };
        let now = self.now.0 as i64;
        self.database.connection
            .prepare_cached(
                "INSERT INTO delivery (id, queue, identity, idempotency_key, fingerprint, order_key, state, attempts,
                                       accepted, since, next, scheduled, bytes)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, 0, 0, ?7, ?7, ?8, ?7, ?9)",
            )?
            .execute(params![
                id.to_bytes(),
                new.queue,
                new.identity,
                new.idempotency_key,
                fingerprint,
                new.order_key,
                now,
                next.map(|next| next.0),
                bytes,
            ])?;
        let seq = self.database.connection.last_insert_rowid();
        let (head, body) =
            (self.seal(id, Part::RequestHead, &head)?, self.seal(id, Part::RequestBody, &new.body)?);
        self.database
            .connection
            .prepare_cached("INSERT INTO content VALUES (?1, ?2, ?3, ?4)")?
            .execute(params![seq, self.database.cipher.is_some(), head.as_ref(), body.as_ref()])?;
        self.counts.add(&new.queue, DeliveryState::Queued, bytes);
        let due = next.map(|next| DueDelivery {
            id,
            seq,
            next,
            since: self.now,
            attempts: 0,
            order_key: new.order_key.as_deref().map(Into::into),
        });
        Ok(Accepted { id, due, repeated: false })
    }

    /// The delivery with this key, and whether its request was the same.
    fn earlier(
        &self,
        new: &NewDelivery,
        key: &str,
        fingerprint: &[u8; 32],
    ) -> Result<Option<(DeliveryId, bool)>, StoreError> {
        let mut statement = self.database.connection.prepare_cached(
            "SELECT id, fingerprint FROM delivery WHERE queue = ?1 AND identity = ?2 AND idempotency_key = ?3",
        )?;
        let row = statement.query_row(params![new.queue, new.identity, key], |row| {
            Ok((DeliveryId::from_bytes(row.get(0)?), row.get::<_, [u8; 32]>(1)? == *fingerprint))
        });
        Ok(row.optional()?)
    }

    fn check_limits(&self, new: &NewDelivery, bytes: u64) -> Result<(), StoreError> {
        let (counts, limits) = (self.counts.of(&new.queue), &new.limits);
        if counts.pending() >= limits.max_messages
            || counts.pending_bytes + bytes > limits.max_bytes.0
            || limits.max_dead.is_some_and(|max| counts.messages(DeliveryState::Dead) >= max)
        {
            return Err(StoreError::QueueFull);
        }
        if bytes + OVERHEAD > self.space { Err(StoreError::Full) } else { Ok(()) }
    }

    fn has_pending(&self, queue: &str, order_key: &str) -> Result<bool, StoreError> {
        let mut statement = self
            .database
            .connection
            .prepare_cached("SELECT 1 FROM delivery WHERE queue = ?1 AND order_key = ?2 AND state < 2")?;
        Ok(statement.exists([queue, order_key])?)
    }

    /// Notes that an attempt begins which must not be repeated after a crash. False: one has begun before, and what became
    /// of it is not known.
    pub(super) fn start(&mut self, id: DeliveryId) -> Result<bool, StoreError> {
        let row = self.pending_row(id)?;
        let mut statement = self
            .database
            .connection
            .prepare_cached("UPDATE delivery SET started = ?2 WHERE seq = ?1 AND started IS NULL")?;
        Ok(statement.execute(params![row.seq, self.now.0])? > 0)
    }

    /// Writes what an attempt means. Returns the next delivery of the same order, which may go now.
    pub(super) fn settle(
        &mut self,
        id: DeliveryId,
        verdict: Verdict,
        outcome: Option<&Outcome>,
    ) -> Result<Option<DueDelivery>, StoreError> {
        let row = self.pending_row(id)?;
        match verdict {
            Verdict::Done => {
                self.store_outcome(id, row.seq, outcome)?;
                self.end(&row, DeliveryState::Done, None, row.attempts + 1)
            }
            Verdict::Dead(reason) => {
                self.store_outcome(id, row.seq, outcome)?;
                let attempts = row.attempts + u32::from(reason.spends_attempt());
                self.end(&row, DeliveryState::Dead, Some(reason), attempts)
            }
            Verdict::Wait { until } => {
                self.store_outcome(id, row.seq, outcome)?;
                self.counts.remove(&row.queue, row.state, row.bytes);
                self.counts.add(&row.queue, DeliveryState::Waiting, row.bytes);
                self.database.connection
                    .prepare_cached(
                        "UPDATE delivery SET state = 1, attempts = attempts + 1, next = ?2, scheduled = ?3, started = NULL
                         WHERE seq = ?1",
                    )?
                    .execute(params![row.seq, until.0, self.now.0])?;
                Ok(None)
            }
            Verdict::Release => {
                self.database
                    .connection
                    .prepare_cached(
                        "UPDATE delivery SET started = NULL WHERE seq = ?1 AND started IS NOT NULL",
                    )?
                    .execute([row.seq])?;
                Ok(None)
            }
        }
    }

    pub(super) fn cancel(
        &mut self,
        id: DeliveryId,
        identity: &str,
    ) -> Result<Option<DueDelivery>, StoreError> {
        let row = self.row(id)?.filter(|row| row.identity == identity).ok_or(StoreError::NotFound)?;
        if !row.state.is_pending() {
            return Err(StoreError::WrongState(row.state.word()));
        }
        self.end(&row, DeliveryState::Cancelled, None, row.attempts)
    }

    /// Makes a dead letter a queued delivery again, with all its attempts before it. `at`: not before.
    pub(super) fn replay(&mut self, id: DeliveryId, at: UnixMillis) -> Result<(), StoreError> {
        let row = self.row(id)?.ok_or(StoreError::NotFound)?;
        if row.state != DeliveryState::Dead {
            return Err(StoreError::WrongState(row.state.word()));
        }
        let next = match &row.order_key {
            Some(key) if self.has_pending(&row.queue, key)? => None,
            _ => Some(at.0),
        };
        self.database.connection
            .prepare_cached(
                "UPDATE delivery SET state = 0, reason = NULL, attempts = 0, since = ?2, next = ?3, scheduled = ?4,
                                     ended = NULL
                 WHERE seq = ?1",
            )?
            .execute(params![row.seq, at.0, next, self.now.0])?;
        self.counts.remove(&row.queue, row.state, row.bytes);
        self.counts.add(&row.queue, DeliveryState::Queued, row.bytes);
        Ok(())
    }

    /// An operator's. It is kept in the file, so that a restart does not undo it.
    pub(super) fn set_paused(&self, queue: &str, is_paused: bool) -> Result<(), StoreError> {
        let name = format!("{PAUSED}{queue}");
        let connection = &self.database.connection;
        if is_paused {
            let since = self.now.0.to_be_bytes();
            let insert = "INSERT INTO meta VALUES (?1, ?2) ON CONFLICT DO NOTHING";
            connection.prepare_cached(insert)?.execute(params![name, since])?;
        } else {
            connection.prepare_cached("DELETE FROM meta WHERE name = ?1")?.execute([name])?;
        }
        Ok(())
    }

    /// An operator's: what is pending becomes a dead letter, everything else is deleted.
    pub(super) fn drop_delivery(&mut self, id: DeliveryId) -> Result<DeliveryState, StoreError> {
        let row = self.row(id)?.ok_or(StoreError::NotFound)?;
        if row.state.is_pending() {
            self.end(&row, DeliveryState::Dead, Some(DeadReason::Operator), row.attempts)?;
        } else {
            self.delete(row.seq)?;
            self.counts.remove(&row.queue, row.state, row.bytes);
        }
        Ok(row.state)
    }

    pub(super) fn delete(&self, seq: i64) -> Result<(), StoreError> {
        for statement in [
            "DELETE FROM delivery WHERE seq = ?1",
            "DELETE FROM content WHERE seq = ?1",
            "DELETE FROM outcome WHERE seq = ?1",
        ] {
            self.database.connection.prepare_cached(statement)?.execute([seq])?;
        }
        Ok(())
    }

    /// Ends a pending delivery, and makes the next of its order due.
    fn end(
        &mut self,
        row: &Row,
        state: DeliveryState,
        reason: Option<DeadReason>,
        attempts: u32,
    ) -> Result<Option<DueDelivery>, StoreError> {
        self.database.connection
            .prepare_cached(
                "UPDATE delivery SET state = ?2, reason = ?3, attempts = ?4, next = NULL, started = NULL, ended = ?5
                 WHERE seq = ?1",
            )?
            .execute(params![row.seq, state, reason.map(DeadReason::word), attempts, self.now.0])?;
        self.counts.remove(&row.queue, row.state, row.bytes);
        self.counts.add(&row.queue, state, row.bytes);
        match &row.order_key {
            Some(key) => self.promote(&row.queue, key),
            None => Ok(None),
        }
    }

    /// Makes the first delivery of the order due, unless another one of it is.
    fn promote(&self, queue: &str, order_key: &str) -> Result<Option<DueDelivery>, StoreError> {
        let mut due = self.database.connection.prepare_cached(
            "SELECT 1 FROM delivery WHERE queue = ?1 AND order_key = ?2 AND next >= 0 AND state < 2",
        )?;
        if due.exists([queue, order_key])? {
            return Ok(None);
        }
        let mut first = self.database.connection.prepare_cached(
            "SELECT id, seq, since, attempts FROM delivery
             WHERE queue = ?1 AND order_key = ?2 AND next IS NULL AND state < 2 ORDER BY seq LIMIT 1",
        )?;
        let due = first.query_row([queue, order_key], |row| {
            Ok(DueDelivery {
                id: DeliveryId::from_bytes(row.get(0)?),
                seq: row.get(1)?,
                next: self.now,
                since: UnixMillis(row.get(2)?),
                attempts: row.get(3)?,
                order_key: Some(order_key.into()),
            })
        });
        let Some(due) = due.optional()? else { return Ok(None) };
        self.database
            .connection
            .prepare_cached("UPDATE delivery SET next = ?2, scheduled = ?2 WHERE seq = ?1")?
            .execute(params![due.seq, self.now.0])?;
        Ok(Some(due))
    }

    fn store_outcome(&self, id: DeliveryId, seq: i64, outcome: Option<&Outcome>) -> Result<(), StoreError> {
        let Some(outcome) = outcome else { return Ok(()) };
        let (head, body) = (
            self.seal(id, Part::ResponseHead, &outcome.head)?,
            self.seal(id, Part::ResponseBody, &outcome.body)?,
        );
        self.database
            .connection
            .prepare_cached("INSERT OR REPLACE INTO outcome VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)")?
            .execute(params![
                seq,
                self.now.0,
                outcome.status,
                outcome.cause,
                self.database.cipher.is_some(),
                head.as_ref(),
                body.as_ref(),
                outcome.truncated,
            ])?;
        Ok(())
    }

    fn seal<'a>(
        &self,
        id: DeliveryId,
        part: Part,
        plain: &'a [u8],
    ) -> Result<std::borrow::Cow<'a, [u8]>, StoreError> {
        match &self.database.cipher {
            Some(cipher) => Ok(cipher.seal(id, part, plain)?.into()),
            None => Ok(plain.into()),
        }
    }

    fn pending_row(&self, id: DeliveryId) -> Result<Row, StoreError> {
        match self.row(id)? {
            Some(row) if row.state.is_pending() => Ok(row),
            Some(row) => Err(StoreError::WrongState(row.state.word())),
            None => Err(StoreError::NotFound),
        }
    }

    fn row(&self, id: DeliveryId) -> Result<Option<Row>, StoreError> {
        let mut statement = self.database.connection.prepare_cached(
            "SELECT seq, queue, identity, order_key, state, attempts, bytes FROM delivery WHERE id = ?1",
        )?;
        let row = statement.query_row([id.to_bytes()], |row| {
            Ok(Row {
                seq: row.get(0)?,
                queue: row.get(1)?,
                identity: row.get(2)?,
                order_key: row.get(3)?,
                state: row.get(4)?,
                attempts: row.get(5)?,
                bytes: row.get(6)?,
            })
        });
        Ok(row.optional()?)
    }
}
