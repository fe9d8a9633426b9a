use proptest::prelude::*;

use super::*;
use crate::proxy::detect::{Spoken, classify};

/// How lenient servers read a stream: what they take for the head of a request, and where it takes effect.
mod servers {
    /// Lines by LF; blank lines and control characters before the request are skipped; words between any white space;
    /// the last word is a version. As Python's `wsgiref`, old Netty and others read.
    pub fn loose(bytes: &[u8]) -> Option<usize> {
        let begin = bytes.iter().position(|byte| !super::is_skipped_byte(*byte))?;
        let line_end = begin + bytes[begin..].iter().position(|byte| *byte == b'\n')?;
        let line = &bytes[begin..line_end];
        let words: Vec<&[u8]> =
            line.split(|byte| super::separates_words(*byte)).filter(|word| !word.is_empty()).collect();
        match words[..] {
            [b"GET", target] if target.starts_with(b"/") => return Some(line_end + 1),
            [_, _, .., version] if is_version(version) => {}
            _ => return None,
        }
        let head = &bytes[line_end + 1..];
        let mut at = 0;
        loop {
            let end = at + head[at..].iter().position(|byte| *byte == b'\n')?;
            if head[at..end].iter().all(|byte| *byte == b'\r') {
                return Some(line_end + 1 + end + 1);
            }
            at = end + 1;
        }
    }

    fn is_version(word: &[u8]) -> bool {
        let word = String::from_utf8_lossy(word).into_owned();
        let Some((_, number)) = word.rsplit_once('/') else { return false };
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        number.split_once('.').is_some_and(|(major, minor)| digits(major) && digits(minor))
    }

    /// Lines by CRLF, empty ones skipped; the method is all before the first blank, the target all before the second,
    /// the version is ignored. As `com.sun.net.httpserver` of JDK 17 reads (see `tests/it/opaque.rs`).
    pub fn jdk(bytes: &[u8]) -> Option<usize> {
        let mut at = 0;
        let line_end = loop {
            let end = at + bytes[at..].windows(2).position(|two| two == b"\r\n")?;
            if end > at {
                break end;
            }
            at = end + 2;
        };
        let mut words = bytes[at..line_end].splitn(3, |byte| *byte == b' ');
        let (_, target, _) = (words.next()?, words.next()?, words.next()?);
        let legal = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..) && !b"\"<>\\^`{|}".contains(byte);
        let path = target.starts_with(b"/") || target.windows(2).any(|two| two == b":/");
        if !path || !target.iter().all(legal) {
            return None;
        }
        let head = &bytes[line_end + 2..];
        let is_break = |byte: u8| matches!(byte, b'\r' | b'\n');
        if head.first().is_some_and(|byte| is_break(*byte)) {
            return Some(line_end + 3);
        }
        let end = head.windows(2).position(|two| is_break(two[0]) && is_break(two[1]) && two != b"\r\n")?;
        Some(line_end + 2 + end + 2)
    }
}

/// How much of a client's bytes reaches a service behind an `auto` port, sent in parts of these sizes.
fn delivered(bytes: &[u8], part: usize) -> Vec<u8> {
    let mut seen = Vec::new();
    let mut parts = bytes.chunks(part.max(1));
    // As the detector reads.
    let spoken = loop {
        match (classify(&seen), parts.next()) {
            (Some(spoken), next) => break (spoken, next),
            (None, Some(part)) => seen.extend_from_slice(part),
            (None, None) => return Vec::new(),
        }
    };
    let (Spoken::Other | Spoken::Tls, mut next) = spoken else { return Vec::new() };
    let mut watch = RequestWatch::default();
    let mut passed = Vec::new();
    let mut chunk = seen;
    loop {
        if watch.client_sends(&chunk).is_err() {
            return passed;
        }
        passed.extend_from_slice(&chunk);
        match next.take().or_else(|| parts.next()) {
            Some(part) => chunk = part.to_vec(),
            None => return passed,
        }
    }
}

fn junk() -> impl Strategy<Value = Vec<u8>> {
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

fn opener() -> impl Strategy<Value = Vec<u8>> {
    let select = |options: Vec<&'static str>| proptest::sample::select(options);
    let method =
        select(vec!["GET", "get", "POST", "!#$%&'*+.^`|~", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "", "G\0T", "é"]);
    let blank = select(vec![" ", " ", "  ", "\t", "\x0b", "\r", " \x1c"]);
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
    (junk(), method, blank.clone(), target, blank, version, end, head).prop_map(
        |(junk, method, blank, target, other, version, end, head)| {
            let text = [method, blank, target, other, version, end, head, "tail\r\n\r\n"].concat();
            [junk, text.into_bytes()].concat()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    /// Issue 14, fault 1: whatever is put before, around and into a request, and however it is cut into parts, what
    /// passes as opaque bytes is never a whole request for a lenient server.
    #[test]
    fn no_request_passes_as_opaque_bytes(bytes in opener(), part in 1_usize..80) {
        let passed = delivered(&bytes, part);
        prop_assert_eq!(servers::loose(&passed), None, "read loosely: {}", passed.escape_ascii());
        prop_assert_eq!(servers::jdk(&passed), None, "read by a JDK server: {}", passed.escape_ascii());
    }

    /// The verdict does not depend on how the bytes come in.
    #[test]
    fn parts_do_not_matter(bytes in opener(), part in 1_usize..20) {
        let mut whole = RequestWatch::default();
        let mut parts = RequestWatch::default();
        let at_once = whole.client_sends(&bytes);
        let in_parts = bytes.chunks(part).try_for_each(|part| parts.client_sends(part));
        prop_assert_eq!(at_once, in_parts);
    }
}

/// Real protocols pass, and their first answer, or first line, ends the watch.
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
        assert_eq!(watch.client_sends(client), Ok(()), "{name}");
        assert!(watch.is_over(), "{name}: its first line is not one of HTTP");
    }
    let mut watch = RequestWatch::default();
    watch.client_sends(b"\0\0\0\x29\0\x03\0\0user\0bob\0\0").unwrap();
    assert!(!watch.is_over());
    watch.server_answers(b"R\0\0\0\x08");
    assert!(watch.is_over());
    assert_eq!(watch.client_sends(b"Q\0\0\0\x1aSELECT /x FROM t\r\n\r\n"), Ok(()));
}

#[test]
fn a_server_that_answers_in_http_is_watched_on() {
    for answer in [&b"HTTP/1.1 400 Bad Request\r\n"[..], b"\0\0\x12\x04\0\0\0\0\0"] {
        let mut watch = RequestWatch::default();
        watch.client_sends(b"\x01\x02").unwrap();
        for byte in answer.chunks(1) {
            watch.server_answers(byte);
        }
        assert_eq!(
            watch.client_sends(b" /x 0\r\na: b\r\n\r\n"),
            Err(ReadsAsRequest),
            "{}",
            answer.escape_ascii()
        );
    }
}

#[test]
fn the_preface_of_http2_stops_at_its_last_byte() {
    let mut watch = RequestWatch::default();
    assert_eq!(watch.client_sends(&H2_PREFACE[..15]), Ok(()));
    assert_eq!(watch.client_sends(&H2_PREFACE[15..]), Err(ReadsAsRequest));
}

#[test]
fn a_watch_has_an_end() {
    let mut watch = RequestWatch::default();
    watch.client_sends(&vec![1; LONGEST_WATCH + 1]).unwrap();
    assert!(watch.is_over());
}
