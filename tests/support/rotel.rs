//! rotel, another OTLP collector: it prints the spans that it receives, and they are parsed here.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
};

use super::{Daemon, eventually, free_port, has_tool};

/// A running collector.
pub struct Rotel {
    daemon: Daemon,
    pub grpc: SocketAddr,
    pub http: SocketAddr,
}

/// A received span.
#[derive(Clone, Debug, Default)]
pub struct ReceivedSpan {
    pub service: String,
    pub name: String,
    /// `SERVER`, `CLIENT`, `INTERNAL`.
    pub kind: String,
    pub trace: String,
    pub id: String,
    /// Empty for a root.
    pub parent: String,
    /// `UNSET`, `ERROR`.
    pub status: String,
    pub attributes: BTreeMap<String, String>,
    pub events: Vec<String>,
    /// Trace and span.
    pub links: Vec<(String, String)>,
}

impl ReceivedSpan {
    pub fn attribute(&self, key: &str) -> &str {
        self.attributes.get(key).map_or("", String::as_str)
    }
}

impl Rotel {
    /// Starts one; None if it is not installed, which is reported.
    pub fn start() -> Option<Self> {
        Self::start_with(&["--debug-log", "traces", "--debug-log-verbosity", "detailed"])
    }

    /// The same for load tests: it prints nothing.
    pub fn start_quiet() -> Option<Self> {
        Self::start_with(&[])
    }

    fn start_with(more: &[&str]) -> Option<Self> {
        if !has_tool(&["rotel-agent"]) {
            return None;
        }
        let [grpc, http] =
            [free_port(), free_port()].map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
        let (grpc_text, http_text) = (grpc.to_string(), http.to_string());
        let mut arguments =
            vec!["start", "--otlp-grpc-endpoint", &grpc_text, "--otlp-http-endpoint", &http_text];
        arguments.extend(more.iter().chain(&["--exporter", "blackhole"]));
        let daemon = Daemon::start("rotel-agent", &arguments, &[]).listening(grpc).listening(http);
        Some(Self { daemon, grpc, http })
    }

    /// Kills it at once.
    pub fn kill(self) {
        super::proxy::signal(self.daemon.pid(), "KILL");
    }

    /// All spans so far.
    pub fn spans(&self) -> Vec<ReceivedSpan> {
        parse(&self.daemon.output())
    }

    /// Waits for at least `count` spans, and a moment longer in case more arrive.
    #[track_caller]
    pub fn wait_for(&self, count: usize) -> Vec<ReceivedSpan> {
        let mut spans = Vec::new();
        eventually(&format!("{count} spans at the collector"), || {
            spans = self.spans();
            spans.len() >= count
        });
        spans
    }

    pub fn output(&self) -> String {
        self.daemon.output()
    }
}

/// What the following printed lines belong to.
#[derive(PartialEq)]
enum Place {
    Resource,
    Span,
    Event,
    Link,
}

fn parse(text: &str) -> Vec<ReceivedSpan> {
    let (mut spans, mut service, mut place) = (Vec::<ReceivedSpan>::new(), String::new(), Place::Resource);
    for line in text.lines() {
        let line = line.trim();
        if line.starts_with("ResourceSpans #") {
            place = Place::Resource;
        } else if line.starts_with("Span #") {
            place = Place::Span;
            spans.push(ReceivedSpan { service: service.clone(), ..ReceivedSpan::default() });
        } else if line.starts_with("SpanEvent #") {
            place = Place::Event;
        } else if line.starts_with("SpanLink #") {
            place = Place::Link;
            if let Some(span) = spans.last_mut() {
                span.links.push(Default::default());
            }
        }
        let Some((key, value)) = line.trim_start_matches("-> ").split_once(':') else { continue };
        let (key, value) = (key.trim(), value.trim());
        let plain = value.split_once('(').and_then(|(_, rest)| rest.strip_suffix(')')).unwrap_or(value);
        if place == Place::Resource {
            if key == "service.name" {
                service = plain.to_owned();
            }
            continue;
        }
        let Some(span) = spans.last_mut() else { continue };
        match (&place, key) {
            (Place::Event, "Name") => span.events.push(value.to_owned()),
            (Place::Link, "Trace ID") => {
                span.links.iter_mut().next_back().expect("a link").0 = value.to_owned()
            }
            (Place::Link, "ID") => span.links.iter_mut().next_back().expect("a link").1 = value.to_owned(),
            (Place::Span, "Trace ID") => span.trace = value.to_owned(),
            (Place::Span, "Parent ID") => span.parent = value.to_owned(),
            (Place::Span, "ID") => span.id = value.to_owned(),
            (Place::Span, "Name") => span.name = value.to_owned(),
            (Place::Span, "Kind") => span.kind = value.trim_start_matches("SPAN_KIND_").to_owned(),
            (Place::Span, "Status code") => span.status = value.trim_start_matches("STATUS_CODE_").to_owned(),
            (Place::Span, key) if line.starts_with("-> ") => {
                span.attributes.insert(key.to_owned(), plain.to_owned());
            }
            _ => {}
        }
    }
    spans
}
