//! The server that a URL names, and the form of a request to it.

use bytes::Bytes;
use http::{
    HeaderValue, Request, Uri,
    header::{AUTHORIZATION, HOST},
    uri::{Authority, PathAndQuery, Scheme},
};
use http_body_util::Full;

use super::FetchError;
use crate::redact;

/// The server that a URL names.
#[derive(Debug)]
pub struct Destination {
    /// Without userinfo, which belongs into a field of its own (RFC 9110 §4.2.4).
    pub authority: Authority,
    /// Without the brackets of an IPv6 address.
    pub host: String,
    pub port: u16,
    pub tls: bool,
}

impl Destination {
    /// # Errors
    /// [`FetchError::Url`] for anything but an absolute `http` or `https` URL.
    pub fn of(uri: &Uri) -> Result<Self, FetchError> {
        let bad = || FetchError::Url { uri: uri.clone() };
        let tls = match uri.scheme() {
            Some(scheme) if *scheme == Scheme::HTTP => false,
            Some(scheme) if *scheme == Scheme::HTTPS => true,
            _ => return Err(bad()),
        };
        let authority = uri.authority().filter(|authority| !authority.host().is_empty()).ok_or_else(bad)?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        let port = authority.port_u16().unwrap_or(if tls { 443 } else { 80 });
        let bare =
            authority.as_str().rsplit_once('@').map_or(Ok(authority.clone()), |(_, bare)| bare.parse());
        Ok(Self { authority: bare.map_err(|_| bad())?, host, port, tls })
    }
}

/// The destination of a request, and the request in the form for the client: its URL without userinfo, which the pool
/// would compare and log, its credentials and `Host` as header fields.
///
/// # Errors
/// Those of [`Destination::of`].
pub fn prepare(request: Request<Bytes>) -> Result<(Destination, Request<Full<Bytes>>), FetchError> {
    let (mut head, body) = request.into_parts();
    let destination = Destination::of(&head.uri)?;
    if let Some(credentials) = head.uri.authority().and_then(redact::basic_credentials)
        && !head.headers.contains_key(AUTHORIZATION)
    {
        head.headers.insert(AUTHORIZATION, credentials);
    }
    if !head.headers.contains_key(HOST)
        && let Ok(host) = HeaderValue::from_str(destination.authority.as_str())
    {
        head.headers.insert(HOST, host);
    }
    let mut parts = head.uri.clone().into_parts();
    parts.authority = Some(destination.authority.clone());
    parts.path_and_query.get_or_insert(PathAndQuery::from_static("/"));
    let uri = Uri::from_parts(parts).map_err(|_| FetchError::Url { uri: head.uri.clone() })?;
    head.uri = uri;
    Ok((destination, Request::from_parts(head, Full::new(body))))
}
