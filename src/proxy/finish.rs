//! The end of a request: its record goes to telemetry.

use std::sync::Arc;

use super::worker::Worker;
use crate::telemetry::{
    calls::Wanted,
    record::{End, Record},
};

/// The one place where a call ends: whatever is told of calls is told here, on the worker that carried it. Returns what
/// else is to be told, by [`tell`].
pub fn finished(worker: &Worker, record: &Record) -> Wanted {
    if let Some(refusal) = &record.refused {
        tracing::debug!(
            upstream = record.upstream(),
            tries = record.tries.made(),
            cause = refusal.cause.word(),
            detail = refusal.detail,
            "answered in place of the service"
        );
    } else if record.end != End::Complete {
        tracing::debug!(
            upstream = record.upstream(),
            end = record.end.word(),
            "a call was not carried to its end"
        );
    }
    let shared = &worker.shared;
    if shared.traces.is_on() && record.is_inbound() {
        worker.in_flight.leave(&record.context);
    }
    let exported = shared.traces.wants(record, || shared.snapshot.load().config.telemetry.sample_errors);
    worker.teller.count(record, exported)
}

/// Tells what is wanted to who puts it into words.
pub fn tell(worker: &Worker, wanted: Wanted, record: Record) {
    let record = Arc::new(record);
    if wanted.exported {
        worker.shared.traces.send(Arc::clone(&record));
    }
    worker.teller.tell(wanted, record);
}
