//! The attempts of a request at one upstream: performs what [`RetryPlan`] says, until one of them has the response.

use std::{
    pin::pin,
    rc::Rc,
    time::{Duration, SystemTime},
};

use http::Version;
use tokio::time::{Instant, sleep, timeout_at};

use super::{
    address_check, admission,
    attempt::{self, AttemptContext, AttemptError, Outgoing, UpstreamResponse},
    body::Replay,
    clock::{Clock, TimeLimit},
    deliver::may_be_failure,
    endpoints,
    error::ProxyError,
    exchange::{AttemptResult, Exchange, RequestState},
    interim::ContinueGate,
};
use crate::{
    cause::Cause,
    config::ObservablePolicy,
    resilience::{
        backoff::RetryHint,
        breaker::{BreakerPermit, BreakerRefusal},
        classify::{AttemptOutcome, OutcomeKind, RetryAdvice},
        retry::{Action, AttemptFailure, AttemptKind, Event, Finish, RequestTraits, RetryPlan, Stop},
    },
    upstream::local::{PickCriteria, Probe},
};

/// An attempt to be made.
pub(super) struct PlannedAttempt {
    /// The index of its endpoint.
    pub endpoint_index: usize,
    pub permit: Option<BreakerPermit>,
    pub kind: AttemptKind,
    /// For how long it was held back.
    pub waited: Duration,
    /// No attempt can follow it.
    pub is_last: bool,
}

/// The index of an attempt's record, from 0.
pub(super) type RecordIndex = usize;

/// An attempt under way.
pub(super) struct StartedAttempt {
    /// The index of its endpoint.
    pub endpoint_index: usize,
    pub permit: Option<BreakerPermit>,
    pub record_index: RecordIndex,
    pub began: Instant,
}

/// An attempt that is over. With a hedge it may be another one than was started first.
pub(super) struct FinishedAttempt {
    pub attempt: StartedAttempt,
    pub result: Result<Result<UpstreamResponse, AttemptError>, TimeLimit>,
    pub ended: Instant,
}

impl StartedAttempt {
    /// It is over now.
    pub(super) fn finish(
        self,
        result: Result<Result<UpstreamResponse, AttemptError>, TimeLimit>,
    ) -> FinishedAttempt {
        FinishedAttempt { attempt: self, result, ended: Instant::now() }
    }

    /// `is_last`: no attempt can follow, so the head need not be kept.
    pub(super) fn dispatch(&self, is_last: bool) -> Dispatch {
        Dispatch {
            endpoint_index: self.endpoint_index,
            record_index: self.record_index,
            began: self.began,
            is_last,
        }
    }
}

/// What is sent where: an attempt without its permit.
#[derive(Clone, Copy)]
pub(super) struct Dispatch {
    endpoint_index: usize,
    record_index: RecordIndex,
    began: Instant,
    is_last: bool,
}

impl Exchange<'_> {
    /// Makes attempts until one has a response to pass on, or no other may follow.
    pub(super) async fn run_attempts(&self, state: &mut RequestState) -> Result<AttemptResult, ProxyError> {
        let progress = self.progress();
        let traits = RequestTraits {
            is_repeatable: self
                .retry_policy
                .is_repeatable(&state.outgoing.method, self.request.idempotency_key),
            is_grpc: self.request.grpc,
            keeps_head: state.outgoing.keep,
            observes_retries: self.observing(ObservablePolicy::Retry),
        };
        let mut plan =
            RetryPlan::new(self.retry_policy, self.policy_state().attempt_limits(), traits, state.first);
        let mut now = Instant::now();
        let mut event = Event::Ready { time_left: state.clock.time_left(progress, now) };
        let (mut permit, mut index) = (None, 0);
        let mut last: Option<AttemptResult> = None;
        let mut unavailable: Option<Box<ProxyError>> = None;
        loop {
            event = match plan.next(event, now.into_std()) {
                Action::Admit => match self.acquire_breaker_permit(plan.kind(), now) {
                    Ok(granted) => {
                        permit = granted;
                        Event::Admitted
                    }
                    Err(_) if self.observing(ObservablePolicy::Breaker) => {
                        self.note_observed_refusal();
                        Event::Admitted
                    }
                    Err(BreakerRefusal { retry_after }) => {
                        Event::Refused { retry_after, time_left: state.clock.time_left(progress, now) }
                    }
                },
                Action::AwaitRecovery { until, retry_after } => {
                    // Boxed, as every path that few requests take: else its size would be every request's.
                    let admitted =
                        Box::pin(self.await_recovery(until.into(), BreakerRefusal { retry_after })).await;
                    now = Instant::now();
                    match admitted {
                        Ok(granted) => {
                            permit = granted;
                            Event::Admitted
                        }
                        Err(BreakerRefusal { retry_after }) => {
                            Event::Refused { retry_after, time_left: None }
                        }
                    }
                }
                Action::Pick => match self.pick(&plan, &state.replay) {
                    Ok(picked) => {
                        index = picked;
                        // After an early response the upload continues. During the back-off it may have read more of the
                        // body than `Replay` buffers; then no retry is possible.
                        Event::Picked { has_body: last.is_none() || state.replay.take_over() }
                    }
                    Err(error) => {
                        unavailable = Some(Box::new(error));
                        Event::Unavailable
                    }
                },
                Action::Send(next) => {
                    drop(last.take());
                    self.count_retry(next.kind);
                    let usual = state
                        .clock
                        .divides_clients_deadline()
                        .then(|| self.policy_state().track_p95_latency(now.into_std()).get());
                    state.clock.begin_attempt(now, next.shares_time, usual.flatten());
                    let planned = PlannedAttempt {
                        endpoint_index: index,
                        permit: permit.take(),
                        kind: next.kind,
                        waited: next.waited,
                        is_last: next.is_last,
                    };
                    let finished = self.attempt(planned, now, state, &mut plan).await;
                    index = finished.attempt.endpoint_index;
                    let result = self.judge(finished, &state.replay, &state.clock);
                    let event = match &result {
                        AttemptResult::Response(response, _)
                            if !may_be_failure(response.head.status(), response.present) =>
                        {
                            Event::Succeeded
                        }
                        result => {
                            now = Instant::now();
                            self.failure(result, index, &plan, state, now)
                        }
                    };
                    last = Some(result);
                    event
                }
                Action::Wait(wait) => {
                    sleep(wait).await;
                    now = Instant::now();
                    Event::Ready { time_left: state.clock.time_left(progress, now) }
                }
                Action::Finish(finish) => {
                    if last.is_some() && plan.kind() != AttemptKind::First {
                        // The response may have come before a wait for an attempt that was then not made.
                        progress.moved();
                    }
                    return self.conclude(finish, last, unavailable, &state.clock);
                }
                // Actions of a hedge, which ends with its attempt.
                Action::PickCopy | Action::SendCopy | Action::AwaitCopies | Action::Settle(_) => {
                    Event::Unavailable
                }
            };
        }
    }

    /// What is known of an attempt that may have failed, and what can be done about it.
    fn failure(
        &self,
        result: &AttemptResult,
        index: usize,
        plan: &RetryPlan<'_>,
        state: &mut RequestState,
        now: Instant,
    ) -> Event {
        let (outcome, hint) = match result {
            AttemptResult::Response(response, outcome) => {
                (*outcome, RetryHint::from_headers(response.head.headers(), SystemTime::now()))
            }
            AttemptResult::Failed(failed) => (AttemptOutcome::new(failed.ending), RetryHint::None),
        };
        let leads_elsewhere =
            matches!(outcome.kind, OutcomeKind::Connect(_)) || outcome.advice() == RetryAdvice::Elsewhere;
        if leads_elsewhere {
            // Its addresses may have changed before their TTL says so.
            self.target.serving.upstream.shared.refresh();
        }
        state.clock.request_sent(self.progress());
        let failed_endpoints = plan.failed_endpoints();
        Event::Failed(AttemptFailure {
            endpoint: index,
            outcome,
            hint,
            body: state.replay.replayability(),
            time_left: state.clock.time_left(self.progress(), now),
            random: self.worker().with_rng(|rng| rng.unit_f64()),
            is_absent: self.endpoints[index].is_absent(),
            has_alternative: leads_elsewhere && self.has_alternative(index, failed_endpoints, now),
            has_sibling: leads_elsewhere && self.has_sibling(index, failed_endpoints),
        })
    }

    /// Whether an endpoint that this request has not failed at can be used.
    fn has_alternative(&self, index: usize, failed: &[usize], now: Instant) -> bool {
        let mut others = self.endpoints.iter().enumerate();
        others.any(|(other, endpoint)| {
            other != index && !failed.contains(&other) && endpoint.is_usable(now.into_std())
        })
    }

    /// Whether the endpoint is one of the two addresses of `localhost` and the other one has not been tried. A service
    /// listens on one of them as a rule; finding out which is no retry.
    fn has_sibling(&self, index: usize, failed: &[usize]) -> bool {
        let endpoint = &self.endpoints[index].shared;
        endpoint.host.is_some()
            && endpoint.address.ip().is_loopback()
            && self.endpoints.iter().enumerate().any(|(other, sibling)| {
                other != index && !failed.contains(&other) && sibling.shared.host == endpoint.host
            })
    }

    /// The endpoint of the next attempt.
    fn pick(&self, plan: &RetryPlan<'_>, replay: &Replay) -> Result<usize, ProxyError> {
        let probe = if plan.is_repeatable() && replay.is_empty() { Probe::Repeatable } else { Probe::Any };
        let wanted = PickCriteria { tried: plan.failed_endpoints(), hash: self.hash, probe: Some(probe) };
        let origin = self.request.origin;
        let index = endpoints::pick(origin.worker, &self.target.serving, &self.endpoints, &wanted)?;
        address_check::check_address(
            origin.view,
            origin.worker,
            self.target,
            self.endpoints[index].address(),
        )?;
        Ok(index)
    }

    /// The result of the attempts, or why there is none.
    fn conclude(
        &self,
        finish: Finish,
        last: Option<AttemptResult>,
        unavailable: Option<Box<ProxyError>>,
        clock: &Clock,
    ) -> Result<AttemptResult, ProxyError> {
        match finish {
            Finish::Result(Stop::Settled) => {}
            Finish::Result(Stop::Reason(reason)) => {
                self.note_stop(reason.word());
                let outcome = match &last {
                    Some(AttemptResult::Response(_, outcome)) => outcome.label(),
                    Some(AttemptResult::Failed(failed)) => AttemptOutcome::new(failed.ending).label(),
                    None => "",
                };
                let upstream = self.name();
                tracing::debug!(upstream, outcome, reason = reason.word(), "no further attempt");
            }
            Finish::Result(Stop::BreakerOpen) => {
                self.policy_state().counters.rejected.increment(Cause::BreakerOpen.word());
                self.note_stop(Cause::BreakerOpen.word());
            }
            Finish::Result(Stop::Observed) => self.policy_state().counters.retries.increment("observed"),
            Finish::Refused { retry_after } => {
                self.policy_state().counters.rejected.increment(Cause::BreakerOpen.word());
                return Err(admission::breaker_open(self.name(), self.policy_state(), retry_after));
            }
            Finish::Expired => {
                let limit = clock.expired(self.progress(), Instant::now());
                return Err(limit.unwrap_or(TimeLimit::Whole).unsent(self.name(), "its first attempt"));
            }
            Finish::Unavailable => {
                // Why there is no endpoint says more than how an address of the same host failed before.
                if let Some(error) = unavailable {
                    self.policy_state().counters.rejected.increment(error.cause.word());
                    return Err(*error);
                }
            }
        }
        last.ok_or_else(|| ProxyError::new(Cause::Internal, "an attempt was neither made nor refused"))
    }

    /// Counts an attempt that is another one of the same request.
    fn count_retry(&self, kind: AttemptKind) {
        let word = match kind {
            AttemptKind::Retry => "sent",
            AttemptKind::Reconnect => "reconnect",
            _ => return,
        };
        self.policy_state().counters.retries.increment(word);
    }

    /// No further attempt follows a failure.
    fn note_stop(&self, reason: &'static str) {
        self.policy_state().counters.retries.increment(reason);
        self.progress().with_record(|record| record.retry_stopped = Some(reason));
    }

    fn note_observed_refusal(&self) {
        self.policy_state().counters.rejected.increment(Cause::BreakerOpen.word());
        let upstream = self.name();
        tracing::debug!(upstream, "the breaker would have refused this request (observed only)");
    }

    /// Asks the breaker for an attempt that was decided on.
    fn acquire_breaker_permit(
        &self,
        kind: AttemptKind,
        now: Instant,
    ) -> Result<Option<BreakerPermit>, BreakerRefusal> {
        if kind == AttemptKind::NextEndpoint {
            self.policy_state().counters.retries.increment(kind.word());
        }
        self.permit(now)
    }

    /// The breaker's permit for one attempt; none where there is no breaker.
    pub(super) fn permit(&self, now: Instant) -> Result<Option<BreakerPermit>, BreakerRefusal> {
        if self.policy.breaker.is_none() {
            return Ok(None);
        }
        let admission = self.policy_state().breaker.admit(now.into_std());
        self.policy_state().record_transition(self.name(), admission.transition);
        admission.permit.map(Some)
    }

    /// Waits until the breaker admits an attempt. It is open because no endpoint was there, and closes as soon as one is.
    async fn await_recovery(
        &self,
        until: Instant,
        mut refused: BreakerRefusal,
    ) -> Result<Option<BreakerPermit>, BreakerRefusal> {
        let absence = &self.policy_state().reachability;
        if let Some(_waiting) = absence.try_wait() {
            loop {
                let changed = absence.changed();
                match self.permit(Instant::now()) {
                    Ok(permit) => return Ok(permit),
                    Err(again) => refused = again,
                }
                if !absence.is_unreachable() || timeout_at(until, changed).await.is_err() {
                    break;
                }
            }
        }
        Err(refused)
    }

    /// One attempt, under the clock; with a second copy where the policy wants one.
    async fn attempt(
        &self,
        planned: PlannedAttempt,
        now: Instant,
        state: &mut RequestState,
        plan: &mut RetryPlan<'_>,
    ) -> FinishedAttempt {
        let is_last = planned.is_last;
        let (started, made) = self.begin_attempt(planned, now, &mut state.outgoing);
        self.write_attempt_fields(state.clock.left(now), &mut state.outgoing, made);
        if let Some(delay) = self.hedge_delay(&state.outgoing, &state.replay, plan.attempts()) {
            // Boxed, as every path that few requests take.
            return Box::pin(self.hedged(started, delay, state, plan)).await;
        }
        let RequestState { clock, outgoing, replay, .. } = state;
        let gate = (self.request.expects_continue && !replay.is_empty()).then(ContinueGate::new);
        let send = pin!(self.send(started.dispatch(is_last), outgoing, replay, gate));
        let result = clock.run(self.progress(), send).await;
        started.finish(result)
    }

    pub(super) fn send<'s>(
        &'s self,
        dispatch: Dispatch,
        outgoing: &'s mut Outgoing,
        replay: &'s Replay,
        gate: Option<Rc<ContinueGate>>,
    ) -> impl Future<Output = Result<UpstreamResponse, AttemptError>> + 's {
        let Dispatch { endpoint_index: index, record_index, began, is_last } = dispatch;
        let opened_by = gate.clone();
        // A stream may be refused after some of the body was sent, and a fallback may take the body over.
        let (by_http1, keep) = (outgoing.version == Version::HTTP_11, outgoing.keep);
        let nothing_follows =
            move |reused| by_http1 && !keep && !self.retry_policy.may_retry_once_sending(reused);
        let body = move |reused: bool| {
            let connected = (!reused).then(Instant::now);
            self.update_attempt(record_index, |one| {
                (one.had_connection, one.connected_at) = (true, connected)
            });
            if nothing_follows(reused) {
                replay.stop_buffering();
            }
            replay.next_attempt(gate)
        };
        let context = AttemptContext {
            name: self.name(),
            endpoint: &self.endpoints[index],
            settings: &self.connections,
            policy_state: self.policy_state(),
            interim: self.request.interim,
            gate: opened_by,
            uploads: !replay.is_empty(),
            is_last,
            began,
        };
        attempt::send(context, outgoing, body)
    }
}
