//! Where the records of calls go when they are over: durations, access log, the calls worth a second look.

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

/// What all workers tell of calls to.
#[derive(Debug, Default)]
pub struct Calls {
    pub access_log: AccessLog,
    elsewhere: OnceLock<Target>,
    pub requests: Requests,
    /// Of calls to hosts that no upstream names.
    pub other: Durations,
    /// Of calls that were refused before they had an upstream.
    pub refused_inbound: Durations,
    pub refused_outbound: Durations,
}

/// One worker's way to [`Calls`].
#[derive(Debug)]
pub struct Teller {
    calls: Arc<Calls>,
    /// For the durations of hosts that no upstream names.
    pub other: Arc<Cell>,
    refused_inbound: Arc<Cell>,
    refused_outbound: Arc<Cell>,
}

impl Calls {
    /// Where the access log goes unless a file is named. To be said once, before [`Self::configure`].
    pub fn write_to(&self, target: Target) {
        let _ = self.elsewhere.set(target);
    }

    /// Takes new settings; where they cannot be taken, the old ones stay.
    pub fn configure(&self, settings: &config::Telemetry) -> Result<(), AccessLogError> {
        let elsewhere = self.elsewhere.get().cloned().unwrap_or(Target::Stdout);
        self.access_log.configure(settings.access_log, settings.access_log_file.as_ref(), elsewhere)
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

    /// Counts a call; says what else is to be told of it. For one that went well: two atomic steps. `exported`: its
    /// trace goes somewhere, sampled or not.
    pub fn count(&self, record: &Record, exported: bool) -> Wanted {
        let cell = match &record.served {
            Some(whom) => &whom.durations,
            None if record.is_inbound() => &self.refused_inbound,
            None => &self.refused_outbound,
        };
        let context = &record.context;
        let traced = (context.sampled || exported).then_some((context.trace, context.span));
        cell.observe(record.duration_key(), record.took(), traced);
        let kind = record.kind();
        Wanted { kind, logged: self.calls.access_log.wants(kind), exported }
    }

    /// Tells what is wanted.
    pub fn tell(&self, wanted: Wanted, record: Arc<Record>) {
        if wanted.logged {
            self.calls.access_log.send(Arc::clone(&record));
        }
        self.calls.requests.keep(wanted.kind, record);
    }
}

/// What is to be told of a call.
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
