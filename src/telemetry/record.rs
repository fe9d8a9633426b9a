//! The record of one request: small, of fixed size, filled in while the request is served.
//!
//! It is part of the request's [`Progress`](crate::proxy::progress::Progress), which every stage of the data path can
//! reach, so a successful request allocates nothing for it. Spans, metrics, access log and `/requests` are all made of
//! it, in `record_request` of `src/proxy/finish.rs`.

mod attempts;

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use http::{HeaderMap, Method, StatusCode, Version};
use tokio::time::Instant;

pub use self::attempts::{AttemptRecord, AttemptRecords};
use super::{metrics::EntryPoint, spans::SpanRequest};
use crate::{
    cause::Cause, delivery_id::DeliveryId, durations::SeriesKey, identity::Peer, model::Destination,
    resilience::classify::GrpcStatus, trace_context::TraceContext,
};

/// A request, from its head to the last byte of its response.
#[derive(Debug)]
pub struct RequestRecord {
    pub entry_point: EntryPoint,
    /// The client's address.
    pub peer: SocketAddr,
    /// The client's connection is TLS.
    pub tls: bool,
    /// The verified identity of the client's certificate.
    pub identity: Option<Arc<Peer>>,
    pub method: Method,
    /// HTTP version of the client's request.
    pub version: Version,
    pub grpc: bool,
    /// Its trace context.
    pub context: TraceContext,
    /// Parts of the request head that only spans need; none where no spans are made.
    pub span_request: Option<SpanRequest>,
    /// The upstream whose routes were matched. None: the request was refused before.
    pub matched: Option<Arc<Destination>>,
    /// Index in `matched`'s routes.
    pub route: Option<usize>,
    /// The upstream that attempts went to: the same, unless a route's `to` or a fallback names another one.
    pub served_by: Option<Arc<Destination>>,
    pub attempts: AttemptRecords,
    /// Why no further attempt followed a failure: an `outcome` of `outrigger_retries_total`.
    pub retry_stopped: Option<&'static str>,
    /// Failures and attempts in the breaker's window, as of the last attempt that failed.
    pub breaker_window: Option<(u32, u32)>,
    /// Set where the proxy responded in place of the service.
    pub local_response: Option<LocalResponse>,
    /// The cause of the failure that the configured fallback replaced, or a stale response.
    pub replaced_cause: Option<&'static str>,
    /// Where the response came from, on a route with a cache.
    pub cache: Option<CacheResult>,
    /// The delivery that it was accepted as, or is an attempt of. Boxed: few requests have one.
    pub delivery: Option<Box<DeliveryId>>,
    /// The status that the client got.
    pub status: Option<StatusCode>,
    /// The status of a gRPC request, from headers or trailers.
    pub grpc_status: Option<GrpcStatus>,
    pub started_at: Instant,
    /// When the response head was sent to the client.
    pub response_head_at: Option<Instant>,
    /// When the last byte of the response was sent, or the request was cut off.
    pub ended_at: Option<Instant>,
    pub end: RequestEnd,
    /// Bytes of the request body.
    pub bytes_in: u64,
    /// Bytes of the response body.
    pub bytes_out: u64,
}

/// Where the response of a request came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheResult {
    /// The store, fresh.
    Hit,
    /// The upstream.
    Miss,
    /// The store, stale.
    Stale,
    /// The store, after the upstream confirmed it.
    Revalidated,
    /// The upstream, as the cache had no part in it.
    Bypass,
}

impl CacheResult {
    /// A stable word, for metrics, spans and logs.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Miss => "miss",
            Self::Stale => "stale",
            Self::Revalidated => "revalidated",
            Self::Bypass => "bypass",
        }
    }
}

/// A response that the proxy made itself (a local reply).
#[derive(Clone, Debug)]
pub struct LocalResponse {
    pub cause: Cause,
    /// The reason, as a sentence.
    pub detail: String,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RequestEnd {
    /// The response was sent to its last byte.
    #[default]
    Complete,
    /// The client closed its connection, or stopped reading, before it had the whole response.
    ClientGone,
    /// The upstream ended its response in the middle.
    Broken,
    /// No byte moved for `idle_timeout`, or `max_duration` elapsed.
    Cut,
}

impl RequestEnd {
    /// A stable word, for spans and logs.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::ClientGone => "caller_gone",
            Self::Broken => "broken",
            Self::Cut => "cut",
        }
    }
}

/// What is known of a request when its head has arrived.
#[derive(Debug)]
pub struct RequestStart {
    pub entry_point: EntryPoint,
    /// The client's address.
    pub peer: SocketAddr,
    pub method: Method,
    pub version: Version,
    pub context: TraceContext,
    pub started_at: Instant,
}

impl RequestRecord {
    /// What its duration is counted under.
    pub fn duration_key(&self) -> SeriesKey {
        SeriesKey::new(&self.method, self.status.map_or(0, |status| status.as_u16()), error_type(self))
    }

    pub fn new(start: RequestStart) -> Self {
        let RequestStart { entry_point, peer, method, version, context, started_at } = start;
        Self {
            entry_point,
            peer,
            tls: false,
            identity: None,
            method,
            version,
            grpc: false,
            context,
            span_request: None,
            matched: None,
            route: None,
            served_by: None,
            attempts: AttemptRecords::default(),
            retry_stopped: None,
            breaker_window: None,
            local_response: None,
            replaced_cause: None,
            cache: None,
            delivery: None,
            status: None,
            grpc_status: None,
            started_at,
            response_head_at: None,
            ended_at: None,
            end: RequestEnd::default(),
            bytes_in: 0,
            bytes_out: 0,
        }
    }

    /// Whether this is a request to this service, as opposed to one that the service sends.
    pub fn is_inbound(&self) -> bool {
        self.entry_point == EntryPoint::Inbound
    }

    /// `inbound` or `outbound`.
    pub fn direction(&self) -> &'static str {
        if self.is_inbound() { "inbound" } else { "outbound" }
    }

    /// The client: its verified identity, else its IP address.
    pub fn client(&self) -> String {
        self.identity.as_ref().map_or_else(|| format_ip(self.peer.ip()), |peer| peer.to_string())
    }

    /// The pattern of its route, as configured: `POST /v1/charge*`.
    pub fn route_name(&self) -> Option<String> {
        let routes = &self.matched.as_ref()?.cluster.settings.routes;
        Some(routes.get(self.route?)?.matches.to_string())
    }

    /// The cause of the failure that a stale response replaced.
    pub fn stale_cause(&self) -> Option<&'static str> {
        self.replaced_cause.filter(|_| self.cache == Some(CacheResult::Stale))
    }

    /// The cause of the failure that the configured fallback replaced.
    pub fn fallback_cause(&self) -> Option<&'static str> {
        self.replaced_cause.filter(|_| self.cache != Some(CacheResult::Stale))
    }

    /// Takes the gRPC status from the trailers.
    pub fn read_trailers(&mut self, trailers: &HeaderMap) {
        if self.grpc {
            self.grpc_status = GrpcStatus::from_headers(trailers).or(self.grpc_status);
        }
    }

    /// The name of the upstream that attempts went to.
    pub fn upstream_name(&self) -> Option<&str> {
        self.served_by.as_ref().map(|destination| destination.cluster.settings.name.as_str())
    }

    /// The endpoint of the last recorded attempt.
    pub fn endpoint(&self) -> Option<SocketAddr> {
        self.attempts.last().map(|one| one.endpoint)
    }

    /// Whether it failed or was retried: exported even where its trace was not sampled (`sample_errors`).
    pub fn is_notable(&self) -> bool {
        let failed = match self.grpc_status {
            Some(status) => status.is_failure(),
            None => self.status.is_some_and(|status| status.is_server_error()),
        };
        failed
            || self.attempts.count() > 1
            || self.replaced_cause.is_some()
            || matches!(self.end, RequestEnd::Broken | RequestEnd::Cut)
    }

    /// The number of its spans.
    pub fn span_count(&self) -> u64 {
        if self.is_inbound() { 1 } else { 1 + self.attempts.iter().count() as u64 }
    }

    /// From its head to the last byte of its response.
    pub fn duration(&self) -> Duration {
        self.ended_at.map_or(Duration::ZERO, |ended| ended.saturating_duration_since(self.started_at))
    }
}

/// Formats an address as `Display` does, in a fifth of the time.
pub(super) fn format_ip(ip: IpAddr) -> String {
    let IpAddr::V4(ip) = ip else { return ip.to_string() };
    let mut text = String::with_capacity("255.255.255.255:65535".len());
    for (index, octet) in ip.octets().into_iter().enumerate() {
        if index > 0 {
            text.push('.');
        }
        push(&mut text, octet.into());
    }
    text
}

/// The same with its port.
pub(super) fn format_address(address: SocketAddr) -> String {
    if address.is_ipv6() {
        return address.to_string();
    }
    let mut text = format_ip(address.ip());
    text.push(':');
    push(&mut text, address.port());
    text
}

fn push(text: &mut String, number: u16) {
    if number > 9 {
        push(text, number / 10);
    }
    text.push(char::from(b'0' + (number % 10) as u8));
}

/// An error that the status does not show.
fn error_type(record: &RequestRecord) -> &'static str {
    if let Some(refusal) = &record.local_response {
        return refusal.cause.word();
    }
    if let Some(failure) = record.replaced_cause {
        return failure;
    }
    match (record.end, record.grpc_status) {
        (RequestEnd::Complete, None | Some(GrpcStatus::Ok)) => "",
        (RequestEnd::Complete, Some(status)) => status.label(),
        (end, _) => end.word(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every request in flight holds one.
    #[test]
    fn a_record_is_small() {
        assert!(size_of::<RequestRecord>() <= 700, "{} bytes", size_of::<RequestRecord>());
    }

    #[test]
    fn addresses_are_formatted_as_by_display() {
        for address in [
            "127.0.0.1:0",
            "10.200.0.99:65535",
            "255.255.255.255:80",
            "[2001:db8::1]:443",
            "[::ffff:1.2.3.4]:9",
        ] {
            let address: SocketAddr = address.parse().unwrap();
            assert_eq!(format_address(address), address.to_string());
            assert_eq!(format_ip(address.ip()), address.ip().to_string());
        }
    }
}
