//! What happened while a call was under way, as the events of its spans.

use opentelemetry::{KeyValue, trace::Event};
use tokio::time::Instant;

use super::Spans;
use crate::{
    resilience::{classify::Advice, retry::AttemptKind},
    telemetry::record::Try,
};

impl Spans<'_> {
    /// What happened between tries. Where tries have no spans of their own, the failed ones, too.
    pub fn events(&self, tries: bool) -> Vec<Event> {
        let record = self.record;
        let mut events = Vec::new();
        let mut event = |name: &'static str, at: Instant, attributes: Vec<KeyValue>| {
            events.push(Event::new(name, self.wall.at(at), attributes, 0));
        };
        let mut before: Option<&Try> = None;
        for one in record.tries.iter() {
            if let (Some(before), AttemptKind::Retry | AttemptKind::Reconnect) = (before, one.why) {
                let attributes = vec![
                    KeyValue::new("why", one.why.word()),
                    KeyValue::new("outcome", before.outcome.map_or("cancelled", |outcome| outcome.label())),
                    KeyValue::new("backoff_ms", one.waited.as_secs_f64() * 1e3),
                ];
                event("retry", before.ended.unwrap_or(one.began), attributes);
            }
            if tries && let Some(error) = &one.error {
                let attributes = vec![
                    KeyValue::new("endpoint", one.endpoint.to_string()),
                    KeyValue::new("detail", error.clone()),
                ];
                event("try failed", one.ended.unwrap_or(one.began), attributes);
            }
            before = Some(one);
        }
        let over = record.answered.or(record.ended).unwrap_or(record.started);
        if let Some(stopped) = record.stopped {
            event("no further try", over, vec![KeyValue::new("reason", stopped)]);
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

    /// What a try met, and what the guards made of it.
    pub fn events_of_try(&self, one: &Try) -> Vec<Event> {
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
