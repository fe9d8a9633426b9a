//! Services that export their own spans.

use crate::support::{Daemon, Launch, Proxy, Upstream, peer_script, python_with, rotel::Rotel, text};

use super::{get, traces::otlp};

/// A Python service with OpenTelemetry's instrumentation between two sidecars: its spans and ours form one trace.
#[test]
fn an_instrumented_service_and_its_sidecars_are_one_trace() {
    let Some(rotel) = Rotel::start() else { return };
    let Some(python) = python_with("opentelemetry.instrumentation.wsgi") else { return };
    let back = Upstream::http1(|_| async { text("well") });
    let telemetry = format!("[telemetry]\n{}sample = 1.0\n", otlp(&rotel));
    let second = Proxy::start(format!(
        "[service]\nname = \"second\"\n[inbound]\nforward_to = \"{}\"\n{telemetry}",
        back.address()
    ));
    // The service needs the sidecar's address and the sidecar needs the service's: the service reads it from a file.
    let script = peer_script("traced_service.py").display().to_string();
    let collector = format!("http://{}/v1/traces", rotel.http);
    let service = Daemon::start(&python.display().to_string(), &[&script, &collector, "@DIR@/outbound"], &[]);
    let output = service.wait_for_output("port ");
    let port: u16 = output.split("port ").nth(1).and_then(|rest| rest.trim().parse().ok()).expect("a port");
    let first = Launch::new(format!(
        "[service]\nname = \"first\"\n[inbound]\nforward_to = \"127.0.0.1:{port}\"\n{telemetry}\
         [[upstream]]\nname = \"second\"\nendpoints = [\"{}\"]\n",
        second.inbound()
    ))
    .start();
    std::fs::write(service.directory().join("outbound"), first.outbound().to_string()).expect("write");

    assert_eq!(get(first.inbound(), "/", &[]), 200);
    let spans = rotel.wait_for(6);
    let trace = &spans[0].trace;
    assert!(spans.iter().all(|span| span.trace == *trace), "{spans:#?}");
    let one = |service: &str, kind: &str| {
        let mut found = spans.iter().filter(|span| span.service == service && span.kind == kind);
        found.next().unwrap_or_else(|| panic!("no {kind} of {service}: {spans:#?}"))
    };
    // From the client to the last service, each span is the child of the one before.
    let path = [
        one("first", "SERVER"),
        one("python", "SERVER"),
        one("python", "CLIENT"),
        one("first", "INTERNAL"),
        one("first", "CLIENT"),
        one("second", "SERVER"),
    ];
    assert_eq!(path[0].parent, "");
    for pair in path.windows(2) {
        assert_eq!(pair[1].parent, pair[0].id, "{pair:#?}");
    }
}
