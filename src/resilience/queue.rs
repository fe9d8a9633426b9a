//! Queues of durable deliveries: what happens to a delivery after an attempt, and which one is next.
//!
//! A delivery is one stored request. Only an attempt that reached the service counts against `attempts`: while the service
//! is away its queue is paused, and nothing is spent.

pub mod keys;
mod lane;
pub mod policy;
pub mod scheduler;
#[cfg(test)]
mod scheduler_tests;
pub mod settings;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use crate::{delivery_id::DeliveryId, unix_time::UnixMillis};

/// A delivery that may be attempted, as the scheduler holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DueDelivery {
    pub id: DeliveryId,
    /// Its place in the order of acceptance.
    pub seq: i64,
    /// Not before.
    pub next: UnixMillis,
    /// Accepted or replayed: `expires` counts from here.
    pub since: UnixMillis,
    /// That reached the service.
    pub attempts: u32,
    /// Deliveries with the same one go one at a time.
    pub order_key: Option<Arc<str>>,
}

/// Why a delivery is a dead letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeadReason {
    /// The service's response says that another attempt is useless.
    Permanent,
    /// All attempts failed.
    Attempts,
    /// It was not delivered within `expires`.
    Expired,
    /// It may have been processed, and the queue must not send twice (`ambiguous = "dead"`).
    Ambiguous,
    /// What is stored cannot be read, its client may no longer send it, or its upstream is not configured any more.
    Poison,
    /// An operator dropped it.
    Operator,
}

impl DeadReason {
    pub const ALL: [Self; 6] =
        [Self::Permanent, Self::Attempts, Self::Expired, Self::Ambiguous, Self::Poison, Self::Operator];

    /// The stable word, in status, metrics and the store.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Permanent => "permanent",
            Self::Attempts => "attempts",
            Self::Expired => "expired",
            Self::Ambiguous => "ambiguous",
            Self::Poison => "poison",
            Self::Operator => "operator",
        }
    }

    /// Whether the attempt that ended the delivery reached the service.
    pub const fn spends_attempt(self) -> bool {
        matches!(self, Self::Permanent | Self::Attempts | Self::Ambiguous)
    }

    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.word() == word)
    }
}

/// What an attempt means for its delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Done,
    Dead(DeadReason),
    /// The attempt is spent; the next one is not before `until`.
    Wait {
        until: UnixMillis,
    },
    /// The attempt never reached the service: the delivery stays as it was.
    Release,
}
