//! One exchange, looked at closely: interim answers, trailers, bodies that are not there, fields of the proxy's own.

use std::{
    io::{Read, Write},
    net::TcpStream,
    sync::mpsc,
};

use crate::support::{Proxy, RawClient, RawServer, nobody, strict::Message};

/// Reads until `needle` has come.
fn read_until(stream: &mut TcpStream, needle: &[u8]) -> Vec<u8> {
    let (mut got, mut chunk) = (Vec::new(), [0; 4096]);
    while !got.windows(needle.len()).any(|window| window == needle) {
        match stream.read(&mut chunk) {
            Ok(0) | Err(_) => break,
            Ok(count) => got.extend_from_slice(&chunk[..count]),
        }
    }
    got
}

fn config(server: &RawServer) -> String {
    format!(
        "[service]\nname = \"shop\"\n[inbound]\nforward_to = \"{0}\"\n\
         [[upstream]]\nname = \"up\"\nendpoints = [\"{0}\"]\n",
        server.address()
    )
}

fn lower(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).to_ascii_lowercase()
}

/// Starts a server with this answer, asks it by both listeners, and hands on both what it got and what came back.
#[track_caller]
fn through(answer: &str, request: &str, check: impl Fn(&str, &Message)) {
    let server = RawServer::scripted(answer);
    let proxy = Proxy::start(config(&server));
    for address in [proxy.outbound(), proxy.inbound()] {
        let before = server.received().len();
        let response = RawClient::connect(address).ask(request);
        check(&lower(&server.received()[before..]), &response);
    }
}

const GET: &str = "GET / HTTP/1.1\r\nHost: up\r\n\r\n";

/// The head goes on at once, the body waits for the service's word, which is passed back (RFC 9110 §10.1.1).
#[test]
fn expect_100_continue_is_the_services_to_answer() {
    let (saw_head, head_seen) = mpsc::channel();
    let (go, may_go) = mpsc::channel::<()>();
    let may_go = std::sync::Mutex::new(may_go);
    let server = RawServer::start(move |mut stream| {
        let head = read_until(&mut stream, b"\r\n\r\n");
        let _ = saw_head.send(lower(&head));
        let _ = may_go.lock().expect("no panic").recv();
        let _ = stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n");
        read_until(&mut stream, b"hello");
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\ndone");
    });
    let proxy = Proxy::start(config(&server));
    for address in [proxy.outbound(), proxy.inbound()] {
        let mut client = RawClient::connect(address);
        client.send("POST / HTTP/1.1\r\nHost: up\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n");
        let head =
            head_seen.recv_timeout(crate::support::PATIENCE).expect("the head goes on without the body");
        assert!(head.contains("expect: 100-continue"), "{head}");
        go.send(()).expect("the server waits");
        let interim = client.read_until(b"\r\n\r\n");
        assert!(interim.starts_with(b"HTTP/1.1 100 "), "{:?}", lower(&interim));
        assert_eq!(client.ask("hello").text(), "done");
    }
}

/// A final answer in place of 100 ends it: no body is asked for.
#[test]
fn expect_100_continue_may_be_refused() {
    through(
        "HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno",
        "POST / HTTP/1.1\r\nHost: up\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n",
        |_, response| assert_eq!((response.status(), response.text().as_str()), (403, "no")),
    );
}

#[test]
fn early_hints_pass() {
    let server = RawServer::scripted(
        "HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\nConnection: x-hop\r\nX-Hop: 1\r\n\
         Keep-Alive: timeout=5\r\nProxy-Connection: close\r\nUpgrade: x\r\n\r\n\
         HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    );
    let proxy = Proxy::start(config(&server));
    for address in [proxy.outbound(), proxy.inbound()] {
        let mut client = RawClient::connect(address);
        client.send(GET);
        let got = lower(&client.read_until(b"\r\n\r\nok"));
        assert!(got.starts_with("http/1.1 103 ") && got.contains("link: </a.css>; rel=preload"), "{got}");
        let hints = got.split("\r\n\r\n").next().expect("a first head");
        for hop_by_hop in ["x-hop", "connection", "keep-alive", "upgrade"] {
            assert!(!hints.contains(hop_by_hop), "{hop_by_hop} is for one hop only: {hints}");
        }
        // HTTP/1.0 knows no interim answers.
        let mut client = RawClient::connect(address);
        client.send("GET / HTTP/1.0\r\nHost: up\r\n\r\n");
        let got = lower(&client.read_to_close().0);
        assert!(!got.contains("103 ") && got.contains(" 200 "), "{got}");
    }
}

#[test]
fn trailers_pass_both_ways() {
    through(
        "HTTP/1.1 200 OK\r\nTrailer: x-sum\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nx-sum: 42\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: up\r\nTE: trailers\r\nConnection: TE\r\nTrailer: x-check\r\n\
         Transfer-Encoding: chunked\r\n\r\n0\r\nx-check: 7\r\n\r\n",
        |got, response| {
            assert!(got.contains("0\r\nx-check: 7\r\n\r\n"), "{got}");
            assert_eq!(response.trailers, [("x-sum".to_owned(), "42".to_owned())], "{response:?}");
        },
    );
}

#[test]
fn answers_without_a_body_stay_so() {
    for status in ["204 No Content", "304 Not Modified"] {
        through(&format!("HTTP/1.1 {status}\r\nETag: \"a\"\r\n\r\n"), GET, |_, response| {
            assert!(
                response.body.is_empty() && response.field("transfer-encoding").is_none(),
                "{response:?}"
            );
            assert_eq!(response.field("etag"), Some("\"a\""));
        });
    }
    // HEAD keeps the length of the body that is not there.
    let server = RawServer::scripted("HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n");
    let proxy = Proxy::start(config(&server));
    for address in [proxy.outbound(), proxy.inbound()] {
        let mut client = RawClient::connect(address);
        client.send("HEAD / HTTP/1.1\r\nHost: up\r\n\r\n");
        let got = lower(&client.read_until(b"\r\n\r\n"));
        assert!(got.starts_with("http/1.1 200 ") && got.contains("content-length: 1234"), "{got}");
    }
}

/// The service's own errors pass as they are.
#[test]
fn errors_of_the_service_are_left_alone() {
    through("HTTP/1.1 418 Teapot\r\nX-Why: tea\r\nContent-Length: 5\r\n\r\nshort", GET, |_, response| {
        assert_eq!((response.status(), response.text().as_str()), (418, "short"));
        assert_eq!(response.field("x-why"), Some("tea"));
    });
}

#[test]
fn inbound_says_who_called() {
    let server = RawServer::scripted("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    let proxy = Proxy::start(config(&server));
    RawClient::connect(proxy.inbound()).ask(GET);
    let got = lower(&server.received());
    for needle in
        ["x-forwarded-for: 127.0.0.1", "x-forwarded-proto: http", "x-forwarded-host: up", "via: 1.1 "]
    {
        assert!(got.contains(needle), "no {needle:?} in {got}");
    }
    assert!(got.contains("x-request-id: "), "{got}");
}

/// A refused connection is a 502 with everything that §4.6 promises.
#[test]
fn an_error_of_the_proxys_own_says_so() {
    let refused = nobody();
    let proxy = Proxy::start(format!(
        "[service]\nname = \"shop\"\n[[upstream]]\nname = \"up\"\nendpoints = [\"{refused}\"]\n"
    ));
    let response = RawClient::connect(proxy.outbound()).ask(GET);
    assert_eq!(response.status(), 502, "{response:?}");
    let said = response.field("proxy-status").unwrap_or_default();
    assert!(said.contains("shop") && said.contains("error=connection_refused"), "{said}");
    assert!(said.contains("connect_refused"), "{said}");
    assert_eq!(response.field("content-type"), Some("application/problem+json"));
    let problem: serde_json::Value = serde_json::from_slice(&response.body).expect("JSON");
    assert_eq!(problem["status"], 502);
    assert!(problem["type"].as_str().is_some_and(|kind| kind.contains("connect_refused")), "{problem}");
}

/// A connection that the service closes while it lies in the pool never shows.
#[test]
fn a_stale_pooled_connection_does_not_show() {
    // Each connection answers once, says nothing of closing, and closes when the next request comes.
    let server = RawServer::start(|mut stream| {
        read_until(&mut stream, b"\r\n\r\n");
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
        let _ = stream.read(&mut [0; 1]);
    });
    let proxy = Proxy::start(config(&server));
    for address in [proxy.outbound(), proxy.inbound()] {
        let mut client = RawClient::connect(address);
        for number in 0..20 {
            assert_eq!(client.ask(GET).status(), 200, "request {number} by {address}");
        }
    }
}

/// Metadata services and the proxy's own ports are not for callers of the forward proxy.
#[test]
fn the_forward_proxy_reaches_no_forbidden_address() {
    let proxy = Proxy::start("");
    for host in ["169.254.169.254", "[::ffff:169.254.169.254]", "[fe80::1]", "0.0.0.0:80"] {
        let request = format!("GET http://{host}/ HTTP/1.1\r\nHost: {host}\r\n\r\n");
        let response = RawClient::connect(proxy.outbound()).ask(request);
        assert_eq!(response.status(), 502, "{host}: {response:?}");
        let said = response.field("proxy-status").unwrap_or_default().to_owned();
        assert!(said.contains("destination_ip_prohibited"), "{host}: {said}");
    }
    for own in [proxy.admin(), proxy.outbound(), proxy.inbound()] {
        for request in [
            format!("GET http://{own}/ HTTP/1.1\r\nHost: {own}\r\n\r\n"),
            format!("CONNECT {own} HTTP/1.1\r\nHost: {own}\r\n\r\n"),
        ] {
            let mut client = RawClient::connect(proxy.outbound());
            let response = client.ask(&request);
            assert!(response.status() >= 400, "{request}: {response:?}");
        }
    }
}
