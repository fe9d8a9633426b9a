//! The table of responses: what a broken or hostile upstream may send, and what the client may see of it.

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

use crate::support::{Proxy, RawClient, RawServer, strict::Message};

enum Expect {
    /// An error of the proxy, or a close before the response is complete.
    Failure,
    /// A response for which this holds.
    Answer(Check),
    /// Both are correct.
    FailureOr(Check),
}

type Check = fn(&Message) -> bool;

struct Case {
    name: &'static str,
    raw: Vec<u8>,
    /// The upstream closes after it.
    closes: bool,
    expect: Expect,
}

fn case(name: &'static str, raw: impl Into<Vec<u8>>, expect: Expect) -> Case {
    Case { name, raw: raw.into(), closes: false, expect }
}

fn cut(name: &'static str, raw: impl Into<Vec<u8>>) -> Case {
    Case { name, raw: raw.into(), closes: true, expect: Expect::Failure }
}

fn hello(message: &Message) -> bool {
    message.body == b"hello"
}

fn empty(message: &Message) -> bool {
    message.body.is_empty()
}

/// 200 with these fields, then the body.
fn ok(fields: &str, body: &str) -> Vec<u8> {
    format!("HTTP/1.1 200 OK\r\n{fields}\r\n{body}").into_bytes()
}

fn field(field: &[u8]) -> Vec<u8> {
    [b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n".as_slice(), field, b"\r\n\r\nhello"].concat()
}

fn status(line: &str) -> Vec<u8> {
    format!("{line}\r\nContent-Length: 5\r\n\r\nhello").into_bytes()
}

const POISON: &str = "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison";

fn cases() -> Vec<Case> {
    use Expect::{Answer, Failure, FailureOr};
    let length = |value: &str| ok(&format!("Content-Length: {value}\r\n"), "hello");
    let coding = |value: &str| ok(&format!("Transfer-Encoding: {value}\r\n"), "5\r\nhello\r\n0\r\n\r\n");
    let chunked = |body: &str| ok("Transfer-Encoding: chunked\r\n", body);
    let many = |count: usize| (0..count).map(|number| format!("x-{number}: 1\r\n")).collect::<String>();
    vec![
        case("a plain response", length("5"), Answer(hello)),
        case("a chunked response", coding("chunked"), Answer(hello)),
        case(
            "a second response after the first",
            ok("Content-Length: 5\r\n", &format!("hello{POISON}")),
            Answer(hello),
        ),
        case(
            "a second response after a chunked one",
            chunked(&format!("5\r\nhello\r\n0\r\n\r\n{POISON}")),
            Answer(hello),
        ),
        case("junk after the response", ok("Content-Length: 5\r\n", "hello\r\n\r\npoison"), Answer(hello)),
        case("a body with 204", format!("HTTP/1.1 204 No Content\r\n\r\n{POISON}"), FailureOr(empty)),
        case(
            "a length with 204",
            format!("HTTP/1.1 204 No Content\r\nContent-Length: 46\r\n\r\n{POISON}"),
            FailureOr(empty),
        ),
        case(
            "a body with 304",
            format!("HTTP/1.1 304 Not Modified\r\nContent-Length: 46\r\n\r\n{POISON}"),
            FailureOr(empty),
        ),
        case(
            "a response after an interim one",
            format!(
                "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n{}",
                "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
            ),
            Answer(hello),
        ),
        case(
            "an upgrade that was not requested",
            format!("HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n{POISON}"),
            Failure,
        ),
        case(
            "length and chunked",
            ok(
                "Content-Length: 15\r\nTransfer-Encoding: chunked\r\n",
                &format!("5\r\nhello\r\n0\r\n\r\n{POISON}"),
            ),
            FailureOr(hello),
        ),
        case(
            "chunked and length",
            ok(
                "Transfer-Encoding: chunked\r\nContent-Length: 3\r\n",
                &format!("5\r\nhello\r\n0\r\n\r\n{POISON}"),
            ),
            FailureOr(hello),
        ),
        case("two lengths that differ", ok("Content-Length: 5\r\nContent-Length: 6\r\n", "hello"), Failure),
        case(
            "two equal lengths",
            ok("Content-Length: 5\r\nContent-Length: 5\r\n", "hello"),
            FailureOr(hello),
        ),
        case("a list of lengths that differ", length("5, 6"), Failure),
        case("a length with plus", length("+5"), Failure),
        case("a negative length", length("-5"), Failure),
        case("a length past 64 bits", length("18446744073709551621"), Failure),
        case("a length that is a word", length("five"), Failure),
        case("chunked, identity", coding("chunked, identity"), Failure),
        case("xchunked", coding("xchunked"), Failure),
        case("gzip, chunked", coding("gzip, chunked"), Failure),
        case(
            "chunked on HTTP/1.0",
            "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
            FailureOr(hello),
        ),
        case("a chunk size past 64 bits", chunked("10000000000000005\r\nhello\r\n0\r\n\r\n"), Failure),
        case("a negative chunk size", chunked("-5\r\nhello\r\n0\r\n\r\n"), Failure),
        case("a chunk longer than its size", chunked("5\r\nhello!\r\n0\r\n\r\n"), Failure),
        case("a bare LF in a chunk extension", chunked("5;a\nhello\r\n0\r\n\r\n"), Failure),
        case(
            "64 KiB of chunk extension",
            chunked(&format!("5;{}\r\nhello\r\n0\r\n\r\n", "a".repeat(65_536))),
            Failure,
        ),
        case(
            "64 KiB of trailers",
            chunked(&format!("5\r\nhello\r\n0\r\n{}\r\n", format!("t: {}\r\n", "a".repeat(1000)).repeat(66))),
            Failure,
        ),
        case("no status line", "hello, caller\r\n\r\n", Failure),
        case("HTTP/2.0 in text", status("HTTP/2.0 200 OK"), Failure),
        case("a status of two digits", status("HTTP/1.1 99 Low"), Failure),
        case("a status of four digits", status("HTTP/1.1 2000 High"), Failure),
        case("a status of letters", status("HTTP/1.1 OK 200"), Failure),
        case("a status of zero", status("HTTP/1.1 000 None"), Failure),
        case("no reason", status("HTTP/1.1 200"), Answer(hello)),
        case("a control byte in the reason", status("HTTP/1.1 200 O\u{1}K"), Failure),
        case("a NUL in a value", field(b"X-A: 1\x002"), Failure),
        case("a bare CR in a value", field(b"X-A: 1\r2"), Failure),
        case("an escape in a value", field(b"X-A: \x1b[2J"), Failure),
        case(
            "a space before a colon",
            field(b"X-A : 1"),
            FailureOr(|response| hello(response) && response.field("x-a").is_none_or(|value| value == "1")),
        ),
        case(
            "a space before the colon of Content-Length",
            ok("Content-Length : 5\r\n", &format!("hello{POISON}")),
            FailureOr(hello),
        ),
        case("a folded field", field(b"X-A: 1\r\n 2"), FailureOr(hello)),
        case("a line without a colon", field(b"garbage"), Failure),
        case("70 KiB of fields", field(&[b"X-A: ".as_slice(), &[b'a'; 70 * 1024]].concat()), Failure),
        case("200 fields", ok(&format!("Content-Length: 5\r\n{}", many(200)), "hello"), Failure),
        case(
            "fields named in Connection are removed",
            ok(
                "Connection: x-hop\r\nX-Hop: 1\r\nKeep-Alive: timeout=5\r\nProxy-Connection: x\r\nContent-Length: 5\r\n",
                "hello",
            ),
            Answer(|response| {
                hello(response)
                    && ["x-hop", "keep-alive", "proxy-connection"]
                        .iter()
                        .all(|name| response.field(name).is_none())
            }),
        ),
        case(
            "two cookies stay two",
            ok("Set-Cookie: a=1\r\nSet-Cookie: b=2\r\nContent-Length: 5\r\n", "hello"),
            Answer(|response| {
                hello(response) && response.all("set-cookie").collect::<Vec<_>>() == ["a=1", "b=2"]
            }),
        ),
        cut("a body cut short", ok("Content-Length: 50\r\n", "hello")),
        cut("a chunked body cut short", chunked("5\r\nhello\r\n")),
        cut("a chunk cut short", chunked("50\r\nhello")),
        cut("a head cut short", "HTTP/1.1 200 OK\r\nContent-Le"),
        cut("no response", ""),
        Case { closes: true, ..case("a body that ends by close", ok("", "hello"), Answer(hello)) },
        Case {
            closes: true,
            ..case("a body that ends by close on HTTP/1.0", "HTTP/1.0 200 OK\r\n\r\nhello", Answer(hello))
        },
    ]
}

/// `/attack/N` gets the bytes of case N, every other path `clean`; the connection is kept if the case does not close
/// it.
fn serve(mut stream: TcpStream, cases: &[Case]) {
    let (mut head, mut chunk) = (Vec::new(), [0; 4096]);
    loop {
        match stream.read(&mut chunk) {
            Ok(0) | Err(_) => return,
            Ok(count) => head.extend_from_slice(&chunk[..count]),
        }
        if !head.ends_with(b"\r\n\r\n") {
            continue;
        }
        let text = String::from_utf8_lossy(&head).into_owned();
        head.clear();
        let number =
            text.split("/attack/").nth(1).and_then(|rest| rest.split(' ').next()?.parse::<usize>().ok());
        let sent = match number.and_then(|number| cases.get(number)) {
            Some(case) => stream.write_all(&case.raw).is_ok() && !case.closes,
            None => stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nclean").is_ok(),
        };
        if !sent {
            return;
        }
    }
}

#[test]
fn no_ambiguous_response_reaches_the_client() {
    let table = std::sync::Arc::new(cases());
    let served = table.clone();
    let server = RawServer::start(move |stream| serve(stream, &served));
    // Each case is tested alone: no second attempt, no breaker that opens on the way.
    let proxy = Proxy::start(format!(
        "[inbound]\nforward_to = \"{0}\"\n[defaults]\nretry = false\nbreaker = false\noutlier = false\n\
         [[upstream]]\nname = \"up\"\nendpoints = [\"{0}\"]\n",
        server.address()
    ));
    let mut failures = Vec::new();
    for (number, case) in table.iter().enumerate() {
        for (way, address) in [("out", proxy.outbound()), ("in", proxy.inbound())] {
            if let Err(why) = run(case, number, address) {
                failures.push(format!("{way}, {}: {why}", case.name))
            }
        }
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

fn run(case: &Case, number: usize, address: std::net::SocketAddr) -> Result<(), String> {
    let mut client = RawClient::connect(address).with_read_timeout(Duration::from_secs(5));
    client.send(format!("GET /attack/{number} HTTP/1.1\r\nHost: up\r\n\r\n"));
    let response = client.response()?;
    let failed = response.as_ref().is_none_or(|response| response.status() >= 500);
    match (&case.expect, &response) {
        (Expect::Failure | Expect::FailureOr(_), _) if failed => {}
        (Expect::Answer(check) | Expect::FailureOr(check), Some(response)) if check(response) => {}
        _ => return Err(format!("the client got {response:?}")),
    }
    // Further bytes of the upstream must not become the response to another client's next request.
    client.send("GET /clean HTTP/1.1\r\nHost: up\r\n\r\n");
    if let Some(next) = client.response()?.filter(|next| next.body != b"clean") {
        return Err(format!("the next response on the connection is {next:?}"));
    }
    for _ in 0..2 {
        let next = RawClient::connect(address).ask("GET /clean HTTP/1.1\r\nHost: up\r\n\r\n");
        if (next.status(), next.text().as_str()) != (200, "clean") {
            return Err(format!("the next response is {next:?}"));
        }
    }
    Ok(())
}
