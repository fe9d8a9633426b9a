//! What the proxy tells about itself and the calls it carries.

pub mod exposition;
pub mod log;
pub mod metrics;
pub mod process;
pub mod propagation;
pub mod record;

use record::{End, Record};

/// The one place where a call ends: whatever is told of calls is told here, on the worker that carried it.
pub fn finished(record: &Record) {
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
}
