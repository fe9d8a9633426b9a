//! The states of a delivery.

use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, ToSql, ToSqlOutput, ValueRef};

/// What is stored of a delivery's state. That it is being delivered is known only to the process that does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeliveryState {
    Queued,
    /// For its next attempt.
    Waiting,
    Done,
    Dead,
    Cancelled,
}

impl DeliveryState {
    /// In the order of their numbers in the store.
    pub const ALL: [Self; 5] = [Self::Queued, Self::Waiting, Self::Done, Self::Dead, Self::Cancelled];

    /// The stable word, in status, metrics and on the command line.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Waiting => "waiting",
            Self::Done => "done",
            Self::Dead => "dead",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether it is still to be delivered.
    pub const fn is_pending(self) -> bool {
        matches!(self, Self::Queued | Self::Waiting)
    }
}

impl ToSql for DeliveryState {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok((*self as i64).into())
    }
}

impl FromSql for DeliveryState {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        let number = value.as_i64()?;
        let state = usize::try_from(number).ok().and_then(|number| Self::ALL.get(number));
        state.copied().ok_or(FromSqlError::OutOfRange(number))
    }
}
