//! When deliveries are attempted, and what becomes of them.

use super::*;
use crate::support::eventually;

#[test]
fn a_service_that_comes_back_gets_everything_once_and_no_attempt_was_spent() {
    let (store, address) = (tempfile::tempdir().unwrap(), later_address());
    let proxy = Proxy::start(config(store.path(), address, QUEUE, "") + "breaker = false\n");
    let orders: Vec<String> = (0..20).map(|number| order(&proxy, &format!("order {number:02}"))).collect();
    eventually("the pause", || proxy.stderr().contains("the queue is paused"));
    for location in &orders {
        let state = state(&proxy, location);
        assert_eq!((&state["attempts"], &state["reason"]), (&Value::from(0), &Value::Null), "{state}");
        assert!(["queued", "delivering"].contains(&state["state"].as_str().unwrap()), "{state}");
    }
    let service = Service::start_at(address, Duration::ZERO);
    let expected: Vec<String> = (0..20).map(|number| format!("order {number:02}")).collect();
    for location in &orders {
        eventually("the delivery", || is_in_state(&proxy, location, "done"));
        assert_eq!(state(&proxy, location)["attempts"], 1);
    }
    assert_eq!(service.bodies(), expected);
    let mut keys: Vec<String> =
        service.received().iter().map(|one| one.field("idempotency-key").to_owned()).collect();
    keys.sort();
    keys.dedup();
    assert_eq!(keys.len(), 20);
}

#[test]
fn what_was_accepted_survives_a_killed_proxy() {
    let (store, address) = (tempfile::tempdir().unwrap(), later_address());
    let text = config(store.path(), address, QUEUE, "");
    let mut proxy = Proxy::start(text.clone());
    let orders: Vec<String> = (0..5).map(|number| order(&proxy, &format!("order {number}"))).collect();
    proxy.signal("KILL");
    proxy.wait();
    let service = Service::start_at(address, Duration::ZERO);
    let proxy = Proxy::start(text);
    for location in &orders {
        eventually("the delivery", || is_in_state(&proxy, location, "done"));
    }
    assert_eq!(service.bodies(), ["order 0", "order 1", "order 2", "order 3", "order 4"]);
}

#[test]
fn poison_ends_as_a_dead_letter_and_its_neighbours_pass() {
    let (service, store) = (Service::start(), tempfile::tempdir().unwrap());
    let queue = format!("{QUEUE}concurrency = 1\n");
    let proxy = Proxy::start(config(store.path(), service.address(), &queue, ""));
    let orders = ["one", "poison", "busy", "two"].map(|body| order(&proxy, body));
    for (location, expected) in orders.iter().zip(["done", "dead", "done", "done"]) {
        eventually("the end of the delivery", || is_in_state(&proxy, location, expected));
    }
    let dead = state(&proxy, &orders[1]);
    assert_eq!((&dead["reason"], &dead["attempts"]), (&"permanent".into(), &Value::from(1)), "{dead}");
    assert_eq!(state(&proxy, &orders[2])["attempts"], 2, "503 without Retry-After spends an attempt");
    let busy: Vec<String> = service
        .received()
        .iter()
        .filter(|one| one.body == b"busy")
        .map(|one| one.field("x-outrigger-attempt").to_owned())
        .collect();
    assert_eq!(busy, ["1", "2"]);
    let stored = ask(&proxy, &format!("GET {}/response", orders[1]), "", "");
    assert_eq!((stored.status(), stored.text().as_str()), (422, "seen poison"));
}

#[test]
fn five_workers_serve_a_hundred_clients() {
    let service = Service::start_at(([127, 0, 0, 1], 0).into(), Duration::from_millis(5));
    let store = tempfile::tempdir().unwrap();
    let text = config(store.path(), service.address(), QUEUE, "") + "[runtime]\nworkers = 2\n";
    let proxy = Proxy::start(text);
    let outbound = proxy.outbound();
    let clients: Vec<_> = (0..100)
        .map(|number| {
            std::thread::spawn(move || ask_at(outbound, "POST /orders", ASYNC, &format!("{number}")).status())
        })
        .collect();
    for client in clients {
        assert_eq!(client.join().unwrap(), 202);
    }
    eventually("all deliveries", || service.received().len() == 100);
    assert_eq!(service.most_at_once.load(Ordering::SeqCst), 5);
}

#[test]
fn a_delivery_expires() {
    let store = tempfile::tempdir().unwrap();
    let queue = format!("{QUEUE}expires = \"100ms\"\n");
    let proxy = Proxy::start(config(store.path(), crate::support::refusing_address(), &queue, ""));
    let location = order(&proxy, "late");
    eventually("the end", || is_in_state(&proxy, &location, "dead"));
    let state = state(&proxy, &location);
    assert_eq!((&state["reason"], &state["attempts"]), (&"expired".into(), &Value::from(0)));
}

#[test]
fn deliveries_of_one_order_follow_each_other() {
    let service = Service::start_at(([127, 0, 0, 1], 0).into(), Duration::from_millis(5));
    let store = tempfile::tempdir().unwrap();
    let queue = format!("{QUEUE}order = \"header:x-user\"\n");
    let proxy = Proxy::start(config(store.path(), service.address(), &queue, ""));
    for number in 0..12 {
        let user = format!("Prefer: respond-async\r\nx-user: {}\r\n", number % 2);
        assert_eq!(ask(&proxy, "POST /orders", &user, &format!("{number:02}")).status(), 202);
    }
    eventually("all deliveries", || service.received().len() == 12);
    for user in ["0", "1"] {
        let of_user = service.received().into_iter().filter(|one| one.field("x-user") == user);
        let bodies: Vec<Vec<u8>> = of_user.map(|one| one.body).collect();
        assert!(bodies.is_sorted(), "{user}: {bodies:?}");
    }
    assert!(service.most_at_once.load(Ordering::SeqCst) <= 2);
}
