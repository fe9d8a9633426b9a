//! A collector that is down, rejects, hangs or dies loses spans and affects no request.

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

/// The traces part of `/status`.
pub fn traces(proxy: &Proxy) -> Value {
    serde_json::from_str::<Value>(&read(proxy, "/status")).expect("JSON")["traces"].clone()
}

fn count(proxy: &Proxy, outcome: &str) -> u64 {
    traces(proxy)["spans"][outcome].as_u64().expect("a count")
}

/// A small queue and many requests: far more spans than can be exported.
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

/// All requests succeed, and none is delayed.
#[track_caller]
fn requests_succeed(proxy: &Proxy, requests: usize) {
    let mut client = RawClient::connect(proxy.inbound());
    for _ in 0..requests {
        let response = client.ask("GET / HTTP/1.1\r\nHost: up\r\n\r\n");
        assert_eq!(response.status(), 200, "{response:?}");
    }
}

fn exits_soon(mut proxy: Proxy) {
    let begin = Instant::now();
    proxy.signal("TERM");
    assert!(proxy.wait().success());
    assert!(begin.elapsed() < Duration::from_secs(15), "the end took {:?}", begin.elapsed());
}

#[test]
fn an_unreachable_collector_delays_no_request() {
    for protocol in ["grpc", "http"] {
        let proxy = loaded(SocketAddr::from(([127, 0, 0, 1], free_port())), protocol);
        requests_succeed(&proxy, 300);
        eventually("failed spans", || count(&proxy, "failed") > 0);
        let traces = traces(&proxy);
        assert!(traces["last_error"].is_string(), "{traces}");
        assert!(traces["to"].as_str().is_some_and(|to| to.contains("OTLP over")), "{traces}");
        // The exporter has its own thread.
        eventually("the log", || proxy.stderr().contains("spans could not be exported"));
        exits_soon(proxy);
    }
}

#[test]
fn a_hanging_collector_fills_only_the_bounded_queue() {
    for protocol in ["grpc", "http"] {
        // Accepts connections and never responds.
        let hanging = RawServer::start(|stream| {
            let _stream = stream;
            std::thread::park_timeout(Duration::from_secs(120));
        });
        let proxy = loaded(hanging.address(), protocol);
        requests_succeed(&proxy, 300);
        let waiting = traces(&proxy);
        assert!(waiting["waiting"].as_u64().is_some_and(|waiting| waiting <= 50), "{waiting}");
        eventually("dropped spans", || count(&proxy, "queue_full") >= 200);
        let before = proxy.resident_kib();
        requests_succeed(&proxy, 3000);
        let grown = proxy.resident_kib().saturating_sub(before);
        assert!(grown < 8 * 1024, "{grown} KiB more after 3000 requests");
        assert!(read(&proxy, "/metrics").contains("outrigger_spans_total{outcome=\"queue_full\"}"));
        exits_soon(proxy);
    }
}

#[test]
fn a_collector_that_rejects_spans_is_logged() {
    let refusing = Upstream::http1(|_| async {
        let mut response = text("no");
        *response.status_mut() = http::StatusCode::FORBIDDEN;
        response
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

/// Its failure and its return are both detected.
#[test]
fn a_restarted_collector_gets_new_spans() {
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
    requests_succeed(&proxy, 1);
    eventually("an exported span", || count(&proxy, "exported") == 1);
    drop(collector);
    eventually("a failed span", || {
        requests_succeed(&proxy, 1);
        count(&proxy, "failed") > 0
    });
    let before = count(&proxy, "exported");
    let _collector = start();
    eventually("exported spans again", || {
        requests_succeed(&proxy, 1);
        count(&proxy, "exported") > before
    });
    assert!(traces(&proxy)["last_error"].is_null());
}
