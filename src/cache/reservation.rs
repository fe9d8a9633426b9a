//! Memory of the store that is promised to a body on its way, and to clients that still read it.

use std::sync::Arc;

use super::Store;

/// Given back when it is dropped.
#[derive(Debug)]
pub struct Reservation {
    store: Arc<Store>,
    bytes: u64,
}

impl Reservation {
    pub const fn new(store: Arc<Store>) -> Self {
        Self { store, bytes: 0 }
    }

    /// Reserves this many bytes in all; false: there are not so many left.
    pub fn grow(&mut self, to: u64) -> bool {
        let more = to.saturating_sub(self.bytes);
        let fits = more == 0 || self.store.reserve(more);
        if fits {
            self.bytes += more;
        }
        fits
    }

    /// Gives back what exceeds this many bytes.
    pub fn shrink(&mut self, to: u64) {
        let less = self.bytes.saturating_sub(to);
        self.store.release(less);
        self.bytes -= less;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.store.release(self.bytes);
    }
}
