//! A request that was certainly not sent or not processed is sent again, even with `retry = false`.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use http_body_util::BodyExt;

use super::proxy;
use crate::support::{
    Proxy, RawClient, RawServer, Upstream, eventually,
    h2::{END_STREAM, Frame, GOAWAY, H2Client, RST_STREAM, block, frame},
    text,
};

const OFF: &str = "retry = false\nbreaker = false";
const REFUSED_STREAM: u32 = 7;
const ENHANCE_YOUR_CALM: u32 = 11;

/// A server whose first connections end by `end(peer, streams)` after this many requests; later ones respond. Also
/// returns how many requests got a response.
fn server(
    connections: usize,
    requests: usize,
    end: impl Fn(&mut H2Client, &[u32]) + Send + Sync + 'static,
) -> (RawServer, Arc<AtomicUsize>) {
    let (number, answered) = (AtomicUsize::new(0), Arc::<AtomicUsize>::default());
    let count = answered.clone();
    let server = RawServer::start(move |stream| {
        let ends = number.fetch_add(1, Ordering::Relaxed) < connections;
        let Some(mut peer) = H2Client::accept(stream) else { return };
        let mut streams = Vec::new();
        while let Ok(Frame { flags, stream, kind, .. }) = peer.next() {
            if stream == 0 || flags & END_STREAM == 0 || kind > 1 {
                continue;
            }
            streams.push(stream);
            if !ends {
                count.fetch_add(1, Ordering::Relaxed);
                peer.headers(stream, &block(&[(":status", "200")]), true);
            } else if streams.len() == requests {
                end(&mut peer, &streams);
            }
        }
    });
    (server, answered)
}

/// Sends this many POSTs at once.
fn post_all(proxy: &Proxy, count: usize) -> Vec<u16> {
    let (statuses, address) = (Mutex::new(Vec::new()), proxy.outbound());
    thread::scope(|scope| {
        for _ in 0..count {
            scope.spawn(|| {
                let mut client = RawClient::connect(address);
                let response = client.ask("POST / HTTP/1.1\r\nHost: up\r\nContent-Length: 3\r\n\r\npay");
                statuses.lock().expect("no panic").push(response.status());
            });
        }
    });
    statuses.into_inner().expect("no panic")
}

fn go_away(last: u32, code: u32) -> Vec<u8> {
    let mut payload = last.to_be_bytes().to_vec();
    payload.extend(code.to_be_bytes());
    frame(GOAWAY, 0, 0, &payload)
}

/// The first stream gets its response, as GOAWAY says; the others were not processed.
#[test]
fn requests_above_the_goaway_last_id_are_resent_with_retry_off() {
    for code in [0, ENHANCE_YOUR_CALM] {
        let (server, answered) = server(1, 5, move |peer, streams| {
            peer.send(go_away(streams[0], code));
            peer.headers(streams[0], &block(&[(":status", "200")]), true);
            let _ = peer.raw.stream.shutdown(std::net::Shutdown::Write);
        });
        let proxy = proxy(server.address(), OFF);
        assert_eq!(post_all(&proxy, 5), [200; 5], "code {code}");
        assert_eq!(answered.load(Ordering::Relaxed), 4, "none was sent twice");
        assert_eq!(server.connections(), 2);
    }
}

#[test]
fn refused_streams_are_resent_with_retry_off() {
    let (server, answered) = server(1, 3, |peer, streams| {
        let mut frames = go_away(*streams.last().expect("some"), 0);
        for stream in streams {
            frames.extend(frame(RST_STREAM, 0, *stream, &REFUSED_STREAM.to_be_bytes()));
        }
        peer.send(frames);
    });
    let proxy = proxy(server.address(), OFF);
    assert_eq!(post_all(&proxy, 3), [200; 3]);
    assert_eq!(answered.load(Ordering::Relaxed), 3);
}

/// An endpoint that refuses everything gets one request at most three times; it processed none of them.
#[test]
fn resends_to_an_endpoint_that_refuses_all_streams_are_bounded() {
    let requests = Arc::<AtomicUsize>::default();
    let count = requests.clone();
    let server = RawServer::start(move |stream| {
        let Some(mut peer) = H2Client::accept(stream) else { return };
        while let Ok(Frame { flags, stream, kind, .. }) = peer.next() {
            if stream > 0 && kind <= 1 && flags & END_STREAM != 0 {
                count.fetch_add(1, Ordering::Relaxed);
                peer.send(frame(RST_STREAM, 0, stream, &REFUSED_STREAM.to_be_bytes()));
            }
        }
    });
    let proxy = proxy(server.address(), OFF);
    assert_eq!(post_all(&proxy, 1), [502]);
    assert_eq!(requests.load(Ordering::Relaxed), 3);
}

/// Connections live only briefly: no request around the end of one is lost, and none is processed twice.
#[test]
fn no_request_is_lost_when_connections_reach_their_maximum_age() {
    let answered = Arc::<AtomicUsize>::default();
    let count = answered.clone();
    let server = RawServer::start(move |stream| {
        let Some(mut peer) = H2Client::accept(stream) else { return };
        let (mut served, mut last) = (0, 0);
        while let Ok(Frame { flags, stream, kind, .. }) = peer.next() {
            if stream == 0 || kind > 1 || flags & END_STREAM == 0 || (last > 0 && stream > last) {
                continue;
            }
            count.fetch_add(1, Ordering::Relaxed);
            peer.headers(stream, &block(&[(":status", "200")]), true);
            served += 1;
            if served == 5 {
                last = stream;
                peer.send(go_away(last, 0));
            }
        }
    });
    let proxy = proxy(server.address(), OFF);
    for _ in 0..20 {
        assert_eq!(post_all(&proxy, 10), [200; 10]);
    }
    assert_eq!(answered.load(Ordering::Relaxed), 200);
}

/// With `retry = false` a body is buffered only as far as a refused stream could need it again: no more than 64 KiB
/// for each of 400 clients, however small the chunks in which it arrives.
#[test]
fn buffered_body_bytes_are_bounded_with_retry_off() {
    const CLIENTS: usize = 400;
    const PIECES: usize = 900;
    const PIECE: usize = 64;
    let came = Arc::<AtomicUsize>::default();
    let counted = Arc::clone(&came);
    let upstream = Upstream::h2c(move |request| {
        let came = Arc::clone(&counted);
        async move {
            let mut body = request.into_body();
            while let Some(Ok(frame)) = body.frame().await {
                came.fetch_add(frame.data_ref().map_or(0, bytes::Bytes::len), Ordering::Relaxed);
            }
            text("ok")
        }
    });
    let proxy = proxy(upstream.address(), OFF);
    let mut clients: Vec<RawClient> = (0..CLIENTS).map(|_| RawClient::connect(proxy.outbound())).collect();
    for client in &mut clients {
        client.send("POST / HTTP/1.1\r\nHost: up\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n");
    }
    eventually("all requests", || came.load(Ordering::Relaxed) == CLIENTS);
    let before = proxy.resident_kib();
    let pieces = format!("{PIECE:x}\r\n{}\r\n", "x".repeat(PIECE)).repeat(PIECES);
    for client in &mut clients {
        client.send(&pieces);
    }
    eventually("all of the bodies", || came.load(Ordering::Relaxed) == CLIENTS * (1 + PIECE * PIECES));
    let grown = proxy.resident_kib().saturating_sub(before);
    // What they have sent, and as much again for the buffers that hold it.
    assert!(grown < 2 * 64 * CLIENTS as u64, "{grown} KiB for {CLIENTS} uploads");
    for client in &mut clients {
        client.send("0\r\n\r\n");
        assert_eq!(client.response().expect("well-formed").expect("a response").status(), 200);
    }
}
