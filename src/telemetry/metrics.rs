//! Counters that the data path holds by handle and `/metrics` reads.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use tokio::sync::Notify;

/// Everything that is counted.
#[derive(Debug, Default)]
pub struct Metrics {
    pub inbound: Connections,
    pub outbound: Connections,
}

/// The callers' connections of one direction.
#[derive(Debug, Default)]
pub struct Connections {
    pub open: AtomicI64,
    pub total: AtomicU64,
    all_closed: Notify,
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

    /// Waits until none is open.
    pub async fn closed(&self) {
        loop {
            let closed = self.all_closed.notified();
            if self.open.load(Ordering::Acquire) <= 0 {
                return;
            }
            closed.await;
        }
    }
}

impl Drop for OpenConnection<'_> {
    fn drop(&mut self) {
        if self.0.open.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.all_closed.notify_waiters();
        }
    }
}
