//! `GET /requests`: the last failed, retried and slow requests, with every decision of the proxy.

use std::{
    borrow::Cow,
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::{
    record::{AttemptRecord, RequestRecord},
    timestamp::Timestamp,
    verdict::Verdict,
};

/// How many requests of each verdict are kept. Per verdict, so that failures do not displace slow ones.
pub const MAX_PER_VERDICT: usize = 64;

/// The kept requests. Each list has a lock, taken briefly and only by requests that did not simply succeed.
#[derive(Debug, Default)]
pub struct RecentRequests {
    failed: Mutex<VecDeque<Arc<RequestRecord>>>,
    retried: Mutex<VecDeque<Arc<RequestRecord>>>,
    slow: Mutex<VecDeque<Arc<RequestRecord>>>,
}

impl RecentRequests {
    /// Keeps a request; drops the oldest of its verdict where the list is full.
    pub fn keep(&self, kind: Verdict, record: Arc<RequestRecord>) {
        let Some(ring) = self.ring(kind) else { return };
        let mut ring = ring.lock().unwrap_or_else(PoisonError::into_inner);
        let oldest = if ring.len() >= MAX_PER_VERDICT { ring.pop_front() } else { None };
        ring.push_back(record);
        drop(ring);
        // Outside the lock.
        drop(oldest);
    }

    fn ring(&self, kind: Verdict) -> Option<&Mutex<VecDeque<Arc<RequestRecord>>>> {
        match kind {
            Verdict::Plain => None,
            Verdict::Failed => Some(&self.failed),
            Verdict::Retried => Some(&self.retried),
            Verdict::Slow => Some(&self.slow),
        }
    }

    /// All that are kept, the latest end first.
    pub fn read(&self) -> Vec<Arc<RequestRecord>> {
        let mut all: Vec<Arc<RequestRecord>> = [&self.failed, &self.retried, &self.slow]
            .iter()
            .flat_map(|ring| ring.lock().unwrap_or_else(PoisonError::into_inner).clone())
            .collect();
        all.sort_by_key(|record| std::cmp::Reverse(record.ended_at));
        all
    }
}

/// A request as `GET /requests` reports it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RequestReport {
    /// `failed`, `retried` or `slow`.
    pub kind: String,
    /// When it started (RFC 3339).
    pub time: String,
    pub ended_seconds_ago: u64,
    /// `inbound` or `outbound`.
    pub direction: String,
    /// Entry point: `inbound`, `proxy`, `host`, `redirect`, `listen`.
    pub way: String,
    pub method: String,
    /// None: no response.
    pub status: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grpc_status: Option<String>,
    pub trace_id: String,
    pub span_id: String,
    pub sampled: bool,
    pub peer: String,
    pub upstream: Option<String>,
    pub route: Option<String>,
    pub reason: Option<String>,
    pub why: Option<String>,
    /// Until the response head was sent.
    pub answered_ms: Option<f64>,
    pub duration_ms: f64,
    pub bytes_in: u64,
    pub bytes_out: u64,
    /// How it ended: `complete`, `caller_gone`, `broken`, `cut`.
    pub end: String,
    /// Why no further attempt followed: an `outcome` of `outrigger_retries_total`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stopped: Option<String>,
    /// The cause that a fallback replaced.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fell_back: Option<String>,
    /// All that were made; `attempts` lists the first of them.
    pub attempts_made: u32,
    pub attempts: Vec<AttemptReport>,
}

/// An attempt. Times count from the start of the request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttemptReport {
    /// `first`, `retry`, `reconnect`, `sibling`, `hedge` or `fallback`.
    pub what: String,
    pub endpoint: String,
    pub began_ms: f64,
    /// The back-off before it.
    pub waited_ms: f64,
    /// When a new connection was established; none where a pooled one was used, or connecting failed.
    pub connected_ms: Option<f64>,
    /// None: it was cancelled.
    pub ended_ms: Option<f64>,
    pub outcome: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// It was a trial of the half-open breaker.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub trial: bool,
    /// The state that it changed the breaker to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub breaker: Option<String>,
    /// Its outcome ejected the endpoint.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ejected: bool,
}

impl RequestReport {
    pub fn from_record(record: &RequestRecord) -> Self {
        let ms = |at: Instant| milliseconds(at, record.started_at);
        let ended = record.ended_at.unwrap_or(record.started_at);
        Self {
            kind: record.verdict().word().to_owned(),
            time: Timestamp::of(record.started_at).to_string(),
            ended_seconds_ago: ended.elapsed().as_secs(),
            direction: record.direction().to_owned(),
            way: record.entry_point.word().to_owned(),
            method: record.method.to_string(),
            status: record.status.map(|status| status.as_u16()),
            grpc_status: record.grpc_status.map(|status| status.label().to_owned()),
            trace_id: record.context.trace.to_string(),
            span_id: record.context.span.to_string(),
            sampled: record.context.sampled,
            peer: record.client(),
            upstream: record.upstream_name().map(ToOwned::to_owned),
            route: record.route_name(),
            reason: record.reason().map(Cow::into_owned),
            why: record.explanation(),
            answered_ms: record.response_head_at.map(ms),
            duration_ms: ms(ended),
            bytes_in: record.bytes_in,
            bytes_out: record.bytes_out,
            end: record.end.word().to_owned(),
            stopped: record.retry_stopped.map(ToOwned::to_owned),
            fell_back: record.fallback_cause().map(ToOwned::to_owned),
            attempts_made: record.attempts.count(),
            attempts: record
                .attempts
                .iter()
                .map(|one| AttemptReport::from_record(one, record.started_at))
                .collect(),
        }
    }
}

impl AttemptReport {
    fn from_record(one: &AttemptRecord, started: Instant) -> Self {
        let ms = |at: Instant| milliseconds(at, started);
        Self {
            what: one.reason.word().to_owned(),
            endpoint: one.endpoint.to_string(),
            began_ms: ms(one.started_at),
            waited_ms: milliseconds(started + one.delay, started),
            connected_ms: one.connected_at.map(ms),
            ended_ms: one.ended_at.map(ms),
            outcome: one.outcome.map(|outcome| outcome.label().to_owned()),
            error: one.error.clone(),
            trial: one.is_breaker_trial,
            breaker: one.breaker_change.map(|state| state.word().to_owned()),
            ejected: one.ejected_endpoint,
        }
    }
}

/// Milliseconds from `from` to `at`, to the microsecond.
pub fn milliseconds(at: Instant, from: Instant) -> f64 {
    at.saturating_duration_since(from).as_micros() as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::{super::verdict::tests::record, *};

    #[test]
    fn the_last_of_each_verdict_are_kept() {
        let requests = RecentRequests::default();
        requests.keep(Verdict::Slow, Arc::new(record(200)));
        for _ in 0..MAX_PER_VERDICT + 10 {
            requests.keep(Verdict::Failed, Arc::new(record(503)));
        }
        requests.keep(Verdict::Plain, Arc::new(record(200)));
        let all = requests.read();
        assert_eq!(all.len(), MAX_PER_VERDICT + 1, "failures do not displace a slow request");
        assert!(all.is_sorted_by_key(|record| std::cmp::Reverse(record.ended_at)));
    }
}
