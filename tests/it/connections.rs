//! The connections that carry calls: which worker serves a caller's, and how old one to an upstream gets.

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

/// New connections go to the worker that has less to do, not to the one that has fewer of them.
#[test]
fn a_new_connection_goes_to_the_least_busy_worker() {
    const NEW: usize = 20;
    let upstream = Upstream::http1(|_| async { text(vec![b'x'; 64 * 1024]) });
    let proxy = Proxy::start(format!(
        "[runtime]\nworkers = 2\n[[upstream]]\nname = \"up\"\nendpoints = [\"{}\"]\n",
        upstream.address()
    ));
    let stop = Arc::new(AtomicBool::new(false));
    let caller = thread::spawn({
        let (stop, outbound) = (stop.clone(), proxy.outbound());
        move || {
            let mut client = RawClient::connect(outbound);
            while !stop.load(Ordering::Relaxed) {
                assert_eq!(client.ask(GET).status(), 200);
            }
        }
    });
    // The one that carries these calls gets ahead of the other, for longer than its load is averaged over.
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
    caller.join().expect("every call is answered");
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

/// A server that answers with its caller's address and remembers when each was first and last heard of.
fn witness(h2: bool) -> (Upstream, Seen) {
    let seen = Seen::default();
    let log = seen.clone();
    let server = Upstream::with_peer(h2, move |peer, request| {
        let now = Instant::now();
        log.lock().expect("no panic").entry(peer).or_insert((now, now)).1 = now;
        let slow = request.uri().path() == "/slow";
        async move {
            // Long enough that calls sent together are in flight together; or that a connection gets too old.
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
fn an_old_connection_makes_place_for_a_new_one() {
    for h2 in [false, true] {
        let (server, seen) = witness(h2);
        let proxy = aged(&server, if h2 { "h2" } else { "http1" }, "300ms");
        let client = RefCell::new(RawClient::connect(proxy.outbound()));
        eventually("several connections in a row", || {
            let answer = client.borrow_mut().ask(GET);
            assert_eq!(answer.status(), 200, "HTTP/2: {h2}: {answer:?}");
            seen.lock().expect("no panic").len() >= 4
        });
        for (first, last) in seen.lock().expect("no panic").values() {
            // A call may begin just before the end.
            assert!(*last - *first < Duration::from_secs(2), "HTTP/2: {h2}: too old by far");
        }
    }
}

/// What a connection carries when it gets too old is finished on it.
#[test]
fn a_stream_outlives_the_age_of_its_connection() {
    let (server, seen) = witness(true);
    let proxy = aged(&server, "h2", "300ms");
    let slow = thread::spawn({
        let outbound = proxy.outbound();
        move || RawClient::connect(outbound).ask("GET /slow HTTP/1.1\r\nHost: up\r\n\r\n")
    });
    eventually("the slow call", || !seen.lock().expect("no panic").is_empty());
    let old = *seen.lock().expect("no panic").keys().next().expect("one");
    let mut client = RawClient::connect(proxy.outbound());
    eventually("another connection", || client.ask(GET).text() != old.to_string());
    assert!(!slow.is_finished(), "the slow call is still under way");
    let answer = slow.join().expect("an answer");
    assert_eq!((answer.status(), answer.text()), (200, old.to_string()));
}

/// Connections that were opened together do not end together.
#[test]
fn the_age_has_jitter() {
    const TOGETHER: usize = 8;
    let (server, seen) = witness(false);
    let proxy = aged(&server, "http1", "2s");
    let mut clients: Vec<_> = (0..TOGETHER).map(|_| RawClient::connect(proxy.outbound())).collect();
    let mut firsts = Vec::new();
    eventually("all of the first connections to have made place", || {
        for client in &mut clients {
            client.send(GET);
        }
        for client in &mut clients {
            let answer = client.response().expect("well-formed").expect("an answer");
            assert_eq!(answer.status(), 200, "{answer:?}");
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

/// HTTP/2 callers as well: what they need is the same.
#[test]
fn an_http2_caller_does_not_notice() {
    let (server, seen) = witness(true);
    let proxy = aged(&server, "auto", "300ms");
    let mut client = H2Client::connect(proxy.outbound());
    let mut stream = 1;
    eventually("several connections in a row", || {
        client.must_get(stream, "/");
        stream += 2;
        seen.lock().expect("no panic").len() >= 4
    });
}

/// Who asked a service, by the address of each connection.
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

    /// The last two requests came by one connection.
    fn is_kept(&self) -> bool {
        let peers = self.0.lock().expect("no panic");
        matches!(peers[..], [.., one, other] if one == other)
    }
}

/// Issue 14, fault 23: a restart closes connections however young they are, and was taken for an idle timeout: keep-alive was
/// lost for half an hour.
#[test]
fn restarts_teach_nothing_about_idle_times() {
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
