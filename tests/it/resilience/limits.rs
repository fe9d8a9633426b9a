//! Concurrency and rate: the adaptive limit, the queue, rate limits per peer.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use hyper::StatusCode;

use super::{Reply, Service, ask, assert_cause, get, proxy, refused, request, status};
use crate::support::{Proxy, RawClient, Upstream, eventually, text};

/// A service that fails at once, never responds, or is slow, as the request says.
fn controllable() -> (Upstream, Arc<AtomicUsize>) {
    let hanging = Arc::<AtomicUsize>::default();
    let hangs = hanging.clone();
    let service = Upstream::http1(move |request| {
        let hangs = hangs.clone();
        async move {
            let mut response = text("done");
            if request.headers().contains_key("x-fail") {
                *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
            } else if request.headers().contains_key("x-hang") {
                hangs.fetch_add(1, Ordering::Relaxed);
                std::future::pending::<()>().await;
            } else {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            response
        }
    });
    (service, hanging)
}

fn limit(proxy: &Proxy) -> u64 {
    status(proxy)["upstreams"][0]["limits"]["max_requests"].as_u64().expect("a limit")
}

/// It starts in the middle, falls to its minimum while requests fail, rejects what exceeds it, and grows under use.
#[test]
fn the_adaptive_limit_adapts_and_rejects() {
    let (service, hanging) = controllable();
    let keys = "breaker = false\noutlier = false\nretry = false\nlimits = { adaptive = true, pending_timeout = \"100ms\" }";
    let proxy = proxy(&[service.address()], keys);
    assert_eq!(limit(&proxy), 32);
    let mut client = RawClient::connect(proxy.outbound());
    eventually("the limit to fall", || {
        let failing = (0..20).all(|_| client.ask(request("GET", "x-fail: 1\r\n")).status() == 500);
        assert!(failing, "one at a time is below any limit");
        limit(&proxy) == 8
    });
    let held: Vec<RawClient> = (0..8)
        .map(|_| {
            let mut client = RawClient::connect(proxy.outbound());
            client.send(request("GET", "x-hang: 1\r\n"));
            client
        })
        .collect();
    eventually("all slots to be taken", || hanging.load(Ordering::Relaxed) == 8);
    assert_cause(&get(&proxy), 503, "limit_full");
    drop(held);
    let grown = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..12 {
            scope.spawn(|| {
                let mut client = RawClient::connect(proxy.outbound());
                while !grown.load(Ordering::Relaxed) {
                    client.ask(request("GET", ""));
                }
            });
        }
        // The others must end even if this fails.
        let seen = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            eventually("the limit to grow", || limit(&proxy) > 9);
        }));
        grown.store(true, Ordering::Relaxed);
        assert!(seen.is_ok(), "it stays at {}", limit(&proxy));
    });
}

/// A queued request that cannot meet its deadline leaves the queue to another, and costs the service nothing.
#[test]
fn queued_requests_past_their_deadline_are_dropped() {
    let service =
        Service::new(|seen, _| if seen.header("x-hang").is_some() { Reply::Never } else { Reply::from(200) });
    let keys = "limits = { max_requests = 1, max_pending = 1, pending_timeout = \"15s\" }\nretry = false";
    let proxy = proxy(&[service.address()], keys);
    let mut first = RawClient::connect(proxy.outbound());
    first.send(request("GET", "x-hang: 1\r\n"));
    eventually("the first to have the slot", || service.request_count() == 1);
    let hurried = ask(&proxy, request("GET", "x-mark: late\r\nx-request-timeout-ms: 150\r\n"));
    assert_cause(&hurried, 504, "deadline");
    thread::scope(|scope| {
        let patient = scope.spawn(|| get(&proxy));
        eventually("the next to wait", || status(&proxy)["upstreams"][0]["limits"]["pending"] == 1);
        drop(first);
        assert_eq!(patient.join().expect("no panic").status(), 200);
    });
    let seen = service.seen();
    assert_eq!(seen.len(), 2);
    assert!(seen.iter().all(|seen| seen.header("x-mark").is_none()), "{seen:?}");
}

/// A client at another address: on Linux all of 127/8 is this machine.
fn client_at(from: [u8; 4], to: SocketAddr) -> RawClient {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let connect = async {
        let socket = tokio::net::TcpSocket::new_v4()?;
        socket.bind((IpAddr::from(from), 0).into())?;
        socket.connect(to).await?.into_std()
    };
    let stream = runtime.block_on(connect).expect("connect");
    stream.set_nonblocking(false).expect("blocking");
    stream.set_read_timeout(Some(crate::support::WAIT_LIMIT)).expect("a timeout");
    RawClient { stream, buffer: Vec::new() }
}

#[test]
fn a_rate_limit_per_peer_is_separate_for_each_peer() {
    let service = Service::new(|_, _| 200);
    let proxy = proxy(&[service.address()], "rate_limit = { rate = 1, burst = 2, per = \"peer\" }");
    let mut one = client_at([127, 0, 0, 1], proxy.outbound());
    let mut other = client_at([127, 0, 0, 2], proxy.outbound());
    eventually("a peer over its limit", || one.ask(request("GET", "")).status() == 429);
    assert_eq!(other.ask(request("GET", "")).status(), 200, "it has its own allowance");
    // Another connection is still the same peer.
    eventually("the second peer over its own", || {
        client_at([127, 0, 0, 2], proxy.outbound()).ask(request("GET", "")).status() == 429
    });
    assert!(refused(&proxy, "rate_limited") >= 2);
}
