//! The first deadline that passes on a dead connection detects it.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use super::proxy;
use crate::support::{
    RawClient, RawServer, WAIT_LIMIT, eventually,
    h2::{ACK, Frame, H2Client, HEADERS, PING, block, frame},
};

const BRIEF: &str = "attempt_timeout = \"300ms\"\nretry = false\nping_timeout = \"500ms\"\nbreaker = false";

fn ask(address: std::net::SocketAddr) -> u16 {
    RawClient::connect(address).ask("GET / HTTP/1.1\r\nHost: up\r\nConnection: close\r\n\r\n").status()
}

/// The first connection becomes unresponsive after its first response, as if its peer had lost the network; later ones
/// work.
#[test]
fn an_unresponsive_connection_gets_no_more_requests() {
    let number = AtomicUsize::new(0);
    let server = RawServer::start(move |stream| {
        let first = number.fetch_add(1, Ordering::Relaxed) == 0;
        let Some(mut peer) = H2Client::accept(stream) else { return };
        while let Ok(Frame { kind, stream, .. }) = peer.next() {
            if kind == HEADERS {
                peer.headers(stream, &block(&[(":status", "200")]), true);
                if first {
                    // Not even read any more; closed at the end of the test.
                    std::thread::sleep(WAIT_LIMIT);
                    return;
                }
            }
        }
    });
    let proxy = proxy(server.address(), BRIEF);
    assert_eq!(ask(proxy.outbound()), 200);
    assert_eq!(ask(proxy.outbound()), 504, "not detectable yet");
    for _ in 0..10 {
        assert_eq!(ask(proxy.outbound()), 200, "by another connection, at once");
    }
    assert_eq!(server.connections(), 2);
}

/// A slow service on a working connection: it acknowledges the PING, so the connection is kept.
#[test]
fn a_slow_service_keeps_its_connection() {
    let pings = Arc::<AtomicUsize>::default();
    let count = pings.clone();
    let server = RawServer::start(move |stream| {
        let Some(mut peer) = H2Client::accept(stream) else { return };
        let mut requests = 0;
        while let Ok(Frame { kind, flags, stream, .. }) = peer.next() {
            if kind == PING && flags & ACK == 0 {
                count.fetch_add(1, Ordering::Relaxed);
            }
            if kind == HEADERS {
                requests += 1;
                if requests % 2 == 1 {
                    peer.headers(stream, &block(&[(":status", "200")]), true);
                }
            }
        }
    });
    let proxy = proxy(server.address(), BRIEF);
    for round in 1..=4 {
        assert_eq!(ask(proxy.outbound()), 200);
        assert_eq!(ask(proxy.outbound()), 504);
        eventually("a PING after the deadline", || pings.load(Ordering::Relaxed) == round);
        // The PING acknowledgement is on its way; a request before it arrives would open another connection.
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    assert_eq!(server.connections(), 1);
}

/// PINGs also detect a dead connection whose only open stream is idle.
#[test]
fn pings_detect_a_dead_peer_of_an_idle_stream() {
    let server = RawServer::start(move |stream| {
        let Some(mut peer) = H2Client::accept(stream) else { return };
        while let Ok(Frame { kind, stream, .. }) = peer.next() {
            if kind == HEADERS {
                peer.send(frame(HEADERS, 4, stream, &block(&[(":status", "200")])));
                std::thread::sleep(WAIT_LIMIT * 2);
                return;
            }
        }
    });
    let proxy = proxy(server.address(), "ping_interval = \"1s\"\nping_timeout = \"500ms\"");
    // Less than the peer takes to close.
    let mut client = RawClient::connect(proxy.outbound()).with_read_timeout(WAIT_LIMIT);
    client.send("GET / HTTP/1.1\r\nHost: up\r\n\r\n");
    let (_, closed) = client.read_to_close();
    assert!(closed, "still open");
}
