//! A stale response that stands in for a failure: before the fallback, which comes before an error.

use std::{cell::Cell, rc::Rc, sync::Arc, time::SystemTime};

use http::{Response, StatusCode};

use super::{
    ClientRequest,
    respond::{self, Forwarded, Note},
};
use crate::{
    cache::Entry,
    cause::Cause,
    proxy::{body::ResponseBody, error::ProxyError, origin::Origin},
    telemetry::record::CacheResult,
};

/// A stored response that may replace a failure.
#[derive(Debug)]
pub struct StaleStandby {
    pub entry: Arc<Entry>,
    pub client_request: Rc<ClientRequest>,
    used: Cell<Option<&'static str>>,
}

/// A failure that a stale response may replace (RFC 5861 §4).
#[derive(Clone, Copy, Debug)]
pub struct Failure {
    cause: &'static str,
    /// The status that the service sent.
    status: Option<StatusCode>,
}

impl Failure {
    /// The service's own response.
    pub fn of_status(status: StatusCode) -> Option<Self> {
        let cause = match status.as_u16() {
            500 => "status_500",
            502 => "status_502",
            503 => "status_503",
            504 => "status_504",
            _ => return None,
        };
        Some(Self { cause, status: Some(status) })
    }

    /// The proxy has no response. What it refuses for security (`peer_identity`, `denied_network`) is not replaced: a
    /// wrong certificate or address has to be noticed, and a stale response would hide it.
    pub fn of_error(error: &ProxyError) -> Option<Self> {
        let cause = error.cause;
        let replaced = cause.is_exhaustion() || matches!(cause, Cause::Deadline | Cause::Draining);
        replaced.then(|| Self { cause: cause.word(), status: None })
    }
}

impl StaleStandby {
    pub fn new(entry: Arc<Entry>, client_request: Rc<ClientRequest>) -> Self {
        Self { entry, client_request, used: Cell::default() }
    }

    /// The cause of the failure that it replaced.
    pub fn used(&self) -> Option<&'static str> {
        self.used.get()
    }

    /// The stale response in place of a failure.
    pub fn respond(&self, origin: &Origin<'_>, failure: Failure) -> Response<ResponseBody> {
        self.used.set(Some(failure.cause));
        let attempts = origin.progress.with_record(|record| {
            record.cache = Some(CacheResult::Stale);
            record.replaced_cause = Some(failure.cause);
            record.attempts.count()
        });
        let ttl = Some(self.entry.timing.ttl(SystemTime::now()).min(-1));
        let mut note = Note { ttl, detail: Some(failure.cause), ..Note::default() };
        if attempts.unwrap_or(0) > 0 {
            let status = failure.status.map(|status| status.as_u16());
            note.forwarded = Some(Forwarded { status, ..Forwarded::new("stale") });
        } else {
            note.hit = true;
        }
        respond::from_entry(&self.entry, &self.client_request, &note, &origin.view.proxy_names.deployment)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_replaced_and_refusals_are_not() {
        let is_replaced = |cause: &Cause| Failure::of_error(&ProxyError::new(*cause, "")).is_some();
        let replaced: Vec<&str> =
            Cause::ALL.iter().filter(|cause| is_replaced(cause)).map(|it| it.word()).collect();
        let expected = [
            "dns_failure",
            "dns_timeout",
            "auth_unavailable",
            "no_endpoint",
            "breaker_open",
            "connect_refused",
            "connect_timeout",
            "reset",
            "attempt_timeout",
            "timeout",
            "deadline",
            "queue_full",
            "limit_full",
            "tls_failure",
            "fault_injected",
            "draining",
            "local_resource",
        ];
        assert_eq!(replaced, expected, "not peer_identity, denied_network, not_allowed, jwt_invalid");
        let statuses: Vec<u16> = (100..600)
            .filter(|status| Failure::of_status(StatusCode::from_u16(*status).unwrap()).is_some())
            .collect();
        assert_eq!(statuses, [500, 502, 503, 504]);
    }
}
