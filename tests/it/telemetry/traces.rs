//! Which spans exist and how they relate.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use http::StatusCode;

use super::{B3, NONE, Pair, W3C, get, sidecar};
use crate::support::{
    Proxy, RawClient, Upstream, eventually, refusing_address,
    rotel::{ReceivedSpan, Rotel},
    text,
};

const ALL: &str = "sample = 1.0\n";
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CLIENT_SPAN: &str = "00f067aa0ba902b7";

pub fn otlp(rotel: &Rotel) -> String {
    format!("otlp = \"http://{}\"\nprotocol = \"grpc\"\n", rotel.grpc)
}

/// Answers the first request with 503.
pub fn fails_once()
-> impl Fn(http::Request<hyper::body::Incoming>) -> std::future::Ready<crate::support::UpstreamResponse> + Send
{
    let requests = AtomicUsize::new(0);
    move |_| {
        let mut response = text("well");
        if requests.fetch_add(1, Ordering::Relaxed) == 0 {
            *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
        }
        std::future::ready(response)
    }
}

fn of<'s>(spans: &'s [ReceivedSpan], service: &str, kind: &str) -> Vec<&'s ReceivedSpan> {
    let mut found: Vec<&ReceivedSpan> =
        spans.iter().filter(|span| span.service == service && span.kind == kind).collect();
    found.sort_by_key(|span| span.attribute("http.request.resend_count").to_owned());
    found
}

/// One request through two services, with one retry: one trace.
#[track_caller]
fn one_trace(telemetry: &str, rotel: &Rotel) {
    let pair = Pair::start(&format!("{telemetry}{ALL}"), W3C, fails_once());
    assert_eq!(
        pair.call("/cart/7?secret=1", &[("traceparent", &format!("00-{TRACE}-{CLIENT_SPAN}-01"))]),
        200
    );
    let spans = rotel.wait_for(6);
    assert!(spans.iter().all(|span| span.trace == TRACE), "{spans:#?}");

    let [server] = of(&spans, "first", "SERVER")[..] else { panic!("{spans:#?}") };
    assert_eq!(
        (server.parent.as_str(), server.status.as_str(), server.name.as_str()),
        (CLIENT_SPAN, "UNSET", "GET")
    );
    for (key, value) in [
        ("http.request.method", "GET"),
        ("http.response.status_code", "200"),
        ("url.path", "/cart/7"),
        ("url.scheme", "http"),
        ("server.address", "second"),
        ("client.address", "127.0.0.1"),
        ("network.protocol.version", "1.1"),
    ] {
        assert_eq!(server.attribute(key), value, "{key} of {server:#?}");
    }
    assert!(!rotel.output().contains("secret"), "a query string was exported");

    let [call] = of(&spans, "first", "INTERNAL")[..] else { panic!("{spans:#?}") };
    assert_eq!((&call.parent, call.status.as_str()), (&server.id, "UNSET"), "the service passed its span on");
    assert_eq!(call.attribute("outrigger.upstream"), "second");
    assert_eq!(call.attribute("outrigger.attempts"), "2");
    assert!(call.events.contains(&"retry".to_owned()), "{call:#?}");

    let [failed, retried] = of(&spans, "first", "CLIENT")[..] else { panic!("{spans:#?}") };
    assert_eq!((&failed.parent, &retried.parent), (&call.id, &call.id));
    assert_eq!((failed.status.as_str(), retried.status.as_str()), ("ERROR", "UNSET"));
    assert_eq!(
        (failed.attribute("error.type"), failed.attribute("http.response.status_code")),
        ("503", "503")
    );
    assert_eq!(retried.attribute("http.request.resend_count"), "1");
    assert_eq!(retried.attribute("outrigger.attempt.why"), "retry");
    assert!(!failed.attributes.contains_key("http.request.resend_count"));
    assert_eq!(retried.attribute("url.full"), "http://second/cart/7");
    assert_eq!(retried.attribute("network.peer.port"), pair.second.inbound().port().to_string());

    let servers = of(&spans, "second", "SERVER");
    let child =
        |parent: &ReceivedSpan| servers.iter().find(|span| span.parent == parent.id).expect("a child");
    assert_eq!((child(failed).status.as_str(), child(retried).status.as_str()), ("ERROR", "UNSET"));
    assert_eq!((spans.len(), servers.len()), (6, 2));
}

#[test]
fn one_request_is_one_trace_over_otlp_grpc() {
    let Some(rotel) = Rotel::start() else { return };
    one_trace(&otlp(&rotel), &rotel);
}

#[test]
fn one_request_is_one_trace_over_otlp_http() {
    let Some(rotel) = Rotel::start() else { return };
    one_trace(&format!("otlp = \"http://{}\"\nprotocol = \"http\"\n", rotel.http), &rotel);
}

/// The service forwards nothing: its request is a separate trace, linked to the request that it most probably belongs
/// to.
#[test]
fn a_guessed_relation_is_a_span_link_and_never_a_parent() {
    let Some(rotel) = Rotel::start() else { return };
    let pair = Pair::start(&format!("{}{ALL}", otlp(&rotel)), NONE, |_| async { text("well") });
    assert_eq!(pair.call("/", &[("traceparent", &format!("00-{TRACE}-{CLIENT_SPAN}-01"))]), 200);
    let spans = rotel.wait_for(4);
    let server = of(&spans, "first", "SERVER")[0];
    let call = of(&spans, "first", "INTERNAL")[0];
    assert_eq!(call.parent, "", "{call:#?}");
    assert_ne!(call.trace, TRACE);
    assert_eq!(call.links, [(TRACE.to_owned(), server.id.clone())], "{}", rotel.output());
    assert_eq!(of(&spans, "second", "SERVER")[0].trace, call.trace);

    // A request without an inbound request: a background job.
    assert_eq!(get(pair.first.outbound(), "/job", &[]), 200);
    let spans = rotel.wait_for(7);
    let job = spans.iter().find(|span| span.kind == "INTERNAL" && span.attribute("url.path") == "/job");
    assert!(job.is_some_and(|job| job.parent.is_empty() && job.links.is_empty()), "{job:#?}");
}

/// The client's sampling decision holds; failures are exported all the same, with unchanged flags.
#[test]
fn errors_are_exported_when_sampling_is_off() {
    let Some(rotel) = Rotel::start() else { return };
    let seen = Arc::<std::sync::Mutex<Vec<String>>>::default();
    let note = Arc::clone(&seen);
    let service = Upstream::http1(move |request: http::Request<_>| {
        let field = request.headers().get("traceparent").and_then(|field| field.to_str().ok());
        note.lock().expect("a lock").push(field.unwrap_or_default().to_owned());
        let failed = request.uri().path() == "/ill";
        async move {
            let mut response = text("");
            if failed {
                *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
            }
            response
        }
    });
    let proxy = sidecar(service.address(), &format!("{}sample = 0\n", otlp(&rotel))).start();
    let unsampled = format!("00-{TRACE}-{CLIENT_SPAN}-00");
    for path in ["/well", "/ill", "/well"] {
        get(proxy.inbound(), path, &[("traceparent", &unsampled)]);
        get(proxy.outbound(), path, &[]);
    }
    let spans = rotel.wait_for(3);
    assert_eq!(of(&spans, "lone", "SERVER").len(), 1);
    assert_eq!((of(&spans, "lone", "INTERNAL").len(), of(&spans, "lone", "CLIENT").len()), (1, 1));
    assert!(
        spans.iter().all(|span| span.status == "ERROR" && span.attribute("error.type") == "500"),
        "{spans:#?}"
    );
    let seen = seen.lock().expect("a lock");
    assert!(seen.iter().all(|field| field.ends_with("-00") || field.ends_with("-02")), "{seen:?}");
    assert!(seen[0].starts_with(&format!("00-{TRACE}-")) && !seen[0].contains(CLIENT_SPAN), "{seen:?}");
}

/// A client that sends only B3 headers is followed, and gets B3 back.
#[test]
fn a_client_with_b3_headers_is_in_the_same_trace() {
    let Some(rotel) = Rotel::start() else { return };
    let pair = Pair::start(&format!("{}sample = 0\n", otlp(&rotel)), B3, |request: http::Request<_>| {
        let field = request.headers().get("b3").and_then(|field| field.to_str().ok()).unwrap_or_default();
        let field = field.to_owned();
        async move { text(field) }
    });
    assert_eq!(pair.call("/", &[("b3", &format!("{TRACE}-{CLIENT_SPAN}-1"))]), 200);
    let spans = rotel.wait_for(4);
    assert!(spans.iter().all(|span| span.trace == TRACE), "{spans:#?}");
    assert_eq!(of(&spans, "first", "SERVER")[0].parent, CLIENT_SPAN);
}

/// A response that the proxy generated has its cause in the span.
#[test]
fn a_span_of_a_rejected_request_has_its_cause() {
    let Some(rotel) = Rotel::start() else { return };
    let proxy = sidecar(refusing_address(), &format!("{}sample = 0\n", otlp(&rotel))).start();
    assert_eq!(get(proxy.outbound(), "/", &[]), 502);
    let spans = rotel.wait_for(4);
    let call = of(&spans, "lone", "INTERNAL")[0];
    assert_eq!(call.attribute("outrigger.cause"), "connect_refused");
    assert_eq!(call.attribute("error.type"), "connect_refused");
    assert_eq!(call.attribute("outrigger.retry.stopped"), "max_attempts");
    assert_eq!(of(&spans, "lone", "CLIENT").len(), 3);
    assert!(of(&spans, "lone", "CLIENT").iter().all(|one| one.attribute("error.type") == "connect_refused"));
}

/// A body larger than the replay buffer is the reason for no retry: spans, access log and `/requests` say so.
#[test]
fn an_unbuffered_body_is_reported_as_the_reason_for_no_retry() {
    let Some(rotel) = Rotel::start() else { return };
    let service = Upstream::http1(fails_once());
    let proxy = Proxy::start(format!(
        "[service]\nname = \"lone\"\n[telemetry]\n{}sample = 0\n[[upstream]]\nname = \"up\"\n\
         endpoints = [\"{}\"]\nretry = {{ methods = \"all\", body_limit = \"4B\" }}\n",
        otlp(&rotel),
        service.address()
    ));
    let request = "POST / HTTP/1.1\r\nHost: up\r\nConnection: close\r\nContent-Length: 5\r\n\r\nlarge";
    assert_eq!(RawClient::connect(proxy.outbound()).ask(request).status(), 503);
    let spans = rotel.wait_for(2);
    let call = of(&spans, "lone", "INTERNAL")[0];
    assert_eq!(call.attribute("outrigger.retry.stopped"), "body_not_kept", "{spans:#?}");
    let why = "the request's body is larger than `retry.body_limit`";
    eventually("a line", || proxy.stdout().contains("\"why\""));
    assert!(proxy.stdout().contains(why), "{}", proxy.stdout());
    let mut client = RawClient::connect(proxy.admin());
    let page = client.ask("GET /requests HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").text();
    assert!(page.contains(why), "{page}");
}

/// The last spans are exported before the process exits.
#[test]
fn the_last_spans_are_exported_at_shutdown() {
    let Some(rotel) = Rotel::start() else { return };
    let service = Upstream::http1(|_| async { text("well") });
    let telemetry = format!("{}{ALL}", otlp(&rotel));
    let mut proxy = sidecar(service.address(), &telemetry).env("OTEL_BSP_SCHEDULE_DELAY", "600000").start();
    assert_eq!(get(proxy.inbound(), "/", &[]), 200);
    proxy.signal("TERM");
    assert!(proxy.wait().success());
    eventually("the span", || rotel.spans().len() == 1);
}

/// The environment configures everything, and can switch export off.
#[test]
fn otel_environment_variables_configure_the_export() {
    let Some(rotel) = Rotel::start() else { return };
    let service = Upstream::http1(|_| async { text("well") });
    let start = |extra: (&str, &str)| {
        crate::support::Launch::new(format!("[inbound]\nforward_to = \"{}\"\n", service.address()))
            .env("OTEL_EXPORTER_OTLP_ENDPOINT", &format!("http://{}", rotel.http))
            .env("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
            .env("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
            .env("OTEL_SERVICE_NAME", "by-environment")
            .env("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
            .env("OTEL_TRACES_SAMPLER", "always_on")
            .env(extra.0, extra.1)
            .start()
    };
    let off = start(("OTEL_SDK_DISABLED", "true"));
    assert_eq!(get(off.inbound(), "/", &[]), 200);
    let on = start(("OTEL_BSP_SCHEDULE_DELAY", "10"));
    assert_eq!(get(on.inbound(), "/", &[]), 200);
    let spans = rotel.wait_for(1);
    assert_eq!((spans.len(), spans[0].service.as_str()), (1, "by-environment"));
    assert!(rotel.output().contains("deployment.environment.name: Str(test)"));
}
