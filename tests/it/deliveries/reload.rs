//! Every key of a queue applies after a reload.

use super::*;
use crate::support::{eventually, refusing_address};

/// The effective configuration, until it holds `expected` at `path`.
fn reloaded(proxy: &Proxy, text: &str, path: &str, expected: Value) {
    proxy.reconfigure(&("[runtime]\ndrain_timeout = \"5s\"\n".to_owned() + text));
    eventually(&format!("{path} = {expected}"), || {
        let request = "GET /config HTTP/1.1\r\nHost: localhost\r\n\r\n";
        json(&RawClient::connect(proxy.admin()).ask(request)).pointer(path) == Some(&expected)
    });
}

#[test]
fn every_key_of_a_queue_applies_after_a_reload() {
    let store = tempfile::tempdir().unwrap();
    let text = |queue: &str| config(store.path(), refusing_address(), queue, "");
    let proxy = Proxy::start(text(QUEUE));
    for (line, path, expected) in [
        ("concurrency = 7", "/queue/0/concurrency", Value::from(7)),
        ("rate = 9", "/queue/0/rate", 9.into()),
        ("order = \"all\"", "/queue/0/order", "all".into()),
        ("attempts = 3", "/queue/0/attempts", 3.into()),
        ("permanent = [\"5xx\"]", "/queue/0/permanent/0", "5xx".into()),
        ("ambiguous = \"dead\"", "/queue/0/ambiguous", "dead".into()),
        ("expires = \"1h\"", "/queue/0/expires", "1h".into()),
        ("keep_done = \"2h\"", "/queue/0/keep_done", "2h".into()),
        ("result_limit = \"1KiB\"", "/queue/0/result_limit", "1KiB".into()),
        ("body_limit = \"1KiB\"", "/queue/0/body_limit", "1KiB".into()),
        ("max_messages = 9", "/queue/0/max_messages", 9.into()),
        ("max_bytes = \"1MiB\"", "/queue/0/max_bytes", "1MiB".into()),
        ("dead = { max = 7 }", "/queue/0/dead/max", 7.into()),
        ("strip = [\"x-a\"]", "/queue/0/strip/0", "x-a".into()),
    ] {
        reloaded(&proxy, &text(&format!("{QUEUE}{line}\n")), path, expected);
    }
}

#[test]
fn a_route_is_queued_after_a_reload() {
    let (service, store) = (Service::start(), tempfile::tempdir().unwrap());
    let queued = config(store.path(), service.address(), QUEUE, "");
    let (before, _) = queued.split_once("[[upstream.route]]").unwrap();
    let proxy = Proxy::start(before);
    assert_eq!(ask(&proxy, "POST /orders", ASYNC, "").status(), 200);
    proxy.reconfigure(&queued);
    eventually("a 202", || ask(&proxy, "POST /orders", ASYNC, "").status() == 202);
    proxy.reconfigure(&queued.replace("name = \"orders\" }", "name = \"orders\", when = \"always\" }"));
    eventually("a 202", || ask(&proxy, "POST /orders", "", "").status() == 202);
}

/// One queue of two upstreams, of which one is removed while a delivery to it waits.
#[test]
fn a_delivery_whose_upstream_was_removed_is_a_dead_letter_and_the_others_go_on() {
    let (service, store) = (Service::start(), tempfile::tempdir().unwrap());
    let upstream = |name: &str, address: SocketAddr| {
        format!(
            "[[upstream]]\nname = \"{name}\"\nendpoints = [\"{address}\"]\nbreaker = false\n\
             [[upstream.route]]\nmatch = {{ path = \"/orders*\" }}\nqueue = {{ name = \"orders\" }}\n"
        )
    };
    let stored = format!("[store]\npath = \"{}\"\nreserve = \"64KiB\"\n{QUEUE}", store.path().display());
    let one = format!("{stored}{}", upstream("payments", service.address()));
    let proxy = Proxy::start(format!("{one}{}", upstream("stock", refusing_address())));
    let length = "Prefer: respond-async\r\ncontent-length: 3";
    let request = format!("POST /orders HTTP/1.1\r\nHost: stock\r\n{length}\r\n\r\none");
    let accepted = RawClient::connect(proxy.outbound()).ask(request);
    assert_eq!(accepted.status(), 202, "{}", accepted.text());
    let location = accepted.field("location").unwrap();
    eventually("the pause", || proxy.stderr().contains("the queue is paused"));
    // The other service is there: its deliveries do not wait for the one that is down.
    let other = order(&proxy, "two");
    eventually("the delivery", || is_in_state(&proxy, &other, "done"));
    assert!(is_in_state(&proxy, location, "queued") || is_in_state(&proxy, location, "delivering"));
    proxy.reconfigure(&one);
    eventually("the end", || is_in_state(&proxy, location, "dead"));
    assert_eq!(state(&proxy, location)["reason"], "poison");
    let last = order(&proxy, "three");
    eventually("the delivery", || is_in_state(&proxy, &last, "done"));
}

/// The store is opened at the start only. Until then nothing is read that could not be stored.
#[test]
fn a_store_that_is_added_while_the_process_runs_refuses_or_sends_on() {
    let (service, store) = (Service::start(), tempfile::tempdir().unwrap());
    let text = |route: &str| config(store.path(), service.address(), QUEUE, route);
    let proxy =
        Proxy::start(format!("[[upstream]]\nname = \"payments\"\nendpoints = [\"{}\"]\n", service.address()));
    proxy.reconfigure(&text(", when = \"always\""));
    let mut refused = ask(&proxy, "POST /orders", "", "one");
    eventually("a refusal", || {
        refused = ask(&proxy, "POST /orders", "", "one");
        refused.status() == 503
    });
    assert_eq!(json(&refused)["cause"].as_str(), Some("store_failed"));
    for route in [", when = \"unavailable\"", ""] {
        proxy.reconfigure(&text(route));
        eventually("the service", || ask(&proxy, "POST /orders", ASYNC, "two").status() == 200);
    }
}
