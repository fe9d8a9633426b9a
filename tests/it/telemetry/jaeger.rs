//! The same trace as an operator sees it, read from Jaeger's query API.

use std::net::SocketAddr;

use serde_json::Value;

use super::{Pair, W3C, traces::fails_once};
use crate::support::{Daemon, RawClient, eventually, free_port, has_tool};

struct Jaeger {
    _daemon: Daemon,
    grpc: SocketAddr,
    query: SocketAddr,
}

/// Jaeger all-in-one with in-memory storage, on its own ports.
fn start() -> Option<Jaeger> {
    if !has_tool(&["jaeger"]) {
        return None;
    }
    let [grpc, http, query, query_grpc, health] =
        [(); 5].map(|()| SocketAddr::from(([127, 0, 0, 1], free_port())));
    let config = format!(
        r#"
service:
  extensions: [jaeger_storage, jaeger_query, healthcheckv2]
  pipelines:
    traces: {{ receivers: [otlp], processors: [], exporters: [jaeger_storage_exporter] }}
  telemetry:
    metrics: {{ level: none }}
extensions:
  healthcheckv2: {{ use_v2: true, http: {{ endpoint: "{health}" }} }}
  jaeger_query:
    storage: {{ traces: memory }}
    http: {{ endpoint: "{query}" }}
    grpc: {{ endpoint: "{query_grpc}" }}
  jaeger_storage:
    backends:
      memory: {{ memory: {{ max_traces: 1000 }} }}
receivers:
  otlp:
    protocols:
      grpc: {{ endpoint: "{grpc}" }}
      http: {{ endpoint: "{http}" }}
exporters:
  jaeger_storage_exporter: {{ trace_storage: memory }}
"#
    );
    let daemon = Daemon::start("jaeger", &["--config", "@DIR@/jaeger.yaml"], &[("jaeger.yaml", &config)]);
    let daemon = daemon.listening(grpc).listening(query);
    Some(Jaeger { _daemon: daemon, grpc, query })
}

impl Jaeger {
    fn get(&self, path: &str) -> Value {
        let mut client = RawClient::connect(self.query);
        let response =
            client.ask(format!("GET {path} HTTP/1.1\r\nHost: jaeger\r\nConnection: close\r\n\r\n"));
        serde_json::from_str(&response.text()).unwrap_or(Value::Null)
    }
}

fn tag<'s>(span: &'s Value, key: &str) -> &'s Value {
    let tags = span["tags"].as_array().expect("tags");
    tags.iter().find(|tag| tag["key"] == key).map_or(&Value::Null, |tag| &tag["value"])
}

#[test]
fn jaeger_shows_one_request_as_one_trace() {
    let Some(jaeger) = start() else { return };
    let telemetry = format!("otlp = \"http://{}\"\nprotocol = \"grpc\"\nsample = 1.0\n", jaeger.grpc);
    let pair = Pair::start(&telemetry, W3C, fails_once());
    assert_eq!(pair.call("/cart/7", &[]), 200);
    let mut trace = Value::Null;
    eventually("six spans of one trace", || {
        trace = jaeger.get("/api/traces?service=first&limit=5")["data"][0].clone();
        trace["spans"].as_array().is_some_and(|spans| spans.len() == 6)
    });
    let spans = trace["spans"].as_array().expect("spans");
    let service =
        |span: &Value| trace["processes"][span["processID"].as_str().expect("an id")]["serviceName"].clone();
    let parent = |span: &Value| {
        span["references"]
            .as_array()
            .and_then(|of| of.first())
            .map(|of| of["spanID"].clone())
            .unwrap_or_default()
    };
    let of = |name: &str, kind: &str| {
        let of = |span: &&Value| service(span) == name && tag(span, "span.kind") == kind;
        let mut found: Vec<&Value> = spans.iter().filter(of).collect();
        found.sort_by_key(|span| span["startTime"].as_u64());
        found
    };
    let (server, call, attempts) =
        (of("first", "server")[0], of("first", "internal")[0], of("first", "client"));
    assert_eq!(parent(server), Value::Null, "the trace begins here");
    assert_eq!(parent(call), server["spanID"]);
    assert!(attempts.iter().all(|one| parent(one) == call["spanID"]), "{trace:#}");
    let [failed, retried] = attempts[..] else { panic!("{trace:#}") };
    assert_eq!(
        (tag(failed, "error"), tag(failed, "http.response.status_code")),
        (&Value::Bool(true), &503.into())
    );
    assert_eq!((tag(retried, "error"), tag(retried, "http.request.resend_count")), (&Value::Null, &1.into()));
    let behind = of("second", "server");
    let [first, second] = behind[..] else { panic!("{trace:#}") };
    assert_eq!((parent(first), parent(second)), (failed["spanID"].clone(), retried["spanID"].clone()));
    assert_eq!(tag(first, "error"), &Value::Bool(true));
    let logs = call["logs"].as_array().expect("logs");
    assert!(logs.iter().any(|log| log["fields"].to_string().contains("retry")), "{call:#}");
}
