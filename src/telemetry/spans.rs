//! Makes the spans of a request from its record, by OpenTelemetry's semantic conventions for HTTP and RPC.
//!
//! An inbound request is one SERVER span. An outbound request is an INTERNAL span with a CLIENT span for every attempt.
//! `docs/telemetry.md` lists attributes and events.

mod attributes;
mod events;

use std::{borrow::Cow, time::SystemTime};

use http::{
    HeaderName, HeaderValue, Uri,
    header::{HOST, USER_AGENT},
};
use opentelemetry::{
    InstrumentationScope, KeyValue, TraceFlags,
    trace::{Link, SpanContext, SpanKind, TraceState},
};
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanLinks};
use opentelemetry_semantic_conventions::SCHEMA_URL;
use tokio::time::Instant;

use super::record::{AttemptRecord, RequestRecord};
use crate::{
    resilience::classify::OutcomeKind,
    trace_context::{SpanId, TraceContext},
};

/// The instrumentation scope of all spans: this crate.
pub fn scope() -> InstrumentationScope {
    InstrumentationScope::builder(env!("CARGO_PKG_NAME"))
        .with_version(env!("CARGO_PKG_VERSION"))
        .with_schema_url(SCHEMA_URL)
        .build()
}

/// Parts of the request head that only spans need. Spans omit the query string, which may hold secrets.
#[derive(Clone, Debug)]
pub struct SpanRequest {
    uri: Uri,
    host: Option<HeaderValue>,
    agent: Option<HeaderValue>,
}

impl SpanRequest {
    pub fn from_request<B>(request: &http::Request<B>) -> Self {
        let headers = request.headers();
        let field = |name: HeaderName| headers.get(name).cloned();
        Self { uri: request.uri().clone(), host: field(HOST), agent: field(USER_AGENT) }
    }

    fn agent(&self) -> Option<String> {
        self.agent.as_ref().and_then(|agent| agent.to_str().ok()).map(ToOwned::to_owned)
    }

    fn authority(&self) -> Option<&str> {
        match self.uri.authority() {
            Some(authority) => Some(authority.as_str()),
            None => self.host.as_ref().and_then(|host| host.to_str().ok()),
        }
    }
}

/// Converts instants to the system's clock.
#[derive(Clone, Copy, Debug)]
pub struct WallClock {
    now: SystemTime,
    instant: Instant,
}

impl WallClock {
    pub fn now() -> Self {
        Self { now: SystemTime::now(), instant: Instant::now() }
    }

    fn at(&self, instant: Instant) -> SystemTime {
        self.now.checked_sub(self.instant.saturating_duration_since(instant)).unwrap_or(self.now)
    }
}

/// Appends the spans of a request to `out`.
pub fn append_spans(
    record: &RequestRecord,
    wall: &WallClock,
    scope: &InstrumentationScope,
    out: &mut Vec<SpanData>,
) {
    let spans = Spans { record, wall, scope };
    if record.is_inbound() {
        out.push(spans.server());
        return;
    }
    out.push(spans.request());
    out.extend(record.attempts.iter().enumerate().map(|(number, one)| spans.client(number, one)));
}

struct Spans<'a> {
    record: &'a RequestRecord,
    wall: &'a WallClock,
    scope: &'a InstrumentationScope,
}

impl Spans<'_> {
    fn server(&self) -> SpanData {
        let mut span = self.span(self.record.context.span, SpanKind::Server, self.server_attributes());
        span.events.events = self.events(true);
        span
    }

    fn request(&self) -> SpanData {
        let mut span = self.span(self.record.context.span, SpanKind::Internal, self.request_attributes());
        span.events.events = self.events(false);
        span
    }

    fn client(&self, number: usize, one: &AttemptRecord) -> SpanData {
        let record = self.record;
        // The span of the attempt whose response was forwarded lasts to the end of that response.
        let forwarded = self.is_last(number)
            && matches!(
                one.outcome.map(|outcome| outcome.kind),
                Some(OutcomeKind::Http(_) | OutcomeKind::Grpc(_))
            );
        let ended = if forwarded { record.ended_at } else { one.ended_at };
        let mut span = self.span(one.span, SpanKind::Client, self.attempt_attributes(number, one));
        span.parent_span_id = span_id(record.context.span);
        span.parent_span_is_remote = false;
        span.start_time = self.wall.at(one.started_at);
        span.end_time = self.wall.at(ended.or(record.ended_at).unwrap_or(one.started_at));
        span.events.events = self.attempt_events(one);
        span.links = SpanLinks::default();
        span
    }

    fn is_last(&self, number: usize) -> bool {
        number + 1 == self.record.attempts.count() as usize
    }

    fn authority(&self) -> Option<&str> {
        self.record.span_request.as_ref()?.authority()
    }

    fn rpc_method(&self) -> Option<String> {
        let path = self.record.span_request.as_ref()?.uri.path();
        path.strip_prefix('/').filter(|method| method.contains('/')).map(ToOwned::to_owned)
    }

    fn span(&self, id: SpanId, kind: SpanKind, (attributes, status): attributes::Content) -> SpanData {
        let record = self.record;
        let context = &record.context;
        let mut links = SpanLinks::default();
        links.links.extend(context.link.map(|link| {
            let flags = TraceFlags::default().with_sampled(link.sampled);
            let linked = SpanContext::new(
                opentelemetry::TraceId::from(link.trace.get()),
                span_id(link.span),
                flags,
                false,
                TraceState::default(),
            );
            Link::new(linked, vec![KeyValue::new("outrigger.link", "only inbound request in flight")], 0)
        }));
        SpanData {
            span_context: SpanContext::new(
                opentelemetry::TraceId::from(context.trace.get()),
                span_id(id),
                flags(context),
                false,
                TraceState::default(),
            ),
            parent_span_id: context.parent.map_or(opentelemetry::SpanId::INVALID, span_id),
            parent_span_is_remote: context.parent.is_some(),
            span_kind: kind,
            name: self.name(),
            start_time: self.wall.at(record.started_at),
            end_time: self.wall.at(record.ended_at.unwrap_or(record.started_at)),
            attributes,
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links,
            status,
            instrumentation_scope: self.scope.clone(),
        }
    }

    /// Low cardinality: the method without the path, except for gRPC, whose paths are methods.
    fn name(&self) -> Cow<'static, str> {
        if let Some(method) = self.record.grpc.then(|| self.rpc_method()).flatten() {
            return method.into();
        }
        attributes::known_method(&self.record.method).unwrap_or("HTTP").into()
    }
}

fn flags(context: &TraceContext) -> TraceFlags {
    let random = if context.random { 2 } else { 0 };
    TraceFlags::new(u8::from(context.sampled) | random)
}

fn span_id(span: SpanId) -> opentelemetry::SpanId {
    opentelemetry::SpanId::from(span.get())
}
