//! What keeps a failing or full upstream from more: breaker, ejection, limits, rates.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use socket2::{Domain, Socket, Type};

use super::{Reply, Service, ask, assert_cause, get, nobody, proxy, request, serve_at, status, upstream};
use crate::support::{Proxy, RawClient, eventually};

/// A service that can be switched between well and failing.
fn switchable() -> (Service, Arc<AtomicBool>) {
    let well = Arc::new(AtomicBool::new(false));
    let state = well.clone();
    (Service::new(move |_, _| if state.load(Ordering::Relaxed) { 200 } else { 500 }), well)
}

#[test]
fn the_breaker_opens_tries_and_closes() {
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
    assert_eq!(service.calls(), 4, "open: nobody comes through");
    // A trial that fails opens it again, so a failing service sees one call each time.
    let mut fives = 0;
    eventually("two failed trials", || {
        fives += u32::from(get(&proxy).status() == 500);
        fives == 2
    });
    assert_eq!(service.calls(), 6);
    well.store(true, Ordering::Relaxed);
    eventually("the breaker to close", || get(&proxy).status() == 200);
    for _ in 0..10 {
        assert_eq!(get(&proxy).status(), 200, "closed");
    }
}

/// A breaker that opened because nobody listened does not wait out its time once somebody does.
#[test]
fn an_upstream_that_is_back_is_noticed_by_its_port() {
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

/// Nor does one that opened as nobody took the connections, whichever of our clocks ended the wait for them.
#[test]
fn an_upstream_that_takes_connections_again_is_noticed() {
    let place = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    place.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("a port");
    place.listen(0).expect("a listener");
    let address = place.local_addr().ok().and_then(|address| address.as_socket()).expect("its address");
    // The kernel answers until the queue is full, then no longer.
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

/// Until then a call waits as long as it would have between tries that are refused; where none are allowed, not at all.
#[test]
fn a_call_waits_a_moment_for_an_upstream_that_is_not_there() {
    let most = Duration::from_millis(250);
    let keys = "breaker = { consecutive_failures = 1, open_for = { base = \"10m\", max = \"10m\" } }";
    let patient = proxy(
        &[nobody()],
        &format!("retry = {{ backoff = {{ base = \"10s\", max = \"10s\" }} }}\ntimeout = \"5s\"\n{keys}"),
    );
    // Its first try opens the breaker.
    let _ = ask(&patient, request("GET", "x-request-timeout-ms: 100\r\n"));
    let began = Instant::now();
    assert_cause(&get(&patient), 503, "breaker_open");
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

/// A change of the configuration is no amnesty: what is known of an upstream outlives it.
#[test]
fn a_reload_keeps_what_the_breaker_knows() {
    let (service, _) = switchable();
    let standby = Service::new(|_, _| 200);
    let config = |timeout: &str, other: &str| {
        let breaker = "breaker = { consecutive_failures = 3, open_for = { base = \"10m\", max = \"10m\" } }";
        upstream("up", &[service.address()], &format!("timeout = \"{timeout}\"\n{breaker}"))
            + &upstream(other, &[standby.address()], "")
    };
    let proxy = Proxy::start(config("5s", "before"));
    // Half-way is remembered, too.
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
        assert_eq!(service.calls(), 3);
    }
}

/// What the caller did wrong is no failure of the upstream.
#[test]
fn a_breaker_does_not_count_the_callers_faults() {
    let service = Service::new(|_, _| 404);
    let proxy = proxy(&[service.address()], "breaker = { consecutive_failures = 2 }");
    for _ in 0..10 {
        assert_eq!(get(&proxy).status(), 404);
    }
}

/// One trial at a time; one that its caller gave up frees its place.
#[test]
fn a_trial_whose_caller_leaves_frees_its_place() {
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
        let mut client = RawClient::connect(proxy.outbound()).patience(Duration::from_millis(200));
        client.send(request("GET", "x-want: hang\r\n"));
        let silent = matches!(client.response(), Ok(None));
        hanging = Some(client);
        silent
    });
    assert_cause(&get(&proxy), 503, "breaker_open");
    // Long before `timeout` would end the trial.
    let left = Instant::now();
    drop(hanging);
    eventually("its place", || get(&proxy).status() == 200);
    assert!(left.elapsed() < Duration::from_secs(10), "{:?}", left.elapsed());
}

#[test]
fn an_endpoint_that_fails_gets_no_more_traffic() {
    let (bad, good, other) = (Service::new(|_, _| 503), Service::new(|_, _| 200), Service::new(|_, _| 200));
    let endpoints = [bad.address(), good.address(), other.address()];
    let proxy = proxy(
        &endpoints,
        "outlier = { consecutive_failures = 5, eject_for = { base = \"60s\", max = \"60s\" } }",
    );
    for _ in 0..60 {
        assert_eq!(get(&proxy).status(), 200);
    }
    assert_eq!(bad.calls(), 5, "five failures, then out");
    assert_eq!(good.calls() + other.calls(), 60);
}

/// With all of them failing, no more than `max_ejected` are out: the rest goes on being asked.
#[test]
fn never_all_endpoints_are_ejected() {
    let services: Vec<Service> = (0..3).map(|_| Service::new(|_, _| 500)).collect();
    let endpoints: Vec<_> = services.iter().map(Service::address).collect();
    let proxy = proxy(
        &endpoints,
        "breaker = false\noutlier = { consecutive_failures = 2, eject_for = { base = \"60s\", max = \"60s\" } }",
    );
    for _ in 0..30 {
        assert_eq!(get(&proxy).status(), 500, "answered by an endpoint, not by `no_endpoint`");
    }
    let mut calls: Vec<_> = services.iter().map(Service::calls).collect();
    calls.sort_unstable();
    assert!(calls[0] == 2 && calls[1] > 5, "one of three is out: {calls:?}");
}

/// A place, a queue of one, and a third that is refused. Who leaves makes room.
#[test]
fn more_than_the_limits_wait_and_more_than_that_are_refused() {
    let service =
        Service::new(|seen, _| if seen.header("x-hang").is_some() { Reply::Never } else { Reply::from(200) });
    let proxy = proxy(
        &[service.address()],
        "limits = { max_requests = 1, max_pending = 1, pending_timeout = \"15s\" }\nretry = false",
    );
    let mut first = RawClient::connect(proxy.outbound());
    first.send(request("GET", "x-hang: 1\r\n"));
    eventually("the first to have the place", || service.calls() == 1);
    thread::scope(|scope| {
        let second = scope.spawn(|| get(&proxy));
        // The second may not wait yet when the next comes; whoever comes while one waits is refused.
        let mut patient = Vec::new();
        eventually("a third to be refused", || {
            let mut third = RawClient::connect(proxy.outbound()).patience(Duration::from_millis(100));
            third.send(request("GET", "x-hang: 1\r\n"));
            let answer = third.response();
            let Ok(Some(answer)) = answer else {
                patient.push(third);
                return false;
            };
            assert_cause(&answer, 503, "queue_full");
            assert!(answer.field("retry-after").is_some(), "{answer:?}");
            true
        });
        assert_eq!(service.calls(), 1);
        drop(patient);
        drop(first);
        let answer = second.join().expect("no panic");
        // Refused only if one of the others was quicker to wait than it.
        assert!(matches!(answer.status(), 200 | 503), "{answer:?}");
    });
    eventually("the place to be free", || get(&proxy).status() == 200);
}

#[test]
fn who_waits_too_long_is_told_so() {
    let service = Service::new(|_, _| Reply::Never);
    let proxy = proxy(&[service.address()], "limits = { max_requests = 1, pending_timeout = \"50ms\" }");
    let mut first = RawClient::connect(proxy.outbound());
    first.send(request("GET", ""));
    eventually("the first to have the place", || service.calls() == 1);
    assert_cause(&get(&proxy), 503, "limit_full");
    // Nor is one waited for longer than the caller has time.
    let answer = ask(&proxy, request("GET", "x-request-timeout-ms: 5\r\n"));
    assert_cause(&answer, 504, "deadline");
    assert_eq!(service.calls(), 1);
}

#[test]
fn connections_are_limited() {
    let service = Service::new(|_, _| Reply::Never);
    let proxy = proxy(&[service.address()], "limits = { max_connections = 1, pending_timeout = \"50ms\" }");
    let mut first = RawClient::connect(proxy.outbound());
    first.send(request("GET", ""));
    eventually("the first to have the connection", || service.calls() == 1);
    assert_cause(&get(&proxy), 503, "limit_full");
    assert_eq!(service.calls(), 1);
}

/// At the limit, a connection that lies idle makes room: at another endpoint, and on another worker.
#[test]
fn an_idle_connection_makes_room_for_a_call() {
    let services: Vec<Service> = (0..2).map(|_| Service::new(|_, _| 200)).collect();
    let endpoints: Vec<_> = services.iter().map(Service::address).collect();
    for workers in [1, 3] {
        let keys = "balance = \"round-robin\"\nretry = false\npool_idle_timeout = \"10m\"\nlimits = { max_connections = 1 }";
        let proxy =
            Proxy::start(format!("[runtime]\nworkers = {workers}\n") + &upstream("up", &endpoints, keys));
        // Each comes by a connection of its own, so that with several workers each of them has calls.
        let mut callers: Vec<_> = (0..6).map(|_| RawClient::connect(proxy.outbound())).collect();
        for round in 0..4 {
            for (number, caller) in callers.iter_mut().enumerate() {
                let answer = caller.ask(request("GET", ""));
                assert_eq!(answer.status(), 200, "{workers} workers, {round}/{number}: {answer:?}");
            }
        }
    }
}

#[test]
fn a_rate_limit_is_kept() {
    let service = Service::new(|_, _| 200);
    let limited = proxy(&[service.address()], "rate_limit = { rate = 1, burst = 3 }");
    let began = Instant::now();
    let mut served = 0;
    // The burst and one a second, however slow the machine.
    let refused = loop {
        let answer = get(&limited);
        if answer.status() != 200 {
            break answer;
        }
        served += 1;
        assert!(served <= 4 + began.elapsed().as_secs(), "{served} in {:?}", began.elapsed());
    };
    assert!(served >= 3, "{served} of the burst");
    assert_cause(&refused, 429, "rate_limited");
    assert_eq!(refused.field("retry-after"), Some("1"));
    assert_eq!(service.calls() as u64, served);

    let limited =
        proxy(&[service.address()], "rate_limit = { rate = 1, burst = 1, per = \"header:x-tenant\" }");
    let call = |tenant: &str| ask(&limited, request("GET", &format!("x-tenant: {tenant}\r\n"))).status();
    eventually("a tenant over its limit", || call("a") == 429);
    assert_eq!(call("b"), 200, "another one is not");
}

/// Ejection is a hint: where the rest has failed the very call, an instance that is out may still be asked.
#[test]
fn an_ejected_endpoint_is_better_than_one_that_just_refused() {
    let well_again = Service::new(|_, number| if number == 1 { 503 } else { 200 });
    let goes = Service::new(|_, _| 200);
    let proxy = proxy(
        &[well_again.address(), goes.address()],
        "outlier = { consecutive_failures = 1, eject_for = { base = \"10m\", max = \"10m\" } }",
    );
    eventually("the first to be called, and ejected for its answer", || {
        assert_eq!(get(&proxy).status(), 200);
        well_again.calls() == 1
    });
    assert_eq!(get(&proxy).status(), 200);
    assert_eq!(well_again.calls(), 1, "it is out");
    drop(goes);
    assert_eq!(get(&proxy).status(), 200);
    assert_eq!(well_again.calls(), 2);
}

/// An instance that restarts is back as soon as it listens and serves; one that answered badly stays out for its time.
#[test]
fn an_absent_endpoint_is_back_when_it_serves() {
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
    let calls = bad.calls();
    for _ in 0..10 {
        assert_eq!(get(&proxy).status(), 200, "nobody listens at {address} yet");
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
    assert_eq!(bad.calls(), calls, "that it accepts connections is no better answer");
}

/// An endpoint that fails everything is still `healthy` where nothing takes it out, so the status says how requests fare.
#[test]
fn the_status_tells_the_success_and_the_last_error_of_each_endpoint() {
    let (good, bad) = (Service::new(|_, _| 200), Service::new(|_, _| 500));
    let down = nobody();
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
