//! Certificates and roots that change while calls go on.

use std::{
    io::{Read, Write},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use super::{GET, admin, call, callee, caller, metric};
use crate::support::{Proxy, RawClient, RawServer, Upstream, eventually, pki::Pki, text, tls::TlsCaller};

const ACCEPTED: &str = "outrigger_certificate_loads_total{outcome=\"accepted\"}";
const REFUSED: &str = "outrigger_certificate_loads_total{outcome=\"refused\"}";

/// Calls at a fixed rate, on kept connections and on new ones, until told to stop: how many, and those that failed.
struct Load {
    stop: AtomicBool,
    calls: AtomicU64,
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
            let answer = client.response();
            self.calls.fetch_add(1, Ordering::Relaxed);
            match answer {
                Ok(Some(answer)) if answer.status() == 200 => {}
                Ok(Some(answer)) => self.failures.lock().expect("unbroken").push(answer.text()),
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
fn taken(proxy: &Proxy, before: f64) {
    eventually("new certificates", || metric(proxy, ACCEPTED) > before);
}

#[test]
fn fifty_rotations_under_load_fail_no_call() {
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
    // Connections are renewed every now and then, so that each certificate is used.
    let brief = "max_connection_age = \"200ms\"\n";
    let callee = callee(&pki, service.address(), "");
    let caller = caller(&pki, callee.inbound(), brief);
    let echo_callee = super::callee(&pki, echo.address(), "");
    let echo_caller = super::caller(&pki, echo_callee.inbound(), "");
    let mut long = RawClient::connect(echo_caller.outbound());
    long.send("GET / HTTP/1.1\r\nHost: payments\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n");
    long.read_until(b"Upgrade: echo\r\n\r\n".to_ascii_lowercase().as_slice());

    let load = Load { stop: false.into(), calls: 0.into(), failures: Default::default() };
    let all = [&callee, &caller, &echo_callee, &echo_caller];
    thread::scope(|scope| {
        for keep in [true, true, false] {
            let (load, caller) = (&load, &caller);
            scope.spawn(move || load.run(caller, keep));
        }
        let rotate = |step: &mut dyn FnMut()| {
            let before = all.map(|proxy| metric(proxy, ACCEPTED));
            step();
            for (proxy, before) in all.iter().zip(before) {
                taken(proxy, before);
            }
        };
        for _ in 0..47 {
            rotate(&mut || {
                pki.write_leaf("payments", |_| {});
                pki.write_leaf("checkout", |_| {});
            });
        }
        // Material that is wrong, in the middle of it.
        let (_, stray) = pki.issue("payments", |_| {});
        let refusals = metric(&callee, REFUSED);
        let key = std::fs::read_to_string(pki.path("payments.key")).expect("the key");
        pki.write("payments.key", &stray);
        eventually("a refusal", || metric(&callee, REFUSED) > refusals);
        assert_eq!(metric(&callee, "outrigger_certificate_refused"), 1.0);
        assert!(admin(&callee, "/status").1.contains("is not that of the first certificate"));
        assert_eq!(admin(&callee, "/ready").0, 200, "what was valid before still is");
        pki.write("payments.key", &key);
        eventually("the old files", || metric(&callee, "outrigger_certificate_refused") == 0.0);
        pki.write("ca.crt", "garbage");
        eventually("a refusal", || metric(&callee, "outrigger_certificate_refused") == 1.0);

        // Another CA: first both are trusted, then certificates come from the new one, then the old one goes.
        let old = pki.ca_pem();
        pki.renew_ca("the next CA");
        let both = format!("{old}{}", pki.ca_pem());
        rotate(&mut || drop(pki.write("ca.crt", &both)));
        rotate(&mut || {
            pki.write_leaf("payments", |_| {});
            pki.write_leaf("checkout", |_| {});
        });
        rotate(&mut || drop(pki.write_ca()));
        let after = load.calls.load(Ordering::Relaxed) + 50;
        eventually("calls after the last rotation", || load.calls.load(Ordering::Relaxed) > after);
        load.stop.store(true, Ordering::Relaxed);
    });
    let failures = load.failures.into_inner().expect("unbroken");
    assert!(failures.is_empty(), "{} of {:?} failed: {:?}", failures.len(), load.calls, failures.first());
    assert!(load.calls.load(Ordering::Relaxed) > 200);
    long.send("still here");
    long.read_until(b"still here");
}

/// Whoever is not trusted any more is asked to leave, and its session is worth nothing.
#[test]
fn a_caller_whose_ca_is_gone_is_asked_to_leave() {
    let mut pki = Pki::new();
    let service = Upstream::http1(|_| async { text("hello") });
    let (old_ca, theirs) = (pki.ca_pem(), pki.issue("checkout", |_| {}));
    pki.renew_ca("the next CA");
    let identity = {
        let identity = pki.identity("payments");
        pki.write("ca.crt", &format!("{old_ca}{}", pki.ca_pem()));
        identity
    };
    let address = service.address();
    let callee = Proxy::start(format!("{identity}[inbound]\nforward_to = \"{address}\"\n"));
    let caller = TlsCaller::new(Some(&theirs), &["http/1.1"]);
    let mut open = caller.connect(callee.inbound());
    open.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").expect("writes");
    let mut seen = [0; 4096];
    assert!(open.read(&mut seen).expect("an answer") > 0);
    let before = metric(&callee, ACCEPTED);
    pki.write_ca();
    taken(&callee, before);
    // Closed after it was given time to see that it should leave.
    let mut rest = Vec::new();
    let _ = open.read_to_end(&mut rest);
    assert!(callee.stderr().contains("is asked to leave"), "{}", callee.stderr());
    let again = caller.say(callee.inbound(), GET);
    assert!(!again.as_ref().is_ok_and(|text| text.contains("hello")), "{again:?}");
}

/// The same the other way round: connections to a server that is not trusted any more are not used again.
#[test]
fn a_server_whose_ca_is_gone_is_not_called_again() {
    let mut pki = Pki::new();
    let service = Upstream::http1(|_| async { text("hello") });
    let callee = callee(&pki, service.address(), "");
    let old = pki.ca_pem();
    let caller_ca = {
        pki.renew_ca("the next CA");
        // The callee's own directory keeps its first CA; it trusts both.
        pki.write("both.crt", &format!("{old}{}", pki.ca_pem()))
    };
    let (certificate, key) = pki.issue("checkout", |_| {});
    let (cert, key) = (pki.write("c.crt", &certificate), pki.write("c.key", &key));
    let before = metric(&callee, ACCEPTED);
    pki.write("ca.crt", &format!("{old}{}", pki.ca_pem()));
    taken(&callee, before);
    let (inbound, payments) = (callee.inbound(), crate::support::pki::id("payments"));
    let caller = Proxy::start(format!(
        "[identity]\ncert = {cert:?}\nkey = {key:?}\nca = {caller_ca:?}\n[[upstream]]\nname = \"payments\"\nendpoints = [\"{inbound}\"]\nidentity = [\"{payments}\"]\n"
    ));
    assert_eq!(call(&caller).0, 200);
    let before = metric(&caller, ACCEPTED);
    pki.write("both.crt", &pki.ca_pem());
    taken(&caller, before);
    let (status, body) = call(&caller);
    assert_eq!(status, 502);
    assert!(body.contains("issued by nobody who is trusted here"), "{body}");
}
