//! `outrigger queue` on a store that no process uses, and on one that is in use.

use std::process::{Output, Stdio};

use outrigger::{queue::store::Outcome, resilience::queue::DeadReason};

use super::*;
use crate::support::{binary, eventually, signal};

fn queue(store: &Path, arguments: &[&str]) -> Output {
    let (command, rest) = arguments.split_first().expect("a command");
    Command::new(binary())
        .args(["queue", command, "--store"])
        .arg(store)
        .args(rest)
        .output()
        .expect("it runs")
}

#[track_caller]
fn shown(store: &Path, arguments: &[&str]) -> String {
    let output = queue(store, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

#[track_caller]
fn refused(store: &Path, arguments: &[&str]) -> String {
    let output = queue(store, arguments);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}");
    String::from_utf8(output.stderr).expect("text")
}

/// Three deliveries: pending, dead after its attempts, dead for good.
fn stored(path: &Path) -> [String; 3] {
    block_on(async {
        let opened = open(path);
        let mut ids = Vec::new();
        for body in ["Canary1", "Canary2", "Canary3"] {
            let mut new = new_delivery(body);
            new.request.headers.insert("authorization", "Bearer Canary4".parse().expect("a value"));
            new.request.headers.insert("x-tier", "gold".parse().expect("a value"));
            ids.push(opened.0.accept(new).await.expect("accepted").id);
        }
        for (id, reason) in [(ids[1], DeadReason::Attempts), (ids[2], DeadReason::Permanent)] {
            let outcome = Outcome { status: Some(422), body: b"Canary5".to_vec(), ..Outcome::default() };
            opened.0.settle(id, Verdict::Dead(reason), Some(outcome)).await.expect("settled");
        }
        close(opened);
        [ids[0], ids[1], ids[2]].map(|id| id.to_string())
    })
}

#[test]
fn lists_and_shows_without_secrets() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = directory.path();
    let [pending, attempts, permanent] = stored(store);
    let listed = |arguments: &[&str]| {
        let text = shown(store, arguments);
        [&pending, &attempts, &permanent].map(|id| text.contains(id.as_str()))
    };
    assert_eq!(listed(&["ls"]), [true, true, true]);
    assert_eq!(listed(&["ls", "--dead"]), [false, true, true]);
    assert_eq!(listed(&["ls", "--reason", "permanent"]), [false, false, true]);
    assert_eq!(listed(&["ls", "--older", "1h"]), [false, false, false]);
    assert_eq!(listed(&["ls", "--queue", "orders"]), [true, true, true]);
    assert_eq!(listed(&["ls", "--queue", "mails"]), [false, false, false]);
    let first = shown(store, &["ls", "--json"]);
    let first: serde_json::Value = serde_json::from_str(first.lines().next().expect("a line")).expect("JSON");
    assert_eq!((first["id"].as_str(), first["state"].as_str()), (Some(pending.as_str()), Some("queued")));

    let text = shown(store, &["show", &permanent]);
    for part in [
        "dead (permanent)",
        "attempts    1",
        "POST http://payments/charge?***",
        "x-tier: gold",
        "response 422",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert!(!text.contains("Canary"), "{text}");
    let text = shown(store, &["show", &permanent, "--body"]);
    assert!(text.contains("Canary3") && text.contains("Canary5") && !text.contains("Canary4"), "{text}");
    assert!(refused(store, &["show", "01ARYZ6S41ZZZZZZZZZZZZZZZZ"]).contains("no such delivery"));
}

#[test]
fn replays_and_drops() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = directory.path();
    let [pending, attempts, permanent] = stored(store);
    assert!(refused(store, &["replay", &pending]).contains("is queued"));
    assert!(shown(store, &["replay", "--all", "--reason", "attempts"]).contains("1 queued again"));
    assert!(shown(store, &["show", &attempts]).contains("state       queued"));
    assert!(shown(store, &["drop", &pending, &permanent]).contains("deleted"));
    assert!(shown(store, &["show", &pending]).contains("dead (operator)"));
    assert!(refused(store, &["show", &permanent]).contains("no such delivery"));
    // At a rate: the second a second after the first.
    shown(store, &["drop", &attempts]);
    shown(store, &["replay", "--all", "--rate", "1/s"]);
    let listed = shown(store, &["ls", "--json"]);
    let next =
        |line: &str| serde_json::from_str::<serde_json::Value>(line).expect("JSON")["next"].to_string();
    let next: Vec<String> = listed.lines().map(next).collect();
    assert!(next.len() == 2 && next[0] < next[1], "{listed}");
    let usage = queue(store, &["replay"]);
    assert_eq!(usage.status.code(), Some(2));
}

#[test]
fn a_directory_without_a_store_stays_as_it_is() {
    let directory = tempfile::tempdir().expect("a directory");
    assert!(refused(directory.path(), &["ls"]).contains("no store in"));
    assert_eq!(std::fs::read_dir(directory.path()).expect("readable").count(), 0);
}

#[test]
fn a_store_in_use_is_refused_with_its_owner() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut owner = child("queue::writer", directory.path(), &[])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("it starts");
    let pid = format!("process {} ", owner.id());
    eventually("the owner holds the lock", || {
        std::fs::read_to_string(directory.path().join("lock")).is_ok_and(|text| text.contains(&pid))
    });
    let error = refused(directory.path(), &["ls"]);
    assert!(error.contains(&pid) && error.contains("stop that one"), "{error}");
    // A killed owner leaves no lock behind.
    signal(owner.id(), "KILL");
    owner.wait().expect("it ends");
    shown(directory.path(), &["ls"]);
}
