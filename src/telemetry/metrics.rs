//! Counters that the data path holds by handle and `/metrics` reads.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

/// Everything that is counted.
#[derive(Debug, Default)]
pub struct Metrics {
    pub inbound: Connections,
    pub outbound: Connections,
}

/// The connections of one direction.
#[derive(Debug, Default)]
pub struct Connections {
    pub open: AtomicI64,
    pub total: AtomicU64,
}

/// Counts one connection as open until it is dropped.
#[derive(Debug)]
pub struct OpenConnection<'a>(&'a Connections);

impl Connections {
    pub fn opened(&self) -> OpenConnection<'_> {
        self.open.fetch_add(1, Ordering::Relaxed);
        self.total.fetch_add(1, Ordering::Relaxed);
        OpenConnection(self)
    }
}

impl Drop for OpenConnection<'_> {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}
