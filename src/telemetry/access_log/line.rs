//! A line of the access log.

use std::borrow::Cow;

use serde::Serialize;

use crate::telemetry::{
    record::{CacheResult, RequestRecord, format_address},
    requests::milliseconds,
    timestamp::Timestamp,
};

/// Capacity that is enough for most lines, in bytes.
const TYPICAL_LENGTH: usize = 512;

/// The fields, in order. No path and no query: they may hold personal data; the trace has the path.
#[derive(Serialize)]
struct AccessLogLine<'a> {
    time: String,
    direction: &'a str,
    method: &'a str,
    status: Option<u16>,
    trace_id: String,
    peer: String,
    upstream: Option<&'a str>,
    endpoint: Option<String>,
    route: Option<String>,
    attempts: u32,
    reason: Option<Cow<'static, str>>,
    why: Option<String>,
    bytes_in: u64,
    bytes_out: u64,
    duration_ms: f64,
    /// Of a route with a cache: where the response came from.
    #[serde(skip_serializing_if = "Option::is_none")]
    cache: Option<&'static str>,
    /// Of a request that was queued, and of its attempts.
    #[serde(skip_serializing_if = "Option::is_none")]
    delivery: Option<String>,
}

/// Appends the line of a request, with a newline.
pub fn write(out: &mut Vec<u8>, record: &RequestRecord) {
    let line = AccessLogLine {
        time: Timestamp::of(record.started_at).to_string(),
        direction: record.direction(),
        method: record.method.as_str(),
        status: record.status.map(|status| status.as_u16()),
        trace_id: record.context.trace.to_string(),
        peer: record.client(),
        upstream: record.upstream_name(),
        endpoint: record.endpoint().map(format_address),
        route: record.route_name(),
        attempts: record.attempts.count(),
        reason: record.reason(),
        why: record.explanation(),
        bytes_in: record.bytes_in,
        bytes_out: record.bytes_out,
        duration_ms: milliseconds(record.ended_at.unwrap_or(record.started_at), record.started_at),
        cache: record.cache.map(CacheResult::word),
        delivery: record.delivery.as_ref().map(ToString::to_string),
    };
    let before = out.len();
    out.reserve(TYPICAL_LENGTH);
    match serde_json::to_writer(&mut *out, &line) {
        Ok(()) => out.push(b'\n'),
        // Drop the partial line.
        Err(_) => out.truncate(before),
    }
}
