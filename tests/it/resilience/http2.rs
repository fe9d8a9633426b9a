//! What HTTP/2 and gRPC say about whether a request was processed.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use super::{Reply, Service, ask, post, proxy, retries};
use crate::support::{
    RawClient, RawServer, eventually,
    h2::{DATA, END_STREAM, Frame, GOAWAY, H2Client, HEADERS, RST_STREAM, block, frame},
};

const REFUSED_STREAM: u32 = 7;
const CANCEL: u32 = 8;

/// A server whose requests up to `failures` end by `fail(peer, stream)`, later ones with 200.
fn server(
    failures: usize,
    fail: impl Fn(&mut H2Client, u32) + Send + Sync + 'static,
) -> (RawServer, Arc<AtomicUsize>) {
    let requests = Arc::<AtomicUsize>::default();
    let count = requests.clone();
    let server = RawServer::start(move |stream| {
        let Some(mut peer) = H2Client::accept(stream) else { return };
        while let Ok(Frame { kind, flags, stream, .. }) = peer.next() {
            if !matches!(kind, HEADERS | DATA) || flags & END_STREAM == 0 {
                continue;
            }
            if count.fetch_add(1, Ordering::Relaxed) < failures {
                fail(&mut peer, stream);
            } else {
                peer.headers(stream, &block(&[(":status", "200")]), true);
            }
        }
    });
    (server, requests)
}

fn reset(code: u32) -> impl Fn(&mut H2Client, u32) {
    move |peer, stream| {
        peer.send(frame(RST_STREAM, 0, stream, &code.to_be_bytes()));
    }
}

/// The server says that it did nothing (RFC 9113 §8.7): sent again, whatever the method.
#[test]
fn a_refused_stream_is_sent_again_for_any_method() {
    let (server, requests) = server(1, reset(REFUSED_STREAM));
    let proxy = proxy(&[server.address()], "protocol = \"h2\"");
    assert_eq!(ask(&proxy, post("", "pay")).status(), 200);
    assert_eq!(requests.load(Ordering::Relaxed), 2);
}

/// Any other code says nothing about what was done.
#[test]
fn another_reset_is_sent_again_only_where_it_may() {
    let (server, requests) = server(1, reset(CANCEL));
    let proxy = proxy(&[server.address()], "protocol = \"h2\"");
    assert_eq!(ask(&proxy, post("", "pay")).status(), 502);
    assert_eq!(requests.load(Ordering::Relaxed), 1);
    let (server, requests) = self::server(1, reset(CANCEL));
    let proxy = super::proxy(&[server.address()], "protocol = \"h2\"");
    assert_eq!(super::get(&proxy).status(), 200);
    assert_eq!(requests.load(Ordering::Relaxed), 2);
}

/// A stream above the last one that GOAWAY names was not processed.
#[test]
fn what_goaway_leaves_out_is_sent_again_for_any_method() {
    let (server, requests) = server(1, |peer, _| {
        peer.send(frame(GOAWAY, 0, 0, &[0; 8]));
        let _ = peer.raw.stream.shutdown(std::net::Shutdown::Write);
    });
    let proxy = proxy(&[server.address()], "protocol = \"h2\"");
    assert_eq!(ask(&proxy, post("", "pay")).status(), 200);
    assert_eq!(requests.load(Ordering::Relaxed), 2);
}

/// Gone without a word: what was under way may have been done.
#[test]
fn a_lost_connection_is_no_proof() {
    let (server, requests) = server(1, |peer, _| {
        let _ = peer.raw.stream.shutdown(std::net::Shutdown::Both);
    });
    let proxy = proxy(&[server.address()], "protocol = \"h2\"");
    assert_eq!(ask(&proxy, post("", "pay")).status(), 502);
    assert_eq!(requests.load(Ordering::Relaxed), 1);
}

/// gRPC calls are POST: a status is tried again only where the route says so; its trailers-only form is seen in time.
#[test]
fn grpc_unavailable_is_tried_again_where_the_route_says_all() {
    for (keys, tries, status) in [("", 1, "14"), ("retry = { methods = \"all\" }", 2, "0")] {
        let service = Service::h2(|_, number| (200, "grpc-status", if number == 1 { "14" } else { "0" }));
        let proxy = proxy(&[service.address()], &format!("protocol = \"h2\"\n{keys}"));
        let answer = ask(&proxy, post("Content-Type: application/grpc\r\n", "\0\0\0\0\0"));
        assert_eq!((answer.status(), answer.field("grpc-status")), (200, Some(status)), "{answer:?}");
        assert_eq!(service.calls(), tries);
    }
}

/// A server that says when to come back is obeyed to the millisecond; by a negative number it says not to (gRPC A6).
#[test]
fn grpc_push_back_is_obeyed() {
    const CALL: &str = "Content-Type: application/grpc\r\ngrpc-timeout: 5S\r\n";
    for (value, calls, reason) in
        [("400", 2, None), ("-1", 1, Some("pushback")), ("60000", 1, Some("retry_after"))]
    {
        let service = Service::h2(move |_, number| {
            let mut answer = crate::support::text("");
            let fields = answer.headers_mut();
            fields.insert("grpc-status", if number == 1 { "14" } else { "0" }.parse().expect("a value"));
            fields.insert("grpc-retry-pushback-ms", value.parse().expect("a value"));
            Reply::Now(answer)
        });
        let keys =
            "protocol = \"h2\"\nretry = { methods = \"all\", backoff = { base = \"1ms\", max = \"1ms\" } }";
        let proxy = proxy(&[service.address()], keys);
        let began = Instant::now();
        let answer = ask(&proxy, post(CALL, "\0\0\0\0\0"));
        let status = if calls == 2 { "0" } else { "14" };
        assert_eq!(
            (answer.field("grpc-status"), service.calls()),
            (Some(status), calls),
            "{value}: {answer:?}"
        );
        assert!(calls == 1 || began.elapsed() >= Duration::from_millis(400), "{:?}", began.elapsed());
        assert_eq!(reason.map(|reason| retries(&proxy, reason)), reason.map(|_| 1), "{value}");
    }
}

/// A gRPC status of failure opens the breaker, though HTTP says 200.
#[test]
fn a_grpc_failure_counts() {
    let service = Service::h2(|_, _| (200, "grpc-status", "14"));
    let proxy = proxy(&[service.address()], "protocol = \"h2\"\nbreaker = { consecutive_failures = 3 }");
    let call = post("Content-Type: application/grpc\r\n", "\0\0\0\0\0");
    for _ in 0..5 {
        assert_eq!(ask(&proxy, &call).field("grpc-status"), Some("14"));
    }
    assert_eq!(service.calls(), 3, "then the breaker answers");
}

/// A stream that breaks after its headers has failed, too: it counts for breaker and metrics as a status would.
#[test]
fn a_grpc_stream_that_breaks_after_its_headers_counts() {
    const INTERNAL_ERROR: u32 = 2;
    let head = || block(&[(":status", "200"), ("content-type", "application/grpc")]);
    let (server, requests) = server(usize::MAX, move |peer, stream| {
        peer.headers(stream, &head(), false);
        reset(INTERNAL_ERROR)(peer, stream);
    });
    let proxy = proxy(&[server.address()], "protocol = \"h2\"\nbreaker = { consecutive_failures = 3 }");
    let call = post("Content-Type: application/grpc\r\nConnection: close\r\n", "\0\0\0\0\0");
    eventually("the breaker to open", || {
        let mut client = RawClient::connect(proxy.outbound());
        client.send(&call);
        String::from_utf8_lossy(&client.read_to_close().0).contains("breaker_open")
    });
    assert_eq!(requests.load(Ordering::Relaxed), 3, "three broke");
}

/// One that ends without a status is UNKNOWN to every gRPC library, which is a failure.
#[test]
fn a_grpc_call_that_ends_without_a_status_counts() {
    let service = Service::h2(|_, _| 200);
    let proxy = proxy(&[service.address()], "protocol = \"h2\"\nbreaker = { consecutive_failures = 3 }");
    let call = post("Content-Type: application/grpc\r\n", "\0\0\0\0\0");
    for _ in 0..6 {
        ask(&proxy, &call);
    }
    assert_eq!(service.calls(), 3, "then the breaker answers");
}
