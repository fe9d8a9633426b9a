use proptest::prelude::*;

use super::*;
use crate::proxy::detect::{DetectedProtocol, classify, classify_ended};

/// Models of lenient servers: the end of what they read as a request line. The end of the stream (`ended`) ends the
/// line as well.
mod servers {
    /// Lines end at LF or CR; blank lines and control characters before the request are skipped; any white space
    /// separates words; the last word is a version. Like Python's `wsgiref`, old Netty and others.
    pub fn loose(bytes: &[u8], ended: bool) -> Option<usize> {
        let begin = bytes.iter().position(|byte| !super::is_skipped_byte(*byte))?;
        let ends = |enders: &[u8]| {
            let length = bytes[begin..].iter().position(|byte| enders.contains(byte));
            length.map(|length| begin + length).or(ended.then_some(bytes.len()))
        };
        [&b"\n"[..], b"\r\n"].into_iter().filter_map(ends).find(|end| is_request(&bytes[begin..*end]))
    }

    fn is_request(line: &[u8]) -> bool {
        let words: Vec<&[u8]> =
            line.split(|byte| super::separates_words(*byte)).filter(|word| !word.is_empty()).collect();
        match words[..] {
            [b"GET", target] => target.starts_with(b"/"),
            [_, _, .., version] => is_version(version),
            _ => false,
        }
    }

    fn is_version(word: &[u8]) -> bool {
        let word = String::from_utf8_lossy(word).into_owned();
        let Some((_, number)) = word.rsplit_once('/') else { return false };
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        number.split_once('.').is_some_and(|(major, minor)| digits(major) && digits(minor))
    }

    /// Lines end at CRLF, the first empty one is skipped; ASCII white space, also LF, separates three words.
    pub fn twisted(bytes: &[u8], ended: bool) -> Option<usize> {
        let begin = if bytes.starts_with(b"\r\n") { 2 } else { 0 };
        let end = bytes[begin..].windows(2).position(|two| two == b"\r\n").map(|length| begin + length);
        let end = end.or(ended.then_some(bytes.len()))?;
        let is_blank = |byte: &u8| matches!(byte, b'\t'..=b'\r' | b' ');
        let words: Vec<&[u8]> = bytes[begin..end].split(is_blank).filter(|word| !word.is_empty()).collect();
        let [_, target, _] = words[..] else { return None };
        let path = target.starts_with(b"/") || target.windows(2).any(|two| two == b":/");
        path.then_some(end)
    }

    /// Lines end at CRLF, empty ones are skipped; the method is everything before the first space, the target
    /// everything before the second, the version is ignored. Like `com.sun.net.httpserver` of JDK 17 (see
    /// `tests/it/opaque.rs`).
    pub fn jdk(bytes: &[u8], ended: bool) -> Option<usize> {
        let mut at = 0;
        let line_end = loop {
            let end = bytes[at..].windows(2).position(|two| two == b"\r\n").map(|length| at + length);
            let end = end.or(ended.then_some(bytes.len()))?;
            if end > at || end == bytes.len() {
                break end;
            }
            at = end + 2;
        };
        let mut words = bytes[at..line_end].splitn(3, |byte| *byte == b' ');
        let (_, target, _) = (words.next()?, words.next()?, words.next()?);
        let legal = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..) && !b"\"<>\\^`{|}".contains(byte);
        let path = target.starts_with(b"/") || target.windows(2).any(|two| two == b":/");
        (path && target.iter().all(legal)).then_some(line_end)
    }
}

/// The bytes that reach a service on an `auto` port when a client sends these parts and ends its stream, and whether
/// the service sees an orderly end.
fn delivered<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> (Vec<u8>, bool) {
    let parts: Vec<&[u8]> = parts.into_iter().collect();
    let (mut seen, mut passed) = (Vec::new(), Vec::new());
    let mut parts = parts.iter().copied();
    // Like the detector.
    let detected = loop {
        if let Some(detected) = classify(&seen) {
            break detected;
        }
        match parts.next() {
            Some(part) => seen.extend_from_slice(part),
            None => break classify_ended(&seen),
        }
    };
    if !matches!(detected, DetectedProtocol::Other | DetectedProtocol::Tls) {
        return (passed, false);
    }
    // Like the tunnel.
    let mut watch = RequestWatch::default();
    for part in std::iter::once(&seen[..]).chain(parts) {
        if watch.follow_client(part).is_err() {
            return (passed, false);
        }
        passed.extend_from_slice(part);
    }
    let ended = watch.end_client().is_ok();
    (passed, ended)
}

/// No lenient server reads a request in the bytes that are delivered.
fn is_no_request(parts: &[&[u8]]) -> Result<(), TestCaseError> {
    let (passed, ended) = delivered(parts.iter().copied());
    prop_assert_eq!(servers::loose(&passed, ended), None, "read loosely: {}", passed.escape_ascii());
    prop_assert_eq!(servers::jdk(&passed, ended), None, "read by a JDK server: {}", passed.escape_ascii());
    prop_assert_eq!(servers::twisted(&passed, ended), None, "read by Twisted: {}", passed.escape_ascii());
    Ok(())
}

fn noise() -> impl Strategy<Value = Vec<u8>> {
    let fixed: Vec<&'static [u8]> = vec![
        b"",
        b"\r\n",
        b"\r\n\r\n",
        b"\n\n\n",
        b"\t",
        b" ",
        b"\0",
        b"\xef\xbb\xbf",
        b"\x16\x03\x01\x01\x02\x01\0\0\xff\x03\x03",
        b"*1\r\n",
        b"PING\n",
        b"\0\0\0\x29\0\x03\0\0user\0",
        b"\xff",
    ];
    let random = proptest::collection::vec(any::<u8>(), 0..40);
    prop_oneof![
        3 => proptest::sample::select(fixed).prop_map(<[u8]>::to_vec),
        1 => random,
        1 => proptest::collection::vec(proptest::sample::select(b"\r\n\t \0\x0b\x1c\x7f\x85\xa0".to_vec()), 0..12),
    ]
}

fn request_with_noise() -> impl Strategy<Value = Vec<u8>> {
    let select = |options: Vec<&'static str>| proptest::sample::select(options);
    let method =
        select(vec!["GET", "get", "POST", "!#$%&'*+.^`|~", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "", "G\0T", "é"]);
    let blank = select(vec![" ", " ", "  ", "\t", "\x0b", "\r", " \x1c", "\n"]);
    let target = select(vec!["/", "/x", "http://a/x", "a:/x", "*", "x", "//h/x", "/é", "/\x01"]);
    let version =
        select(vec!["HTTP/1.1", "HTTP/1.0", "http/1.1", "HTTP/1.10", "", "FOO", "RTSP/1.0", "0 0 5", "\x01"]);
    let end = select(vec!["\r\n", "\n", "\r\r\n", "\r"]);
    let head = select(vec![
        "X-Forwarded-Client-Cert: admin\r\n\r\n",
        "a: b\n\n",
        "\r\n",
        "\n",
        "a\r\r",
        "a: b\r\n c\r\n\r\n",
    ]);
    (noise(), method, blank.clone(), target, blank, version, end, head).prop_map(
        |(noise, method, blank, target, other, version, end, head)| {
            let text = [method, blank, target, other, version, end, head, "tail\r\n\r\n"].concat();
            [noise, text.into_bytes()].concat()
        },
    )
}

/// A request of every length that could be a limit of a server or proxy.
fn long_request() -> impl Strategy<Value = Vec<u8>> {
    let length = || {
        let limits = [255, 256, 1024, 4096, 8192, 65_536, 1024 * 1024, 1024 * 1024 + 4096, 2 * 1024 * 1024];
        (proptest::sample::select(limits.to_vec()), 0_usize..300).prop_map(|(limit, more)| limit + more)
    };
    let byte = proptest::sample::select(b"A\x01\xff/:".to_vec());
    (noise(), byte, 0..4_u8, length()).prop_map(|(noise, byte, place, length)| {
        let pad = vec![byte; length];
        let at = |wanted: u8| if place == wanted { &pad[..] } else { b"" };
        let text: [&[u8]; 9] =
            [&noise, at(0), b"GET", at(1), b" /x", at(2), b" HTTP/1.1\r\nX-Pad: ", at(3), b"\r\n\r\n"];
        text.concat()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    /// Issue 14, fault 1: whatever is put before, around and into a request, however it is cut into parts, and wherever
    /// the client ends its stream, what passes as opaque bytes is never a whole request line for a lenient server.
    #[test]
    fn no_request_passes_as_opaque_bytes(bytes in request_with_noise(), part in 1_usize..80, end in 0_usize..400) {
        let bytes = &bytes[..end.min(bytes.len())];
        is_no_request(&bytes.chunks(part).collect::<Vec<_>>())?;
    }

    /// A request that is sent in two parts is refused or cut like one that is sent at once, wherever it is split.
    #[test]
    fn no_split_lets_a_request_pass(bytes in request_with_noise()) {
        for at in 0..bytes.len() {
            is_no_request(&[&bytes[..at], &bytes[at..]])?;
        }
    }

    /// The verdict does not depend on the parts in which the bytes arrive.
    #[test]
    fn parts_do_not_matter(bytes in request_with_noise(), part in 1_usize..20) {
        let mut whole = RequestWatch::default();
        let mut parts = RequestWatch::default();
        let at_once = whole.follow_client(&bytes);
        let in_parts = bytes.chunks(part).try_for_each(|part| parts.follow_client(part));
        prop_assert_eq!(at_once, in_parts);
        // A server may read a stream that ends without a line end like one with a line end.
        prop_assert_eq!(whole.end_client(), parts.end_client());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// A review of issue 14, fault 1: the watch ended after 1 MiB, and Go reads a header of 1 MiB + 4096 bytes.
    #[test]
    fn no_length_lets_a_request_pass(bytes in long_request(), first in 1_usize..600) {
        let (begin, rest) = bytes.split_at(first.min(bytes.len()));
        let parts: Vec<&[u8]> = std::iter::once(begin).chain(rest.chunks(65_536)).collect();
        is_no_request(&parts)?;
    }
}

/// Both signatures of the PROXY protocol, and other decisive first bytes, wherever they are split.
#[test]
fn no_split_hides_a_signature() {
    let request = b"GET /x HTTP/1.1\r\nX-Forwarded-Client-Cert: admin\r\n\r\n";
    let v2 =
        [&b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x7f\0\0\x01\x7f\0\0\x01\0\x01\0\x02"[..], request].concat();
    let v1 = [&b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n"[..], request].concat();
    let bom = [&b"\xef\xbb\xbf"[..], request].concat();
    for bytes in [&v2[..], &v1, &bom, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0"] {
        for (first, second) in
            (0..bytes.len()).flat_map(|first| [first, first + 1, first + 5].map(|second| (first, second)))
        {
            let second = second.min(bytes.len());
            let parts = [&bytes[..first], &bytes[first..second], &bytes[second..]];
            let (passed, ended) = delivered(parts);
            let whole_line = passed.windows(4).any(|four| four == b"1.1\r" || four == b"2.0\r");
            assert!(!whole_line && !ended, "split at {first} and {second}: {}", passed.escape_ascii());
        }
        assert!(!delivered(bytes.chunks(1)).1);
    }
}

/// Fail closed: the length of a line, or silence of the server, proves nothing.
#[test]
fn no_number_of_bytes_ends_the_watch_within_a_line() {
    let mut watch = RequestWatch::default();
    watch.follow_client(&vec![1; 3 * 1024 * 1024]).unwrap();
    assert!(!watch.is_over());
    watch.follow_client(&vec![b'A'; 3 * 1024 * 1024]).unwrap();
    assert!(!watch.is_over());
    assert_eq!(watch.follow_client(b" /x HTTP/1.1\r\n"), Err(HiddenRequest));
    // Binary data is soon known not to be a request line.
    let mut watch = RequestWatch::default();
    watch.follow_client(b"\x01\x02 \x03 binary\n").unwrap();
    assert!(watch.is_over());
}

/// `wsgiref` and JDK servers take the end of the stream for the end of the line and of the header.
#[test]
fn the_end_of_the_stream_ends_a_request() {
    for line in [&b"\x01\x02 /x HTTP/1.1"[..], b"\x01\x02 /x \x01", b"GET /x", b"\0\0GET\t/x\tFOO"] {
        let mut watch = RequestWatch::default();
        assert_eq!(watch.follow_client(line), Ok(()));
        assert_eq!(watch.end_client(), Err(HiddenRequest), "{}", line.escape_ascii());
    }
    for line in [&b""[..], b"\x01\x02", b"PING", b"set key 0 0 5", b"0032git-upload-pack /a.git\0host=a\0"] {
        let mut watch = RequestWatch::default();
        assert_eq!(watch.follow_client(line), Ok(()));
        assert_eq!(watch.end_client(), Ok(()), "{}", line.escape_ascii());
        assert!(watch.is_over());
    }
}

/// Real protocols pass, and the server's first bytes, or the client's first line, end the watch.
#[test]
fn other_protocols_pass() {
    for (name, client) in [
        ("redis", &b"*3\r\n$3\r\nSET\r\n$1\r\na\r\n$20\r\nGET /x HTTP/1.1\r\n\r\n\r\n"[..]),
        ("smtp", b"EHLO a.example\r\nMAIL FROM:<a@b>\r\n\r\n\r\n"),
        ("ssh", b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n"),
        ("nats", b"CONNECT {\"verbose\":false,\"version\":\"1.2\"}\r\nPING\r\n"),
        ("memcached", b"set key 0 0 4\r\n\r\n\r\n\r\n"),
    ] {
        let mut watch = RequestWatch::default();
        assert_eq!(watch.follow_client(client), Ok(()), "{name}");
        assert!(watch.is_over(), "{name}: its first line is not one of HTTP");
    }
    let mut watch = RequestWatch::default();
    watch.follow_client(b"\0\0\0\x29\0\x03\0\0user\0bob\0\0").unwrap();
    assert!(!watch.is_over());
    watch.follow_server(b"R\0\0\0\x08");
    assert!(watch.is_over());
    assert_eq!(watch.follow_client(b"Q\0\0\0\x1aSELECT /x FROM t\r\n\r\n"), Ok(()));
}

#[test]
fn http_from_the_server_does_not_end_the_watch() {
    for answer in [&b"HTTP/1.1 400 Bad Request\r\n"[..], b"\0\0\x12\x04\0\0\0\0\0"] {
        let mut watch = RequestWatch::default();
        watch.follow_client(b"\x01\x02").unwrap();
        for byte in answer.chunks(1) {
            watch.follow_server(byte);
        }
        assert_eq!(watch.follow_client(b" /x 0\r\n"), Err(HiddenRequest), "{}", answer.escape_ascii());
    }
}

#[test]
fn the_http2_preface_is_cut_off() {
    let mut watch = RequestWatch::default();
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    assert_eq!(watch.follow_client(&preface[..14]), Ok(()));
    assert_eq!(watch.follow_client(&preface[14..]), Err(HiddenRequest));
}
