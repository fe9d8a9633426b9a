//! Passes the response of an upstream on to the client.

use std::rc::Rc;

use http::{
    HeaderMap, HeaderName, HeaderValue, Response, StatusCode, Version,
    header::{CONNECTION, CONTENT_TYPE, UPGRADE},
};

use super::{
    attempt::UpstreamResponse,
    body::{RequestResources, ResponseBody},
    credentials,
    error::ProxyError,
    exchange::{ClientProtocol, Exchange},
    headers, request_check,
    upgrade::{self, UpgradedUpstream},
};
use crate::{
    cause::Cause,
    field_set::{Field, FieldSet},
    header_names::X_OUTRIGGER_RETRY,
    model::Side,
    resilience::{
        classify::{AttemptOutcome, RetryAdvice},
        fallback::FallbackSettings,
    },
};

const PROXY_STATUS: HeaderName = HeaderName::from_static("proxy-status");

/// Makes the client's response from an upstream's: removes hop-by-hop fields, adds `Via`, applies the route's edits.
pub fn forward_response(
    exchange: &Exchange<'_>,
    response: UpstreamResponse,
    outcome: &AttemptOutcome,
    client: ClientProtocol,
) -> Result<Response<ResponseBody>, ProxyError> {
    let UpstreamResponse { head: mut response, present, mut lease, held } = response;
    let (origin, target) = (exchange.request.origin, exchange.target);
    let status = response.status();
    if present.has(Field::KeepAlive) {
        lease.record_keep_alive(response.headers());
    }
    credentials::note_unauthorized(&target.serving, status);
    let broken = |error: ProxyError| {
        let detail = format!("{}: the response cannot be forwarded: {}", exchange.name(), error.detail);
        ProxyError::new(Cause::Reset, detail)
    };
    request_check::only_chunked(response.headers(), present).map_err(broken)?;
    let hop_by_hop = headers::remove_hop_by_hop(response.headers_mut(), present).map_err(broken)?;
    if present.has(Field::Retry) {
        response.headers_mut().remove(X_OUTRIGGER_RETRY);
    }
    if *origin.side == Side::Inbound {
        add_retry_advice(exchange, &mut response, present);
    } else {
        let received = response.version();
        origin.view.proxy_names.via(origin.side).append(response.headers_mut(), received);
    }
    if let Some(edits) = target.route.and_then(|route| target.route_owner.cluster.header_edits.get(route)) {
        edits.response.apply(response.headers_mut());
        if let Some(deprecation) = &edits.deprecation {
            deprecation.announce(response.headers_mut());
        }
    }
    let attempts = origin.progress.with_record(|record| record.attempts.count()).unwrap_or(0);
    if attempts > 1 && may_be_failure(status, present) {
        append_proxy_status(exchange, response.headers_mut(), status, outcome, attempts);
    }
    if status == StatusCode::SWITCHING_PROTOCOLS {
        let (Some(upgrade_stream), Some(connection), Some(protocol)) =
            (client.upgrade, origin.client, hop_by_hop.upgrade)
        else {
            return Err(broken(ProxyError::malformed("the upstream sent 101 to a request without Upgrade")));
        };
        let Some((io, unread)) = lease.take_upgraded_stream() else {
            return Err(broken(ProxyError::malformed("101 before all of the request was sent")));
        };
        let idle = exchange.policy.tunnel_idle_timeout.limit();
        // A tunnel counts as a connection, not as a request in flight.
        let resources = RequestResources { permit: None, ..held };
        upgrade::join(
            connection,
            upgrade_stream,
            UpgradedUpstream { io, unread, lease, resources },
            idle,
            origin.progress.must_end_at(),
        );
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
        response.headers_mut().insert(UPGRADE, protocol);
        return Ok(response.map(|_| ResponseBody::Empty));
    }
    if client.version == Version::HTTP_2 && present.has(Field::RequestId) {
        headers::keep_unindexed(response.headers_mut());
    }
    *response.version_mut() = client.version;
    origin.progress.response_begins();
    let progress = Rc::clone(origin.progress);
    Ok(response.map(|()| ResponseBody::streaming(lease, held, progress)))
}

/// Adds to `Proxy-Status` that several attempts were made before this failure was passed on.
fn append_proxy_status(
    exchange: &Exchange<'_>,
    headers: &mut HeaderMap,
    status: StatusCode,
    outcome: &AttemptOutcome,
    attempts: u32,
) {
    let member = format!(
        "{}; received-status={}; details=\"{}, {attempts} attempts\"",
        exchange.request.origin.view.proxy_names.deployment,
        status.as_u16(),
        outcome.label(),
    );
    if let Ok(member) = HeaderValue::try_from(member) {
        headers.append(PROXY_STATUS, member);
    }
}

/// Asks the client's sidecar not to retry a request that failed because this service's own retries were exhausted.
fn add_retry_advice(exchange: &Exchange<'_>, response: &mut Response<()>, present: FieldSet) {
    let failed = response.status().is_server_error() || present.has(Field::GrpcStatus);
    let spent = &exchange.worker().shared.spent_traces;
    if failed
        && let Some(trace) = exchange.progress().with_record(|record| record.context.trace.get())
        && spent.contains(trace, std::time::Instant::now())
        && let Some(word) = RetryAdvice::No.word()
    {
        response.headers_mut().insert(X_OUTRIGGER_RETRY, HeaderValue::from_static(word));
    }
}

/// Marks a response that a fallback gave, in its extensions: it is not what the upstream would have sent.
#[derive(Clone, Copy, Debug)]
pub struct FromFallback;

/// The configured fallback response. Its `Proxy-Status` says that it is one.
pub fn fallback_response(settings: &FallbackSettings, deployment: &str, why: &str) -> Response<ResponseBody> {
    let mut response = Response::new(ResponseBody::whole(settings.body.clone()));
    response.extensions_mut().insert(FromFallback);
    *response.status_mut() = StatusCode::from_u16(settings.status).unwrap_or(StatusCode::OK);
    if let Ok(value) = HeaderValue::try_from(settings.content_type.as_str()) {
        response.headers_mut().insert(CONTENT_TYPE, value);
    }
    if let Ok(member) = HeaderValue::try_from(format!("{deployment}; fallback; details=\"{why}\"")) {
        response.headers_mut().insert(PROXY_STATUS, member);
    }
    response
}

/// Whether a response may be a failure and has to be classified; every other one is a success.
pub fn may_be_failure(status: StatusCode, present: FieldSet) -> bool {
    status.as_u16() >= 400 || present.has(Field::GrpcStatus)
}
