//! HTTP/2 requests that must not become HTTP/1 requests (RFC 9113 §8.2, 8.3, 10.3).

use std::time::Duration;

use super::{Check, Recorder};
use crate::support::{
    Proxy,
    h2::{self, End, H2Client},
    strict::Message,
};

type Field = (&'static str, &'static str);

const METHOD: Field = (":method", "POST");
const SCHEME: Field = (":scheme", "http");
const AUTHORITY: Field = (":authority", "up");
const PATH: Field = (":path", "/");

struct Case {
    name: &'static str,
    fields: Vec<Field>,
    body: Option<&'static str>,
    trailers: Vec<Field>,
    /// May it pass, and as what? None: it must not.
    passes: Option<Check>,
    /// May it be rejected as well?
    either: bool,
}

/// A well-formed head and these fields.
fn with(name: &'static str, fields: &[Field]) -> Case {
    let fields = [&[METHOD, SCHEME, AUTHORITY, PATH], fields].concat();
    Case { name, fields, body: None, trailers: Vec::new(), passes: None, either: false }
}

/// Exactly these fields.
fn only(name: &'static str, fields: &[Field]) -> Case {
    Case { fields: fields.to_vec(), ..with(name, &[]) }
}

fn may(passes: Check, case: Case) -> Case {
    Case { passes: Some(passes), ..case }
}

fn either(case: Case) -> Case {
    Case { either: true, ..case }
}

fn body(body: &'static str, case: Case) -> Case {
    Case { body: Some(body), ..case }
}

fn for_up(request: &Message) -> bool {
    request.all("host").collect::<Vec<_>>() == ["up"]
}

fn cases() -> Vec<Case> {
    vec![
        may(for_up, with("a plain request", &[])),
        may(
            |request| request.body == b"hello",
            body("hello", with("a plain body", &[("content-length", "5")])),
        ),
        with("capitals in a name", &[("X-A", "1")]),
        with("a space in a name", &[("x a", "1")]),
        with("a colon in a name", &[("x:a", "1")]),
        with("CR LF in a name", &[("x\r\nhost", "1")]),
        with("an empty name", &[("", "1")]),
        with("CR LF in a value", &[("x-a", "1\r\nx-smuggled: 1")]),
        with("LF in a value", &[("x-a", "1\nx-smuggled: 1")]),
        with("CR in a value", &[("x-a", "1\rx")]),
        with("NUL in a value", &[("x-a", "1\0x")]),
        with("Connection", &[("connection", "close")]),
        with("Keep-Alive", &[("keep-alive", "timeout=5")]),
        with("Proxy-Connection", &[("proxy-connection", "keep-alive")]),
        body("0\r\n\r\n", with("Transfer-Encoding", &[("transfer-encoding", "chunked")])),
        with("Upgrade", &[("upgrade", "websocket")]),
        with("TE other than trailers", &[("te", "gzip")]),
        with("an unknown pseudo-header", &[(":x", "1")]),
        with("a pseudo-header of answers", &[(":status", "200")]),
        with("two paths", &[PATH]),
        only("two methods", &[METHOD, METHOD, SCHEME, AUTHORITY, PATH]),
        only("two authorities", &[METHOD, SCHEME, AUTHORITY, (":authority", "evil"), PATH]),
        only("a pseudo-header behind a field", &[METHOD, SCHEME, AUTHORITY, ("x-a", "1"), PATH]),
        only("no method", &[SCHEME, AUTHORITY, PATH]),
        only("no path", &[METHOD, SCHEME, AUTHORITY]),
        only("no scheme", &[METHOD, AUTHORITY, PATH]),
        only("no authority and no host", &[METHOD, SCHEME, PATH]),
        only("an empty path", &[METHOD, SCHEME, AUTHORITY, (":path", "")]),
        only("a path without a slash", &[METHOD, SCHEME, AUTHORITY, (":path", "smuggled")]),
        only("* with POST", &[METHOD, SCHEME, AUTHORITY, (":path", "*")]),
        only("CR LF in the path", &[METHOD, SCHEME, AUTHORITY, (":path", "/ HTTP/1.1\r\nx-smuggled: 1\r\n")]),
        only("a space in the path", &[METHOD, SCHEME, AUTHORITY, (":path", "/a b")]),
        only("NUL in the path", &[METHOD, SCHEME, AUTHORITY, (":path", "/\0")]),
        only("CR LF in the method", &[(":method", "GET /smuggled HTTP/1.1\r\n"), SCHEME, AUTHORITY, PATH]),
        only("a space in the method", &[(":method", "GET /smuggled"), SCHEME, AUTHORITY, PATH]),
        only("CR LF in the authority", &[METHOD, SCHEME, (":authority", "up\r\nx: 1"), PATH]),
        only("a space in the authority", &[METHOD, SCHEME, (":authority", "up evil"), PATH]),
        only("a path in the authority", &[METHOD, SCHEME, (":authority", "up/smuggled"), PATH]),
        only("CONNECT with a path", &[(":method", "CONNECT"), SCHEME, AUTHORITY, PATH]),
        either(may(for_up, with("a Host that differs from the authority", &[("host", "evil")]))),
        may(for_up, with("the same Host", &[("host", "up")])),
        may(for_up, only("Host in place of the authority", &[METHOD, SCHEME, PATH, ("host", "up")])),
        with("two Hosts", &[("host", "up"), ("host", "evil")]),
        body("hello", with("a length past the body", &[("content-length", "6")])),
        body("hello", with("a length short of the body", &[("content-length", "4")])),
        body("hello", with("a length with plus", &[("content-length", "+5")])),
        body("hello", with("two lengths", &[("content-length", "5"), ("content-length", "6")])),
        with("a length and no body", &[("content-length", "5")]),
        either(may(
            |request| request.body == b"hello" && request.trailers.is_empty(),
            Case {
                trailers: vec![(":path", "/smuggled")],
                ..body("hello", with("a pseudo-header in trailers passes nothing on", &[]))
            },
        )),
        Case { trailers: vec![("x-a", "1\r\nx-b: 2")], ..body("hello", with("CR LF in trailers", &[])) },
        Case {
            trailers: vec![("connection", "close")],
            ..body("hello", with("Connection in trailers", &[]))
        },
        may(
            |request| request.all("cookie").collect::<Vec<_>>() == ["a=1; b=2"],
            with("crumbs of a cookie are joined", &[("cookie", "a=1"), ("cookie", "b=2")]),
        ),
    ]
}

#[test]
fn no_ambiguous_http1_request_is_made_from_http2() {
    let recorder = Recorder::start();
    let proxy = Proxy::start(format!(
        "[[upstream]]\nname = \"up\"\nprotocol = \"http1\"\nendpoints = [\"{}\"]\n",
        recorder.server.address()
    ));
    let mut failures = Vec::new();
    for case in cases() {
        let mut client = H2Client::connect(proxy.outbound());
        client.raw = client.raw.with_read_timeout(Duration::from_secs(5));
        let ends = case.body.is_none();
        client.headers(1, &h2::block(&case.fields), ends);
        if let Some(body) = case.body {
            let flags = if case.trailers.is_empty() { h2::END_STREAM } else { 0 };
            client.send(h2::frame(h2::DATA, flags, 1, body.as_bytes()));
            if !case.trailers.is_empty() {
                client.headers(1, &h2::block(&case.trailers), true);
            }
        }
        let end = client.end_of(1);
        let seen = recorder.take();
        let refused = !matches!(end, End::Response(Some(..=399) | None) | End::Silent);
        let well = match (&seen.requests[..], case.passes) {
            _ if !seen.wrong.is_empty() => false,
            ([], None) => refused,
            ([], Some(_)) => refused && case.either,
            ([request], Some(check)) => check(request) && end == End::Response(Some(200)),
            _ => false,
        };
        if !well {
            failures.push(format!(
                "{}: the client saw {end:?}, the service {:?} {:?}",
                case.name, seen.requests, seen.wrong
            ));
        }
        // An invalid connection never affects another.
        H2Client::connect(proxy.outbound()).must_get(1, "/sentinel");
        recorder.take();
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}
