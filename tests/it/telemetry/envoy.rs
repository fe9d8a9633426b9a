//! Envoy in the same path, with its own tracers.

use std::net::SocketAddr;

use serde_json::{Value, json};

use super::{B3, Pair, W3C, get, traces::otlp};
use crate::support::{
    Daemon, free_port, has_tool,
    rotel::{ReceivedSpan, Rotel},
    text,
};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CLIENT_SPAN: &str = "00f067aa0ba902b7";

fn address(at: SocketAddr) -> Value {
    json!({"socket_address": {"address": at.ip().to_string(), "port_value": at.port()}})
}

fn cluster(name: &str, at: SocketAddr, h2: bool) -> Value {
    let endpoint = json!({"endpoint": {"address": address(at)}});
    let mut cluster = json!({"name": name, "load_assignment": {
        "cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]}});
    if h2 {
        let options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
        cluster["typed_extension_protocol_options"] = json!({options: {
            "@type": format!("type.googleapis.com/{options}"), "explicit_http_config": {"http2_protocol_options": {}}}});
    }
    cluster
}

/// Starts an Envoy that forwards everything to `to`, with this tracer, whose spans go to `collector`.
fn start(to: SocketAddr, tracer: &Value, collector: SocketAddr) -> (Daemon, SocketAddr) {
    let front = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let manager = json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "front",
        "generate_request_id": true,
        // One span for the request and one for its upstream request.
        "tracing": {"provider": tracer, "spawn_upstream_span": true},
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [
            {"match": {"prefix": "/"}, "route": {"cluster": "next"}}]}]},
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}],
    });
    let chain = json!({"filters": [
        {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]});
    let config = json!({"static_resources": {
        "listeners": [{"address": address(front), "filter_chains": [chain]}],
        "clusters": [cluster("next", to, false), cluster("collector", collector, true)],
    }, "layered_runtime": {"layers": [{"name": "soon", "static_layer": {"tracing.opentelemetry.flush_interval_ms": 100}}]}});
    let arguments = ["-c", "@DIR@/conf.json", "--concurrency", "1", "-l", "warn", "--use-dynamic-base-id"];
    let files = [("conf.json", config.to_string())];
    let files = files.each_ref().map(|(name, text)| (*name, text.as_str()));
    (Daemon::start("envoy", &arguments, &files).listening(front), front)
}

fn opentelemetry(service: &str) -> Value {
    json!({"name": "envoy.tracers.opentelemetry", "typed_config": {
        "@type": "type.googleapis.com/envoy.config.trace.v3.OpenTelemetryConfig",
        "grpc_service": {"envoy_grpc": {"cluster_name": "collector"}, "timeout": "1s"},
        "service_name": service,
    }})
}

/// The span that has this parent.
#[track_caller]
fn child<'s>(spans: &'s [ReceivedSpan], parent: &str, service: &str, kind: &str) -> &'s ReceivedSpan {
    let mut found = spans.iter().filter(|span| {
        (span.parent.as_str(), span.service.as_str(), span.kind.as_str()) == (parent, service, kind)
    });
    let one = found.next().unwrap_or_else(|| panic!("no {kind} of {service} below {parent:?}: {spans:#?}"));
    assert!(found.next().is_none(), "two {kind} of {service} below {parent:?}: {spans:#?}");
    one
}

/// One Envoy before the first sidecar, one between the two: eight spans, each the child of the one before.
#[test]
fn envoys_with_their_opentelemetry_tracer_are_in_the_same_trace() {
    let Some(rotel) = Rotel::start() else { return };
    if !has_tool(&["envoy"]) {
        return;
    }
    let mut between = None;
    // Only what clients sample is sampled here.
    let telemetry = format!("{}sample = 0\n", otlp(&rotel));
    let pair = Pair::start_around(
        &telemetry,
        W3C,
        |_| async { text("well") },
        |second| {
            let (envoy, address) = start(second, &opentelemetry("between"), rotel.grpc);
            between = Some(envoy);
            address
        },
    );
    let (_front, address) = start(pair.first.inbound(), &opentelemetry("front"), rotel.grpc);
    assert_eq!(get(address, "/cart", &[]), 200);
    let spans = rotel.wait_for(8);
    assert!(spans.iter().all(|span| span.trace == spans[0].trace), "{spans:#?}");
    let mut parent = "";
    for (service, kind) in [
        ("front", "SERVER"),
        ("front", "CLIENT"),
        ("first", "SERVER"),
        ("first", "INTERNAL"),
        ("first", "CLIENT"),
        ("between", "SERVER"),
        ("between", "CLIENT"),
        ("second", "SERVER"),
    ] {
        parent = &child(&spans, parent, service, kind).id;
    }
    assert_eq!(spans.len(), 8);
}

/// Envoy's Zipkin tracer speaks only B3, in several fields, and so does the service behind it.
#[test]
fn b3_only_clients_and_services_are_in_the_same_trace() {
    let Some(rotel) = Rotel::start() else { return };
    if !has_tool(&["envoy"]) {
        return;
    }
    let zipkin = json!({"name": "envoy.tracers.zipkin", "typed_config": {
        "@type": "type.googleapis.com/envoy.config.trace.v3.ZipkinConfig",
        "collector_cluster": "collector", "collector_endpoint": "/api/v2/spans",
        "collector_endpoint_version": "HTTP_JSON", "trace_id_128bit": true,
    }});
    let telemetry = format!("{}sample = 0\n", otlp(&rotel));
    let pair = Pair::start(&telemetry, B3, |_| async { text("well") });
    let (_front, address) = start(pair.first.inbound(), &zipkin, rotel.http);
    let client = [("x-b3-traceid", TRACE), ("x-b3-spanid", CLIENT_SPAN), ("x-b3-sampled", "1")];
    assert_eq!(get(address, "/cart", &client), 200);
    let spans = rotel.wait_for(4);
    assert!(spans.iter().all(|span| span.trace == TRACE), "{spans:#?}");
    let server = spans.iter().find(|span| (span.service.as_str(), span.kind.as_str()) == ("first", "SERVER"));
    let server = server.expect("a span");
    assert!(!server.parent.is_empty() && server.parent != CLIENT_SPAN, "Envoy is in between: {server:#?}");
    let call = child(&spans, &server.id, "first", "INTERNAL");
    let one = child(&spans, &call.id, "first", "CLIENT");
    child(&spans, &one.id, "second", "SERVER");
}
