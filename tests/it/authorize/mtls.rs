//! `[[inbound.allow]]` and `x-forwarded-client-cert` for callers who prove who they are.

use std::io::{Read, Write};

use super::Echo;
use crate::support::{
    Proxy, RawClient, RawServer,
    issuer::{ISSUER, Issuer, good_claims},
    pki::{Pki, dns, id, uri},
    tls::TlsCaller,
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

/// Calls as this workload; status and the rest of the answer.
fn call(pki: &Pki, proxy: &Proxy, name: &str, line: &str, head: &str) -> (u16, String) {
    let certificate = pki.issue(name, |params| {
        params.subject_alt_names = match name.strip_prefix("dns:") {
            Some(name) => vec![dns(name)],
            None => vec![uri(&id(name)), dns(name)],
        };
    });
    let caller = TlsCaller::new(Some(&certificate), &["http/1.1"]);
    let request = format!("{line} HTTP/1.1\r\nHost: orders\r\nConnection: close\r\n{head}\r\n");
    let answer = caller.say(proxy.inbound(), &request).expect("an answer");
    let status = answer.get(9..12).and_then(|status| status.parse().ok()).unwrap_or(0);
    (status, answer)
}

#[test]
fn callers_may_do_what_an_entry_of_theirs_says() {
    let (pki, echo) = (Pki::new(), Echo::start());
    let proxy = Proxy::start(format!(
        "{}[inbound]\nforward_to = \"{}\"\n{}",
        pki.identity("orders"),
        echo.server.address(),
        RULES
    ));
    for (who, line, status) in [
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
        let (got, answer) = call(&pki, &proxy, who, line, "");
        assert_eq!(got, status, "{who}: {line}: {answer}");
    }
    let (_, told) = call(&pki, &proxy, "cart", "DELETE /v1/orders", "");
    assert!(told.contains("nearest: entry 1 has the identity but not the method"), "{told}");
    assert_eq!(echo.calls(), 3);
}

#[test]
fn the_service_learns_who_calls_and_only_from_us() {
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
fn bytes_pass_for_whom_an_entry_asks_nothing_else_of() {
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
    for (who, passes) in [("root", true), ("cart", false), ("stranger", false)] {
        let certificate = pki.issue(who, |params| params.subject_alt_names = vec![uri(&id(who))]);
        let answer = TlsCaller::new(Some(&certificate), &[]).say(proxy.inbound(), "\x01\x02\x03");
        assert_eq!(answer.is_ok_and(|answer| answer == "welcome\r\n"), passes, "{who}");
        let answer = TlsCaller::new(Some(&certificate), &[]).say(undeclared.inbound(), "\x01\x02\x03");
        assert!(answer.is_ok_and(|answer| answer.starts_with("HTTP/1.1 400 ")), "{who}: not declared `tcp`");
    }
}

#[test]
fn a_claim_is_asked_of_the_token_and_strangers_cause_no_fetch() {
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
    let post = |who: &str, head: &str| call(&pki, &proxy, who, "POST /v1/orders", head);
    assert_eq!(post("writer", &with("orders:read orders:write")).0, 200);
    let (status, answer) = post("writer", &with("orders:read"));
    assert_eq!(status, 403);
    assert!(answer.contains("error=\"insufficient_scope\"") && answer.contains("orders:write"), "{answer}");
    assert_eq!(post("writer", "Content-Length: 0\r\n").0, 401);
    let fetches = issuer.key_fetches();
    let stranger = Signer::ec("unknown").token(&good_claims());
    let (status, _) = post("stranger", &format!("Content-Length: 0\r\nAuthorization: Bearer {stranger}\r\n"));
    assert_eq!((status, issuer.key_fetches()), (403, fetches));
    // By plaintext nobody gets in at all.
    let plain = RawClient::connect(proxy.inbound()).ask("GET /v1/orders HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!(plain.status(), 403);
}
