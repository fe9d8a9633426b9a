//! Which certificates are rejected, and what each side reports.

use std::process::Command;

use super::{GET, admin, client_sidecar, metric, send_get, server_sidecar};
use crate::support::{
    Launch, Proxy, RawClient, Upstream, binary, eventually,
    pki::{Pki, dns, id, uri},
    text,
    tls::{TlsClient, TlsServer},
};
use rcgen::{BasicConstraints, ExtendedKeyUsagePurpose, IsCa};

fn service() -> Upstream {
    Upstream::http1(|_| async { text("reached the service") })
}

type Pair = (String, String);

/// Certificates that must be rejected, with the expected message for each.
fn bad(pki: &Pki) -> Vec<(&'static str, Pair, &'static str)> {
    let other = Pki::new();
    let past = rcgen::date_time_ymd(2020, 1, 1);
    let future = rcgen::date_time_ymd(2090, 1, 1);
    vec![
        ("wrong CA", other.issue("payments", |_| {}), "not issued by a trusted CA"),
        ("expired", pki.issue("payments", |p| p.not_after = past), "expired on 2020-01-01 00:00:00 UTC"),
        ("not yet", pki.issue("payments", |p| p.not_before = future), "not valid before 2090-01-01"),
        (
            "two URI SANs",
            pki.issue("payments", |p| p.subject_alt_names.push(uri(&id("other")))),
            "exactly one",
        ),
        (
            "CA:TRUE",
            pki.issue("payments", |p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)),
            "it is a CA certificate (CA:TRUE)",
        ),
        (
            "malformed id",
            pki.issue("payments", |p| p.subject_alt_names = vec![uri("spiffe://shop.example/a/../b")]),
            "is not a SPIFFE ID",
        ),
        (
            "other use",
            pki.issue("payments", |p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning]),
            "extended key usage",
        ),
    ]
}

#[test]
fn clients_with_bad_certificates_do_not_reach_the_service() {
    let (pki, service) = (Pki::new(), service());
    let crl = pki.revoke(&[4711]);
    let identity = pki.identity("payments");
    let address = service.address();
    let server = Proxy::start(format!("{identity}crl = {crl:?}\n[inbound]\nforward_to = \"{address}\"\n"));
    let mut cases = bad(&pki);
    let revoked = pki.issue("checkout", |p| p.serial_number = Some(4711_u64.into()));
    cases.push(("revoked", revoked, "has been revoked"));
    for (what, certificate, says) in &cases {
        let response = TlsClient::new(Some(certificate), &["http/1.1"]).send_and_read(server.inbound(), GET);
        assert!(!response.as_ref().is_ok_and(|text| text.contains("reached")), "{what}: {response:?}");
        eventually(what, || server.stderr().contains(says));
    }
    let anonymous = TlsClient::new(None, &["http/1.1"]).send_and_read(server.inbound(), GET);
    assert!(!anonymous.as_ref().is_ok_and(|text| text.contains("reached")), "{anonymous:?}");
    eventually("no certificate", || server.stderr().contains("it showed no certificate"));
    let failed = "outrigger_tls_handshakes_total{direction=\"inbound\",outcome=\"peer_identity\"}";
    assert_eq!(metric(&server, failed), cases.len() as f64);
    let none = "outrigger_tls_handshakes_total{direction=\"inbound\",outcome=\"no_certificate\"}";
    assert_eq!(metric(&server, none), 1.0);
    // A valid certificate is still accepted.
    let good = pki.issue("checkout", |_| {});
    assert!(
        TlsClient::new(Some(&good), &[])
            .send_and_read(server.inbound(), GET)
            .expect("a response")
            .contains("reached")
    );
}

#[test]
fn servers_with_bad_certificates_get_no_request() {
    let pki = Pki::new();
    let mut cases = bad(&pki);
    cases.push((
        "wrong SPIFFE ID",
        pki.issue("intruder", |_| {}),
        "expected spiffe://shop.example/ns/shop/sa/payments",
    ));
    cases.push((
        "DNS alone",
        pki.issue("payments", |p| p.subject_alt_names = vec![dns("payments")]),
        "expected spiffe://",
    ));
    for (what, certificate, says) in cases {
        let server = TlsServer::start(&certificate, Some(&pki.ca_pem()), &["http/1.1"]);
        let client = client_sidecar(&pki, server.address(), "");
        let response = RawClient::connect(client.outbound()).ask("GET / HTTP/1.1\r\nHost: payments\r\n\r\n");
        let body = response.text();
        assert_eq!(response.status(), 502, "{what}: {body}");
        assert!(body.contains("peer_identity") && body.contains(says), "{what}: {body}");
        let proxy_status = response.field("proxy-status").unwrap_or_default().to_owned();
        assert!(proxy_status.contains("error=tls_certificate_error"), "{what}: {proxy_status}");
    }
}

/// The alert of the other side is reported in words. Nothing was processed, so a POST may be retried elsewhere.
#[test]
fn a_server_that_rejects_our_certificate_is_reported() {
    let (pki, other) = (Pki::new(), Pki::new());
    let server = TlsServer::start(&pki.issue("payments", |_| {}), Some(&other.ca_pem()), &["http/1.1"]);
    let good = TlsServer::start(&pki.issue("payments", |_| {}), Some(&pki.ca_pem()), &["http/1.1"]);
    let one = client_sidecar(&pki, server.address(), "");
    let (status, body) = send_get(&one);
    assert_eq!(status, 502, "{body}");
    assert!(body.contains("tls_failure") && body.contains("our certificate"), "{body}");

    let identity = pki.identity("checkout");
    let (bad, good, payments) = (server.address(), good.address(), id("payments"));
    let two = Proxy::start(format!(
        "{identity}[[upstream]]\nname = \"payments\"\nendpoints = [\"{bad}\", \"{good}\"]\nidentity = [\"{payments}\"]\nbalance = \"round-robin\"\n[upstream.outlier]\nconsecutive_failures = 0\n"
    ));
    for _ in 0..6 {
        let response = RawClient::connect(two.outbound())
            .ask("POST / HTTP/1.1\r\nHost: payments\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi");
        assert_eq!(response.status(), 200, "{}", response.text());
    }
}

#[test]
fn a_server_without_tls_is_reported() {
    let (pki, service) = (Pki::new(), service());
    let (status, body) = send_get(&client_sidecar(&pki, service.address(), ""));
    assert_eq!(status, 502, "{body}");
    assert!(body.contains("tls_failure") && body.contains("does not speak TLS"), "{body}");
}

#[test]
fn strict_rejects_plaintext_with_a_reason() {
    let (pki, service) = (Pki::new(), service());
    let server = server_sidecar(&pki, service.address(), "");
    let mut client = RawClient::connect(server.inbound());
    let response = client.ask("GET / HTTP/1.1\r\nHost: payments\r\n\r\n");
    let body = response.text();
    assert_eq!(response.status(), 403, "{body}");
    assert!(body.contains("not_allowed") && body.contains("mutual TLS"), "{body}");
    assert_eq!(response.field("connection"), Some("close"));
    // A connection with bytes that are not HTTP is closed.
    let mut client = RawClient::connect(server.inbound());
    client.send(b"\0\x01\x02 this is nothing that HTTP begins with\r\n");
    assert!(matches!(client.response(), Ok(None)));
    assert_eq!(metric(&server, "outrigger_plaintext_refused_total"), 2.0);
    assert!(server.stderr().contains("came without TLS"), "{}", server.stderr());
}

#[test]
fn simple_tls_verifies_the_name() {
    let pki = Pki::new();
    let server = TlsServer::start(
        &pki.issue("partner", |p| p.subject_alt_names = vec![dns("partner.example")]),
        None,
        &["http/1.1"],
    );
    let (ca, address) = (pki.write_ca(), server.address());
    let proxy = Proxy::start(format!(
        "[[upstream]]\nname = \"partner\"\nhosts = [\"partner.example\", \"other.example\"]\nendpoints = [\"{address}\"]\ntls = \"simple\"\nca = {ca:?}\n"
    ));
    let ask = |host: &str| {
        RawClient::connect(proxy.outbound())
            .ask(format!("GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"))
    };
    assert_eq!(ask("partner.example").status(), 200);
    let wrong = ask("other.example").text();
    assert!(wrong.contains("names partner.example; expected other.example"), "{wrong}");
}

/// The start and `check` say which file is wrong and what to do.
#[test]
fn an_unusable_identity_fails_the_start() {
    let pki = Pki::new();
    let config = pki.identity("payments");
    let (_, other_key) = pki.issue("payments", |_| {});
    pki.write("payments.key", &other_key);
    let mut proxy = Launch::new(config.clone()).spawn();
    assert_eq!(proxy.wait().code(), Some(1));
    assert!(
        proxy.stderr().contains("payments.key does not match the first certificate"),
        "{}",
        proxy.stderr()
    );
    let file = pki.write("outrigger.toml", &config);
    let check = Command::new(binary()).arg("check").arg("-c").arg(file).output().expect("it runs");
    assert_eq!(check.status.code(), Some(1));
    let said = String::from_utf8_lossy(&check.stdout).into_owned();
    assert!(said.contains("payments.key does not match the first certificate"), "{said}");
}

/// As when a CSI driver mounts the files late.
#[test]
fn the_start_waits_for_identity_files() {
    let (pki, service) = (Pki::new(), service());
    let identity = pki.section("payments");
    let address = service.address();
    let launch = Launch::new(format!("{identity}[inbound]\nforward_to = \"{address}\"\n"));
    std::thread::scope(|scope| {
        let started = scope.spawn(|| launch.start());
        pki.write_ca();
        pki.write_leaf("payments", |_| {});
        let server = started.join().expect("it starts");
        assert_eq!(admin(&server, "/ready").0, 200);
        assert_eq!(send_get(&client_sidecar(&pki, server.inbound(), "")).0, 200);
    });
}
