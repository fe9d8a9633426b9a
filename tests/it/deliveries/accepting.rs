//! Which requests are queued, and what their clients get.

use std::time::Instant;

use super::*;
use crate::support::{eventually, refusing_address};

#[test]
fn a_request_is_accepted_and_delivered_with_the_same_bytes() {
    let (service, store) = (Service::start(), tempfile::tempdir().unwrap());
    let proxy = Proxy::start(config(store.path(), service.address(), QUEUE, ""));
    let fields = "Prefer: respond-async\r\ncontent-type: text/x\r\ncookie: a=b\r\nauthorization: Basic x\r\n";
    let accepted = ask(&proxy, "POST /orders/7?a=%20b", fields, "one \u{fc}\0 body");
    assert_eq!(accepted.status(), 202, "{}", accepted.text());
    assert_eq!(accepted.field("preference-applied"), Some("respond-async"));
    assert!(accepted.field("retry-after").is_some());
    let (id, location) =
        (json(&accepted)["id"].as_str().unwrap().to_owned(), accepted.field("location").unwrap());
    assert_eq!(location, format!("/.well-known/outrigger/deliveries/{id}"));
    assert!(["queued", "delivering", "done"].contains(&json(&accepted)["state"].as_str().unwrap()));
    eventually("the delivery", || is_in_state(&proxy, location, "done"));
    let received = service.received();
    assert_eq!(received.len(), 1);
    let one = &received[0];
    assert_eq!((one.method.as_str(), one.path.as_str()), ("POST", "/orders/7?a=%20b"));
    assert_eq!(one.body, "one \u{fc}\0 body".as_bytes());
    for (name, value) in [
        ("content-type", "text/x"),
        ("idempotency-key", id.as_str()),
        ("x-outrigger-delivery", id.as_str()),
        ("x-outrigger-attempt", "1"),
        ("host", "payments"),
        ("cookie", ""),
        ("authorization", ""),
        ("prefer", ""),
        ("x-outrigger-upstream", ""),
        ("x-outrigger-peer", ""),
    ] {
        assert_eq!(one.field(name), value, "{name}");
    }
    assert_eq!(state(&proxy, location)["attempts"], 1);
    let stored = ask(&proxy, &format!("GET {location}/response"), "", "");
    assert_eq!((stored.status(), stored.field("x-service")), (200, Some("1")));
    assert_eq!(stored.text(), "seen one \u{fc}\0 body");
}

#[test]
fn only_what_asks_for_it_is_queued() {
    let (service, store) = (Service::start(), tempfile::tempdir().unwrap());
    let proxy = Proxy::start(config(store.path(), service.address(), QUEUE, ""));
    for (line, fields) in [
        ("POST /orders", ""),
        ("GET /orders", ASYNC),
        ("OPTIONS /orders", ASYNC),
        ("POST /other", ASYNC),
        ("POST /orders", "Prefer: respond-async\r\ncontent-type: application/grpc\r\n"),
        ("POST /orders", "Prefer: respond-async\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"),
    ] {
        let response = ask(&proxy, line, fields, "");
        assert_eq!((response.status(), response.field("x-service")), (200, Some("1")), "{line} {fields}");
        assert_eq!(response.field("preference-applied"), None);
    }
    let mut client = RawClient::connect(proxy.outbound());
    client.send(format!("HEAD /orders HTTP/1.1\r\nHost: payments\r\n{ASYNC}\r\n"));
    let head = client.read_until(b"\r\n\r\n");
    assert!(head.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&head));
}

#[test]
fn always_queues_whatever_changes_something() {
    let (service, store) = (Service::start(), tempfile::tempdir().unwrap());
    let proxy = Proxy::start(config(store.path(), service.address(), QUEUE, ", when = \"always\""));
    let accepted = ask(&proxy, "PUT /orders/1", "", "x");
    assert_eq!((accepted.status(), accepted.field("preference-applied")), (202, None));
    assert_eq!(ask(&proxy, "GET /orders/1", "", "").status(), 200);
    eventually("the delivery", || service.bodies().contains(&"x".to_owned()));
}

#[test]
fn a_body_above_the_limit_goes_on_synchronously_or_is_refused() {
    let store = tempfile::tempdir().unwrap();
    let service = Service::start();
    let queue = format!("{QUEUE}body_limit = \"10B\"\n");
    let large = "12345678901";
    let chunked = |proxy: &Proxy, fields: &str| {
        let request = format!(
            "POST /orders HTTP/1.1\r\nHost: payments\r\n{fields}transfer-encoding: chunked\r\n\r\n6\r\n123456\r\n5\r\n78901\r\n0\r\n\r\n"
        );
        RawClient::connect(proxy.outbound()).ask(request)
    };
    let asked = Proxy::start(config(store.path(), service.address(), &queue, ""));
    for response in [ask(&asked, "POST /orders", ASYNC, large), chunked(&asked, ASYNC)] {
        assert_eq!((response.status(), response.text()), (200, format!("seen {large}")));
    }
    assert_eq!(ask(&asked, "POST /orders", ASYNC, &large[..10]).status(), 202);
    let store = tempfile::tempdir().unwrap();
    let always = Proxy::start(config(store.path(), service.address(), &queue, ", when = \"always\""));
    for response in [ask(&always, "POST /orders", "", large), chunked(&always, "")] {
        assert_eq!((response.status(), json(&response)["cause"].as_str()), (413, Some("body_too_large")));
    }
}

#[test]
fn a_full_queue_and_a_full_store_refuse() {
    let store = tempfile::tempdir().unwrap();
    let queue = format!("{QUEUE}max_messages = 1\n");
    let proxy = Proxy::start(config(store.path(), refusing_address(), &queue, ""));
    order(&proxy, "first");
    let refused = ask(&proxy, "POST /orders", ASYNC, "second");
    assert_eq!((refused.status(), json(&refused)["cause"].as_str()), (503, Some("queue_full")));
    assert!(refused.field("retry-after").is_some());
    assert_eq!(refused.field("content-type"), Some("application/problem+json"));
    let store = tempfile::tempdir().unwrap();
    let small =
        config(store.path(), refusing_address(), QUEUE, "").replace("reserve", "max_bytes = \"1B\"\nreserve");
    let refused = ask(&Proxy::start(small), "POST /orders", ASYNC, "first");
    assert_eq!((refused.status(), json(&refused)["cause"].as_str()), (507, Some("store_full")));
    assert!(refused.field("retry-after").is_some());
}

/// What has arrived of bodies that are being read is in memory: 64 MiB of it. Beyond that requests are refused, or sent on
/// where they may be.
#[test]
fn bodies_share_a_bounded_memory() {
    let (service, queue) = (Service::start(), format!("{QUEUE}body_limit = \"64MiB\"\n"));
    for when in ["always", "unavailable"] {
        let store = tempfile::tempdir().unwrap();
        let route = format!(", when = \"{when}\"");
        let proxy = Proxy::start(config(store.path(), service.address(), &queue, &route));
        let small = || ask(&proxy, "POST /orders", "", "small");
        let served = small().status();
        let mut large = RawClient::connect(proxy.outbound());
        large.send("POST /orders HTTP/1.1\r\nHost: payments\r\nExpect: 100-continue\r\ncontent-length: 67108864\r\n\r\n");
        large.read_until(b"\r\n\r\n");
        large.send("begin");
        assert_eq!(small().status(), served, "what has not arrived takes nothing");
        large.send(vec![b'a'; 67_108_850]);
        let mut last = small();
        if when == "always" {
            eventually("a refusal", || {
                last = small();
                last.status() == 503
            });
            assert_eq!(json(&last)["cause"].as_str(), Some("queue_full"));
            assert!(last.field("retry-after").is_some());
        } else {
            eventually("a request that finds no memory", || {
                let begin = Instant::now();
                last = small();
                assert_eq!((last.status(), last.text().as_str()), (200, "seen small"));
                // As long as a request waits for it.
                begin.elapsed() >= Duration::from_secs(1)
            });
        }
        drop(large);
        assert_eq!(small().status(), served, "{when}");
    }
}

#[test]
fn a_repeated_key_is_the_same_delivery_and_another_request_is_an_error() {
    let (service, store) = (Service::start(), tempfile::tempdir().unwrap());
    let proxy = Proxy::start(config(store.path(), service.address(), QUEUE, ""));
    let fields = "Prefer: respond-async\r\nIdempotency-Key: k1\r\n";
    let first = ask(&proxy, "POST /orders", fields, "a");
    let location = first.field("location").unwrap().to_owned();
    eventually("the delivery", || is_in_state(&proxy, &location, "done"));
    let again = ask(&proxy, "POST /orders", fields, "a");
    assert_eq!((again.status(), again.field("location")), (202, Some(location.as_str())));
    assert_eq!(json(&again)["state"], "done");
    let other = ask(&proxy, "POST /orders", fields, "b");
    assert_eq!((other.status(), json(&other)["cause"].as_str()), (422, Some("key_reused")));
    assert_eq!(
        (service.received().len(), service.received()[0].field("idempotency-key").to_owned()),
        (1, "k1".into())
    );
}

#[test]
fn a_client_can_wait_for_the_result_as_long_as_the_route_allows() {
    let store = tempfile::tempdir().unwrap();
    let service = Service::start();
    let prefer = "Prefer: respond-async, wait=20\r\n";
    let proxy = Proxy::start(config(store.path(), service.address(), QUEUE, ", wait = \"20s\""));
    let response = ask(&proxy, "POST /orders", prefer, "now");
    assert_eq!((response.status(), response.text().as_str()), (200, "seen now"));
    assert!(response.field("preference-applied").is_some_and(|applied| applied.contains("wait=20")));
    let store = tempfile::tempdir().unwrap();
    let route = ", when = \"always\", wait = \"20s\"";
    let always = Proxy::start(config(store.path(), service.address(), QUEUE, route));
    let response = ask(&always, "POST /orders", "Prefer: wait=20\r\n", "always");
    assert_eq!((response.status(), response.field("preference-applied")), (200, Some("wait=20")));
    let store = tempfile::tempdir().unwrap();
    let away = Proxy::start(config(store.path(), refusing_address(), QUEUE, ", wait = \"100ms\""));
    assert_eq!(ask(&away, "POST /orders", prefer, "later").status(), 202, "the route's limit");
    let store = tempfile::tempdir().unwrap();
    let slow = Service::start_at(([127, 0, 0, 1], 0).into(), Duration::from_millis(300));
    let none = Proxy::start(config(store.path(), slow.address(), QUEUE, ""));
    assert_eq!(ask(&none, "POST /orders", prefer, "later").status(), 202, "no wait without the route's");
}

#[test]
fn unavailable_is_synchronous_while_the_service_responds_and_queues_when_it_is_away() {
    let store = tempfile::tempdir().unwrap();
    let address = later_address();
    let breaker = "retry = false\nbreaker = { consecutive_failures = 1, open_for = { base = \"200ms\", max = \"200ms\" } }\n";
    let text = config(store.path(), address, QUEUE, ", when = \"unavailable\"") + breaker;
    let proxy = Proxy::start(text);
    // Surely unprocessed: refused, then the breaker is open.
    for body in ["one", "two"] {
        assert_eq!(ask(&proxy, "POST /orders", "", body).status(), 202, "{body}");
    }
    let service = Service::start_at(address, Duration::ZERO);
    eventually("the deliveries", || service.bodies() == ["one", "two"]);
    eventually("a synchronous response", || ask(&proxy, "POST /orders", "", "three").status() == 200);
    assert_eq!(ask(&proxy, "POST /orders", "", "poison").status(), 422, "the service's own response");
    assert_eq!(ask(&proxy, "POST /orders", "", "busy").status(), 503, "the service's own response");
}
