//! The header fields of HTTP/2 messages: which are rejected, and which are never sent.

use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{CONNECTION, TE, TRANSFER_ENCODING, UPGRADE},
};

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

/// Whether no value starts or ends with whitespace (RFC 9113 §8.2.1). `h2` rejects everything else that is forbidden.
pub fn are_valid(fields: &HeaderMap) -> bool {
    fields.values().all(is_valid)
}

fn is_valid(value: &HeaderValue) -> bool {
    let blank = |byte: &u8| matches!(byte, b' ' | b'\t');
    let bytes = value.as_bytes();
    !bytes.first().is_some_and(blank) && !bytes.last().is_some_and(blank)
}

/// Removes connection-specific fields of HTTP/1.1 (RFC 9113 §8.2.2).
pub fn strip_connection_fields(fields: &mut HeaderMap) {
    for name in [KEEP_ALIVE, PROXY_CONNECTION, TRANSFER_ENCODING, UPGRADE] {
        fields.remove(name);
    }
    // `trailers` is the only value that HTTP/2 allows, and it must be the only one.
    if fields.get_all(TE).iter().any(|value| value != "trailers")
        || fields.get_all(TE).iter().nth(1).is_some()
    {
        let trailers = fields.get_all(TE).iter().any(accepts_trailers);
        fields.remove(TE);
        if trailers {
            fields.insert(TE, HeaderValue::from_static("trailers"));
        }
    }
    if fields.contains_key(CONNECTION) {
        let options: Vec<HeaderValue> = fields.get_all(CONNECTION).iter().cloned().collect();
        fields.remove(CONNECTION);
        for option in options.iter().flat_map(|value| value.as_bytes().split(|byte| *byte == b',')) {
            if let Ok(name) = HeaderName::from_bytes(option.trim_ascii()) {
                fields.remove(name);
            }
        }
    }
}

fn accepts_trailers(value: &HeaderValue) -> bool {
    value.as_bytes().split(|byte| *byte == b',').any(|one| one.trim_ascii().eq_ignore_ascii_case(b"trailers"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_neither_starts_nor_ends_with_whitespace() {
        for (value, valid) in [
            ("a", true),
            ("", true),
            ("a b", true),
            (" a", false),
            ("a ", false),
            ("\ta", false),
            ("a\t", false),
        ] {
            let fields = HeaderMap::from_iter([(TE, HeaderValue::from_bytes(value.as_bytes()).unwrap())]);
            assert_eq!(are_valid(&fields), valid, "{value:?}");
        }
    }

    #[test]
    fn connection_specific_fields_are_not_sent() {
        let mut fields = HeaderMap::new();
        for (name, value) in [
            ("connection", "x-hop, close"),
            ("x-hop", "1"),
            ("keep-alive", "timeout=5"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("proxy-connection", "close"),
            ("te", "deflate"),
            ("x-end", "1"),
        ] {
            fields.insert(name, HeaderValue::from_static(value));
        }
        strip_connection_fields(&mut fields);
        assert_eq!(fields.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["x-end"]);
        fields.insert(TE, HeaderValue::from_static("trailers"));
        strip_connection_fields(&mut fields);
        assert!(fields.contains_key(TE));
    }

    /// Each of them may be repeated, which `h2` would not send.
    #[test]
    fn repeated_connection_specific_fields_are_not_sent() {
        let mut fields = HeaderMap::new();
        for (name, value) in [
            ("connection", b"close".as_slice()),
            ("connection", b"\xff, x-first"),
            ("connection", b" X-Second ,"),
            ("x-first", b"1"),
            ("x-second", b"1"),
            ("te", b"trailers"),
            ("te", b"deflate"),
            ("upgrade", b"a"),
            ("upgrade", b"b"),
        ] {
            fields.append(name, HeaderValue::from_bytes(value).unwrap());
        }
        strip_connection_fields(&mut fields);
        assert_eq!(fields.iter().collect::<Vec<_>>(), [(&TE, &HeaderValue::from_static("trailers"))]);
        for (values, expected) in [
            (&["deflate, Trailers"][..], Some("trailers")),
            (&["trailers", "trailers"], Some("trailers")),
            (&["deflate", "gzip"], None),
        ] {
            let mut fields = HeaderMap::new();
            for value in values {
                fields.append(TE, HeaderValue::from_static(value));
            }
            strip_connection_fields(&mut fields);
            let left: Vec<_> = fields.get_all(TE).iter().map(|value| value.to_str().unwrap()).collect();
            assert_eq!(left, expected.into_iter().collect::<Vec<_>>(), "{values:?}");
        }
    }
}
