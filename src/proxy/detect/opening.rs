//! Classifies the first bytes of a connection. A pure function.
//!
//! HTTP servers are lenient: they skip blank lines, white space, control characters or a byte-order mark before a
//! request, accept any word as a method, end lines at a bare LF, and ignore the version. Bytes that any of them could
//! read as a request count as HTTP here, so that the proxy's own parser reads them, and refuses what is invalid.

use super::DetectedProtocol;

/// The client connection preface of HTTP/2 (RFC 9113 §3.4).
const H2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The beginning of an HTTP version.
pub(super) const HTTP_NAME: &[u8] = b"HTTP/";
/// Text without a line end counts as HTTP from this length on: the parser then refuses it as too long.
const MAX_LINE: usize = 4096;
/// A longer token counts as an HTTP method without a look at what follows: the parser decides.
const MAX_METHOD: usize = 256;
/// The signatures of the PROXY protocol, after which some servers read HTTP.
const PROXY_V1: &[u8] = b"PROXY ";
const PROXY_V2: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// Classifies all bytes of a client that has ended its stream. Some servers take the end of the stream for the end of
/// the line and of the header.
pub fn classify_ended(bytes: &[u8]) -> DetectedProtocol {
    let line = [bytes, b"\n"].concat();
    match bytes {
        [] => DetectedProtocol::Nothing,
        _ => classify(&line).unwrap_or(DetectedProtocol::Other),
    }
}

/// Classifies the first bytes of a client. `None`: more bytes are needed.
pub fn classify(bytes: &[u8]) -> Option<DetectedProtocol> {
    if bytes.starts_with(H2_PREFACE) {
        return Some(DetectedProtocol::H2);
    }
    if H2_PREFACE.starts_with(bytes) {
        return None;
    }
    match bytes {
        // A handshake record of SSL 3.0 or later (RFC 8446 §5.1).
        [0x16, 0x03, minor, ..] if *minor <= 4 => return Some(DetectedProtocol::Tls),
        [0x16] | [0x16, 0x03] => return None,
        _ => {}
    }
    if bytes.starts_with(PROXY_V1) || bytes.starts_with(PROXY_V2) {
        return Some(DetectedProtocol::Http1);
    }
    if PROXY_V2.starts_with(bytes) {
        return None;
    }
    let skipped = skippable(bytes);
    let (before, rest) = bytes.split_at(skipped);
    // After line ends or white space a request may follow. A client that sent control characters may be waiting for
    // its server: the bytes pass, and `RequestWatch` follows them.
    let may_wait = before.iter().all(|byte| matches!(byte, b'\r' | b'\n' | b' ' | b'\t'));
    if rest.is_empty() {
        return match may_wait {
            true if bytes.len() <= MAX_LINE => None,
            true => Some(DetectedProtocol::Http1),
            false => Some(DetectedProtocol::Other),
        };
    }
    if let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
        let is_request = is_request_line(&rest[..end]);
        return Some(if is_request { DetectedProtocol::Http1 } else { DetectedProtocol::Other });
    }
    classify_partial_line(rest, may_wait)
}

/// Classifies a line that has not ended.
fn classify_partial_line(line: &[u8], may_wait: bool) -> Option<DetectedProtocol> {
    let word = line.iter().take_while(|byte| is_token_byte(**byte)).count();
    let (method, rest) = line.split_at(word);
    if word > MAX_METHOD {
        return Some(DetectedProtocol::Http1);
    }
    match rest {
        [] if may_wait => None,
        [b' ', target @ ..] if word > 0 => {
            // memcached commands are in lower case.
            let is_upper_case = !method.iter().any(u8::is_ascii_lowercase);
            let begins = |begin: &[u8]| target.starts_with(begin);
            if method == b"CONNECT"
                || is_upper_case && (begins(b"/") || begins(b"http://") || begins(b"https://"))
            {
                return Some(DetectedProtocol::Http1);
            }
            if target.iter().any(|byte| is_control(*byte)) || !may_wait {
                return Some(DetectedProtocol::Other);
            }
            // The HTTP parser refuses it as too long.
            (line.len() > MAX_LINE).then_some(DetectedProtocol::Http1)
        }
        _ => Some(DetectedProtocol::Other),
    }
}

/// The number of bytes that an HTTP server could skip before a request.
fn skippable(bytes: &[u8]) -> usize {
    let mut at = 0;
    loop {
        let rest = &bytes[at..];
        at += match rest {
            [0xef, 0xbb, 0xbf, ..] => 3,
            [0xfe, 0xff, ..] | [0xff, 0xfe, ..] => 2,
            [byte, ..] if is_skipped_byte(*byte) => 1,
            _ => return at,
        };
    }
}

/// Whether some server reads a line, given without its line end, as a request line. `line` is not blank.
fn is_request_line(line: &[u8]) -> bool {
    let mut words = line.split(|byte| separates_words(*byte)).filter(|word| !word.is_empty());
    let (Some(_), Some(second)) = (words.next(), words.next()) else { return false };
    let is_text = !line.iter().any(|byte| is_control(*byte));
    let mut count = 2;
    let last = words.inspect(|_| count += 1).last().unwrap_or(second);
    if count > 2 && ends_in_version(last) {
        return true;
    }
    // HTTP/0.9 has two words. Of three or more, some servers ignore all but the first two.
    is_text && is_target(second)
}

/// Whether a word has the form of a request target (origin or absolute form).
fn is_target(word: &[u8]) -> bool {
    word.starts_with(b"/") || word.windows(2).any(|two| two == b":/")
}

/// Whether a word ends like `HTTP/1.1`, with any protocol name: some servers do not compare the name.
fn ends_in_version(word: &[u8]) -> bool {
    matches!(word, [.., b'/', major, b'.', minor] if major.is_ascii_digit() && minor.is_ascii_digit())
        || word.windows(HTTP_NAME.len()).any(|part| part.eq_ignore_ascii_case(HTTP_NAME))
}

/// Whether some server skips this byte before a request: space, control characters, and white space of Latin-1.
pub(super) const fn is_skipped_byte(byte: u8) -> bool {
    matches!(byte, 0..=b' ' | 0x7f | 0x85 | 0xa0)
}

/// Whether some server takes this byte for a separator between the words of a line.
pub(super) const fn separates_words(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | 0x0b | 0x0c | b'\r' | 0x1c..=0x1f | 0x85 | 0xa0)
}

/// Whether this byte is not part of text.
pub(super) const fn is_control(byte: u8) -> bool {
    byte.is_ascii_control() && !separates_words(byte)
}

/// Whether this byte may be part of a token (RFC 9110 §5.6.2), such as a method.
const fn is_token_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric()
        || matches!(byte, b'!' | b'#' | b'$' | b'%' | b'&' | b'\'' | b'*' | b'+' | b'-' | b'.' | b'^' | b'_')
        || matches!(byte, b'`' | b'|' | b'~')
}

/// Whether a server that sent first speaks HTTP: it sent the SETTINGS frame of HTTP/2, or a response, as to a client
/// that is too slow (408). `None`: more bytes are needed.
pub fn server_speaks_http(bytes: &[u8]) -> Option<bool> {
    // The length is a multiple of six below 64 KiB; type 4, no flags, stream 0 (RFC 9113 §6.5).
    let settings = match bytes {
        [0, _, _, kind, flags, stream @ ..] => {
            *kind == 4 && *flags == 0 && stream.iter().take(4).all(|byte| *byte == 0)
        }
        [0, ..] | [] => true,
        _ => false,
    };
    let response = bytes.iter().zip(HTTP_NAME).all(|(byte, expected)| byte == expected);
    match () {
        () if settings => (bytes.len() >= 9).then_some(true),
        () if response => (bytes.len() >= HTTP_NAME.len()).then_some(true),
        () => Some(false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn detects_protocols_with_the_fewest_bytes() {
        for (bytes, expected) in [
            (&b"GET / HTTP/1.1\r\n"[..], Some(DetectedProtocol::Http1)),
            (b"GET /", Some(DetectedProtocol::Http1)),
            (b"GET ", None),
            (b"GET http:/", None),
            (b"GET http://a", Some(DetectedProtocol::Http1)),
            (b"CONNECT ", Some(DetectedProtocol::Http1)),
            (b"GET a HTTP/1.1\r\n", Some(DetectedProtocol::Http1)),
            (b"get / HTTP/1.1\r\n", Some(DetectedProtocol::Http1)),
            (b"set key 0 0 5\r\n", Some(DetectedProtocol::Other)),
            (b"get key\r\n", Some(DetectedProtocol::Other)),
            (b"KEYS *\r\n", Some(DetectedProtocol::Other)),
            (b"GET key\n", Some(DetectedProtocol::Other)),
            (b"NICK outrigger\r\n", Some(DetectedProtocol::Other)),
            (b"GE", None),
            (b"", None),
            (b"\r\n", None),
            (b"\r\nPOST /", Some(DetectedProtocol::Http1)),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Some(DetectedProtocol::H2)),
            (b"PRI * HTTP/2.0\r\n\r\n", None),
            (b"PRI * HTTP/1.1\r\n", Some(DetectedProtocol::Http1)),
            (b"M-SEARCH * HTTP/1.1\r\n", Some(DetectedProtocol::Http1)),
            (b"\x16\x03\x01\x02\x00\x01", Some(DetectedProtocol::Tls)),
            (b"\x16\x03", None),
            (b"\x16\x04\x01", Some(DetectedProtocol::Other)),
            (b"*1\r\n$4\r\nPING\r\n", Some(DetectedProtocol::Other)),
            (b"\x00\x00\x00\x08\x04\xd2\x16\x2f", Some(DetectedProtocol::Other)),
            // A request of Cassandra: only control characters, and its client waits for the response.
            (b"\x04\x00\x00\x00\x05\x00\x00\x00\x00", Some(DetectedProtocol::Other)),
            // A request of Kafka that ends in a word.
            (b"\x00\x00\x00\x0f\x00\x12\x00\x00\x00\x00\x00\x00\x00\x05hello", Some(DetectedProtocol::Other)),
            (b"<?xml version='1.0'?><stream:stream to='a'>", Some(DetectedProtocol::Other)),
            (b"SSH-2.0-OpenSSH_9.2\r\n", Some(DetectedProtocol::Other)),
        ] {
            assert_eq!(classify(bytes), expected, "{:?}", String::from_utf8_lossy(bytes));
        }
    }

    /// Issue 14, fault 1: each of these was read as a request by nginx, Node, Go, Python or a JDK server.
    #[test]
    fn what_a_lenient_server_reads_as_a_request_counts_as_http() {
        let line = |begin: &[u8], method: &[u8], end: &[u8]| [begin, method, end].concat();
        let begins: [&[u8]; 12] = [
            b"",
            b"\r\n\r\n",
            b"\n\n\n",
            b"\r\n\r\n\r\n\r\n\r\n\r\n",
            b"\t",
            b" ",
            b"\0",
            b"\xef\xbb\xbf",
            b"\xff\xfe",
            b"\x0b\x0c",
            b"\x1c",
            b"\0\r\n\t \xef\xbb\xbf\0",
        ];
        let methods: [&[u8]; 8] = [
            b"GET",
            b"get",
            b"ABCDEFGHIJKLMNOPQRSTUVWXY",
            b"!#$%&'*+.^`|~",
            b"G\xffT",
            b"G\0T",
            b"(GET)",
            b"\"",
        ];
        let ends: [&[u8]; 9] = [
            b" /x HTTP/1.1\r\n",
            b" /x HTTP/1.1\n",
            b"\t/x\tHTTP/1.1\r\n",
            b"  /x  HTTP/1.0\r\n",
            b" x HTTP/1.1\r\n",
            b" http://a/x http/1.1\r\n",
            b" a:/x HTTP/1.1\r\n",
            b" /\0x HTTP/1.1\r\n",
            b" /x RTSP/1.0\r\n",
        ];
        for (begin, method) in begins.into_iter().flat_map(|begin| methods.map(|method| (begin, method))) {
            for end in ends {
                let opener = line(begin, method, end);
                assert_eq!(
                    classify(&opener),
                    Some(DetectedProtocol::Http1),
                    "{:?}",
                    opener.escape_ascii().to_string()
                );
            }
        }
        for other in [
            &b"GET /x\r\n"[..],
            b"get /key\r\n",
            b"\x0bGET /x\n",
            b"GET /x FOO\r\n",
            b"set /x 0 0 5\r\n",
            b"\0GET /x\r\n",
            b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\nGET / HTTP/1.1\r\n",
            b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c",
            b"PRI * HTTP/2.0\n\nSM\n\n",
            b"\r\nPRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        ] {
            assert_eq!(classify(other), Some(DetectedProtocol::Http1), "{}", other.escape_ascii());
        }
    }

    #[test]
    fn a_server_that_sends_first_may_speak_http() {
        for (bytes, expected) in [
            (&b""[..], None),
            (b"H", None),
            (b"HTTP/1.1 408 Request Timeout\r\n", Some(true)),
            (b"HELO", Some(false)),
            (b"220 mail\r\n", Some(false)),
            (b"\0\0\x12\x04\0\0\0\0\0\0\x03", Some(true)),
            (b"\0\0\x12\x04\0", None),
            (b"\x4a\0\0\0\x0a8.0", Some(false)),
            (b"\0\0\x12\x05\0\0\0\0\0", Some(false)),
        ] {
            assert_eq!(server_speaks_http(bytes), expected, "{}", bytes.escape_ascii());
        }
    }
}
