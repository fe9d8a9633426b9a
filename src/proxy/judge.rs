//! What came of a try, told once to everyone who acts on it: breaker, outlier detection, balancer, hedge, adaptive limit.

use std::{rc::Rc, time::Duration};

use tokio::time::Instant;

use super::{
    accept::Side,
    attempt::Failed,
    body::{Replay, SourceFailure},
    clock::{Clock, RanOut},
    error::{Cause, ProxyError},
    exchange::{Ended, Exchange},
    grpc::GrpcEnd,
    tries::{Number, Over},
};
use crate::{
    present::Field,
    resilience::{
        breaker::Permit,
        classify::{Advice, ConnectFailure, Ending, GrpcStatus, Health, Outcome},
    },
    telemetry::record::Try,
    upstream::{comeback, local::LocalEndpoint},
};

/// What a failed try weighs in the balancer, as latency. It is forgotten like any other.
const COST_OF_FAILURE: Duration = Duration::from_secs(1);

impl Exchange<'_> {
    /// What a try's end means, told to breaker, outlier detection and balancer.
    pub(super) fn judge(&self, over: Over, replay: &Replay, clock: &Clock) -> Ended {
        let (now, took) = (over.ended.into_std(), over.ended - over.began);
        let endpoint = &self.endpoints[over.index];
        let ended = match over.result {
            Ok(Ok(answer)) => {
                self.call.progress.heard(over.ended);
                let response = &answer.response;
                // Advice counts from upstreams that the configuration names.
                let named = self.target.index.is_some() && answer.present.has(Field::Retry);
                let advice = if named { Advice::from_headers(response.headers()) } else { Advice::None };
                let told = self.call.grpc && answer.present.has(Field::GrpcStatus);
                let outcome = match told.then(|| GrpcStatus::from_headers(response.headers())).flatten() {
                    Some(status) => Outcome::grpc(status, advice, clock.deadline().callers_time_left(now)),
                    None => {
                        let left = clock.deadline().callers_time_left(now);
                        Outcome::http(response.status(), advice, left)
                    }
                };
                Ended::Answered(Box::new(answer), outcome)
            }
            Ok(Err(mut failed)) => {
                match replay.failure() {
                    None => {}
                    Some(SourceFailure::ClientGone) => failed.ending = Ending::CallerGone,
                    Some(SourceFailure::Malformed(error)) => {
                        let error = ProxyError::malformed(format!("the request's body: {error}"));
                        failed = Failed::new(Ending::ClientError, error);
                    }
                }
                Ended::Failed(failed)
            }
            Err(ran_out) => Ended::Failed(self.timed_out(ran_out, endpoint, over.number, took)),
        };
        let outcome = match &ended {
            Ended::Answered(_, outcome) => *outcome,
            Ended::Failed(failed) => Outcome::new(failed.ending),
        };
        match outcome.health() {
            Health::Success => endpoint.observe(took, now),
            // Failing fast must not look like answering fast.
            Health::Failure => endpoint.observe(took.max(COST_OF_FAILURE), now),
            Health::Neutral => match outcome.ending {
                Ending::ClientShare => endpoint.observe(took, now),
                // Other endpoints may have a route, or ports left for them.
                Ending::Connect(ConnectFailure::LocalResource) => {
                    endpoint.observe(took.max(COST_OF_FAILURE), now);
                }
                _ => {}
            },
        }
        if let Some(usual) = self.guards().usual_latency()
            && (outcome.health() == Health::Success
                // It took at least so long: else what is cut would never be known to be slow.
                || matches!(outcome.ending, Ending::ClientShare | Ending::AttemptTimeout))
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
        self.call.progress.note(|record| {
            if let Ending::Grpc(status) = outcome.ending {
                record.grpc_status = Some(status);
            }
            if let Some(one) = record.tries.get_mut(over.number) {
                one.ended = Some(over.ended);
                one.outcome = Some(outcome);
                if let Ended::Failed(failed) = &ended {
                    one.error = Some(failed.error.detail.clone());
                }
            }
        });
        self.report(ended, &outcome, endpoint, (over.permit, over.number), (now, clock))
    }

    /// Tells breaker and outlier detection. A gRPC call that has only begun to answer is told of at its end.
    fn report(
        &self,
        mut ended: Ended,
        outcome: &Outcome,
        endpoint: &Rc<LocalEndpoint>,
        (permit, number): (Option<Permit>, Number),
        (now, clock): (std::time::Instant, &Clock),
    ) -> Ended {
        let guards = self.guards();
        // A connection that was lost with many calls on it counts once.
        let counted = matches!(&ended, Ended::Failed(failed) if failed.counted);
        let weighed = |health| if counted { Health::Neutral } else { health };
        let random = || self.call.connection.worker.with_rng(|rng| rng.unit_f64());
        if let Ended::Answered(answer, _) = &mut ended
            && self.call.grpc
            && matches!(outcome.ending, Ending::Http(status) if status.is_success())
            && !permit.as_ref().is_some_and(Permit::is_trial)
        {
            answer.held.grpc = Some(Box::new(GrpcEnd {
                local: Rc::clone(&self.target.local),
                matched: Rc::clone(&self.target.matched),
                route: self.target.route,
                endpoint: Rc::clone(endpoint),
                permit,
                callers_deadline: clock.deadline().callers(),
                random: random(),
            }));
            return ended;
        }
        let upstream = &self.target.local.upstream.shared;
        let control = &self.call.connection.worker.shared.control;
        let end = (outcome.ending, weighed(outcome.health()));
        if let Some(ejection) = endpoint.report(guards, self.name(), end, now, random) {
            self.note_try(number, |one| one.ejected = true);
            if ejection.found_nobody {
                comeback::recall(upstream, control);
            }
        }
        if let Some(permit) = permit {
            let random = if end.1 == Health::Failure { random() } else { 0.0 };
            let transition = guards.report(self.name(), permit, end, now, random);
            if transition.is_some() && guards.absence.is_absent() {
                comeback::watch(upstream, control);
            }
            if end.1 == Health::Failure {
                self.call.progress.note(|record| record.window = Some(guards.breaker.in_window(now)));
            }
            if let Some(transition) = &transition {
                self.note_try(number, |one| one.breaker = Some(transition.to));
            }
        }
        ended
    }

    pub(super) fn note_try(&self, number: Number, note: impl FnOnce(&mut Try)) {
        self.call.progress.note(|record| record.tries.get_mut(number).map(note));
    }

    fn timed_out(&self, ran_out: RanOut, endpoint: &LocalEndpoint, number: Number, took: Duration) -> Failed {
        let name = self.name();
        let address = endpoint.address();
        let (mut ending, mut cause, what) = ran_out.meaning();
        let unseen = self.call.progress.note(|record| {
            let is_told = record.tries.get_mut(number).is_some();
            // Of a hedge both are under way.
            is_told && !record.tries.iter().any(|one| one.ended.is_none() && one.carried)
        });
        if unseen == Some(true) {
            // Nobody has seen anything of it, whichever clock was the shorter one.
            match ending {
                Ending::AttemptTimeout => {
                    (ending, cause) = (Ending::Connect(ConnectFailure::Timeout), Cause::ConnectTimeout);
                }
                Ending::Timeout => ending = Ending::Connect(ConnectFailure::Timeout),
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
            && let Some(trace) = self.call.progress.note(|record| record.context.trace.get())
        {
            self.call.connection.worker.shared.spent.note(trace, Instant::now().into_std());
        }
    }
}
