//! The header fields of HTTP/2 messages: what is refused, and what is never sent.

use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{CONNECTION, TE, TRANSFER_ENCODING, UPGRADE},
};

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

/// Whether no value begins or ends with a blank (RFC 9113 §8.2.1). All else that is forbidden, `h2` refuses.
pub fn are_valid(fields: &HeaderMap) -> bool {
    fields.values().all(is_valid)
}

fn is_valid(value: &HeaderValue) -> bool {
    let blank = |byte: &u8| matches!(byte, b' ' | b'\t');
    let bytes = value.as_bytes();
    !bytes.first().is_some_and(blank) && !bytes.last().is_some_and(blank)
}

/// Removes what HTTP/2 does not have: fields about one connection of HTTP/1.1 (RFC 9113 §8.2.2).
pub fn strip_connection_fields(fields: &mut HeaderMap) {
    for name in [KEEP_ALIVE, PROXY_CONNECTION, TRANSFER_ENCODING, UPGRADE] {
        fields.remove(name);
    }
    if fields.get(TE).is_some_and(|value| value != "trailers") {
        fields.remove(TE);
    }
    if let Some(options) = fields.remove(CONNECTION) {
        for option in options.to_str().unwrap_or_default().split(',') {
            fields.remove(option.trim());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_neither_begins_nor_ends_with_a_blank() {
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
    fn fields_of_one_connection_are_not_sent() {
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
}
