//! Span export: over TLS to a trusted collector, with the configured headers, compressed.

use serde_json::Value;

use super::{get, sidecar};
use crate::support::{
    Launch, Proxy, RawClient, Upstream, eventually,
    otlp::Collector,
    pki::{Pki, dns},
    text,
};

fn traces(proxy: &Proxy) -> Value {
    let page = RawClient::connect(proxy.admin())
        .ask("GET /status HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    serde_json::from_str::<Value>(&page.text()).expect("JSON")["traces"].clone()
}

/// A sidecar that exports to a collector with a certificate of its own CA.
fn sending(grpc: bool, pki: &Pki, service: &Upstream) -> (Collector, Launch) {
    let certificate = pki.issue("collector", |params| params.subject_alt_names = vec![dns("localhost")]);
    let collector = Collector::start(grpc, &certificate);
    let protocol = if grpc { "grpc" } else { "http" };
    let port = collector.address().port();
    let telemetry = format!("otlp = \"https://localhost:{port}\"\nprotocol = \"{protocol}\"\nsample = 1.0\n");
    (collector, sidecar(service.address(), &telemetry).env("OTEL_BSP_SCHEDULE_DELAY", "10"))
}

#[test]
fn spans_are_exported_over_tls_with_the_configured_headers() {
    let (pki, service) = (Pki::new(), Upstream::http1(|_| async { text("well") }));
    let ca = pki.write_ca();
    for grpc in [true, false] {
        let (collector, launch) = sending(grpc, &pki, &service);
        let proxy = launch
            .env("OTEL_EXPORTER_OTLP_CERTIFICATE", &ca.display().to_string())
            .env("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20sesame, x-scope=shop")
            .env("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
            .start();
        assert_eq!(get(proxy.inbound(), "/", &[]), 200);
        let mut got = Vec::new();
        eventually("a request", || {
            got.extend(collector.take());
            !got.is_empty()
        });
        let [one] = &got[..] else { panic!("{} requests", got.len()) };
        assert_eq!((one.field("authorization"), one.field("x-scope")), ("Bearer sesame", "shop"));
        let (path, coding, kind) = match grpc {
            true => {
                let path = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";
                (path, "grpc-encoding", "application/grpc")
            }
            false => ("/v1/traces", "content-encoding", "application/x-protobuf"),
        };
        assert_eq!((one.path.as_str(), one.field("content-type")), (path, kind));
        assert_eq!(one.field(coding), "gzip", "{:?}", one.fields);
        assert_eq!(one.spans(), ["GET"]);
        eventually("the count", || traces(&proxy)["spans"]["exported"] == 1);
        let page = RawClient::connect(proxy.admin())
            .ask("GET /status HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        assert!(!format!("{}{}", page.text(), proxy.stderr()).contains("sesame"), "a secret was shown");
    }
}

/// An untrusted collector gets nothing, and the error is logged.
#[test]
fn a_collector_with_an_untrusted_certificate_gets_no_spans() {
    let (pki, service) = (Pki::new(), Upstream::http1(|_| async { text("well") }));
    for grpc in [true, false] {
        // The system's roots do not contain this CA.
        let (collector, launch) = sending(grpc, &pki, &service);
        let proxy = launch.start();
        assert_eq!(get(proxy.inbound(), "/", &[]), 200);
        eventually("a failed span", || traces(&proxy)["spans"]["failed"] == 1);
        let error = traces(&proxy)["last_error"].as_str().unwrap_or_default().to_owned();
        assert!(error.contains("UnknownIssuer"), "{error}");
        assert!(collector.take().is_empty());
    }
}
