//! Copies of requests to another upstream, to try it with real traffic: which requests are copied, and how many at a time.
//!
//! Copies never delay, fail or retry the request that they are made of, and are the first to be dropped under load.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::units::{HumanDuration, Ratio};

/// `mirror` of a route; absent: none.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MirrorSettings {
    /// The upstream that gets the copies.
    pub upstream: String,
    /// Share of the requests that are copied.
    #[serde(default = "all")]
    pub ratio: Ratio,
    /// The methods of which requests are copied.
    #[serde(default = "reads")]
    pub methods: Vec<String>,
    /// Allows methods that change something: the other service does so too.
    #[serde(default, rename = "unsafe")]
    pub allows_unsafe: bool,
    /// The most copies under way; further ones are dropped.
    #[serde(default = "max_in_flight")]
    pub max_in_flight: u32,
    /// How long a copy may take.
    #[serde(default = "timeout")]
    pub timeout: HumanDuration,
    /// Copies carry the client's credentials.
    #[serde(default)]
    pub credentials: bool,
}

fn all() -> Ratio {
    Ratio::constant(1.0)
}

fn reads() -> Vec<String> {
    ["GET", "HEAD"].map(ToOwned::to_owned).into()
}

const fn max_in_flight() -> u32 {
    32
}

const fn timeout() -> HumanDuration {
    HumanDuration::from_secs(5)
}

/// What became of a request that was chosen to be copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyOutcome {
    /// The other upstream responded, whatever the status.
    Answered,
    /// It sent no response.
    Failed,
    /// `max_in_flight` copies were under way.
    Dropped,
    /// The body was larger than `retry.body_limit`.
    TooLarge,
    /// The client's body had not ended when the response was there.
    Incomplete,
}

impl CopyOutcome {
    pub const ALL: [Self; 5] =
        [Self::Answered, Self::Failed, Self::Dropped, Self::TooLarge, Self::Incomplete];

    pub const fn word(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::Failed => "failed",
            Self::Dropped => "dropped",
            Self::TooLarge => "too_large",
            Self::Incomplete => "incomplete",
        }
    }
}

/// Copies of one route: those under way, and what became of the others. All workers share it.
#[derive(Debug, Default)]
pub struct Copies {
    in_flight: AtomicU32,
    counts: [AtomicU64; CopyOutcome::ALL.len()],
}

impl Copies {
    /// Takes a place among `max` copies under way; [`Copies::end`] gives it back.
    pub fn begin(&self, max: u32) -> bool {
        let take = |in_flight: u32| (in_flight < max).then_some(in_flight + 1);
        self.in_flight.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }

    pub fn end(&self) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
    }

    pub fn count(&self, outcome: CopyOutcome) {
        self.counts[outcome as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    pub fn read(&self) -> impl Iterator<Item = (CopyOutcome, u64)> {
        CopyOutcome::ALL
            .into_iter()
            .map(|outcome| (outcome, self.counts[outcome as usize].load(Ordering::Relaxed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_copies_than_allowed_are_under_way() {
        let copies = Copies::default();
        assert!(copies.begin(2) && copies.begin(2));
        assert!(!copies.begin(2));
        copies.end();
        assert!(copies.begin(2));
        assert!(!copies.begin(0), "a lowered limit");
    }

    #[test]
    fn outcomes_are_counted_each_by_itself() {
        let copies = Copies::default();
        for (times, outcome) in CopyOutcome::ALL.into_iter().enumerate() {
            (0..times).for_each(|_| copies.count(outcome));
        }
        let read: Vec<_> = copies.read().collect();
        assert_eq!(read.iter().map(|(_, count)| *count).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
        assert_eq!(read.iter().map(|(outcome, _)| *outcome).collect::<Vec<_>>(), CopyOutcome::ALL);
    }
}
