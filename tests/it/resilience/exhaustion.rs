//! A proxy without free descriptors, ports or routes: it reports that, counts it against no upstream, and still
//! responds.

use std::{fs, net::SocketAddr, time::Duration};

use super::{ReceivedRequest, Reply, Service, assert_cause, metric, refused, request, status, upstream};
use crate::support::{
    Launch, Proxy, RawClient, Upstream, eventually,
    netns::{Lan, Pod},
    strict::Message,
    text,
};

/// The open-file limit of a process, from /proc.
fn open_files(pid: u32) -> (String, String) {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).expect("/proc");
    let line = limits.lines().find(|line| line.starts_with("Max open files")).expect("the line");
    let words: Vec<&str> = line.split_whitespace().collect();
    (words[3].to_owned(), words[4].to_owned())
}

/// A shell that sets an open-file limit and then execs the binary. `flag`: `-n` for both limits, `-Sn` for the soft
/// one.
fn limited(config: String, flag: &str, files: u32) -> Launch {
    let script = format!("ulimit {flag} {files}; exec \"$@\"");
    Launch::new(config).wrapped(["sh", "-c", &script, "sh"])
}

#[track_caller]
fn assert_unblamed(proxy: &Proxy) {
    let status = status(proxy);
    let up = &status["upstreams"][0];
    assert_eq!(up["breaker"]["state"], "closed", "{up}");
    let states = up["endpoints"].as_array().expect("endpoints").iter();
    assert!(states.clone().all(|endpoint| endpoint["state"] == "healthy"), "{up}");
}

#[test]
fn the_soft_limit_of_open_files_is_raised_but_not_for_the_service() {
    let proxy = limited(String::new(), "-Sn", 200)
        .service(["sh", "-c", "ulimit -Sn > soft.txt; mv soft.txt done.txt; exec sleep 60"])
        .start();
    // It is lowered while the service is started.
    eventually("the soft limit to be raised", || {
        let (soft, hard) = open_files(proxy.pid());
        soft == hard && soft != "200"
    });
    let done = proxy.directory().join("done.txt");
    eventually("the service to tell its limit", || done.exists());
    assert_eq!(fs::read_to_string(done).expect("text").trim(), "200");
}

/// Clients that hold all descriptors: a request that needs a new connection gets 503, `/live` and `/metrics` respond,
/// no endpoint is counted against, and all recovers when the clients disconnect.
#[test]
fn descriptor_exhaustion_is_reported_and_counts_against_no_upstream() {
    let hang_or_not = |seen: &ReceivedRequest, _| match seen.path.as_str() {
        "/hang" => Reply::Never,
        _ => 200.into(),
    };
    let (service, second) = (Service::new(hang_or_not), Service::new(hang_or_not));
    // A breaker and an outlier detection that one failure would trip.
    let keys = "retry = false\nbreaker = { consecutive_failures = 3 }\noutlier = { consecutive_failures = 1 }\n\
                timeout = \"60s\"";
    let proxy = limited(upstream("up", &[service.address(), second.address()], keys), "-n", 96).start();
    let hang = "GET /hang HTTP/1.1\r\nHost: up\r\n\r\n";
    let mut failed: Option<Message> = None;
    let mut held = Vec::new();
    for _ in 0..200 {
        let mut client = RawClient::connect(proxy.outbound()).with_read_timeout(Duration::from_millis(100));
        client.send(hang);
        if let Some(response) = client.response().expect("HTTP") {
            failed = Some(response);
            break;
        }
        held.push(client);
    }
    let failed = failed.expect("a request that found no descriptor");
    assert_cause(&failed, 503, "local_resource");
    assert_eq!(failed.field("retry-after"), Some("1"), "{failed:?}");
    let proxy_status = failed.field("proxy-status").unwrap_or_default();
    assert!(proxy_status.contains("error=proxy_internal_error"), "{failed:?}");
    assert!(failed.text().contains("no file descriptor left in this process"), "{failed:?}");

    // As many more as the kernel takes: accepting pauses, and the admin server still responds.
    let more: Vec<RawClient> = (0..60).map(|_| RawClient::connect(proxy.outbound())).collect();
    eventually("accepting to stop", || proxy.stderr().contains("connections are not accepted"));
    for path in ["/live", "/ready", "/metrics", "/status"] {
        let asked = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        let response = RawClient::connect(proxy.admin()).ask(asked);
        assert_eq!(response.status(), 200, "{path}: {response:?}");
    }
    assert!(refused(&proxy, "local_resource") > 0);
    assert_unblamed(&proxy);
    assert_eq!(metric(&proxy, "outrigger_breaker_transitions_total{upstream=\"up\",to=\"open\"}"), 0);

    drop((held, more));
    eventually("requests to be served again", || {
        let mut client = RawClient::connect(proxy.outbound()).with_read_timeout(Duration::from_secs(1));
        client.send(request("GET", ""));
        client.response().is_ok_and(|response| response.is_some_and(|response| response.status() == 200))
    });
}

/// A proxy in a pod, with listeners that other pods reach. Its ports are outside the ephemeral range.
fn in_pod(pod: &Pod, upstreams: &str) -> Launch {
    let config = format!(
        "[inbound]\nlisten = \"0.0.0.0:4143\"\n[outbound]\nlisten = \"0.0.0.0:4140\"\n[admin]\nlisten = \"0.0.0.0:4191\"\n{upstreams}"
    );
    Launch::new(config).wrapped(pod.as_user(0))
}

fn at(pod: &Pod, bound: SocketAddr) -> SocketAddr {
    (pod.v4, bound.port()).into()
}

#[track_caller]
fn status_from(client: &Pod, proxy: &Proxy, pod: &Pod) -> serde_json::Value {
    let admin = at(pod, proxy.admin());
    let response = client.run(|| {
        RawClient::connect(admin).ask("GET /status HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    });
    serde_json::from_str(&response.text()).expect("JSON")
}

/// Two local ports for two connections; a third request gets none.
#[test]
fn port_exhaustion_is_reported_and_counts_against_no_upstream() {
    let Some(lan) = Lan::new() else { return };
    let (pod, server, client) = (lan.pod(), lan.pod(), lan.pod());
    let set = pod.command(0, &["sysctl", "-qw", "net.ipv4.ip_local_port_range=40000 40001"]);
    assert!(set.status.success(), "{set:?}");
    let service = server.run(|| {
        let hang = |_, _| async {
            tokio::time::sleep(Duration::from_secs(60)).await;
            text("late")
        };
        Upstream::at((server.v4, 8080).into(), false, hang)
    });
    let keys = "retry = false\ntimeout = \"60s\"\nbreaker = { consecutive_failures = 3 }";
    let proxy = in_pod(&pod, &upstream("up", &[service.address()], keys)).start();
    let outbound = at(&pod, proxy.outbound());
    let ask = |patience: Duration| {
        client.run(|| {
            let mut asking = RawClient::connect(outbound).with_read_timeout(patience);
            asking.send(request("GET", ""));
            let response = asking.response().expect("HTTP");
            (asking, response)
        })
    };
    let (_first, none) = ask(Duration::from_millis(300));
    let (_second, none_either) = ask(Duration::from_millis(300));
    assert!(none.is_none() && none_either.is_none(), "both wait: {none:?} {none_either:?}");
    for _ in 0..12 {
        let (_, response) = ask(Duration::from_secs(10));
        let response = response.expect("a response");
        assert_cause(&response, 503, "local_resource");
        assert!(response.text().contains("no local port"), "{response:?}");
    }
    let status = status_from(&client, &proxy, &pod);
    let up = &status["upstreams"][0];
    assert_eq!(
        (&up["breaker"]["state"], &up["endpoints"][0]["state"]),
        (&"closed".into(), &"healthy".into())
    );
}

/// Without a route: requests, health checks and DNS report the same, and an endpoint with a route serves all requests.
#[test]
fn a_missing_route_is_reported_by_requests_health_checks_and_dns() {
    let Some(lan) = Lan::new() else { return };
    let (pod, server, client) = (lan.pod(), lan.pod(), lan.pod());
    let gone = pod.command(0, &["ip", "route", "del", "default"]);
    assert!(gone.status.success(), "{gone:?}");
    let service = server.run(|| Upstream::at((server.v4, 8080).into(), false, |_, _| async { text("well") }));
    let far: SocketAddr = "10.99.0.1:80".parse().expect("an address");
    let checked = "health = { tcp = true, interval = \"20ms\", timeout = \"1s\" }";
    let upstreams = upstream("up", &[far], checked)
        + &upstream(
            "both",
            &[far, service.address()],
            "retry = { backoff = { base = \"1ms\" }, budget = { ratio = 1.0 } }",
        )
        + "[[upstream]]\nname = \"named\"\nendpoints = \"dns://service.example:80\"\n";
    let proxy = in_pod(&pod, &upstreams).env("OUTRIGGER_DNS", "10.99.0.53").start();
    let outbound = at(&pod, proxy.outbound());
    let ask = |host: &str| {
        let request = format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n");
        client.run(|| RawClient::connect(outbound).ask(request))
    };
    for _ in 0..12 {
        let response = ask("up");
        assert_cause(&response, 503, "local_resource");
        assert!(response.text().contains("no route"), "{response:?}");
    }
    for _ in 0..20 {
        assert_eq!(ask("both").text(), "well");
    }
    assert_cause(&ask("named"), 503, "local_resource");
    eventually("checks that are not made", || proxy.stderr().matches("health check not made").count() > 3);
    let status = status_from(&client, &proxy, &pod);
    for upstream in status["upstreams"].as_array().expect("upstreams").iter().take(2) {
        assert_eq!(upstream["breaker"]["state"], "closed", "{upstream}");
        assert_eq!(upstream["endpoints"][0]["state"], "healthy", "{upstream}");
    }
}

/// A file that cannot be opened for lack of descriptors is not invalid: the reload says what is missing, and is
/// repeated once it can succeed.
#[test]
fn a_reload_without_free_descriptors_is_reported_and_repeated() {
    let service = Service::new(|_, _| 200);
    let proxy = Proxy::start(upstream("up", &[service.address()], ""));
    let pid = proxy.pid().to_string();
    // Fewer than are open: nothing can be opened any more.
    let limit = |files: &str| {
        let set = std::process::Command::new("prlimit")
            .args(["--pid", &pid, &format!("--nofile={files}:")])
            .status();
        assert!(set.expect("prlimit").success());
    };
    if !crate::support::has_tool(&["prlimit"]) {
        return;
    }
    limit("3");
    proxy.reconfigure(&upstream("up", &[service.address()], "timeout = \"3s\""));
    eventually("the reload to say so", || proxy.stderr().contains("local_resource: no file descriptor left"));
    limit("1024");
    let reloaded =
        || status(&proxy)["config"]["reloads"] == 1 && status(&proxy)["config"]["rejected"].is_null();
    eventually("the reload to be made", reloaded);
}
