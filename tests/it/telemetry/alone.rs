//! Without a collector: no spans, but the logs of all sidecars on a request's path have the same trace ID.

use serde_json::Value;

use super::{NONE, Pair, get, sidecar};
use crate::support::{Proxy, RawClient, Upstream, eventually, refusing_address, text};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CLIENT_SPAN: &str = "00f067aa0ba902b7";

/// All fields that the service forwards.
const REQUEST_ID: &[&str] = &["x-request-id"];

/// A service that answers with the trace context fields that it received.
fn echo() -> Upstream {
    Upstream::http1(|request: http::Request<_>| {
        let field =
            |name: &str| request.headers().get(name).and_then(|field| field.to_str().ok()).unwrap_or("-");
        let said = ["traceparent", "tracestate", "b3", "x-request-id"].map(field).join(" ");
        async move { text(said) }
    })
}

/// The trace IDs in an access log once it has `count` lines.
fn logged(proxy: &Proxy, count: usize) -> Vec<String> {
    let mut ids = Vec::new();
    eventually(&format!("{count} lines of the access log"), || {
        let id =
            |line: &str| serde_json::from_str::<Value>(line).ok()?["trace_id"].as_str().map(str::to_owned);
        ids = proxy.stdout().lines().filter_map(id).collect();
        ids.len() >= count
    });
    assert_eq!(ids.len(), count);
    ids
}

#[test]
fn the_clients_trace_context_is_forwarded_unchanged() {
    let service = echo();
    let proxy = sidecar(service.address(), "").start();
    let mut client = RawClient::connect(proxy.inbound());
    let w3c = format!("00-{TRACE}-{CLIENT_SPAN}-01");
    let b3 = format!("{TRACE}-{CLIENT_SPAN}-1");
    for (fields, seen) in [
        (format!("traceparent: {w3c}\r\ntracestate: a=1\r\n"), format!("{w3c} a=1 - ")),
        (format!("b3: {b3}\r\n"), format!("- - {b3} ")),
    ] {
        let response = client.ask(format!("GET / HTTP/1.1\r\nHost: a\r\n{fields}\r\n"));
        assert!(response.text().starts_with(&seen), "{response:?}");
    }
}

/// An unsampled parent would suppress the spans of a service that exports its own.
#[test]
fn no_trace_is_started_and_requests_carry_the_request_id() {
    let service = echo();
    let proxy = sidecar(service.address(), "access_log = \"all\"\n").start();
    let mut given = Vec::new();
    // An invalid trace context is forwarded unchanged but names no trace.
    for fields in ["", "traceparent: 00-zz\r\n", "b3: 0\r\n"] {
        for port in [proxy.inbound(), proxy.outbound()] {
            let mut client = RawClient::connect(port);
            let said = client.ask(format!("GET / HTTP/1.1\r\nHost: up\r\n{fields}\r\n")).text();
            let [traceparent, _, b3, id] = said.split(' ').collect::<Vec<_>>()[..] else { panic!("{said}") };
            let value = fields.trim_end().split(": ").last().unwrap_or_default();
            assert!(["-", value].contains(&traceparent) && ["-", value].contains(&b3), "{said}");
            given.push(id.to_owned());
        }
    }
    assert!(given.iter().all(|id| id.len() == 32), "{given:?}");
    assert_eq!(logged(&proxy, 6), given);
}

/// So sidecars in a row know which attempts are exhausted, without any trace.
#[test]
fn a_forwarded_request_id_links_exhausted_attempts() {
    let pair = Pair::start("", REQUEST_ID, |_| async {
        let mut response = text("ill");
        *response.status_mut() = http::StatusCode::SERVICE_UNAVAILABLE;
        response
    });
    let response = RawClient::connect(pair.first.inbound()).ask("GET / HTTP/1.1\r\nHost: first\r\n\r\n");
    assert_eq!((response.status(), response.field("x-outrigger-retry")), (503, Some("no")), "{response:?}");
}

/// Two sidecars on a request's path log the same trace ID, and so does a response that a sidecar generates.
#[test]
fn logs_of_all_sidecars_on_the_path_name_the_same_trace() {
    let pair = Pair::start("access_log = \"all\"\n", REQUEST_ID, |_| async { text("well") });
    assert_eq!(pair.call("/", &[]), 200);
    let first = logged(&pair.first, 2);
    assert_eq!(first[0], first[1], "the service passed it on");
    assert_eq!(logged(&pair.second, 1), first[..1]);

    // A service that forwards nothing: its own request is another trace, in both logs.
    let pair = Pair::start("access_log = \"all\"\n", NONE, |_| async { text("well") });
    assert_eq!(get(pair.first.outbound(), "/", &[]), 200);
    assert_eq!(logged(&pair.first, 1), logged(&pair.second, 1));

    let proxy = sidecar(refusing_address(), "").start();
    let response = RawClient::connect(proxy.outbound()).ask("GET / HTTP/1.1\r\nHost: up\r\n\r\n");
    let problem: Value = serde_json::from_str(&response.text()).expect("JSON");
    assert_eq!(problem["trace_id"].as_str(), Some(logged(&proxy, 1)[0].as_str()));
}
