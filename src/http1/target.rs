//! Request targets (RFC 9112 §3.2), and those among them that RFC 3986 forbids though every server takes them: quotes,
//! angle brackets, backquotes, bytes above 0x7f. They are matched by a percent-encoded form and sent on byte for byte.

use bytes::Bytes;
use http::{Method, Uri, uri::PathAndQuery};

use super::head::HeadError;

/// `Uri` holds no more.
const MAX_TARGET: usize = u16::MAX as usize - 1;
/// Of a target that is named in an error.
const MAX_SHOWN: usize = 200;

/// Path and query exactly as the client sent them, where `Uri` has another form of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawTarget(Bytes);

impl RawTarget {
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// What the first line of a request asks for.
#[derive(Debug)]
pub struct Target {
    pub uri: Uri,
    pub raw: Option<RawTarget>,
}

impl Target {
    /// Reads a target. `Method` decides what an absolute form without a path means.
    ///
    /// # Errors
    ///
    /// Where it has a fragment, or no server would take it.
    pub fn parse(method: &Method, target: Bytes, sent: &[u8]) -> Result<Self, HeadError> {
        match Uri::from_maybe_shared(target) {
            Ok(uri) => Ok(Self { uri: checked(uri, method, sent)?, raw: None }),
            Err(_) => lenient(method, sent),
        }
    }
}

/// What `Uri` silently drops is refused: a fragment.
fn checked(uri: Uri, method: &Method, sent: &[u8]) -> Result<Uri, HeadError> {
    if sent.first() == Some(&b'/') {
        let kept = uri.path_and_query().map_or(0, |path| path.as_str().len());
        return if kept == sent.len() { Ok(uri) } else { Err(HeadError::Fragment) };
    }
    if sent.contains(&b'#') {
        return Err(HeadError::Fragment);
    }
    if *method == Method::OPTIONS && path_begin(sent) == Some(sent.len()) {
        // It asks about the server as a whole, which only an absolute form without a path says (RFC 9112 §3.2.4).
        let mut parts = uri.into_parts();
        parts.path_and_query = Some(PathAndQuery::from_static("*"));
        return Uri::from_parts(parts).map_err(|_| HeadError::Target);
    }
    Ok(uri)
}

/// Where path and query begin in an origin form or an absolute form.
fn path_begin(target: &[u8]) -> Option<usize> {
    if target.first() == Some(&b'/') {
        return Some(0);
    }
    let scheme = target.windows(3).position(|three| three == b"://")?;
    let authority = target.get(scheme + 3..)?;
    let end = authority.iter().position(|byte| matches!(byte, b'/' | b'?' | b'#'));
    Some(scheme + 3 + end.unwrap_or(authority.len()))
}

/// Reads a target whose path or query has bytes that `Uri` does not hold.
fn lenient(method: &Method, sent: &[u8]) -> Result<Target, HeadError> {
    let begin = path_begin(sent).ok_or(HeadError::Target)?;
    let (before, path) = sent.split_at(begin);
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
    let uri = checked(uri, method, &encoded)?;
    let slash: &[u8] = if path.starts_with(b"?") { b"/" } else { b"" };
    Ok(Target { uri, raw: Some(RawTarget([slash, path].concat().into())) })
}

/// The first line of a request that was refused, as far as it can be told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RefusedLine {
    pub method: Option<Method>,
    /// Fit to be logged: printable, cut, without the query, which may hold secrets.
    pub target: Option<String>,
    /// It says that it is of HTTP/1.0.
    pub http10: bool,
}

impl RefusedLine {
    /// Reads what there is of a request.
    pub fn of(request: &[u8]) -> Self {
        let Some(line) = Line::of(request) else { return Self::default() };
        Self {
            method: Method::from_bytes(line.method).ok(),
            target: Some(shown(line.target)),
            http10: line.version == b"HTTP/1.0",
        }
    }
}

/// A request line, cut at its first and its last space.
struct Line<'a> {
    method: &'a [u8],
    target: &'a [u8],
    version: &'a [u8],
}

impl<'a> Line<'a> {
    fn of(request: &'a [u8]) -> Option<Self> {
        let begin = request.iter().position(|byte| !matches!(byte, b'\r' | b'\n'))?;
        let line = request[begin..].split(|byte| *byte == b'\n').next()?;
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

/// Says more precisely what is wrong with a request line.
pub fn diagnose(request: &[u8], error: HeadError) -> HeadError {
    let (HeadError::FirstLine | HeadError::Version, Some(line)) = (error, Line::of(request)) else {
        return error;
    };
    match line.target.iter().find(|byte| **byte <= b' ' || **byte == 0x7f) {
        Some(b' ') if !line.version.is_empty() => HeadError::SpaceInTarget,
        Some(byte) if *byte != b' ' => HeadError::TargetByte(*byte),
        _ => error,
    }
}

/// A request whose target is not UTF-8, with other bytes in place of those that are not ASCII, and its own target.
/// `None`: that is not what is wrong with it.
pub fn masked(request: &[u8]) -> Option<(Vec<u8>, Bytes)> {
    let target = Line::of(request)?.target;
    if std::str::from_utf8(target).is_ok() {
        return None;
    }
    let begin = target.as_ptr().addr().checked_sub(request.as_ptr().addr())?;
    let mut masked = request.to_vec();
    for byte in masked.get_mut(begin..begin + target.len())? {
        if !byte.is_ascii() {
            *byte = b'x';
        }
    }
    Some((masked, Bytes::copy_from_slice(target)))
}

/// A target fit to be logged: printable, cut, without the query, which may hold secrets.
pub fn shown(target: &[u8]) -> String {
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
        let target = Target::parse(&method, Bytes::copy_from_slice(target), target)?;
        Ok((target.uri.to_string(), target.raw.map(|raw| raw.as_bytes().to_vec())))
    }

    #[test]
    fn what_servers_take_is_matched_encoded_and_sent_on_as_it_came() {
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
    fn what_no_server_takes_is_refused() {
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
    fn options_without_a_path_asks_about_the_whole_server() {
        for (method, sent, path) in [
            ("OPTIONS", "http://up", "*"),
            ("OPTIONS", "http://up:80", "*"),
            ("OPTIONS", "http://up/", "/"),
            ("OPTIONS", "http://up?q", "?q"),
            ("OPTIONS", "*", "*"),
            ("GET", "http://up", "/"),
        ] {
            let method = Method::from_bytes(method.as_bytes()).unwrap();
            let target = Target::parse(&method, Bytes::from(sent), sent.as_bytes()).unwrap();
            assert_eq!(target.uri.path_and_query().unwrap(), path, "{method} {sent}");
        }
    }

    #[test]
    fn the_line_of_a_refused_request_is_shown_without_its_secrets() {
        let line = |request: &[u8]| RefusedLine::of(request);
        let get = |target: &str| RefusedLine {
            method: Some(Method::GET),
            target: Some(target.to_owned()),
            http10: false,
        };
        assert_eq!(line(b"GET /a?token=hush HTTP/1.1\r\nhost"), get("/a?…"));
        assert_eq!(line(b"\r\nGET /a b\x01 HTTP/1.1\r\n"), get("/a b\\x01"));
        assert_eq!(line(b"GET /a"), get("/a"));
        assert!(line(b"GET / HTTP/1.0\r\n").http10);
        assert_eq!(line(b"G(T / HTTP/1.1\r\n").method, None);
        assert_eq!(line(b"garbage\r\n"), RefusedLine::default());
        let long = RefusedLine::of(&[b"GET /", &[b'a'; 999][..]].concat()).target.unwrap();
        assert_eq!(long.chars().count(), MAX_SHOWN + 1);
    }
}
