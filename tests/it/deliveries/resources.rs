//! The resources of a delivery.

use super::*;
use crate::support::{eventually, refusing_address};

#[test]
fn a_queued_delivery_can_be_cancelled_and_a_done_one_cannot() {
    let (store, address) = (tempfile::tempdir().unwrap(), later_address());
    let proxy = Proxy::start(config(store.path(), address, QUEUE, "") + "breaker = false\n");
    let (first, second) = (order(&proxy, "first"), order(&proxy, "second"));
    let cancel = |location: &str| ask(&proxy, &format!("DELETE {location}"), "", "");
    // While it probes, the delivery is under way for a moment.
    eventually("the cancellation", || cancel(&first).status() == 200);
    assert!(is_in_state(&proxy, &first, "cancelled"));
    assert_eq!(cancel(&first).status(), 409);
    let unready = ask(&proxy, &format!("GET {second}/response"), "", "");
    assert_eq!((unready.status(), json(&unready)["cause"].as_str()), (409, Some("delivery_state")));
    let service = Service::start_at(address, Duration::ZERO);
    eventually("the delivery", || is_in_state(&proxy, &second, "done"));
    assert_eq!(service.bodies(), ["second"]);
    assert_eq!(cancel(&second).status(), 409);
}

#[test]
fn unknown_deliveries_are_404_and_forgotten_ones_410() {
    let (service, store) = (Service::start(), tempfile::tempdir().unwrap());
    let queue = format!("{QUEUE}keep_done = \"500ms\"\n");
    let proxy = Proxy::start(config(store.path(), service.address(), &queue, ""));
    let status = |location: &str| ask(&proxy, &format!("GET {location}"), "", "").status();
    // The third is from a time in which nothing is kept any more, and was not issued here.
    let made_up =
        ["01ARZ3NDEKTSV4RRFFQ69G5FAV", "7ZZZZZZZZZZZZZZZZZZZZZZZZZ", "01JE2V7Q8S3W6Z0000000000A1", "x", ""];
    for unknown in made_up {
        assert_eq!(status(&format!("/.well-known/outrigger/deliveries/{unknown}")), 404, "{unknown}");
    }
    let location = order(&proxy, "one");
    eventually("the end of keep_done", || status(&location) == 410);
    assert_eq!(status(&format!("{location}/response")), 410);
}

#[test]
fn other_methods_are_refused() {
    let store = tempfile::tempdir().unwrap();
    let proxy = Proxy::start(config(store.path(), refusing_address(), QUEUE, ""));
    let location = order(&proxy, "one");
    let response = ask(&proxy, &format!("PUT {location}"), "", "");
    assert_eq!((response.status(), response.field("allow")), (405, Some("GET, HEAD, DELETE")));
}

/// What the proxy's metrics and status say.
#[test]
fn metrics_and_status_count_what_happens() {
    let (service, store) = (Service::start(), tempfile::tempdir().unwrap());
    let proxy = Proxy::start(config(store.path(), service.address(), QUEUE, ""));
    let orders = [order(&proxy, "one"), order(&proxy, "poison")];
    eventually("the end", || {
        is_in_state(&proxy, &orders[0], "done") && is_in_state(&proxy, &orders[1], "dead")
    });
    let admin = |path: &str| {
        RawClient::connect(proxy.admin())
            .ask(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"))
            .text()
    };
    let metrics = admin("/metrics");
    for line in [
        "outrigger_queue_messages{queue=\"orders\",state=\"done\"} 1",
        "outrigger_queue_messages{queue=\"orders\",state=\"dead\"} 1",
        "outrigger_queue_messages{queue=\"orders\",state=\"queued\"} 0",
        "outrigger_queue_bytes{queue=\"orders\"} 0",
        "outrigger_queue_accepted_total{queue=\"orders\",outcome=\"accepted\"} 2",
        "outrigger_queue_deliveries_total{queue=\"orders\",outcome=\"done\"} 1",
        "outrigger_queue_deliveries_total{queue=\"orders\",outcome=\"permanent\"} 1",
        "outrigger_store_failed 0",
    ] {
        assert!(metrics.lines().any(|found| found == line), "no `{line}` in\n{metrics}");
    }
    let status: Value = serde_json::from_str(&admin("/status")).unwrap();
    assert_eq!(status["queues"][0]["name"], "orders", "{status}");
    assert_eq!(status["queues"][0]["messages"]["dead"], 1, "{status}");
}
