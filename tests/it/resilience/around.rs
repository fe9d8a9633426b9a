//! What stands around a call: hedges, rehearsed faults, fallbacks, and policies that only watch.

use std::time::Duration;

use super::{
    Reply, Seen, Service, ask, assert_cause, get, nobody, post, proxy, refused, request, retries, upstream,
};
use crate::support::{Proxy, RawClient, Upstream, eventually, text};

#[test]
fn a_slow_answer_is_overtaken_by_a_second_copy() {
    let (slow, quick) = (Service::new(|_, _| Reply::Never), Service::new(|_, _| 200));
    let proxy = proxy(
        &[slow.address(), quick.address()],
        "hedge = { after = \"50ms\" }\nbreaker = { consecutive_failures = 1 }\noutlier = { consecutive_failures = 1 }",
    );
    for _ in 0..6 {
        assert_eq!(get(&proxy).status(), 200);
    }
    assert_eq!(quick.calls(), 6);
    let slow_calls = slow.calls();
    assert!(slow_calls >= 2, "the loser counts nowhere: neither breaker nor ejection keeps it from calls");
    eventually("every loser to be cancelled", || slow.left() == slow_calls);
}

/// A copy that fails is no answer while the other one may still come, but it counts.
#[test]
fn a_hedge_that_fails_counts() {
    let slow = Service::new(|_, _| Reply::Never);
    let bad = Service::new(|seen, _| if seen.number("x-outrigger-attempt") == Some(2) { 500 } else { 200 });
    let proxy = proxy(
        &[slow.address(), bad.address()],
        "hedge = { after = \"50ms\" }\ntimeout = \"400ms\"\nattempt_timeout = \"0s\"\nretry = { max = 1 }\n\
         breaker = { consecutive_failures = 2 }\noutlier = false",
    );
    // Either begins; when it is `slow`, its copy goes to `bad`. Two failures in one call open the breaker.
    eventually("a call that both fail", || match get(&proxy) {
        answer if answer.status() == 200 => false,
        answer => {
            assert_cause(&answer, 504, "timeout");
            true
        }
    });
    assert_cause(&get(&proxy), 503, "breaker_open");
}

#[test]
fn only_what_may_be_done_twice_is_hedged() {
    let (slow, quick) = (Service::new(|_, _| Reply::Never), Service::new(|_, _| 200));
    let proxy = proxy(
        &[slow.address(), quick.address()],
        "hedge = { after = \"10ms\" }\ntimeout = \"300ms\"\nretry = { methods = \"all\", on = [\"503\"] }",
    );
    // `all` allows to repeat what failed, not to have it done twice at once.
    let answers: Vec<_> = (0..2).map(|_| ask(&proxy, post("", "pay")).status()).collect();
    assert_eq!((slow.calls(), quick.calls()), (1, 1), "{answers:?}");
}

#[test]
fn faults_are_injected_before_the_upstream() {
    let service = Service::new(|_, _| 200);
    let refused = proxy(&[service.address()], "fault = { abort = 418, abort_ratio = 1.0 }");
    let answer = get(&refused);
    assert_cause(&answer, 418, "fault_injected");
    assert_eq!(service.calls(), 0);

    let delayed = proxy(&[service.address()], "fault = { delay = \"300ms\", delay_ratio = 1.0 }");
    let began = std::time::Instant::now();
    assert_eq!(get(&delayed).status(), 200);
    assert!(began.elapsed() >= std::time::Duration::from_millis(300));
}

#[test]
fn a_fallback_is_given_in_place_of_a_failure() {
    let keys = "fallback = { status = 200, body = \"[]\", content_type = \"application/json\" }";
    let failing = Service::new(|seen, _| if seen.path == "/missing" { 404 } else { 503 });
    for endpoint in [nobody(), failing.address()] {
        let proxy = proxy(&[endpoint], keys);
        let answer = get(&proxy);
        assert_eq!((answer.status(), answer.text().as_str()), (200, "[]"));
        assert_eq!(answer.field("content-type"), Some("application/json"));
        let said = answer.field("proxy-status").unwrap_or_default();
        assert!(said.contains("fallback"), "{said}");
    }
    // An answer is an answer.
    let proxy = proxy(&[failing.address()], keys);
    assert_eq!(ask(&proxy, "GET /missing HTTP/1.1\r\nHost: up\r\n\r\n").status(), 404);
}

#[test]
fn another_upstream_steps_in() {
    let standby = Service::new(|_, _| 200);
    let config = upstream("up", &[nobody()], "fallback = { upstream = \"dr\" }")
        + &upstream("dr", &[standby.address()], "");
    let proxy = Proxy::start(config);
    assert_eq!(get(&proxy).status(), 200);
    assert_eq!(ask(&proxy, post("", "pay")).status(), 200);
    let seen = standby.seen();
    assert_eq!((seen.len(), &seen[1].body[..]), (2, &b"pay"[..]), "the body was not touched before");
}

/// Each upstream is called by its own protocol, whichever the first one had.
#[test]
fn another_upstream_is_called_by_its_own_protocol() {
    for (first, second) in [("http1", "h2"), ("h2", "http1")] {
        let answer = |_: &Seen, _: usize| 200;
        let standby = if second == "h2" { Service::h2(answer) } else { Service::new(answer) };
        let config = upstream(
            "up",
            &[nobody()],
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

/// Everything is decided, nothing is refused.
#[test]
fn observed_policies_refuse_nothing() {
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
        let answer = get(&proxy);
        let expected = if number <= 6 { 503 } else { 200 };
        assert_eq!((answer.status(), service.calls()), (expected, number), "one call, one try: {answer:?}");
        assert!(answer.field("proxy-status").is_none(), "the service's own answer: {answer:?}");
    }
    // But it is counted.
    assert_eq!((refused(&proxy, "fault_injected"), retries(&proxy, "observed")), (20, 6));
    assert!(refused(&proxy, "rate_limited") > 0 && refused(&proxy, "breaker_open") > 0);
}

/// What a timeout would have ended goes on, and is counted.
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
        let told = format!("`{reason}` would have ended this request");
        eventually("it to be said", || proxy.stderr().contains(&told));
    }
}

#[test]
fn an_observed_limit_holds_nobody_back() {
    let service =
        Service::new(|seen, _| if seen.header("x-hang").is_some() { Reply::Never } else { Reply::from(200) });
    let keys = "limits = { max_requests = 1, max_pending = 0 }";
    let config =
        "[runtime]\nobserve = [\"limits\"]\n".to_owned() + &upstream("up", &[service.address()], keys);
    let proxy = Proxy::start(config);
    let mut first = RawClient::connect(proxy.outbound());
    first.send(request("GET", "x-hang: 1\r\n"));
    eventually("the first to have the place", || service.calls() == 1);
    assert_eq!(get(&proxy).status(), 200);
    assert_eq!(refused(&proxy, "limit_full"), 1);
}
