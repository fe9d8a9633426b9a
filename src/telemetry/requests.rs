//! `GET /requests`: the last failed, retried and slow requests, with every decision of the proxy.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::{
    record::{Record, Try},
    timestamp::Timestamp,
    verdict::Kind,
};

/// How many requests of each verdict are kept. Per verdict, so that failures do not displace slow ones.
pub const KEPT: usize = 64;

/// The kept requests. Each list has a lock, taken briefly and only by requests that did not simply succeed.
#[derive(Debug, Default)]
pub struct Requests {
    failed: Mutex<VecDeque<Arc<Record>>>,
    retried: Mutex<VecDeque<Arc<Record>>>,
    slow: Mutex<VecDeque<Arc<Record>>>,
}

impl Requests {
    /// Keeps a request; drops the oldest of its verdict where the list is full.
    pub fn keep(&self, kind: Kind, record: Arc<Record>) {
        let Some(ring) = self.ring(kind) else { return };
        let mut ring = ring.lock().unwrap_or_else(PoisonError::into_inner);
        let oldest = if ring.len() >= KEPT { ring.pop_front() } else { None };
        ring.push_back(record);
        drop(ring);
        // Outside the lock.
        drop(oldest);
    }

    fn ring(&self, kind: Kind) -> Option<&Mutex<VecDeque<Arc<Record>>>> {
        match kind {
            Kind::Plain => None,
            Kind::Failed => Some(&self.failed),
            Kind::Retried => Some(&self.retried),
            Kind::Slow => Some(&self.slow),
        }
    }

    /// All that are kept, the latest end first.
    pub fn read(&self) -> Vec<Arc<Record>> {
        let mut all: Vec<Arc<Record>> = [&self.failed, &self.retried, &self.slow]
            .iter()
            .flat_map(|ring| ring.lock().unwrap_or_else(PoisonError::into_inner).clone())
            .collect();
        all.sort_by_key(|record| std::cmp::Reverse(record.ended));
        all
    }
}

/// A request as `GET /requests` reports it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Told {
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
    pub attempts: Vec<ToldTry>,
}

/// An attempt. Times count from the start of the request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ToldTry {
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

impl Told {
    pub fn of(record: &Record) -> Self {
        let ms = |at: Instant| milliseconds(at, record.started);
        let ended = record.ended.unwrap_or(record.started);
        Self {
            kind: record.kind().word().to_owned(),
            time: Timestamp::of(record.started).to_string(),
            ended_seconds_ago: ended.elapsed().as_secs(),
            direction: record.direction().to_owned(),
            way: record.way.word().to_owned(),
            method: record.method.to_string(),
            status: record.status.map(|status| status.as_u16()),
            grpc_status: record.grpc_status.map(|status| status.label().to_owned()),
            trace_id: record.context.trace.to_string(),
            span_id: record.context.span.to_string(),
            sampled: record.context.sampled,
            peer: record.caller(),
            upstream: record.upstream().map(ToOwned::to_owned),
            route: record.route_name(),
            reason: record.reason().map(ToOwned::to_owned),
            why: record.why(),
            answered_ms: record.answered.map(ms),
            duration_ms: ms(ended),
            bytes_in: record.bytes_in,
            bytes_out: record.bytes_out,
            end: record.end.word().to_owned(),
            stopped: record.stopped.map(ToOwned::to_owned),
            fell_back: record.fell_back.map(ToOwned::to_owned),
            attempts_made: record.tries.made(),
            attempts: record.tries.iter().map(|one| ToldTry::of(one, record.started)).collect(),
        }
    }
}

impl ToldTry {
    fn of(one: &Try, started: Instant) -> Self {
        let ms = |at: Instant| milliseconds(at, started);
        Self {
            what: one.why.word().to_owned(),
            endpoint: one.endpoint.to_string(),
            began_ms: ms(one.began),
            waited_ms: milliseconds(started + one.waited, started),
            connected_ms: one.connected.map(ms),
            ended_ms: one.ended.map(ms),
            outcome: one.outcome.map(|outcome| outcome.label().to_owned()),
            error: one.error.clone(),
            trial: one.trial,
            breaker: one.breaker.map(|state| state.word().to_owned()),
            ejected: one.ejected,
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
        let requests = Requests::default();
        requests.keep(Kind::Slow, Arc::new(record(200)));
        for _ in 0..KEPT + 10 {
            requests.keep(Kind::Failed, Arc::new(record(503)));
        }
        requests.keep(Kind::Plain, Arc::new(record(200)));
        let all = requests.read();
        assert_eq!(all.len(), KEPT + 1, "failures do not displace a slow request");
        assert!(all.is_sorted_by_key(|record| std::cmp::Reverse(record.ended)));
    }
}
