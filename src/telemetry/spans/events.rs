//! The events of spans.

use opentelemetry::{KeyValue, trace::Event};
use tokio::time::Instant;

use super::Spans;
use crate::{
    resilience::classify::Advice,
    telemetry::record::{Try, Why},
};

impl Spans<'_> {
    /// Retries, fallback and local responses; `attempts`: failed attempts too, where they have no spans of their own.
    pub fn events(&self, attempts: bool) -> Vec<Event> {
        let record = self.record;
        let mut events = Vec::new();
        let mut event = |name: &'static str, at: Instant, attributes: Vec<KeyValue>| {
            events.push(Event::new(name, self.wall.at(at), attributes, 0));
        };
        let mut before: Option<&Try> = None;
        for one in record.tries.iter() {
            if let (Some(before), Why::Retry | Why::Reconnect) = (before, one.why) {
                let attributes = vec![
                    KeyValue::new("why", one.why.word()),
                    KeyValue::new("outcome", before.outcome.map_or("cancelled", |outcome| outcome.label())),
                    KeyValue::new("backoff_ms", one.waited.as_secs_f64() * 1e3),
                ];
                event("retry", before.ended.unwrap_or(one.began), attributes);
            }
            if attempts && let Some(error) = &one.error {
                let attributes = vec![
                    KeyValue::new("endpoint", one.endpoint.to_string()),
                    KeyValue::new("detail", error.clone()),
                ];
                event("attempt failed", one.ended.unwrap_or(one.began), attributes);
            }
            before = Some(one);
        }
        let over = record.answered.or(record.ended).unwrap_or(record.started);
        if let Some(stopped) = record.stopped {
            event("no further attempt", over, vec![KeyValue::new("reason", stopped)]);
        }
        if let Some(refusal) = &record.refused {
            let attributes = vec![
                KeyValue::new("cause", refusal.cause.word()),
                KeyValue::new("detail", refusal.detail.clone()),
            ];
            event("answered by the proxy", over, attributes);
        }
        if let Some(why) = record.fell_back {
            event("fallback", over, vec![KeyValue::new("why", why)]);
        }
        events
    }

    /// The events of an attempt: its connection, and its effect on breaker and outlier detection.
    pub fn attempt_events(&self, one: &Try) -> Vec<Event> {
        let mut events = Vec::new();
        let mut event = |name: &'static str, at: Instant, attributes: Vec<KeyValue>| {
            events.push(Event::new(name, self.wall.at(at), attributes, 0));
        };
        if let Some(connected) = one.connected {
            event("connected", connected, Vec::new());
        }
        let head_at = one.ended.unwrap_or(one.began);
        if one.outcome.is_some_and(|outcome| outcome.advice() == Advice::No) {
            event("retry advised against", head_at, Vec::new());
        }
        if one.ejected {
            let endpoint = KeyValue::new("endpoint", one.endpoint.to_string());
            event("endpoint ejected", head_at, vec![endpoint]);
        }
        if let Some(state) = one.breaker {
            event("breaker changed", head_at, vec![KeyValue::new("state", state.word())]);
        }
        events
    }
}
