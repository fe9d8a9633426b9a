//! Request durations, as histograms with exemplars.

use std::{
    collections::BTreeMap,
    fmt::{self, Write},
    time::UNIX_EPOCH,
};

use super::upstreams::OTHER;
use crate::{
    config::{HostMatch, Upstream},
    durations::{BOUNDS, Histogram, Histograms, SeriesKey},
    proxy::worker::Shared,
};

/// Label of requests that were refused before an upstream was known.
const NONE: &str = "none";

const SERVER: &str = "http_server_request_duration_seconds";
const CLIENT: &str = "http_client_request_duration_seconds";

/// Histograms of inbound requests, and of outbound ones by upstream and its address.
#[derive(Debug)]
pub struct DurationRows {
    server: Histograms,
    client: BTreeMap<(String, Option<String>), Histograms>,
}

impl DurationRows {
    pub fn of(shared: &Shared) -> Self {
        let snapshot = shared.snapshot.load();
        let mut rows = Self { server: Histograms::new(), client: BTreeMap::new() };
        snapshot.inbound.upstream.policy_state.durations.add_to(&mut rows.server);
        shared.request_telemetry.refused_inbound.add_to(&mut rows.server);
        for cluster in &snapshot.clusters {
            let row = rows.client.entry((cluster.upstream.name.to_string(), address(&cluster.settings)));
            cluster.upstream.policy_state.durations.add_to(row.or_default());
        }
        for (name, durations) in
            [(OTHER, &shared.request_telemetry.other), (NONE, &shared.request_telemetry.refused_outbound)]
        {
            durations.add_to(rows.client.entry((name.to_owned(), None)).or_default());
        }
        rows
    }

    /// Appends the histograms as OpenMetrics text.
    pub fn write(&self, out: &mut String) -> fmt::Result {
        let help = "Duration of inbound requests, to the last byte of the response.";
        begin(out, SERVER, help)?;
        for (key, histogram) in &self.server {
            write(out, SERVER, &labels(key, true, None), histogram)?;
        }
        let help = "Duration of outbound requests, all attempts together, to the last byte of the response.";
        begin(out, CLIENT, help)?;
        for (upstream, read) in &self.client {
            for (key, histogram) in read {
                write(out, CLIENT, &labels(key, false, Some(upstream)), histogram)?;
            }
        }
        Ok(())
    }
}

/// The host name of the upstream: the first of its `hosts` without a wildcard.
fn address(settings: &Upstream) -> Option<String> {
    settings.hosts.iter().find_map(|pattern| match &pattern.host {
        HostMatch::Exact(host) => Some(host.clone()),
        HostMatch::Suffix(_) | HostMatch::Any => None,
    })
}

/// Formats the labels, without the braces.
fn labels(key: &SeriesKey, inbound: bool, upstream: Option<&(String, Option<String>)>) -> String {
    let mut labels = format!("http_request_method=\"{}\"", key.method());
    let mut add = |name: &str, value: Option<&str>| {
        if let Some(value) = value {
            let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            // Writing to a string cannot fail.
            let _ = write!(labels, ",{name}=\"{value}\"");
        }
    };
    add("http_response_status_code", key.status().as_deref());
    add("error_type", key.error(inbound).as_deref());
    if let Some((upstream, address)) = upstream {
        add("upstream", Some(upstream));
        add("server_address", address.as_deref());
    }
    labels
}

fn begin(out: &mut String, name: &str, help: &str) -> fmt::Result {
    writeln!(out, "# HELP {name} {help}\n# TYPE {name} histogram\n# UNIT {name} seconds")
}

/// Writes one series, buckets first. The library that writes all other metrics cannot encode these exemplars.
fn write(out: &mut String, name: &str, labels: &str, histogram: &Histogram) -> fmt::Result {
    let mut cumulative = 0;
    for (bucket, count) in histogram.counts.iter().enumerate() {
        cumulative += count;
        let bound = BOUNDS.get(bucket).map_or_else(|| "+Inf".to_owned(), |bound| format!("{bound:?}"));
        write!(out, "{name}_bucket{{{labels},le=\"{bound}\"}} {cumulative}")?;
        if let Some(exemplar) = histogram.exemplars.get(&bucket) {
            let at = exemplar.at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
            let (trace, span, seconds) = (exemplar.trace, exemplar.span, exemplar.seconds);
            write!(out, " # {{trace_id=\"{trace}\",span_id=\"{span}\"}} {seconds} {at:.3}")?;
        }
        out.push('\n');
    }
    writeln!(out, "{name}_count{{{labels}}} {cumulative}\n{name}_sum{{{labels}}} {}", histogram.sum_seconds)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        durations::{DurationCell, Durations},
        telemetry::verdict::tests::record,
        trace_context::{SpanId, TraceId},
    };

    #[test]
    fn a_histogram_is_written_with_its_exemplars() {
        let durations = Durations::default();
        let cell: &DurationCell = &durations.cell();
        let ids = TraceId::new(0xab).zip(SpanId::new(0xcd));
        let key = record(404).duration_key();
        cell.observe(key, Duration::from_millis(20), ids);
        cell.observe(key, Duration::from_secs(20), None);
        let mut client = Histograms::new();
        durations.add_to(&mut client);
        let upstream = ("a \"b\"".to_owned(), Some("b.example".to_owned()));
        let rows = DurationRows { server: Histograms::new(), client: [(upstream, client)].into() };
        let mut out = String::new();
        rows.write(&mut out).unwrap();
        let labels = r#"http_request_method="GET",http_response_status_code="404",error_type="404",upstream="a \"b\"",server_address="b.example""#;
        for line in [
            format!("{CLIENT}_bucket{{{labels},le=\"0.01\"}} 0\n"),
            format!(
                "{CLIENT}_bucket{{{labels},le=\"0.025\"}} 1 # {{trace_id=\"{:032x}\",span_id=\"{:016x}\"}} 0.02 ",
                0xab, 0xcd
            ),
            format!("{CLIENT}_bucket{{{labels},le=\"10.0\"}} 1\n{CLIENT}_bucket{{{labels},le=\"+Inf\"}} 2\n"),
            format!("{CLIENT}_count{{{labels}}} 2\n{CLIENT}_sum{{{labels}}} 20.02\n"),
        ] {
            assert!(out.contains(&line), "{line}\nis not in\n{out}");
        }
    }
}
