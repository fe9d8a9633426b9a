//! `[[inbound.allow]]` and `x-forwarded-client-cert` for clients with a certificate.

use std::io::{Read, Write};

use super::Echo;
use crate::support::{
    Proxy, RawClient, RawServer,
    issuer::{ISSUER, Issuer, good_claims},
    pki::{Pki, dns, id, uri},
    tls::TlsClient,
    tokens::Signer,
};

const RULES: &str = r#"
[[inbound.allow]]
identity = ["spiffe://shop.example/ns/shop/sa/cart", "dns:cron.example"]
methods = ["GET"]
paths = ["/v1/*"]
[[inbound.allow]]
identity = ["spiffe://shop.example/ns/shop/sa/root"]
"#;

const WITH_CLAIM: &str = r#"
[[inbound.allow]]
identity = ["spiffe://shop.example/ns/shop/sa/writer"]
methods = ["POST"]
claims = { scope = "orders:write" }
"#;

/// A request with this workload's identity; status and the rest of the response.
fn call(pki: &Pki, proxy: &Proxy, name: &str, line: &str, head: &str) -> (u16, String) {
    let certificate = pki.issue(name, |params| {
        params.subject_alt_names = match name.strip_prefix("dns:") {
            Some(name) => vec![dns(name)],
            None => vec![uri(&id(name)), dns(name)],
        };
    });
    let client = TlsClient::new(Some(&certificate), &["http/1.1"]);
    let request = format!("{line} HTTP/1.1\r\nHost: orders\r\nConnection: close\r\n{head}\r\n");
    let response = client.send_and_read(proxy.inbound(), &request).expect("a response");
    let status = response.get(9..12).and_then(|status| status.parse().ok()).unwrap_or(0);
    (status, response)
}

#[test]
fn peers_may_send_what_a_matching_entry_allows() {
    let (pki, echo) = (Pki::new(), Echo::start());
    let proxy = Proxy::start(format!(
        "{}[inbound]\nforward_to = \"{}\"\n{}",
        pki.identity("orders"),
        echo.server.address(),
        RULES
    ));
    for (peer, line, status) in [
        ("cart", "GET /v1/orders", 200),
        ("cart", "POST /v1/orders", 403),
        ("cart", "GET /v2/orders", 403),
        ("cart", "GET /v1/../admin", 400),
        ("cartographer", "GET /v1/orders", 403),
        ("root", "DELETE /anything", 200),
        ("root", "DELETE /any//thing", 400),
        ("dns:cron.example", "GET /v1/orders", 200),
        ("dns:other.example", "GET /v1/orders", 403),
    ] {
        let (got, response) = call(&pki, &proxy, peer, line, "");
        assert_eq!(got, status, "{peer}: {line}: {response}");
    }
    let (_, problem) = call(&pki, &proxy, "cart", "DELETE /v1/orders", "");
    assert!(problem.contains("nearest: entry 1 has the identity but not the method"), "{problem}");
    assert_eq!(echo.request_count(), 3);
}

#[test]
fn the_service_gets_the_peer_identity_from_the_sidecar_only() {
    let (pki, echo) = (Pki::new(), Echo::start());
    let proxy = Proxy::start(format!(
        "{}[inbound]\nforward_to = \"{}\"\n",
        pki.identity("orders"),
        echo.server.address()
    ));
    let spoofed = "x-forwarded-client-cert: URI=spiffe://a/evil\r\nX_Forwarded_Client_Cert: evil\r\n";
    let (status, seen) = call(&pki, &proxy, "cart", "GET /", spoofed);
    assert_eq!(status, 200);
    let lines: Vec<&str> =
        seen.lines().filter(|line| line.to_ascii_lowercase().contains("client-cert")).collect();
    let [line] = lines[..] else { panic!("{seen}") };
    assert!(line.contains(&format!("By={};Hash=", id("orders"))), "{line}");
    assert!(line.contains(&format!(";URI={};DNS=cart", id("cart"))) && !seen.contains("evil"), "{seen}");
}

#[test]
fn byte_streams_pass_where_an_entry_names_only_the_peer() {
    let pki = Pki::new();
    let service = RawServer::start(|mut stream| {
        let mut byte = [0];
        let _ = stream.read_exact(&mut byte).and_then(|()| stream.write_all(b"welcome\r\n"));
    });
    let undeclared =
        format!("{}[inbound]\nforward_to = \"{}\"\n{RULES}", pki.identity("orders"), service.address());
    let port = service.address().port();
    let proxy = Proxy::start(format!("{undeclared}[[inbound.port]]\nport = {port}\nprotocol = \"tcp\"\n"));
    let undeclared = Proxy::start(undeclared);
    for (peer, passes) in [("root", true), ("cart", false), ("stranger", false)] {
        let certificate = pki.issue(peer, |params| params.subject_alt_names = vec![uri(&id(peer))]);
        let response = TlsClient::new(Some(&certificate), &[]).send_and_read(proxy.inbound(), "\x01\x02\x03");
        assert_eq!(response.is_ok_and(|response| response == "welcome\r\n"), passes, "{peer}");
        let response =
            TlsClient::new(Some(&certificate), &[]).send_and_read(undeclared.inbound(), "\x01\x02\x03");
        assert!(
            response.is_ok_and(|response| response.starts_with("HTTP/1.1 400 ")),
            "{peer}: not declared `tcp`"
        );
    }
}

#[test]
fn claims_are_checked_in_the_token_and_unknown_peers_cause_no_key_fetch() {
    let (pki, echo, issuer, signer) = (Pki::new(), Echo::start(), Issuer::start(), Signer::ec("ec"));
    issuer.publish(&[&signer]);
    let jwt = format!(
        "[inbound.jwt]\nissuer = \"{ISSUER}\"\naudiences = [\"checkout\"]\njwks = \"{}\"\n",
        issuer.keys_url()
    );
    let proxy = Proxy::start(format!(
        "{}[inbound]\nforward_to = \"{}\"\n{RULES}{WITH_CLAIM}{jwt}",
        pki.identity("orders"),
        echo.server.address()
    ));
    let with = |scope: &str| {
        let mut claims = good_claims();
        claims["scope"] = scope.into();
        format!("Content-Length: 0\r\nAuthorization: Bearer {}\r\n", signer.token(&claims))
    };
    let post = |peer: &str, head: &str| call(&pki, &proxy, peer, "POST /v1/orders", head);
    assert_eq!(post("writer", &with("orders:read orders:write")).0, 200);
    let (status, response) = post("writer", &with("orders:read"));
    assert_eq!(status, 403);
    assert!(
        response.contains("error=\"insufficient_scope\"") && response.contains("orders:write"),
        "{response}"
    );
    assert_eq!(post("writer", "Content-Length: 0\r\n").0, 401);
    let fetches = issuer.key_fetches();
    let stranger = Signer::ec("unknown").token(&good_claims());
    let (status, _) = post("stranger", &format!("Content-Length: 0\r\nAuthorization: Bearer {stranger}\r\n"));
    assert_eq!((status, issuer.key_fetches()), (403, fetches));
    // Plaintext is rejected entirely.
    let plain = RawClient::connect(proxy.inbound()).ask("GET /v1/orders HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!(plain.status(), 403);
}
