//! Rotation of certificates and roots while requests are sent.

use std::{
    io::{Read, Write},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use super::{GET, admin, client_sidecar, metric, send_get, server_sidecar};
use crate::support::{Proxy, RawClient, RawServer, Upstream, eventually, pki::Pki, text, tls::TlsClient};

const ACCEPTED: &str = "outrigger_certificate_loads_total{outcome=\"accepted\"}";
const REFUSED: &str = "outrigger_certificate_loads_total{outcome=\"refused\"}";

/// Sends requests at a fixed rate, on kept and on new connections, until stopped: how many, and which failed.
struct Load {
    stop: AtomicBool,
    requests: AtomicU64,
    failures: std::sync::Mutex<Vec<String>>,
}

impl Load {
    fn run(&self, proxy: &Proxy, keep: bool) {
        let mut client = RawClient::connect(proxy.outbound());
        let mut next = Instant::now();
        while !self.stop.load(Ordering::Relaxed) {
            if !keep {
                client = RawClient::connect(proxy.outbound());
            }
            client.send("GET / HTTP/1.1\r\nHost: payments\r\n\r\n");
            let response = client.response();
            self.requests.fetch_add(1, Ordering::Relaxed);
            match response {
                Ok(Some(response)) if response.status() == 200 => {}
                Ok(Some(response)) => self.failures.lock().expect("unbroken").push(response.text()),
                other => {
                    self.failures.lock().expect("unbroken").push(format!("{other:?}"));
                    client = RawClient::connect(proxy.outbound());
                }
            }
            next += Duration::from_millis(10);
            if let Some(rest) = next.checked_duration_since(Instant::now()) {
                thread::park_timeout(rest);
            }
        }
    }
}

#[track_caller]
fn accepted_loads(proxy: &Proxy, before: f64) {
    eventually("new certificates", || metric(proxy, ACCEPTED) > before);
}

#[test]
fn fifty_rotations_under_load_fail_no_request() {
    let mut pki = Pki::new();
    let service = Upstream::http1(|_| async { text("hello") });
    let echo = RawServer::start(|mut stream| {
        let mut seen = [0; 4096];
        let _ = stream.read(&mut seen);
        let _ = stream
            .write_all(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n");
        while let Ok(count @ 1..) = stream.read(&mut seen) {
            let _ = stream.write_all(&seen[..count]);
        }
    });
    // Connections are renewed from time to time, so that each certificate is used.
    let brief = "max_connection_age = \"200ms\"\n";
    let server = server_sidecar(&pki, service.address(), "");
    let client = client_sidecar(&pki, server.inbound(), brief);
    let echo_callee = super::server_sidecar(&pki, echo.address(), "");
    let echo_caller = super::client_sidecar(&pki, echo_callee.inbound(), "");
    let mut long = RawClient::connect(echo_caller.outbound());
    long.send("GET / HTTP/1.1\r\nHost: payments\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n");
    long.read_until(b"Upgrade: echo\r\n\r\n".to_ascii_lowercase().as_slice());

    let load = Load { stop: false.into(), requests: 0.into(), failures: Default::default() };
    let all = [&server, &client, &echo_callee, &echo_caller];
    thread::scope(|scope| {
        for keep in [true, true, false] {
            let (load, client) = (&load, &client);
            scope.spawn(move || load.run(client, keep));
        }
        let rotate = |step: &mut dyn FnMut()| {
            let before = all.map(|proxy| metric(proxy, ACCEPTED));
            step();
            for (proxy, before) in all.iter().zip(before) {
                accepted_loads(proxy, before);
            }
        };
        for _ in 0..47 {
            rotate(&mut || {
                pki.write_leaf("payments", |_| {});
                pki.write_leaf("checkout", |_| {});
            });
        }
        // Invalid material in between.
        let (_, stray) = pki.issue("payments", |_| {});
        let refusals = metric(&server, REFUSED);
        let key = std::fs::read_to_string(pki.path("payments.key")).expect("the key");
        pki.write("payments.key", &stray);
        eventually("a refusal", || metric(&server, REFUSED) > refusals);
        assert_eq!(metric(&server, "outrigger_certificate_refused"), 1.0);
        assert!(admin(&server, "/status").1.contains("does not match the first certificate"));
        assert_eq!(admin(&server, "/ready").0, 200, "what was valid before still is");
        pki.write("payments.key", &key);
        eventually("the old files", || metric(&server, "outrigger_certificate_refused") == 0.0);
        pki.write("ca.crt", "garbage");
        eventually("a refusal", || metric(&server, "outrigger_certificate_refused") == 1.0);

        // A new CA: first both are trusted, then certificates come from the new one, then the old one is removed.
        let old = pki.ca_pem();
        pki.renew_ca("the next CA");
        let both = format!("{old}{}", pki.ca_pem());
        rotate(&mut || drop(pki.write("ca.crt", &both)));
        rotate(&mut || {
            pki.write_leaf("payments", |_| {});
            pki.write_leaf("checkout", |_| {});
        });
        rotate(&mut || drop(pki.write_ca()));
        let after = load.requests.load(Ordering::Relaxed) + 50;
        eventually("requests after the last rotation", || load.requests.load(Ordering::Relaxed) > after);
        load.stop.store(true, Ordering::Relaxed);
    });
    let failures = load.failures.into_inner().expect("unbroken");
    assert!(failures.is_empty(), "{} of {:?} failed: {:?}", failures.len(), load.requests, failures.first());
    assert!(load.requests.load(Ordering::Relaxed) > 200);
    long.send("still here");
    long.read_until(b"still here");
}

/// A client that is no longer trusted is asked to close its connection, and its session cannot be resumed.
#[test]
fn connections_of_a_client_whose_ca_was_removed_are_drained() {
    let mut pki = Pki::new();
    let service = Upstream::http1(|_| async { text("hello") });
    let (old_ca, client_certificate) = (pki.ca_pem(), pki.issue("checkout", |_| {}));
    pki.renew_ca("the next CA");
    let identity = {
        let identity = pki.identity("payments");
        pki.write("ca.crt", &format!("{old_ca}{}", pki.ca_pem()));
        identity
    };
    let address = service.address();
    let server = Proxy::start(format!("{identity}[inbound]\nforward_to = \"{address}\"\n"));
    let client = TlsClient::new(Some(&client_certificate), &["http/1.1"]);
    let mut open = client.connect(server.inbound());
    open.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").expect("writes");
    let mut seen = [0; 4096];
    assert!(open.read(&mut seen).expect("a response") > 0);
    let before = metric(&server, ACCEPTED);
    pki.write_ca();
    accepted_loads(&server, before);
    // Closed after a grace period in which the client could see the request to close.
    let mut rest = Vec::new();
    let _ = open.read_to_end(&mut rest);
    assert!(server.stderr().contains("its client is no longer trusted"), "{}", server.stderr());
    let again = client.send_and_read(server.inbound(), GET);
    assert!(!again.as_ref().is_ok_and(|text| text.contains("hello")), "{again:?}");
}

/// The other direction: connections to a server that is no longer trusted are not reused.
#[test]
fn connections_to_a_server_whose_ca_was_removed_are_not_reused() {
    let mut pki = Pki::new();
    let service = Upstream::http1(|_| async { text("hello") });
    let server = server_sidecar(&pki, service.address(), "");
    let old = pki.ca_pem();
    let caller_ca = {
        pki.renew_ca("the next CA");
        // The server's own directory keeps its first CA; it trusts both.
        pki.write("both.crt", &format!("{old}{}", pki.ca_pem()))
    };
    let (certificate, key) = pki.issue("checkout", |_| {});
    let (cert, key) = (pki.write("c.crt", &certificate), pki.write("c.key", &key));
    let before = metric(&server, ACCEPTED);
    pki.write("ca.crt", &format!("{old}{}", pki.ca_pem()));
    accepted_loads(&server, before);
    let (inbound, payments) = (server.inbound(), crate::support::pki::id("payments"));
    let client = Proxy::start(format!(
        "[identity]\ncert = {cert:?}\nkey = {key:?}\nca = {caller_ca:?}\n[[upstream]]\nname = \"payments\"\nendpoints = [\"{inbound}\"]\nidentity = [\"{payments}\"]\n"
    ));
    assert_eq!(send_get(&client).0, 200);
    let before = metric(&client, ACCEPTED);
    pki.write("both.crt", &pki.ca_pem());
    accepted_loads(&client, before);
    let (status, body) = send_get(&client);
    assert_eq!(status, 502);
    assert!(body.contains("not issued by a trusted CA"), "{body}");
}
