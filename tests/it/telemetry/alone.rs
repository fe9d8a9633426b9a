//! Without a collector: no spans, but all logs on a call's way name it alike.

use serde_json::Value;

use super::{NONE, Pair, get, sidecar};
use crate::support::{Proxy, RawClient, Upstream, eventually, nobody, text};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";

/// All that the service passes on.
const REQUEST_ID: &[&str] = &["x-request-id"];

/// A service that answers with the fields of its trace context.
fn echo() -> Upstream {
    Upstream::http1(|request: http::Request<_>| {
        let field =
            |name: &str| request.headers().get(name).and_then(|field| field.to_str().ok()).unwrap_or("-");
        let said = ["traceparent", "tracestate", "b3", "x-request-id"].map(field).join(" ");
        async move { text(said) }
    })
}

/// The trace ids in an access log, once it has `count` lines.
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
fn what_a_caller_said_goes_on_as_it_came() {
    let service = echo();
    let proxy = sidecar(service.address(), "").start();
    let mut client = RawClient::connect(proxy.inbound());
    let w3c = format!("00-{TRACE}-{CALLER}-01");
    let b3 = format!("{TRACE}-{CALLER}-1");
    for (fields, seen) in [
        (format!("traceparent: {w3c}\r\ntracestate: a=1\r\n"), format!("{w3c} a=1 - ")),
        (format!("b3: {b3}\r\n"), format!("- - {b3} ")),
    ] {
        let answer = client.ask(format!("GET / HTTP/1.1\r\nHost: a\r\n{fields}\r\n"));
        assert!(answer.text().starts_with(&seen), "{answer:?}");
    }
}

/// A parent that is not sampled would silence a service that exports spans of its own.
#[test]
fn no_trace_is_begun_but_a_call_has_the_id_of_its_request() {
    let service = echo();
    let proxy = sidecar(service.address(), "access_log = \"all\"\n").start();
    let mut given = Vec::new();
    // What is not valid goes on as it came, but names nothing.
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

/// So sidecars in a row know whose tries were spent, though nobody began a trace.
#[test]
fn a_request_id_that_is_passed_on_tells_whose_tries_were_spent() {
    let pair = Pair::start("", REQUEST_ID, |_| async {
        let mut answer = text("ill");
        *answer.status_mut() = http::StatusCode::SERVICE_UNAVAILABLE;
        answer
    });
    let answer = RawClient::connect(pair.first.inbound()).ask("GET / HTTP/1.1\r\nHost: first\r\n\r\n");
    assert_eq!((answer.status(), answer.field("x-outrigger-retry")), (503, Some("no")), "{answer:?}");
}

/// Two sidecars on the way of a call name it alike, and so does an answer of a sidecar's own.
#[test]
fn logs_of_all_sidecars_on_the_way_name_the_same_trace() {
    let pair = Pair::start("access_log = \"all\"\n", REQUEST_ID, |_| async { text("well") });
    assert_eq!(pair.call("/", &[]), 200);
    let first = logged(&pair.first, 2);
    assert_eq!(first[0], first[1], "the service passed it on");
    assert_eq!(logged(&pair.second, 1), first[..1]);

    // A service that passes nothing on: its call is another trace, in both logs.
    let pair = Pair::start("access_log = \"all\"\n", NONE, |_| async { text("well") });
    assert_eq!(get(pair.first.outbound(), "/", &[]), 200);
    assert_eq!(logged(&pair.first, 1), logged(&pair.second, 1));

    let proxy = sidecar(nobody(), "").start();
    let answer = RawClient::connect(proxy.outbound()).ask("GET / HTTP/1.1\r\nHost: up\r\n\r\n");
    let problem: Value = serde_json::from_str(&answer.text()).expect("JSON");
    assert_eq!(problem["trace_id"].as_str(), Some(logged(&proxy, 1)[0].as_str()));
}
