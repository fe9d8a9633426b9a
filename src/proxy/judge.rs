//! The outcome of an attempt, reported once: to breaker, outlier detection, balancer, hedge and adaptive limit.

use std::{rc::Rc, time::Duration};

use tokio::time::Instant;

use super::{
    attempt::AttemptError,
    attempts::{FinishedAttempt, RecordIndex, StartedAttempt},
    body::{Replay, SourceFailure},
    clock::{Clock, TimeLimit},
    error::ProxyError,
    exchange::{AttemptResult, Exchange},
    grpc::GrpcReporter,
};
use crate::{
    cause::Cause,
    field_set::Field,
    model::Side,
    resilience::{
        breaker::BreakerPermit,
        classify::{AttemptOutcome, ConnectFailure, GrpcStatus, Health, OutcomeKind, RetryAdvice},
        deadline::DeadlineLimit,
        outlier::{AttemptTimes, EndpointChange, EndpointOutcome},
    },
    telemetry::record::AttemptRecord,
    upstream::{local::LocalEndpoint, policy_state::BreakerOutcome, reachability},
};

/// The latency that the balancer records for an attempt that failed before it reached its endpoint.
const UNSENT_LATENCY: Duration = Duration::from_secs(1);

/// The attempt whose outcome is reported, and when it began and ended.
struct Reported<'a> {
    endpoint: &'a Rc<LocalEndpoint>,
    record_index: RecordIndex,
    began: std::time::Instant,
    now: std::time::Instant,
}

/// Whether the endpoint's sidecar rejected the request because its limit is reached. Such an endpoint is reachable, so
/// it is not absent.
fn is_full(ended: &AttemptResult) -> bool {
    let AttemptResult::Response(response, _) = ended else { return false };
    let values = response.head.headers().get_all("proxy-status");
    let full = b"connection_limit_reached";
    values.iter().any(|value| value.as_bytes().windows(full.len()).any(|part| part == full))
}

impl Exchange<'_> {
    /// Classifies how an attempt ended, and reports it.
    pub(super) fn judge(&self, finished: FinishedAttempt, replay: &Replay, clock: &Clock) -> AttemptResult {
        let FinishedAttempt { attempt, result, ended: ended_at } = finished;
        let StartedAttempt { endpoint_index: index, permit, record_index, began } = attempt;
        let (now, took) = (ended_at.into_std(), ended_at - began);
        let endpoint = &self.endpoints[index];
        let ended = match result {
            Ok(Ok(response)) => {
                self.progress().response_received(ended_at);
                let head = &response.head;
                // Advice counts from upstreams that the configuration names.
                let named = self.target.route_owner_index.is_some() && response.present.has(Field::Retry);
                let advice =
                    if named { RetryAdvice::from_headers(head.headers()) } else { RetryAdvice::None };
                let is_grpc_response = self.request.grpc && response.present.has(Field::GrpcStatus);
                let outcome =
                    match is_grpc_response.then(|| GrpcStatus::from_headers(head.headers())).flatten() {
                        Some(status) => {
                            AttemptOutcome::grpc(status, advice, clock.deadline().client_time_left(now))
                        }
                        None => {
                            let left = clock.deadline().client_time_left(now);
                            AttemptOutcome::http(head.status(), advice, left)
                        }
                    };
                AttemptResult::Response(Box::new(response), outcome)
            }
            Ok(Err(mut failed)) => {
                match replay.failure() {
                    None => {}
                    Some(SourceFailure::ClientGone) => failed.ending = OutcomeKind::ClientGone,
                    Some(SourceFailure::Malformed(error)) => {
                        let error = ProxyError::malformed(format!("the request's body: {error}"));
                        failed = AttemptError::new(OutcomeKind::ClientError, error);
                    }
                }
                AttemptResult::Failed(failed)
            }
            Err(time_limit) => {
                AttemptResult::Failed(self.timed_out(time_limit, endpoint, record_index, took))
            }
        };
        let outcome = match &ended {
            AttemptResult::Response(_, outcome) => *outcome,
            AttemptResult::Failed(failed) => AttemptOutcome::new(failed.ending),
        };
        match outcome.health() {
            Health::Success => endpoint.observe_latency(took, now),
            Health::Failure => endpoint.observe_failure(took, now),
            Health::Neutral => match outcome.kind {
                OutcomeKind::ClientShare => endpoint.observe_latency(took, now),
                // Other endpoints may have a route, or ports left for them.
                OutcomeKind::Connect(ConnectFailure::LocalResource) => {
                    endpoint.observe_latency(took.max(UNSENT_LATENCY), now);
                }
                _ => {}
            },
        }
        if let Some(usual) = self.policy_state().p95_latency()
            && (outcome.health() == Health::Success
                // An attempt that timed out took at least this long. Without such samples the percentile would never
                // exceed the timeout.
                || matches!(outcome.kind, OutcomeKind::ClientShare | OutcomeKind::AttemptTimeout))
        {
            usual.record(took, now);
        }
        if self.policy.limits.is_some_and(|limits| limits.adaptive)
            && let Some(adaptive) = &*self.policy_state().adaptive.load()
        {
            adaptive.record(took, outcome.health(), &self.policy_state().requests, now);
        }
        if let (Some(hedge), Health::Success) = (&self.policy.hedge.0, outcome.health())
            && let Some(percent) = hedge.percent()
        {
            self.policy_state().quantile(percent, now).record(took, now);
        }
        self.progress().with_record(|record| {
            if let OutcomeKind::Grpc(status) = outcome.kind {
                record.grpc_status = Some(status);
            }
            if let Some(one) = record.attempts.get_mut(record_index) {
                one.ended_at = Some(ended_at);
                one.outcome = Some(outcome);
                if let AttemptResult::Failed(failed) = &ended {
                    one.error = Some(failed.error.detail.clone());
                }
            }
        });
        let reported = Reported { endpoint, record_index, began: began.into_std(), now };
        self.report(ended, &outcome, reported, permit, clock)
    }

    /// Reports to breaker and outlier detection. A gRPC request whose response has only begun is reported at its end.
    fn report(
        &self,
        mut ended: AttemptResult,
        outcome: &AttemptOutcome,
        Reported { endpoint, record_index, began, now }: Reported<'_>,
        permit: Option<BreakerPermit>,
        clock: &Clock,
    ) -> AttemptResult {
        let policy_state = self.policy_state();
        // A connection that was lost with many calls on it counts once.
        let counted = matches!(&ended, AttemptResult::Failed(failed) if failed.counted);
        let health = if counted { Health::Neutral } else { outcome.health() };
        let random = || self.worker().with_rng(|rng| rng.unit_f64());
        if let AttemptResult::Response(response, _) = &mut ended
            && self.request.grpc
            && matches!(outcome.kind, OutcomeKind::Http(status) if status.is_success())
            && !permit.as_ref().is_some_and(BreakerPermit::is_trial)
        {
            response.held.grpc = Some(Box::new(GrpcReporter {
                serving: Rc::clone(&self.target.serving),
                route_owner: Rc::clone(&self.target.route_owner),
                route: self.target.route,
                endpoint: Rc::clone(endpoint),
                permit,
                client_deadline: clock.deadline().client_deadline(),
                began,
                random: random(),
            }));
            return ended;
        }
        let local = &self.target.serving.upstream;
        let full = outcome.advice() == RetryAdvice::Elsewhere && is_full(&ended);
        let mut evidence = EndpointOutcome::new(outcome, health, full);
        if matches!(&ended, AttemptResult::Failed(failed) if failed.stream_only) {
            evidence = evidence.of_stream();
        }
        endpoint.shared.outcomes.record(outcome.kind, now);
        let change = endpoint.report(&local.shared, evidence, AttemptTimes { began, ended: now }, random);
        match change {
            Some(EndpointChange::Ejected(_)) => {
                self.update_attempt(record_index, |one| one.ejected_endpoint = true)
            }
            Some(EndpointChange::Absent | EndpointChange::StillAbsent) => {
                reachability::watch_absent_endpoints(&local.shared, &self.worker().shared.control_runtime);
            }
            Some(EndpointChange::Present) | None => {}
        }
        if let Some(permit) = permit {
            let health = local.health_for_breaker(endpoint, health, now);
            let random = if health == Health::Failure { random() } else { 0.0 };
            let result = BreakerOutcome { health, is_absence: evidence.makes_absent() };
            let transition = policy_state.report(self.name(), permit, result, now, random);
            if health == Health::Failure {
                self.progress().with_record(|record| {
                    record.breaker_window = Some(policy_state.breaker.window_counts(now))
                });
            }
            if let Some(transition) = &transition {
                self.update_attempt(record_index, |one| one.breaker_change = Some(transition.to));
            }
        }
        ended
    }

    pub(super) fn update_attempt(&self, record_index: RecordIndex, note: impl FnOnce(&mut AttemptRecord)) {
        self.progress().with_record(|record| record.attempts.get_mut(record_index).map(note));
    }

    fn timed_out(
        &self,
        time_limit: TimeLimit,
        endpoint: &LocalEndpoint,
        record_index: RecordIndex,
        took: Duration,
    ) -> AttemptError {
        let name = self.name();
        let address = endpoint.address();
        let (mut ending, mut cause, what) = time_limit.meaning();
        let unseen = self.progress().with_record(|record| {
            let is_recorded = record.attempts.get_mut(record_index).is_some();
            // With a hedge, both copies are under way.
            is_recorded && !record.attempts.iter().any(|one| one.ended_at.is_none() && one.had_connection)
        });
        if unseen == Some(true) && self.connections.queued.get() && !endpoint.pool.h2.is_connecting() {
            // It waited for a connection all the time: a limit of this process, and no evidence about the endpoint.
            let detail = format!(
                "{name}: no connection to {address} was free for {took:.1?}, within {what}: `limits.max_connections` are in use, or it takes no more streams"
            );
            if matches!(time_limit, TimeLimit::Limit(DeadlineLimit::Attempt | DeadlineLimit::ClientShare)) {
                cause = Cause::LimitFull;
            }
            let error = ProxyError::new(cause, detail).retry_after(Duration::from_secs(1));
            return AttemptError::new(OutcomeKind::LocalRefusal, error);
        }
        if unseen == Some(true) {
            // No connection was established, so this is a connect timeout, whichever limit expired.
            match ending {
                OutcomeKind::AttemptTimeout => {
                    (ending, cause) = (OutcomeKind::Connect(ConnectFailure::Timeout), Cause::ConnectTimeout);
                }
                OutcomeKind::Timeout => ending = OutcomeKind::Connect(ConnectFailure::Timeout),
                _ => {}
            }
            let detail = format!("{name}: no connection to {address} after {took:.1?}, within {what}");
            return AttemptError::new(ending, ProxyError::new(cause, detail));
        }
        let detail = format!("{name}: no response from {address} after {took:.1?}, within {what}");
        AttemptError::new(ending, ProxyError::new(cause, detail))
    }

    /// Remembers that this trace's attempts are exhausted here: the inbound side then asks the client not to repeat them.
    pub(super) fn record_exhausted(&self, ended: &Result<AttemptResult, ProxyError>) {
        let failed = match ended {
            Ok(AttemptResult::Response(_, outcome)) => outcome.is_failure(),
            Ok(AttemptResult::Failed(failed)) => failed.error.cause.is_exhaustion(),
            Err(error) => error.cause.is_exhaustion(),
        };
        if failed
            && *self.request.origin.side != Side::Inbound
            && let Some(trace) = self.progress().with_record(|record| record.context.trace.get())
        {
            self.worker().shared.spent_traces.insert(trace, Instant::now().into_std());
        }
    }
}
