//! `/metrics`: all counters as OpenMetrics or Prometheus text.

mod durations;
mod plain;
mod upstreams;

pub use plain::ExpositionFormat;

use std::{
    fmt,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, text},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
    registry::{Registry, Unit},
};

use super::queues;
use crate::{
    identity::material::ExpiryKind,
    model::{Cluster, Snapshot, unknown::UnknownHosts},
    net::alpn::ConnectionTls,
    runtime::lifecycle::Control,
    telemetry::{
        metrics::{ConnectionCounters, EntryPoint},
        process,
    },
};

/// Renders all metrics with their current values.
pub fn render(control: &Arc<Control>, format: ExpositionFormat) -> Result<String, fmt::Error> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(MetricsCollector(Arc::clone(control))));
    let mut out = String::new();
    text::encode_registry(&mut out, &registry)?;
    durations::DurationRows::of(&control.shared).write(&mut out)?;
    text::encode_eof(&mut out)?;
    Ok(match format {
        ExpositionFormat::OpenMetrics => out,
        ExpositionFormat::Prometheus => plain::prometheus(&out),
    })
}

/// Reads the process's counters at each scrape; the metrics library holds no copies.
#[derive(Debug)]
struct MetricsCollector(Arc<Control>);

pub(super) type Labels<const N: usize> = [(&'static str, String); N];

impl Collector for MetricsCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        build_info(&mut encoder)?;
        process(&mut encoder, self.0.started.elapsed())?;
        self.connections(&mut encoder)?;
        self.workers(&mut encoder)?;
        self.entry_points(&mut encoder)?;
        self.detections(&mut encoder)?;
        self.identity(&mut encoder)?;
        self.reloads(&mut encoder)?;
        fetches(&mut encoder, &self.0.shared.snapshot.load())?;
        self.spans(&mut encoder)?;
        self.access_log(&mut encoder)?;
        self.cache(&mut encoder)?;
        let control = &self.0;
        queues::encode(&mut encoder, &control.shared)?;
        let upstreams = upstreams::UpstreamRows::of(&control.shared);
        upstreams.encode(&mut encoder)
    }
}

impl MetricsCollector {
    fn cache(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        let snapshot = self.0.shared.snapshot.load();
        let Some(store) = &snapshot.cache else { return Ok(()) };
        let bytes = i64::try_from(store.bytes()).unwrap_or(i64::MAX);
        single(
            encoder,
            "outrigger_cache_bytes",
            "Memory of stored responses",
            None,
            &ConstGauge::new(bytes),
        )?;
        let help = "Stored responses that were dropped for others";
        single(encoder, "outrigger_cache_evictions", help, None, &ConstCounter::new(store.evictions()))
    }

    fn connections(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        let shared = &self.0.shared;
        let metrics = &shared.metrics;
        let directions: [(&str, &ConnectionCounters); 2] =
            [("inbound", &metrics.inbound), ("outbound", &metrics.outbound)];
        // Only the connections that cross the network: from clients inbound, to upstreams outbound.
        let open = [
            ("inbound", metrics.inbound.open_by()),
            ("outbound", upstream_connections(&shared.snapshot.load(), &shared.unknown_hosts)),
        ];
        let open = open.iter().flat_map(|(direction, counts)| {
            counts.map(|(tls, count)| {
                let labels = [
                    ("direction", (*direction).to_owned()),
                    ("tls", tls.word().to_owned()),
                    ("state", "open".to_owned()),
                ];
                (labels, ConstGauge::new(count))
            })
        });
        let help = "Open connections from clients (inbound) and to upstreams (outbound)";
        family(encoder, "outrigger_connections", help, None, open)?;
        let total = directions.map(|(direction, connections)| {
            let labels = [("direction", direction.to_owned())];
            (labels, ConstCounter::new(connections.total.load(Ordering::Relaxed)))
        });
        family(encoder, "outrigger_connections_accepted", "Connections accepted so far", None, total)
    }

    fn detections(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        let detected = self.0.shared.metrics.detections.read().map(|(direction, port, what, count)| {
            let port = port.map_or_else(|| "other".to_owned(), |port| port.to_string());
            let labels =
                [("direction", direction.to_owned()), ("port", port), ("protocol", what.word().to_owned())];
            (labels, ConstCounter::new(count))
        });
        let help = "Redirected connections by detected protocol";
        family(encoder, "outrigger_detected", help, None, detected)
    }

    fn workers(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        let workers = || {
            let loads = self.0.shared.metrics.workers.iter().enumerate();
            loads.map(|(index, load)| ([("worker", index.to_string())], load))
        };
        let open = workers().map(|(labels, load)| {
            let open = i64::try_from(load.connections.load(Ordering::Relaxed)).unwrap_or(i64::MAX);
            (labels, ConstGauge::new(open))
        });
        let help = "Client connections by worker";
        family(encoder, "outrigger_worker_connections", help, None, open)?;
        let busy = workers().map(|(labels, load)| (labels, ConstCounter::new(load.busy().as_secs_f64())));
        let help = "Time that the worker was busy";
        family(encoder, "outrigger_worker_busy", help, Some(&Unit::Seconds), busy)
    }

    fn identity(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        let handshakes = &self.0.shared.identity.handshakes;
        let directions = [("inbound", &handshakes.inbound), ("outbound", &handshakes.outbound)];
        let counts = directions.iter().flat_map(|(direction, counts)| {
            counts.read().map(|(outcome, count)| {
                let labels = [("direction", (*direction).to_owned()), ("outcome", outcome.to_owned())];
                (labels, ConstCounter::new(count))
            })
        });
        family(encoder, "outrigger_tls_handshakes", "TLS handshakes by outcome", None, counts)?;
        let refused = ConstCounter::new(handshakes.plaintext_refused.load(Ordering::Relaxed));
        let help = "Connections refused because they did not use TLS";
        single(encoder, "outrigger_plaintext_refused", help, None, &refused)?;
        let report = self.0.shared.identity.report();
        let soonest = ExpiryKind::ALL.into_iter().filter_map(|kind| {
            let of_kind = report.expiries.iter().filter(|expiry| expiry.kind == kind);
            let at =
                of_kind.map(|expiry| expiry.not_after).min()?.duration_since(UNIX_EPOCH).unwrap_or_default();
            Some(([("kind", kind.word().to_owned())], ConstGauge::new(at.as_secs_f64())))
        });
        let help = "When the first certificate of each kind expires";
        family(encoder, "outrigger_certificate_expiry_timestamp", help, Some(&Unit::Seconds), soonest)?;
        if report.configured {
            let loads = [("accepted", report.accepted), ("refused", report.rejections)];
            let loads =
                loads.map(|(outcome, count)| ([("outcome", outcome.to_owned())], ConstCounter::new(count)));
            family(
                encoder,
                "outrigger_certificate_loads",
                "Reads of new certificates and roots by outcome",
                None,
                loads,
            )?;
            let refused = ConstGauge::new(i64::from(report.rejection.is_some()));
            let help = "1 while the newest certificates are rejected and earlier ones stay in use";
            single(encoder, "outrigger_certificate_refused", help, None, &refused)?;
        }
        Ok(())
    }

    fn entry_points(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        let (counts, now) = (&self.0.shared.metrics.entry_points, Instant::now());
        let points = EntryPoint::ALL
            .map(|way| ([("way", way.word().to_owned())], ConstCounter::new(counts.read(way, now).0)));
        family(encoder, "outrigger_calls", "Requests and byte streams by entry point", None, points)
    }

    fn spans(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        let Some(export) = self.0.shared.traces.export() else { return Ok(()) };
        let counts = export.state.counts.extract();
        let counts = counts.map(|(word, count)| ([("outcome", word.to_owned())], ConstCounter::new(count)));
        family(encoder, "outrigger_spans", "Spans by outcome of their export", None, counts)?;
        let waiting = ConstGauge::new(i64::try_from(export.queued().0).unwrap_or(i64::MAX));
        single(
            encoder,
            "outrigger_spans_waiting_calls",
            "Requests whose spans wait to be exported",
            None,
            &waiting,
        )
    }

    fn access_log(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        let lines = self.0.shared.request_telemetry.access_log.line_counts();
        let outcomes = [("written", &lines.written), ("dropped", &lines.dropped), ("failed", &lines.failed)];
        let outcomes = outcomes.map(|(outcome, count)| {
            ([("outcome", outcome.to_owned())], ConstCounter::new(count.load(Ordering::Relaxed)))
        });
        family(encoder, "outrigger_access_log_lines", "Access log lines by outcome", None, outcomes)
    }

    fn reloads(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        let state = self.0.reloads.state();
        let outcomes = [("accepted", state.accepted_count), ("rejected", state.rejected_count)];
        let outcomes =
            outcomes.map(|(outcome, count)| ([("outcome", outcome.to_owned())], ConstCounter::new(count)));
        family(
            encoder,
            "outrigger_config_reloads",
            "Reloads of a changed configuration by outcome",
            None,
            outcomes,
        )?;
        let rejected = ConstGauge::new(i64::from(state.rejection.is_some()));
        let help =
            "1 while the configuration files are rejected and the last good configuration stays in use";
        single(encoder, "outrigger_config_rejected", help, None, &rejected)
    }
}

/// Fetches of JWKS and of the OAuth 2 tokens of upstreams, by outcome.
fn fetches(encoder: &mut DescriptorEncoder, snapshot: &Snapshot) -> fmt::Result {
    let outcomes = |fetched, failed| [("ok", fetched), ("failed", failed)];
    let keys = snapshot.gate.iter().filter_map(|gate| gate.jwt.as_ref()).flat_map(|users| {
        let report = users.issuer.report();
        outcomes(report.fetched, report.failed)
    });
    let keys = keys.map(|(outcome, count)| ([("outcome", outcome.to_owned())], ConstCounter::new(count)));
    family(encoder, "outrigger_jwks_fetches", "Fetches of the JWKS by outcome", None, keys)?;
    let tokens = snapshot.clusters.iter().filter_map(|cluster| {
        let report = cluster.token.as_ref()?.report();
        let labels =
            |outcome: &str| [("upstream", cluster.settings.name.clone()), ("outcome", outcome.to_owned())];
        let outcomes = outcomes(report.fetched, report.failed);
        Some(outcomes.map(|(outcome, count)| (labels(outcome), ConstCounter::new(count))))
    });
    let help = "Requests for OAuth 2 tokens by outcome";
    family(encoder, "outrigger_oauth2_requests", help, None, tokens.flatten())
}

/// Open connections to all upstreams, by TLS.
fn upstream_connections(
    snapshot: &Snapshot,
    unknown: &UnknownHosts,
) -> [(ConnectionTls, i64); ConnectionTls::ALL.len()] {
    let (hosts, _) = unknown.read();
    let clusters = || snapshot.clusters.iter().chain(&hosts);
    ConnectionTls::ALL.map(|tls| {
        let of = |cluster: &Arc<Cluster>| cluster.upstream.policy_state.open_connections()[tls as usize].1;
        (tls, clusters().map(of).sum())
    })
}

fn build_info(encoder: &mut DescriptorEncoder) -> fmt::Result {
    let labels = [("version", env!("CARGO_PKG_VERSION").to_owned())];
    family(encoder, "outrigger_build_info", "Version of the proxy", None, [(labels, ConstGauge::new(1_i64))])
}

fn process(encoder: &mut DescriptorEncoder, uptime: Duration) -> fmt::Result {
    let started = SystemTime::now()
        .checked_sub(uptime)
        .and_then(|start| start.duration_since(UNIX_EPOCH).ok())
        .unwrap_or_default();
    let started = ConstGauge::new(started.as_secs_f64());
    single(encoder, "process_start_time", "When the process started", Some(&Unit::Seconds), &started)?;
    let Some(usage) = process::usage() else { return Ok(()) };
    let cpu = ConstCounter::new(usage.cpu.as_secs_f64());
    single(encoder, "process_cpu", "CPU time used", Some(&Unit::Seconds), &cpu)?;
    let resident = ConstGauge::new(usage.resident_bytes);
    single(encoder, "process_resident_memory", "Memory in use", Some(&Unit::Bytes), &resident)?;
    let open = ConstGauge::new(usage.open_fds);
    single(encoder, "process_open_fds", "Open file descriptors", None, &open)?;
    match usage.max_fds {
        Some(max) => {
            single(encoder, "process_max_fds", "Limit of open file descriptors", None, &ConstGauge::new(max))
        }
        None => Ok(()),
    }
}

pub(super) fn single(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    metric: &impl EncodeMetric,
) -> fmt::Result {
    let encoder = encoder.encode_descriptor(name, help, unit, metric.metric_type())?;
    metric.encode(encoder)
}

/// Writes one metric for several label sets; nothing where there are none.
pub(super) fn family<M: EncodeMetric, const N: usize>(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    members: impl IntoIterator<Item = (Labels<N>, M)>,
) -> fmt::Result
where
    Labels<N>: EncodeLabelSet,
{
    let mut members = members.into_iter().peekable();
    let Some((_, first)) = members.peek() else { return Ok(()) };
    let mut encoder = encoder.encode_descriptor(name, help, unit, first.metric_type())?;
    for (labels, metric) in members {
        metric.encode(encoder.encode_family(&labels)?)?;
    }
    Ok(())
}
