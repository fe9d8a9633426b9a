//! Policies around a request: hedges, injected faults, fallbacks, and observed policies.

use std::time::Duration;

use super::{
    ReceivedRequest, Reply, Service, ask, assert_cause, get, post, proxy, refused, refusing_address, request,
    retries, upstream,
};
use crate::support::{Proxy, RawClient, Upstream, eventually, text};

#[test]
fn a_hedge_overtakes_a_slow_response() {
    let (slow, quick) = (Service::new(|_, _| Reply::Never), Service::new(|_, _| 200));
    let proxy = proxy(
        &[slow.address(), quick.address()],
        "hedge = { after = \"50ms\" }\nbreaker = { consecutive_failures = 1 }\noutlier = { consecutive_failures = 1 }",
    );
    for _ in 0..6 {
        assert_eq!(get(&proxy).status(), 200);
    }
    assert_eq!(quick.request_count(), 6);
    let slow_calls = slow.request_count();
    assert!(slow_calls >= 2, "the slower attempt counts neither for breaker nor for ejection");
    eventually("every loser to be cancelled", || slow.cancelled_count() == slow_calls);
}

/// The response to a failed hedge is not forwarded while the other attempt may still succeed, but the failure counts.
#[test]
fn failed_hedges_count_for_the_breaker() {
    let slow = Service::new(|_, _| Reply::Never);
    let bad = Service::new(|seen, _| if seen.number("x-outrigger-attempt") == Some(2) { 500 } else { 200 });
    let proxy = proxy(
        &[slow.address(), bad.address()],
        "hedge = { after = \"50ms\" }\ntimeout = \"400ms\"\nattempt_timeout = \"0s\"\nretry = { max = 1 }\n\
         breaker = { consecutive_failures = 2 }\noutlier = false",
    );
    // Either endpoint may be first; if it is `slow`, its hedge goes to `bad`. Two failures in one request open the
    // breaker.
    eventually("a request that both endpoints fail", || match get(&proxy) {
        response if response.status() == 200 => false,
        response => {
            assert_cause(&response, 504, "timeout");
            true
        }
    });
    assert_cause(&get(&proxy), 503, "breaker_open");
}

#[test]
fn only_idempotent_requests_are_hedged() {
    let (slow, quick) = (Service::new(|_, _| Reply::Never), Service::new(|_, _| 200));
    let proxy = proxy(
        &[slow.address(), quick.address()],
        "hedge = { after = \"10ms\" }\ntimeout = \"300ms\"\nretry = { methods = \"all\", on = [\"503\"] }",
    );
    // `all` allows to retry a failed request, not to run it twice at once.
    let responses: Vec<_> = (0..2).map(|_| ask(&proxy, post("", "pay")).status()).collect();
    assert_eq!((slow.request_count(), quick.request_count()), (1, 1), "{responses:?}");
}

#[test]
fn faults_are_injected_before_the_upstream() {
    let service = Service::new(|_, _| 200);
    let refused = proxy(&[service.address()], "fault = { abort = 418, abort_ratio = 1.0 }");
    let response = get(&refused);
    assert_cause(&response, 418, "fault_injected");
    assert_eq!(service.request_count(), 0);

    let delayed = proxy(&[service.address()], "fault = { delay = \"300ms\", delay_ratio = 1.0 }");
    let began = std::time::Instant::now();
    assert_eq!(get(&delayed).status(), 200);
    assert!(began.elapsed() >= std::time::Duration::from_millis(300));
}

#[test]
fn a_fallback_response_replaces_a_failure() {
    let keys = "fallback = { status = 200, body = \"[]\", content_type = \"application/json\" }";
    let failing = Service::new(|seen, _| if seen.path == "/missing" { 404 } else { 503 });
    for endpoint in [refusing_address(), failing.address()] {
        let proxy = proxy(&[endpoint], keys);
        let response = get(&proxy);
        assert_eq!((response.status(), response.text().as_str()), (200, "[]"));
        assert_eq!(response.field("content-type"), Some("application/json"));
        let said = response.field("proxy-status").unwrap_or_default();
        assert!(said.contains("fallback"), "{said}");
    }
    // A 404 is a response, not a failure.
    let proxy = proxy(&[failing.address()], keys);
    assert_eq!(ask(&proxy, "GET /missing HTTP/1.1\r\nHost: up\r\n\r\n").status(), 404);
}

#[test]
fn a_fallback_upstream_serves_instead() {
    let standby = Service::new(|_, _| 200);
    let config = upstream("up", &[refusing_address()], "fallback = { upstream = \"dr\" }")
        + &upstream("dr", &[standby.address()], "");
    let proxy = Proxy::start(config);
    assert_eq!(get(&proxy).status(), 200);
    assert_eq!(ask(&proxy, post("", "pay")).status(), 200);
    let seen = standby.seen();
    assert_eq!((seen.len(), &seen[1].body[..]), (2, &b"pay"[..]), "the body was not touched before");
}

/// Each upstream is reached with its own protocol, whatever the first one had.
#[test]
fn a_fallback_upstream_uses_its_own_protocol() {
    for (first, second) in [("http1", "h2"), ("h2", "http1")] {
        let response = |_: &ReceivedRequest, _: usize| 200;
        let standby = if second == "h2" { Service::h2(response) } else { Service::new(response) };
        let config = upstream(
            "up",
            &[refusing_address()],
            &format!("protocol = \"{first}\"\nfallback = {{ upstream = \"dr\" }}"),
        ) + &upstream("dr", &[standby.address()], &format!("protocol = \"{second}\""));
        let proxy = Proxy::start(config);
        assert_eq!(ask(&proxy, request("GET", "x-mark: 1\r\n")).status(), 200, "{first} to {second}");
        assert_eq!(ask(&proxy, post("", "pay")).status(), 200, "{first} to {second}");
        let chunked =
            "POST / HTTP/1.1\r\nHost: up\r\nTransfer-Encoding: chunked\r\n\r\n3\r\npay\r\n0\r\n\r\n";
        assert_eq!(ask(&proxy, chunked).status(), 200, "{first} to {second}");
        let seen = standby.seen();
        assert_eq!(seen[0].header("x-mark"), Some("1"));
        assert!(seen[1..].iter().all(|seen| seen.body[..] == b"pay"[..]), "{seen:?}");
        if second == "http1" {
            assert_eq!(seen[0].header("host"), Some("up"));
        }
    }
}

/// Every policy decides, none rejects.
#[test]
fn observed_policies_reject_nothing() {
    let service = Service::new(|_, number| if number <= 6 { 503 } else { 200 });
    let proxy = Proxy::start(
        "[runtime]\nobserve = [\"rate_limit\", \"limits\", \"breaker\", \"timeout\", \"retry\", \"fault\"]\n"
            .to_owned()
            + &upstream(
                "up",
                &[service.address()],
                "rate_limit = { rate = 1, burst = 1 }\nlimits = { max_requests = 1, max_pending = 0 }\n\
                 breaker = { consecutive_failures = 2 }\ntimeout = \"1ms\"\n\
                 fault = { abort = 500, abort_ratio = 1.0, delay = \"1h\", delay_ratio = 1.0 }",
            ),
    );
    for number in 1..=20 {
        let response = get(&proxy);
        let expected = if number <= 6 { 503 } else { 200 };
        assert_eq!(
            (response.status(), service.request_count()),
            (expected, number),
            "one request, one attempt: {response:?}"
        );
        assert!(response.field("proxy-status").is_none(), "the service's own answer: {response:?}");
    }
    // The decision is counted all the same.
    assert_eq!((refused(&proxy, "fault_injected"), retries(&proxy, "observed")), (20, 6));
    assert!(refused(&proxy, "rate_limited") > 0 && refused(&proxy, "breaker_open") > 0);
}

/// An observed timeout does not end the request, and is counted.
#[test]
fn an_observed_timeout_ends_nothing() {
    for (keys, reason) in [
        ("timeout = \"20ms\"", "timeout"),
        ("attempt_timeout = \"20ms\"", "attempt_timeout"),
        ("timeout = \"20ms\"\nattempt_timeout = \"10ms\"", "timeout"),
    ] {
        let service = Upstream::http1(|_| async {
            tokio::time::sleep(Duration::from_millis(200)).await;
            text("well")
        });
        let config =
            "[runtime]\nobserve = [\"timeout\"]\n".to_owned() + &upstream("up", &[service.address()], keys);
        let proxy = Proxy::start(config);
        for number in 1..=3 {
            assert_eq!(get(&proxy).status(), 200, "{keys}");
            assert_eq!(refused(&proxy, reason), number, "{keys}");
        }
        let message = format!("`{reason}` would have ended this request");
        eventually("it to be said", || proxy.stderr().contains(&message));
    }
}

#[test]
fn an_observed_limit_queues_no_request() {
    let service =
        Service::new(|seen, _| if seen.header("x-hang").is_some() { Reply::Never } else { Reply::from(200) });
    let keys = "limits = { max_requests = 1, max_pending = 0 }";
    let config =
        "[runtime]\nobserve = [\"limits\"]\n".to_owned() + &upstream("up", &[service.address()], keys);
    let proxy = Proxy::start(config);
    let mut first = RawClient::connect(proxy.outbound());
    first.send(request("GET", "x-hang: 1\r\n"));
    eventually("the first to have the slot", || service.request_count() == 1);
    assert_eq!(get(&proxy).status(), 200);
    assert_eq!(refused(&proxy, "limit_full"), 1);
}
