//! The head of a request: from what the client sent to what the upstream gets.

use std::mem::take;

use http::{
    HeaderMap, HeaderValue, Request, Uri, Version,
    header::{CONNECTION, CONTENT_LENGTH, EXPECT, HOST, TE, TRANSFER_ENCODING, UPGRADE},
    uri,
};

use super::{
    attempt::Outgoing,
    error::ProxyError,
    headers::{self, ForwardedClient},
    origin::Origin,
    target::RouteTarget,
};
use crate::{
    field_set::{Field, FieldSet},
    header_names::X_FORWARDED_CLIENT_CERT,
    http1::target::RawTarget,
    model::{Cluster, Side, View},
    upstream::http1::AttemptFields,
};

/// Edits the client's request head for forwarding. Returns the protocol of an upgrade that the client requests.
pub fn edit_request<B>(
    origin: &Origin<'_>,
    target: &RouteTarget,
    request: &mut Request<B>,
    present: FieldSet,
    version: Version,
) -> Result<Option<HeaderValue>, ProxyError> {
    let (client_version, side, view) = (request.version(), origin.side, origin.view);
    let headers = request.headers_mut();
    let hop_by_hop = headers::remove_hop_by_hop(headers, present)?;
    if present.has(Field::Te) && version == Version::HTTP_11 {
        announce_te(headers);
    }
    if present.has(Field::Expect) && client_version == Version::HTTP_10 {
        // HTTP/1.0 has no expectations (RFC 9110 §10.1.1).
        headers.remove(EXPECT);
    }
    headers::remove_proxy_credentials(headers, present);
    headers::remove_spoofed(headers, present);
    view.proxy_names.via(side).append(headers, client_version);
    if *side == Side::Inbound {
        let host = request.headers().get(HOST).cloned().or_else(|| {
            let authority = request.uri().authority();
            authority.and_then(|authority| HeaderValue::from_str(authority.as_str()).ok())
        });
        let client = ForwardedClient {
            address: origin.peer,
            proto: if origin.is_tls { "https" } else { "http" },
            host,
        };
        let headers = request.headers_mut();
        if let Some(value) = origin.identity {
            headers.insert(X_FORWARDED_CLIENT_CERT, value.clone());
        }
        headers::set_forwarded(headers, view.snapshot.config.inbound.forwarded, client);
    }
    if version == Version::HTTP_11 && client_version == Version::HTTP_2 {
        headers::join_cookies(request.headers_mut());
    }
    if let Some(route) = target.route {
        apply_route_edits(view, target, route, request)?;
    }
    Ok(hop_by_hop.upgrade)
}

/// `TE` is hop-by-hop, so `Connection` has to name it (RFC 9110 §10.1.4).
fn announce_te(headers: &mut HeaderMap) {
    if headers.contains_key(TE) {
        headers.insert(CONNECTION, HeaderValue::from_static("te"));
    }
}

/// Applies the route's header edits and path rewrite.
fn apply_route_edits<B>(
    view: &View,
    target: &RouteTarget,
    route: usize,
    request: &mut Request<B>,
) -> Result<(), ProxyError> {
    let malformed = |error: uri::InvalidUriParts| ProxyError::malformed(error.to_string());
    if let Some(edits) = target.route_owner.cluster.header_edits.get(route) {
        let headers = request.headers_mut();
        edits.request.apply(headers);
        if edits.request.sets(&HOST)
            && let Some(host) = headers.get(HOST).and_then(|host| host.to_str().ok())
        {
            let host = host.parse().map_err(|_| {
                ProxyError::malformed(
                    "the route's `request_headers.set` gives `host` a value that is not a host",
                )
            })?;
            let mut parts = take(request.uri_mut()).into_parts();
            parts.authority = Some(host);
            parts.scheme.get_or_insert(http::uri::Scheme::HTTP);
            parts.path_and_query.get_or_insert(uri::PathAndQuery::from_static("/"));
            *request.uri_mut() = Uri::from_parts(parts).map_err(malformed)?;
        }
    }
    if let Some(routes) = target.route_owner_index.and_then(|index| view.snapshot.router.routes(index))
        && let Some(path) = request.uri().path_and_query()
        && let Some(rewritten) = routes.rewrite(route, path)
    {
        let mut parts = take(request.uri_mut()).into_parts();
        parts.path_and_query = Some(rewritten);
        *request.uri_mut() = Uri::from_parts(parts).map_err(malformed)?;
        // The rewritten path has the client's bytes percent-encoded, so the raw target no longer applies.
        request.extensions_mut().remove::<RawTarget>();
    }
    Ok(())
}

/// What the form of a request head depends on, beside the request.
#[derive(Clone, Copy, Debug)]
pub struct HeadFormat<'a> {
    pub version: Version,
    /// The upstream's name: the host of a request that names none.
    pub name: &'a str,
    pub has_body: bool,
    pub tls: bool,
}

impl<'a> HeadFormat<'a> {
    pub fn new(cluster: &'a Cluster, version: Version, has_body: bool) -> Self {
        Self { version, name: &cluster.settings.name, has_body, tls: cluster.tls.is_some() }
    }
}

/// Takes the head out of a request, in the form of the upstream's protocol.
pub fn take_head<B>(
    request: &mut Request<B>,
    format: HeadFormat<'_>,
    upgrade: Option<&HeaderValue>,
) -> Result<Outgoing, ProxyError> {
    let mut headers = take(request.headers_mut());
    let uri = convert_target(take(request.uri_mut()), &mut headers, format)?;
    if let Some(protocol) = upgrade {
        let options = if headers.contains_key(CONNECTION) { "upgrade, te" } else { "upgrade" };
        headers.insert(CONNECTION, HeaderValue::from_static(options));
        headers.insert(UPGRADE, protocol.clone());
    }
    let (method, extensions) = (take(request.method_mut()), take(request.extensions_mut()));
    Ok(Outgoing {
        method,
        uri,
        version: format.version,
        headers,
        extensions,
        keep: false,
        attempt_fields: AttemptFields::default(),
    })
}

/// Converts the head for another upstream, which may use another protocol.
pub fn convert_head(outgoing: &mut Outgoing, format: HeadFormat<'_>) -> Result<(), ProxyError> {
    let version = format.version;
    if outgoing.version == version && version == Version::HTTP_11 {
        return Ok(());
    }
    let headers = &mut outgoing.headers;
    if version == Version::HTTP_2 {
        for hop_by_hop in [CONNECTION, UPGRADE, TRANSFER_ENCODING] {
            headers.remove(hop_by_hop);
        }
    } else {
        headers::join_cookies(headers);
        announce_te(headers);
    }
    outgoing.uri = convert_target(take(&mut outgoing.uri), headers, format)?;
    outgoing.version = version;
    Ok(())
}

/// Converts what differs between the two protocols: where the host is, and how a body is framed.
fn convert_target(
    uri: Uri,
    headers: &mut HeaderMap,
    HeadFormat { version, name, has_body, tls }: HeadFormat<'_>,
) -> Result<Uri, ProxyError> {
    let malformed = |error: http::Error| ProxyError::malformed(error.to_string());
    if version == Version::HTTP_2 {
        let path = uri.path_and_query().cloned().unwrap_or_else(|| uri::PathAndQuery::from_static("/"));
        let authority = match uri.authority() {
            Some(authority) => authority.as_str().to_owned(),
            None => headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or(name).to_owned(),
        };
        headers.remove(HOST);
        return Uri::builder()
            .scheme(if tls { "https" } else { "http" })
            .authority(authority)
            .path_and_query(path)
            .build()
            .map_err(malformed);
    }
    // The authority of an absolute target, or of HTTP/2, is the Host; it replaces another one (RFC 9112 §3.2.2).
    if let Some(authority) = uri.authority() {
        let host = HeaderValue::from_str(authority.as_str()).map_err(|error| malformed(error.into()))?;
        headers.insert(HOST, host);
    } else if !headers.contains_key(HOST) {
        let host = HeaderValue::from_str(name).map_err(|error| malformed(error.into()))?;
        headers.insert(HOST, host);
    }
    if has_body && !headers.contains_key(CONTENT_LENGTH) {
        // Nothing else frames the body.
        headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
    // HTTP/1.1 sends its path and query only.
    Ok(uri)
}
