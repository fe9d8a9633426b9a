//! Expired and revoked certificates are rejected on a resumed session as on a new one; other TLS versions and key
//! usages.

use std::{
    io::{Read, Write},
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::{ServerConnection, StreamOwned};
use serde_json::Value;

use super::{GET, admin, client_sidecar, metric, send_get, server_sidecar};
use crate::support::{
    Proxy, RawServer, Upstream, eventually,
    pki::{Pki, id, uri},
    text,
    tls::{TlsClient, TlsServer, server_config, tls12_config},
};

/// Long enough to start with, short enough to wait for.
const SHORT: Duration = Duration::from_secs(8);

fn expires() -> SystemTime {
    SystemTime::now() + SHORT
}

#[track_caller]
fn wait_until(at: SystemTime) {
    eventually("the certificate to expire", || SystemTime::now() > at + Duration::from_secs(1));
}

fn service() -> Upstream {
    Upstream::http1(|_| async { text("hello") })
}

fn resumed(server: &Proxy) -> f64 {
    metric(server, "outrigger_tls_handshakes_total{direction=\"inbound\",outcome=\"resumed\"}")
}

/// Connects twice, the second time with the session of the first.
#[track_caller]
fn is_accepted_twice(client: &TlsClient, server: &Proxy) {
    let before = resumed(server);
    for _ in 0..2 {
        let response = client.send_and_read(server.inbound(), GET).expect("a response");
        assert!(response.starts_with("HTTP/1.1 200"), "{response}{}", server.stderr());
    }
    assert!(resumed(server) > before, "the second one resumes");
}

fn is_refused(client: &TlsClient, server: &Proxy) -> bool {
    !client.send_and_read(server.inbound(), GET).is_ok_and(|response| response.contains("200"))
}

#[test]
fn a_client_whose_certificate_has_expired_cannot_resume() {
    let (pki, service) = (Pki::new(), service());
    let server = server_sidecar(&pki, service.address(), "");
    let at = expires();
    let certificate = pki.issue("checkout", |params| {
        params.subject_alt_names = vec![uri(&id("checkout"))];
        params.not_after = at.into();
    });
    let client = TlsClient::new(Some(&certificate), &["http/1.1"]);
    is_accepted_twice(&client, &server);
    wait_until(at);
    assert!(is_refused(&client, &server));
}

/// The leaf is valid for years; its issuer has expired.
#[test]
fn a_client_whose_intermediate_has_expired_cannot_resume() {
    let (pki, service) = (Pki::new(), service());
    let server = server_sidecar(&pki, service.address(), "");
    let at = expires();
    let certificate = pki.issue_below("checkout", at);
    let client = TlsClient::new(Some(&certificate), &["http/1.1"]);
    is_accepted_twice(&client, &server);
    wait_until(at);
    assert!(is_refused(&client, &server));
}

#[test]
fn a_client_whose_certificate_was_revoked_cannot_resume() {
    let (pki, service) = (Pki::new(), service());
    let list = pki.revoke(&[]);
    let identity = pki.identity("payments");
    let server = Proxy::start(format!(
        "{identity}crl = {list:?}\n[inbound]\nforward_to = \"{}\"\n",
        service.address()
    ));
    let certificate = pki.issue("checkout", |params| {
        params.subject_alt_names = vec![uri(&id("checkout"))];
        params.serial_number = Some(4711_u64.into());
    });
    let client = TlsClient::new(Some(&certificate), &["http/1.1"]);
    is_accepted_twice(&client, &server);
    pki.revoke(&[4711]);
    eventually("the revoked one to be refused", || is_refused(&client, &server));
    assert!(is_refused(&client, &server));
}

#[test]
fn a_server_whose_certificate_has_expired_cannot_be_resumed() {
    let pki = Pki::new();
    let at = expires();
    let certificate = pki.issue("payments", |params| params.not_after = at.into());
    let server = TlsServer::start(&certificate, None, &["http/1.1"]);
    let client = client_sidecar(&pki, server.address(), "retry = false\n");
    for _ in 0..2 {
        assert_eq!(send_get(&client).0, 200, "{}", client.stderr());
    }
    let resumed = "outrigger_tls_handshakes_total{direction=\"outbound\",outcome=\"resumed\"}";
    assert!(metric(&client, resumed) > 0.0);
    wait_until(at);
    let (status, problem) = send_get(&client);
    assert!(status >= 500 && problem.contains("expired"), "{status} {problem}");
}

/// An mTLS server that closes without an alert if it rejects a client's certificate. With TLS 1.3 that happens after the
/// client has sent its request.
fn server_without_alerts(pki: &Pki) -> RawServer {
    let mut config = server_config(&pki.issue("payments", |_| {}), Some(&pki.ca_pem()), &["http/1.1"]);
    // A resumed session would show no certificate.
    config.send_tls13_tickets = 0;
    let config = Arc::new(config);
    RawServer::start(move |mut stream| {
        let mut tls = ServerConnection::new(Arc::clone(&config)).expect("a connection");
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            while tls.wants_write() {
                if tls.write_tls(&mut stream).is_err() {
                    return;
                }
            }
            let is_open = tls.read_tls(&mut stream).is_ok_and(|read| read > 0);
            // The alert that gives the reason is not written.
            if !is_open || tls.process_new_packets().is_err() {
                return;
            }
            // `WouldBlock` only means that nothing more has been received yet.
            let _ = tls.reader().read_to_end(&mut request);
        }
        let _ = StreamOwned::new(tls, stream)
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok");
    })
}

/// An expired certificate of our own counts against no upstream and is reported as our own, whether the peer sends an
/// alert or just closes the connection.
#[test]
fn an_own_expired_certificate_is_reported_and_counts_against_no_upstream() {
    let (pki, service) = (Pki::new(), service());
    let (server, silent) = (server_sidecar(&pki, service.address(), ""), server_without_alerts(&pki));
    let at = expires();
    pki.write_ca();
    pki.write_leaf("checkout", |params| params.not_after = at.into());
    let identity = pki.section("checkout");
    let clients = [server.inbound(), silent.address()].map(|endpoint| {
        Proxy::start(format!(
            "{identity}[[upstream]]\nname = \"payments\"\nendpoints = [\"{endpoint}\"]\nidentity = [\"{}\"]\n\
             breaker = {{ consecutive_failures = 3 }}\noutlier = {{ consecutive_failures = 3 }}\n",
            id("payments")
        ))
    });
    for client in &clients {
        assert_eq!(send_get(client).0, 200, "{}", client.stderr());
    }
    wait_until(at);
    for (client, peer) in clients.iter().zip(["a peer that sends an alert", "a peer that closes"]) {
        for number in 0..12 {
            let (status, problem) = send_get(client);
            let problem: Value = serde_json::from_str(&problem).expect("JSON");
            let is_tls_failure = problem["type"].as_str().is_some_and(|kind| kind.ends_with("tls_failure"));
            assert!(status == 502 && is_tls_failure, "{peer}, {number}: {status} {problem}");
            let detail = problem["detail"].as_str().unwrap_or_default();
            assert!(detail.contains("our certificate"), "{peer}: {problem}");
        }
        let status: Value = serde_json::from_str(&admin(client, "/status").1).expect("JSON");
        let upstream = &status["upstreams"][0];
        assert_eq!(upstream["breaker"]["state"], "closed", "{peer}: {upstream}");
        assert_eq!(upstream["endpoints"][0]["state"], "healthy", "{peer}: {upstream}");
    }
}

/// Without an `[identity]`, too.
#[test]
fn a_tls_1_2_only_upstream_is_reached_where_min_tls_allows() {
    let pki = Pki::new();
    let ca = pki.write_ca();
    let certificate = pki.issue("payments", |_| {});
    let server = TlsServer::start_with(([127, 0, 0, 1], 0).into(), tls12_config(&certificate));
    let proxy = |more: &str| {
        Proxy::start(format!(
            "[[upstream]]\nname = \"payments\"\nendpoints = [\"{}\"]\ntls = \"simple\"\nca = {ca:?}\n{more}",
            server.address()
        ))
    };
    let (status, problem) = send_get(&proxy(""));
    assert!(status == 502 && problem.contains("min_tls"), "{status} {problem}");
    assert_eq!(send_get(&proxy("min_tls = \"1.2\"\n")), (200, "hello".to_owned()));
}
