//! The events of spans.

use opentelemetry::{KeyValue, trace::Event};
use tokio::time::Instant;

use super::Spans;
use crate::{
    resilience::{classify::RetryAdvice, retry::AttemptKind},
    telemetry::record::AttemptRecord,
};

impl Spans<'_> {
    /// Retries, fallback and local responses; `attempts`: failed attempts too, where they have no spans of their own.
    pub fn events(&self, attempts: bool) -> Vec<Event> {
        let record = self.record;
        let mut events = Vec::new();
        let mut event = |name: &'static str, at: Instant, attributes: Vec<KeyValue>| {
            events.push(Event::new(name, self.wall.at(at), attributes, 0));
        };
        let mut before: Option<&AttemptRecord> = None;
        for one in record.attempts.iter() {
            if let (Some(before), AttemptKind::Retry | AttemptKind::Reconnect) = (before, one.reason) {
                let attributes = vec![
                    KeyValue::new("why", one.reason.word()),
                    KeyValue::new("outcome", before.outcome.map_or("cancelled", |outcome| outcome.label())),
                    KeyValue::new("backoff_ms", one.delay.as_secs_f64() * 1e3),
                ];
                event("retry", before.ended_at.unwrap_or(one.started_at), attributes);
            }
            if attempts && let Some(error) = &one.error {
                let attributes = vec![
                    KeyValue::new("endpoint", one.endpoint.to_string()),
                    KeyValue::new("detail", error.clone()),
                ];
                event("attempt failed", one.ended_at.unwrap_or(one.started_at), attributes);
            }
            before = Some(one);
        }
        let over = record.response_head_at.or(record.ended_at).unwrap_or(record.started_at);
        if let Some(stopped) = record.retry_stopped {
            event("no further attempt", over, vec![KeyValue::new("reason", stopped)]);
        }
        if let Some(refusal) = &record.local_response {
            let attributes = vec![
                KeyValue::new("cause", refusal.cause.word()),
                KeyValue::new("detail", refusal.detail.clone()),
            ];
            event("answered by the proxy", over, attributes);
        }
        if let Some(why) = record.fallback_cause() {
            event("fallback", over, vec![KeyValue::new("why", why)]);
        }
        if let Some(why) = record.stale_cause() {
            event("stale response", over, vec![KeyValue::new("why", why)]);
        }
        events
    }

    /// The events of an attempt: its connection, and its effect on breaker and outlier detection.
    pub fn attempt_events(&self, one: &AttemptRecord) -> Vec<Event> {
        let mut events = Vec::new();
        let mut event = |name: &'static str, at: Instant, attributes: Vec<KeyValue>| {
            events.push(Event::new(name, self.wall.at(at), attributes, 0));
        };
        if let Some(connected) = one.connected_at {
            event("connected", connected, Vec::new());
        }
        let head_at = one.ended_at.unwrap_or(one.started_at);
        if one.outcome.is_some_and(|outcome| outcome.advice() == RetryAdvice::No) {
            event("retry advised against", head_at, Vec::new());
        }
        if one.ejected_endpoint {
            let endpoint = KeyValue::new("endpoint", one.endpoint.to_string());
            event("endpoint ejected", head_at, vec![endpoint]);
        }
        if let Some(state) = one.breaker_change {
            event("breaker changed", head_at, vec![KeyValue::new("state", state.word())]);
        }
        events
    }
}
