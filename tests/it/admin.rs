//! What an operator sees and sets: `/status`, `/metrics`, breaker overrides.

use std::{
    io::Write,
    process::{Command, Output, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use http::StatusCode;
use serde_json::Value;

use crate::support::{Proxy, RawClient, Upstream, binary, eventually, peer_script, python_with, text};

const GET: &str = "GET / HTTP/1.1\r\nHost: up\r\n\r\n";

/// An upstream with two endpoints; the second fails while `failing` is set.
struct Pair {
    proxy: Proxy,
    ill: Arc<AtomicBool>,
    requests: Arc<AtomicUsize>,
    _servers: [Upstream; 2],
}

fn pair() -> Pair {
    let (ill, requests) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let (fails, count) = (Arc::clone(&ill), Arc::clone(&requests));
    let well = Upstream::http1(move |_| {
        count.fetch_add(1, Ordering::Relaxed);
        async { text("well") }
    });
    let other = Upstream::http1(move |_| {
        let fails = fails.load(Ordering::Relaxed);
        async move {
            let mut response = text("other");
            if fails {
                *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
            }
            response
        }
    });
    let config = format!(
        "[[upstream]]\nname = \"up\"\nendpoints = [\"{}\", \"{}\"]\nlisten = \"127.0.0.1:0\"\n\
         balance = \"round-robin\"\noutlier = {{ consecutive_failures = 3, eject_for = {{ base = \"10m\", max = \"10m\" }} }}\n\
         [[upstream]]\nname = \"bare\"\nendpoints = [\"{}\"]\nbreaker = false\n",
        well.address(),
        other.address(),
        well.address(),
    );
    Pair { proxy: Proxy::start(config), ill, requests, _servers: [well, other] }
}

fn read(proxy: &Proxy, path: &str) -> String {
    let mut client = RawClient::connect(proxy.admin());
    let response = client.ask(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"));
    assert_eq!(response.status(), 200, "{response:?}");
    response.text()
}

fn status(proxy: &Proxy) -> Value {
    serde_json::from_str(&read(proxy, "/status")).expect("JSON")
}

/// `outrigger …` against the proxy's admin server.
fn command(proxy: &Proxy, words: &[&str]) -> Output {
    let mut command = Command::new(binary());
    command.args(words).arg("--admin").arg(proxy.admin().to_string());
    command.env_remove("OUTRIGGER_ADMIN_TOKEN_FILE").output().expect("it runs")
}

fn said(output: &Output) -> String {
    let streams = [&output.stdout, &output.stderr];
    streams.map(|stream| String::from_utf8_lossy(stream).into_owned()).concat()
}

#[test]
fn a_failing_endpoint_is_shown_as_ejected_and_its_retries_are_counted() {
    let pair = pair();
    pair.ill.store(true, Ordering::Relaxed);
    let mut client = RawClient::connect(pair.proxy.outbound());
    eventually("the ejection", || {
        assert_eq!(client.ask(GET).text(), "well", "a failure reached the client");
        let up = &status(&pair.proxy)["upstreams"][0];
        up["endpoints"]
            .as_array()
            .is_some_and(|all| all.iter().any(|endpoint| endpoint["state"] == "ejected"))
    });
    let status = status(&pair.proxy);
    let up = &status["upstreams"][0];
    let ejected = up["endpoints"].as_array().and_then(|all| all.iter().find(|e| e["state"] == "ejected"));
    assert!(ejected.and_then(|e| e["until_in_seconds"].as_u64()).is_some_and(|left| left > 60), "{up}");
    assert!(up["retries"]["sent"].as_u64() >= Some(3), "{up}");
    assert!(up["budget"]["available"].as_u64() < Some(10), "{up}");
    assert_eq!(up["limits"]["max_requests"], 1024, "{up}");
    assert!(up["limits"]["connections"].as_u64() >= Some(1), "{up}");
    assert_eq!(up["breaker"]["state"], "closed", "{up}");
    let shown = said(&command(&pair.proxy, &["status"]));
    for part in ["ejected, restored in ", "ENTRY POINT", "sent "] {
        assert!(shown.contains(part), "{part} is not in\n{shown}");
    }
    let metrics = read(&pair.proxy, "/metrics");
    assert!(metrics.contains("outrigger_endpoints{upstream=\"up\",state=\"ejected\"} 1"), "{metrics}");
}

#[test]
fn a_breaker_override_is_set_by_hand_and_expires() {
    let pair = pair();
    let mut client = RawClient::connect(pair.proxy.outbound());
    assert_eq!(client.ask(GET).status(), 200);
    let set = command(&pair.proxy, &["set", "breaker", "up", "open"]);
    assert!(set.status.success() && said(&set).contains("up: open for 1h"), "{}", said(&set));
    let before = pair.requests.load(Ordering::Relaxed);
    let refused = client.ask(GET);
    assert_eq!(refused.status(), 503, "{refused:?}");
    assert!(refused.text().contains("set by hand"), "{refused:?}");
    assert_eq!(pair.requests.load(Ordering::Relaxed), before, "nothing is sent");
    let breaker = &status(&pair.proxy)["upstreams"][0]["breaker"];
    assert_eq!((&breaker["state"], &breaker["mode"]), (&"open".into(), &"open".into()), "{breaker}");
    assert!(breaker["until_in_seconds"].as_u64().is_some_and(|left| left > 3000), "{breaker}");
    assert!(read(&pair.proxy, "/metrics").contains("outrigger_breaker_state{upstream=\"up\"} 2"));

    assert!(command(&pair.proxy, &["set", "breaker", "up", "auto"]).status.success());
    assert_eq!(client.ask(GET).status(), 200);
    let breaker = &status(&pair.proxy)["upstreams"][0]["breaker"];
    assert_eq!(breaker["why"], "set back to auto", "{breaker}");
    assert!(command(&pair.proxy, &["set", "breaker", "up", "open", "--for", "1s"]).status.success());
    // No request arrives: the override expires by time alone.
    eventually("the fall-back", || status(&pair.proxy)["upstreams"][0]["breaker"]["mode"] == "auto");
    assert_eq!(client.ask(GET).status(), 200);
    let metrics = read(&pair.proxy, "/metrics");
    let opened = "outrigger_breaker_transitions_total{upstream=\"up\",to=\"open\"} 2";
    assert!(metrics.contains(opened), "{metrics}");
}

#[test]
fn an_invalid_admin_request_is_answered_with_the_valid_ones() {
    let pair = pair();
    for (words, remedy) in [
        (&["set", "breaker", "down", "open"][..], "available: up, bare"),
        (&["set", "breaker", "bare", "open"], "breaker = false"),
        (&["set", "breaker", "up", "open", "--for", "0s"], "more than 0"),
        (&["set", "breaker", "up", "auto", "--for", "1h"], "omit `for`"),
        (&["set", "breaker", "up/../down", "open"], "outrigger status"),
    ] {
        let output = command(&pair.proxy, words);
        assert!(!output.status.success() && said(&output).contains(remedy), "{words:?}: {}", said(&output));
    }
    let file = pair.proxy.ready()["admin_token_file"].as_str().expect("a token file").to_owned();
    let token = std::fs::read_to_string(file).expect("readable");
    let post = |token: &str, body: &str| {
        let request = format!(
            "POST /upstreams/up/breaker HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\nContent-Length: {}\r\n\r\n{body}",
            token.trim(),
            body.len()
        );
        RawClient::connect(pair.proxy.admin()).ask(request)
    };
    assert_eq!(post("wrong", r#"{"state":"open"}"#).status(), 401);
    for body in ["", "open", r#"{"state":"ajar"}"#, r#"{"state":"open","untill":"1h"}"#, r#"{"for":"1h"}"#] {
        let response = post(&token, body);
        assert_eq!(response.status(), 400, "{body}: {response:?}");
        assert!(response.text().contains("send e.g."), "{body}: {response:?}");
    }
    assert_eq!(post(&token, r#"{"state":"closed","for":"90s"}"#).status(), 200);
}

#[test]
fn every_entry_point_is_counted_and_unknown_hosts_are_shown() {
    let pair = pair();
    let Pair { proxy, _servers: [server, _], .. } = &pair;
    assert_eq!(RawClient::connect(proxy.outbound()).ask(GET).status(), 200);
    assert_eq!(RawClient::connect(proxy.upstream("up")).ask(GET).status(), 200);
    let by_name = format!("GET http://localhost:{}/ HTTP/1.1\r\nHost: x\r\n\r\n", server.address().port());
    assert_eq!(RawClient::connect(proxy.outbound()).ask(&by_name).status(), 200);
    assert_eq!(RawClient::connect(proxy.outbound()).ask(&by_name).status(), 200);
    let status = status(proxy);
    for (way, count) in [("host", 1), ("listen", 1), ("proxy", 2), ("redirect", 0), ("inbound", 0)] {
        assert_eq!(status["ways"][way]["count"], count, "{way}: {}", status["ways"]);
        assert_eq!(
            status["ways"][way]["last_seconds_ago"].is_null(),
            count == 0,
            "{way}: {}",
            status["ways"]
        );
    }
    let name = format!("localhost:{}", server.address().port());
    let hosts = status["unknown"]["hosts"].as_array().expect("a list");
    assert!(hosts.iter().any(|host| host["name"] == name.as_str()), "{}", status["unknown"]);
    let metrics = read(proxy, "/metrics");
    assert!(metrics.contains("outrigger_breaker_state{upstream=\"other\"} 0"), "{metrics}");
    assert!(!metrics.contains(&name), "an unknown host is a label\n{metrics}");
    assert!(command(proxy, &["set", "breaker", &name, "open", "--for", "5m"]).status.success());
    assert_eq!(RawClient::connect(proxy.outbound()).ask(&by_name).status(), 503);
}

#[test]
fn every_metric_is_documented() {
    let docs = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/telemetry.md");
    let docs = std::fs::read_to_string(docs).expect("docs/telemetry.md");
    let pair = pair();
    RawClient::connect(pair.proxy.outbound()).ask(GET);
    let metrics = read(&pair.proxy, "/metrics");
    let mut exposed = 0;
    for line in metrics.lines().filter(|line| !line.starts_with('#')) {
        let name = line.split(['{', ' ']).next().unwrap_or_default();
        assert!(docs.contains(&format!("`{name}`")), "{name} is not in docs/telemetry.md");
        let labels =
            line.split_once('{').and_then(|(_, rest)| rest.split_once('}')).map_or("", |(labels, _)| labels);
        let row = docs.lines().find(|row| row.contains(&format!("`{name}`"))).unwrap_or_default();
        for label in labels.split("\",").filter_map(|label| label.split_once('=')) {
            assert!(row.contains(&format!("`{}`", label.0)), "label {} of {name} is not in its row", label.0);
        }
        exposed += 1;
    }
    assert!(exposed > 40, "{metrics}");
}

/// The parser of Prometheus' authors accepts every line.
#[test]
fn metrics_are_strict_openmetrics() {
    let Some(python) = python_with("prometheus_client.openmetrics.parser") else { return };
    let pair = pair();
    pair.ill.store(true, Ordering::Relaxed);
    let mut client = RawClient::connect(pair.proxy.outbound());
    for _ in 0..20 {
        client.ask(GET);
    }
    let metrics = read(&pair.proxy, "/metrics");
    let mut reader = Command::new(python);
    reader
        .arg(peer_script("openmetrics.py"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut reader = reader.spawn().expect("it runs");
    reader.stdin.take().expect("piped").write_all(metrics.as_bytes()).expect("it reads");
    let output = reader.wait_with_output().expect("it ends");
    let read = said(&output);
    assert!(output.status.success(), "{read}\n{metrics}");
    for sample in
        ["outrigger_calls_total{way=\"host\"} 20", "outrigger_endpoints{upstream=\"up\",state=\"healthy\"} "]
    {
        assert!(read.contains(sample), "{sample} is not in\n{read}");
    }
}

#[test]
fn the_admin_token_changes_with_every_start_and_is_removed_at_exit() {
    let mut one = Proxy::start("");
    let file = one.ready()["admin_token_file"].as_str().expect("a token file").to_owned();
    assert_eq!(status(&one)["listeners"]["admin_token_file"], file.as_str());
    assert!(command(&one, &["set", "log", "debug"]).status.success(), "found by itself");
    let port = one.admin().port();
    one.signal("TERM");
    one.wait();
    assert!(!std::path::Path::new(&file).exists(), "it stays behind");
    let again = Proxy::start(format!("[admin]\nlisten = \"127.0.0.1:{port}\"\n"));
    assert_ne!(again.ready()["admin_token_file"], file.as_str());
}

/// For kubelet and Prometheus, which use the pod's address: three read-only pages and nothing else.
#[test]
fn the_probe_port_serves_three_pages_only() {
    let proxy = Proxy::start("[admin]\nprobe_listen = \"127.0.0.1:0\"\n");
    let probe: std::net::SocketAddr =
        status(&proxy)["listeners"]["probe"].as_str().expect("bound").parse().expect("an address");
    let ask = |method: &str, path: &str| {
        let request = format!("{method} {path} HTTP/1.1\r\nHost: 10.1.2.3:4192\r\nContent-Length: 0\r\n\r\n");
        RawClient::connect(probe).ask(request)
    };
    assert_eq!(ask("GET", "/live").status(), 200);
    eventually("/ready", || ask("GET", "/ready").status() == 200);
    let metrics = ask("GET", "/metrics");
    assert!(metrics.status() == 200 && metrics.text().contains("outrigger_build_info"), "{metrics:?}");
    for path in
        ["/", "/status", "/config", "/requests", "/log", "/drain", "/live/", "//live", "/metrics/../status"]
    {
        assert_eq!(ask("GET", path).status(), 404, "{path}");
    }
    for (method, path) in [
        ("POST", "/drain"),
        ("PUT", "/log"),
        ("POST", "/upstreams/up/breaker"),
        ("POST", "/live"),
        ("DELETE", "/metrics"),
    ] {
        let response = ask(method, path);
        assert!(matches!(response.status(), 404 | 405), "{method} {path}: {response:?}");
    }
    assert_eq!(ask("GET", "/ready").status(), 200, "nothing of that drained it");
}

/// Requests for hosts that do not exist or are denied leave no entry among the upstreams; a name that does not exist
/// is reported beside them.
#[test]
fn only_reached_hosts_are_shown() {
    let server = Upstream::http1(|_| async { text("ok") });
    let proxy = Proxy::start("");
    let ask = |host: &str| {
        RawClient::connect(proxy.outbound())
            .ask(format!("GET http://{host}/ HTTP/1.1\r\nHost: {host}\r\n\r\n"))
    };
    let own = format!("localhost:{}", proxy.admin().port());
    for host in ["169.254.169.254", "[fe80::1]:80", &own, "no-such-host.invalid"] {
        assert_eq!(ask(host).status(), 502, "{host}");
    }
    let unknown = &status(&proxy)["unknown"];
    assert_eq!(
        (unknown["known"].as_u64(), unknown["hosts"].as_array().map(Vec::len)),
        (Some(0), Some(0)),
        "{unknown}"
    );
    // An operator still sees that requests name a host that does not exist.
    let lost = &unknown["not_found"];
    assert_eq!(
        (lost["count"].as_u64(), lost["last"].as_array().map(Vec::len)),
        (Some(1), Some(1)),
        "{unknown}"
    );
    assert!(lost["last"][0].as_str().is_some_and(|why| why.contains("no-such-host.invalid")), "{unknown}");
    let host = server.address().to_string();
    assert_eq!(ask(&host).status(), 200);
    let unknown = &status(&proxy)["unknown"];
    assert_eq!(
        (unknown["known"].as_u64(), unknown["hosts"][0]["name"].as_str()),
        (Some(1), Some(&*host)),
        "{unknown}"
    );
}
