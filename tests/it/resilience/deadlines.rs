//! One deadline for each request: it shrinks with each attempt and hop.

use std::time::{Duration, Instant};

use super::{Reply, Service, ask, assert_cause, get, proxy, request, retries, status, upstream};
use crate::support::{Launch, Proxy, RawClient, Upstream, eventually, text};

#[test]
fn each_attempt_carries_the_remaining_time() {
    let service = Service::new(|_, number| if number < 3 { 503 } else { 200 });
    let proxy = proxy(
        &[service.address()],
        "timeout = \"5s\"\nretry = { backoff = { base = \"50ms\", max = \"1s\" } }",
    );
    assert_eq!(ask(&proxy, request("GET", "x-request-timeout-ms: 3000\r\n")).status(), 200);
    let left: Vec<u64> =
        service.seen().iter().filter_map(|seen| seen.number("x-request-timeout-ms")).collect();
    assert_eq!(left.len(), 3, "{left:?}");
    assert!(left[0] <= 3000 && left.windows(2).all(|pair| pair[1] <= pair[0]), "{left:?}");
    // The route's timeout is sent if the client has no deadline, and a longer client deadline does not extend it.
    for field in ["", "x-request-timeout-ms: 60000\r\n", "x-request-timeout-ms: soon\r\n"] {
        ask(&proxy, request("GET", field));
        let last = service.seen().last().and_then(|seen| seen.number("x-request-timeout-ms"));
        assert!(last.is_some_and(|left| (1..=5000).contains(&left)), "{field:?}: {last:?}");
    }
}

#[test]
fn the_deadline_shrinks_from_hop_to_hop() {
    let service = Service::new(|_, _| 200);
    let inner = Proxy::start(format!("[inbound]\nforward_to = \"{}\"\n", service.address()));
    let outer = proxy(&[inner.inbound()], "timeout = \"4s\"");
    assert_eq!(ask(&outer, request("GET", "x-request-timeout-ms: 2000\r\n")).status(), 200);
    let seen = service.seen();
    assert!(
        seen[0].number("x-request-timeout-ms").is_some_and(|left| (1..=2000).contains(&left)),
        "{seen:?}"
    );
}

#[test]
fn a_shorter_client_deadline_ends_the_request() {
    let service =
        Service::new(|seen, _| if seen.header("x-hang").is_some() { Reply::Never } else { Reply::from(200) });
    let proxy =
        proxy(&[service.address()], "breaker = { consecutive_failures = 1 }\nattempt_timeout = \"0s\"");
    let began = Instant::now();
    let response = ask(&proxy, request("GET", "x-hang: 1\r\nx-request-timeout-ms: 200\r\n"));
    assert_cause(&response, 504, "deadline");
    assert!((200..5000).contains(&began.elapsed().as_millis()), "{:?}", began.elapsed());
    // This says nothing about the service: its breaker stays closed.
    assert_eq!(get(&proxy).status(), 200);
}

#[test]
fn a_grpc_deadline_is_shortened_and_never_added() {
    let service = Service::h2(|seen, _| match seen.header("x-hang") {
        Some(_) => Reply::Never,
        None => Reply::from((200, "grpc-status", "0")),
    });
    let proxy = proxy(&[service.address()], "protocol = \"h2\"\ntimeout = \"100ms\"");
    let call = |more: &str| super::post(&format!("Content-Type: application/grpc\r\n{more}"), "\0\0\0\0\0");
    ask(&proxy, call(""));
    ask(&proxy, call("grpc-timeout: 2S\r\n"));
    let seen = service.seen();
    assert_eq!(seen[0].header("grpc-timeout"), None);
    assert_eq!(seen[0].header("x-request-timeout-ms"), None);
    let sent = seen[1].header("grpc-timeout").expect("a grpc-timeout").to_owned();
    let (number, unit) = sent.split_at(sent.len() - 1);
    let nanos = match unit {
        "n" => 1,
        "u" => 1_000,
        "m" => 1_000_000,
        _ => 1_000_000_000,
    };
    let left = Duration::from_nanos(number.parse::<u64>().expect("digits") * nanos);
    assert!(left < Duration::from_secs(2) && left > Duration::from_millis(100), "{sent}");
    // `timeout` ends no gRPC request; its own deadline does.
    let began = Instant::now();
    let response = ask(&proxy, call("x-hang: 1\r\ngrpc-timeout: 300m\r\n"));
    assert_eq!(response.field("grpc-status"), Some("4"), "{response:?}");
    assert!(began.elapsed() >= Duration::from_millis(300));
}

/// `auto`: half of the remaining time for the first attempt, so that another one fits.
#[test]
fn a_hanging_attempt_leaves_time_for_another() {
    for attempt in ["", "attempt_timeout = \"200ms\""] {
        let service = Service::new(|_, number| if number == 1 { Reply::Never } else { Reply::from(200) });
        let proxy = proxy(&[service.address()], &format!("timeout = \"3s\"\n{attempt}"));
        assert_eq!(get(&proxy).status(), 200, "{attempt:?}");
        assert_eq!(service.request_count(), 2);
        eventually("the first to be cancelled", || service.cancelled_count() == 1);
    }
}

/// A POST cannot be retried: its attempt gets all of the time.
#[test]
fn a_request_that_cannot_be_retried_gets_all_the_time() {
    let service = Service::new(|_, _| Reply::Never);
    let proxy = proxy(&[service.address()], "timeout = \"400ms\"");
    let began = Instant::now();
    assert_cause(&ask(&proxy, super::post("", "pay")), 504, "timeout");
    assert!(began.elapsed() >= Duration::from_millis(400), "{:?}", began.elapsed());
    assert_eq!(service.request_count(), 1);
}

/// `timeout` starts when the body has been sent: it does not cut off a slow upload.
#[test]
fn the_timeout_starts_after_the_request_body() {
    let service = Service::new(|_, _| 200);
    let proxy = Proxy::start(upstream("up", &[service.address()], "timeout = \"300ms\""));
    let mut client = RawClient::connect(proxy.outbound());
    client.send("POST / HTTP/1.1\r\nHost: up\r\nContent-Length: 10\r\n\r\n");
    let began = Instant::now();
    for _ in 0..10 {
        let next = began.elapsed() + Duration::from_millis(50);
        eventually("the time of a slow upload", || began.elapsed() >= next);
        client.send("x");
    }
    let response = client.response().expect("well-formed").expect("a response");
    assert_eq!(response.status(), 200, "{response:?}");
}

/// A remainder below the field's resolution is not sent: the deadline of the client has passed by then.
#[test]
fn no_attempt_starts_with_less_than_a_millisecond_left() {
    let service = Service::new(|_, _| 200);
    let proxy = proxy(&[service.address()], "");
    assert_cause(&ask(&proxy, request("GET", "x-request-timeout-ms: 1\r\n")), 504, "deadline");
    assert_eq!(service.request_count(), 0);
}

/// Neither a slow DNS server nor an injected delay extends a request past its deadline.
#[test]
fn dns_and_fault_delays_count_towards_the_timeout() {
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").expect("bind");
    let dns = silent.local_addr().expect("an address").to_string();
    let proxy = Launch::new("[defaults]\ntimeout = \"400ms\"\n").env("OUTRIGGER_DNS", &dns).start();
    let began = Instant::now();
    for (fields, cause) in [("x-request-timeout-ms: 200\r\n", "deadline"), ("", "timeout")] {
        let request = format!("GET http://nowhere.test/ HTTP/1.1\r\nHost: nowhere.test\r\n{fields}\r\n");
        assert_cause(&ask(&proxy, request), 504, cause);
    }
    assert!((600..4500).contains(&began.elapsed().as_millis()), "{:?}", began.elapsed());

    let service = Service::new(|_, _| 200);
    let fault = "timeout = \"300ms\"\nfault = { delay = \"10s\", delay_ratio = 1 }";
    let proxy = super::proxy(&[service.address()], fault);
    let began = Instant::now();
    assert_cause(&get(&proxy), 504, "timeout");
    assert!((300..9000).contains(&began.elapsed().as_millis()), "{:?}", began.elapsed());
    assert_eq!(service.request_count(), 0);
}

/// A slow service, and how many requests reached it.
fn slow(delay: Duration) -> Upstream {
    Upstream::http1(move |_| async move {
        tokio::time::sleep(delay).await;
        text("late")
    })
}

/// A client that allows 1 s for a service that takes 600 ms is served: its deadline is not split while the usual
/// latency is unknown.
#[test]
fn a_short_client_deadline_is_not_split() {
    let service = slow(Duration::from_millis(600));
    let proxy = proxy(&[service.address()], "");
    for _ in 0..4 {
        let response = ask(&proxy, request("GET", "x-request-timeout-ms: 1000\r\n"));
        assert_eq!(response.status(), 200, "{response:?}");
    }
}

/// A short client deadline moves neither breaker nor outlier detection, and a client with more time is served.
#[test]
fn a_short_client_deadline_counts_against_no_upstream() {
    let service = slow(Duration::from_millis(400));
    let other = slow(Duration::from_millis(400));
    let keys =
        "breaker = { consecutive_failures = 2, min_requests = 2 }\noutlier = { consecutive_failures = 1 }";
    let proxy = proxy(&[service.address(), other.address()], keys);
    for _ in 0..8 {
        assert_cause(&ask(&proxy, request("GET", "x-request-timeout-ms: 100\r\n")), 504, "deadline");
    }
    let up = status(&proxy)["upstreams"][0].clone();
    assert_eq!(up["breaker"]["state"], "closed", "{up}");
    assert!(
        up["endpoints"].as_array().expect("endpoints").iter().all(|one| one["state"] == "healthy"),
        "{up}"
    );
    assert_eq!(get(&proxy).status(), 200);
}

/// If half of a client's deadline is enough for the usual latency, the other half is reserved for another attempt. The
/// attempt that is cut off counts against no endpoint.
#[test]
fn a_client_deadline_is_split_when_usual_latency_fits_in_half() {
    let service = Service::new(|seen, _| match (seen.path.as_str(), seen.header("x-outrigger-attempt")) {
        ("/hang", Some("1")) => Reply::Never,
        _ => 200.into(),
    });
    let proxy = proxy(&[service.address()], "breaker = { consecutive_failures = 1 }");
    let deadline = "x-request-timeout-ms: 4000\r\n";
    let mut client = RawClient::connect(proxy.outbound());
    let hang = format!("GET /hang HTTP/1.1\r\nHost: up\r\n{deadline}\r\n");
    // Enough requests over enough time that the usual latency is known.
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(1200) || service.request_count() < 150 {
        assert_eq!(client.ask(request("GET", deadline)).status(), 200);
    }
    let began = Instant::now();
    assert_eq!(client.ask(hang).status(), 200);
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(1900) && took < Duration::from_millis(3900), "{took:?}");
    assert_eq!(retries(&proxy, "sent"), 1);
    assert_eq!(status(&proxy)["upstreams"][0]["breaker"]["state"], "closed");
}

/// `max_duration` bounds waits between attempts, too: a wait that would exceed it is not begun.
#[test]
fn max_duration_bounds_back_off_and_retry_after() {
    let asks_for_more = Service::new(|_, _| (503, "retry-after", "4"));
    let plain = Service::new(|_, _| 503);
    let patient =
        "retry = { backoff = { base = \"20s\", max = \"20s\" } }\nmax_duration = \"1s\"\nbreaker = false";
    for service in [&asks_for_more, &plain] {
        let proxy = proxy(&[service.address()], patient);
        for _ in 0..3 {
            let began = Instant::now();
            assert_eq!(get(&proxy).status(), 503);
            assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
        }
    }
}
