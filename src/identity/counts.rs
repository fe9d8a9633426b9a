//! Counters of TLS handshakes.

use std::sync::atomic::{AtomicU64, Ordering};

use super::handshake::FailureKind;

/// TLS handshakes by direction and outcome.
#[derive(Debug, Default)]
pub struct Handshakes {
    pub inbound: HandshakeCounts,
    pub outbound: HandshakeCounts,
    /// Plaintext connections rejected where TLS is required.
    pub plaintext_refused: AtomicU64,
}

/// The handshakes of one direction.
#[derive(Debug, Default)]
pub struct HandshakeCounts {
    full: AtomicU64,
    resumed: AtomicU64,
    failed: [AtomicU64; FailureKind::ALL.len()],
}

impl HandshakeCounts {
    pub fn record_success(&self, resumed: bool) {
        if resumed { &self.resumed } else { &self.full }.fetch_add(1, Ordering::Relaxed);
    }

    pub fn record_failure(&self, kind: FailureKind) {
        self.failed[kind as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// The label of each outcome and its count.
    pub fn read(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let failed = FailureKind::ALL.into_iter().map(|kind| (kind.word(), &self.failed[kind as usize]));
        let done = [("full", &self.full), ("resumed", &self.resumed)];
        done.into_iter().chain(failed).map(|(word, count)| (word, count.load(Ordering::Relaxed)))
    }
}
