//! Which failures are tried again, where, and how often.

use std::{
    io::{Read, Write},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use super::{Seen, Service, ask, assert_cause, get, nobody, post, proxy, request, retries};
use crate::support::{Proxy, RawServer};

fn failing() -> Service {
    Service::new(|_, _| 503)
}

fn well() -> Service {
    Service::new(|_, _| 200)
}

/// How many requests a service that always answers `status` gets for one call.
#[track_caller]
fn tries(status: u16, keys: &str, call: &str) -> usize {
    let service = Service::new(move |_, _| status);
    let proxy = proxy(&[service.address()], keys);
    assert_eq!(ask(&proxy, call).status(), status);
    service.calls()
}

/// The answer that is handed on after all has as much time as any other: it does not stand still while nobody takes it.
#[test]
fn an_answer_that_waited_for_another_try_is_whole() {
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
    let answer = get(&proxy);
    assert_eq!((answer.status(), answer.text()), (503, "whole".to_owned()), "{answer:?}");
}

#[test]
fn a_get_is_tried_on_another_endpoint() {
    let (bad, good) = (failing(), well());
    let proxy = proxy(&[bad.address(), good.address()], "");
    for _ in 0..4 {
        assert_eq!(get(&proxy).status(), 200);
    }
    assert_eq!(good.calls(), 4, "every call ends here");
    assert!(bad.calls() >= 1, "some begin there");
    let attempts: Vec<_> = good.seen().iter().map(|seen| seen.number("x-outrigger-attempt")).collect();
    assert!(attempts.contains(&Some(2)) && attempts.iter().all(Option::is_some), "{attempts:?}");
}

#[test]
fn which_methods_are_tried_again() {
    let count = |keys: &str, call: &str| tries(503, keys, call);
    assert_eq!(count("", &request("GET", "")), 3, "the first and `max = 2`");
    assert_eq!(count("", &request("DELETE", "")), 3);
    assert_eq!(count("", &post("", "pay")), 1, "a POST may have been done");
    assert_eq!(
        count("", &post("Idempotency-Key: 1\r\n", "pay")),
        3,
        "the caller's word that it may be repeated"
    );
    assert_eq!(count("retry = { methods = \"all\" }", &post("", "pay")), 3);
    assert_eq!(count("retry = { methods = [\"POST\"] }", &request("GET", "")), 1);
    assert_eq!(count("retry = { max = 0 }", &request("GET", "")), 1, "at most once");
    assert_eq!(count("retry = false", &request("GET", "")), 1);
}

#[test]
fn which_answers_are_tried_again() {
    let get = request("GET", "");
    assert_eq!(tries(500, "", &get), 1, "not among the defaults");
    assert_eq!(tries(500, "retry = { on = [\"default\", \"5xx\"] }", &get), 3);
    assert_eq!(tries(429, "retry = { on = [\"429\"] }", &get), 3);
    assert_eq!(tries(503, "retry = { on = [\"connect-failure\"] }", &get), 1);
    assert_eq!(tries(404, "", &get), 1);
}

/// Nobody was reached: nothing can have been done twice.
#[test]
fn a_refused_connection_is_tried_elsewhere_for_any_method() {
    let good = well();
    let proxy = proxy(&[nobody(), good.address()], "");
    for _ in 0..4 {
        assert_eq!(ask(&proxy, post("", "pay")).status(), 200);
    }
    assert_eq!(good.calls(), 4);
}

#[test]
fn max_0_also_holds_where_nobody_was_reached() {
    let good = well();
    let proxy = proxy(&[nobody(), good.address()], "retry = { max = 0 }");
    let answers: Vec<u16> = (0..4).map(|_| get(&proxy).status()).collect();
    // The first to meet the dead one fails; from then on nobody is sent there.
    assert_eq!(answers.iter().filter(|status| **status == 502).count(), 1, "{answers:?}");
    assert_eq!(good.calls(), 3);
}

#[test]
fn a_retry_after_is_waited_for_where_it_fits() {
    let service =
        Service::new(|_, number| if number == 1 { (503, "retry-after", "1") } else { (200, "x", "y") });
    let patient = proxy(&[service.address()], "");
    let began = std::time::Instant::now();
    assert_eq!(get(&patient).status(), 200);
    assert!(began.elapsed() >= std::time::Duration::from_secs(1), "{:?}", began.elapsed());

    let service = Service::new(|_, _| (503, "retry-after", "100"));
    let short = proxy(&[service.address()], "");
    let answer = get(&short);
    assert_eq!((answer.status(), answer.field("retry-after")), (503, Some("100")), "the caller may wait");
    assert_eq!(service.calls(), 1);
}

/// What the service said goes to the caller as it was, with a word on the tries.
#[test]
fn the_last_failure_is_passed_on() {
    let service = failing();
    let proxy = proxy(&[service.address()], "");
    let answer = get(&proxy);
    assert_eq!((answer.status(), answer.text().as_str()), (503, "503"));
    let said = answer.field("proxy-status").unwrap_or_default();
    assert!(said.contains("received-status=503") && said.contains("3 attempts"), "{said}");
}

#[test]
fn a_kept_body_is_sent_again_and_a_larger_one_is_not() {
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
        assert_eq!(retries(&proxy, "body_gone"), gone, "the reason can be seen");
        assert!(
            seen.iter().all(|Seen { body: got, .. }| got == body.as_bytes()),
            "each try is the whole body"
        );
    }
}

/// N calls that all fail cost N tries, and no more retries than the budget has.
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
        let retries = service.calls() - 30;
        assert!(retries <= most * windows, "{retries} retries of {budget}");
        assert!(most == 0 || retries >= most, "{retries}: what the budget has is spent");
    }
}

/// Tries go on only while there is time.
#[test]
fn no_try_begins_after_the_timeout() {
    let service = Service::new(|_, _| super::Reply::Never);
    let proxy =
        proxy(&[service.address()], "timeout = \"600ms\"\nattempt_timeout = \"250ms\"\nretry = { max = 20 }");
    assert_cause(&get(&proxy), 504, "");
    let calls = service.calls();
    assert!((2..=3).contains(&calls), "{calls} tries of 250 ms in 600 ms");
    crate::support::eventually("all tries to be cancelled", || service.left() == calls);
}

/// A service on one of the two addresses of `localhost`, whose pooled connection has gone stale: whichever address the
/// request is sent to in its place, it is the whole request, and with `retry = false` the service gets it once.
#[test]
fn a_request_is_whole_at_whichever_address_of_localhost_it_arrives() {
    // Answers the first request of a connection and closes when the second comes.
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
            let answer = ask(&proxy, request(method, &format!("x-mark: {number}\r\nConnection: close\r\n")));
            assert_eq!(answer.status(), 200, "{method} {number}: {answer:?}");
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

/// What the service answered says more than that its other address may not be called.
#[test]
fn an_address_that_is_denied_takes_no_answer_away() {
    let service = failing();
    let port = service.address().port();
    let proxy = Proxy::start(format!("[inbound]\nlisten = \"[::1]:{port}\"\n[defaults]\nbreaker = false\n"));
    for _ in 0..20 {
        let before = service.calls();
        let answer =
            ask(&proxy, format!("GET http://localhost:{port}/ HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n"));
        if service.calls() > before {
            assert_eq!(answer.status(), 503, "{answer:?}");
        } else {
            assert_cause(&answer, 502, "denied_network");
        }
    }
    assert!(service.calls() > 0);
}
