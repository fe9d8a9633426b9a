//! The table of requests: raw bytes, and what must happen to them (RFC 9112 §2.2, 3.2, 5, 6, 7; RFC 9110 §7).

use super::{Case, Listener, denied, one, refused, refused_or_one};
use crate::support::strict::Message;

/// `POST /` with these fields (each with its CRLF), then the body.
fn post(fields: &str, body: &str) -> Vec<u8> {
    format!("POST / HTTP/1.1\r\nHost: up\r\n{fields}\r\n{body}").into_bytes()
}

fn get(fields: &str) -> Vec<u8> {
    format!("GET / HTTP/1.1\r\nHost: up\r\n{fields}\r\n").into_bytes()
}

/// A chunked request with this body.
fn chunked(body: &str) -> Vec<u8> {
    post("Transfer-Encoding: chunked\r\n", body)
}

/// `GET` with this target.
fn target(target: &str) -> Vec<u8> {
    format!("GET {target} HTTP/1.1\r\nHost: up\r\n\r\n").into_bytes()
}

fn host(host: &str) -> Vec<u8> {
    format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n").into_bytes()
}

const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nHost: up\r\n\r\n";

fn any(_: &Message) -> bool {
    true
}

fn hello(request: &Message) -> bool {
    request.body == b"hello"
}

fn no_body(request: &Message) -> bool {
    request.body.is_empty()
}

pub(super) fn cases() -> Vec<Case> {
    [
        lengths(),
        codings(),
        chunks(),
        bytes(),
        request_lines(),
        hosts(),
        hop_by_hop(),
        identity(),
        sizes(),
        paths(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn lengths() -> Vec<Case> {
    let length = |value: &str| post(&format!("Content-Length: {value}\r\n"), "hello");
    vec![
        one("a plain length", length("5"), hello),
        refused("two lengths that differ", post("Content-Length: 5\r\nContent-Length: 6\r\n", "hello!")),
        refused(
            "two lengths that differ, shorter last",
            post("Content-Length: 6\r\nContent-Length: 5\r\n", "hello!"),
        ),
        refused_or_one(
            "two equal lengths",
            post("Content-Length: 5\r\nContent-Length: 5\r\n", "hello"),
            hello,
        ),
        refused_or_one("a list of equal lengths", length("5, 5"), hello),
        refused("a list of lengths that differ", length("5, 6")),
        refused("a length with plus", length("+5")),
        refused("a negative length", length("-5")),
        refused("a length in hex", length("0x5")),
        refused("two numbers in one length", length("5 5")),
        refused("a length with a fraction", length("5.0")),
        refused("a length with a parameter", length("5;a")),
        refused("an empty length", length("")),
        refused("a length and an empty one", post("Content-Length: 5\r\nContent-Length:\r\n", "hello")),
        refused("a length past 64 bits", length("18446744073709551621")),
        refused("a length of 40 digits", length("5555555555555555555555555555555555555555")),
        refused_or_one("a length with zeros in front", length("0005"), hello),
        refused_or_one("a length between tabs", length("\t5\t"), hello),
        one(
            "an underscore makes another field",
            post("Content_Length: 3\r\nContent-Length: 5\r\n", "hello"),
            hello,
        ),
        one(
            "a body on GET is a body (CL.0)",
            format!("GET / HTTP/1.1\r\nHost: up\r\nContent-Length: {}\r\n\r\n{SMUGGLED}", SMUGGLED.len()),
            |request| request.text() == SMUGGLED,
        ),
        refused_or_one(
            "no body by close on HTTP/1.0",
            format!("POST / HTTP/1.0\r\nHost: up\r\n\r\n{SMUGGLED}"),
            no_body,
        )
        .closing(),
    ]
}

fn codings() -> Vec<Case> {
    let coding = |value: &str| post(&format!("Transfer-Encoding: {value}\r\n"), "5\r\nhello\r\n0\r\n\r\n");
    let both = |fields: &str, body: &str| post(fields, body);
    let smuggling = format!("0\r\n\r\n{SMUGGLED}");
    let inner = format!("{:x}\r\n{SMUGGLED}\r\n0\r\n\r\n", SMUGGLED.len());
    vec![
        one("plain chunked", coding("chunked"), hello),
        refused_or_one("chunked in capitals", coding("CHUNKED"), hello),
        refused_or_one("chunked behind a tab", coding("\tchunked"), hello),
        refused_or_one(
            "length, then chunked",
            both("Content-Length: 15\r\nTransfer-Encoding: chunked\r\n", "5\r\nhello\r\n0\r\n\r\n"),
            hello,
        )
        .closing(),
        refused_or_one(
            "chunked, then length",
            both("Transfer-Encoding: chunked\r\nContent-Length: 15\r\n", "5\r\nhello\r\n0\r\n\r\n"),
            hello,
        )
        .closing(),
        refused_or_one(
            "CL.TE with one byte over",
            both("Content-Length: 6\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\nG"),
            no_body,
        )
        .closing(),
        refused_or_one(
            "CL.TE with a request behind",
            both(
                &format!("Content-Length: {}\r\nTransfer-Encoding: chunked\r\n", smuggling.len()),
                &smuggling,
            ),
            no_body,
        )
        .closing(),
        refused_or_one(
            "TE.CL with a request inside",
            both("Content-Length: 4\r\nTransfer-Encoding: chunked\r\n", &inner),
            |request| request.text() == SMUGGLED,
        )
        .closing(),
        refused_or_one(
            "length 0 and chunked",
            both("Content-Length: 0\r\nTransfer-Encoding: chunked\r\n", "5\r\nhello\r\n0\r\n\r\n"),
            hello,
        )
        .closing(),
        refused("identity", coding("identity")),
        refused("gzip alone", coding("gzip")),
        refused("gzip, chunked", coding("gzip, chunked")),
        refused("chunked, identity", coding("chunked, identity")),
        refused("identity, chunked", coding("identity, chunked")),
        refused("chunked twice in one field", coding("chunked, chunked")),
        refused(
            "chunked in two fields",
            both("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\n"),
        ),
        refused(
            "chunked, then identity in a second field",
            both("Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n", "0\r\n\r\n"),
        ),
        refused("xchunked", coding("xchunked")),
        refused("chunkedx", coding("chunkedx")),
        refused("chunked in quotes", coding("\"chunked\"")),
        refused("chunked with a parameter", coding("chunked;q=1")),
        refused("chunked behind a comma", coding(",chunked")),
        refused("an empty coding", coding("")),
        refused("chunked behind a vertical tab", coding("\u{b}chunked")),
        refused("chunked before a NUL", coding("chunked\0")),
        refused("a space before the colon", both("Transfer-Encoding : chunked\r\n", "0\r\n\r\n")),
        refused_or_one(
            "folded",
            both("Transfer-Encoding:\r\n chunked\r\n", "5\r\nhello\r\n0\r\n\r\n"),
            hello,
        ),
        refused_or_one(
            "behind a bare LF",
            both("X: y\nTransfer-Encoding: chunked\r\n", "5\r\nhello\r\n0\r\n\r\n"),
            hello,
        ),
        refused("behind a bare CR", both("X: y\rTransfer-Encoding: chunked\r\n", "0\r\n\r\n")),
        one(
            "with an underscore it is another field",
            both("Transfer_Encoding: chunked\r\nContent-Length: 5\r\n", "hello"),
            hello,
        ),
        refused(
            "chunked on HTTP/1.0",
            format!("POST / HTTP/1.0\r\nHost: up\r\nTransfer-Encoding: chunked\r\n\r\n{smuggling}"),
        ),
        refused(
            "chunked and a length on HTTP/1.0",
            format!(
                "POST / HTTP/1.0\r\nHost: up\r\nConnection: keep-alive\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n{smuggling}"
            ),
        ),
    ]
}

fn chunks() -> Vec<Case> {
    vec![
        refused("a chunk size past 64 bits", chunked("10000000000000005\r\nhello\r\n0\r\n\r\n")),
        refused("a chunk size of f × 17", chunked("fffffffffffffffff\r\nhello\r\n0\r\n\r\n")),
        refused("a chunk size with 0x", chunked("0x5\r\nhello\r\n0\r\n\r\n")),
        refused("a negative chunk size", chunked("-5\r\nhello\r\n0\r\n\r\n")),
        refused("a chunk size with plus", chunked("+5\r\nhello\r\n0\r\n\r\n")),
        refused("a chunk size behind a space", chunked(" 5\r\nhello\r\n0\r\n\r\n")),
        refused("no chunk size", chunked("\r\nhello\r\n0\r\n\r\n")),
        refused("a chunk size that is a word", chunked("five\r\nhello\r\n0\r\n\r\n")),
        refused_or_one("a chunk size before a space", chunked("5 \r\nhello\r\n0\r\n\r\n"), hello),
        refused_or_one("a last chunk of many zeros", chunked("5\r\nhello\r\n000\r\n\r\n"), hello),
        one("a chunk extension is dropped", chunked("5;a=b\r\nhello\r\n0;c\r\n\r\n"), hello),
        refused(
            "64 KiB of chunk extension",
            chunked(&format!("5;{}\r\nhello\r\n0\r\n\r\n", "a".repeat(65_536))),
        ),
        refused(
            "64 KiB of small chunk extensions",
            chunked(&format!("1;{}\r\nx\r\n", "a".repeat(99)).repeat(700)),
        ),
        refused("a bare LF in a chunk extension", chunked("5;a\nhello\r\n0\r\n\r\n")),
        refused("a bare CR in a chunk extension", chunked("5;a\rb\r\nhello\r\n0\r\n\r\n")),
        refused("a chunk longer than its size", chunked("5\r\nhello!\r\n0\r\n\r\n")),
        refused("a chunk shorter than its size", chunked("6\r\nhello\r\n0\r\n\r\n")),
        refused("a chunk size before a bare LF", chunked("5\nhello\r\n0\r\n\r\n")),
        refused("chunk data before a bare LF", chunked("5\r\nhello\n0\r\n\r\n")),
        refused("chunk data before two other bytes", chunked("5\r\nhelloXX0\r\n\r\n")),
        refused("a chunk size before CR CR LF", chunked("5\r\r\nhello\r\n0\r\n\r\n")),
        refused(
            "64 KiB of trailers",
            chunked(&format!("0\r\n{}\r\n", format!("t: {}\r\n", "a".repeat(1000)).repeat(66))),
        ),
        refused("trailers that end by a bare LF", chunked(&format!("0\r\n\n{SMUGGLED}"))),
        refused("a trailer that ends by a bare LF", chunked(&format!("0\r\nX-T: 1\n\r\n{SMUGGLED}"))),
        refused(
            "17 KiB of chunk extension",
            chunked(&format!("5;{}\r\nhello\r\n0\r\n\r\n", "a".repeat(17 << 10))),
        ),
        one(
            "15 KiB of chunk extension",
            chunked(&format!("5;{}\r\nhello\r\n0\r\n\r\n", "a".repeat(15 << 10))),
            hello,
        ),
        refused("200 trailers", chunked(&format!("0\r\n{}\r\n", "t: a\r\n".repeat(200)))),
        refused_or_one(
            "framing fields as trailers",
            chunked("0\r\nContent-Length: 9\r\nTransfer-Encoding: x\r\nHost: evil\r\nX-T: 1\r\n\r\n"),
            |request| request.trailers.iter().all(|(name, _)| name.eq_ignore_ascii_case("x-t")),
        ),
        refused_or_one(
            "identity fields as trailers",
            chunked("0\r\nAuthorization: x\r\nX-Forwarded-Client-Cert: x\r\nX-Outrigger-Retry: no\r\n\r\n"),
            |request| request.trailers.is_empty(),
        ),
        refused("a trailer with a space before the colon", chunked("0\r\nX-T : 1\r\n\r\n")),
        one(
            "chunked on GET",
            b"GET / HTTP/1.1\r\nHost: up\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
                .to_vec(),
            hello,
        ),
    ]
}

fn bytes() -> Vec<Case> {
    let raw = |field: &[u8]| [b"GET / HTTP/1.1\r\nHost: up\r\n".as_slice(), field, b"\r\n\r\n"].concat();
    vec![
        refused("a space before the colon of Host", b"GET / HTTP/1.1\r\nHost : up\r\n\r\n".to_vec()),
        refused("a tab before a colon", raw(b"X-A\t: 1")),
        refused_or_one("a folded field", raw(b"X-A: 1\r\n 2"), |request| {
            request.field("x-a").is_some_and(|value| value.starts_with('1') && value.ends_with('2'))
        }),
        refused(
            "a first field line with a space in front",
            b"GET / HTTP/1.1\r\n Host: up\r\nHost: up\r\n\r\n".to_vec(),
        ),
        refused("a bare CR in a value", raw(b"X-A: 1\r2")),
        refused("a bare CR before a name", raw(b"X-A: 1\r\n\rX-B: 2")),
        refused("a NUL in a value", raw(b"X-A: 1\x002")),
        refused("a NUL in a name", raw(b"X-\0A: 1")),
        refused("control byte 1 in a value", raw(b"X-A: 1\x012")),
        refused("an escape in a value", raw(b"X-A: \x1b[2J")),
        refused("DEL in a value", raw(b"X-A: 1\x7f2")),
        refused("@ in a name", raw(b"X@A: 1")),
        refused("a space in a name", raw(b"X A: 1")),
        refused("an empty name", raw(b": 1")),
        refused("a line without a colon", raw(b"garbage")),
        refused("a name that is not ASCII", raw("X-Ä: 1".as_bytes())),
        refused_or_one("Latin-1 in a value passes or not", raw(b"X-A: \xe4"), |request| {
            request.field("x-a").is_some()
        }),
        refused("bare LF for every line end", b"GET / HTTP/1.1\nHost: up\n\n".to_vec()),
        refused("a bare LF behind the request line", b"GET / HTTP/1.1\nHost: up\r\n\r\n".to_vec()),
        refused("a bare LF behind a field", raw(b"X-A: 1\nX-B: 2")),
        refused("a bare LF behind the last field", b"GET / HTTP/1.1\r\nHost: up\n\r\n".to_vec()),
        refused("a bare LF for the empty line", b"GET / HTTP/1.1\r\nHost: up\r\n\n".to_vec()),
        refused_or_one("an empty line in front", b"\r\nGET / HTTP/1.1\r\nHost: up\r\n\r\n".to_vec(), any)
            .only(Listener::Outbound),
        refused("a NUL in front", b"\0GET / HTTP/1.1\r\nHost: up\r\n\r\n".to_vec()).only(Listener::Outbound),
    ]
}

fn request_lines() -> Vec<Case> {
    let line = |line: &str| format!("{line}\r\nHost: up\r\n\r\n");
    vec![
        refused("no version", line("GET /")),
        refused("HTTP/0.9", line("GET / HTTP/0.9")),
        refused("HTTP/1.2", line("GET / HTTP/1.2")),
        refused("HTTP/2.0 in text", line("GET / HTTP/2.0")),
        refused("http in small letters", line("GET / http/1.1")),
        refused("two spaces before the target", line("GET  /smuggled HTTP/1.1")),
        refused("two spaces before the version", line("GET /  HTTP/1.1")),
        refused("a space in the target", line("GET /a b HTTP/1.1")),
        refused("words behind the version", line("GET / HTTP/1.1 HTTP/1.1")),
        refused("a NUL in the target", line("GET /\0 HTTP/1.1")),
        refused("control byte 1 in the target", line("GET /\u{1} HTTP/1.1")),
        refused("DEL in the target", line("GET /\u{7f} HTTP/1.1")),
        refused("a bare CR in the target", line("GET /\r HTTP/1.1")),
        denied("a target without a slash", line("GET foo HTTP/1.1")),
        denied("* with GET", line("GET * HTTP/1.1")),
        denied("PRI outside of HTTP/2", line("PRI * HTTP/1.1")),
        refused("CONNECT with a path", line("CONNECT /path HTTP/1.1")),
        refused("CONNECT without a port", line("CONNECT up HTTP/1.1")),
        refused_or_one("* with OPTIONS", line("OPTIONS * HTTP/1.1"), |request| request.target() == "*"),
        refused_or_one("an unknown method", line("BREW / HTTP/1.1"), |request| {
            request.start.starts_with("BREW /")
        }),
        refused("a fragment", line("GET /a#b HTTP/1.1")),
        denied(
            "an unknown expectation",
            "POST / HTTP/1.1\r\nHost: up\r\nExpect: wonders\r\nContent-Length: 5\r\n\r\nhello",
        ),
    ]
}

fn hosts() -> Vec<Case> {
    vec![
        denied("no Host", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
        denied("Host twice", get("Host: up\r\n")),
        denied("two Hosts", get("Host: evil\r\n")),
        denied("two Hosts with other letters", get("hOST: evil\r\n")),
        denied("a list of hosts", host("up, evil")),
        denied("a host with a path", host("up/smuggled")),
        denied("a host with a user", host("evil@up")),
        denied("a host with a space", host("up evil")),
        denied("a host with a port past 65535", host("up:99999")),
        denied("a host with a port that is a word", host("up:http")),
        denied("a host with an open bracket", host("[::1")),
        denied("an address with a zone", host("[fe80::1%eth0]")),
        denied("an address with an encoded zone", host("[fe80::1%25eth0]:80")),
        one("an empty port", host("up:"), |request| request.field("host") == Some("up:")),
        denied("a host with a question mark", host("up?x")),
        denied("a host with a backslash", host("up\\evil")),
        refused_or_one("an empty Host", host(""), any),
        one(
            "absolute form wins over Host",
            b"GET http://up/abs HTTP/1.1\r\nHost: evil\r\n\r\n".to_vec(),
            |request| request.target() == "/abs" && request.field("host") == Some("up"),
        ),
        one(
            "absolute form without a path",
            b"GET http://up HTTP/1.1\r\nHost: up\r\n\r\n".to_vec(),
            |request| request.target() == "/" && request.field("host") == Some("up"),
        ),
        one(
            "absolute form with only a query",
            b"GET http://up?q HTTP/1.1\r\nHost: up\r\n\r\n".to_vec(),
            |request| request.target() == "/?q",
        ),
        denied(
            "absolute form with two Hosts",
            b"GET http://up/ HTTP/1.1\r\nHost: up\r\nHost: evil\r\n\r\n".to_vec(),
        ),
        refused_or_one(
            "absolute form without Host",
            b"GET http://up/ HTTP/1.1\r\n\r\n".to_vec(),
            |request| request.field("host") == Some("up"),
        ),
        refused_or_one(
            "absolute form with a user",
            b"GET http://evil:pw@up/ HTTP/1.1\r\nHost: up\r\n\r\n".to_vec(),
            |request| request.field("host") == Some("up"),
        ),
        denied("absolute form of another scheme", b"GET ftp://up/ HTTP/1.1\r\nHost: up\r\n\r\n".to_vec()),
        refused_or_one("HTTP/1.0 without Host", b"GET / HTTP/1.0\r\n\r\n".to_vec(), any).closing(),
    ]
}

fn hop_by_hop() -> Vec<Case> {
    vec![
        one(
            "fields named in Connection are removed",
            get("Connection: x-hop\r\nX-Hop: 1\r\nX-End: 2\r\n"),
            |request| request.field("x-hop").is_none() && request.field("x-end") == Some("2"),
        ),
        one(
            "fields named in two Connection fields are removed",
            get("Connection: x-a, X-B\r\nConnection: x-c\r\nX-A: 1\r\nX-B: 1\r\nX-C: 1\r\n"),
            |request| ["x-a", "x-b", "x-c"].iter().all(|name| request.field(name).is_none()),
        ),
        refused_or_one("Connection names Host", get("Connection: host\r\n"), |request| {
            request.field("host") == Some("up")
        }),
        refused_or_one(
            "Connection names Content-Length",
            post("Connection: content-length\r\nContent-Length: 5\r\n", "hello"),
            hello,
        ),
        refused_or_one(
            "Connection names Transfer-Encoding",
            post(
                "Connection: transfer-encoding\r\nTransfer-Encoding: chunked\r\n",
                "5\r\nhello\r\n0\r\n\r\n",
            ),
            hello,
        ),
        refused_or_one(
            "Connection names Authorization",
            get("Connection: authorization\r\nAuthorization: Basic eA==\r\n"),
            |request| request.field("authorization").is_some(),
        ),
        refused_or_one(
            "Connection names traceparent",
            get(
                "Connection: traceparent\r\ntraceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n",
            ),
            |request| request.field("traceparent").is_some(),
        ),
        refused_or_one(
            "Connection names x-forwarded-for",
            get("Connection: x-forwarded-for\r\n"),
            |request| request.field("x-forwarded-for").is_some(),
        )
        .only(Listener::Inbound),
        one(
            "no upgrade to h2c",
            get(
                "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n",
            ),
            |request| request.field("upgrade").is_none() && request.field("http2-settings").is_none(),
        ),
        one(
            "no upgrade to h2c beside others",
            get("Connection: Upgrade\r\nUpgrade: websocket, h2c\r\nHTTP2-Settings: AAMAAABk\r\n"),
            |request| {
                !request.all("upgrade").any(|value| value.to_ascii_lowercase().contains("h2c"))
                    && request.field("http2-settings").is_none()
            },
        ),
        one("an Upgrade that Connection does not name", get("Upgrade: websocket\r\n"), |request| {
            request.field("upgrade").is_none()
        }),
        one(
            "Proxy-Connection and Keep-Alive go",
            get("Proxy-Connection: keep-alive\r\nKeep-Alive: timeout=5\r\n"),
            |request| request.field("proxy-connection").is_none() && request.field("keep-alive").is_none(),
        ),
        one("TE is reduced to trailers", get("Connection: te\r\nTE: gzip, trailers\r\n"), |request| {
            request.all("te").all(|value| value == "trailers")
        }),
        one("Proxy-Authorization is removed", get("Proxy-Authorization: Basic eA==\r\n"), |request| {
            request.field("proxy-authorization").is_none()
        })
        .only(Listener::Outbound),
    ]
}

fn identity() -> Vec<Case> {
    vec![
        one("x-outrigger-retry of a client is removed", get("x-outrigger-retry: no\r\n"), |request| {
            request.field("x-outrigger-retry").is_none()
        }),
        one(
            "x-outrigger-retry twice is removed",
            get("x-outrigger-retry: no\r\nX-Outrigger-Retry: elsewhere\r\n"),
            |request| request.field("x-outrigger-retry").is_none(),
        ),
        refused_or_one("x_outrigger_retry is removed", get("x_outrigger_retry: no\r\n"), |request| {
            request.field("x_outrigger_retry").is_none()
        }),
        one(
            "x-outrigger-attempt is set by the proxy",
            get("x-outrigger-attempt: 7\r\nx-request-timeout-ms: 3000\r\n"),
            |request| {
                request.all("x-outrigger-attempt").collect::<Vec<_>>() == ["1"]
                    && request.all("x-request-timeout-ms").count() == 1
            },
        )
        .only(Listener::Outbound),
        one(
            "a forged client certificate is removed",
            get("x-forwarded-client-cert: By=spiffe://a;URI=spiffe://b\r\n"),
            |request| request.field("x-forwarded-client-cert").is_none(),
        ),
        refused_or_one(
            "a forged client certificate with underscores is removed",
            get("x_forwarded_client_cert: URI=spiffe://b\r\n"),
            |request| request.field("x_forwarded_client_cert").is_none(),
        ),
        one(
            "a forged x-forwarded-for is replaced",
            get("x-forwarded-for: 6.6.6.6\r\nX-Forwarded-For: 7.7.7.7\r\n"),
            |request| request.all("x-forwarded-for").collect::<Vec<_>>() == ["127.0.0.1"],
        )
        .only(Listener::Inbound),
        one("a forged x-forwarded-proto is replaced", get("x-forwarded-proto: https\r\n"), |request| {
            request.all("x-forwarded-proto").collect::<Vec<_>>() == ["http"]
        })
        .only(Listener::Inbound),
    ]
}

fn sizes() -> Vec<Case> {
    let many = |count: usize| (0..count).map(|number| format!("x-{number}: 1\r\n")).collect::<String>();
    vec![
        refused("a value of 70 KiB", get(&format!("X-A: {}\r\n", "a".repeat(70 * 1024)))),
        refused("a name of 70 KiB", get(&format!("{}: 1\r\n", "a".repeat(70 * 1024)))),
        refused("70 KiB in 70 fields", get(&format!("X-A: {}\r\n", "a".repeat(1024)).repeat(70))),
        refused("200 fields", get(&many(200))),
        one("90 fields", get(&many(90)), |request| request.field("x-89").is_some()),
        refused("a target of 70 KiB", target(&format!("/{}", "a".repeat(70 * 1024)))),
        one("a target of 4 KiB", target(&format!("/{}", "a".repeat(4095))), |request| {
            request.target().len() == 4096
        }),
    ]
}

/// Routing may match a normalised path; the forwarded path is unchanged.
fn paths() -> Vec<Case> {
    vec![
        one("dot segments", target("/a/../b/./c"), |request| request.target() == "/a/../b/./c"),
        one("encoded dot segments", target("/a/%2e%2e/b"), |request| request.target() == "/a/%2e%2e/b"),
        one("an encoded slash", target("/a%2fb"), |request| request.target() == "/a%2fb"),
        one("double encoding", target("/a%252fb"), |request| request.target() == "/a%252fb"),
        one("an encoded NUL", target("/a%00b"), |request| request.target() == "/a%00b"),
        one("an encoded CR LF", target("/a%0d%0aX:%20y"), |request| request.target() == "/a%0d%0aX:%20y"),
        one("two slashes", target("//a//b"), |request| request.target() == "//a//b"),
        one("a parameter", target("/a;x=1/b"), |request| request.target() == "/a;x=1/b"),
        one("an empty query", target("/a?"), |request| request.target() == "/a?"),
        one("quotes and brackets", target("/a\"b?<c>={\"d\":1}"), |request| {
            request.target() == "/a\"b?<c>={\"d\":1}"
        }),
        refused_or_one("a backslash", target("/a\\b"), |request| request.target() == "/a\\b"),
        refused_or_one("bad encoding", target("/%zz"), |request| request.target() == "/%zz"),
    ]
}
