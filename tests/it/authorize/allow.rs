//! `[[inbound.allow]]` and `x-forwarded-client-cert`, seen by callers without a certificate.

use std::process::Command;

use super::Echo;
use crate::support::{Proxy, RawClient, RawServer, binary, eventually, h2, strict::Message};

const RULES: &str = r#"
[[inbound.allow]]
identity = ["spiffe://shop.example/ns/shop/sa/*"]
methods = ["GET"]
paths = ["/v1/*"]
[[inbound.allow]]
identity = ["spiffe://shop.example/ns/shop/sa/root"]
"#;

fn proxy(echo: &Echo, before: &str, rules: &str) -> Proxy {
    Proxy::start(format!("{before}[inbound]\nforward_to = \"{}\"\n{rules}", echo.server.address()))
}

fn ask(proxy: &Proxy, line: &str, head: &str) -> Message {
    RawClient::connect(proxy.inbound()).ask(format!("{line} HTTP/1.1\r\nHost: a\r\n{head}\r\n"))
}

#[test]
fn a_caller_without_a_certificate_fits_no_entry() {
    let echo = Echo::start();
    let proxy = proxy(&echo, "", RULES);
    for (line, head) in [
        ("GET /v1/orders", ""),
        ("GET /v1/orders", "x-forwarded-client-cert: URI=spiffe://shop.example/ns/shop/sa/root\r\n"),
        ("GET /v1/chat", "Connection: upgrade\r\nUpgrade: websocket\r\n"),
        ("CONNECT a:80", ""),
        ("OPTIONS *", ""),
    ] {
        let answer = ask(&proxy, line, head);
        assert_eq!(answer.status(), 403, "{line}");
        assert!(
            answer.text().contains("no allow entry names a caller without a certificate"),
            "{}",
            answer.text()
        );
    }
    let answer =
        ask(&proxy, "POST /pkg.Service/Method", "content-type: application/grpc\r\ncontent-length: 0\r\n");
    assert_eq!((answer.status(), answer.field("grpc-status")), (200, Some("7")), "PERMISSION_DENIED");
    assert_eq!(echo.calls(), 0);
    // Nor does one that speaks something else.
    let service = RawServer::scripted(b"welcome\r\n");
    let raw = Proxy::start(format!("[inbound]\nforward_to = \"{}\"\n{RULES}", service.address()));
    let mut caller = RawClient::connect(raw.inbound());
    caller.send("\x01\x02\x03");
    let (answer, closed) = caller.read_to_close();
    assert!(closed && answer.starts_with(b"HTTP/1.1 400 "), "{}", answer.escape_ascii());
    assert!(service.received().is_empty());
}

#[test]
fn what_could_be_read_in_two_ways_is_malformed() {
    let echo = Echo::start();
    let proxy = proxy(&echo, "", RULES);
    for path in ["/v1/../x", "/v1//x", "/v1/%2e%2e/x", "/v1/..%2fx", "/v1;x", "/v1/%5cx", "/v1/%252e"] {
        let answer = ask(&proxy, &format!("GET {path}"), "");
        assert_eq!(answer.status(), 400, "{path}");
        assert!(answer.text().contains("malformed"), "{}", answer.text());
    }
    for head in
        ["X-HTTP-Method-Override: DELETE\r\n", "X-Original-URL: /admin\r\n", "X-Rewrite-URL: /admin\r\n"]
    {
        assert_eq!(ask(&proxy, "GET /v1/orders", head).status(), 400, "{head}");
    }
    // The same by HTTP/2, whose path is not a line of text.
    let mut caller = h2::H2Client::connect(proxy.inbound());
    caller.headers(1, &h2::get("/v1/..%2fx"), true);
    assert_eq!(caller.end_of(1), h2::End::Answer(Some(400)));
    assert_eq!(echo.calls(), 0);
}

#[test]
fn observed_only_refusals_are_counted_and_logged() {
    let echo = Echo::start();
    let proxy = proxy(&echo, "[runtime]\nobserve = [\"allow\"]\n", RULES);
    assert_eq!(ask(&proxy, "GET /v1/orders", "").status(), 200);
    assert_eq!(ask(&proxy, "DELETE /v1//orders", "").status(), 200);
    eventually("the log", || {
        let log = proxy.stderr();
        log.contains("would be refused (observed only)") && log.contains("no allow entry names")
    });
    let page =
        RawClient::connect(proxy.admin()).ask("GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").text();
    for (reason, count) in [("not_allowed", 2), ("malformed", 1)] {
        let line = format!("outrigger_rejected_total{{upstream=\"inbound\",reason=\"{reason}\"}} {count}\n");
        assert!(page.contains(&line), "{line}");
    }
}

/// Every spelling by which a service could take a caller's word for its identity.
const SPOOFED: &str = "x-forwarded-client-cert: URI=spiffe://a/evil\r\nX-Forwarded-Client-Cert: URI=spiffe://a/evil\r\n\
    x_forwarded_client_cert: URI=spiffe://a/evil\r\nX-Forwarded_Client-Cert: URI=spiffe://a/evil\r\n\
    X_FORWARDED_CLIENT_CERT: URI=spiffe://a/evil\r\n";

#[test]
fn nobody_tells_the_service_who_calls() {
    let echo = Echo::start();
    let upstream = format!("[[upstream]]\nname = \"up\"\nendpoints = [\"{}\"]\n", echo.server.address());
    let proxy = Proxy::start(format!("[inbound]\nforward_to = \"{}\"\n{upstream}", echo.server.address()));
    let inbound = ask(&proxy, "GET /", SPOOFED);
    let outbound =
        RawClient::connect(proxy.outbound()).ask(format!("GET / HTTP/1.1\r\nHost: up\r\n{SPOOFED}\r\n"));
    for answer in [inbound, outbound] {
        assert_eq!(answer.status(), 200);
        assert!(!answer.text().contains("evil"), "{}", answer.text());
    }
}

#[test]
fn trailers_tell_no_more_than_headers() {
    let service = RawServer::scripted(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    let proxy = Proxy::start(format!("[inbound]\nforward_to = \"{}\"\n", service.address()));
    let body = "Trailer: x-sum, x-forwarded-client-cert\r\nTE: trailers\r\nTransfer-Encoding: chunked\r\n";
    let trailers =
        "x-sum: 1\r\nx-forwarded-client-cert: URI=spiffe://a/evil\r\nx_forwarded_client_cert: evil\r\n";
    let answer = RawClient::connect(proxy.inbound())
        .ask(format!("POST / HTTP/1.1\r\nHost: a\r\n{body}\r\n1\r\na\r\n0\r\n{trailers}\r\n"));
    assert_eq!(answer.status(), 200);
    eventually("the request", || String::from_utf8_lossy(&service.received()).contains("x-sum: 1"));
    let received = String::from_utf8_lossy(&service.received()).into_owned();
    assert!(!received.contains("evil"), "{received}");
}

#[test]
fn explain_says_which_entry_a_call_would_fit() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("o.toml");
    let jwt =
        "[inbound.jwt]\nissuer = \"https://id.example\"\naudiences = [\"a\"]\njwks = \"/etc/jwks.json\"\n";
    std::fs::write(&file, format!("{RULES}{jwt}")).expect("write");
    let explain = |arguments: &[&str]| {
        let output = Command::new(binary())
            .args(["explain", "-c"])
            .arg(&file)
            .arg("--inbound")
            .args(arguments)
            .output();
        String::from_utf8(output.expect("it runs").stdout).expect("text")
    };
    let cart = "spiffe://shop.example/ns/shop/sa/cart";
    for (arguments, told) in [
        (&["GET", "/v1/orders"][..], "entry 1: spiffe://shop.example/ns/shop/sa/*"),
        (&["GET", "/v1/orders"], "entry 2: spiffe://shop.example/ns/shop/sa/root"),
        (&["GET", "/v1/orders"], "of https://id.example, for a"),
        (&["GET", "/v1/orders", "--peer", cart], "entry 1 "),
        (&["GET", "/v1/orders", "--peer", cart], "o.toml:2"),
        (&["DELETE", "/v1/orders", "--peer", cart], "entry 1 has the identity but not the method"),
        (&["GET", "/v1/..;/x", "--peer", cart], "malformed, 400"),
    ] {
        let text = explain(arguments);
        assert!(text.contains(told), "{told:?} not in\n{text}");
    }
}
