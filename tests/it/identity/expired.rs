//! What has expired or was revoked is refused on a resumed session as on a new one; and TLS of other ages and purposes.

use std::{
    io::{Read, Write},
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::{ServerConnection, StreamOwned};
use serde_json::Value;

use super::{GET, admin, call, callee, caller, metric};
use crate::support::{
    Proxy, RawServer, Upstream, eventually,
    pki::{Pki, id, uri},
    text,
    tls::{TlsCaller, TlsServer, server_config, tls12_config},
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

fn resumed(callee: &Proxy) -> f64 {
    metric(callee, "outrigger_tls_handshakes_total{direction=\"inbound\",outcome=\"resumed\"}")
}

/// Calls twice: the second time with the session of the first.
#[track_caller]
fn is_let_in_twice(client: &TlsCaller, callee: &Proxy) {
    let before = resumed(callee);
    for _ in 0..2 {
        let answer = client.say(callee.inbound(), GET).expect("an answer");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}{}", callee.stderr());
    }
    assert!(resumed(callee) > before, "the second one resumes");
}

fn is_refused(client: &TlsCaller, callee: &Proxy) -> bool {
    !client.say(callee.inbound(), GET).is_ok_and(|answer| answer.contains("200"))
}

#[test]
fn a_client_whose_certificate_has_expired_cannot_resume() {
    let (pki, service) = (Pki::new(), service());
    let callee = callee(&pki, service.address(), "");
    let at = expires();
    let certificate = pki.issue("checkout", |params| {
        params.subject_alt_names = vec![uri(&id("checkout"))];
        params.not_after = at.into();
    });
    let client = TlsCaller::new(Some(&certificate), &["http/1.1"]);
    is_let_in_twice(&client, &callee);
    wait_until(at);
    assert!(is_refused(&client, &callee));
}

/// The leaf is good for years; who issued it is not any more.
#[test]
fn a_client_whose_intermediate_has_expired_cannot_resume() {
    let (pki, service) = (Pki::new(), service());
    let callee = callee(&pki, service.address(), "");
    let at = expires();
    let certificate = pki.issue_below("checkout", at);
    let client = TlsCaller::new(Some(&certificate), &["http/1.1"]);
    is_let_in_twice(&client, &callee);
    wait_until(at);
    assert!(is_refused(&client, &callee));
}

#[test]
fn a_client_whose_certificate_was_revoked_cannot_resume() {
    let (pki, service) = (Pki::new(), service());
    let list = pki.revoke(&[]);
    let identity = pki.identity("payments");
    let callee = Proxy::start(format!(
        "{identity}crl = {list:?}\n[inbound]\nforward_to = \"{}\"\n",
        service.address()
    ));
    let certificate = pki.issue("checkout", |params| {
        params.subject_alt_names = vec![uri(&id("checkout"))];
        params.serial_number = Some(4711_u64.into());
    });
    let client = TlsCaller::new(Some(&certificate), &["http/1.1"]);
    is_let_in_twice(&client, &callee);
    pki.revoke(&[4711]);
    eventually("the revoked one to be refused", || is_refused(&client, &callee));
    assert!(is_refused(&client, &callee));
}

#[test]
fn a_server_whose_certificate_has_expired_cannot_be_resumed() {
    let pki = Pki::new();
    let at = expires();
    let certificate = pki.issue("payments", |params| params.not_after = at.into());
    let server = TlsServer::start(&certificate, None, &["http/1.1"]);
    let caller = caller(&pki, server.address(), "retry = false\n");
    for _ in 0..2 {
        assert_eq!(call(&caller).0, 200, "{}", caller.stderr());
    }
    let resumed = "outrigger_tls_handshakes_total{direction=\"outbound\",outcome=\"resumed\"}";
    assert!(metric(&caller, resumed) > 0.0);
    wait_until(at);
    let (status, problem) = call(&caller);
    assert!(status >= 500 && problem.contains("expired"), "{status} {problem}");
}

/// A server of mutual TLS that hangs up without an alert on a client whose certificate it rejects, as by TLS 1.3 it does
/// after the client has sent its request.
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
            // The alert that says why is not written.
            if !is_open || tls.process_new_packets().is_err() {
                return;
            }
            // "Would block" says no more than that there is nothing yet.
            let _ = tls.reader().read_to_end(&mut request);
        }
        let _ = StreamOwned::new(tls, stream)
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok");
    })
}

/// That is nobody's fault but ours, and is told so: whether its peer says what is wrong or just hangs up.
#[test]
fn a_clients_own_expired_certificate_is_told_and_counted_against_nobody() {
    let (pki, service) = (Pki::new(), service());
    let (callee, silent) = (callee(&pki, service.address(), ""), server_without_alerts(&pki));
    let at = expires();
    pki.write_ca();
    pki.write_leaf("checkout", |params| params.not_after = at.into());
    let identity = pki.section("checkout");
    let callers = [callee.inbound(), silent.address()].map(|endpoint| {
        Proxy::start(format!(
            "{identity}[[upstream]]\nname = \"payments\"\nendpoints = [\"{endpoint}\"]\nidentity = [\"{}\"]\n\
             breaker = {{ consecutive_failures = 3 }}\noutlier = {{ consecutive_failures = 3 }}\n",
            id("payments")
        ))
    });
    for caller in &callers {
        assert_eq!(call(caller).0, 200, "{}", caller.stderr());
    }
    wait_until(at);
    for (caller, peer) in callers.iter().zip(["a peer that says why", "a peer that hangs up"]) {
        for number in 0..12 {
            let (status, problem) = call(caller);
            let problem: Value = serde_json::from_str(&problem).expect("JSON");
            let told = problem["type"].as_str().is_some_and(|kind| kind.ends_with("tls_failure"));
            assert!(status == 502 && told, "{peer}, {number}: {status} {problem}");
            let detail = problem["detail"].as_str().unwrap_or_default();
            assert!(detail.contains("our certificate"), "{peer}: {problem}");
        }
        let status: Value = serde_json::from_str(&admin(caller, "/status").1).expect("JSON");
        let upstream = &status["upstreams"][0];
        assert_eq!(upstream["breaker"]["state"], "closed", "{peer}: {upstream}");
        assert_eq!(upstream["endpoints"][0]["state"], "healthy", "{peer}: {upstream}");
    }
}

/// Without an identity, too.
#[test]
fn an_upstream_that_speaks_tls_1_2_alone_is_called_where_that_is_allowed() {
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
    let (status, problem) = call(&proxy(""));
    assert!(status == 502 && problem.contains("min_tls"), "{status} {problem}");
    assert_eq!(call(&proxy("min_tls = \"1.2\"\n")), (200, "hello".to_owned()));
}
