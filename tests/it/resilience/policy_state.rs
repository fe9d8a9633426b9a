//! Policies that protect a failing or full upstream: breaker, ejection, limits, rate limits.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use socket2::{Domain, Socket, Type};

use super::{
    Reply, Service, ask, assert_cause, get, proxy, refusing_address, request, serve_at, status, upstream,
};
use crate::support::{Proxy, RawClient, eventually};

/// A service that can be switched between working and failing.
fn switchable() -> (Service, Arc<AtomicBool>) {
    let well = Arc::new(AtomicBool::new(false));
    let state = well.clone();
    (Service::new(move |_, _| if state.load(Ordering::Relaxed) { 200 } else { 500 }), well)
}

#[test]
fn the_breaker_opens_probes_and_closes() {
    let (service, well) = switchable();
    let proxy = proxy(
        &[service.address()],
        "breaker = { consecutive_failures = 4, open_for = { base = \"300ms\", max = \"600ms\" }, trial_requests = 1 }",
    );
    for _ in 0..4 {
        assert_eq!(get(&proxy).status(), 500);
    }
    let refused = get(&proxy);
    assert_cause(&refused, 503, "breaker_open");
    assert!(refused.field("retry-after").is_some(), "{refused:?}");
    assert_eq!(service.request_count(), 4, "open: no request passes");
    // A failed trial opens it again, so a failing service gets one request each time.
    let mut fives = 0;
    eventually("two failed trials", || {
        fives += u32::from(get(&proxy).status() == 500);
        fives == 2
    });
    assert_eq!(service.request_count(), 6);
    well.store(true, Ordering::Relaxed);
    eventually("the breaker to close", || get(&proxy).status() == 200);
    for _ in 0..10 {
        assert_eq!(get(&proxy).status(), 200, "closed");
    }
}

/// A breaker that opened because nothing listened closes as soon as something does, before `open_for` has elapsed.
#[test]
fn an_open_breaker_notices_that_the_port_accepts_again() {
    let place = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = place.local_addr().expect("bound");
    drop(place);
    let proxy = proxy(
        &[address],
        "retry = false\nbreaker = { consecutive_failures = 2, open_for = { base = \"10m\", max = \"10m\" }, trial_requests = 1 }",
    );
    assert_cause(&get(&proxy), 502, "connect_refused");
    assert_cause(&get(&proxy), 502, "connect_refused");
    assert_cause(&get(&proxy), 503, "breaker_open");
    let _back = crate::support::RawServer::start_at(address, |mut stream| {
        use std::io::{Read, Write};
        let mut seen = [0; 4096];
        if stream.read(&mut seen).is_ok_and(|count| count > 0) {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok");
        }
    });
    eventually("the breaker to let a trial through", || get(&proxy).status() == 200);
}

/// The same for a breaker that opened because connections were not accepted, whichever timer ended the wait.
#[test]
fn an_open_breaker_notices_the_end_of_connect_timeouts() {
    let place = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    place.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("a port");
    place.listen(0).expect("a listener");
    let address = place.local_addr().ok().and_then(|address| address.as_socket()).expect("its address");
    // The kernel accepts until the backlog is full, then no longer.
    let soon = Duration::from_millis(100);
    let mut filling = Vec::new();
    while let Ok(one) = std::net::TcpStream::connect_timeout(&address, soon) {
        filling.push(one);
    }
    let proxy = proxy(
        &[address],
        "retry = false\nconnect_timeout = \"60s\"\ntimeout = \"20s\"\nattempt_timeout = \"300ms\"\n\
         breaker = { consecutive_failures = 2, open_for = { base = \"10m\", max = \"10m\" }, trial_requests = 1 }",
    );
    for _ in 0..2 {
        let failed = get(&proxy);
        assert_cause(&failed, 504, "connect_timeout");
        assert!(String::from_utf8_lossy(&failed.body).contains("no connection to"), "{failed:?}");
    }
    assert_cause(&get(&proxy), 503, "breaker_open");
    let place = std::net::TcpListener::from(place);
    let _back = crate::support::RawServer::start_on(place, |mut stream| {
        use std::io::{Read, Write};
        let mut seen = [0; 4096];
        if stream.read(&mut seen).is_ok_and(|count| count > 0) {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok");
        }
    });
    drop(filling);
    eventually("the breaker to let a trial through", || get(&proxy).status() == 200);
}

/// Until then a request waits as long as the back-off between refused attempts; without retries it does not wait.
#[test]
fn a_request_waits_briefly_for_an_unreachable_upstream() {
    let most = Duration::from_millis(250);
    let keys = "breaker = { consecutive_failures = 1, open_for = { base = \"10m\", max = \"10m\" } }";
    let waiting = proxy(
        &[refusing_address()],
        &format!("retry = {{ backoff = {{ base = \"10s\", max = \"10s\" }} }}\ntimeout = \"5s\"\n{keys}"),
    );
    // Its first attempt opens the breaker.
    let _ = ask(&waiting, request("GET", "x-request-timeout-ms: 100\r\n"));
    let began = Instant::now();
    assert_cause(&get(&waiting), 503, "breaker_open");
    assert!(began.elapsed() >= most, "{:?}", began.elapsed());
    let failing = Service::new(|_, _| 500);
    let proxy = proxy(&[failing.address()], keys);
    assert_eq!(get(&proxy).status(), 500);
    let quickest = (0..20).map(|_| {
        let began = Instant::now();
        assert_cause(&get(&proxy), 503, "breaker_open");
        began.elapsed()
    });
    assert!(quickest.min() < Some(most), "one that is there and fails is not waited for");
}

/// The state of an upstream's breaker survives a reload.
#[test]
fn a_reload_keeps_the_breaker_state() {
    let (service, _) = switchable();
    let standby = Service::new(|_, _| 200);
    let config = |timeout: &str, other: &str| {
        let breaker = "breaker = { consecutive_failures = 3, open_for = { base = \"10m\", max = \"10m\" } }";
        upstream("up", &[service.address()], &format!("timeout = \"{timeout}\"\n{breaker}"))
            + &upstream(other, &[standby.address()], "")
    };
    let proxy = Proxy::start(config("5s", "before"));
    // An incomplete failure count is kept, too.
    for _ in 0..2 {
        assert_eq!(get(&proxy).status(), 500);
    }
    for (timeout, other) in [("6s", "between"), ("7s", "after")] {
        proxy.reconfigure(&config(timeout, other));
        proxy.signal("HUP");
        let call = format!("GET / HTTP/1.1\r\nHost: {other}\r\n\r\n");
        eventually("the change to take effect", || ask(&proxy, &call).status() == 200);
        let _third = get(&proxy);
        assert_cause(&get(&proxy), 503, "breaker_open");
        assert_eq!(service.request_count(), 3);
    }
}

/// A client error is no failure of the upstream.
#[test]
fn the_breaker_does_not_count_client_errors() {
    let service = Service::new(|_, _| 404);
    let proxy = proxy(&[service.address()], "breaker = { consecutive_failures = 2 }");
    for _ in 0..10 {
        assert_eq!(get(&proxy).status(), 404);
    }
}

/// One trial at a time; a cancelled one frees its slot.
#[test]
fn a_cancelled_trial_request_frees_its_slot() {
    let service = Service::new(|seen, _| match seen.header("x-want") {
        Some("fail") => Reply::from(500),
        Some("hang") => Reply::Never,
        _ => Reply::from(200),
    });
    let proxy = proxy(
        &[service.address()],
        "retry = false\ntimeout = \"60s\"\nbreaker = { consecutive_failures = 2, open_for = { base = \"100ms\", max = \"100ms\" }, trial_requests = 1 }",
    );
    for _ in 0..2 {
        assert_eq!(ask(&proxy, request("GET", "x-want: fail\r\n")).status(), 500);
    }
    let mut hanging = None;
    eventually("a trial that hangs", || {
        let mut client = RawClient::connect(proxy.outbound()).with_read_timeout(Duration::from_millis(200));
        client.send(request("GET", "x-want: hang\r\n"));
        let silent = matches!(client.response(), Ok(None));
        hanging = Some(client);
        silent
    });
    assert_cause(&get(&proxy), 503, "breaker_open");
    // Long before `timeout` would end the trial.
    let left = Instant::now();
    drop(hanging);
    eventually("its slot", || get(&proxy).status() == 200);
    assert!(left.elapsed() < Duration::from_secs(10), "{:?}", left.elapsed());
}

#[test]
fn a_failing_endpoint_is_ejected() {
    let (bad, good, other) = (Service::new(|_, _| 503), Service::new(|_, _| 200), Service::new(|_, _| 200));
    let endpoints = [bad.address(), good.address(), other.address()];
    let proxy = proxy(
        &endpoints,
        "outlier = { consecutive_failures = 5, eject_for = { base = \"60s\", max = \"60s\" } }",
    );
    for _ in 0..60 {
        assert_eq!(get(&proxy).status(), 200);
    }
    assert_eq!(bad.request_count(), 5, "five failures, then out");
    assert_eq!(good.request_count() + other.request_count(), 60);
}

/// If all endpoints fail, at most `max_ejected` are out: the rest still get requests.
#[test]
fn ejection_stops_at_max_ejected() {
    let services: Vec<Service> = (0..3).map(|_| Service::new(|_, _| 500)).collect();
    let endpoints: Vec<_> = services.iter().map(Service::address).collect();
    let proxy = proxy(
        &endpoints,
        "breaker = false\noutlier = { consecutive_failures = 2, eject_for = { base = \"60s\", max = \"60s\" } }",
    );
    for _ in 0..30 {
        assert_eq!(get(&proxy).status(), 500, "answered by an endpoint, not by `no_endpoint`");
    }
    let mut counts: Vec<_> = services.iter().map(Service::request_count).collect();
    counts.sort_unstable();
    assert!(counts[0] == 2 && counts[1] > 5, "one of three is out: {counts:?}");
}

/// One slot, a queue of one, and a third request that is rejected. A cancelled request frees its slot.
#[test]
fn requests_above_the_limit_queue_and_then_are_rejected() {
    let service =
        Service::new(|seen, _| if seen.header("x-hang").is_some() { Reply::Never } else { Reply::from(200) });
    let proxy = proxy(
        &[service.address()],
        "limits = { max_requests = 1, max_pending = 1, pending_timeout = \"15s\" }\nretry = false",
    );
    let mut first = RawClient::connect(proxy.outbound());
    first.send(request("GET", "x-hang: 1\r\n"));
    eventually("the first to have the slot", || service.request_count() == 1);
    thread::scope(|scope| {
        let second = scope.spawn(|| get(&proxy));
        // The second may not be queued yet when the next arrives; a request that arrives while one is queued is
        // rejected.
        let mut queued = Vec::new();
        eventually("a third to be refused", || {
            let mut third =
                RawClient::connect(proxy.outbound()).with_read_timeout(Duration::from_millis(100));
            third.send(request("GET", "x-hang: 1\r\n"));
            let response = third.response();
            let Ok(Some(response)) = response else {
                queued.push(third);
                return false;
            };
            assert_cause(&response, 503, "queue_full");
            assert!(response.field("retry-after").is_some(), "{response:?}");
            true
        });
        assert_eq!(service.request_count(), 1);
        drop(queued);
        drop(first);
        let response = second.join().expect("no panic");
        // Rejected only if another request was queued before it.
        assert!(matches!(response.status(), 200 | 503), "{response:?}");
    });
    eventually("the slot to be free", || get(&proxy).status() == 200);
}

#[test]
fn a_request_that_queues_too_long_gets_a_queue_timeout() {
    let service = Service::new(|_, _| Reply::Never);
    let proxy = proxy(&[service.address()], "limits = { max_requests = 1, pending_timeout = \"50ms\" }");
    let mut first = RawClient::connect(proxy.outbound());
    first.send(request("GET", ""));
    eventually("the first to have the slot", || service.request_count() == 1);
    assert_cause(&get(&proxy), 503, "limit_full");
    // No request is queued past its deadline.
    let response = ask(&proxy, request("GET", "x-request-timeout-ms: 5\r\n"));
    assert_cause(&response, 504, "deadline");
    assert_eq!(service.request_count(), 1);
}

#[test]
fn max_connections_is_enforced() {
    let service = Service::new(|_, _| Reply::Never);
    let proxy = proxy(&[service.address()], "limits = { max_connections = 1, pending_timeout = \"50ms\" }");
    let mut first = RawClient::connect(proxy.outbound());
    first.send(request("GET", ""));
    eventually("the first to have the connection", || service.request_count() == 1);
    assert_cause(&get(&proxy), 503, "limit_full");
    assert_eq!(service.request_count(), 1);
}

/// At the limit an idle connection is closed for a new one: at another endpoint, and on another worker.
#[test]
fn an_idle_connection_is_closed_for_a_waiting_request() {
    let services: Vec<Service> = (0..2).map(|_| Service::new(|_, _| 200)).collect();
    let endpoints: Vec<_> = services.iter().map(Service::address).collect();
    for workers in [1, 3] {
        let keys = "balance = \"round-robin\"\nretry = false\npool_idle_timeout = \"10m\"\nlimits = { max_connections = 1 }";
        let proxy =
            Proxy::start(format!("[runtime]\nworkers = {workers}\n") + &upstream("up", &endpoints, keys));
        // Each request uses its own connection, so that every one of several workers gets requests.
        let mut clients: Vec<_> = (0..6).map(|_| RawClient::connect(proxy.outbound())).collect();
        for round in 0..4 {
            for (number, client) in clients.iter_mut().enumerate() {
                let response = client.ask(request("GET", ""));
                assert_eq!(response.status(), 200, "{workers} workers, {round}/{number}: {response:?}");
            }
        }
    }
}

#[test]
fn a_rate_limit_is_enforced() {
    let service = Service::new(|_, _| 200);
    let limited = proxy(&[service.address()], "rate_limit = { rate = 1, burst = 3 }");
    let began = Instant::now();
    let mut served = 0;
    // The burst and one each second, however slow the machine.
    let refused = loop {
        let response = get(&limited);
        if response.status() != 200 {
            break response;
        }
        served += 1;
        assert!(served <= 4 + began.elapsed().as_secs(), "{served} in {:?}", began.elapsed());
    };
    assert!(served >= 3, "{served} of the burst");
    assert_cause(&refused, 429, "rate_limited");
    assert_eq!(refused.field("retry-after"), Some("1"));
    assert_eq!(service.request_count() as u64, served);

    let limited =
        proxy(&[service.address()], "rate_limit = { rate = 1, burst = 1, per = \"header:x-tenant\" }");
    let call = |tenant: &str| ask(&limited, request("GET", &format!("x-tenant: {tenant}\r\n"))).status();
    eventually("a tenant over its limit", || call("a") == 429);
    assert_eq!(call("b"), 200, "another one is not");
}

/// Ejection is a preference: if all other endpoints failed this request, an ejected one may still get it.
#[test]
fn a_retry_prefers_an_ejected_endpoint_to_one_that_just_refused() {
    let well_again = Service::new(|_, number| if number == 1 { 503 } else { 200 });
    let goes = Service::new(|_, _| 200);
    let proxy = proxy(
        &[well_again.address(), goes.address()],
        "outlier = { consecutive_failures = 1, eject_for = { base = \"10m\", max = \"10m\" } }",
    );
    eventually("the first to be called, and ejected for its answer", || {
        assert_eq!(get(&proxy).status(), 200);
        well_again.request_count() == 1
    });
    assert_eq!(get(&proxy).status(), 200);
    assert_eq!(well_again.request_count(), 1, "it is out");
    drop(goes);
    assert_eq!(get(&proxy).status(), 200);
    assert_eq!(well_again.request_count(), 2);
}

/// A restarted endpoint is restored as soon as it serves; one that sent errors stays ejected for its time.
#[test]
fn an_absent_endpoint_is_restored_when_it_serves() {
    let place = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = place.local_addr().expect("bound");
    drop(place);
    let (bad, well) = (Service::new(|_, _| 500), Service::new(|_, _| 200));
    let proxy = proxy(
        &[address, bad.address(), well.address()],
        "breaker = false\n\
         outlier = { consecutive_failures = 2, eject_for = { base = \"10m\", max = \"10m\" } }",
    );
    eventually("one to be absent and one to be ejected", || {
        let _ = get(&proxy);
        let said = proxy.stderr();
        said.contains("accepts no connections") && said.contains("endpoint ejected")
    });
    let before = bad.request_count();
    for _ in 0..10 {
        assert_eq!(get(&proxy).status(), 200, "nothing listens at {address} yet");
    }
    let status = status(&proxy);
    let states: Vec<_> = status["upstreams"][0]["endpoints"]
        .as_array()
        .expect("endpoints")
        .iter()
        .map(|endpoint| endpoint["state"].as_str().expect("a state"))
        .collect();
    assert_eq!(states, ["absent", "ejected", "healthy"], "{status}");
    let _back = serve_at(address, "200 OK", "back");
    eventually("it to be called again", || get(&proxy).text() == "back");
    for _ in 0..10 {
        assert_eq!(get(&proxy).status(), 200);
    }
    assert_eq!(
        bad.request_count(),
        before,
        "an ejected endpoint stays ejected although it accepts connections"
    );
}

/// A failing endpoint is still `healthy` if nothing ejects it, so the status also shows how requests fare.
#[test]
fn the_status_shows_success_rate_and_last_error_of_each_endpoint() {
    let (good, bad) = (Service::new(|_, _| 200), Service::new(|_, _| 500));
    let down = refusing_address();
    let keys = "balance = \"round-robin\"\nretry = false\nbreaker = false\noutlier = false";
    let proxy = Proxy::start(upstream("up", &[good.address(), bad.address(), down], keys));
    for _ in 0..6 {
        get(&proxy);
    }
    let endpoints = status(&proxy)["upstreams"][0]["endpoints"].clone();
    let of = |address: std::net::SocketAddr| {
        let address = address.to_string();
        let all = endpoints.as_array().expect("endpoints");
        all.iter().find(|one| one["address"] == address).expect("the endpoint").clone()
    };
    for (address, state, success, last_error) in [
        (good.address(), "healthy", 1.0, None),
        (bad.address(), "healthy", 0.0, Some("500")),
        (down, "absent", 0.0, Some("connect_refused")),
    ] {
        let endpoint = of(address);
        assert_eq!(endpoint["state"], state, "{endpoint}");
        assert_eq!(endpoint["success"], success, "{endpoint}");
        assert_eq!(endpoint["last_error"].as_str(), last_error, "{endpoint}");
    }
}
