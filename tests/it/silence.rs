//! Connections on which nothing has been sent: how long they are kept, what they hold, and how they end.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use crate::{
    identity::{GET, server_sidecar},
    support::{
        Launch, Proxy, RawClient, RawServer, Upstream, WAIT_LIMIT, eventually,
        h2::{self, H2Client},
        peer_script,
        pki::Pki,
        python_with, skip, text,
        tls::TlsClient,
    },
};

/// Issue 14, fault 18: a silent connection on a declared port delayed the drain for all of `drain_timeout`.
#[test]
fn the_drain_closes_silent_connections() {
    let service = Upstream::http1(|_| async { text("hello") });
    let (address, port) = (service.address(), service.address().port());
    for protocol in ["http1", "h2", "auto"] {
        let mut proxy = Proxy::start(format!(
            "[runtime]\ndrain_timeout = \"10m\"\n[inbound]\nforward_to = \"{address}\"\n\
             [[inbound.port]]\nport = {port}\nprotocol = \"{protocol}\"\n"
        ));
        let (mut silent, begun) = (RawClient::connect(proxy.inbound()), Instant::now());
        proxy.signal("TERM");
        assert!(silent.read_to_close().1, "{protocol}: it is closed");
        assert_eq!(proxy.wait().code(), Some(0), "{protocol}");
        // After ten seconds it is closed even without a drain.
        assert!(begun.elapsed() < Duration::from_secs(9), "{protocol}: {:?}", begun.elapsed());
    }
}

/// Issue 14, fault 18: silent connections were kept for an hour.
#[test]
fn a_silent_client_is_disconnected_after_ten_seconds() {
    let service = RawServer::start(|mut stream| drop(stream.read(&mut [0; 10])));
    let (address, port) = (service.address(), service.address().port());
    let upstream =
        format!("[[upstream]]\nname = \"up\"\nlisten = \"127.0.0.1:0\"\nendpoints = [\"{address}\"]\n");
    let inbound = format!("[inbound]\nforward_to = \"{address}\"\n");
    let auto = Proxy::start(format!("{inbound}{upstream}"));
    let declared = Proxy::start(format!("{inbound}[[inbound.port]]\nport = {port}\nprotocol = \"http1\"\n"));
    let tcp = Proxy::start(format!("{inbound}[[inbound.port]]\nport = {port}\nprotocol = \"tcp\"\n"));
    let begun = Instant::now();
    let mut kept = RawClient::connect(tcp.inbound());
    thread::scope(|scope| {
        for address in [auto.inbound(), auto.outbound(), auto.upstream("up"), declared.inbound()] {
            scope.spawn(move || {
                assert!(RawClient::connect(address).read_to_close().1);
                let after = begun.elapsed();
                assert!((9..20).contains(&after.as_secs()), "{address}: {after:?}");
            });
        }
    });
    kept = kept.with_read_timeout(Duration::from_millis(500));
    assert!(!kept.read_to_close().1, "a port that is `tcp` may stand still for tunnel_idle_timeout");
}

/// Issue 14, fault 18: eight silent connections used up `max_connections = 8`.
#[test]
fn silent_connections_do_not_use_up_max_connections() {
    let service = RawServer::start(|mut stream| {
        let mut seen = [0; 1000];
        if stream.read(&mut seen).is_ok_and(|count| count > 0) {
            let _ =
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello");
        }
    });
    let address = service.address();
    let limits = "limits = { max_connections = 8 }\n";
    let proxy = Proxy::start(format!(
        "[inbound]\nforward_to = \"{address}\"\n{limits}\
         [[upstream]]\nname = \"up\"\nlisten = \"127.0.0.1:0\"\nendpoints = [\"{address}\"]\n{limits}"
    ));
    for listener in [proxy.inbound(), proxy.upstream("up")] {
        let before = service.connections();
        let mut silent: Vec<RawClient> = (0..8).map(|_| RawClient::connect(listener)).collect();
        eventually("all to be dialled for", || service.connections() >= before + 8);
        let ask = |client: &mut RawClient| client.ask("GET / HTTP/1.1\r\nHost: up\r\n\r\n").status();
        for _ in 0..3 {
            assert_eq!(ask(&mut RawClient::connect(listener)), 200);
        }
        // Connections that gave up their slot are still open: they are served when they send a request.
        for client in &mut silent {
            assert_eq!(ask(client), 200);
        }
    }
}

fn stopped_then_terminated(proxy: &Proxy, meanwhile: impl FnOnce()) {
    proxy.signal("STOP");
    let state = || std::fs::read_to_string(format!("/proc/{}/stat", proxy.pid())).unwrap_or_default();
    eventually("the process to stop", || state().contains(") T "));
    meanwhile();
    proxy.signal("TERM");
    proxy.signal("CONT");
}

/// Issue 14, fault 17: 20 of 20 connections in the kernel's accept queue were reset.
#[test]
fn connections_in_the_accept_queue_are_served_at_shutdown() {
    let service = Upstream::http1(|_| async { text("hello") });
    for workers in [1, 2] {
        let (address, port) = (service.address(), service.address().port());
        let mut proxy = Proxy::start(format!(
            "[runtime]\nworkers = {workers}\n[inbound]\nforward_to = \"{address}\"\n\
             [[inbound.port]]\nport = {port}\nprotocol = \"http1\"\n"
        ));
        let inbound = proxy.inbound();
        let (mut clients, mut http2) = (Vec::new(), Vec::new());
        stopped_then_terminated(&proxy, || {
            for _ in 0..200 {
                let mut client = RawClient::connect(inbound);
                client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
                clients.push(client);
            }
            for _ in 0..20 {
                let mut client = H2Client::connect(inbound);
                client.headers(1, &h2::get("/"), true);
                http2.push(client);
            }
        });
        for client in &mut clients {
            let response = client.response().expect("well-formed").expect("a response, not a reset");
            assert_eq!((response.status(), response.field("connection")), (200, Some("close")));
        }
        for client in &mut http2 {
            assert_eq!(client.end_of(1), h2::End::Response(Some(200)));
        }
        assert_eq!(proxy.wait().code(), Some(0));
    }
}

/// The same over TLS: a TLS 1.3 client has sent its request before it can learn that the server shuts down.
#[test]
fn a_tls_handshake_in_progress_at_shutdown_gets_its_response() {
    const CLIENTS: usize = 20;
    let (pki, service) = (Pki::new(), Upstream::http1(|_| async { text("hello") }));
    let mut proxy = server_sidecar(&pki, service.address(), "");
    let mine = pki.issue("checkout", |_| {});
    let inbound = proxy.inbound();
    let responses = thread::scope(|scope| {
        let mut asking = Vec::new();
        stopped_then_terminated(&proxy, || {
            for number in 0..CLIENTS {
                let client = TlsClient::new(Some(&mine), if number % 2 == 0 { &["http/1.1"] } else { &[] });
                let stream = TcpStream::connect(inbound).expect("connect");
                stream.set_read_timeout(Some(WAIT_LIMIT)).expect("a timeout");
                asking
                    .push(scope.spawn(move || TlsClient::send_and_read_on(client.connect_over(stream), GET)));
            }
        });
        asking.into_iter().map(|asked| asked.join().expect("no panic")).collect::<Vec<_>>()
    });
    for response in responses {
        assert!(response.as_ref().is_ok_and(|response| response.ends_with("hello")), "{response:?}");
    }
    assert_eq!(proxy.wait().code(), Some(0));
}

/// Breaks the inbound listener of a running proxy; false if the kernel does not allow it.
fn break_listener(python: &Path, proxy: &Proxy) -> bool {
    let port = proxy.inbound().port();
    let shut = Command::new(python)
        .arg(peer_script("shutdown_listener.py"))
        .args([proxy.pid().to_string(), port.to_string()])
        .output()
        .expect("Python runs");
    let why = String::from_utf8_lossy(&shut.stderr).into_owned();
    if shut.status.code() == Some(3) {
        skip(&format!("a socket of another process cannot be had: {why}"));
        return false;
    }
    assert!(shut.status.success(), "{why}");
    true
}

/// Issue 14, fault 25: a listener that had stopped accepting was not detected.
#[test]
fn a_failed_listener_ends_the_process() {
    let Some(python) = python_with("ctypes") else { return };
    for workers in [1, 2] {
        let service = ["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.05; done"];
        let mut proxy = Launch::new(format!("[runtime]\nworkers = {workers}\n")).service(service).start();
        if !break_listener(&python, &proxy) {
            return;
        }
        assert_eq!(proxy.wait().code(), Some(1), "{}", proxy.stderr());
        let said = proxy.stderr();
        assert!(said.contains("has failed: its listener on 127.0.0.1:"), "{said}");
    }
}

/// The process waits for its service to end and is not live meanwhile. Issue 14, fault 25: `/live` stayed 200.
#[test]
fn live_fails_from_a_listener_failure_until_the_process_exits() {
    let Some(python) = python_with("ctypes") else { return };
    for workers in [1, 2] {
        // The service runs until it is killed.
        let service = ["sh", "-c", "trap '' TERM; while :; do sleep 0.05; done"];
        let mut proxy = Launch::new(format!("[runtime]\nworkers = {workers}\n")).service(service).start();
        let admin = proxy.admin();
        let ask = |path: &str| {
            RawClient::connect(admin)
                .ask(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"))
        };
        assert_eq!((ask("/live").status(), ask("/ready").status()), (200, 200));
        if !break_listener(&python, &proxy) {
            return;
        }
        eventually("/live to fail", || {
            let response = ask("/live");
            let named = response.text().contains("has failed: its listener on 127.0.0.1:");
            assert_eq!(named, response.status() == 503, "{response:?}");
            named
        });
        assert_eq!(ask("/ready").status(), 503);
        assert_eq!(proxy.wait().code(), Some(1), "{}", proxy.stderr());
    }
}

/// Issue 14, fault 18, within CONNECT: a silent tunnel is allowed, and delays neither requests nor the shutdown.
#[test]
fn silent_tunnels_do_not_use_up_max_connections_and_end_with_the_drain() {
    let service = RawServer::start(|mut stream| {
        let mut seen = [0; 1000];
        if stream.read(&mut seen).is_ok_and(|count| count > 0) {
            let _ =
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello");
        }
    });
    let mut proxy = Proxy::start(format!(
        "[runtime]\ndrain_timeout = \"10m\"\n\
         [[upstream]]\nname = \"up\"\nendpoints = [\"{}\"]\nlimits = {{ max_connections = 8 }}\n",
        service.address()
    ));
    let connect = || {
        let mut client = RawClient::connect(proxy.outbound());
        client.send("CONNECT up:80 HTTP/1.1\r\nHost: up:80\r\n\r\n");
        let head = client.read_until(b"\r\n\r\n");
        assert!(head.starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(&head));
        client
    };
    let mut silent: Vec<RawClient> = (0..8).map(|_| connect()).collect();
    for _ in 0..3 {
        let response = RawClient::connect(proxy.outbound()).ask("GET / HTTP/1.1\r\nHost: up\r\n\r\n");
        assert_eq!(response.status(), 200, "{response:?}");
    }
    // Tunnels that gave up their slot still work: requests get responses, other bytes are forwarded.
    for (number, mut client) in silent.drain(..4).enumerate() {
        if number % 2 == 0 {
            assert_eq!(client.ask("GET / HTTP/1.1\r\nHost: up\r\n\r\n").status(), 200, "{number}");
        } else {
            client.send(b"\x00\x01 no HTTP");
            assert!(client.read_until(b"hello").starts_with(b"HTTP/1.1 200 OK"), "{number}");
        }
    }
    // SIGINT: the sidecar does not wait for the service.
    let begun = Instant::now();
    proxy.signal("INT");
    assert_eq!(proxy.wait().code(), Some(0), "{}", proxy.stderr());
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    for client in &mut silent {
        assert!(client.read_to_close().1, "it is closed");
    }
}

/// Issue 14, fault 21: on a kernel without IPv6 the default `[::]` could not be bound.
#[test]
fn a_kernel_without_ipv6_listens_on_ipv4() {
    let Some(python) = python_with("ctypes") else { return };
    let script = peer_script("without_ipv6.py");
    let service = Upstream::http1(|_| async { text("hello") });
    let config = format!(
        "[inbound]\nlisten = \"[::]:0\"\nforward_to = \"{}\"\n[outbound]\nlisten = \"localhost:0\"\n\
         [admin]\nlisten = \"localhost:0\"\nprobe_listen = \"[::]:0\"\n",
        service.address()
    );
    let proxy = Launch::new(config).wrapped([python.as_os_str(), script.as_os_str()]).start();
    assert_eq!(proxy.inbound().ip().to_string(), "0.0.0.0");
    let local = |address: SocketAddr| SocketAddr::from(([127, 0, 0, 1], address.port()));
    let ask = |address, path: &str| {
        RawClient::connect(address).ask(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n")).status()
    };
    assert_eq!(ask(local(proxy.inbound()), "/"), 200);
    let probe = proxy.ready()["probe"].as_str().and_then(|address| address.parse().ok()).expect("an address");
    assert_eq!(ask(local(probe), "/live"), 200);
    assert!(proxy.stderr().contains("has no IPv6"), "{}", proxy.stderr());
}

/// Before the handshake no client has an identity: `strict` closed a connection after a second for that, and logged a
/// line for nearly every valid one.
#[test]
fn a_slow_client_hello_is_served_under_strict() {
    let (pki, service) = (Pki::new(), Upstream::http1(|_| async { text("hello") }));
    let proxy = server_sidecar(&pki, service.address(), "");
    let mine = pki.issue("checkout", |_| {});
    let client = TlsClient::new(Some(&mine), &[]);
    for wait in [Duration::ZERO, Duration::from_millis(1500)] {
        let stream = TcpStream::connect(proxy.inbound()).expect("connect");
        stream.set_read_timeout(Some(WAIT_LIMIT)).expect("a timeout");
        // The time that the client takes.
        thread::sleep(wait);
        let response = TlsClient::send_and_read_on(client.connect_over(stream), GET);
        assert!(
            response.as_ref().is_ok_and(|response| response.ends_with("hello")),
            "after {wait:?}: {response:?}"
        );
    }
    assert!(!proxy.stderr().contains("closing a connection"), "{}", proxy.stderr());
}
