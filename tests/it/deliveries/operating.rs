//! `outrigger queue` and the admin API on a running sidecar.

use std::process::{Command, Output};

use super::*;
use crate::support::{Launch, binary, eventually};

fn queue(proxy: &Proxy, arguments: &[&str]) -> Output {
    let admin = proxy.admin().to_string();
    Command::new(binary()).arg("queue").args(arguments).args(["--admin", &admin]).output().expect("it runs")
}

#[track_caller]
fn shown(proxy: &Proxy, arguments: &[&str]) -> String {
    let output = queue(proxy, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

#[track_caller]
fn refused(proxy: &Proxy, arguments: &[&str]) -> String {
    let output = queue(proxy, arguments);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}");
    String::from_utf8(output.stderr).expect("text")
}

fn id(location: &str) -> &str {
    location.rsplit('/').next().expect("an ID")
}

#[test]
fn deliveries_are_listed_shown_replayed_and_dropped() {
    let (service, store) = (Service::start(), tempfile::tempdir().unwrap());
    let proxy = Proxy::start(config(store.path(), service.address(), QUEUE, ""));
    let [done, dead] = ["one", "poison Canary"].map(|body| order(&proxy, body));
    eventually("the ends", || is_in_state(&proxy, &done, "done") && is_in_state(&proxy, &dead, "dead"));
    let listed = |arguments: &[&str]| {
        let text = shown(&proxy, arguments);
        [&done, &dead].map(|location| text.contains(id(location)))
    };
    assert_eq!(listed(&["ls"]), [true, true]);
    assert_eq!(listed(&["ls", "--dead"]), [false, true]);
    assert_eq!(listed(&["ls", "--reason", "permanent", "--queue", "orders"]), [false, true]);
    assert_eq!(listed(&["ls", "--older", "1h"]), [false, false]);
    let first = shown(&proxy, &["ls", "--json"]);
    let first: Value = serde_json::from_str(first.lines().next().expect("a line")).expect("JSON");
    assert_eq!((first["id"].as_str(), first["state"].as_str()), (Some(id(&done)), Some("done")));

    let text = shown(&proxy, &["show", id(&dead)]);
    for part in ["dead (permanent)", "attempts    1", "POST http://payments/orders", "response 422"] {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert!(!text.contains("Canary"), "{text}");
    assert!(shown(&proxy, &["show", id(&dead), "--body"]).contains("poison Canary"));
    assert!(refused(&proxy, &["show", "01ARYZ6S41ZZZZZZZZZZZZZZZZ"]).contains("no such delivery"));

    // Replayed, it is attempted again, and is a dead letter again.
    assert!(shown(&proxy, &["replay", id(&dead)]).contains("1 queued again"));
    eventually("the second attempt", || service.received().len() == 3);
    eventually("its end", || is_in_state(&proxy, &dead, "dead"));
    assert!(refused(&proxy, &["replay", id(&done)]).contains("is done"));
    assert!(shown(&proxy, &["replay", "--all", "--rate", "10/s"]).contains("1 queued again"));
    eventually("the third attempt", || service.received().len() == 4);
    eventually("its end", || is_in_state(&proxy, &dead, "dead"));
    assert!(shown(&proxy, &["drop", id(&dead)]).contains("was dead, deleted"));
    assert_eq!(ask(&proxy, &format!("GET {dead}"), "", "").status(), 410);
}

#[test]
fn a_paused_queue_accepts_and_delivers_nothing_until_it_is_resumed() {
    let (service, store) = (Service::start(), tempfile::tempdir().unwrap());
    let text = config(store.path(), service.address(), QUEUE, "");
    let mut proxy = Proxy::start(text.clone());
    assert!(shown(&proxy, &["pause", "orders"]).contains("paused"));
    let paused = |proxy: &Proxy| {
        let request = "GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n";
        json(&RawClient::connect(proxy.admin()).ask(request))["queues"][0]["paused"] == "operator"
    };
    eventually("the pause", || paused(&proxy));
    let location = order(&proxy, "one");
    let dropped = order(&proxy, "two");
    assert!(shown(&proxy, &["drop", id(&dropped)]).contains("was queued, a dead letter now"));
    assert_eq!(state(&proxy, &dropped)["reason"], "operator");
    // Also across a restart.
    proxy.signal("TERM");
    proxy.wait();
    let proxy = Proxy::start(text);
    eventually("the pause", || paused(&proxy));
    assert!(is_in_state(&proxy, &location, "queued"));
    shown(&proxy, &["resume", "orders"]);
    eventually("the delivery", || is_in_state(&proxy, &location, "done"));
    assert_eq!(service.bodies(), ["one"]);
    assert!(refused(&proxy, &["pause", "mails"]).contains("there is no queue `mails`; configured: orders"));
}

#[test]
fn deliveries_need_the_token() {
    let (service, store) = (Service::start(), tempfile::tempdir().unwrap());
    let proxy = Proxy::start(config(store.path(), service.address(), QUEUE, ""));
    let location = order(&proxy, "one");
    let send = |line: String| {
        RawClient::connect(proxy.admin())
            .ask(format!("{line} HTTP/1.1\r\nHost: localhost\r\ncontent-length: 0\r\n\r\n"))
            .status()
    };
    for line in [
        "GET /deliveries".to_owned(),
        format!("GET /deliveries/{}?body=1", id(&location)),
        "POST /deliveries/replay".to_owned(),
        "POST /deliveries/drop".to_owned(),
        "POST /queues/orders/pause".to_owned(),
        "POST /queues/orders/resume".to_owned(),
    ] {
        assert_eq!(send(line.clone()), 401, "{line}");
    }
    let without = Proxy::start("");
    assert!(refused(&without, &["ls"]).contains("no [store]"));
}

/// One line for the request that was accepted, one for each attempt, and one for the end, with the same ID.
#[test]
fn the_access_log_follows_a_delivery() {
    let (service, store) = (Service::start(), tempfile::tempdir().unwrap());
    let text = config(store.path(), service.address(), QUEUE, "") + "[telemetry]\naccess_log = \"all\"\n";
    let proxy = Launch::new(text).start();
    let (busy, poison) = (order(&proxy, "busy"), order(&proxy, "poison"));
    let lines = |location: &str| -> Vec<Value> {
        let all = proxy.stdout();
        let parsed = all.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        parsed.filter(|line| line["delivery"] == id(location)).collect()
    };
    eventually("four lines", || lines(&busy).len() == 4);
    let of_busy = lines(&busy);
    let statuses: Vec<&Value> = of_busy.iter().map(|line| &line["status"]).collect();
    assert_eq!(statuses, [202, 503, 200, 200], "{of_busy:#?}");
    let end = &of_busy[3];
    assert_eq!(
        (&end["queue"], &end["state"], &end["attempts"]),
        (&"orders".into(), &"done".into(), &2.into())
    );
    eventually("three lines", || lines(&poison).len() == 3);
    let end = &lines(&poison)[2];
    assert_eq!(
        (&end["state"], &end["reason"], &end["status"]),
        (&"dead".into(), &"permanent".into(), &422.into())
    );
}
