//! The end of a request: its record goes to telemetry.

use std::sync::Arc;

use super::worker::Worker;
use crate::telemetry::{
    calls::Wanted,
    record::{End, Record},
};

/// Runs once for each request, at its end, on the worker that served it: logs it at debug level and counts it. Returns
/// which other consumers want the record; pass that to [`report_request`].
pub fn finished(worker: &Worker, record: &Record) -> Wanted {
    if let Some(refusal) = &record.refused {
        tracing::debug!(
            upstream = record.upstream(),
            attempts = record.tries.made(),
            cause = refusal.cause.word(),
            detail = refusal.detail,
            "the proxy responded in place of the service"
        );
    } else if record.end != End::Complete {
        tracing::debug!(upstream = record.upstream(), end = record.end.word(), "a request did not complete");
    }
    let shared = &worker.shared;
    if shared.traces.is_on() && record.is_inbound() {
        worker.in_flight.leave(&record.context);
    }
    let exported = shared.traces.wants(record, || shared.snapshot.load().config.telemetry.sample_errors);
    worker.teller.count(record, exported)
}

/// Hands the record to the consumers that want it; each formats it on a thread of its own.
pub fn tell(worker: &Worker, consumers: Wanted, record: Record) {
    let record = Arc::new(record);
    if consumers.exported {
        worker.shared.traces.send(Arc::clone(&record));
    }
    worker.teller.tell(consumers, record);
}
