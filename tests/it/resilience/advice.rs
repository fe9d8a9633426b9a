//! Sidecars in a row: what they tell each other about trying again.

use std::{
    net::SocketAddr,
    sync::{Arc, OnceLock},
};

use super::{Service, ask, assert_cause, get, nobody, post, proxy, request, storm::between, upstream};
use crate::support::{Proxy, RawClient};

/// The trace context of a call.
fn trace(number: usize) -> String {
    format!("traceparent: 00-0af7651916cd43dd8448eb211c8{number:05x}-b7ad6b7169203331-01\r\n")
}

#[test]
fn no_ends_the_tries_and_goes_no_further() {
    let service = Service::new(|_, _| (503, "x-outrigger-retry", "no"));
    let proxy = proxy(&[service.address()], "");
    let answer = get(&proxy);
    assert_eq!(answer.status(), 503);
    assert_eq!(answer.field("x-outrigger-retry"), None, "{answer:?}");
    assert_eq!(service.calls(), 1);
}

/// A failure from further behind would have come from any endpoint, and a breaker next to it sheds load already: it
/// ejects none and opens no breaker on the way.
#[test]
fn no_ejects_nobody_and_opens_nothing() {
    let bad = Service::new(|_, _| (503, "x-outrigger-retry", "no"));
    let good = Service::new(|_, _| 200);
    let keys =
        "outlier = { consecutive_failures = 1 }\nbreaker = { consecutive_failures = 1, min_requests = 2 }";
    let two = proxy(&[bad.address(), good.address()], keys);
    for _ in 0..10 {
        get(&two);
    }
    assert_eq!((bad.calls(), good.calls()), (5, 5));
    let alone = Service::new(|seen, _| match seen.header("x-needs") {
        Some(_) => (503, "x-outrigger-retry", "no"),
        None => (200, "x-a", "b"),
    });
    let proxy = proxy(&[alone.address()], keys);
    for _ in 0..10 {
        let answer = ask(&proxy, request("GET", "x-needs: the service behind\r\n"));
        assert_eq!(
            (answer.status(), answer.field("proxy-status")),
            (503, None),
            "its own answer: {answer:?}"
        );
    }
    assert_eq!(get(&proxy).status(), 200, "what does not need the failing service is served");
}

/// Whoever is not named by the configuration cannot say how often it is called.
#[test]
fn advice_of_strangers_is_not_taken() {
    let service = Service::new(|_, _| (503, "x-outrigger-retry", "no"));
    let proxy = Proxy::start("");
    let url = format!("GET http://{0}/ HTTP/1.1\r\nHost: {0}\r\n\r\n", service.address());
    assert_eq!(ask(&proxy, url).status(), 503);
    assert_eq!(service.calls(), 3);
}

#[test]
fn a_service_that_is_down_lets_a_post_go_elsewhere() {
    let good = Service::new(|_, _| 200);
    let down = Proxy::start(format!("[inbound]\nforward_to = \"{}\"\n", nobody()));
    let well = Proxy::start(format!("[inbound]\nforward_to = \"{}\"\n", good.address()));
    let direct = RawClient::connect(down.inbound()).ask(post("", "pay"));
    assert_cause(&direct, 502, "connect_refused");
    assert_eq!(direct.field("x-outrigger-retry"), Some("elsewhere"));

    let caller = proxy(&[down.inbound(), well.inbound()], "");
    for _ in 0..4 {
        let answer = ask(&caller, post("", "pay"));
        assert_eq!((answer.status(), answer.field("x-outrigger-retry")), (200, None), "{answer:?}");
    }
    assert_eq!(good.calls(), 4);
}

/// The field is for proxies: no service sees it, none can set it.
#[test]
fn the_advice_stays_between_sidecars() {
    let service = Service::new(|_, _| (503, "x-outrigger-retry", "elsewhere"));
    let sidecar = Proxy::start(format!("[inbound]\nforward_to = \"{}\"\n", service.address()));
    let answer = RawClient::connect(sidecar.inbound()).ask(request("GET", "x-outrigger-retry: no\r\n"));
    assert_eq!((answer.status(), answer.field("x-outrigger-retry")), (503, None), "{answer:?}");
    assert_eq!(service.seen()[0].header("x-outrigger-retry"), None);
}

/// What the sidecar of a service in between says of its 5xx: `no` where its own call of that trace was spent.
#[track_caller]
fn said(endpoint: SocketAddr, keys: &str, forward: bool, calls: usize) -> Option<String> {
    let outbound = Arc::<OnceLock<SocketAddr>>::default();
    let service = between(outbound.clone(), forward);
    let config =
        format!("[inbound]\nforward_to = \"{}\"\n", service.address()) + &upstream("up", &[endpoint], keys);
    let sidecar = Proxy::start(config);
    outbound.set(sidecar.outbound()).expect("once");
    let mut last = None;
    for number in 0..calls {
        last = Some(RawClient::connect(sidecar.inbound()).ask(request("GET", &trace(number))));
    }
    let last = last.expect("at least one call");
    assert!(last.status() >= 500, "{last:?}");
    last.field("x-outrigger-retry").map(str::to_owned)
}

#[test]
fn a_spent_call_of_the_same_trace_says_no() {
    let failing = Service::new(|_, _| 503);
    assert_eq!(said(failing.address(), "", true, 1).as_deref(), Some("no"));
    assert_eq!(said(nobody(), "", true, 1).as_deref(), Some("no"));
    // What may be sent once has been tried enough when it was sent once.
    assert_eq!(said(failing.address(), "retry = { max = 0 }", true, 1).as_deref(), Some("no"));
    // Nor is it for somebody further up to repeat what may not be repeated here, or is no failure to repeat.
    assert_eq!(said(failing.address(), "retry = { methods = [\"PUT\"] }", true, 1).as_deref(), Some("no"));
    let broken = Service::new(|_, _| 500);
    assert_eq!(said(broken.address(), "", true, 1).as_deref(), Some("no"));
    assert_eq!(broken.calls(), 1);
    // Never by guess: without the trace context nothing connects the two.
    assert_eq!(said(failing.address(), "", false, 1), None);
}

/// An open breaker is spent too: who is behind it need not be asked by another hop's retries.
#[test]
fn an_open_breaker_says_no() {
    let failing = Service::new(|_, _| 500);
    let keys = "breaker = { consecutive_failures = 1 }\nretry = false";
    assert_eq!(said(failing.address(), keys, true, 2).as_deref(), Some("no"));
    assert_eq!(failing.calls(), 1);
}
