//! The key of a response: everything that distinguishes requests beside `Vary`.
//!
//! Lines: side, route and upstream · URL · identity of the peer · credential, where it is part of the key · fields that
//! services build responses from although no URL shows them. The URL is the second line for
//! [`Store`](crate::cache::Store), and no line can contain a line feed.

use std::fmt::Write as _;

use aws_lc_rs::digest::{SHA256, digest};
use http::{
    HeaderMap, HeaderName, Request, Uri,
    header::{AUTHORIZATION, HOST},
};

use super::CachedRoute;
use crate::{
    cache::Entry,
    http1::target::RawTarget,
    model::Side,
    proxy::{body::ClientBody, origin::Origin, target::RouteTarget},
    resilience::cache::AuthorizationRule,
};

/// Fields that reach the service and that frameworks build links, hosts or paths from. If one were not in the
/// key, a client could have a response of its choice stored for others.
const KEYED: [&str; 11] = [
    "forwarded",
    "x-forwarded-host",
    "x-forwarded-proto",
    "x-forwarded-scheme",
    "x-forwarded-port",
    "x-forwarded-prefix",
    "x-forwarded-server",
    "x-host",
    "x-original-host",
    "x-original-url",
    "x-rewrite-url",
];

/// The key of a response.
#[derive(Clone, Debug)]
pub struct CacheKey(pub Vec<u8>);

impl CacheKey {
    pub fn of(route: &CachedRoute<'_>, request: &Request<ClientBody>) -> Self {
        let (origin, target) = (route.origin, route.target);
        let side = if *origin.side == Side::Inbound { 'i' } else { 'o' };
        let mut key = format!(
            "{side}{:016x} {}\n",
            target.route_owner.cluster.route_fingerprint(target.route),
            target.serving.cluster.settings.name
        )
        .into_bytes();
        key.extend(url(origin, target, request));
        key.push(b'\n');
        if !route.settings.shared_between_peers
            && let Some(identity) = identity(origin)
        {
            key.extend(identity.into_iter().filter(|byte| *byte != b'\n'));
        }
        key.push(b'\n');
        if route.settings.authorization == AuthorizationRule::Key {
            for credential in request.headers().get_all(AUTHORIZATION) {
                key.extend_from_slice(
                    digest(&SHA256, credential.as_bytes()).as_ref().escape_ascii().to_string().as_bytes(),
                );
            }
        }
        key.push(b'\n');
        push_keyed_fields(&mut key, request.headers());
        Self(key)
    }

    /// The key of the fetch that a request may wait for: with what the known variant was selected by.
    pub fn of_flight(&self, known: Option<&Entry>, request: &HeaderMap) -> Vec<u8> {
        let mut key = self.0.clone();
        for name in known.into_iter().flat_map(|entry| entry.selection.names()) {
            key.extend_from_slice(name.as_str().as_bytes());
            for value in request.get_all(name) {
                key.push(b'=');
                key.extend_from_slice(value.as_bytes());
            }
            key.push(b'\n');
        }
        key
    }
}

/// The verified identity of the peer.
fn identity(origin: &Origin<'_>) -> Option<Vec<u8>> {
    match origin.client {
        Some(client) => client.peer_identity.as_ref().map(|peer| peer.to_string().into_bytes()),
        None => origin.identity.map(|identity| identity.as_bytes().to_vec()),
    }
}

/// Adds the fields of [`KEYED`] that a request has, in their order.
fn push_keyed_fields(key: &mut Vec<u8>, headers: &HeaderMap) {
    let is_keyed = |name: &HeaderName| {
        let name = name.as_str();
        (name.starts_with("x-") || name == "forwarded") && KEYED.contains(&name)
    };
    let mut names: Vec<&HeaderName> = headers.keys().filter(|name| is_keyed(name)).collect();
    names.sort_unstable_by(|a, b| a.as_str().cmp(b.as_str()));
    for name in names {
        for value in headers.get_all(name) {
            key.extend_from_slice(name.as_str().as_bytes());
            key.push(b'=');
            key.extend_from_slice(value.as_bytes());
            key.push(b'\n');
        }
    }
}

/// The URL of a request, with path and query as the client sent them.
pub fn url(origin: &Origin<'_>, target: &RouteTarget, request: &Request<ClientBody>) -> Vec<u8> {
    let uri = request.uri();
    let scheme = match *origin.side {
        Side::Inbound if origin.is_tls => "https",
        Side::Inbound => "http",
        Side::Outbound | Side::Upstream(_) => uri.scheme_str().unwrap_or("http"),
    };
    let mut url = format!("{scheme}://").into_bytes();
    match (uri.authority(), request.headers().get(HOST)) {
        (Some(authority), _) => url.extend_from_slice(authority.as_str().as_bytes()),
        (None, Some(host)) => url.extend_from_slice(host.as_bytes()),
        (None, None) => url.extend_from_slice(target.serving.cluster.settings.name.as_bytes()),
    }
    match request.extensions().get::<RawTarget>() {
        Some(raw) => url.extend_from_slice(raw.as_bytes()),
        None => url.extend_from_slice(uri.path_and_query().map_or("/", |path| path.as_str()).as_bytes()),
    }
    url
}

/// A URI reference relative to a URL, if it has the same host: what an unsafe request may also invalidate.
pub fn same_origin(url: &[u8], reference: &str) -> Option<Vec<u8>> {
    let base = std::str::from_utf8(url).ok()?;
    let (scheme, rest) = base.split_once("://")?;
    let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let reference = reference.split('#').next().unwrap_or_default();
    if let Some((_, rest)) = reference.split_once("://") {
        let (other, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let path = if path.is_empty() { "/" } else { path };
        return other.eq_ignore_ascii_case(host).then(|| format!("{scheme}://{host}{path}").into_bytes());
    }
    if reference.starts_with("//") {
        return None;
    }
    let path = path.split('?').next().unwrap_or_default();
    let resolved = if reference.starts_with('/') {
        reference.to_owned()
    } else if reference.is_empty() || reference.starts_with('?') {
        format!("{path}{reference}")
    } else {
        let folder = path.rfind('/').map_or("/", |at| &path[..=at]);
        format!("{folder}{reference}")
    };
    let mut whole = String::new();
    let _ = write!(whole, "{scheme}://{host}{resolved}");
    whole.parse::<Uri>().ok().map(|_| whole.into_bytes())
}
