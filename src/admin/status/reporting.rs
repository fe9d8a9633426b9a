//! What the sidecar reports of requests: the access log, the export of spans, and the requests that failed last.

use std::{collections::BTreeMap, sync::atomic::Ordering};

use serde::{Deserialize, Serialize};

use crate::{
    config::{AccessLog, Telemetry},
    telemetry::{record::RequestRecord, reporter::RequestTelemetry, traces::Traces, verdict::Verdict},
};

/// Most requests in `trouble`.
const SHOWN_REQUESTS: usize = 5;

/// Counts of access log lines since startup.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccessLogStatus {
    /// `off`, `errors` or `all`.
    pub mode: String,
    pub written: u64,
    /// Lost because the output was too slow.
    pub dropped: u64,
    /// Lost because writing failed.
    pub failed: u64,
}

impl AccessLogStatus {
    pub(super) fn of(calls: &RequestTelemetry, mode: AccessLog) -> Self {
        let lines = calls.access_log.line_counts();
        Self {
            mode: mode.word().to_owned(),
            written: lines.written.load(Ordering::Relaxed),
            dropped: lines.dropped.load(Ordering::Relaxed),
            failed: lines.failed.load(Ordering::Relaxed),
        }
    }
}

/// A request that failed or needed more than one attempt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TroubledRequest {
    pub ended_seconds_ago: u64,
    pub direction: String,
    pub method: String,
    pub upstream: Option<String>,
    /// `None`: there was no response.
    pub status: Option<u16>,
    pub attempts: u32,
    pub trace_id: String,
    pub why: Option<String>,
}

impl TroubledRequest {
    pub(super) fn last(calls: &RequestTelemetry) -> Vec<Self> {
        let records = calls.requests.read();
        records
            .iter()
            .filter(|record| record.verdict() != Verdict::Slow)
            .take(SHOWN_REQUESTS)
            .map(|r| Self::of(r))
            .collect()
    }

    fn of(record: &RequestRecord) -> Self {
        Self {
            ended_seconds_ago: record.ended_at.map_or(0, |ended| ended.elapsed().as_secs()),
            direction: record.direction().to_owned(),
            method: record.method.to_string(),
            upstream: record.upstream_name().map(ToOwned::to_owned),
            status: record.status.map(|status| status.as_u16()),
            attempts: record.attempts.count(),
            trace_id: record.context.trace.to_string(),
            why: record.explanation(),
        }
    }
}

/// The export of spans to the collector.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TracesStatus {
    /// The collector's URL, and the protocol.
    pub to: String,
    /// Share of the traces that begin here.
    pub sample: f64,
    pub sample_errors: bool,
    /// Requests whose spans wait to be exported, and the limit.
    pub waiting: usize,
    pub queue: usize,
    /// Spans by outcome: `exported`, `queue_full`, `failed`.
    pub spans: BTreeMap<String, u64>,
    /// Why the last batch was rejected, and when; absent if it was accepted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failed_seconds_ago: Option<u64>,
}

impl TracesStatus {
    pub(super) fn of(traces: &Traces, telemetry: &Telemetry) -> Option<Self> {
        let export = traces.export()?;
        let (waiting, queue) = export.queued();
        let failed = export.state.last_error();
        Some(Self {
            to: export.destination.to_string(),
            sample: *telemetry.sample,
            sample_errors: telemetry.sample_errors,
            waiting,
            queue,
            spans: export.state.counts.extract().map(|(word, count)| (word.to_owned(), count)).into(),
            failed_seconds_ago: failed.as_ref().map(|(_, ago)| ago.as_secs()),
            last_error: failed.map(|(error, _)| error),
        })
    }
}
