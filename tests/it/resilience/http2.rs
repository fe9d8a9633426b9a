//! HTTP/2 and gRPC signals about whether a request was processed.

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

/// The server says that it did not process the request (RFC 9113 §8.7): sent again for any method.
#[test]
fn a_refused_stream_is_resent_for_any_method() {
    let (server, requests) = server(1, reset(REFUSED_STREAM));
    let proxy = proxy(&[server.address()], "protocol = \"h2\"");
    assert_eq!(ask(&proxy, post("", "pay")).status(), 200);
    assert_eq!(requests.load(Ordering::Relaxed), 2);
}

/// Any other code does not say whether the request was processed.
#[test]
fn other_resets_are_retried_only_for_idempotent_requests() {
    let (server, requests) = server(1, reset(CANCEL));
    let proxy = proxy(&[server.address()], "protocol = \"h2\"");
    assert_eq!(ask(&proxy, post("", "pay")).status(), 502);
    assert_eq!(requests.load(Ordering::Relaxed), 1);
    let (server, requests) = self::server(1, reset(CANCEL));
    let proxy = super::proxy(&[server.address()], "protocol = \"h2\"");
    assert_eq!(super::get(&proxy).status(), 200);
    assert_eq!(requests.load(Ordering::Relaxed), 2);
}

/// A stream above the last stream ID of GOAWAY was not processed.
#[test]
fn requests_above_the_goaway_last_id_are_resent_for_any_method() {
    let (server, requests) = server(1, |peer, _| {
        peer.send(frame(GOAWAY, 0, 0, &[0; 8]));
        let _ = peer.raw.stream.shutdown(std::net::Shutdown::Write);
    });
    let proxy = proxy(&[server.address()], "protocol = \"h2\"");
    assert_eq!(ask(&proxy, post("", "pay")).status(), 200);
    assert_eq!(requests.load(Ordering::Relaxed), 2);
}

/// A connection that ends without GOAWAY: requests in flight may have been processed.
#[test]
fn a_lost_connection_is_retried_only_for_idempotent_requests() {
    let (server, requests) = server(1, |peer, _| {
        let _ = peer.raw.stream.shutdown(std::net::Shutdown::Both);
    });
    let proxy = proxy(&[server.address()], "protocol = \"h2\"");
    assert_eq!(ask(&proxy, post("", "pay")).status(), 502);
    assert_eq!(requests.load(Ordering::Relaxed), 1);
}

/// gRPC requests are POST: a status is retried only where the route allows it; its trailers-only form is seen in time.
#[test]
fn grpc_unavailable_is_retried_where_the_route_allows_all_methods() {
    for (keys, attempts, status) in [("", 1, "14"), ("retry = { methods = \"all\" }", 2, "0")] {
        let service = Service::h2(|_, number| (200, "grpc-status", if number == 1 { "14" } else { "0" }));
        let proxy = proxy(&[service.address()], &format!("protocol = \"h2\"\n{keys}"));
        let response = ask(&proxy, post("Content-Type: application/grpc\r\n", "\0\0\0\0\0"));
        assert_eq!((response.status(), response.field("grpc-status")), (200, Some(status)), "{response:?}");
        assert_eq!(service.request_count(), attempts);
    }
}

/// A server's retry push-back is obeyed to the millisecond; a negative number forbids the retry (gRPC A6).
#[test]
fn grpc_retry_pushback_is_obeyed() {
    const GRPC_HEADERS: &str = "Content-Type: application/grpc\r\ngrpc-timeout: 5S\r\n";
    for (value, attempts_made, reason) in
        [("400", 2, None), ("-1", 1, Some("pushback")), ("60000", 1, Some("retry_after"))]
    {
        let service = Service::h2(move |_, number| {
            let mut response = crate::support::text("");
            let fields = response.headers_mut();
            fields.insert("grpc-status", if number == 1 { "14" } else { "0" }.parse().expect("a value"));
            fields.insert("grpc-retry-pushback-ms", value.parse().expect("a value"));
            Reply::Now(response)
        });
        let keys =
            "protocol = \"h2\"\nretry = { methods = \"all\", backoff = { base = \"1ms\", max = \"1ms\" } }";
        let proxy = proxy(&[service.address()], keys);
        let began = Instant::now();
        let response = ask(&proxy, post(GRPC_HEADERS, "\0\0\0\0\0"));
        let status = if attempts_made == 2 { "0" } else { "14" };
        assert_eq!(
            (response.field("grpc-status"), service.request_count()),
            (Some(status), attempts_made),
            "{value}: {response:?}"
        );
        assert!(attempts_made == 1 || began.elapsed() >= Duration::from_millis(400), "{:?}", began.elapsed());
        assert_eq!(reason.map(|reason| retries(&proxy, reason)), reason.map(|_| 1), "{value}");
    }
}

/// A failing gRPC status opens the breaker, though the HTTP status is 200.
#[test]
fn a_failing_grpc_status_counts_for_the_breaker() {
    let service = Service::h2(|_, _| (200, "grpc-status", "14"));
    let proxy = proxy(&[service.address()], "protocol = \"h2\"\nbreaker = { consecutive_failures = 3 }");
    let call = post("Content-Type: application/grpc\r\n", "\0\0\0\0\0");
    for _ in 0..5 {
        assert_eq!(ask(&proxy, &call).field("grpc-status"), Some("14"));
    }
    assert_eq!(service.request_count(), 3, "then the breaker answers");
}

/// A stream that is reset after its headers has failed, too: it counts for breaker and metrics as a status would.
#[test]
fn a_grpc_stream_reset_after_its_headers_counts_as_a_failure() {
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

/// A response without a status is UNKNOWN to every gRPC library, which is a failure.
#[test]
fn a_grpc_response_without_a_status_counts_as_a_failure() {
    let service = Service::h2(|_, _| 200);
    let proxy = proxy(&[service.address()], "protocol = \"h2\"\nbreaker = { consecutive_failures = 3 }");
    let call = post("Content-Type: application/grpc\r\n", "\0\0\0\0\0");
    for _ in 0..6 {
        ask(&proxy, &call);
    }
    assert_eq!(service.request_count(), 3, "then the breaker answers");
}
