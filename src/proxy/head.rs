//! The head of a request, from what the caller sent to what the upstream gets.

use std::mem::take;

use http::{
    HeaderMap, HeaderValue, Request, Uri, Version,
    header::{CONNECTION, CONTENT_LENGTH, EXPECT, HOST, TE, TRANSFER_ENCODING, UPGRADE},
    uri,
};

use super::{
    accept::Side,
    attempt::Outgoing,
    error::ProxyError,
    headers::{self, Caller, X_FORWARDED_CLIENT_CERT},
    origin::Origin,
    target::Target,
};
use crate::{
    http1::target::RawTarget,
    present::{Field, Present},
    runtime::View,
    upstream::http1::Told,
};

/// Makes the caller's head the one that is sent on. Returns the protocol the caller asks to change to.
pub fn prepare<B>(
    origin: &Origin<'_>,
    target: &Target,
    request: &mut Request<B>,
    present: Present,
    version: Version,
) -> Result<Option<HeaderValue>, ProxyError> {
    let (callers_version, side, view) = (request.version(), origin.side, origin.view);
    let headers = request.headers_mut();
    let said = headers::remove_hop_by_hop(headers, present)?;
    if present.has(Field::Te) && version == Version::HTTP_11 {
        announce_te(headers);
    }
    if present.has(Field::Expect) && callers_version == Version::HTTP_10 {
        // HTTP/1.0 has no expectations (RFC 9110 §10.1.1).
        headers.remove(EXPECT);
    }
    headers::remove_proxy_credentials(headers, present);
    headers::remove_spoofed(headers, present);
    view.names.via(side).append(headers, callers_version);
    if *side == Side::Inbound {
        let host = request.headers().get(HOST).cloned().or_else(|| {
            let authority = request.uri().authority();
            authority.and_then(|authority| HeaderValue::from_str(authority.as_str()).ok())
        });
        let caller =
            Caller { address: origin.peer, proto: if origin.is_tls { "https" } else { "http" }, host };
        let headers = request.headers_mut();
        if let Some(value) = origin.identity {
            headers.insert(X_FORWARDED_CLIENT_CERT, value.clone());
        }
        headers::set_forwarded(headers, view.snapshot.config.inbound.forwarded, caller);
    }
    if version == Version::HTTP_11 && callers_version == Version::HTTP_2 {
        headers::join_cookies(request.headers_mut());
    }
    if let Some(route) = target.route {
        edit(view, target, route, request)?;
    }
    Ok(said.upgrade)
}

/// `TE` is for the next hop only, which `Connection` has to say (RFC 9110 §10.1.4).
fn announce_te(headers: &mut HeaderMap) {
    if headers.contains_key(TE) {
        headers.insert(CONNECTION, HeaderValue::from_static("te"));
    }
}

/// Makes of the head what its route wants.
fn edit<B>(view: &View, target: &Target, route: usize, request: &mut Request<B>) -> Result<(), ProxyError> {
    let malformed = |error: uri::InvalidUriParts| ProxyError::malformed(error.to_string());
    if let Some(edits) = target.matched.cluster.edits.get(route) {
        let headers = request.headers_mut();
        edits.request.apply(headers);
        if edits.request.sets(&HOST)
            && let Some(host) = headers.get(HOST).and_then(|host| host.to_str().ok())
        {
            let host = host.parse().map_err(|_| ProxyError::malformed("`host` is set to no host"))?;
            let mut parts = take(request.uri_mut()).into_parts();
            parts.authority = Some(host);
            parts.scheme.get_or_insert(http::uri::Scheme::HTTP);
            parts.path_and_query.get_or_insert(uri::PathAndQuery::from_static("/"));
            *request.uri_mut() = Uri::from_parts(parts).map_err(malformed)?;
        }
    }
    if let Some(routes) = target.index.and_then(|index| view.snapshot.router.routes(index))
        && let Some(path) = request.uri().path_and_query()
        && let Some(rewritten) = routes.rewrite(route, path)
    {
        let mut parts = take(request.uri_mut()).into_parts();
        parts.path_and_query = Some(rewritten);
        *request.uri_mut() = Uri::from_parts(parts).map_err(malformed)?;
        // The rewritten path has what the client sent percent-encoded.
        request.extensions_mut().remove::<RawTarget>();
    }
    Ok(())
}

/// Takes the head out of a request, as the upstream's protocol has it.
pub fn outgoing<B>(
    request: &mut Request<B>,
    version: Version,
    name: &str,
    upgrade: Option<&HeaderValue>,
    has_body: bool,
    tls: bool,
) -> Result<Outgoing, ProxyError> {
    let mut headers = take(request.headers_mut());
    let uri = spell(take(request.uri_mut()), &mut headers, version, name, has_body, tls)?;
    if let Some(protocol) = upgrade {
        let options = if headers.contains_key(CONNECTION) { "upgrade, te" } else { "upgrade" };
        headers.insert(CONNECTION, HeaderValue::from_static(options));
        headers.insert(UPGRADE, protocol.clone());
    }
    let (method, extensions) = (take(request.method_mut()), take(request.extensions_mut()));
    Ok(Outgoing { method, uri, version, headers, extensions, keep: false, told: Told::default() })
}

/// The same for another upstream, which may be called by another protocol.
pub fn respell(
    outgoing: &mut Outgoing,
    version: Version,
    name: &str,
    has_body: bool,
    tls: bool,
) -> Result<(), ProxyError> {
    if outgoing.version == version && version == Version::HTTP_11 {
        return Ok(());
    }
    let headers = &mut outgoing.headers;
    if version == Version::HTTP_2 {
        for of_this_hop in [CONNECTION, UPGRADE, TRANSFER_ENCODING] {
            headers.remove(of_this_hop);
        }
    } else {
        headers::join_cookies(headers);
        announce_te(headers);
    }
    outgoing.uri = spell(take(&mut outgoing.uri), headers, version, name, has_body, tls)?;
    outgoing.version = version;
    Ok(())
}

/// Where the host stands, and how a body is announced: what the two protocols do not have in common.
fn spell(
    uri: Uri,
    headers: &mut HeaderMap,
    version: Version,
    name: &str,
    has_body: bool,
    tls: bool,
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
        // Nobody else says it.
        headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
    // Of which HTTP/1.1 sends path and query.
    Ok(uri)
}
