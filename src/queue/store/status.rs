//! The state of the store, for everyone to read at any time.

use std::{path::PathBuf, sync::Arc, time::Duration};

use arc_swap::ArcSwap;

use super::counts::Counts;

/// As of the last commit.
#[derive(Clone, Debug, Default)]
pub struct StoreStatus {
    /// Why nothing can be stored now; `None` while all is well.
    pub failure: Option<StoreFailure>,
    /// Corrupt files that were renamed since the start. What they hold is not delivered: an operator has to look at them.
    pub set_aside: Vec<PathBuf>,
    pub counts: Counts,
    /// Bytes of the file that hold something.
    pub used_bytes: u64,
    pub commits: u64,
    /// Time that all commits have taken.
    pub commit_time: Duration,
}

/// Why nothing can be stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreFailure {
    /// The disk is full: what is stored is delivered, nothing is accepted.
    DiskFull,
    /// Reading or writing fails. The file is opened again from time to time.
    Io(String),
}

impl StoreStatus {
    /// Whether an operator has to act, or the disk has to recover: `/ready` fails.
    pub fn is_healthy(&self) -> bool {
        self.set_aside.is_empty() && !matches!(self.failure, Some(StoreFailure::Io(_)))
    }
}

/// The status, replaced as a whole.
#[derive(Clone, Debug, Default)]
pub(super) struct SharedStatus(Arc<ArcSwap<StoreStatus>>);

impl SharedStatus {
    pub(super) fn load(&self) -> Arc<StoreStatus> {
        self.0.load_full()
    }

    pub(super) fn store(&self, status: StoreStatus) {
        self.0.store(Arc::new(status));
    }
}
