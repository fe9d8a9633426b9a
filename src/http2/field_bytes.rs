//! Checks the bytes of field names and values with a table: `http` would copy each field to check it.

/// In a field name of HTTP/2: a token (RFC 9110 §5.6.2) in lower case (RFC 9113 §8.2.1).
const NAME: u8 = 1;
/// In a field value: HTAB, visible characters, SP, and bytes above ASCII (RFC 9110 §5.5).
const VALUE: u8 = 2;

/// The longest name that `http` accepts.
const LONGEST_NAME: usize = u16::MAX as usize;

const BYTE_CLASSES: [u8; 256] = {
    let (mut classes, mut at) = ([0; 256], 0);
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
            classes[at] |= NAME;
        }
        if byte == b'\t' || (byte >= b' ' && byte != 0x7f) {
            classes[at] |= VALUE;
        }
        at += 1;
    }
    classes
};

pub fn is_field_name(name: &[u8]) -> bool {
    !name.is_empty() && name.len() <= LONGEST_NAME && are_all(name, NAME)
}

pub fn is_field_value(value: &[u8]) -> bool {
    are_all(value, VALUE)
}

fn are_all(bytes: &[u8], class: u8) -> bool {
    bytes.iter().all(|byte| BYTE_CLASSES[usize::from(*byte)] & class != 0)
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};
    use proptest::prelude::*;

    use super::*;

    /// As `http` decides, except for the quotation mark: it is not a token character, but some versions of `http`
    /// accept it.
    fn is_name_to_http(name: &[u8]) -> bool {
        HeaderName::from_lowercase(name).is_ok() && !name.contains(&b'"')
    }

    #[test]
    fn each_byte_is_classified_as_by_http() {
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
        fn strings_are_classified_as_by_http(
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
