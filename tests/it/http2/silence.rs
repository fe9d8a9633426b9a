//! A connection whose other end has vanished is found out by the first deadline that passes on it.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use super::proxy;
use crate::support::{
    PATIENCE, RawClient, RawServer, eventually,
    h2::{ACK, Frame, H2Client, HEADERS, PING, block, frame},
};

const BRIEF: &str = "attempt_timeout = \"300ms\"\nretry = false\nping_timeout = \"500ms\"\nbreaker = false";

fn ask(address: std::net::SocketAddr) -> u16 {
    RawClient::connect(address).ask("GET / HTTP/1.1\r\nHost: up\r\nConnection: close\r\n\r\n").status()
}

/// The first connection goes silent after its first response, as one does whose peer was cut off; later ones are well.
#[test]
fn a_silent_connection_gets_no_more_requests() {
    let number = AtomicUsize::new(0);
    let server = RawServer::start(move |stream| {
        let first = number.fetch_add(1, Ordering::Relaxed) == 0;
        let Some(mut peer) = H2Client::accept(stream) else { return };
        while let Ok(Frame { kind, stream, .. }) = peer.next() {
            if kind == HEADERS {
                peer.headers(stream, &block(&[(":status", "200")]), true);
                if first {
                    // Not even read any more; closed when the test is over.
                    std::thread::sleep(PATIENCE);
                    return;
                }
            }
        }
    });
    let proxy = proxy(server.address(), BRIEF);
    assert_eq!(ask(proxy.outbound()), 200);
    assert_eq!(ask(proxy.outbound()), 504, "nobody can know yet");
    for _ in 0..10 {
        assert_eq!(ask(proxy.outbound()), 200, "by another connection, at once");
    }
    assert_eq!(server.connections(), 2);
}

/// A service that is slow, on a connection that is well: the answer to the PING says so, and the connection is kept.
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
        // The answer is on its way; what is asked before it is there would open another connection.
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    assert_eq!(server.connections(), 1);
}

/// PINGs also find out a connection on which only a stream is open that nobody expects anything of just now.
#[test]
fn a_silent_stream_is_cut_off_from_a_silent_peer() {
    let server = RawServer::start(move |stream| {
        let Some(mut peer) = H2Client::accept(stream) else { return };
        while let Ok(Frame { kind, stream, .. }) = peer.next() {
            if kind == HEADERS {
                peer.send(frame(HEADERS, 4, stream, &block(&[(":status", "200")])));
                std::thread::sleep(PATIENCE * 2);
                return;
            }
        }
    });
    let proxy = proxy(server.address(), "ping_interval = \"1s\"\nping_timeout = \"500ms\"");
    // Less than the peer takes to close.
    let mut client = RawClient::connect(proxy.outbound()).patience(PATIENCE);
    client.send("GET / HTTP/1.1\r\nHost: up\r\n\r\n");
    let (_, closed) = client.read_to_close();
    assert!(closed, "still open");
}
