//! Request targets (RFC 9112 §3.2), including those that RFC 3986 forbids though every server accepts them: quotes,
//! angle brackets, backquotes, bytes above 0x7f. Routes match their percent-encoded form; they are forwarded
//! unchanged.

use bytes::Bytes;
use http::{Method, Uri, uri::PathAndQuery};

use super::head::HeadError;

/// The limit of `Uri`.
const MAX_TARGET: usize = u16::MAX as usize - 1;
/// The longest target that an error shows.
const MAX_SHOWN: usize = 200;

/// Path and query exactly as the client sent them, if they differ from the form in `Uri`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawTarget(Bytes);

impl RawTarget {
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// The target of a request.
#[derive(Debug)]
pub struct RequestTarget {
    pub uri: Uri,
    pub raw: Option<RawTarget>,
}

impl RequestTarget {
    /// Parses a target. The method decides what an absolute form without a path means.
    ///
    /// # Errors
    ///
    /// If it has a fragment, or no server would accept it.
    pub fn parse(method: &Method, target: Bytes, sent: &[u8]) -> Result<Self, HeadError> {
        match Uri::from_maybe_shared(target) {
            Ok(uri) => Ok(Self { uri: validate(uri, method, sent)?, raw: None }),
            Err(_) => lenient(method, sent),
        }
    }
}

/// Rejects a fragment, which `Uri` would drop silently.
fn validate(uri: Uri, method: &Method, sent: &[u8]) -> Result<Uri, HeadError> {
    if sent.first() == Some(&b'/') {
        let kept = uri.path_and_query().map_or(0, |path| path.as_str().len());
        return if kept == sent.len() { Ok(uri) } else { Err(HeadError::Fragment) };
    }
    if sent.contains(&b'#') {
        return Err(HeadError::Fragment);
    }
    if *method == Method::OPTIONS && path_start(sent) == Some(sent.len()) {
        // This is about the server as a whole, which only an absolute form without a path expresses (RFC 9112
        // §3.2.4).
        let mut parts = uri.into_parts();
        parts.path_and_query = Some(PathAndQuery::from_static("*"));
        return Uri::from_parts(parts).map_err(|_| HeadError::Target);
    }
    Ok(uri)
}

/// Where path and query start in an origin form or an absolute form.
fn path_start(target: &[u8]) -> Option<usize> {
    if target.first() == Some(&b'/') {
        return Some(0);
    }
    let scheme = target.windows(3).position(|three| three == b"://")?;
    let authority = target.get(scheme + 3..)?;
    let end = authority.iter().position(|byte| matches!(byte, b'/' | b'?' | b'#'));
    Some(scheme + 3 + end.unwrap_or(authority.len()))
}

/// Parses a target whose path or query has bytes that `Uri` cannot hold.
fn lenient(method: &Method, sent: &[u8]) -> Result<RequestTarget, HeadError> {
    let start = path_start(sent).ok_or(HeadError::Target)?;
    let (before, path) = sent.split_at(start);
    if path.contains(&b'#') {
        return Err(HeadError::Fragment);
    }
    let mut encoded = before.to_vec();
    for byte in path {
        match byte {
            b'"' | b'<' | b'>' | b'`' | 0x80.. => {
                encoded.extend_from_slice(format!("%{byte:02X}").as_bytes())
            }
            _ => encoded.push(*byte),
        }
    }
    if encoded.len() > MAX_TARGET {
        return Err(HeadError::TooLarge);
    }
    let uri = Uri::try_from(&encoded[..]).map_err(|_| HeadError::Target)?;
    let uri = validate(uri, method, &encoded)?;
    let slash: &[u8] = if path.starts_with(b"?") { b"/" } else { b"" };
    Ok(RequestTarget { uri, raw: Some(RawTarget([slash, path].concat().into())) })
}

/// The request line of a rejected request, as far as it can be parsed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RejectedRequestLine {
    pub method: Option<Method>,
    /// Safe to log: printable, truncated, without the query, which may hold secrets.
    pub target: Option<String>,
    /// Its version is HTTP/1.0.
    pub http10: bool,
}

impl RejectedRequestLine {
    /// Parses what there is of a request.
    pub fn parse(request: &[u8]) -> Self {
        let Some(line) = RequestLine::of(request) else { return Self::default() };
        Self {
            method: Method::from_bytes(line.method).ok(),
            target: Some(loggable_target(line.target)),
            http10: line.version == b"HTTP/1.0",
        }
    }
}

/// A request line, split at its first and its last space.
struct RequestLine<'a> {
    method: &'a [u8],
    target: &'a [u8],
    version: &'a [u8],
}

impl<'a> RequestLine<'a> {
    fn of(request: &'a [u8]) -> Option<Self> {
        let start = request.iter().position(|byte| !matches!(byte, b'\r' | b'\n'))?;
        let line = request[start..].split(|byte| *byte == b'\n').next()?;
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let method = line.iter().position(|byte| *byte == b' ')?;
        let (method, rest) = (&line[..method], &line[method + 1..]);
        let (target, version) = match rest.iter().rposition(|byte| *byte == b' ') {
            Some(at) if rest[at + 1..].starts_with(b"HTTP/") => (&rest[..at], &rest[at + 1..]),
            _ => (rest, &[][..]),
        };
        Some(Self { method, target, version })
    }
}

/// A more precise error for a request line.
pub fn refine_error(request: &[u8], error: HeadError) -> HeadError {
    let (HeadError::StartLine | HeadError::Version, Some(line)) = (error, RequestLine::of(request)) else {
        return error;
    };
    match line.target.iter().find(|byte| **byte <= b' ' || **byte == 0x7f) {
        Some(b' ') if !line.version.is_empty() => HeadError::SpaceInTarget,
        Some(byte) if *byte != b' ' => HeadError::TargetByte(*byte),
        _ => error,
    }
}

/// A request whose target is not UTF-8, with its non-ASCII bytes replaced, and the original target. `None`: the
/// target is not the reason for which it failed to parse.
pub fn mask_non_ascii_target(request: &[u8]) -> Option<(Vec<u8>, Bytes)> {
    let target = RequestLine::of(request)?.target;
    if std::str::from_utf8(target).is_ok() {
        return None;
    }
    let start = target.as_ptr().addr().checked_sub(request.as_ptr().addr())?;
    let mut masked = request.to_vec();
    for byte in masked.get_mut(start..start + target.len())? {
        if !byte.is_ascii() {
            *byte = b'x';
        }
    }
    Some((masked, Bytes::copy_from_slice(target)))
}

/// A target that is safe to log: printable, truncated, without the query, which may hold secrets.
pub fn loggable_target(target: &[u8]) -> String {
    let query = target.iter().position(|byte| *byte == b'?');
    let path = &target[..query.unwrap_or(target.len())];
    let mut shown = path[..path.len().min(MAX_SHOWN)].escape_ascii().to_string();
    if path.len() > MAX_SHOWN {
        shown.push('…');
    }
    if query.is_some() {
        shown.push_str("?…");
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(method: &str, target: &[u8]) -> Result<(String, Option<Vec<u8>>), HeadError> {
        let method = Method::from_bytes(method.as_bytes()).unwrap();
        let target = RequestTarget::parse(&method, Bytes::copy_from_slice(target), target)?;
        Ok((target.uri.to_string(), target.raw.map(|raw| raw.as_bytes().to_vec())))
    }

    #[test]
    fn lenient_targets_are_matched_encoded_and_forwarded_unchanged() {
        for (sent, uri, raw) in [
            (&b"/s?q={\"a\":1}"[..], "/s?q={%22a%22:1}", Some(&b"/s?q={\"a\":1}"[..])),
            (b"/a<b>c`d", "/a%3Cb%3Ec%60d", Some(b"/a<b>c`d")),
            (b"/caf\xe9?\xff", "/caf%E9?%FF", Some(b"/caf\xe9?\xff")),
            ("/café".as_bytes(), "/café", None),
            (b"/a\"{}|\\^[]", "/a\"{}|\\^[]", None),
            (b"http://up/<x>?<", "http://up/%3Cx%3E?%3C", Some(b"/<x>?<")),
            (b"http://up?\"", "http://up/?%22", Some(b"/?\"")),
            (b"/plain?x=%20", "/plain?x=%20", None),
            (b"*", "*", None),
        ] {
            let expected = (uri.to_owned(), raw.map(<[u8]>::to_vec));
            assert_eq!(parse("GET", sent), Ok(expected), "{:?}", sent.escape_ascii().to_string());
        }
    }

    #[test]
    fn a_target_that_no_server_accepts_is_rejected() {
        for (sent, why) in [
            (&b"/a#frag"[..], HeadError::Fragment),
            (b"/a?b#frag", HeadError::Fragment),
            (b"/#", HeadError::Fragment),
            (b"/\"#frag", HeadError::Fragment),
            (b"http://up/a#frag", HeadError::Fragment),
            (b"http://up#frag", HeadError::Fragment),
            (b"http://\xe9/", HeadError::Target),
            (b"http://u<p/", HeadError::Target),
            (b"\xe9", HeadError::Target),
            (b"http://[", HeadError::Target),
        ] {
            assert_eq!(parse("GET", sent), Err(why), "{:?}", sent.escape_ascii().to_string());
        }
        let long = [&b"/"[..], &[0xe9; 30_000]].concat();
        assert_eq!(parse("GET", &long), Err(HeadError::TooLarge));
    }

    #[test]
    fn options_without_a_path_targets_the_whole_server() {
        for (method, sent, path) in [
            ("OPTIONS", "http://up", "*"),
            ("OPTIONS", "http://up:80", "*"),
            ("OPTIONS", "http://up/", "/"),
            ("OPTIONS", "http://up?q", "?q"),
            ("OPTIONS", "*", "*"),
            ("GET", "http://up", "/"),
        ] {
            let method = Method::from_bytes(method.as_bytes()).unwrap();
            let target = RequestTarget::parse(&method, Bytes::from(sent), sent.as_bytes()).unwrap();
            assert_eq!(target.uri.path_and_query().unwrap(), path, "{method} {sent}");
        }
    }

    #[test]
    fn the_line_of_a_rejected_request_is_logged_without_secrets() {
        let line = |request: &[u8]| RejectedRequestLine::parse(request);
        let get = |target: &str| RejectedRequestLine {
            method: Some(Method::GET),
            target: Some(target.to_owned()),
            http10: false,
        };
        assert_eq!(line(b"GET /a?token=hush HTTP/1.1\r\nhost"), get("/a?…"));
        assert_eq!(line(b"\r\nGET /a b\x01 HTTP/1.1\r\n"), get("/a b\\x01"));
        assert_eq!(line(b"GET /a"), get("/a"));
        assert!(line(b"GET / HTTP/1.0\r\n").http10);
        assert_eq!(line(b"G(T / HTTP/1.1\r\n").method, None);
        assert_eq!(line(b"garbage\r\n"), RejectedRequestLine::default());
        let long = RejectedRequestLine::parse(&[b"GET /", &[b'a'; 999][..]].concat()).target.unwrap();
        assert_eq!(long.chars().count(), MAX_SHOWN + 1);
    }
}
