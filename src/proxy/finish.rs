//! The end of a request: its record goes to telemetry.

use std::sync::Arc;

use super::worker::Worker;
use crate::telemetry::{
    record::{RequestEnd, RequestRecord},
    reporter::RecordConsumers,
};

/// Runs once for each request, at its end, on the worker that served it: logs it at debug level and counts it. Returns
/// which other consumers want the record; pass that to [`report_request`].
pub fn record_request(worker: &Worker, record: &RequestRecord) -> RecordConsumers {
    if let Some(refusal) = &record.local_response {
        tracing::debug!(
            upstream = record.upstream_name(),
            attempts = record.attempts.count(),
            cause = refusal.cause.word(),
            detail = refusal.detail,
            "the proxy responded in place of the service"
        );
    } else if record.end != RequestEnd::Complete {
        tracing::debug!(
            upstream = record.upstream_name(),
            end = record.end.word(),
            "a request did not complete"
        );
    }
    let shared = &worker.shared;
    if shared.traces.is_enabled() && record.is_inbound() {
        worker.inbound_in_flight.remove(&record.context);
    }
    let exported =
        shared.traces.should_export(record, || shared.snapshot.load().config.telemetry.sample_errors);
    worker.reporter.count(record, exported)
}

/// Hands the record to the consumers that want it; each formats it on a thread of its own.
pub fn report_request(worker: &Worker, consumers: RecordConsumers, record: RequestRecord) {
    let record = Arc::new(record);
    if consumers.exported {
        worker.shared.traces.send(Arc::clone(&record));
    }
    worker.reporter.report(consumers, record);
}
