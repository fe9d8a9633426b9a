//! From the record of a call to its spans, by OpenTelemetry's semantic conventions for HTTP and RPC.
//!
//! A call to the service is one SERVER span. A call of the service is an INTERNAL span with a CLIENT span for every
//! try. `docs/telemetry.md` lists all of it.

use std::{borrow::Cow, time::SystemTime};

use http::{
    HeaderName, HeaderValue, Method, Uri, Version,
    header::{HOST, USER_AGENT},
};
use opentelemetry::{
    InstrumentationScope, KeyValue, SpanId, TraceFlags, TraceId, Value,
    trace::{Event, Link, SpanContext, SpanKind, Status, TraceState},
};
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanLinks};
use opentelemetry_semantic_conventions::{
    SCHEMA_URL,
    attribute::{
        CLIENT_ADDRESS, ERROR_TYPE, HTTP_REQUEST_METHOD, HTTP_REQUEST_METHOD_ORIGINAL,
        HTTP_REQUEST_RESEND_COUNT, HTTP_RESPONSE_STATUS_CODE, NETWORK_PEER_ADDRESS, NETWORK_PEER_PORT,
        NETWORK_PROTOCOL_VERSION, SERVER_ADDRESS, SERVER_PORT, URL_FULL, URL_PATH, URL_SCHEME,
        USER_AGENT_ORIGINAL,
    },
};
use tokio::time::Instant;

use super::{
    propagation::{Context, Span},
    record::{End, Record, Try, Why},
};
use crate::resilience::classify::{Advice, Ending, GrpcStatus};

// Of the conventions, too, but not yet declared stable by the library.
const HTTP_REQUEST_BODY_SIZE: &str = "http.request.body.size";
const HTTP_RESPONSE_BODY_SIZE: &str = "http.response.body.size";
const RPC_SYSTEM_NAME: &str = "rpc.system.name";
const RPC_METHOD: &str = "rpc.method";
const RPC_RESPONSE_STATUS_CODE: &str = "rpc.response.status_code";

/// Who made these spans.
pub fn scope() -> InstrumentationScope {
    InstrumentationScope::builder(env!("CARGO_PKG_NAME"))
        .with_version(env!("CARGO_PKG_VERSION"))
        .with_schema_url(SCHEMA_URL)
        .build()
}

/// What was asked, as it is needed for a span only. Query strings are left out: they hold what nobody wants exported.
#[derive(Clone, Debug)]
pub struct Asked {
    uri: Uri,
    host: Option<HeaderValue>,
    agent: Option<HeaderValue>,
}

impl Asked {
    pub fn of<B>(request: &http::Request<B>) -> Self {
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

/// Says when an instant was by the system's clock.
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

/// Adds the spans of a call to `out`.
pub fn add(record: &Record, wall: &WallClock, scope: &InstrumentationScope, out: &mut Vec<SpanData>) {
    let spans = Spans { record, wall, scope };
    if record.is_inbound() {
        out.push(spans.server());
        return;
    }
    out.push(spans.call());
    out.extend(record.tries.iter().enumerate().map(|(number, one)| spans.client(number, one)));
}

struct Spans<'a> {
    record: &'a Record,
    wall: &'a WallClock,
    scope: &'a InstrumentationScope,
}

/// Attributes under way.
#[derive(Default)]
struct Attributes(Vec<KeyValue>);

impl Attributes {
    fn set(&mut self, key: &'static str, value: impl Into<Value>) {
        self.0.push(KeyValue::new(key, value.into()));
    }

    fn set_if(&mut self, key: &'static str, value: Option<impl Into<Value>>) {
        if let Some(value) = value {
            self.set(key, value);
        }
    }
}

impl Spans<'_> {
    /// Others call this service.
    fn server(&self) -> SpanData {
        let record = self.record;
        let mut attributes = self.common();
        self.address(&mut attributes);
        attributes.set_if(URL_PATH, self.path());
        attributes.set(URL_SCHEME, "http");
        attributes.set(CLIENT_ADDRESS, record.peer.ip().to_string());
        attributes.set(NETWORK_PEER_ADDRESS, record.peer.ip().to_string());
        attributes.set(NETWORK_PEER_PORT, i64::from(record.peer.port()));
        attributes.set(NETWORK_PROTOCOL_VERSION, protocol(record.version));
        attributes.set_if(USER_AGENT_ORIGINAL, record.asked.as_ref().and_then(Asked::agent));
        let status = self.finish(&mut attributes);
        let mut span = self.span(record.context.span, SpanKind::Server, attributes, status);
        span.events.events = self.events(true);
        span
    }

    /// The service calls others: all tries together.
    fn call(&self) -> SpanData {
        let record = self.record;
        let mut attributes = self.common();
        self.address(&mut attributes);
        attributes.set_if(URL_PATH, self.path());
        attributes.set("outrigger.way", record.way.word());
        attributes.set_if("outrigger.upstream", record.upstream().map(ToOwned::to_owned));
        attributes.set_if("outrigger.route", self.route());
        let status = self.finish(&mut attributes);
        let mut span = self.span(record.context.span, SpanKind::Internal, attributes, status);
        span.events.events = self.events(false);
        span
    }

    /// One try.
    fn client(&self, number: usize, one: &Try) -> SpanData {
        let record = self.record;
        let mut attributes = self.common();
        self.address(&mut attributes);
        if let (Some(authority), Some(asked)) = (self.authority(), &record.asked) {
            attributes.set(URL_FULL, format!("http://{authority}{}", asked.uri.path()));
        }
        attributes.set(NETWORK_PEER_ADDRESS, one.endpoint.ip().to_string());
        attributes.set(NETWORK_PEER_PORT, i64::from(one.endpoint.port()));
        attributes.set(NETWORK_PROTOCOL_VERSION, protocol(one.version));
        if number > 0 {
            attributes.set(HTTP_REQUEST_RESEND_COUNT, number as i64);
        }
        attributes.set("outrigger.try.why", one.why.word());
        if !one.waited.is_zero() {
            attributes.set("outrigger.try.backoff_ms", one.waited.as_secs_f64() * 1e3);
        }
        attributes.set("outrigger.connection.reused", one.connected.is_none() && one.reached());
        if one.trial {
            attributes.set("outrigger.breaker.trial", true);
        }
        let last = number + 1 == record.tries.made() as usize;
        // The status of a gRPC call that was answered is known at its end only.
        let grpc = match one.outcome.map(|outcome| outcome.ending) {
            Some(Ending::Grpc(status)) => Some(status),
            Some(Ending::Http(_)) if last => record.grpc_status,
            _ => None,
        };
        let status = match one.outcome {
            None => {
                attributes.set("outrigger.try.outcome", "cancelled");
                Status::Unset
            }
            Some(outcome) => {
                attributes.set("outrigger.try.outcome", outcome.label());
                attributes.set_if("outrigger.advice", outcome.advice().word());
                match (outcome.ending, grpc) {
                    (_, Some(grpc)) => rpc(grpc, false, &mut attributes),
                    (Ending::Http(status), None) => {
                        attributes.set(HTTP_RESPONSE_STATUS_CODE, i64::from(status.as_u16()));
                        error_if(
                            status.as_u16() >= 400,
                            || status.as_str().to_owned().into(),
                            &mut attributes,
                        )
                    }
                    (Ending::CallerGone | Ending::CallersDeadline, None) => Status::Unset,
                    _ => {
                        attributes.set(ERROR_TYPE, outcome.label());
                        Status::error(one.error.clone().unwrap_or_default())
                    }
                }
            }
        };
        let mut events = Vec::new();
        let mut event = |name: &'static str, at: Instant, attributes: Vec<KeyValue>| {
            events.push(Event::new(name, self.wall.at(at), attributes, 0));
        };
        if let Some(connected) = one.connected {
            event("connected", connected, Vec::new());
        }
        let head_at = one.ended.unwrap_or(one.began);
        if one.advice_no() {
            event("retry advised against", head_at, Vec::new());
        }
        if one.ejected {
            let endpoint = KeyValue::new("endpoint", one.endpoint.to_string());
            event("endpoint ejected", head_at, vec![endpoint]);
        }
        if let Some(state) = one.breaker {
            event("breaker changed", head_at, vec![KeyValue::new("state", state.word())]);
        }
        // The try whose answer was handed on lasts as long as the answer does.
        let answered = last
            && matches!(one.outcome.map(|outcome| outcome.ending), Some(Ending::Http(_) | Ending::Grpc(_)));
        let ended = if answered { record.ended } else { one.ended };
        let mut span = self.span(one.span, SpanKind::Client, attributes, status);
        span.parent_span_id = span_id(record.context.span);
        span.parent_span_is_remote = false;
        span.start_time = self.wall.at(one.began);
        span.end_time = self.wall.at(ended.or(record.ended).unwrap_or(one.began));
        span.events.events = events;
        span.links = SpanLinks::default();
        span
    }

    /// What every span of the call has.
    fn common(&self) -> Attributes {
        let record = self.record;
        let mut attributes = Attributes(Vec::with_capacity(20));
        attributes.set(HTTP_REQUEST_METHOD, known(&record.method).unwrap_or("_OTHER"));
        if known(&record.method).is_none() {
            attributes.set(HTTP_REQUEST_METHOD_ORIGINAL, record.method.as_str().to_owned());
        }
        if record.grpc {
            attributes.set(RPC_SYSTEM_NAME, "grpc");
            attributes.set_if(RPC_METHOD, self.rpc_method());
        }
        attributes
    }

    fn authority(&self) -> Option<&str> {
        self.record.asked.as_ref()?.authority()
    }

    fn path(&self) -> Option<String> {
        self.record.asked.as_ref().map(|asked| asked.uri.path().to_owned())
    }

    fn rpc_method(&self) -> Option<String> {
        let path = self.record.asked.as_ref()?.uri.path();
        path.strip_prefix('/').filter(|method| method.contains('/')).map(ToOwned::to_owned)
    }

    /// The pattern of the route that matched.
    fn route(&self) -> Option<String> {
        let route = self.record.matched.as_ref()?.cluster.settings.routes.get(self.record.route?)?;
        Some(route.matches.path.clone().unwrap_or_else(|| "*".to_owned()))
    }

    fn address(&self, attributes: &mut Attributes) {
        let Some(authority) = self.authority().and_then(|text| text.parse::<http::uri::Authority>().ok())
        else {
            return;
        };
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        attributes.set(SERVER_ADDRESS, host);
        attributes.set(SERVER_PORT, i64::from(authority.port_u16().unwrap_or(80)));
    }

    /// How the call ended, for the caller; returns what that means for the span.
    fn finish(&self, attributes: &mut Attributes) -> Status {
        let record = self.record;
        attributes.set_if(HTTP_RESPONSE_STATUS_CODE, record.status.map(|status| i64::from(status.as_u16())));
        attributes.set(HTTP_REQUEST_BODY_SIZE, size(record.bytes_in));
        attributes.set(HTTP_RESPONSE_BODY_SIZE, size(record.bytes_out));
        attributes.set("outrigger.tries", i64::from(record.tries.made()));
        attributes.set_if("outrigger.retry.stopped", record.stopped);
        attributes.set_if("outrigger.fallback", record.fell_back);
        if record.end != End::Complete {
            attributes.set("outrigger.end", record.end.word());
        }
        if let Some(refusal) = &record.refused {
            let word = refusal.cause.word();
            attributes.set("outrigger.cause", word);
            if refusal.cause.status().is_server_error() || !record.is_inbound() {
                attributes.set(ERROR_TYPE, word);
                return Status::error(refusal.detail.clone());
            }
            return Status::Unset;
        }
        match (record.end, record.grpc_status, record.status) {
            (End::CallerGone, ..) => Status::Unset,
            (End::Broken | End::Cut, ..) => {
                attributes.set(ERROR_TYPE, record.end.word());
                Status::error("")
            }
            (End::Complete, Some(grpc), _) => rpc(grpc, true, attributes),
            (End::Complete, None, Some(status)) => {
                error_if(status.is_server_error(), || status.as_str().to_owned().into(), attributes)
            }
            (End::Complete, None, None) => Status::Unset,
        }
    }

    /// What happened between tries. Where tries have no spans of their own, the failed ones, too.
    fn events(&self, tries: bool) -> Vec<Event> {
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

    fn span(&self, id: Span, kind: SpanKind, attributes: Attributes, status: Status) -> SpanData {
        let record = self.record;
        let context = &record.context;
        let mut links = SpanLinks::default();
        links.links.extend(context.link.map(|link| {
            let flags = TraceFlags::default().with_sampled(link.sampled);
            let linked = SpanContext::new(
                TraceId::from(link.trace.get()),
                span_id(link.span),
                flags,
                false,
                TraceState::default(),
            );
            Link::new(linked, vec![KeyValue::new("outrigger.link", "only inbound call in flight")], 0)
        }));
        SpanData {
            span_context: SpanContext::new(
                TraceId::from(context.trace.get()),
                span_id(id),
                flags(context),
                false,
                TraceState::default(),
            ),
            parent_span_id: context.parent.map_or(SpanId::INVALID, span_id),
            parent_span_is_remote: context.parent.is_some(),
            span_kind: kind,
            name: self.name(),
            start_time: self.wall.at(record.started),
            end_time: self.wall.at(record.ended.unwrap_or(record.started)),
            attributes: attributes.0,
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links,
            status,
            instrumentation_scope: self.scope.clone(),
        }
    }

    /// Of few different ones: no paths, but for gRPC, whose methods are few.
    fn name(&self) -> Cow<'static, str> {
        if let Some(method) = self.record.grpc.then(|| self.rpc_method()).flatten() {
            return method.into();
        }
        known(&self.record.method).unwrap_or("HTTP").into()
    }
}

impl Try {
    /// A connection was there.
    fn reached(&self) -> bool {
        !matches!(self.outcome.map(|outcome| outcome.ending), Some(Ending::Connect(_) | Ending::LocalRefusal))
    }

    fn advice_no(&self) -> bool {
        self.outcome.is_some_and(|outcome| outcome.advice() == Advice::No)
    }
}

fn flags(context: &Context) -> TraceFlags {
    let random = if context.random { 2 } else { 0 };
    TraceFlags::new(u8::from(context.sampled) | random)
}

fn span_id(span: Span) -> SpanId {
    SpanId::from(span.get())
}

fn size(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// The methods that the conventions know; all others are `_OTHER`.
fn known(method: &Method) -> Option<&'static str> {
    const KNOWN: [&str; 10] =
        ["GET", "POST", "PUT", "DELETE", "HEAD", "PATCH", "OPTIONS", "CONNECT", "TRACE", "QUERY"];
    KNOWN.into_iter().find(|known| *known == method.as_str())
}

const fn protocol(version: Version) -> &'static str {
    match version {
        Version::HTTP_10 => "1.0",
        Version::HTTP_2 => "2",
        _ => "1.1",
    }
}

/// The status tells it all, so the description stays empty.
fn error_if(failed: bool, what: impl FnOnce() -> Value, attributes: &mut Attributes) -> Status {
    if !failed {
        return Status::Unset;
    }
    attributes.set(ERROR_TYPE, what());
    Status::error("")
}

/// A server is not to blame for what the caller did wrong.
fn rpc(status: GrpcStatus, server: bool, attributes: &mut Attributes) -> Status {
    let name = status.name();
    attributes.set(RPC_RESPONSE_STATUS_CODE, name.clone());
    let failed = if server { status.is_failure() } else { status != GrpcStatus::Ok };
    error_if(failed, || name.into(), attributes)
}
