//! The changes that a proxy makes to the header fields of a message (RFC 9110 §7.6).

use std::{cell::RefCell, num::NonZeroU64};

use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{
        AUTHORIZATION, CONNECTION, CONTENT_LENGTH, COOKIE, Entry, HOST, PROXY_AUTHENTICATE,
        PROXY_AUTHORIZATION, TE, TRANSFER_ENCODING, UPGRADE,
    },
};

use super::error::ProxyError;
use crate::{
    config::ForwardedHeaders,
    field_set::{Field, FieldSet},
    header_names::{
        X_FORWARDED_CLIENT_CERT, X_FORWARDED_FOR, X_FORWARDED_HOST, X_FORWARDED_PROTO, X_OUTRIGGER_RETRY,
        X_REQUEST_ID,
    },
    resilience::deadline::{GRPC_TIMEOUT, REQUEST_TIMEOUT},
};

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// Fields that `Connection` must not name: without them the next hop would take the message, or its sender, for another
/// one.
fn is_protected(name: &str) -> bool {
    [HOST, CONTENT_LENGTH, AUTHORIZATION, COOKIE, TRACEPARENT, TRACESTATE, X_REQUEST_ID, X_FORWARDED_FOR]
        .iter()
        .any(|protected| protected.as_str().eq_ignore_ascii_case(name))
        || name.as_bytes().get(..11).is_some_and(|start| start.eq_ignore_ascii_case(b"x-outrigger"))
        || name.eq_ignore_ascii_case(X_FORWARDED_CLIENT_CERT.as_str())
}

/// The content of the hop-by-hop fields that were removed from a message.
#[derive(Debug, Default)]
pub struct HopByHop {
    /// The protocol of a requested or accepted upgrade.
    pub upgrade: Option<HeaderValue>,
}

/// Whether the sender of a message accepts trailers: `TE` is a list, in any case and any number of fields (RFC 9110
/// §10.1.4).
pub fn accepts_trailers(headers: &HeaderMap) -> bool {
    let codings = headers.get_all(TE).iter().flat_map(|te| te.as_bytes().split(|byte| *byte == b','));
    codings.into_iter().any(|coding| coding.trim_ascii().eq_ignore_ascii_case(b"trailers"))
}

/// Removes the hop-by-hop fields (RFC 9110 §7.6.1). `TE: trailers` stays, as the proxy forwards trailers.
pub fn remove_hop_by_hop(headers: &mut HeaderMap, present: FieldSet) -> Result<HopByHop, ProxyError> {
    let mut hop_by_hop = HopByHop::default();
    if !present.has_any(FieldSet::HOP_BY_HOP) {
        return Ok(hop_by_hop);
    }
    let wants_upgrade = present.has(Field::Connection) && remove_connection(headers)?;
    let trailers = present.has(Field::Te) && accepts_trailers(headers);
    let mut remove = |field, name| present.has(field).then(|| headers.remove(name)).flatten();
    if let Some(protocol) = remove(Field::Upgrade, UPGRADE)
        && wants_upgrade
        // An upgrade to h2c would carry later requests past every check (RFC 9113 §3.1 retired it).
        && !protocol.to_str().is_ok_and(|p| p.split(',').any(|p| p.trim().eq_ignore_ascii_case("h2c")))
    {
        hop_by_hop.upgrade = Some(protocol);
    }
    remove(Field::Http2Settings, HTTP2_SETTINGS);
    remove(Field::KeepAlive, KEEP_ALIVE);
    remove(Field::ProxyConnection, PROXY_CONNECTION);
    if remove(Field::TransferEncoding, TRANSFER_ENCODING).is_some() {
        // The transfer coding decides where the body ends and overrides a Content-Length (RFC 9112 §6.3).
        remove(Field::ContentLength, CONTENT_LENGTH);
    }
    remove(Field::Te, TE);
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    Ok(hop_by_hop)
}

/// Removes `Connection` and the fields that it names. Returns whether it has the option `upgrade`.
fn remove_connection(headers: &mut HeaderMap) -> Result<bool, ProxyError> {
    let (first, more) = match headers.try_entry(CONNECTION) {
        Ok(Entry::Occupied(entry)) => {
            let (_, mut values) = entry.remove_entry_mult();
            (values.next(), values.collect())
        }
        _ => (None, Vec::new()),
    };
    let mut wants_upgrade = false;
    for value in first.iter().chain(&more) {
        let text = value.to_str().map_err(|_| ProxyError::malformed("the Connection field is not text"))?;
        for option in text.split(',').map(str::trim).filter(|option| !option.is_empty()) {
            if option.eq_ignore_ascii_case("upgrade") {
                wants_upgrade = true;
            } else if is_protected(option) {
                return Err(ProxyError::malformed(format!(
                    "Connection names `{option}`, which is not hop-by-hop"
                )));
            } else if !option.eq_ignore_ascii_case("te") {
                headers.remove(option);
            }
        }
    }
    Ok(wants_upgrade)
}

/// Removes the credentials that are meant for this proxy.
pub fn remove_proxy_credentials(headers: &mut HeaderMap, present: FieldSet) {
    if present.has(Field::ProxyAuthorization) {
        headers.remove(PROXY_AUTHORIZATION);
    }
    if present.has(Field::ProxyAuthenticate) {
        headers.remove(PROXY_AUTHENTICATE);
    }
}

/// Removes the fields that only a proxy may set: the peer's certificate, retry advice, and protected names with `_`.
pub fn remove_spoofed(headers: &mut HeaderMap, present: FieldSet) {
    if present.has(Field::ForwardedClientCert) {
        headers.remove(X_FORWARDED_CLIENT_CERT);
    }
    if present.has(Field::Retry) {
        headers.remove(X_OUTRIGGER_RETRY);
    }
    if !present.has_underscore() {
        return;
    }
    // Many services read `_` and `-` as the same (CGI, WSGI).
    let disguised =
        |name: &HeaderName| name.as_str().contains('_') && is_protected(&name.as_str().replace('_', "-"));
    let disguised: Vec<HeaderName> = headers.keys().filter(|name| disguised(name)).cloned().collect();
    for name in disguised {
        headers.remove(name);
    }
}

/// Removes a field, also where its name has `_` in place of `-`.
pub fn remove_spellings(headers: &mut HeaderMap, name: &HeaderName) {
    headers.remove(name);
    let disguised = |other: &&HeaderName| {
        other.as_str().contains('_') && other.as_str().replace('_', "-") == name.as_str().replace('_', "-")
    };
    let disguised: Vec<HeaderName> = headers.keys().filter(disguised).cloned().collect();
    for name in disguised {
        headers.remove(name);
    }
}

/// Keeps values that differ for each request out of HPACK's dynamic table (RFC 7541 §6.2.3): they would never be
/// referred to, would evict entries that are, and each request would be compared with all those before it.
pub fn keep_unindexed(headers: &mut HeaderMap) {
    for name in [X_REQUEST_ID, TRACEPARENT, GRPC_TIMEOUT, REQUEST_TIMEOUT] {
        if let Some(value) = headers.get_mut(name) {
            value.set_sensitive(true);
        }
    }
}

/// The last number that was sent as a field value, kept encoded: most requests have the same timeout as the one before.
#[derive(Debug)]
pub struct LastNumber(RefCell<(NonZeroU64, HeaderValue)>);

impl Default for LastNumber {
    fn default() -> Self {
        Self(RefCell::new((NonZeroU64::MIN, HeaderValue::from_static("1"))))
    }
}

impl LastNumber {
    pub fn value(&self, number: NonZeroU64) -> HeaderValue {
        let mut last = self.0.borrow_mut();
        if last.0 != number {
            *last = (number, HeaderValue::from(number.get()));
        }
        last.1.clone()
    }
}

/// The client, for `x-forwarded-*`.
#[derive(Debug)]
pub struct ForwardedClient<'a> {
    pub address: &'a HeaderValue,
    pub proto: &'static str,
    pub host: Option<HeaderValue>,
}

/// Sets or extends `x-forwarded-for`, `-proto` and `-host` as the configuration says.
pub fn set_forwarded(headers: &mut HeaderMap, how: ForwardedHeaders, client: ForwardedClient<'_>) {
    match how {
        ForwardedHeaders::Off => {}
        ForwardedHeaders::Replace => {
            headers.insert(X_FORWARDED_FOR, client.address.clone());
            headers.insert(X_FORWARDED_PROTO, HeaderValue::from_static(client.proto));
            match client.host {
                Some(host) => headers.insert(X_FORWARDED_HOST, host),
                None => headers.remove(X_FORWARDED_HOST),
            };
        }
        ForwardedHeaders::Append => {
            append_member(headers, X_FORWARDED_FOR, client.address);
            // These describe the outermost hop: the first proxy that set them is right.
            headers.entry(X_FORWARDED_PROTO).or_insert(HeaderValue::from_static(client.proto));
            if let Some(host) = client.host {
                headers.entry(X_FORWARDED_HOST).or_insert(host);
            }
        }
    }
}

/// Appends to a list field and joins it in one line: not every service reads the second.
fn append_member(headers: &mut HeaderMap, name: HeaderName, member: &HeaderValue) {
    let mut list: Vec<u8> = Vec::new();
    for value in headers.get_all(&name) {
        list.extend_from_slice(value.as_bytes());
        list.extend_from_slice(b", ");
    }
    list.extend_from_slice(member.as_bytes());
    if let Ok(value) = HeaderValue::from_bytes(&list) {
        headers.insert(name, value);
    }
}

/// Joins the Cookie fields of HTTP/2 into one for HTTP/1.1 (RFC 9113 §8.2.3).
pub fn join_cookies(headers: &mut HeaderMap) {
    if headers.get_all(COOKIE).iter().nth(1).is_none() {
        return;
    }
    let crumbs: Vec<&[u8]> = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if let Ok(joined) = HeaderValue::from_bytes(&crumbs.join(&b"; "[..])) {
        headers.insert(COOKIE, joined);
    }
}

/// The value of a cookie. HTTP/2 clients may send each in a field of its own (RFC 9113 §8.2.3).
pub fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let fields = headers.get_all(COOKIE).iter().filter_map(|value| value.to_str().ok());
    let pairs = fields.flat_map(|value| value.split(';')).filter_map(|pair| pair.trim().split_once('='));
    pairs.into_iter().find(|(known, _)| *known == name).map(|(_, value)| value)
}

/// Whether a message is gRPC, which has its own timeout field and its own status.
pub fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(http::header::CONTENT_TYPE).is_some_and(|value| {
        let value = value.as_bytes();
        value.starts_with(b"application/grpc") && matches!(value.get(16), None | Some(b'+' | b';' | b' '))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cause::Cause;

    fn headers(fields: &[(&str, &str)]) -> HeaderMap {
        fields
            .iter()
            .map(|(n, v)| (n.parse::<HeaderName>().unwrap(), HeaderValue::from_str(v).unwrap()))
            .collect()
    }

    fn removed(map: &mut HeaderMap) -> Result<HopByHop, ProxyError> {
        let present = FieldSet::of(map);
        remove_hop_by_hop(map, present)
    }

    #[test]
    fn hop_by_hop_fields_are_removed_and_others_stay() {
        let mut map = headers(&[
            ("connection", "keep-alive, X-Hop, close"),
            ("keep-alive", "timeout=5"),
            ("x-hop", "1"),
            ("proxy-connection", "keep-alive"),
            ("te", "gzip, trailers"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "websocket"),
            ("trailer", "x-sum"),
            ("x-end", "1"),
        ]);
        let hop_by_hop = removed(&mut map).unwrap();
        assert!(hop_by_hop.upgrade.is_none(), "Connection did not name it");
        assert_eq!(map, headers(&[("trailer", "x-sum"), ("x-end", "1"), ("te", "trailers")]));
    }

    #[test]
    fn upgrades_are_returned_but_h2c_is_dropped() {
        let mut map = headers(&[("connection", "Upgrade"), ("upgrade", "websocket")]);
        assert_eq!(removed(&mut map).unwrap().upgrade.unwrap(), "websocket");
        assert!(map.is_empty());
        let mut map = headers(&[
            ("connection", "Upgrade, HTTP2-Settings"),
            ("upgrade", "h2c"),
            ("http2-settings", "AAMAAABk"),
        ]);
        assert!(removed(&mut map).unwrap().upgrade.is_none());
        assert!(map.is_empty());
    }

    #[test]
    fn connection_cannot_remove_protected_fields() {
        for name in
            ["Host", "content-length", "Authorization", "traceparent", "x-outrigger-retry", "X-Forwarded-For"]
        {
            let mut map = headers(&[("connection", name)]);
            assert_eq!(removed(&mut map).unwrap_err().cause, Cause::Malformed, "{name}");
        }
    }

    #[test]
    fn forwarded_fields_are_replaced_or_appended() {
        let address = HeaderValue::from_static("10.0.0.9");
        let client = || ForwardedClient {
            address: &address,
            proto: "http",
            host: Some(HeaderValue::from_static("shop")),
        };
        let mut map = headers(&[
            ("x-forwarded-for", "1.1.1.1"),
            ("x-forwarded-for", "2.2.2.2"),
            ("x-forwarded-proto", "https"),
        ]);
        set_forwarded(&mut map, ForwardedHeaders::Append, client());
        assert_eq!(map[X_FORWARDED_FOR], "1.1.1.1, 2.2.2.2, 10.0.0.9");
        assert_eq!(map[X_FORWARDED_PROTO], "https");
        assert_eq!(map[X_FORWARDED_HOST], "shop");
        set_forwarded(&mut map, ForwardedHeaders::Replace, client());
        assert_eq!(map[X_FORWARDED_FOR], "10.0.0.9");
        assert_eq!(map[X_FORWARDED_PROTO], "http");
    }

    #[test]
    fn grpc_is_detected_by_its_content_type() {
        for (value, grpc) in [
            ("application/grpc", true),
            ("application/grpc+proto", true),
            ("application/grpc-web", false),
            ("application/json", false),
        ] {
            assert_eq!(is_grpc(&headers(&[("content-type", value)])), grpc, "{value}");
        }
    }
}
