//! The attempts of a request, as they are recorded.

use std::{net::SocketAddr, time::Duration};

use http::Version;
use tokio::time::Instant;

use crate::{
    resilience::{breaker::BreakerState, classify::AttemptOutcome, retry::AttemptKind},
    trace_context::SpanId,
};

/// Attempts of a request that are recorded one by one; further ones are only counted.
const MAX_RECORDED_ATTEMPTS: usize = 16;

/// One attempt of a request.
#[derive(Clone, Debug)]
pub struct AttemptRecord {
    pub reason: AttemptKind,
    pub span: SpanId,
    pub endpoint: SocketAddr,
    /// HTTP version towards the endpoint.
    pub version: Version,
    /// Sent over TLS.
    pub tls: bool,
    pub started_at: Instant,
    /// How long it was delayed: the back-off, and the wait for an upstream of which no endpoint accepted a connection.
    pub delay: Duration,
    /// A connection was available, pooled or new.
    pub had_connection: bool,
    /// When a new connection was established; none where a pooled one was used.
    pub connected_at: Option<Instant>,
    /// When its response head arrived, or it failed. None: it was cancelled, because the client closed or another
    /// copy won.
    pub ended_at: Option<Instant>,
    pub outcome: Option<AttemptOutcome>,
    /// Why it has no response, as a sentence.
    pub error: Option<String>,
    /// It was a trial of the half-open breaker.
    pub is_breaker_trial: bool,
    /// The state that its outcome changed the breaker to.
    pub breaker_change: Option<BreakerState>,
    /// Its outcome ejected the endpoint.
    pub ejected_endpoint: bool,
}

/// The attempts of a request. The first is stored inline: most requests have no other.
#[derive(Debug, Default)]
pub struct AttemptRecords {
    first: Option<AttemptRecord>,
    more: Vec<AttemptRecord>,
    /// All attempts, recorded or not.
    count: u32,
}

impl AttemptRecords {
    /// Adds one; returns the index for [`Self::get_mut`].
    pub fn push(&mut self, new: AttemptRecord) -> usize {
        let number = self.count as usize;
        self.count = self.count.saturating_add(1);
        if self.first.is_none() {
            self.first = Some(new);
        } else if number < MAX_RECORDED_ATTEMPTS {
            self.more.push(new);
        }
        number
    }

    pub fn get_mut(&mut self, number: usize) -> Option<&mut AttemptRecord> {
        match number.checked_sub(1) {
            None => self.first.as_mut(),
            Some(index) => self.more.get_mut(index),
        }
    }

    /// How many were made, recorded or not.
    pub const fn count(&self) -> u32 {
        self.count
    }

    pub fn iter(&self) -> impl Iterator<Item = &AttemptRecord> {
        self.first.iter().chain(&self.more)
    }

    /// The last one that is recorded.
    pub fn last(&self) -> Option<&AttemptRecord> {
        self.more.last().or(self.first.as_ref())
    }
}

impl AttemptRecord {
    pub fn new(
        why: AttemptKind,
        span: SpanId,
        endpoint: SocketAddr,
        version: Version,
        began: Instant,
    ) -> Self {
        Self {
            reason: why,
            span,
            endpoint,
            version,
            tls: false,
            started_at: began,
            delay: Duration::ZERO,
            had_connection: false,
            connected_at: None,
            ended_at: None,
            outcome: None,
            error: None,
            is_breaker_trial: false,
            breaker_change: None,
            ejected_endpoint: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_are_recorded_up_to_a_bound_and_counted_beyond() {
        let mut attempts = AttemptRecords::default();
        assert!(attempts.last().is_none() && attempts.get_mut(0).is_none());
        let (began, span) = (Instant::now(), SpanId::new(1).unwrap());
        for port in 0..100 {
            let endpoint = SocketAddr::from(([127, 0, 0, 1], port));
            let number = attempts.push(AttemptRecord::new(
                AttemptKind::Retry,
                span,
                endpoint,
                Version::HTTP_11,
                began,
            ));
            assert_eq!(number, usize::from(port));
            assert_eq!(attempts.get_mut(number).map(|one| one.endpoint.port()), (port < 16).then_some(port));
        }
        assert_eq!((attempts.count(), attempts.iter().count()), (100, MAX_RECORDED_ATTEMPTS));
        assert_eq!(attempts.last().map(|one| one.endpoint.port()), Some(15));
    }
}
