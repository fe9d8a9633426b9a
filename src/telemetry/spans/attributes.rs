//! The attributes of spans, named by the semantic conventions.

use http::{Method, Version};
use opentelemetry::{KeyValue, Value, trace::Status};
use opentelemetry_semantic_conventions::attribute::{
    CLIENT_ADDRESS, ERROR_TYPE, HTTP_REQUEST_METHOD, HTTP_REQUEST_METHOD_ORIGINAL, HTTP_REQUEST_RESEND_COUNT,
    HTTP_RESPONSE_STATUS_CODE, NETWORK_PEER_ADDRESS, NETWORK_PEER_PORT, NETWORK_PROTOCOL_VERSION,
    SERVER_ADDRESS, SERVER_PORT, URL_FULL, URL_PATH, URL_SCHEME, USER_AGENT_ORIGINAL,
};

use super::{SpanRequest, Spans};
use crate::{
    resilience::classify::{GrpcStatus, OutcomeKind},
    telemetry::record::{AttemptRecord, CacheResult, RequestEnd},
};

// Also in the conventions, but not yet stable in the library.
const HTTP_REQUEST_BODY_SIZE: &str = "http.request.body.size";
const HTTP_RESPONSE_BODY_SIZE: &str = "http.response.body.size";
const RPC_SYSTEM_NAME: &str = "rpc.system.name";
const RPC_METHOD: &str = "rpc.method";
const RPC_RESPONSE_STATUS_CODE: &str = "rpc.response.status_code";

/// A list of attributes that is being built.
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

/// The attributes of a span, and its status.
pub type Content = (Vec<KeyValue>, Status);

impl Spans<'_> {
    /// For the SERVER span of an inbound request.
    pub fn server_attributes(&self) -> Content {
        let record = self.record;
        let mut attributes = self.common();
        self.address(record.tls, &mut attributes);
        attributes.set_if(URL_PATH, self.path());
        attributes.set(URL_SCHEME, scheme(record.tls));
        attributes.set(CLIENT_ADDRESS, record.peer.ip().to_string());
        attributes.set(NETWORK_PEER_ADDRESS, record.peer.ip().to_string());
        attributes.set(NETWORK_PEER_PORT, i64::from(record.peer.port()));
        attributes.set(NETWORK_PROTOCOL_VERSION, protocol(record.version));
        attributes.set_if(USER_AGENT_ORIGINAL, record.span_request.as_ref().and_then(SpanRequest::agent));
        attributes.set_if("outrigger.peer.identity", record.identity.as_ref().map(|peer| peer.to_string()));
        let status = self.finish(&mut attributes);
        (attributes.0, status)
    }

    /// For the INTERNAL span of an outbound request, all attempts together.
    pub fn request_attributes(&self) -> Content {
        let record = self.record;
        let mut attributes = self.common();
        self.address(record.tls, &mut attributes);
        attributes.set_if(URL_PATH, self.path());
        attributes.set("outrigger.way", record.entry_point.word());
        attributes.set_if("outrigger.upstream", record.upstream_name().map(ToOwned::to_owned));
        attributes.set_if("outrigger.route", self.route());
        let status = self.finish(&mut attributes);
        (attributes.0, status)
    }

    /// For the CLIENT span of one attempt.
    pub fn attempt_attributes(&self, number: usize, one: &AttemptRecord) -> Content {
        let mut attributes = self.common();
        self.address(one.tls, &mut attributes);
        if let (Some(authority), Some(asked)) = (self.authority(), &self.record.span_request) {
            attributes.set(URL_FULL, format!("{}://{authority}{}", scheme(one.tls), asked.uri.path()));
        }
        attributes.set(NETWORK_PEER_ADDRESS, one.endpoint.ip().to_string());
        attributes.set(NETWORK_PEER_PORT, i64::from(one.endpoint.port()));
        attributes.set(NETWORK_PROTOCOL_VERSION, protocol(one.version));
        if number > 0 {
            attributes.set(HTTP_REQUEST_RESEND_COUNT, number as i64);
        }
        attributes.set("outrigger.attempt.why", one.reason.word());
        if !one.delay.is_zero() {
            attributes.set("outrigger.attempt.backoff_ms", one.delay.as_secs_f64() * 1e3);
        }
        attributes.set("outrigger.connection.reused", one.had_connection && one.connected_at.is_none());
        if one.is_breaker_trial {
            attributes.set("outrigger.breaker.trial", true);
        }
        let status = self.outcome(self.is_last(number), one, &mut attributes);
        (attributes.0, status)
    }

    /// The outcome of an attempt. The gRPC status of a response is known only at its end, so it belongs to the last
    /// attempt.
    fn outcome(&self, last: bool, one: &AttemptRecord, attributes: &mut Attributes) -> Status {
        let Some(outcome) = one.outcome else {
            attributes.set("outrigger.attempt.outcome", "cancelled");
            return Status::Unset;
        };
        attributes.set("outrigger.attempt.outcome", outcome.label());
        attributes.set_if("outrigger.advice", outcome.advice().word());
        match (outcome.kind, self.record.grpc_status.filter(|_| last)) {
            (OutcomeKind::Grpc(status), _) | (OutcomeKind::Http(_), Some(status)) => {
                rpc(status, false, attributes)
            }
            (OutcomeKind::Http(status), None) => {
                attributes.set(HTTP_RESPONSE_STATUS_CODE, i64::from(status.as_u16()));
                error_if(status.as_u16() >= 400, || status.as_str().to_owned().into(), attributes)
            }
            (OutcomeKind::ClientGone | OutcomeKind::ClientDeadline, _) => Status::Unset,
            _ => {
                attributes.set(ERROR_TYPE, outcome.label());
                Status::error(one.error.clone().unwrap_or_default())
            }
        }
    }

    /// Attributes of every span of the request.
    fn common(&self) -> Attributes {
        let record = self.record;
        let mut attributes = Attributes(Vec::with_capacity(20));
        attributes.set(HTTP_REQUEST_METHOD, known_method(&record.method).unwrap_or("_OTHER"));
        if known_method(&record.method).is_none() {
            attributes.set(HTTP_REQUEST_METHOD_ORIGINAL, record.method.as_str().to_owned());
        }
        if record.grpc {
            attributes.set(RPC_SYSTEM_NAME, "grpc");
            attributes.set_if(RPC_METHOD, self.rpc_method());
        }
        attributes
    }

    fn path(&self) -> Option<String> {
        self.record.span_request.as_ref().map(|asked| asked.uri.path().to_owned())
    }

    /// The pattern of the route that matched.
    fn route(&self) -> Option<String> {
        let route = self.record.matched.as_ref()?.cluster.settings.routes.get(self.record.route?)?;
        Some(route.matches.path.clone().unwrap_or_else(|| "*".to_owned()))
    }

    /// The server that the client addressed. `tls` decides the default port.
    fn address(&self, tls: bool, attributes: &mut Attributes) {
        let Some(authority) = self.authority().and_then(|text| text.parse::<http::uri::Authority>().ok())
        else {
            return;
        };
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        attributes.set(SERVER_ADDRESS, host);
        let default = if tls { 443 } else { 80 };
        attributes.set(SERVER_PORT, i64::from(authority.port_u16().unwrap_or(default)));
    }

    /// How the request ended for the client; returns the span's status.
    fn finish(&self, attributes: &mut Attributes) -> Status {
        let record = self.record;
        attributes.set_if(HTTP_RESPONSE_STATUS_CODE, record.status.map(|status| i64::from(status.as_u16())));
        attributes.set(HTTP_REQUEST_BODY_SIZE, size(record.bytes_in));
        attributes.set(HTTP_RESPONSE_BODY_SIZE, size(record.bytes_out));
        attributes.set("outrigger.attempts", i64::from(record.attempts.count()));
        attributes.set_if("outrigger.retry.stopped", record.retry_stopped);
        attributes.set_if("outrigger.fallback", record.fallback_cause());
        attributes.set_if("outrigger.cache", record.cache.map(CacheResult::word));
        attributes.set_if("outrigger.stale", record.stale_cause());
        if record.end != RequestEnd::Complete {
            attributes.set("outrigger.end", record.end.word());
        }
        if let Some(refusal) = &record.local_response {
            let word = refusal.cause.word();
            attributes.set("outrigger.cause", word);
            if refusal.cause.status().is_server_error() || !record.is_inbound() {
                attributes.set(ERROR_TYPE, word);
                return Status::error(refusal.detail.clone());
            }
            return Status::Unset;
        }
        match (record.end, record.grpc_status, record.status) {
            (RequestEnd::ClientGone, ..) => Status::Unset,
            (RequestEnd::Broken | RequestEnd::Cut, ..) => {
                attributes.set(ERROR_TYPE, record.end.word());
                Status::error("")
            }
            (RequestEnd::Complete, Some(grpc), _) => rpc(grpc, true, attributes),
            (RequestEnd::Complete, None, Some(status)) => {
                error_if(status.is_server_error(), || status.as_str().to_owned().into(), attributes)
            }
            (RequestEnd::Complete, None, None) => Status::Unset,
        }
    }
}

const fn scheme(tls: bool) -> &'static str {
    if tls { "https" } else { "http" }
}

fn size(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// The methods of the conventions; all others are `_OTHER`.
pub fn known_method(method: &Method) -> Option<&'static str> {
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

/// The status code says everything, so the description stays empty.
fn error_if(failed: bool, what: impl FnOnce() -> Value, attributes: &mut Attributes) -> Status {
    if !failed {
        return Status::Unset;
    }
    attributes.set(ERROR_TYPE, what());
    Status::error("")
}

/// A SERVER span is not an error where the client caused the status.
fn rpc(status: GrpcStatus, server: bool, attributes: &mut Attributes) -> Status {
    let name = status.name();
    attributes.set(RPC_RESPONSE_STATUS_CODE, name.clone());
    let failed = if server { status.is_failure() } else { status != GrpcStatus::Ok };
    error_if(failed, || name.into(), attributes)
}
