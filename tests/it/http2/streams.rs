//! At an upstream's SETTINGS_MAX_CONCURRENT_STREAMS, requests use other connections and a queue.

use std::{
    io::{Read, Write},
    net::TcpStream,
    sync::mpsc,
    time::Instant,
};

use bytes::Bytes;

use super::proxy;
use crate::support::{
    Proxy, RawClient, RawServer, WAIT_LIMIT, eventually,
    h2::{Frame, H2Client, HEADERS, SETTINGS, block, frame},
    h2_server::{H2Server, client, request},
};
use crate::wire::last_request;

const MAX_CONCURRENT_STREAMS: [u8; 2] = [0, 3];

/// Allows this many streams on a connection. Its responses begin and never end.
fn server(limit: u32) -> H2Server {
    let mut builder = h2::server::Builder::new();
    builder.max_concurrent_streams(limit);
    H2Server::start(builder, |request, mut respond| async move {
        let Ok(mut body) = respond.send_response(http::Response::new(()), false) else { return };
        let _ = body.send_data(Bytes::from_static(b"x"), false);
        let _ = std::future::poll_fn(|cx| body.poll_reset(cx)).await;
        drop(request);
    })
}

/// The statuses of this many HTTP/1.1 requests, sent at once.
fn ask_all(address: std::net::SocketAddr, count: usize) -> Vec<(u16, RawClient)> {
    let mut clients: Vec<RawClient> = (0..count).map(|_| RawClient::connect(address)).collect();
    for client in &mut clients {
        client.send("GET / HTTP/1.1\r\nHost: up\r\n\r\n");
    }
    let status = |mut client: RawClient| {
        let line = client.peek(12).expect("a response").to_vec();
        let status = String::from_utf8_lossy(&line[9..]).parse().expect("a status");
        (status, client)
    };
    clients.into_iter().map(status).collect()
}

#[test]
fn streams_above_the_concurrency_limit_get_another_connection() {
    let server = server(5);
    let proxy = proxy(server.address(), "");
    let answered = ask_all(proxy.outbound(), 20);
    assert!(answered.iter().all(|(status, _)| *status == 200));
    assert_eq!(server.connections(), 4);
}

#[tokio::test]
async fn streams_of_http2_clients_above_the_limit_get_another_connection() {
    let server = server(5);
    let proxy = proxy(server.address(), "");
    let mut open = Vec::new();
    for _ in 0..4 {
        let mut sender = client(proxy.outbound(), h2::client::Builder::new()).await;
        for _ in 0..5 {
            sender = sender.ready().await.expect("the connection lives");
            let (response, _) = sender.send_request(request("GET", "up", "/"), true).expect("sent");
            let response =
                tokio::time::timeout(WAIT_LIMIT, response).await.expect("in time").expect("a response");
            assert_eq!(response.status(), 200);
            open.push(response);
        }
        open.last_mut().expect("some").extensions_mut().insert(sender);
    }
    assert_eq!(server.connections(), 4);
}

#[test]
fn requests_queue_at_max_connections_and_are_then_rejected() {
    let server = server(5);
    let proxy = proxy(server.address(), "limits = { max_connections = 2, pending_timeout = \"400ms\" }");
    let began = Instant::now();
    let mut answered = ask_all(proxy.outbound(), 14);
    let refused = answered.iter().filter(|(status, _)| *status == 503).count();
    assert_eq!((refused, server.connections()), (4, 2));
    assert!(began.elapsed() < WAIT_LIMIT / 2, "{:?}", began.elapsed());
    let (_, client) = answered.iter_mut().find(|(status, _)| *status == 503).expect("one");
    let response = client.response().expect("well-formed").expect("a response");
    let said = response.field("proxy-status").unwrap_or_default();
    assert!(said.contains("details=\"limit_full\""), "{response:?}");
    assert!(response.field("retry-after").is_some(), "{response:?}");
    // A stream that ends frees its slot for the next request.
    answered.retain(|(status, _)| *status == 200);
    answered.truncate(9);
    eventually("a stream to be free", || {
        ask_all(proxy.outbound(), 1).first().is_some_and(|(status, _)| *status == 200)
    });
}

/// Queueing inside the proxy counts against no endpoint, whichever timer ends it.
#[test]
fn waiting_for_a_stream_past_attempt_timeout_counts_against_no_endpoint() {
    let server = server(1);
    let keys = "limits = { max_connections = 1, pending_timeout = \"5s\" }\nattempt_timeout = \"300ms\"\nretry = false";
    let proxy = proxy(server.address(), keys);
    wait_counts_against_no_endpoint(&proxy);
}

/// The same for an HTTP/1.1 connection, for which a request waits at most 100 ms.
#[test]
fn waiting_for_a_connection_past_attempt_timeout_counts_against_no_endpoint() {
    let server = RawServer::start(|mut stream| {
        let mut seen = [0; 4096];
        let _ = stream.read(&mut seen);
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf");
        while let Ok(1..) = stream.read(&mut seen) {}
    });
    let proxy = Proxy::start(format!(
        "[runtime]\nworkers = 1\n[[upstream]]\nname = \"up\"\nprotocol = \"http1\"\nendpoints = [\"{}\"]\n\
         limits = {{ max_connections = 1 }}\nattempt_timeout = \"60ms\"\nretry = false\n",
        server.address()
    ));
    wait_counts_against_no_endpoint(&proxy);
}

/// The first request takes the only slot, the next ones wait in vain.
fn wait_counts_against_no_endpoint(proxy: &Proxy) {
    let mut first = ask_all(proxy.outbound(), 1);
    assert_eq!(first[0].0, 200);
    for _ in 0..10 {
        let response = RawClient::connect(proxy.outbound()).ask("GET / HTTP/1.1\r\nHost: up\r\n\r\n");
        let said = response.field("proxy-status").unwrap_or_default();
        assert!(said.contains("details=\"limit_full\""), "{response:?}");
        assert!(response.status() == 503 && response.field("retry-after").is_some(), "{response:?}");
        let last = last_request(proxy);
        assert_eq!(last["attempts"][0]["outcome"], "local_refusal", "{last}");
    }
    let mut client = RawClient::connect(proxy.admin());
    let status = client.ask("GET /status HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").text();
    let status: serde_json::Value = serde_json::from_str(&status).expect("JSON");
    let upstream = &status["upstreams"][0];
    assert_eq!(upstream["breaker"]["state"], "closed", "{status}");
    assert_eq!(upstream["endpoints"][0]["state"], "healthy", "{status}");
    assert_ne!(upstream["endpoints"][0]["success"], 0.0, "{status}");
    first.clear();
}

fn accept(stream: TcpStream, limit: u32) -> Option<H2Client> {
    H2Client::accept_with(stream, &stream_limit(limit))
}

/// The payload of SETTINGS with this stream limit.
fn stream_limit(limit: u32) -> Vec<u8> {
    [&MAX_CONCURRENT_STREAMS[..], &limit.to_be_bytes()].concat()
}

fn set_limit(peer: &mut H2Client, limit: u32) {
    peer.send(frame(SETTINGS, 0, 0, &stream_limit(limit)));
}

/// The stream of the next request.
fn next_request(peer: &mut H2Client) -> Option<u32> {
    loop {
        if let Frame { kind: HEADERS, stream, .. } = peer.next().ok()? {
            return Some(stream);
        }
    }
}

/// A limit of zero at first: requests wait on the one connection, and no other is opened.
#[test]
fn requests_wait_while_the_stream_limit_is_zero() {
    let (allow, allowed) = mpsc::channel::<()>();
    let allowed = std::sync::Mutex::new(allowed);
    let server = RawServer::start(move |stream| {
        let Some(mut peer) = accept(stream, 0) else { return };
        // The first request may be sent before the limit is known.
        if let Ok(allowed) = allowed.lock() {
            let _ = allowed.recv_timeout(WAIT_LIMIT);
        }
        set_limit(&mut peer, 10);
        while let Some(stream) = next_request(&mut peer) {
            peer.headers(stream, &block(&[(":status", "200")]), true);
        }
    });
    let proxy = proxy(server.address(), "limits = { pending_timeout = \"10s\" }");
    let mut clients: Vec<RawClient> = (0..8).map(|_| RawClient::connect(proxy.outbound())).collect();
    for client in &mut clients {
        client.send("GET / HTTP/1.1\r\nHost: up\r\n\r\n");
    }
    eventually("a connection", || server.connections() == 1);
    allow.send(()).expect("it listens");
    for client in &mut clients {
        assert_eq!(client.response().expect("well-formed").expect("a response").status(), 200);
    }
    assert_eq!(server.connections(), 1);
}

/// Lowered while streams are open: those continue, and new ones use another connection.
#[test]
fn a_lowered_stream_limit_applies_to_new_streams() {
    let server = RawServer::start(move |stream| {
        let Some(mut peer) = accept(stream, 10) else { return };
        let mut open = Vec::new();
        while let Some(stream) = next_request(&mut peer) {
            open.push(stream);
            if open.len() == 2 {
                set_limit(&mut peer, 2);
            }
            assert!(open.len() <= 2, "a third stream");
            peer.send(frame(HEADERS, 4, stream, &block(&[(":status", "200")])));
        }
    });
    let proxy = proxy(server.address(), "");
    let first = ask_all(proxy.outbound(), 2);
    assert!(first.iter().all(|(status, _)| *status == 200));
    // Our acknowledgement of the lowered limit is not visible here; it is in force once requests go elsewhere.
    eventually("another connection", || {
        let mut client = RawClient::connect(proxy.outbound());
        client.send("GET / HTTP/1.1\r\nHost: up\r\n\r\n");
        client.peek(12).is_ok() && server.connections() == 2
    });
}
