//! Under load, on the release build: `OUTRIGGER_BIN=target/release/outrigger cargo test --test it -- --ignored`.

use std::{
    io::{Read, Write},
    net::SocketAddr,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::{
    identity::server_sidecar,
    support::{
        Launch, Proxy, RawClient, Upstream, free_port, has_tool,
        pki::{Pki, id, uri},
        text,
        tls::TlsClient,
        tool,
    },
};

/// Connections of each kind; `OUTRIGGER_ROUNDS` for fewer.
fn rounds() -> usize {
    std::env::var("OUTRIGGER_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(20)
}

fn config(upstream: &Upstream, more: &str) -> String {
    format!(
        "[inbound]\nforward_to = \"{0}\"\n{more}\n[[upstream]]\nname = \"up\"\nhosts = [\"*\"]\nprotocol = \"http1\"\nendpoints = [\"{0}\"]\n",
        upstream.address()
    )
}

/// Prints past the harness's capture: the figures are for people.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

const REQUEST: &str = "GET / HTTP/1.1\r\nHost: up\r\n\r\n";

/// Memory of each of `count` connections that are idle after a request; `call` opens one and sends it.
fn bytes_of_idle<C>(proxy: &Proxy, count: u64, name: &str, mut call: impl FnMut() -> C) -> u64 {
    // Memory that is allocated once.
    let _first = call();
    let before = proxy.resident_kib();
    let idle: Vec<C> = (0..count).map(|_| call()).collect();
    let bytes = (proxy.resident_kib() - before) * 1024 / count;
    say(&format!("{} idle connections to {name}: {bytes} bytes each", idle.len()));
    bytes
}

#[test]
#[ignore = "10,000 connections; for the release build"]
fn ten_thousand_idle_connections() {
    let upstream = Upstream::http1(|_| async { text("ok") });
    for name in ["outbound", "inbound"] {
        // A separate process for each, since freed memory would be reused.
        let proxy = Proxy::start(config(&upstream, ""));
        let address = if name == "outbound" { proxy.outbound() } else { proxy.inbound() };
        let bytes = bytes_of_idle(&proxy, 10_000, name, || {
            let mut client = RawClient::connect(address);
            assert_eq!(client.ask(REQUEST).status(), 200);
            client
        });
        assert!(bytes < 5 * 1024, "{bytes} bytes for an idle connection");
        assert_eq!(RawClient::connect(address).ask(REQUEST).status(), 200);
    }
}

#[test]
#[ignore = "2,000 connections; for the release build"]
fn two_thousand_idle_connections_by_mutual_tls() {
    let (pki, upstream) = (Pki::new(), Upstream::http1(|_| async { text("ok") }));
    let server = server_sidecar(&pki, upstream.address(), "");
    let certificate = pki.issue("checkout", |params| params.subject_alt_names = vec![uri(&id("checkout"))]);
    let client = TlsClient::new(Some(&certificate), &["http/1.1"]);
    let bytes = bytes_of_idle(&server, 2000, "inbound by mutual TLS", || {
        let mut socket = client.connect(server.inbound());
        socket.write_all(REQUEST.as_bytes()).expect("a request");
        let (mut got, mut chunk) = (Vec::new(), [0; 1024]);
        while !got.ends_with(b"ok") {
            let count = socket.read(&mut chunk).expect("a response");
            assert_ne!(count, 0, "hung up after {:?}", String::from_utf8_lossy(&got));
            got.extend_from_slice(&chunk[..count]);
        }
        socket
    });
    assert!(bytes < 20 * 1024, "{bytes} bytes for an idle connection");
}

/// CPU time up to the first response, which other work on the machine does not change.
#[test]
#[ignore = "for the release build"]
fn startup_uses_little_cpu_time() {
    let (pki, upstream) = (Pki::new(), Upstream::http1(|_| async { text("ok") }));
    let certificate = pki.issue("checkout", |params| params.subject_alt_names = vec![uri(&id("checkout"))]);
    let tls = TlsClient::new(Some(&certificate), &["http/1.1"]);
    let many: String = (0..1000)
        .map(|n| {
            format!(
                "[[upstream]]\nname = \"u{n}\"\nhosts = [\"h{n}\"]\nendpoints = [\"{}\"]\n",
                upstream.address()
            )
        })
        .collect();
    let plain = |config: &str| {
        let proxy = Proxy::start(config);
        assert_eq!(RawClient::connect(proxy.outbound()).ask(REQUEST.replace("up", "h7")).status(), 200);
        proxy
    };
    let ask_by_tls = || {
        let proxy = server_sidecar(&pki, upstream.address(), "");
        let said =
            tls.send_and_read(proxy.inbound(), &REQUEST.replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n"));
        assert!(said.expect("a response").starts_with("HTTP/1.1 200"));
        proxy
    };
    let starts: [(&str, u128, &dyn Fn() -> Proxy); 3] = [
        ("plain", 15, &|| plain(&config(&upstream, ""))),
        ("mutual TLS", 30, &ask_by_tls),
        ("1,000 upstreams", 40, &|| plain(&many)),
    ];
    for (name, limit, start) in starts {
        let least = (0..5).map(|_| start().cpu_time()).min().expect("some");
        say(&format!("{name}: {least:?} of CPU to the first answer"));
        assert!(least.as_millis() < limit, "{name}: {least:?}");
    }
}

#[test]
#[ignore = "20 rounds; for the release build"]
fn reloads_under_load_fail_no_request() {
    if !has_tool(&["h2load"]) {
        return;
    }
    let upstream = Upstream::http1(|_| async { text("ok") });
    let proxy = Proxy::start(config(&upstream, ""));
    for round in 0..rounds() {
        for version in [&["--h1"][..], &[]] {
            let mut load = Command::new(tool("h2load").expect("checked before"));
            // 4 connections, 250 requests a second each, for 1.5 seconds.
            load.args(version).args(["-c", "4", "--rps", "250", "-n", "1500"]);
            load.arg(format!("http://{}/", proxy.outbound()));
            let mut load = load.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("h2load runs");
            let mut reloads = 0;
            while load.try_wait().expect("wait").is_none() {
                reloads += 1;
                proxy.reconfigure(&config(&upstream, &format!("timeout = \"{}s\"", 10 + reloads % 5)));
                proxy.signal("HUP");
                thread::sleep(Duration::from_millis(100));
            }
            let output = load.wait_with_output().expect("output");
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(
                said.contains("1500 succeeded, 0 failed, 0 errored") && said.contains("1500 2xx"),
                "round {round}, {version:?}, after {reloads} reloads:\n{said}"
            );
        }
    }
}

/// Clients at a fixed rate with two proxies to choose from, as a Service offers them: one is terminated, and no
/// request may fail. A client does what HTTP clients do: it closes a connection that says `close`, and repeats a
/// request if an idle connection was closed before a byte of the response (RFC 9112 §9.3.1).
#[test]
#[ignore = "20 rounds; for the release build"]
fn a_rolling_restart_fails_no_request() {
    let upstream = Upstream::http1(|_| async { text("ok") });
    let mut proxy = Proxy::start(config(&upstream, ""));
    let mut total = 0;
    for round in 0..rounds() {
        let next = Proxy::start(config(&upstream, ""));
        let addresses = [proxy.inbound(), next.inbound()];
        let (stop, failed, done) =
            (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let clients: Vec<_> = (0..8)
            .map(|_| {
                let (stop, failed, done) = (stop.clone(), failed.clone(), done.clone());
                thread::spawn(move || call(addresses, &stop, &failed, &done))
            })
            .collect();
        crate::support::eventually("traffic", || done.load(Ordering::Relaxed) > 200);
        proxy.signal("TERM");
        assert_eq!(proxy.wait().code(), Some(0), "round {round}");
        let ended = done.load(Ordering::Relaxed);
        crate::support::eventually("traffic after the end", || done.load(Ordering::Relaxed) > ended + 200);
        stop.store(true, Ordering::Relaxed);
        for client in clients {
            client.join().expect("a client");
        }
        assert_eq!(failed.load(Ordering::Relaxed), 0, "failed requests in round {round}");
        total += done.load(Ordering::Relaxed);
        proxy = next;
    }
    say(&format!("{total} requests over {} restarts, none failed", rounds()));
}

/// The same in a deployment: fixed load through a sidecar that keeps running, to two replicas of a service whose
/// sidecars are replaced one after the other. The load generator retries nothing. As in a cluster, a replaced one has
/// another address, and the endpoint list changes in between.
#[test]
#[ignore = "20 rounds; for the release build"]
fn replicas_that_restart_fail_no_request_of_h2load() {
    roll_replicas(false);
}

/// As on a machine or in a stateful set: each returns on its own address, without an update of the endpoint list.
#[test]
#[ignore = "20 rounds; for the release build"]
fn replicas_that_restart_in_place_fail_no_request_of_h2load() {
    roll_replicas(true);
}

fn roll_replicas(in_place: bool) {
    if !has_tool(&["h2load"]) {
        return;
    }
    let services = [Upstream::http1(|_| async { text("ok") }), Upstream::h2c(|_| async { text("ok") })];
    for (version, service) in [&["--h1"][..], &[]].into_iter().zip(&services) {
        let replica = |port: u16| {
            Proxy::start(format!(
                "[runtime]\ndrain_delay = \"500ms\"\n[inbound]\nlisten = \"127.0.0.1:{port}\"\nforward_to = \"{}\"\n",
                service.address()
            ))
        };
        let directory = tempfile::tempdir().expect("a temporary directory");
        let list = directory.path().join("endpoints.json");
        let publish = |replicas: &[&Proxy]| {
            let addresses: Vec<String> =
                replicas.iter().map(|replica| replica.inbound().to_string()).collect();
            let next = directory.path().join("next");
            std::fs::write(&next, serde_json::to_vec(&addresses).expect("JSON")).expect("write");
            std::fs::rename(next, &list).expect("rename");
        };
        let stop = |old: &mut Proxy, round| {
            old.signal("TERM");
            assert_eq!(old.wait().code(), Some(0), "round {round}, {version:?}\n{}", old.stderr());
        };
        let mut replicas = [0, 0].map(|_| replica(if in_place { free_port() } else { 0 }));
        publish(&replicas.each_ref());
        let front = Proxy::start(format!(
            "[[upstream]]\nname = \"up\"\nhosts = [\"*\"]\nendpoints = \"file://{}\"\n",
            list.display()
        ));
        let (mut total, mut restarts) = (0, 0);
        for round in 0..rounds() {
            let mut load = Command::new(tool("h2load").expect("checked before"));
            // 4 connections, 150 requests a second each, for 2.5 seconds.
            load.args(version).args(["-c", "4", "--rps", "150", "-n", "1500"]);
            load.arg(format!("http://{}/", front.outbound()));
            let mut load = load.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("h2load runs");
            for turn in (0..replicas.len()).cycle() {
                if in_place {
                    let old = &mut replicas[turn];
                    stop(old, round);
                    *old = replica(old.inbound().port());
                } else {
                    let mut old = std::mem::replace(&mut replicas[turn], replica(0));
                    publish(&replicas.each_ref());
                    stop(&mut old, round);
                }
                restarts += 1;
                if load.try_wait().expect("wait").is_some() {
                    break;
                }
            }
            let output = load.wait_with_output().expect("output");
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(
                said.contains("1500 succeeded, 0 failed, 0 errored") && said.contains("1500 2xx"),
                "round {round}, {version:?}:\n{said}\n{}",
                front.stderr()
            );
            total += 1500;
        }
        let place = if in_place { "in place" } else { "elsewhere" };
        say(&format!(
            "{version:?}: {total} requests of h2load over {restarts} restarts {place}, none failed"
        ));
    }
}

/// The real-time counterpart of a unit test in virtual time.
#[test]
#[ignore = "takes half a minute"]
fn a_service_without_outbound_requests_is_warned_about() {
    let quiet = Launch::new("").service(["sleep", "60"]).start();
    let busy = Launch::new("").service(["sleep", "60"]).start();
    RawClient::connect(busy.outbound()).ask("GET http://127.0.0.1:1/ HTTP/1.1\r\nHost: x\r\n\r\n");
    let (began, notice) = (Instant::now(), "no outbound connection has come in 30s");
    while !quiet.stderr().contains(notice) {
        assert!(began.elapsed() < Duration::from_secs(60), "nothing was said:\n{}", quiet.stderr());
        thread::sleep(Duration::from_millis(100));
    }
    // They were started together.
    thread::sleep(Duration::from_secs(2));
    assert!(!busy.stderr().contains(notice), "{}", busy.stderr());
}

/// One client, 200 requests a second.
fn call(addresses: [SocketAddr; 2], stop: &AtomicBool, failed: &AtomicUsize, done: &AtomicUsize) {
    let connect = || addresses.iter().find_map(|address| std::net::TcpStream::connect(address).ok());
    let mut connection: Option<RawClient> = None;
    let mut next = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        next += Duration::from_millis(5);
        thread::sleep(next.saturating_duration_since(Instant::now()));
        let mut fresh = connection.is_none();
        let response = loop {
            let Some(stream) = connection.take().map(|client| client.stream).or_else(connect) else {
                break None;
            };
            let _ = stream.set_read_timeout(Some(Duration::from_secs(10)));
            let mut client = RawClient { stream, buffer: Vec::new() };
            client.send("GET / HTTP/1.1\r\nHost: up\r\n\r\n");
            match client.response() {
                Ok(Some(response)) => {
                    if response.field("connection") != Some("close") {
                        connection = Some(client);
                    }
                    break Some(response);
                }
                Ok(None) if client.buffer.is_empty() && !fresh => fresh = true,
                other => {
                    say(&format!("failed on a {} connection: {other:?}", if fresh { "new" } else { "used" }));
                    break None;
                }
            }
        };
        if response.is_none_or(|response| response.status() != 200) {
            failed.fetch_add(1, Ordering::Relaxed);
        }
        done.fetch_add(1, Ordering::Relaxed);
    }
}
