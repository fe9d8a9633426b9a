//! Where the records of completed requests go: duration histograms, access log, `GET /requests`.

use std::sync::{Arc, OnceLock};

use super::{
    access_log::{AccessLog, AccessLogError, Target},
    record::Record,
    requests::Requests,
    verdict::Kind,
};
use crate::{
    config,
    durations::{Cell, Durations},
};

/// The consumers of request records that all workers share.
#[derive(Debug, Default)]
pub struct Calls {
    pub access_log: AccessLog,
    default_target: OnceLock<Target>,
    pub requests: Requests,
    /// Durations of requests to hosts that no upstream names.
    pub other: Durations,
    /// Durations of requests that were refused before an upstream was known.
    pub refused_inbound: Durations,
    pub refused_outbound: Durations,
}

/// One worker's handle on [`RequestTelemetry`].
#[derive(Debug)]
pub struct Teller {
    calls: Arc<Calls>,
    /// Durations of requests to hosts that no upstream names.
    pub other: Arc<Cell>,
    refused_inbound: Arc<Cell>,
    refused_outbound: Arc<Cell>,
}

impl Calls {
    /// Sets where the access log goes unless a file is configured. Call it once, before [`Self::configure`].
    pub fn write_to(&self, target: Target) {
        let _ = self.default_target.set(target);
    }

    /// Applies new settings. On an error the old ones stay.
    pub fn configure(&self, settings: &config::Telemetry) -> Result<(), AccessLogError> {
        let target = self.default_target.get().cloned().unwrap_or(Target::Stdout);
        self.access_log.configure(settings.access_log, settings.access_log_file.as_ref(), target)
    }
}

impl Teller {
    pub fn new(calls: &Arc<Calls>) -> Self {
        Self {
            calls: Arc::clone(calls),
            other: calls.other.cell(),
            refused_inbound: calls.refused_inbound.cell(),
            refused_outbound: calls.refused_outbound.cell(),
        }
    }

    /// Counts a request and returns which other consumers want its record. A successful request costs two atomic
    /// operations here. `exported`: its spans are exported, whether or not its trace was sampled.
    pub fn count(&self, record: &Record, exported: bool) -> Wanted {
        let cell = match &record.served {
            Some(destination) => &destination.durations,
            None if record.is_inbound() => &self.refused_inbound,
            None => &self.refused_outbound,
        };
        let context = &record.context;
        let traced = (context.sampled || exported).then_some((context.trace, context.span));
        cell.observe(record.duration_key(), record.took(), traced);
        let kind = record.kind();
        Wanted { kind, logged: self.calls.access_log.wants(kind), exported }
    }

    /// Hands the record to access log and `GET /requests`, where consumers.
    pub fn tell(&self, consumers: Wanted, record: Arc<Record>) {
        if consumers.logged {
            self.calls.access_log.send(Arc::clone(&record));
        }
        self.calls.requests.keep(consumers.kind, record);
    }
}

/// Which consumers want the record of a request.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    kind: Kind,
    logged: bool,
    pub exported: bool,
}

impl Wanted {
    pub fn is_nothing(self) -> bool {
        self.kind == Kind::Plain && !self.logged && !self.exported
    }
}
