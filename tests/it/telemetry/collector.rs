//! A collector that is away, refuses, hangs or dies costs spans, and nothing else.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use serde_json::Value;

use super::{get, sidecar};
use crate::support::{Proxy, RawClient, RawServer, Upstream, eventually, free_port, text};

fn read(proxy: &Proxy, path: &str) -> String {
    let mut client = RawClient::connect(proxy.admin());
    client.ask(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")).text()
}

/// What `/status` says of traces.
pub fn traces(proxy: &Proxy) -> Value {
    serde_json::from_str::<Value>(&read(proxy, "/status")).expect("JSON")["traces"].clone()
}

fn count(proxy: &Proxy, outcome: &str) -> u64 {
    traces(proxy)["spans"][outcome].as_u64().expect("a count")
}

/// A small queue, hurried calls: far more spans than can go anywhere.
#[track_caller]
fn loaded(collector: SocketAddr, protocol: &str) -> Proxy {
    let service = Box::leak(Box::new(Upstream::http1(|_| async { text("well") })));
    let telemetry = format!("otlp = \"http://{collector}\"\nprotocol = \"{protocol}\"\nsample = 1.0\n");
    sidecar(service.address(), &telemetry)
        .env("OTEL_BSP_MAX_QUEUE_SIZE", "50")
        .env("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "20")
        .env("OTEL_BSP_SCHEDULE_DELAY", "50")
        .start()
}

/// All calls go well, and none is held up.
#[track_caller]
fn calls_go_on(proxy: &Proxy, calls: usize) {
    let mut client = RawClient::connect(proxy.inbound());
    for _ in 0..calls {
        let answer = client.ask("GET / HTTP/1.1\r\nHost: up\r\n\r\n");
        assert_eq!(answer.status(), 200, "{answer:?}");
    }
}

fn ends_soon(mut proxy: Proxy) {
    let begin = Instant::now();
    proxy.signal("TERM");
    assert!(proxy.wait().success());
    assert!(begin.elapsed() < Duration::from_secs(15), "the end took {:?}", begin.elapsed());
}

#[test]
fn a_collector_that_is_away_costs_spans_only() {
    for protocol in ["grpc", "http"] {
        let proxy = loaded(SocketAddr::from(([127, 0, 0, 1], free_port())), protocol);
        calls_go_on(&proxy, 300);
        eventually("failed spans", || count(&proxy, "failed") > 0);
        let traces = traces(&proxy);
        assert!(traces["last_error"].is_string(), "{traces}");
        assert!(traces["to"].as_str().is_some_and(|to| to.contains("OTLP over")), "{traces}");
        // By a thread of its own.
        eventually("the log", || proxy.stderr().contains("spans could not be exported"));
        ends_soon(proxy);
    }
}

#[test]
fn a_collector_that_hangs_fills_the_queue_and_no_more() {
    for protocol in ["grpc", "http"] {
        // Takes connections and says nothing.
        let hanging = RawServer::start(|stream| {
            let _stream = stream;
            std::thread::park_timeout(Duration::from_secs(120));
        });
        let proxy = loaded(hanging.address(), protocol);
        calls_go_on(&proxy, 300);
        let waiting = traces(&proxy);
        assert!(waiting["waiting"].as_u64().is_some_and(|waiting| waiting <= 50), "{waiting}");
        eventually("dropped spans", || count(&proxy, "queue_full") >= 200);
        let before = proxy.resident_kib();
        calls_go_on(&proxy, 3000);
        let grown = proxy.resident_kib().saturating_sub(before);
        assert!(grown < 8 * 1024, "{grown} KiB more after 3000 calls");
        assert!(read(&proxy, "/metrics").contains("outrigger_spans_total{outcome=\"queue_full\"}"));
        ends_soon(proxy);
    }
}

#[test]
fn a_collector_that_refuses_is_told_of_in_the_log() {
    let refusing = Upstream::http1(|_| async {
        let mut answer = text("no");
        *answer.status_mut() = http::StatusCode::FORBIDDEN;
        answer
    });
    let proxy = loaded(refusing.address(), "http");
    assert_eq!(get(proxy.inbound(), "/", &[]), 200);
    eventually("a failed span", || count(&proxy, "failed") == 1);
    assert!(
        traces(&proxy)["last_error"].as_str().is_some_and(|error| error.contains("403")),
        "{}",
        traces(&proxy)
    );
}

/// Its death is noticed, and so is its return.
#[test]
fn a_collector_that_comes_back_gets_what_is_new() {
    use crate::support::{Daemon, has_tool};
    if !has_tool(&["rotel-agent"]) {
        return;
    }
    let [grpc, http] = [free_port(), free_port()].map(|port| format!("127.0.0.1:{port}"));
    let address: SocketAddr = grpc.parse().expect("an address");
    let start = || {
        let arguments = [
            "start",
            "--otlp-grpc-endpoint",
            &grpc,
            "--otlp-http-endpoint",
            &http,
            "--exporter",
            "blackhole",
        ];
        Daemon::start("rotel-agent", &arguments, &[]).listening(address)
    };
    let collector = start();
    let proxy = loaded(address, "grpc");
    calls_go_on(&proxy, 1);
    eventually("an exported span", || count(&proxy, "exported") == 1);
    drop(collector);
    eventually("a failed span", || {
        calls_go_on(&proxy, 1);
        count(&proxy, "failed") > 0
    });
    let before = count(&proxy, "exported");
    let _collector = start();
    eventually("exported spans again", || {
        calls_go_on(&proxy, 1);
        count(&proxy, "exported") > before
    });
    assert!(traces(&proxy)["last_error"].is_null());
}
