//! Stale responses: in place of failures of every kind, while they are fetched anew, and where they are forbidden.

use std::io::{Read as _, Write as _};

use tokio::sync::Semaphore;

use super::*;
use crate::support::{RawServer, pki::Pki, tls::TlsServer};

const STALE: &[(&str, &str)] = &[("cache-control", "max-age=0")];

/// Answers the first request, and later ones only when permitted.
fn held_after_the_first(fields: &'static [(&'static str, &'static str)]) -> (Service, Arc<Semaphore>) {
    let gate = Arc::new(Semaphore::new(0));
    let permits = Arc::clone(&gate);
    let service = Service::start(move |number, _| {
        let permits = Arc::clone(&permits);
        async move {
            if number > 1 {
                permits.acquire().await.unwrap().forget();
            }
            response(200, fields, number.to_string())
        }
    });
    (service, gate)
}

/// The service does not respond to the second request until the test permits it, so whoever waited for it would stand.
#[test]
fn a_stale_response_is_sent_at_once_while_one_request_fetches_it_anew() {
    for (fields, keys) in [
        (&[("cache-control", "max-age=0, stale-while-revalidate=60")][..], ""),
        (STALE, "stale_while_revalidate = \"60s\""),
    ] {
        let (service, gate) = held_after_the_first(fields);
        let proxy = proxy(service.address, keys);
        assert_eq!(get(&proxy, "/", "").1, "1");
        for _ in 0..5 {
            let (status, body, cache) = get(&proxy, "/", "");
            assert_eq!((status, body.as_str()), (200, "1"));
            assert!(cache.contains("; hit; ttl=-"), "{cache}");
            assert!(cache.ends_with("; detail=stale_while_revalidate"), "{cache}");
        }
        eventually("it is fetched anew", || service.requests() == 2);
        gate.add_permits(1);
        eventually("the new response is sent", || get(&proxy, "/", "").1 == "2");
    }
}

/// The request in the background is a plain GET, whatever the client's was: its response has to be one that is stored.
#[test]
fn what_is_fetched_in_the_background_is_the_whole_response() {
    let service = Service::start(|number, request| async move {
        let control = request.headers().get("cache-control").and_then(|value| value.to_str().ok());
        match request.headers().get("range") {
            Some(_) => response(206, &[("content-range", "bytes 0-0/1")], "x"),
            None if control == Some("only-if-cached") => response(504, &[], "x"),
            None => response(
                200,
                &[("cache-control", "max-age=0, stale-while-revalidate=60")],
                format!("{}{number}", request.method()),
            ),
        }
    });
    let proxy = proxy(service.address, "");
    assert_eq!(get(&proxy, "/", "").1, "GET1");
    let mut client = RawClient::connect(proxy.outbound());
    client.send("HEAD / HTTP/1.1\r\nHost: up\r\n\r\n");
    client.read_until(b"stale_while_revalidate");
    assert_eq!(service.requests(), 1, "a response to HEAD is not stored, so it is not fetched");
    for (number, fields) in
        [(2, "Range: bytes=0-2\r\n"), (3, "Cache-Control: only-if-cached, max-stale=0\r\n")]
    {
        let response =
            RawClient::connect(proxy.outbound()).ask(format!("GET / HTTP/1.1\r\nHost: up\r\n{fields}\r\n"));
        assert!(matches!(response.status(), 200 | 206), "{}", response.status());
        eventually("it is fetched", || service.requests() >= number);
        let stored = format!("GET{number}");
        eventually("and stored", || get(&proxy, "/", "Cache-Control: max-stale\r\n").1 == stored);
    }
}

#[test]
fn a_failed_fetch_in_the_background_leaves_what_is_stored() {
    let service = Service::start(|number, _| async move {
        match number {
            1 => response(200, &[("cache-control", "max-age=0, stale-while-revalidate=60")], "good"),
            _ => response(500, &[], "bad"),
        }
    });
    let proxy = proxy_with(service.address, "", "retry = false\nbreaker = false\n");
    get(&proxy, "/", "");
    eventually("several fetches have failed", || {
        assert_eq!(get(&proxy, "/", "").1, "good");
        service.requests() > 3
    });
}

/// The first failures are the service's own; then the breaker has opened, and the service is not asked any more.
#[test]
fn a_stale_response_stands_in_for_the_open_breaker() {
    let service = Service::start(|number, _| async move {
        match number {
            1 => response(200, STALE, "good"),
            _ => response(503, &[], "bad"),
        }
    });
    let proxy = proxy_with(
        service.address,
        "",
        "retry = false\nbreaker = { consecutive_failures = 3, open_for = { base = \"60s\", max = \"60s\" } }\n",
    );
    get(&proxy, "/", "");
    for _ in 0..3 {
        let (status, body, cache) = get(&proxy, "/", "");
        assert_eq!((status, body.as_str()), (200, "good"));
        assert!(
            cache.contains("fwd=stale; fwd-status=503") && cache.ends_with("detail=status_503"),
            "{cache}"
        );
    }
    for _ in 0..3 {
        let (status, body, cache) = get(&proxy, "/", "");
        assert_eq!((status, body.as_str()), (200, "good"));
        assert!(cache.contains("; hit; ttl=-") && cache.ends_with("detail=breaker_open"), "{cache}");
    }
    assert_eq!(service.requests(), 4, "the open breaker asks nobody");
    assert_eq!(get(&proxy, "/other", "").0, 503, "what is not stored fails");
    eventually("the access log says why", || {
        proxy.stdout().lines().any(|line| {
            line.contains("\"reason\":\"stale: breaker open\"") && line.contains("\"cache\":\"stale\"")
        })
    });
    assert_eq!(count(&proxy, "stale"), 6.0);
}

#[test]
fn a_stale_response_stands_in_for_a_service_that_does_not_respond_in_time() {
    let (service, _gate) = held_after_the_first(STALE);
    let proxy = proxy_with(service.address, "", "retry = false\ntimeout = \"200ms\"\n");
    get(&proxy, "/", "");
    let (status, body, cache) = get(&proxy, "/", "");
    assert_eq!((status, body.as_str()), (200, "1"));
    assert!(cache.contains("fwd=stale; ttl=-") && cache.contains("timeout"), "{cache}");
    let (status, body, _) = get(&proxy, "/", "X-Request-Timeout: 0.1\r\n");
    assert_eq!((status, body.as_str()), (200, "1"), "nor within the client's deadline");
}

/// Each connection but the first is closed after the request has been read.
#[test]
fn a_stale_response_stands_in_for_a_connection_that_breaks_before_the_response() {
    let connections = AtomicUsize::new(0);
    let service = RawServer::start(move |mut stream| {
        let _ = stream.read(&mut [0; 4096]);
        if connections.fetch_add(1, Ordering::SeqCst) == 0 {
            let head = "HTTP/1.1 200 OK\r\nCache-Control: max-age=0\r\nContent-Length: 4\r\nConnection: close\r\n\r\ngood";
            let _ = stream.write_all(head.as_bytes());
        }
    });
    let proxy = proxy_with(service.address(), "", "retry = false\n");
    get(&proxy, "/", "");
    let (status, body, cache) = get(&proxy, "/", "");
    assert_eq!((status, body.as_str()), (200, "good"));
    assert!(cache.ends_with("detail=reset"), "{cache}");
}

#[test]
fn a_response_that_forbids_it_is_not_sent_stale() {
    for control in [
        "max-age=0, stale-if-error=0",
        "max-age=0, must-revalidate",
        "max-age=0, proxy-revalidate",
        "s-maxage=0",
        "no-cache",
    ] {
        let service = Service::start(move |number, _| async move {
            match number {
                1 => response(200, &[("cache-control", control)], "good"),
                _ => response(503, &[], "bad"),
            }
        });
        let proxy = proxy_with(service.address, "", "retry = false\n");
        get(&proxy, "/", "");
        let (status, body, _) = get(&proxy, "/", "");
        assert_eq!((status, body.as_str()), (503, "bad"), "{control}");
    }
    let service = Service::start(|number, _| async move {
        if number == 1 { response(200, STALE, "good") } else { response(503, &[], "bad") }
    });
    let proxy = proxy_with(service.address, "stale_if_error = \"0s\"", "retry = false\n");
    get(&proxy, "/", "");
    assert_eq!(get(&proxy, "/", "").0, 503, "the route forbids it");
}

/// Another server at the upstream's address has a certificate of the same CA, with another name. What is stored would
/// hide that.
#[test]
fn a_wrong_identity_is_not_hidden_by_a_stale_response() {
    let pki = Pki::new();
    let me = pki.identity("me");
    let (right, wrong) = (pki.issue("catalogue", |_| {}), pki.issue("other", |_| {}));
    let [right, wrong] = [right, wrong].map(|certificate| TlsServer::start(&certificate, None, &[]));
    let config = |server: &TlsServer| {
        format!(
            "{me}\n[[upstream]]\nname = \"up\"\nendpoints = [\"{}\"]\ntls = \"mutual\"\nidentity = [\"{}\"]\nretry = false\nbreaker = false\noutlier = false\ncache = {{}}\n",
            server.address(),
            crate::support::pki::id("catalogue"),
        )
    };
    let proxy = Proxy::start(config(&right));
    let (status, body, cache) = get(&proxy, "/", "");
    assert_eq!((status, body.as_str()), (200, "hello"));
    assert!(cache.ends_with("stored"), "{cache}");
    proxy.reconfigure(&config(&wrong));
    eventually("the wrong certificate is refused", || get(&proxy, "/", "").0 == 502);
    let response = RawClient::connect(proxy.outbound()).ask("GET / HTTP/1.1\r\nHost: up\r\n\r\n");
    assert!(response.text().contains("peer_identity"), "{}", response.text());
}

/// The service is stopped in the middle of the load.
#[test]
fn clients_do_not_notice_that_the_service_goes_away() {
    let mut failed = Vec::new();
    for cache in ["cache = {}", "cache = false"] {
        let mut service = Service::numbered(STALE);
        let proxy = Proxy::start(format!(
            "[[upstream]]\nname = \"up\"\nendpoints = [\"{}\"]\n{cache}\n",
            service.address
        ));
        let failures = Arc::<AtomicUsize>::default();
        let done = Arc::<AtomicUsize>::default();
        let clients: Vec<_> = (0..8)
            .map(|_| {
                let (address, failures, done) = (proxy.outbound(), Arc::clone(&failures), Arc::clone(&done));
                std::thread::spawn(move || {
                    let mut client = RawClient::connect(address);
                    for number in 0..250 {
                        let request = format!("GET /{} HTTP/1.1\r\nHost: up\r\n\r\n", number % 10);
                        if client.ask(request).status() != 200 {
                            failures.fetch_add(1, Ordering::SeqCst);
                        }
                        done.fetch_add(1, Ordering::SeqCst);
                    }
                })
            })
            .collect();
        eventually("all is stored", || done.load(Ordering::SeqCst) > 200);
        service.stop();
        clients.into_iter().for_each(|client| client.join().unwrap());
        failed.push(failures.load(Ordering::SeqCst));
    }
    assert_eq!(failed[0], 0);
    assert!(failed[1] > 1000, "without a cache they fail: {failed:?}");
}

/// A body of unknown length is stored although nobody but the store reads it.
#[test]
fn a_chunked_response_is_fetched_anew_in_the_background() {
    let connections = AtomicUsize::new(0);
    let service = RawServer::start(move |mut stream| {
        let _ = stream.read(&mut [0; 4096]);
        let number = connections.fetch_add(1, Ordering::SeqCst) + 1;
        let head = "HTTP/1.1 200 OK\r\nCache-Control: max-age=0, stale-while-revalidate=60\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n";
        let _ = stream.write_all(format!("{head}1\r\n{}\r\n0\r\n\r\n", number.min(9)).as_bytes());
    });
    let proxy = proxy(service.address(), "");
    assert_eq!(get(&proxy, "/", "").1, "1");
    eventually("it is stored", || get(&proxy, "/", "Cache-Control: only-if-cached\r\n").0 == 200);
    eventually("it is replaced", || get(&proxy, "/", "").1 != "1");
}
