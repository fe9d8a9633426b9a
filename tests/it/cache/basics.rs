//! Hits, misses, validation, and stale responses in place of failures.

use super::*;

#[test]
fn a_fresh_response_is_sent_again() {
    let service = Service::numbered(&[("cache-control", "max-age=60")]);
    let proxy = proxy(service.address, "");
    let (status, body, cache) = get(&proxy, "/a?x=1", "");
    assert_eq!((status, body.as_str()), (200, "1"));
    assert!(cache.contains("; fwd=uri-miss; stored; ttl="), "{cache}");
    let response = RawClient::connect(proxy.outbound()).ask("GET /a?x=1 HTTP/1.1\r\nHost: up\r\n\r\n");
    assert_eq!((response.status(), response.text().as_str()), (200, "1"));
    assert!(response.field("age").is_some_and(|age| age.parse::<u64>().is_ok()));
    let cache = response.field("cache-status").unwrap();
    assert!(cache.starts_with("outrigger/") && cache.contains("; hit; ttl="), "{cache}");
    assert_eq!(get(&proxy, "/a?x=2", "").1, "2", "the query is part of the key");
    assert_eq!(service.requests(), 2);
}

#[test]
fn a_route_without_a_cache_stores_nothing() {
    let service = Service::numbered(&[("cache-control", "max-age=60")]);
    let proxy = Proxy::start(format!(
        "[[upstream]]\nname = \"up\"\nendpoints = [\"{}\"]\ncache = {{}}\n[[upstream.route]]\nmatch = {{ path = \"/live*\" }}\ncache = false\n",
        service.address
    ));
    assert_eq!(get(&proxy, "/live", "").1, "1");
    let (_, body, cache) = get(&proxy, "/live", "");
    assert_eq!((body.as_str(), cache.as_str()), ("2", ""));
    assert_eq!(get(&proxy, "/a", "").1, "3");
    assert_eq!(get(&proxy, "/a", "").1, "3");
}

#[test]
fn a_stale_response_is_validated() {
    let service = Service::start(|number, request| async move {
        match request.headers().get("if-none-match") {
            Some(tag) if tag == "\"v1\"" => response(304, &[("etag", "\"v1\""), ("x-at", "2")], ""),
            _ => response(
                200,
                &[("etag", "\"v1\""), ("cache-control", "max-age=0"), ("x-at", "1")],
                number.to_string(),
            ),
        }
    });
    let proxy = proxy(service.address, "");
    assert_eq!(get(&proxy, "/", "").1, "1");
    let response = RawClient::connect(proxy.outbound()).ask("GET / HTTP/1.1\r\nHost: up\r\n\r\n");
    assert_eq!((response.status(), response.text().as_str()), (200, "1"));
    assert_eq!(response.field("x-at"), Some("2"), "the 304 updates the fields");
    assert!(response.field("cache-status").unwrap().contains("fwd=stale; fwd-status=304"));
    let (status, body, _) = get(&proxy, "/", "If-None-Match: \"v1\"\r\n");
    assert_eq!((status, body.as_str()), (304, ""));
    assert_eq!(service.requests(), 3);
}

#[test]
fn a_stale_response_stands_in_for_a_failure_of_the_service() {
    for status in [500_u16, 502, 503, 504] {
        let service = Service::start(move |number, _| async move {
            match number {
                1 => response(200, &[("cache-control", "max-age=0")], "good"),
                _ => response(status, &[], "bad"),
            }
        });
        let proxy = proxy_with(service.address, "", "retry = false\n");
        get(&proxy, "/", "");
        let (got, body, cache) = get(&proxy, "/", "");
        assert_eq!((got, body.as_str()), (200, "good"));
        assert!(cache.contains(&format!("fwd=stale; fwd-status={status}; ttl=-")), "{cache}");
        assert!(cache.contains(&format!("detail=status_{status}")), "{cache}");
    }
}

#[test]
fn a_stale_response_stands_in_while_the_service_is_away_and_the_breaker_is_open() {
    let mut service = Service::numbered(&[("cache-control", "max-age=0")]);
    let proxy = proxy_with(
        service.address,
        "",
        "breaker = { consecutive_failures = 3, open_for = { base = \"60s\", max = \"60s\" } }\nfallback = { status = 203 }\n",
    );
    get(&proxy, "/", "");
    service.stop();
    let mut details = Vec::new();
    eventually("the breaker opens", || {
        let (status, body, cache) = get(&proxy, "/", "");
        assert_eq!((status, body.as_str()), (200, "1"), "{cache}");
        assert!(cache.contains("ttl=-"), "{cache}");
        details.push(cache);
        details
            .last()
            .is_some_and(|cache| cache.contains("hit; ttl=-") && cache.contains("detail=breaker_open"))
    });
    assert!(details.iter().any(|cache| cache.contains("detail=connect_refused")), "{details:?}");
    assert_eq!(get(&proxy, "/other", "").0, 203, "nothing is stored: the fallback");
    eventually("the access log says why", || proxy.stdout().contains("\"reason\":\"stale: breaker open\""));
}

#[test]
fn not_found_and_gone_are_answers() {
    for status in [404, 410] {
        let service = Service::start(move |number, _| async move {
            match number {
                1 => response(200, &[("cache-control", "max-age=0")], "good"),
                _ => response(status, &[], "gone"),
            }
        });
        let proxy = proxy(service.address, "");
        get(&proxy, "/", "");
        assert_eq!(get(&proxy, "/", "").0, status);
    }
}
