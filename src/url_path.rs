//! The normal form in which paths are matched.

use std::borrow::Cow;

/// The normal form of a path (RFC 3986 §6.2.2, and empty segments collapsed), without the query.
///
/// Percent-encoded unreserved characters are decoded, other triplets get upper-case digits, a lone `%` becomes
/// `%25`; then `//` becomes `/` and `.` and `..` segments are resolved, never above the root. `%2F` stays: an encoded
/// slash is no separator. A target that does not begin with `/` (`*`, the empty path of CONNECT) is unchanged.
///
/// Allocates only if the path is not normal yet. Idempotent.
pub fn normalise(path: &str) -> Cow<'_, str> {
    let path = path.find('?').map_or(path, |at| &path[..at]);
    if is_normal(path) { Cow::Borrowed(path) } else { Cow::Owned(without_dots(&decode(path))) }
}

fn is_normal(path: &str) -> bool {
    let bytes = path.as_bytes();
    if bytes.first() != Some(&b'/') {
        return true;
    }
    let mut after_slash = false;
    for (at, byte) in bytes.iter().enumerate() {
        let is_normal_here = match byte {
            b'/' => !after_slash,
            b'.' => !after_slash || !matches!(segment(&bytes[at..]), b"." | b".."),
            b'%' => matches!(triplet(&bytes[at..]), Some((decoded, true)) if !is_unreserved(decoded)),
            _ => true,
        };
        if !is_normal_here {
            return false;
        }
        after_slash = *byte == b'/';
    }
    true
}

/// The bytes before the next slash.
fn segment(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == b'/').next().unwrap_or_default()
}

/// The byte encoded by `%XX` at the beginning, and whether its digits are upper case.
fn triplet(bytes: &[u8]) -> Option<(u8, bool)> {
    let [b'%', high, low, ..] = bytes else { return None };
    let digit = |byte: &u8| char::from(*byte).to_digit(16).and_then(|value| u8::try_from(value).ok());
    let upper = !high.is_ascii_lowercase() && !low.is_ascii_lowercase();
    Some((digit(high)? << 4 | digit(low)?, upper))
}

/// RFC 3986 §2.3.
fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~')
}

fn decode(path: &str) -> String {
    let mut out = String::with_capacity(path.len() + 2);
    let mut rest = path;
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        match triplet(rest.as_bytes()) {
            Some((decoded, _)) if is_unreserved(decoded) => {
                out.push(char::from(decoded));
                rest = &rest[3..];
            }
            Some(_) => {
                out.push_str(&rest[..3].to_ascii_uppercase());
                rest = &rest[3..];
            }
            // Otherwise it could form a new triplet with characters that are decoded after it.
            None => {
                out.push_str("%25");
                rest = &rest[1..];
            }
        }
    }
    out.push_str(rest);
    out
}

fn without_dots(path: &str) -> String {
    let mut segments: Vec<&str> = Vec::new();
    let mut ends_open = false;
    for segment in path.split('/').skip(1) {
        ends_open = matches!(segment, "" | "." | "..");
        match segment {
            "" | "." => {}
            ".." => {
                segments.pop();
            }
            _ => segments.push(segment),
        }
    }
    let mut out = String::with_capacity(path.len());
    for segment in &segments {
        out.push('/');
        out.push_str(segment);
    }
    if ends_open || segments.is_empty() {
        out.push('/');
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn paths_have_one_normal_form() {
        for (path, normal) in [
            ("/", "/"),
            ("", ""),
            ("*", "*"),
            ("/a/b", "/a/b"),
            ("/a/b/?x=/../y", "/a/b/"),
            ("//a///b", "/a/b"),
            ("/a/./b/", "/a/b/"),
            ("/a/../b", "/b"),
            ("/a/b/..", "/a/"),
            ("/a/.", "/a/"),
            ("/../../x", "/x"),
            ("/..", "/"),
            ("/a/%2e%2E/b", "/b"),
            ("/a/%2e./b", "/b"),
            ("/%61bc", "/abc"),
            ("/a%2fb", "/a%2Fb"),
            ("/a%2Fb", "/a%2Fb"),
            ("/%252e%252e/", "/%252e%252e/"),
            ("/%", "/%25"),
            ("/%zz", "/%25zz"),
            ("/%%32e", "/%252e"),
            ("/.well-known/x", "/.well-known/x"),
            ("/a/...", "/a/..."),
            ("/ä/%C3%a4", "/ä/%C3%A4"),
        ] {
            assert_eq!(normalise(path), normal, "{path}");
        }
    }

    #[test]
    fn a_normal_path_is_not_copied() {
        for path in ["/", "/v1/charge/42", "/a.b/..c/%2F", "/x?y=//"] {
            assert!(matches!(normalise(path), Cow::Borrowed(_)), "{path}");
        }
    }

    fn paths() -> impl Strategy<Value = String> {
        let part = prop_oneof![
            Just("/"),
            Just("."),
            Just(".."),
            Just("%2e"),
            Just("%2F"),
            Just("%2f"),
            Just("%"),
            Just("%4"),
            Just("%25"),
            Just("1"),
            Just("e"),
            Just("a"),
            Just("ü"),
        ];
        proptest::collection::vec(part, 0..12).prop_map(|parts| format!("/{}", parts.concat()))
    }

    proptest! {
        #[test]
        fn normalising_twice_changes_nothing(path in paths()) {
            let once = normalise(&path).into_owned();
            prop_assert!(is_normal(&once), "{path} -> {once}");
            prop_assert_eq!(normalise(&once).into_owned(), once.clone());
            prop_assert!(once.starts_with('/') && !once.contains("//") && !once.contains("/../"));
        }

        #[test]
        fn any_text_is_accepted(path in any::<String>()) {
            let once = normalise(&path).into_owned();
            prop_assert_eq!(normalise(&once), once.as_str());
        }
    }
}
