//! What is recorded as an attempt begins, and what the next hop learns of it: span, number, time left.

use std::{num::NonZeroU64, time::Duration};

use http::Version;
use tokio::time::Instant;

use super::{
    attempt::Outgoing,
    attempts::{PlannedAttempt, StartedAttempt},
    exchange::Exchange,
};
use crate::{
    header_names::X_OUTRIGGER_ATTEMPT,
    model::Side,
    resilience::{
        breaker::BreakerPermit,
        deadline::{self, GRPC_TIMEOUT, REQUEST_TIMEOUT},
    },
    telemetry::record::AttemptRecord,
    trace_context::{SpanId, TraceContext},
    upstream::http1::AttemptFields,
};

impl Exchange<'_> {
    /// Records that an attempt begins, and writes its span for the next hop. Returns also the number of attempts so far.
    pub(super) fn begin_attempt(
        &self,
        planned: PlannedAttempt,
        now: Instant,
        outgoing: &mut Outgoing,
    ) -> (StartedAttempt, u32) {
        let worker = self.worker();
        let started = self.progress().with_record(|record| {
            // A request to the service is one span, whatever it takes to reach it.
            let span = match record.is_inbound() {
                true => record.context.span,
                false => worker.with_rng(SpanId::random),
            };
            let shared = &worker.shared;
            if shared.traces.is_enabled() {
                record.context.inject(span, &mut outgoing.headers);
            } else if record.is_inbound()
                && record.context.parent.is_none()
                && shared.spent_traces.is_in_use(now.into_std())
            {
                // The client sent no trace context. `traceparent` may be the only field that the service forwards: it
                // assigns the service's failing outbound requests to this one. The flag is "sampled": otherwise a service
                // that exports spans would export none.
                TraceContext { sampled: true, ..record.context }.inject(span, &mut outgoing.headers);
            }
            let address = self.endpoints[planned.endpoint_index].address();
            let mut one = AttemptRecord::new(planned.kind, span, address, outgoing.version, now);
            one.tls = self.connections.tls.is_some();
            one.delay = planned.waited;
            one.is_breaker_trial = planned.permit.as_ref().is_some_and(BreakerPermit::is_trial);
            (record.attempts.push(one), record.attempts.count())
        });
        let (record_index, count) = started.unwrap_or_default();
        let PlannedAttempt { endpoint_index: index, permit, .. } = planned;
        (StartedAttempt { endpoint_index: index, permit, record_index, began: now }, count)
    }

    /// Writes which attempt this is, and how much time is left, for the next hop.
    pub(super) fn write_attempt_fields(&self, left: Option<Duration>, outgoing: &mut Outgoing, number: u32) {
        let headers = &mut outgoing.headers;
        // The service gets the number that the client's sidecar sent.
        let attempt = (*self.request.origin.side != Side::Inbound)
            .then_some(number + self.request.origin.earlier_attempts);
        if self.request.grpc
            && let Some(left) = left.filter(|_| headers.contains_key(GRPC_TIMEOUT))
        {
            // Only shortened, never made from `timeout`.
            headers.insert(GRPC_TIMEOUT, deadline::grpc_timeout_value(left));
        }
        // No attempt begins with less than the field can express; the client's own value must never pass unchanged.
        let millis = |left| deadline::timeout_header_millis(left).unwrap_or(NonZeroU64::MIN);
        let millis_left = left.filter(|_| !self.request.grpc).map(millis);
        if outgoing.version == Version::HTTP_2 {
            if let Some(attempt) = attempt {
                headers.insert(X_OUTRIGGER_ATTEMPT, attempt.into());
            }
            if let Some(millis) = millis_left {
                headers.insert(REQUEST_TIMEOUT, self.worker().forwarded_timeout.value(millis));
            }
            return;
        }
        outgoing.attempt_fields = AttemptFields { attempt, millis_left };
        if self.request.replaces_attempt_fields {
            let names = [attempt.map(|_| X_OUTRIGGER_ATTEMPT), millis_left.map(|_| REQUEST_TIMEOUT)];
            for name in names.into_iter().flatten() {
                headers.remove(name);
            }
        }
    }
}
