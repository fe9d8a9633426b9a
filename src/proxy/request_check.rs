//! Requests that the proxy refuses: those that two parsers could read differently, and request loops.

use std::net::Ipv6Addr;

use http::{
    HeaderMap, Method, Request, Version,
    header::{CONTENT_LENGTH, HOST, TRANSFER_ENCODING, VIA},
};

use super::error::ProxyError;
use crate::{
    cause::Cause,
    field_set::{Field, FieldSet},
    http1::framing::content_length,
};

/// Refuses requests that two parsers could read differently and the HTTP parser accepts.
pub fn check<B>(request: &Request<B>, present: FieldSet) -> Result<(), ProxyError> {
    let headers = request.headers();
    let target = request.uri();
    let by_http2 = request.version() == Version::HTTP_2;
    let mut hosts = headers.get_all(HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err(ProxyError::malformed("more than one Host field (RFC 9112 §3.2)"));
    }
    if host.is_none() && request.version() == Version::HTTP_11 {
        return Err(ProxyError::malformed("no Host field (RFC 9112 §3.2)"));
    }
    if let Some(host) = host {
        let text = host.to_str().map_err(|_| ProxyError::malformed("the Host field is not text"))?;
        if !is_host(text) {
            if !(text.is_empty() && request.uri().authority().is_some()) {
                return Err(ProxyError::malformed("the Host field is not a host"));
            }
        } else if by_http2
            && request
                .uri()
                .authority()
                .is_some_and(|authority| !authority.as_str().eq_ignore_ascii_case(text))
        {
            return Err(ProxyError::malformed(":authority and host differ (RFC 9113 §8.3.1)"));
        }
    }
    if request.uri().authority().is_some_and(|authority| authority.as_str().contains('@')) {
        return Err(ProxyError::malformed("the request target contains user information (`user@`)"));
    }
    if present.has(Field::ContentLength) {
        if headers.get_all(CONTENT_LENGTH).iter().nth(1).is_some() {
            return Err(ProxyError::malformed("more than one Content-Length field"));
        }
        // `h2` reads an empty one as 0.
        if content_length(headers).is_err() {
            return Err(ProxyError::malformed("Content-Length is not one number (RFC 9110 §8.6)"));
        }
    }
    if request.version() == Version::HTTP_10 && present.has(Field::TransferEncoding) {
        return Err(ProxyError::malformed("Transfer-Encoding in an HTTP/1.0 request (RFC 9112 §6.1)"));
    }
    if present.has(Field::Expect)
        && request.version() != Version::HTTP_10
        && let Some(expect) = headers.get(http::header::EXPECT)
        && !expect.as_bytes().eq_ignore_ascii_case(b"100-continue")
    {
        return Err(ProxyError::malformed("the Expect field is not `100-continue` (RFC 9110 §10.1.1)")
            .with_status(http::StatusCode::EXPECTATION_FAILED));
    }
    if !by_http2
        && request.method() != Method::CONNECT
        && target.authority().is_some()
        && target.scheme().is_none()
    {
        return Err(ProxyError::malformed("the target is neither a path nor a URI (RFC 9112 §3.2)"));
    }
    if target.scheme_str().is_some_and(|scheme| scheme != "http" && scheme != "https") {
        return Err(ProxyError::malformed("the target's scheme is not http"));
    }
    if target.authority().is_some_and(|authority| !has_valid_port(authority)) {
        return Err(ProxyError::malformed("the target's port is not a number up to 65535"));
    }
    if target.authority().is_some_and(|authority| !has_valid_host(authority)) {
        return Err(ProxyError::malformed(
            "the target's host is empty, or has something in brackets that is not an IPv6 address without a zone",
        ));
    }
    only_chunked(headers, present)?;
    let asterisk = request.uri().path() == "*";
    if asterisk && request.method() != Method::OPTIONS {
        return Err(ProxyError::malformed("the target * is for OPTIONS only (RFC 9112 §3.2.4)"));
    }
    Ok(())
}

/// The bytes that most host names consist of.
const IN_PLAIN_NAME: [bool; 256] = {
    let (mut table, mut byte) = ([false; 256], 0);
    while byte < 256 {
        let ascii = byte as u8;
        table[byte] = ascii.is_ascii_alphanumeric() || ascii == b'-' || ascii == b'.';
        byte += 1;
    }
    table
};

/// Whether a text is `host[:port]`. Most hosts are recognised without parsing.
fn is_host(text: &str) -> bool {
    let bytes = text.as_bytes();
    let name = bytes.iter().position(|byte| !IN_PLAIN_NAME[usize::from(*byte)]).unwrap_or(bytes.len());
    let plain = match &bytes[name..] {
        [] => true,
        [b':', port @ ..] => {
            let fits = port.len() <= 4 || (port.len() == 5 && port <= b"65535".as_slice());
            fits && port.iter().all(u8::is_ascii_digit)
        }
        _ => false,
    };
    if plain && name > 0 {
        return true;
    }
    let authority = text.parse::<http::uri::Authority>();
    !text.contains('@')
        && authority.is_ok_and(|authority| has_valid_port(&authority) && has_valid_host(&authority))
}

/// Whether the host is not empty, and an IPv6 address if it is in brackets. A zone (RFC 6874) has a meaning on the
/// client's machine only.
fn has_valid_host(authority: &http::uri::Authority) -> bool {
    let host = authority.host();
    let Some(literal) = host.strip_prefix('[') else { return !host.is_empty() };
    literal.strip_suffix(']').is_some_and(|literal| literal.parse::<Ipv6Addr>().is_ok())
}

/// Whether nothing or a valid port follows the host. An empty port is the default one (RFC 3986 §3.2.3).
fn has_valid_port(authority: &http::uri::Authority) -> bool {
    let behind_host = authority.as_str().strip_prefix(authority.host()).unwrap_or_default();
    // Rust's number parser accepts a sign.
    let digits = || behind_host.bytes().skip(1).all(|byte| byte.is_ascii_digit());
    matches!(behind_host, "" | ":") || (digits() && authority.port_u16().is_some())
}

/// Refuses transfer codings other than exactly `chunked`: another coding would not be decoded, and the body would be
/// forwarded encoded but not labelled so (RFC 9112 §6.1).
pub fn only_chunked(headers: &HeaderMap, present: FieldSet) -> Result<(), ProxyError> {
    if !present.has(Field::TransferEncoding) {
        return Ok(());
    }
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    match (codings.next(), codings.next()) {
        (None, _) => Ok(()),
        (Some(coding), None) if coding.as_bytes().eq_ignore_ascii_case(b"chunked") => Ok(()),
        _ => Err(ProxyError::malformed("a transfer coding that is not just `chunked` (RFC 9112 §6.1)")),
    }
}

/// Refuses a request that has passed this proxy before.
pub fn check_loop(headers: &HeaderMap, present: FieldSet, pseudonym: &str) -> Result<(), ProxyError> {
    if !present.has(Field::Via) {
        return Ok(());
    }
    let seen = headers
        .get_all(VIA)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|member| member.split_ascii_whitespace().nth(1) == Some(pseudonym));
    if seen { Err(ProxyError::new(Cause::Loop, format!("Via already names {pseudonym}"))) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};

    use super::*;

    #[test]
    fn a_request_loop_is_refused() {
        let via = |value| (HeaderName::from_static("via"), HeaderValue::from_static(value));
        let map: HeaderMap = [via("1.1 other, 1.1 outrigger-o-1"), via("2 third")].into_iter().collect();
        assert!(check_loop(&map, FieldSet::of(&map), "outrigger-o-1").is_err());
        assert!(check_loop(&map, FieldSet::of(&map), "outrigger-o-2").is_ok());
        assert!(check_loop(&map, FieldSet::of(&map), "third").is_err());
    }

    #[test]
    fn a_content_length_is_one_number() {
        let check = |values: &[&'static str]| {
            let mut request = Request::builder().version(Version::HTTP_2).method("POST").uri("http://a/");
            for value in values {
                request = request.header(CONTENT_LENGTH, *value);
            }
            let request = request.body(()).unwrap();
            super::check(&request, FieldSet::of(request.headers()))
        };
        for good in ["0", "7", "18446744073709551615"] {
            assert!(check(&[good]).is_ok(), "{good}");
        }
        for bad in [
            &[""][..],
            &["x"],
            &["+1"],
            &["1x"],
            &["18446744073709551616"],
            &["1, 2"],
            &["1", "2"],
            &["1", ""],
        ] {
            assert_eq!(check(bad).map_err(|error| error.cause), Err(Cause::Malformed), "{bad:?}");
        }
    }

    #[test]
    fn a_host_is_a_name_and_a_port() {
        for good in [
            "a",
            "a.b-c:1",
            "10.0.0.1:8080",
            "a:65535",
            "[::1]",
            "[::1]:80",
            "a_b",
            "a:0001",
            "a:",
            "[::1]:",
            "a_b:",
        ] {
            assert!(is_host(good), "{good}");
        }
        for bad in [
            "",
            ":",
            "a:b",
            "a:65536",
            "a:8o",
            "a@b",
            "a b",
            "a/b",
            "[::1",
            "a:80:80",
            "a:+1",
            "a_b:+1",
            "[::1]:+1",
            "[::1%zone]",
            "[fe80::1%25eth0]:80",
            "[v1.a]",
            "[a]",
        ] {
            assert!(!is_host(bad), "{bad}");
        }
    }
}
