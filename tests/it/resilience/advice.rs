//! Retry advice between sidecars in a row.

use std::{
    net::SocketAddr,
    sync::{Arc, OnceLock},
};

use super::{
    Service, ask, assert_cause, get, post, proxy, refusing_address, request, storm::forwarding_service,
    upstream,
};
use crate::support::{Proxy, RawClient};

/// The trace context of a request.
fn trace(number: usize) -> String {
    format!("traceparent: 00-0af7651916cd43dd8448eb211c8{number:05x}-b7ad6b7169203331-01\r\n")
}

#[test]
fn advice_no_stops_retries_and_is_not_forwarded() {
    let service = Service::new(|_, _| (503, "x-outrigger-retry", "no"));
    let proxy = proxy(&[service.address()], "");
    let response = get(&proxy);
    assert_eq!(response.status(), 503);
    assert_eq!(response.field("x-outrigger-retry"), None, "{response:?}");
    assert_eq!(service.request_count(), 1);
}

/// A failure from further upstream would have come from any endpoint, and a breaker next to it sheds load
/// already: it ejects no endpoint and opens no breaker on the path.
#[test]
fn advice_no_ejects_no_endpoint_and_opens_no_breaker() {
    let bad = Service::new(|_, _| (503, "x-outrigger-retry", "no"));
    let good = Service::new(|_, _| 200);
    let keys =
        "outlier = { consecutive_failures = 1 }\nbreaker = { consecutive_failures = 1, min_requests = 2 }";
    let two = proxy(&[bad.address(), good.address()], keys);
    for _ in 0..10 {
        get(&two);
    }
    assert_eq!((bad.request_count(), good.request_count()), (5, 5));
    let alone = Service::new(|seen, _| match seen.header("x-needs") {
        Some(_) => (503, "x-outrigger-retry", "no"),
        None => (200, "x-a", "b"),
    });
    let proxy = proxy(&[alone.address()], keys);
    for _ in 0..10 {
        let response = ask(&proxy, request("GET", "x-needs: the service behind\r\n"));
        assert_eq!(
            (response.status(), response.field("proxy-status")),
            (503, None),
            "its own answer: {response:?}"
        );
    }
    assert_eq!(get(&proxy).status(), 200, "what does not need the failing service is served");
}

/// A host that the configuration does not name cannot control how often it gets a request.
#[test]
fn advice_of_unknown_upstreams_is_ignored() {
    let service = Service::new(|_, _| (503, "x-outrigger-retry", "no"));
    let proxy = Proxy::start("");
    let url = format!("GET http://{0}/ HTTP/1.1\r\nHost: {0}\r\n\r\n", service.address());
    assert_eq!(ask(&proxy, url).status(), 503);
    assert_eq!(service.request_count(), 3);
}

#[test]
fn advice_elsewhere_lets_a_post_be_retried() {
    let good = Service::new(|_, _| 200);
    let down = Proxy::start(format!("[inbound]\nforward_to = \"{}\"\n", refusing_address()));
    let well = Proxy::start(format!("[inbound]\nforward_to = \"{}\"\n", good.address()));
    let direct = RawClient::connect(down.inbound()).ask(post("", "pay"));
    assert_cause(&direct, 502, "connect_refused");
    assert_eq!(direct.field("x-outrigger-retry"), Some("elsewhere"));

    let client = proxy(&[down.inbound(), well.inbound()], "");
    for _ in 0..4 {
        let response = ask(&client, post("", "pay"));
        assert_eq!((response.status(), response.field("x-outrigger-retry")), (200, None), "{response:?}");
    }
    assert_eq!(good.request_count(), 4);
}

/// The field is for proxies: no service sees it, none can set it.
#[test]
fn advice_never_reaches_a_service() {
    let service = Service::new(|_, _| (503, "x-outrigger-retry", "elsewhere"));
    let sidecar = Proxy::start(format!("[inbound]\nforward_to = \"{}\"\n", service.address()));
    let response = RawClient::connect(sidecar.inbound()).ask(request("GET", "x-outrigger-retry: no\r\n"));
    assert_eq!((response.status(), response.field("x-outrigger-retry")), (503, None), "{response:?}");
    assert_eq!(service.seen()[0].header("x-outrigger-retry"), None);
}

/// The advice of an intermediate service's sidecar with its 5xx: `no` if its own request in that trace has exhausted
/// its attempts.
#[track_caller]
fn advice(endpoint: SocketAddr, keys: &str, forward: bool, calls: usize) -> Option<String> {
    let outbound = Arc::<OnceLock<SocketAddr>>::default();
    let service = forwarding_service(outbound.clone(), forward);
    let config =
        format!("[inbound]\nforward_to = \"{}\"\n", service.address()) + &upstream("up", &[endpoint], keys);
    let sidecar = Proxy::start(config);
    outbound.set(sidecar.outbound()).expect("once");
    let mut last = None;
    for number in 0..calls {
        last = Some(RawClient::connect(sidecar.inbound()).ask(request("GET", &trace(number))));
    }
    let last = last.expect("at least one request");
    assert!(last.status() >= 500, "{last:?}");
    last.field("x-outrigger-retry").map(str::to_owned)
}

#[test]
fn exhausted_retries_in_the_same_trace_give_advice_no() {
    let failing = Service::new(|_, _| 503);
    assert_eq!(advice(failing.address(), "", true, 1).as_deref(), Some("no"));
    assert_eq!(advice(refusing_address(), "", true, 1).as_deref(), Some("no"));
    // A request that may be sent once has no attempts left after that one.
    assert_eq!(advice(failing.address(), "retry = { max = 0 }", true, 1).as_deref(), Some("no"));
    // Nor may a hop further up retry what this hop's policy does not retry, by method or by status.
    assert_eq!(advice(failing.address(), "retry = { methods = [\"PUT\"] }", true, 1).as_deref(), Some("no"));
    let broken = Service::new(|_, _| 500);
    assert_eq!(advice(broken.address(), "", true, 1).as_deref(), Some("no"));
    assert_eq!(broken.request_count(), 1);
    // Never by guessing: without the trace context the two requests cannot be linked.
    assert_eq!(advice(failing.address(), "", false, 1), None);
}

/// An open breaker has exhausted its attempts too: retries of another hop cannot help.
#[test]
fn an_open_breaker_gives_advice_no() {
    let failing = Service::new(|_, _| 500);
    let keys = "breaker = { consecutive_failures = 1 }\nretry = false";
    assert_eq!(advice(failing.address(), keys, true, 2).as_deref(), Some("no"));
    assert_eq!(failing.request_count(), 1);
}
