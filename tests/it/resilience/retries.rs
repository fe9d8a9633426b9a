//! Which failures are retried, where, and how often.

use std::{
    io::{Read, Write},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use super::{
    ReceivedRequest, Service, ask, assert_cause, get, post, proxy, refusing_address, request, retries,
};
use crate::support::{Proxy, RawServer};

fn failing() -> Service {
    Service::new(|_, _| 503)
}

fn well() -> Service {
    Service::new(|_, _| 200)
}

/// How many requests a service that always responds with `status` gets for one client request.
#[track_caller]
fn attempts_for(status: u16, keys: &str, call: &str) -> usize {
    let service = Service::new(move |_, _| status);
    let proxy = proxy(&[service.address()], keys);
    assert_eq!(ask(&proxy, call).status(), status);
    service.request_count()
}

/// A response that is forwarded after a failed retry has the full idle timeout: its timer does not run while it is
/// held back.
#[test]
fn a_response_held_back_for_a_retry_is_complete() {
    let service = RawServer::start(|mut stream| {
        let head = "HTTP/1.1 503 Busy\r\nretry-after: 3\r\ncontent-length: 5\r\n\r\n";
        if stream.read(&mut [0; 4096]).is_ok_and(|count| count > 0)
            && stream.write_all(head.as_bytes()).is_ok()
        {
            thread::sleep(Duration::from_millis(4500));
            let _ = stream.write_all(b"whole");
        }
    });
    let proxy = proxy(
        &[service.address()],
        "idle_timeout = \"2s\"\nretry = { on = [\"503\"] }\n\
         breaker = { consecutive_failures = 1, open_for = { base = \"10m\", max = \"10m\" } }",
    );
    let response = get(&proxy);
    assert_eq!((response.status(), response.text()), (503, "whole".to_owned()), "{response:?}");
}

#[test]
fn a_get_is_retried_on_another_endpoint() {
    let (bad, good) = (failing(), well());
    let proxy = proxy(&[bad.address(), good.address()], "");
    for _ in 0..4 {
        assert_eq!(get(&proxy).status(), 200);
    }
    assert_eq!(good.request_count(), 4, "every request ends here");
    assert!(bad.request_count() >= 1, "some begin there");
    let attempts: Vec<_> = good.seen().iter().map(|seen| seen.number("x-outrigger-attempt")).collect();
    assert!(attempts.contains(&Some(2)) && attempts.iter().all(Option::is_some), "{attempts:?}");
}

#[test]
fn only_idempotent_methods_are_retried() {
    let count = |keys: &str, call: &str| attempts_for(503, keys, call);
    assert_eq!(count("", &request("GET", "")), 3, "the first and `max = 2`");
    assert_eq!(count("", &request("DELETE", "")), 3);
    assert_eq!(count("", &post("", "pay")), 1, "a POST may have been done");
    assert_eq!(
        count("", &post("Idempotency-Key: 1\r\n", "pay")),
        3,
        "the client's Idempotency-Key allows a retry"
    );
    assert_eq!(count("retry = { methods = \"all\" }", &post("", "pay")), 3);
    assert_eq!(count("retry = { methods = [\"POST\"] }", &request("GET", "")), 1);
    assert_eq!(count("retry = { max = 0 }", &request("GET", "")), 1, "at most once");
    assert_eq!(count("retry = false", &request("GET", "")), 1);
}

#[test]
fn only_retryable_statuses_are_retried() {
    let get = request("GET", "");
    assert_eq!(attempts_for(500, "", &get), 1, "not among the defaults");
    assert_eq!(attempts_for(500, "retry = { on = [\"default\", \"5xx\"] }", &get), 3);
    assert_eq!(attempts_for(429, "retry = { on = [\"429\"] }", &get), 3);
    assert_eq!(attempts_for(503, "retry = { on = [\"connect-failure\"] }", &get), 1);
    assert_eq!(attempts_for(404, "", &get), 1);
}

/// No endpoint was reached: the request cannot have been processed twice.
#[test]
fn a_refused_connection_is_retried_elsewhere_for_any_method() {
    let good = well();
    let proxy = proxy(&[refusing_address(), good.address()], "");
    for _ in 0..4 {
        assert_eq!(ask(&proxy, post("", "pay")).status(), 200);
    }
    assert_eq!(good.request_count(), 4);
}

#[test]
fn max_0_also_applies_to_refused_connections() {
    let good = well();
    let proxy = proxy(&[refusing_address(), good.address()], "retry = { max = 0 }");
    let responses: Vec<u16> = (0..4).map(|_| get(&proxy).status()).collect();
    // The first request to the dead endpoint fails; from then on none is sent there.
    assert_eq!(responses.iter().filter(|status| **status == 502).count(), 1, "{responses:?}");
    assert_eq!(good.request_count(), 3);
}

#[test]
fn retry_after_is_honoured_within_the_deadline() {
    let service =
        Service::new(|_, number| if number == 1 { (503, "retry-after", "1") } else { (200, "x", "y") });
    let patient = proxy(&[service.address()], "");
    let began = std::time::Instant::now();
    assert_eq!(get(&patient).status(), 200);
    assert!(began.elapsed() >= std::time::Duration::from_secs(1), "{:?}", began.elapsed());

    let service = Service::new(|_, _| (503, "retry-after", "100"));
    let short = proxy(&[service.address()], "");
    let response = get(&short);
    assert_eq!((response.status(), response.field("retry-after")), (503, Some("100")), "the client may wait");
    assert_eq!(service.request_count(), 1);
}

/// The service's response reaches the client unchanged, with the number of attempts.
#[test]
fn the_last_failing_response_is_forwarded() {
    let service = failing();
    let proxy = proxy(&[service.address()], "");
    let response = get(&proxy);
    assert_eq!((response.status(), response.text().as_str()), (503, "503"));
    let said = response.field("proxy-status").unwrap_or_default();
    assert!(said.contains("received-status=503") && said.contains("3 attempts"), "{said}");
}

#[test]
fn a_buffered_body_is_retried_and_a_larger_one_is_not() {
    let limit = 1000;
    let keys = format!("retry = {{ body_limit = \"{limit}B\", methods = \"all\" }}");
    for (length, expected) in [(limit, 3), (limit + 1, 1)] {
        let service = failing();
        let proxy = proxy(&[service.address()], &keys);
        let body: String =
            (0..length).map(|at| char::from(b'a' + u8::try_from(at % 26).expect("small"))).collect();
        assert_eq!(ask(&proxy, post("", &body)).status(), 503);
        let seen = service.seen();
        assert_eq!(seen.len(), expected, "{length} bytes");
        let gone = u64::from(length > limit);
        assert_eq!(retries(&proxy, "body_not_kept"), gone, "the reason can be seen");
        assert!(
            seen.iter().all(|ReceivedRequest { body: got, .. }| got == body.as_bytes()),
            "each try is the whole body"
        );
    }
}

/// N requests that all fail cost N attempts, and no more retries than the budget has.
#[test]
fn the_budget_bounds_all_retries() {
    let off = "breaker = false\noutlier = false\n";
    for (budget, most) in
        [("ratio = 0.0, min_per_second = 0", 0), ("ratio = 0.0, min_per_second = 1, window = \"5s\"", 5)]
    {
        let service = failing();
        let proxy = proxy(&[service.address()], &format!("{off}retry = {{ budget = {{ {budget} }} }}"));
        let began = std::time::Instant::now();
        for _ in 0..30 {
            assert_eq!(get(&proxy).status(), 503);
        }
        let windows = 1 + usize::try_from(began.elapsed().as_secs() / 5).expect("short");
        let retries = service.request_count() - 30;
        assert!(retries <= most * windows, "{retries} retries of {budget}");
        assert!(most == 0 || retries >= most, "{retries}: what the budget has is spent");
    }
}

/// Attempts start only while there is time.
#[test]
fn no_attempt_starts_after_the_timeout() {
    let service = Service::new(|_, _| super::Reply::Never);
    let proxy =
        proxy(&[service.address()], "timeout = \"600ms\"\nattempt_timeout = \"250ms\"\nretry = { max = 20 }");
    assert_cause(&get(&proxy), 504, "");
    let calls = service.request_count();
    assert!((2..=3).contains(&calls), "{calls} attempts of 250 ms in 600 ms");
    crate::support::eventually("all attempts to be cancelled", || service.cancelled_count() == calls);
}

/// A service on one of the two addresses of `localhost`, whose pooled connection has gone stale: at whichever address
/// the request is sent again, it is complete, and with `retry = false` the service gets it once.
#[test]
fn a_resent_request_is_complete_at_both_addresses_of_localhost() {
    // Responds to the first request of a connection and closes when the second arrives.
    let heads = Arc::<Mutex<Vec<String>>>::default();
    let log = heads.clone();
    let server = RawServer::start(move |mut stream| {
        let mut head = [0; 4096];
        if let Ok(count @ 1..) = stream.read(&mut head) {
            log.lock().expect("no panic").push(String::from_utf8_lossy(&head[..count]).into_owned());
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok");
            let _ = stream.read(&mut head[..1]);
        }
    });
    for method in ["GET", "OPTIONS", "DELETE"] {
        let port = server.address().port();
        let config = format!(
            "[[upstream]]\nname = \"up\"\nendpoints = [\"localhost:{port}\"]\nbalance = \"round-robin\"\nretry = false\nbreaker = false\n"
        );
        let proxy = Proxy::start(config);
        for number in 0..40 {
            let before = heads.lock().expect("no panic").len();
            let response =
                ask(&proxy, request(method, &format!("x-mark: {number}\r\nConnection: close\r\n")));
            assert_eq!(response.status(), 200, "{method} {number}: {response:?}");
            let heads = heads.lock().expect("no panic");
            assert_eq!(heads.len(), before + 1, "{method} {number}: {heads:?}");
            let head = heads[before].to_ascii_lowercase();
            assert!(
                head.contains(&format!("x-mark: {number}\r\n")) && head.contains("host: up\r\n"),
                "{head}"
            );
        }
    }
}

/// The address of `localhost` that refuses says less than that its other one is the proxy itself.
#[test]
fn a_refused_address_does_not_hide_that_the_other_one_is_denied() {
    let proxy = Proxy::start("[defaults]\nretry = false\nbreaker = false\n".to_owned());
    let port = proxy.outbound().port();
    for _ in 0..8 {
        let response =
            ask(&proxy, format!("GET http://localhost:{port}/ HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n"));
        assert_cause(&response, 502, "denied_network");
    }
}

/// The service's response says more than that its other address is denied.
#[test]
fn a_denied_second_address_does_not_hide_the_services_response() {
    let service = failing();
    let port = service.address().port();
    let proxy = Proxy::start(format!("[inbound]\nlisten = \"[::1]:{port}\"\n[defaults]\nbreaker = false\n"));
    for _ in 0..20 {
        let before = service.request_count();
        let response =
            ask(&proxy, format!("GET http://localhost:{port}/ HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n"));
        if service.request_count() > before {
            assert_eq!(response.status(), 503, "{response:?}");
        } else {
            assert_cause(&response, 502, "denied_network");
        }
    }
    assert!(service.request_count() > 0);
}
