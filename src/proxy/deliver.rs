//! The answer of an upstream, handed on to the caller.

use std::rc::Rc;

use http::{
    HeaderMap, HeaderName, HeaderValue, Response, StatusCode, Version,
    header::{CONNECTION, CONTENT_TYPE, UPGRADE},
};

use super::{
    accept::Side,
    attempt::UpstreamResponse,
    body::{Held, ResponseBody},
    credentials,
    error::{Cause, ProxyError},
    exchange::{ClientProtocol, Exchange},
    guard,
    headers::{self, X_OUTRIGGER_RETRY},
    upgrade,
};
use crate::{
    present::{Field, Present},
    resilience::{
        classify::{Advice, Outcome},
        fallback::FallbackSettings,
    },
};

const PROXY_STATUS: HeaderName = HeaderName::from_static("proxy-status");

/// Hands an upstream's answer on.
pub fn hand_on(
    exchange: &Exchange<'_>,
    response: UpstreamResponse,
    outcome: &Outcome,
    client: ClientProtocol,
) -> Result<Response<ResponseBody>, ProxyError> {
    let UpstreamResponse { head: mut response, present, mut lease, held } = response;
    let (origin, target) = (exchange.request.origin, exchange.target);
    let status = response.status();
    if present.has(Field::KeepAlive) {
        lease.heard(response.headers());
    }
    credentials::note(&target.local, status);
    let broken = |error: ProxyError| {
        let detail = format!("{}: its response cannot be passed on: {}", exchange.name(), error.detail);
        ProxyError::new(Cause::Reset, detail)
    };
    guard::only_chunked(response.headers(), present).map_err(broken)?;
    let said = headers::remove_hop_by_hop(response.headers_mut(), present).map_err(broken)?;
    if present.has(Field::Retry) {
        response.headers_mut().remove(X_OUTRIGGER_RETRY);
    }
    if *origin.side == Side::Inbound {
        advise(exchange, &mut response, present);
    } else {
        let received = response.version();
        origin.view.names.via(origin.side).append(response.headers_mut(), received);
    }
    if let Some(edits) = target.route.and_then(|route| target.matched.cluster.edits.get(route)) {
        edits.response.apply(response.headers_mut());
    }
    let tries = origin.progress.note(|record| record.tries.made()).unwrap_or(0);
    if tries > 1 && may_be_failure(status, present) {
        append_proxy_status(exchange, response.headers_mut(), status, outcome, tries);
    }
    if status == StatusCode::SWITCHING_PROTOCOLS {
        let (Some(upgrade), Some(connection), Some(protocol)) = (client.upgrade, origin.client, said.upgrade)
        else {
            return Err(broken(ProxyError::malformed("101 to a request that asked for no upgrade")));
        };
        let Some(stream) = lease.take_stream() else {
            return Err(broken(ProxyError::malformed("101 before all of the request was sent")));
        };
        let idle = exchange.policy.tunnel_idle_timeout.limit();
        // A tunnel counts among the connections only.
        let held = Held { place: None, ..held };
        upgrade::join(connection, upgrade, stream, (lease, held), idle, origin.progress.over_at());
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
        response.headers_mut().insert(UPGRADE, protocol);
        return Ok(response.map(|_| ResponseBody::Empty));
    }
    if client.version == Version::HTTP_2 && present.has(Field::RequestId) {
        headers::keep_unindexed(response.headers_mut());
    }
    *response.version_mut() = client.version;
    origin.progress.answering();
    let progress = Rc::clone(origin.progress);
    Ok(response.map(|()| ResponseBody::streaming(lease, held, progress)))
}

/// Tells that tries were spent on a failure that is passed on.
fn append_proxy_status(
    exchange: &Exchange<'_>,
    headers: &mut HeaderMap,
    status: StatusCode,
    outcome: &Outcome,
    tries: u32,
) {
    let member = format!(
        "{}; received-status={}; details=\"{}, {tries} attempts\"",
        exchange.request.origin.view.names.deployment,
        status.as_u16(),
        outcome.label(),
    );
    if let Ok(member) = HeaderValue::try_from(member) {
        headers.append(PROXY_STATUS, member);
    }
}

/// Tells the caller's sidecar not to try again what this service's own calls have tried enough.
fn advise(exchange: &Exchange<'_>, response: &mut Response<()>, present: Present) {
    let failed = response.status().is_server_error() || present.has(Field::GrpcStatus);
    let spent = &exchange.worker().shared.spent;
    if failed
        && let Some(trace) = exchange.progress().note(|record| record.context.trace.get())
        && spent.contains(trace, std::time::Instant::now())
        && let Some(word) = Advice::No.word()
    {
        response.headers_mut().insert(X_OUTRIGGER_RETRY, HeaderValue::from_static(word));
    }
}

/// The configured answer in place of a failure. It says that it is one.
pub fn fallback(settings: &FallbackSettings, deployment: &str, why: &str) -> Response<ResponseBody> {
    let mut response = Response::new(ResponseBody::whole(settings.body.clone()));
    *response.status_mut() = StatusCode::from_u16(settings.status).unwrap_or(StatusCode::OK);
    if let Ok(value) = HeaderValue::try_from(settings.content_type.as_str()) {
        response.headers_mut().insert(CONTENT_TYPE, value);
    }
    if let Ok(member) = HeaderValue::try_from(format!("{deployment}; fallback; details=\"{why}\"")) {
        response.headers_mut().insert(PROXY_STATUS, member);
    }
    response
}

/// Whether a response needs a second look: everything else is success.
pub fn may_be_failure(status: StatusCode, present: Present) -> bool {
    status.as_u16() >= 400 || present.has(Field::GrpcStatus)
}
