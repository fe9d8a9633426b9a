//! What the store takes, and what it counts.

use super::*;

const FRESH: &[(&str, &str)] = &[("cache-control", "max-age=60")];

#[test]
fn the_store_never_exceeds_its_bound() {
    let service = Service::start(|_, _| async { response(200, FRESH, vec![b'x'; 10_000]) });
    let proxy = proxy(service.address, "max_bytes = \"128KiB\"");
    for number in 0..100 {
        get(&proxy, &format!("/{number}"), "");
    }
    let bytes = metric(&proxy, "outrigger_cache_bytes ");
    assert!((1.0..=131_072.0).contains(&bytes), "{bytes}");
    assert!(metric(&proxy, "outrigger_cache_evictions_total ") > 0.0);
    assert_eq!(count(&proxy, "miss"), 100.0);
}

/// Distinct URLs, distinct values of a field in `Vary`, and URLs whose responses may not be stored: without a bound they
/// would take 100 MB.
#[test]
fn a_scan_of_many_urls_takes_no_more_memory() {
    const REQUESTS: usize = 12_000;
    let service = Service::start(|_, request| async move {
        let fields: &[(&str, &str)] = match request.uri().path().as_bytes().get(1) {
            Some(b'v') => &[("cache-control", "max-age=60"), ("vary", "x-variant")],
            Some(b'p') => &[("cache-control", "private")],
            _ => FRESH,
        };
        response(200, fields, vec![b'x'; 8192])
    });
    let proxy = proxy(service.address, "max_bytes = \"2MiB\"");
    let scan = |from: usize, to: usize| {
        let mut client = RawClient::connect(proxy.outbound());
        for number in from..to {
            let long = "y".repeat(200);
            let path = match number % 3 {
                0 => format!("/{number}/{long}"),
                1 => format!("/v{}", number % 7),
                _ => format!("/p{number}/{long}"),
            };
            let request = format!("GET {path} HTTP/1.1\r\nHost: up\r\nX-Variant: {number}\r\n\r\n");
            assert_eq!(client.ask(request).status(), 200);
        }
    };
    scan(0, 1000);
    let before = proxy.resident_kib();
    scan(1000, REQUESTS);
    let bytes = metric(&proxy, "outrigger_cache_bytes ");
    assert!((1.0..=2_097_152.0).contains(&bytes), "{bytes}");
    let more = proxy.resident_kib().saturating_sub(before);
    assert!(more < 16_384, "{more} KiB more after {REQUESTS} requests");
}

#[test]
fn every_result_is_counted_and_logged() {
    let service = Service::start(|number, request| async move {
        match (request.uri().path(), number) {
            ("/fresh", _) => response(200, FRESH, "a"),
            (_, 3) => response(200, &[("cache-control", "max-age=0"), ("etag", "\"v1\"")], "a"),
            (_, 4) => response(304, &[("cache-control", "max-age=0"), ("etag", "\"v1\"")], ""),
            _ => response(503, &[], ""),
        }
    });
    let proxy = proxy_with(service.address, "", "retry = false\n");
    get(&proxy, "/fresh", ""); // 1: miss
    get(&proxy, "/fresh", ""); // hit
    ask(proxy.outbound(), "DELETE /fresh HTTP/1.1\r\nHost: up\r\n\r\n"); // 2: bypass
    get(&proxy, "/stale", ""); // 3: miss
    get(&proxy, "/stale", ""); // 4: revalidated
    get(&proxy, "/stale", ""); // 5: stale
    for (result, expected) in
        [("hit", 1.0), ("miss", 2.0), ("revalidated", 1.0), ("stale", 1.0), ("bypass", 1.0)]
    {
        assert_eq!(count(&proxy, result), expected, "{result}");
        let word = format!("\"cache\":\"{result}\"");
        eventually("the access log says it", || proxy.stdout().matches(&word).count() as f64 == expected);
    }
    eventually("and why", || proxy.stdout().contains("\"reason\":\"stale: status 503\""));
    let status = ask(proxy.admin(), "GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n").1;
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    assert_eq!(status["upstreams"][0]["cache"]["hit"], 1);
    assert_eq!(status["cache"]["max_bytes"], 32 << 20);
}

/// A route without a cache has none of its words.
#[test]
fn without_a_cache_nothing_is_counted() {
    let service = Service::numbered(FRESH);
    let proxy = Proxy::start(format!(
        "[telemetry]\naccess_log = \"all\"\n[[upstream]]\nname = \"up\"\nendpoints = [\"{}\"]\n",
        service.address
    ));
    assert_eq!(get(&proxy, "/", "").2, "");
    eventually("it is logged", || proxy.stdout().contains("\"status\":200"));
    assert!(!proxy.stdout().contains("\"cache\""));
    assert_eq!(metric(&proxy, "outrigger_cache_"), -1.0);
    assert!(!ask(proxy.admin(), "GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n").1.contains("\"cache\""));
}
