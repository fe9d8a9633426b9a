//! `[[inbound.allow]]` and `x-forwarded-client-cert` for clients without a certificate.

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
fn a_client_without_a_certificate_matches_no_peer_entry() {
    let echo = Echo::start();
    let proxy = proxy(&echo, "", RULES);
    for (line, head) in [
        ("GET /v1/orders", ""),
        ("GET /v1/orders", "x-forwarded-client-cert: URI=spiffe://shop.example/ns/shop/sa/root\r\n"),
        ("GET /v1/chat", "Connection: upgrade\r\nUpgrade: websocket\r\n"),
        ("CONNECT a:80", ""),
        ("OPTIONS *", ""),
    ] {
        let response = ask(&proxy, line, head);
        assert_eq!(response.status(), 403, "{line}");
        assert!(
            response.text().contains("no allow entry names a client without a certificate"),
            "{}",
            response.text()
        );
    }
    let response =
        ask(&proxy, "POST /pkg.Service/Method", "content-type: application/grpc\r\ncontent-length: 0\r\n");
    assert_eq!((response.status(), response.field("grpc-status")), (200, Some("7")), "PERMISSION_DENIED");
    assert_eq!(echo.request_count(), 0);
    // A connection with another protocol is rejected, too.
    let service = RawServer::scripted(b"welcome\r\n");
    let raw = Proxy::start(format!("[inbound]\nforward_to = \"{}\"\n{RULES}", service.address()));
    let mut client = RawClient::connect(raw.inbound());
    client.send("\x01\x02\x03");
    let (response, closed) = client.read_to_close();
    assert!(closed && response.starts_with(b"HTTP/1.1 400 "), "{}", response.escape_ascii());
    assert!(service.received().is_empty());
}

#[test]
fn ambiguous_paths_are_malformed() {
    let echo = Echo::start();
    let proxy = proxy(&echo, "", RULES);
    for path in ["/v1/../x", "/v1//x", "/v1/%2e%2e/x", "/v1/..%2fx", "/v1;x", "/v1/%5cx", "/v1/%252e"] {
        let response = ask(&proxy, &format!("GET {path}"), "");
        assert_eq!(response.status(), 400, "{path}");
        assert!(response.text().contains("malformed"), "{}", response.text());
    }
    for head in
        ["X-HTTP-Method-Override: DELETE\r\n", "X-Original-URL: /admin\r\n", "X-Rewrite-URL: /admin\r\n"]
    {
        assert_eq!(ask(&proxy, "GET /v1/orders", head).status(), 400, "{head}");
    }
    // The same over HTTP/2, whose path is not part of a text line.
    let mut client = h2::H2Client::connect(proxy.inbound());
    client.headers(1, &h2::get("/v1/..%2fx"), true);
    assert_eq!(client.end_of(1), h2::End::Response(Some(400)));
    assert_eq!(echo.request_count(), 0);
}

#[test]
fn observed_denials_are_counted_and_logged() {
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

/// Every spelling by which a service could read an identity that the client made up.
const SPOOFED: &str = "x-forwarded-client-cert: URI=spiffe://a/evil\r\nX-Forwarded-Client-Cert: URI=spiffe://a/evil\r\n\
    x_forwarded_client_cert: URI=spiffe://a/evil\r\nX-Forwarded_Client-Cert: URI=spiffe://a/evil\r\n\
    X_FORWARDED_CLIENT_CERT: URI=spiffe://a/evil\r\n";

#[test]
fn clients_cannot_forge_x_forwarded_client_cert() {
    let echo = Echo::start();
    let upstream = format!("[[upstream]]\nname = \"up\"\nendpoints = [\"{}\"]\n", echo.server.address());
    let proxy = Proxy::start(format!("[inbound]\nforward_to = \"{}\"\n{upstream}", echo.server.address()));
    let inbound = ask(&proxy, "GET /", SPOOFED);
    let outbound =
        RawClient::connect(proxy.outbound()).ask(format!("GET / HTTP/1.1\r\nHost: up\r\n{SPOOFED}\r\n"));
    for response in [inbound, outbound] {
        assert_eq!(response.status(), 200);
        assert!(!response.text().contains("evil"), "{}", response.text());
    }
}

#[test]
fn trailers_cannot_forge_x_forwarded_client_cert() {
    let service = RawServer::scripted(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    let proxy = Proxy::start(format!("[inbound]\nforward_to = \"{}\"\n", service.address()));
    let body = "Trailer: x-sum, x-forwarded-client-cert\r\nTE: trailers\r\nTransfer-Encoding: chunked\r\n";
    let trailers =
        "x-sum: 1\r\nx-forwarded-client-cert: URI=spiffe://a/evil\r\nx_forwarded_client_cert: evil\r\n";
    let response = RawClient::connect(proxy.inbound())
        .ask(format!("POST / HTTP/1.1\r\nHost: a\r\n{body}\r\n1\r\na\r\n0\r\n{trailers}\r\n"));
    assert_eq!(response.status(), 200);
    eventually("the request", || String::from_utf8_lossy(&service.received()).contains("x-sum: 1"));
    let received = String::from_utf8_lossy(&service.received()).into_owned();
    assert!(!received.contains("evil"), "{received}");
}

#[test]
fn explain_shows_which_entry_a_request_would_match() {
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
    for (arguments, expected) in [
        (&["GET", "/v1/orders"][..], "entry 1: spiffe://shop.example/ns/shop/sa/*"),
        (&["GET", "/v1/orders"], "entry 2: spiffe://shop.example/ns/shop/sa/root"),
        (&["GET", "/v1/orders"], "issued by https://id.example, for a"),
        (&["GET", "/v1/orders", "--peer", cart], "entry 1 "),
        (&["GET", "/v1/orders", "--peer", cart], "o.toml:2"),
        (&["DELETE", "/v1/orders", "--peer", cart], "entry 1 has the identity but not the method"),
        (&["GET", "/v1/..;/x", "--peer", cart], "malformed, 400"),
    ] {
        let text = explain(arguments);
        assert!(text.contains(expected), "{expected:?} not in\n{text}");
    }
}
