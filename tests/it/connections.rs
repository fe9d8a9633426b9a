//! Connections: which worker serves a client connection, and how old an upstream connection gets.

use std::{
    cell::RefCell,
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::support::{Proxy, RawClient, Upstream, eventually, h2::H2Client, text};

const GET: &str = "GET / HTTP/1.1\r\nHost: up\r\n\r\n";

fn workers(proxy: &Proxy) -> Vec<Value> {
    let ask = "GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let status: Value =
        serde_json::from_str(&RawClient::connect(proxy.admin()).ask(ask).text()).expect("JSON");
    status["workers"].as_array().expect("workers").clone()
}

fn number(worker: &Value, what: &str) -> u64 {
    worker[what].as_u64().expect("a number")
}

/// New connections go to the worker with less load, not to the one with fewer connections.
#[test]
fn a_new_connection_goes_to_the_least_busy_worker() {
    const NEW: usize = 20;
    let upstream = Upstream::http1(|_| async { text(vec![b'x'; 64 * 1024]) });
    let proxy = Proxy::start(format!(
        "[runtime]\nworkers = 2\n[[upstream]]\nname = \"up\"\nendpoints = [\"{}\"]\n",
        upstream.address()
    ));
    let stop = Arc::new(AtomicBool::new(false));
    let client_thread = thread::spawn({
        let (stop, outbound) = (stop.clone(), proxy.outbound());
        move || {
            let mut client = RawClient::connect(outbound);
            while !stop.load(Ordering::Relaxed) {
                assert_eq!(client.ask(GET).status(), 200);
            }
        }
    });
    // The worker of these requests gets ahead of the other, for longer than the period over which load is averaged.
    let mut busy = 0;
    eventually("one worker to be busier", || {
        let all = workers(&proxy);
        let (first, second) = (number(&all[0], "busy_ms"), number(&all[1], "busy_ms"));
        busy = usize::from(second > first);
        first.abs_diff(second) > 500
    });
    let before = workers(&proxy);
    let mut clients = Vec::new();
    for _ in 0..NEW {
        clients.push(RawClient::connect(proxy.outbound()));
    }
    let taken = |all: &[Value], which: usize| {
        let now = number(&all[which], "connections");
        usize::try_from(now.saturating_sub(number(&before[which], "connections"))).expect("few")
    };
    let mut after = Vec::new();
    eventually("all to be taken", || {
        after = workers(&proxy);
        taken(&after, 0) + taken(&after, 1) >= NEW
    });
    stop.store(true, Ordering::Relaxed);
    client_thread.join().expect("every request gets a response");
    assert!(taken(&after, 1 - busy) > NEW * 3 / 4, "worker {busy} was busy: {before:?}, then {after:?}");
    let mut metrics = RawClient::connect(proxy.admin());
    let page = metrics.ask("GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").text();
    for series in
        ["outrigger_worker_connections{worker=\"1\"} ", "outrigger_worker_busy_seconds_total{worker=\"0\"} "]
    {
        assert!(page.contains(series), "no {series} in\n{page}");
    }
}

type Seen = Arc<Mutex<HashMap<SocketAddr, (Instant, Instant)>>>;

/// A server that responds with its client's address and records when each was first and last seen.
fn recording_server(h2: bool) -> (Upstream, Seen) {
    let seen = Seen::default();
    let log = seen.clone();
    let server = Upstream::with_peer(h2, move |peer, request| {
        let now = Instant::now();
        log.lock().expect("no panic").entry(peer).or_insert((now, now)).1 = now;
        let slow = request.uri().path() == "/slow";
        async move {
            // Long enough that requests sent together are in flight together, or that a connection exceeds its maximum
            // age.
            tokio::time::sleep(Duration::from_millis(if slow { 1500 } else { 20 })).await;
            text(peer.to_string())
        }
    });
    (server, seen)
}

fn aged(server: &Upstream, protocol: &str, age: &str) -> Proxy {
    Proxy::start(format!(
        "[[upstream]]\nname = \"up\"\nprotocol = \"{protocol}\"\nendpoints = [\"{}\"]\nmax_connection_age = \"{age}\"\n\
         retry = {{ max = 0 }}\n",
        server.address()
    ))
}

#[test]
fn connections_are_replaced_at_their_maximum_age() {
    for h2 in [false, true] {
        let (server, seen) = recording_server(h2);
        let proxy = aged(&server, if h2 { "h2" } else { "http1" }, "300ms");
        let client = RefCell::new(RawClient::connect(proxy.outbound()));
        eventually("several connections in a row", || {
            let response = client.borrow_mut().ask(GET);
            assert_eq!(response.status(), 200, "HTTP/2: {h2}: {response:?}");
            seen.lock().expect("no panic").len() >= 4
        });
        for (first, last) in seen.lock().expect("no panic").values() {
            // A request may begin just before the connection reaches its maximum age.
            assert!(*last - *first < Duration::from_secs(2), "HTTP/2: {h2}: too old by far");
        }
    }
}

/// Requests in flight when a connection reaches its maximum age finish on it.
#[test]
fn a_stream_outlives_the_maximum_age_of_its_connection() {
    let (server, seen) = recording_server(true);
    let proxy = aged(&server, "h2", "300ms");
    let slow = thread::spawn({
        let outbound = proxy.outbound();
        move || RawClient::connect(outbound).ask("GET /slow HTTP/1.1\r\nHost: up\r\n\r\n")
    });
    eventually("the slow request", || !seen.lock().expect("no panic").is_empty());
    let old = *seen.lock().expect("no panic").keys().next().expect("one");
    let mut client = RawClient::connect(proxy.outbound());
    eventually("another connection", || client.ask(GET).text() != old.to_string());
    assert!(!slow.is_finished(), "the slow request is still in flight");
    let response = slow.join().expect("a response");
    assert_eq!((response.status(), response.text()), (200, old.to_string()));
}

/// Connections that were opened together do not end together.
#[test]
fn the_maximum_connection_age_has_jitter() {
    const TOGETHER: usize = 8;
    let (server, seen) = recording_server(false);
    let proxy = aged(&server, "http1", "2s");
    let mut clients: Vec<_> = (0..TOGETHER).map(|_| RawClient::connect(proxy.outbound())).collect();
    let mut firsts = Vec::new();
    eventually("all of the first connections to be replaced", || {
        for client in &mut clients {
            client.send(GET);
        }
        for client in &mut clients {
            let response = client.response().expect("well-formed").expect("a response");
            assert_eq!(response.status(), 200, "{response:?}");
        }
        let seen = seen.lock().expect("no panic");
        if firsts.is_empty() {
            firsts = seen.keys().copied().collect();
        }
        firsts.iter().all(|first| seen[first].1.elapsed() > Duration::from_millis(500))
    });
    let seen = seen.lock().expect("no panic");
    let lives: Vec<_> = firsts.iter().map(|first| seen[first].1 - seen[first].0).collect();
    let (shortest, longest) = (lives.iter().min().expect("some"), lives.iter().max().expect("some"));
    assert!(*longest - *shortest > Duration::from_millis(60), "as if they had agreed: {lives:?}");
}

/// The same for HTTP/2 clients.
#[test]
fn replaced_connections_fail_no_http2_request() {
    let (server, seen) = recording_server(true);
    let proxy = aged(&server, "auto", "300ms");
    let mut client = H2Client::connect(proxy.outbound());
    let mut stream = 1;
    eventually("several connections in a row", || {
        client.must_get(stream, "/");
        stream += 2;
        seen.lock().expect("no panic").len() >= 4
    });
}

/// The connections of a service, by the client address of each.
#[derive(Clone, Default)]
struct Peers(Arc<Mutex<Vec<SocketAddr>>>);

impl Peers {
    fn service(&self, address: SocketAddr) -> Upstream {
        let peers = self.clone();
        Upstream::at(address, false, move |peer, _| {
            peers.0.lock().expect("no panic").push(peer);
            async { text("ok") }
        })
    }

    /// The last two requests used one connection.
    fn is_kept(&self) -> bool {
        let peers = self.0.lock().expect("no panic");
        matches!(peers[..], [.., one, other] if one == other)
    }
}

/// Issue 14, fault 23: a restart closes connections however young they are, and was taken for an idle timeout:
/// keep-alive was off for half an hour.
#[test]
fn upstream_restarts_are_not_learned_as_an_idle_timeout() {
    let pause = |time: u64| {
        let begun = Instant::now();
        eventually("time to pass", || begun.elapsed() >= Duration::from_millis(time));
    };
    let peers = Peers::default();
    let mut service = peers.service(([127, 0, 0, 1], 0).into());
    let address = service.address();
    let proxy = Proxy::start(format!(
        "[[upstream]]\nname = \"up\"\nendpoints = [\"{address}\"]\nretry = false\nbreaker = false\n"
    ));
    let status = || RawClient::connect(proxy.outbound()).ask(GET).status();
    for _ in 0..2 {
        // Closes within a second count as one event.
        let begun = Instant::now();
        eventually("a while of requests", || {
            assert_eq!(status(), 200);
            begun.elapsed() > Duration::from_millis(1500)
        });
        pause(200);
        drop(service);
        eventually("the service to be gone", || std::net::TcpStream::connect(address).is_err());
        eventually("a request to find that out", || status() != 200);
        service = peers.service(address);
        eventually("the service to be found again", || status() == 200);
    }
    pause(600);
    assert_eq!(status(), 200);
    assert!(peers.is_kept(), "{:?}", peers.0);
}
