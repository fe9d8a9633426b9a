//! A disk on which no sync succeeds for a while, under a running proxy.

use std::process::{Child, Command, Stdio};

use super::*;
use crate::support::{eventually, has_tool, tool};

/// Fails every sync of the process until it is dropped.
struct FailingSyncs(Child);

impl FailingSyncs {
    fn of(proxy: &Proxy) -> Self {
        let strace = tool("strace").expect("strace");
        let pid = proxy.pid().to_string();
        let arguments = [
            "-f",
            "-e",
            "trace=fdatasync,fsync",
            "-e",
            "inject=fdatasync,fsync:error=EIO",
            "-o",
            "/dev/null",
            "-p",
        ];
        let child =
            Command::new(strace).args(arguments).arg(&pid).stderr(Stdio::null()).spawn().expect("strace");
        let failing = Self(child);
        eventually("strace to attach", || {
            let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("the threads");
            tasks.flatten().all(|task| {
                let status = std::fs::read_to_string(task.path().join("status")).unwrap_or_default();
                status.lines().any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"))
            })
        });
        failing
    }
}

impl Drop for FailingSyncs {
    fn drop(&mut self) {
        crate::support::signal(self.0.id(), "TERM");
        let _ = self.0.wait();
    }
}

#[test]
fn while_the_store_fails_nothing_is_accepted_or_sent_and_then_it_goes_on() {
    if !has_tool(&["strace"]) {
        return;
    }
    let (store, address) = (tempfile::tempdir().unwrap(), later_address());
    let proxy = Proxy::start(config(store.path(), address, QUEUE, "") + "breaker = false\n");
    let location = order(&proxy, "kept");
    eventually("the pause", || proxy.stderr().contains("the queue is paused"));
    let admin = |path: &str| {
        RawClient::connect(proxy.admin()).ask(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"))
    };
    let failing = FailingSyncs::of(&proxy);
    let refused = ask(&proxy, "POST /orders", ASYNC, "refused");
    assert_eq!((refused.status(), json(&refused)["cause"].as_str()), (503, Some("store_failed")));
    assert!(refused.field("retry-after").is_some());
    assert_eq!(admin("/ready").status(), 503, "{}", proxy.stderr());
    assert!(admin("/metrics").text().contains("\noutrigger_store_failed 1\n"));
    let service = Service::start_at(address, Duration::ZERO);
    // Each time after a second or more, in which a delivery could have begun.
    eventually("attempts to open the store", || proxy.stderr().matches("cannot be opened").count() >= 2);
    assert_eq!(service.bodies(), Vec::<String>::new());
    drop(failing);
    eventually("the delivery", || {
        ask(&proxy, &format!("GET {location}"), "", "").text().contains("\"done\"")
    });
    assert_eq!(admin("/ready").status(), 200);
    assert_eq!(service.bodies(), ["kept"], "what was refused never comes");
    order(&proxy, "accepted again");
    eventually("the delivery", || service.bodies() == ["accepted again", "kept"]);
}
