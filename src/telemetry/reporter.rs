//! Where the records of completed requests go: duration histograms, access log, `GET /requests`.

use std::sync::{Arc, OnceLock};

use super::{
    access_log::{AccessLog, AccessLogError, AccessLogTarget},
    record::RequestRecord,
    requests::RecentRequests,
    verdict::Verdict,
};
use crate::{
    config,
    durations::{DurationCell, Durations},
};

/// The consumers of request records that all workers share.
#[derive(Debug, Default)]
pub struct RequestTelemetry {
    pub access_log: AccessLog,
    default_target: OnceLock<AccessLogTarget>,
    pub requests: RecentRequests,
    /// Durations of requests to hosts that no upstream names.
    pub other: Durations,
    /// Durations of requests that were refused before an upstream was known.
    pub refused_inbound: Durations,
    pub refused_outbound: Durations,
}

/// One worker's handle on [`RequestTelemetry`].
#[derive(Debug)]
pub struct Reporter {
    telemetry: Arc<RequestTelemetry>,
    /// Durations of requests to hosts that no upstream names.
    pub other: Arc<DurationCell>,
    refused_inbound: Arc<DurationCell>,
    refused_outbound: Arc<DurationCell>,
}

impl RequestTelemetry {
    /// Sets where the access log goes unless a file is configured. Call it once, before [`Self::configure`].
    pub fn set_default_target(&self, target: AccessLogTarget) {
        let _ = self.default_target.set(target);
    }

    /// Applies new settings. On an error the old ones stay.
    pub fn configure(&self, settings: &config::Telemetry) -> Result<(), AccessLogError> {
        let target = self.default_target.get().cloned().unwrap_or(AccessLogTarget::Stdout);
        self.access_log.configure(settings.access_log, settings.access_log_file.as_ref(), target)
    }
}

impl Reporter {
    pub fn new(calls: &Arc<RequestTelemetry>) -> Self {
        Self {
            telemetry: Arc::clone(calls),
            other: calls.other.cell(),
            refused_inbound: calls.refused_inbound.cell(),
            refused_outbound: calls.refused_outbound.cell(),
        }
    }

    /// Counts a request and returns which other consumers want its record. A successful request costs two atomic
    /// operations here. `exported`: its spans are exported, whether or not its trace was sampled.
    pub fn count(&self, record: &RequestRecord, exported: bool) -> RecordConsumers {
        let cell = match &record.served_by {
            Some(destination) => &destination.durations,
            None if record.is_inbound() => &self.refused_inbound,
            None => &self.refused_outbound,
        };
        let context = &record.context;
        let traced = (context.sampled || exported).then_some((context.trace, context.span));
        cell.observe(record.duration_key(), record.duration(), traced);
        let kind = record.verdict();
        RecordConsumers { verdict: kind, logged: self.telemetry.access_log.wants(kind), exported }
    }

    /// Hands the record to access log and `GET /requests`, where consumers.
    pub fn report(&self, consumers: RecordConsumers, record: Arc<RequestRecord>) {
        if consumers.logged {
            self.telemetry.access_log.send(Arc::clone(&record));
        }
        self.telemetry.requests.keep(consumers.verdict, record);
    }
}

/// Which consumers want the record of a request.
#[derive(Clone, Copy, Debug)]
pub struct RecordConsumers {
    verdict: Verdict,
    logged: bool,
    pub exported: bool,
}

impl RecordConsumers {
    pub fn is_empty(self) -> bool {
        self.verdict == Verdict::Plain && !self.logged && !self.exported
    }
}
