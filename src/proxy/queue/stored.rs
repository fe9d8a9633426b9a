//! A request as it is stored: its head as the client sent it, and what else the exchange needs to know of its origin.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Uri,
    header::{CONTENT_LENGTH, EXPECT, HOST},
    uri::{Authority, PathAndQuery, Scheme},
};

use super::super::{
    authorize::EndUser, body::ClientBody, error::ProxyError, headers, origin::Origin, target::RouteTarget,
};
use crate::{
    field_set::FieldSet,
    header_names::{X_FORWARDED_CLIENT_CERT, X_OUTRIGGER_ATTEMPT},
    model::Side,
    queue::{StoredRequest, request::Direction},
    resilience::deadline::REQUEST_TIMEOUT,
    trace_context::{self, IncomingContext},
};

/// The fields that only the store has. They are removed before the request is sent.
const UPSTREAM: HeaderName = HeaderName::from_static("x-outrigger-upstream");
const PEER: HeaderName = HeaderName::from_static("x-outrigger-peer");
const TLS: HeaderName = HeaderName::from_static("x-outrigger-tls");
const DESTINATION: HeaderName = HeaderName::from_static("x-outrigger-destination");

/// A request's head, before the exchange takes it apart.
#[derive(Clone, Debug)]
pub struct Head {
    pub method: Method,
    pub uri: Uri,
    pub headers: HeaderMap,
    /// Of the verified token.
    pub user: Option<EndUser>,
}

impl Head {
    pub fn of(request: &Request<ClientBody>) -> Self {
        Self {
            method: request.method().clone(),
            uri: request.uri().clone(),
            headers: request.headers().clone(),
            user: request.extensions().get().cloned(),
        }
    }
}

/// The form in which a request is stored.
pub fn store(
    origin: &Origin<'_>,
    target: &RouteTarget,
    head: Head,
    strip: &[HeaderName],
) -> Result<StoredRequest, ProxyError> {
    let Head { method, uri, mut headers, .. } = head;
    let present = FieldSet::of(&headers);
    headers::remove_hop_by_hop(&mut headers, present)?;
    headers::remove_proxy_credentials(&mut headers, present);
    headers::remove_spoofed(&mut headers, present);
    let name = &target.route_owner.cluster.settings.name;
    let authority: Authority =
        match uri.authority() {
            Some(authority) => authority.clone(),
            None => headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or(name).parse().map_err(
                |_| ProxyError::malformed("the request's Host is not a host: it cannot be queued"),
            )?,
        };
    for name in strip.iter().chain(&[HOST, EXPECT, CONTENT_LENGTH, REQUEST_TIMEOUT, X_OUTRIGGER_ATTEMPT]) {
        headers.remove(name);
    }
    for name in [UPSTREAM, PEER, TLS, DESTINATION] {
        headers.remove(name);
    }
    if origin.worker.shared.traces.is_enabled() {
        origin.progress.with_record(|record| record.context.inject(record.context.span, &mut headers));
    }
    headers.insert(PEER, origin.peer.clone());
    if origin.is_tls {
        headers.insert(TLS, HeaderValue::from_static("1"));
    }
    let direction = match origin.side {
        Side::Inbound => {
            if let Some(identity) = origin.identity {
                headers.insert(X_FORWARDED_CLIENT_CERT, identity.clone());
            }
            let original = origin.client.and_then(|client| client.original_destination);
            if let Some(value) = original.and_then(|address| address.to_string().parse().ok()) {
                headers.insert(DESTINATION, value);
            }
            Direction::Inbound
        }
        Side::Outbound | Side::Upstream(_) => {
            if let Ok(value) = HeaderValue::from_str(name) {
                headers.insert(UPSTREAM, value);
            }
            Direction::Outbound
        }
    };
    let mut parts = uri.into_parts();
    parts.scheme = Some(Scheme::HTTP);
    parts.authority = Some(authority);
    parts.path_and_query.get_or_insert(PathAndQuery::from_static("/"));
    let uri = Uri::from_parts(parts).map_err(|error| ProxyError::malformed(error.to_string()))?;
    Ok(StoredRequest { direction, method, uri, headers })
}

/// What is stored beside a request.
#[derive(Debug)]
pub struct StoredOrigin {
    pub side: Side,
    /// The upstream that accepted it; `None`: the service.
    pub upstream: Option<String>,
    /// As `x-forwarded-for` has it.
    pub peer: HeaderValue,
    pub peer_address: SocketAddr,
    pub is_tls: bool,
    /// As `x-forwarded-client-cert` has it.
    pub identity: Option<HeaderValue>,
    /// The address of the service, where the connection was redirected.
    pub destination: Option<SocketAddr>,
    /// The trace context of the span that accepted it.
    pub accepted_by: IncomingContext,
}

impl StoredOrigin {
    /// Takes it out of a stored request, which then is as the client sent it.
    pub fn take(stored: &mut StoredRequest) -> Self {
        let headers = &mut stored.headers;
        let text = |value: HeaderValue| value.to_str().map(str::to_owned).ok();
        let accepted_by = trace_context::read(headers);
        let peer = headers.remove(PEER).unwrap_or(HeaderValue::from_static("unknown"));
        let address = peer.to_str().ok().and_then(|peer| peer.parse().ok());
        Self {
            side: match stored.direction {
                Direction::Inbound => Side::Inbound,
                Direction::Outbound => Side::Outbound,
            },
            upstream: headers.remove(UPSTREAM).and_then(text),
            peer_address: SocketAddr::new(address.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)), 0),
            peer,
            is_tls: headers.remove(TLS).is_some(),
            identity: headers.remove(X_FORWARDED_CLIENT_CERT),
            destination: headers.remove(DESTINATION).and_then(text).and_then(|text| text.parse().ok()),
            accepted_by,
        }
    }
}
