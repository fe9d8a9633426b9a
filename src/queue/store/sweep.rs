//! What time does to deliveries: they expire, and what has ended is deleted.

use std::time::Duration;

use rusqlite::params;

use super::{batch::Batch, error::StoreError, state::DeliveryState};
use crate::{
    queue::DeliveryId,
    resilience::queue::{
        DeadReason, Verdict,
        settings::{Retention, WhenFull},
    },
};

/// Rows that one sweep touches at most in each state: the commits of accepted requests do not wait long for it.
const SWEEP_LIMIT: u64 = 500;

/// What a sweep did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Now dead letters: the scheduler forgets them.
    pub expired: Vec<DeliveryId>,
    /// Ended deliveries whose time was over.
    pub deleted: u64,
    /// Dead letters that were deleted to make space for others (`when_full = "drop-oldest"`).
    pub dropped: u64,
    /// There is more to do: sweep again soon.
    pub more: bool,
}

/// What a sweep of one queue needs to know.
#[derive(Clone, Debug)]
pub struct Sweep {
    pub queue: String,
    /// `None`: they do not expire.
    pub expires: Option<Duration>,
    pub retention: Retention,
    /// Under way: they do not expire now.
    pub in_flight: Vec<DeliveryId>,
}

impl Batch<'_> {
    pub(super) fn sweep(&mut self, sweep: &Sweep) -> Result<Swept, StoreError> {
        let mut swept = Swept::default();
        for id in self.overdue(sweep)? {
            if !sweep.in_flight.contains(&id) {
                self.settle(id, Verdict::Dead(DeadReason::Expired), None)?;
                swept.expired.push(id);
            }
        }
        let Retention { keep_done, dead } = &sweep.retention;
        for (state, keep) in [
            (DeliveryState::Done, keep_done),
            (DeliveryState::Cancelled, keep_done),
            (DeliveryState::Dead, &dead.keep),
        ] {
            let before = self.now.before(keep.0).0;
            swept.deleted += self.delete_ended(&sweep.queue, state, before, SWEEP_LIMIT)?;
        }
        let count = self.counts.of(&sweep.queue).messages(DeliveryState::Dead);
        if dead.when_full == WhenFull::DropOldest && count > dead.max {
            let excess = (count - dead.max).min(SWEEP_LIMIT);
            swept.dropped = self.delete_ended(&sweep.queue, DeliveryState::Dead, i64::MAX as u64, excess)?;
        }
        let most = (swept.expired.len() as u64).max(swept.deleted).max(swept.dropped);
        swept.more = most >= SWEEP_LIMIT;
        Ok(swept)
    }

    fn overdue(&self, sweep: &Sweep) -> Result<Vec<DeliveryId>, StoreError> {
        let Some(expires) = sweep.expires else { return Ok(Vec::new()) };
        let mut statement = self.database.connection.prepare_cached(
            "SELECT id FROM delivery WHERE queue = ?1 AND state < 2 AND since < ?2 ORDER BY since LIMIT ?3",
        )?;
        let limit = SWEEP_LIMIT + sweep.in_flight.len() as u64;
        let rows = statement.query_map(params![sweep.queue, self.now.before(expires).0, limit], |row| {
            Ok(DeliveryId::from_bytes(row.get(0)?))
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// Deletes the ones that ended first.
    fn delete_ended(
        &mut self,
        queue: &str,
        state: DeliveryState,
        before: u64,
        limit: u64,
    ) -> Result<u64, StoreError> {
        let mut statement = self.database.connection.prepare_cached(
            "SELECT seq, bytes FROM delivery WHERE queue = ?1 AND state = ?2 AND ended < ?3 ORDER BY ended LIMIT ?4",
        )?;
        let rows: Vec<(i64, u64)> = statement
            .query_map(params![queue, state, before, limit], |row| Ok((row.get(0)?, row.get(1)?)))?
            .collect::<Result<_, _>>()?;
        for (seq, bytes) in &rows {
            self.delete(*seq)?;
            self.counts.remove(queue, state, *bytes);
        }
        Ok(rows.len() as u64)
    }
}
