//! What came of a try, told once to everyone who acts on it: breaker, outlier detection, balancer, hedge, adaptive limit.

use std::{rc::Rc, time::Duration};

use tokio::time::Instant;

use super::{
    attempt::Failed,
    body::{Replay, SourceFailure},
    clock::{Clock, RanOut},
    error::ProxyError,
    exchange::{Ended, Exchange},
    grpc::GrpcReporter,
    tries::{Number, Over},
};
use crate::{
    cause::Cause,
    field_set::Field,
    model::Side,
    resilience::{
        breaker::BreakerPermit,
        classify::{AttemptOutcome, ConnectFailure, GrpcStatus, Health, OutcomeKind, RetryAdvice},
        deadline::DeadlineLimit,
        outlier::{EndpointChange, EndpointOutcome},
    },
    telemetry::record::AttemptRecord,
    upstream::{local::LocalEndpoint, reachability},
};

/// What an attempt weighs in the balancer, as latency, that could not even ask its endpoint.
const NOT_ASKED: Duration = Duration::from_secs(1);

/// Whose outcome is reported, and when it began and ended.
struct Reported<'a> {
    endpoint: &'a Rc<LocalEndpoint>,
    number: Number,
    began: std::time::Instant,
    now: std::time::Instant,
}

/// Whether the endpoint's sidecar refused a request since it had too many: then it is there, and says so.
fn is_full(ended: &Ended) -> bool {
    let Ended::Answered(answer, _) = ended else { return false };
    let said = answer.response.headers().get_all("proxy-status");
    let full = b"connection_limit_reached";
    said.iter().any(|value| value.as_bytes().windows(full.len()).any(|part| part == full))
}

impl Exchange<'_> {
    /// What a try's end means, told to breaker, outlier detection and balancer.
    pub(super) fn judge(&self, over: Over, replay: &Replay, clock: &Clock) -> Ended {
        let (now, took) = (over.ended.into_std(), over.ended - over.began);
        let endpoint = &self.endpoints[over.index];
        let ended = match over.result {
            Ok(Ok(answer)) => {
                self.call.progress.response_received(over.ended);
                let response = &answer.response;
                // Advice counts from upstreams that the configuration names.
                let named = self.target.index.is_some() && answer.present.has(Field::Retry);
                let advice =
                    if named { RetryAdvice::from_headers(response.headers()) } else { RetryAdvice::None };
                let told = self.call.grpc && answer.present.has(Field::GrpcStatus);
                let outcome = match told.then(|| GrpcStatus::from_headers(response.headers())).flatten() {
                    Some(status) => {
                        AttemptOutcome::grpc(status, advice, clock.deadline().client_time_left(now))
                    }
                    None => {
                        let left = clock.deadline().client_time_left(now);
                        AttemptOutcome::http(response.status(), advice, left)
                    }
                };
                Ended::Answered(Box::new(answer), outcome)
            }
            Ok(Err(mut failed)) => {
                match replay.failure() {
                    None => {}
                    Some(SourceFailure::ClientGone) => failed.ending = OutcomeKind::ClientGone,
                    Some(SourceFailure::Malformed(error)) => {
                        let error = ProxyError::malformed(format!("the request's body: {error}"));
                        failed = Failed::new(OutcomeKind::ClientError, error);
                    }
                }
                Ended::Failed(failed)
            }
            Err(ran_out) => Ended::Failed(self.timed_out(ran_out, endpoint, over.number, took)),
        };
        let outcome = match &ended {
            Ended::Answered(_, outcome) => *outcome,
            Ended::Failed(failed) => AttemptOutcome::new(failed.ending),
        };
        match outcome.health() {
            Health::Success => endpoint.observe_latency(took, now),
            Health::Failure => endpoint.observe_failure(took, now),
            Health::Neutral => match outcome.kind {
                OutcomeKind::ClientShare => endpoint.observe_latency(took, now),
                // Other endpoints may have a route, or ports left for them.
                OutcomeKind::Connect(ConnectFailure::LocalResource) => {
                    endpoint.observe_latency(took.max(NOT_ASKED), now);
                }
                _ => {}
            },
        }
        if let Some(usual) = self.guards().p95_latency()
            && (outcome.health() == Health::Success
                // It took at least so long: else what is cut would never be known to be slow.
                || matches!(outcome.kind, OutcomeKind::ClientShare | OutcomeKind::AttemptTimeout))
        {
            usual.record(took, now);
        }
        if self.policy.limits.is_some_and(|limits| limits.adaptive)
            && let Some(adaptive) = &*self.guards().adaptive.load()
        {
            adaptive.record(took, outcome.health(), &self.guards().requests, now);
        }
        if let (Some(hedge), Health::Success) = (&self.policy.hedge.0, outcome.health())
            && let Some(percent) = hedge.percent()
        {
            self.guards().quantile(percent, now).record(took, now);
        }
        self.call.progress.with_record(|record| {
            if let OutcomeKind::Grpc(status) = outcome.kind {
                record.grpc_status = Some(status);
            }
            if let Some(one) = record.attempts.get_mut(over.number) {
                one.ended_at = Some(over.ended);
                one.outcome = Some(outcome);
                if let Ended::Failed(failed) = &ended {
                    one.error = Some(failed.error.detail.clone());
                }
            }
        });
        let reported = Reported { endpoint, number: over.number, began: over.began.into_std(), now };
        self.report(ended, &outcome, reported, over.permit, clock)
    }

    /// Tells breaker and outlier detection. A gRPC call that has only begun to answer is told of at its end.
    fn report(
        &self,
        mut ended: Ended,
        outcome: &AttemptOutcome,
        Reported { endpoint, number, began, now }: Reported<'_>,
        permit: Option<BreakerPermit>,
        clock: &Clock,
    ) -> Ended {
        let guards = self.guards();
        // A connection that was lost with many calls on it counts once.
        let counted = matches!(&ended, Ended::Failed(failed) if failed.counted);
        let health = if counted { Health::Neutral } else { outcome.health() };
        let random = || self.call.connection.worker.with_rng(|rng| rng.unit_f64());
        if let Ended::Answered(answer, _) = &mut ended
            && self.call.grpc
            && matches!(outcome.kind, OutcomeKind::Http(status) if status.is_success())
            && !permit.as_ref().is_some_and(BreakerPermit::is_trial)
        {
            answer.held.grpc = Some(Box::new(GrpcReporter {
                local: Rc::clone(&self.target.local),
                matched: Rc::clone(&self.target.matched),
                route: self.target.route,
                endpoint: Rc::clone(endpoint),
                permit,
                client_deadline: clock.deadline().client_deadline(),
                began,
                random: random(),
            }));
            return ended;
        }
        let local = &self.target.local.upstream;
        let full = outcome.advice() == RetryAdvice::Elsewhere && is_full(&ended);
        let evidence = EndpointOutcome::new(outcome, health, full);
        endpoint.shared.outcomes.record(outcome.kind, now);
        let change = endpoint.report(&local.shared, evidence, (began, now), random);
        match change {
            Some(EndpointChange::Ejected(_)) => self.note_try(number, |one| one.ejected_endpoint = true),
            Some(EndpointChange::Absent | EndpointChange::StillAbsent) => {
                reachability::watch_absent_endpoints(
                    &local.shared,
                    &self.call.connection.worker.shared.control_runtime,
                );
            }
            Some(EndpointChange::Present) | None => {}
        }
        if let Some(permit) = permit {
            let health = local.health_for_breaker(endpoint, health, now);
            let random = if health == Health::Failure { random() } else { 0.0 };
            let told = (health, evidence.makes_absent());
            let transition = guards.report(self.name(), permit, told, now, random);
            if health == Health::Failure {
                self.call
                    .progress
                    .with_record(|record| record.breaker_window = Some(guards.breaker.window_counts(now)));
            }
            if let Some(transition) = &transition {
                self.note_try(number, |one| one.breaker_change = Some(transition.to));
            }
        }
        ended
    }

    pub(super) fn note_try(&self, number: Number, note: impl FnOnce(&mut AttemptRecord)) {
        self.call.progress.with_record(|record| record.attempts.get_mut(number).map(note));
    }

    fn timed_out(&self, ran_out: RanOut, endpoint: &LocalEndpoint, number: Number, took: Duration) -> Failed {
        let name = self.name();
        let address = endpoint.address();
        let (mut ending, mut cause, what) = ran_out.meaning();
        let unseen = self.call.progress.with_record(|record| {
            let is_told = record.attempts.get_mut(number).is_some();
            // Of a hedge both are under way.
            is_told && !record.attempts.iter().any(|one| one.ended_at.is_none() && one.had_connection)
        });
        if unseen == Some(true) && self.connections.queued.get() && !endpoint.pool.h2.is_connecting() {
            // Its turn did not come: that is a matter of this process, and no word about the endpoint.
            let detail = format!(
                "{name}: no connection to {address} was free for {took:.1?}, within {what}: `limits.max_connections` are in use, or it takes no more streams"
            );
            if matches!(ran_out, RanOut::Limit(DeadlineLimit::Attempt | DeadlineLimit::ClientShare)) {
                cause = Cause::LimitFull;
            }
            let error = ProxyError::new(cause, detail).retry_after(Duration::from_secs(1));
            return Failed::new(OutcomeKind::LocalRefusal, error);
        }
        if unseen == Some(true) {
            // Nobody has seen anything of it, whichever clock was the shorter one.
            match ending {
                OutcomeKind::AttemptTimeout => {
                    (ending, cause) = (OutcomeKind::Connect(ConnectFailure::Timeout), Cause::ConnectTimeout);
                }
                OutcomeKind::Timeout => ending = OutcomeKind::Connect(ConnectFailure::Timeout),
                _ => {}
            }
            let detail = format!("{name}: no connection to {address} after {took:.1?}, within {what}");
            return Failed::new(ending, ProxyError::new(cause, detail));
        }
        let detail = format!("{name}: no answer from {address} after {took:.1?}, within {what}");
        Failed::new(ending, ProxyError::new(cause, detail))
    }

    /// Remembers that this trace's tries were spent here: the inbound side then asks the caller not to repeat them.
    pub(super) fn note_spent(&self, ended: &Result<Ended, ProxyError>) {
        let failed = match ended {
            Ok(Ended::Answered(_, outcome)) => outcome.is_failure(),
            Ok(Ended::Failed(failed)) => failed.error.cause.is_exhaustion(),
            Err(error) => error.cause.is_exhaustion(),
        };
        if failed
            && self.call.connection.side != Side::Inbound
            && let Some(trace) = self.call.progress.with_record(|record| record.context.trace.get())
        {
            self.call.connection.worker.shared.spent_traces.insert(trace, Instant::now().into_std());
        }
    }
}
