//! The bytes of field names and values, told by a table: `http` would copy each field to tell.

/// In a field name of HTTP/2: a token (RFC 9110 §5.6.2) in lower case (RFC 9113 §8.2.1).
const NAME: u8 = 1;
/// In a field value: HTAB, what is visible, SP, and bytes above ASCII (RFC 9110 §5.5).
const VALUE: u8 = 2;

/// `http` takes no longer names.
const LONGEST_NAME: usize = u16::MAX as usize;

const KINDS: [u8; 256] = {
    let (mut kinds, mut at) = ([0; 256], 0);
    while at < 256 {
        let byte = at as u8;
        if byte.is_ascii_lowercase()
            || byte.is_ascii_digit()
            || matches!(
                byte,
                b'!' | b'#'
                    | b'$'
                    | b'%'
                    | b'&'
                    | b'\''
                    | b'*'
                    | b'+'
                    | b'-'
                    | b'.'
                    | b'^'
                    | b'_'
                    | b'`'
                    | b'|'
                    | b'~'
            )
        {
            kinds[at] |= NAME;
        }
        if byte == b'\t' || (byte >= b' ' && byte != 0x7f) {
            kinds[at] |= VALUE;
        }
        at += 1;
    }
    kinds
};

pub fn is_field_name(name: &[u8]) -> bool {
    !name.is_empty() && name.len() <= LONGEST_NAME && are_all(name, NAME)
}

pub fn is_field_value(value: &[u8]) -> bool {
    are_all(value, VALUE)
}

fn are_all(bytes: &[u8], kind: u8) -> bool {
    bytes.iter().all(|byte| KINDS[usize::from(*byte)] & kind != 0)
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};
    use proptest::prelude::*;

    use super::*;

    /// By `http`, but for the quotation mark: it is no token, and some versions of `http` take it.
    fn is_name_to_http(name: &[u8]) -> bool {
        HeaderName::from_lowercase(name).is_ok() && !name.contains(&b'"')
    }

    #[test]
    fn each_byte_is_judged_as_http_does() {
        for byte in 0..=u8::MAX {
            for text in [&[byte][..], &[b'a', byte], &[byte, b'a']] {
                assert_eq!(is_field_name(text), is_name_to_http(text), "{text:?}");
                assert_eq!(is_field_value(text), HeaderValue::from_bytes(text).is_ok(), "{text:?}");
            }
        }
        for length in [0, 64, 65, LONGEST_NAME, LONGEST_NAME + 1] {
            let name = vec![b'a'; length];
            assert_eq!(is_field_name(&name), is_name_to_http(&name), "{length}");
        }
    }

    proptest! {
        #[test]
        fn texts_are_judged_as_http_does(
            any in prop::collection::vec(any::<u8>(), 0..100),
            name in "[a-z0-9!#$%&'*+.^_`|~-]{1,80}",
            value in "[\t -~]{0,80}",
        ) {
            for text in [&any[..], name.as_bytes(), value.as_bytes()] {
                prop_assert_eq!(is_field_name(text), is_name_to_http(text));
                prop_assert_eq!(is_field_value(text), HeaderValue::from_bytes(text).is_ok());
            }
        }
    }
}
