//! Spans of gRPC requests follow OpenTelemetry's RPC conventions.

use std::{net::SocketAddr, process::Command};

use super::traces::otlp;
use crate::support::{
    Daemon, Proxy, eventually, peer_script, python_with,
    rotel::{ReceivedSpan, Rotel},
};

#[test]
fn grpc_spans_have_method_and_status() {
    let Some(rotel) = Rotel::start() else { return };
    let Some(python) = python_with("grpc") else { return };
    let script = peer_script("grpc_server.py").display().to_string();
    let server = Daemon::start(&python.display().to_string(), &[&script], &[]);
    let output = server.wait_for_output("port ");
    let port: u16 = output.split("port ").nth(1).and_then(|rest| rest.trim().parse().ok()).expect("a port");
    let telemetry = format!("[telemetry]\n{}sample = 1.0\n", otlp(&rotel));
    let service = SocketAddr::from(([127, 0, 0, 1], port));
    let second = Proxy::start(format!(
        "[service]\nname = \"second\"\n[inbound]\nforward_to = \"{service}\"\n{telemetry}"
    ));
    let first = Proxy::start(format!(
        "[service]\nname = \"first\"\n{telemetry}[[upstream]]\nname = \"up\"\nendpoints = [\"{}\"]\n",
        second.inbound()
    ));
    let client = Command::new(&python)
        .arg(peer_script("grpc_client.py"))
        .args([&first.outbound().to_string(), "up"])
        .output()
        .expect("Python runs");
    assert!(client.status.success(), "{}", String::from_utf8_lossy(&client.stderr));

    // Method, status, and whether the client span and the server span are errors.
    for (method, status, client_failed, server_failed) in [
        ("Unary", "OK", false, false),
        ("Bidi", "OK", false, false),
        // A client error in a trailers-only response.
        ("Fail", "NOT_FOUND", true, false),
        // An error status after messages.
        ("FailLate", "DATA_LOSS", true, true),
        ("Missing", "UNIMPLEMENTED", true, true),
    ] {
        let name = format!("test.Test/{method}");
        let mut spans = Vec::<ReceivedSpan>::new();
        eventually(&format!("the spans of {name}"), || {
            spans = rotel.spans().into_iter().filter(|span| span.name == name).collect();
            ["SERVER", "CLIENT", "INTERNAL"].iter().all(|kind| spans.iter().any(|span| span.kind == *kind))
        });
        for span in &spans {
            let attributes =
                ["rpc.system.name", "rpc.method", "rpc.response.status_code"].map(|key| span.attribute(key));
            assert_eq!(attributes, ["grpc", &name, status], "{span:#?}");
            let failed = if span.kind == "CLIENT" { client_failed } else { server_failed };
            assert_eq!(span.status == "ERROR", failed, "{span:#?}");
            assert_eq!(span.attribute("error.type"), if failed { status } else { "" }, "{span:#?}");
            assert_eq!(
                span.attribute("network.protocol.version"),
                if span.kind == "INTERNAL" { "" } else { "2" }
            );
        }
    }
}
