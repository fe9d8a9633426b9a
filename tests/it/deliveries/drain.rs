//! The drain: no delivery begins, nothing is accepted, and nothing becomes a dead letter because of it.

use super::*;
use crate::support::{binary, eventually};

fn drain(proxy: &Proxy) {
    let admin = proxy.admin().to_string();
    let output = std::process::Command::new(binary()).args(["drain", "--admin", &admin]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    eventually("the drain", || {
        let request = "GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n";
        json(&RawClient::connect(proxy.admin()).ask(request))["phase"] == "draining_inbound"
    });
}

#[test]
fn the_drain_begins_no_delivery_and_finishes_those_under_way() {
    let service = Service::start_at(([127, 0, 0, 1], 0).into(), Duration::from_millis(500));
    let store = tempfile::tempdir().unwrap();
    let queue = format!("{QUEUE}concurrency = 1\n");
    let text = config(store.path(), service.address(), &queue, "");
    let mut proxy = Proxy::start(text.clone());
    let orders = ["one", "two"].map(|body| order(&proxy, body));
    eventually("the first to be under way", || is_in_state(&proxy, &orders[0], "delivering"));
    proxy.signal("TERM");
    proxy.wait();
    assert_eq!(service.bodies(), ["one"]);
    let proxy = Proxy::start(text);
    assert!(is_in_state(&proxy, &orders[0], "done"), "its outcome was stored");
    eventually("the second", || is_in_state(&proxy, &orders[1], "done"));
    assert_eq!(service.bodies(), ["one", "two"]);
}

#[test]
fn the_drain_accepts_nothing() {
    let (service, store) = (Service::start(), tempfile::tempdir().unwrap());
    let always = Proxy::start(config(store.path(), service.address(), QUEUE, ", when = \"always\""));
    drain(&always);
    let refused = ask(&always, "POST /orders", "", "late");
    assert_eq!((refused.status(), json(&refused)["cause"].as_str()), (503, Some("draining")));
    assert_eq!(refused.field("retry-after"), Some("5"));
    assert_eq!(ask(&always, "GET /orders", "", "").status(), 200, "never queued: sent on");
    let store = tempfile::tempdir().unwrap();
    let asked = Proxy::start(config(store.path(), service.address(), QUEUE, ""));
    drain(&asked);
    let sent_on = ask(&asked, "POST /orders", ASYNC, "now");
    assert_eq!((sent_on.status(), sent_on.field("preference-applied")), (200, None));
    assert_eq!(service.bodies(), ["", "now"]);
}

/// The service shuts down at the same time, in the middle of the last attempt that the queue allows.
#[test]
fn an_attempt_that_the_drain_breaks_is_not_spent() {
    let (store, address) = (tempfile::tempdir().unwrap(), later_address());
    let queue = format!("{QUEUE}attempts = 1\n");
    let text = config(store.path(), address, &queue, "");
    let service = Service::start_at(address, Duration::from_secs(60));
    let mut proxy = Proxy::start(text.clone());
    let location = order(&proxy, "one");
    eventually("the attempt", || service.most_at_once.load(Ordering::SeqCst) == 1);
    drain(&proxy);
    drop(service);
    eventually("the end of the attempt", || is_in_state(&proxy, &location, "queued"));
    proxy.signal("TERM");
    proxy.wait();
    let service = Service::start_at(address, Duration::ZERO);
    let proxy = Proxy::start(text);
    eventually("the delivery", || is_in_state(&proxy, &location, "done"));
    assert_eq!(
        (service.bodies(), &state(&proxy, &location)["attempts"]),
        (vec!["one".to_owned()], &1.into())
    );
}

/// `ambiguous = "dead"` promises that nothing is sent twice: what the drain cuts off may have been processed.
#[test]
fn a_delivery_that_must_not_be_repeated_is_dead_when_it_is_cut_off() {
    let (store, address) = (tempfile::tempdir().unwrap(), later_address());
    let queue = format!("{QUEUE}concurrency = 1\nambiguous = \"dead\"\n");
    let text = config(store.path(), address, &queue, "") + "[runtime]\ndrain_timeout = \"200ms\"\n";
    let service = Service::start_at(address, Duration::from_secs(60));
    let mut proxy = Proxy::start(text.clone());
    let orders = ["one", "two"].map(|body| order(&proxy, body));
    eventually("the attempt", || service.most_at_once.load(Ordering::SeqCst) == 1);
    proxy.signal("TERM");
    proxy.wait();
    assert!(proxy.stderr().contains("deliveries were cut off"), "{}", proxy.stderr());
    drop(service);
    eventually("the end of the service", || std::net::TcpListener::bind(address).is_ok());
    let service = Service::start_at(address, Duration::ZERO);
    let proxy = Proxy::start(text);
    eventually("the other delivery", || is_in_state(&proxy, &orders[1], "done"));
    let cut = state(&proxy, &orders[0]);
    assert_eq!((&cut["state"], &cut["reason"]), (&"dead".into(), &"ambiguous".into()), "{cut}");
    assert_eq!(service.bodies(), ["two"]);
}
