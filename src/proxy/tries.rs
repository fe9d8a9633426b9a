//! The tries of a call at one upstream, until one of them has an answer to give or none may follow.

use std::{
    num::NonZeroU64,
    pin::pin,
    rc::Rc,
    time::{Duration, SystemTime},
};

use http::Version;
use tokio::time::{Instant, sleep, timeout_at};

use super::{
    admission,
    attempt::{self, Answer, Failed, Means, Outgoing},
    body::{Replay, Replayable},
    clock::RanOut,
    connect,
    deliver::may_be_failure,
    error::ProxyError,
    exchange::{Carried, Ended, Exchange},
    interim::ContinueGate,
};
use crate::{
    cause::Cause,
    config::ObservablePolicy,
    header_names::X_OUTRIGGER_ATTEMPT,
    model::Side,
    resilience::{
        backoff::RetryHint,
        breaker::{BreakerPermit, BreakerRefusal},
        budget::RetryGrant,
        classify::{AttemptOutcome, OutcomeKind, RetryAdvice},
        deadline::{self, GRPC_TIMEOUT, REQUEST_TIMEOUT},
        retry::{
            BodyState as ReplayState, FailedAttempt, MAX_RESENDS, RetryContext, RetryDecision, StopReason,
        },
    },
    telemetry::record::{AttemptReason, AttemptRecord},
    trace_context::{SpanId, TraceContext},
    upstream::{
        http1::AttemptFields,
        local::{LocalEndpoint, PickCriteria, Probe},
    },
};

/// One try to be made.
pub(super) struct Asked {
    pub index: usize,
    pub permit: Option<BreakerPermit>,
    /// No other can follow: the head need not be kept.
    pub last: bool,
}

/// Where a try is noted.
pub(super) type Number = usize;

/// One try that is over.
pub(super) struct Over {
    pub result: Result<Result<Answer, Failed>, RanOut>,
    /// Whose result it is, which with a hedge may be another than was asked first.
    pub index: usize,
    pub began: Instant,
    pub ended: Instant,
    pub permit: Option<BreakerPermit>,
    pub number: Number,
}

impl Over {
    /// It is over now.
    pub(super) fn new(
        result: Result<Result<Answer, Failed>, RanOut>,
        (index, permit): (usize, Option<BreakerPermit>),
        number: Number,
        began: Instant,
    ) -> Self {
        Self { result, index, began, ended: Instant::now(), permit, number }
    }
}

/// The tries so far.
pub(super) struct SoFar {
    /// Those that count.
    pub counted: u32,
    /// The one that mends a race of our own pool was used up.
    pub free_used: bool,
    /// How often it was sent again for having surely not been sent.
    pub resent: u32,
    /// The endpoints that failed.
    pub tried: Vec<usize>,
    /// Until when it waits for an upstream that is not there, once it has begun to.
    pub patience: Option<Instant>,
}

/// What there is of the request's body to send again.
fn body_of(replay: &Replay) -> ReplayState {
    match replay.replayable() {
        Replayable::Untouched => ReplayState::Unread,
        Replayable::Buffered => ReplayState::Replayable,
        Replayable::Discarded => ReplayState::NotKept,
    }
}

impl Exchange<'_> {
    /// Whether the endpoint is one of the two addresses of `localhost` and the other one has not been tried. A service
    /// listens on one of them as a rule; finding out which is no retry.
    fn has_sibling(&self, index: usize, tried: &[usize]) -> bool {
        let failed = &self.endpoints[index].shared;
        failed.host.is_some()
            && failed.address.ip().is_loopback()
            && self.endpoints.iter().enumerate().any(|(other, endpoint)| {
                other != index && !tried.contains(&other) && endpoint.shared.host == failed.host
            })
    }

    /// Tries until there is an answer to give, or no further try may follow.
    pub(super) async fn tries(&self, carried: &mut Carried) -> Result<Ended, ProxyError> {
        let (connection, progress) = (self.call.connection, self.call.progress);
        let mut so_far = SoFar { counted: 1, free_used: false, resent: 0, tried: Vec::new(), patience: None };
        let mut last_end: Option<Ended> = None;
        // Another try was decided, and what it takes from the budget, if it is not the free one. Not sent, it goes back.
        let mut again: Option<Option<RetryGrant<'_>>> = None;
        loop {
            let mut now = Instant::now();
            if let Some(ran_out) = carried.clock.spent(progress, now) {
                return last_end.ok_or_else(|| ran_out.unsent(self.name(), "its turn"));
            }
            let permit = match self.permit(now) {
                Ok(permit) => Ok(permit),
                Err(refused) => {
                    let waited = Box::pin(self.wait_for_comeback(refused, carried, &mut so_far)).await;
                    now = Instant::now();
                    waited
                }
            };
            let permit = match permit {
                Ok(permit) => permit,
                // The failure that opened it says more than that it is open.
                Err(error) => {
                    if last_end.is_some() {
                        self.stopped(error.cause.word());
                    }
                    return last_end.ok_or(error);
                }
            };
            let index = match self.choose(carried, &so_far) {
                Ok(index) => index,
                Err(error) => return last_end.ok_or(error),
            };
            let address = self.endpoints[index].address();
            if let Err(error) = connect::check_address(self.call.view, connection, self.target, address) {
                return last_end.ok_or(error);
            }
            // An early answer leaves its try reading: during the wait it may have read more than is kept.
            if let Some(ended) = last_end.take()
                && !carried.replay.take_over()
            {
                self.stopped(StopReason::BodyNotKept.word());
                return Ok(ended);
            }
            if let Some(lent) = again.take() {
                let word = match lent {
                    None => "reconnect",
                    Some(lent) => {
                        lent.mark_sent();
                        "sent"
                    }
                };
                self.guards().counters.retries.increment(word);
            }

            let more = self.retries.has_attempt_left(so_far.counted);
            let usual = carried
                .clock
                .divides_clients_deadline()
                .then(|| self.guards().track_p95_latency(now.into_std()).get());
            carried.clock.begin_try(now, more && self.may_repeat(carried), usual.flatten());
            let no_free = so_far.free_used && so_far.resent >= MAX_RESENDS;
            let last = !more && no_free && !carried.outgoing.keep;
            let over = self.attempt(Asked { index, permit, last }, now, carried, &mut so_far).await;
            let index = over.index;
            let ended = self.judge(over, &carried.replay, &carried.clock);
            let (outcome, hint) = match &ended {
                // What went well is the rule, and needs no decision.
                Ended::Answered(answer, _) if !may_be_failure(answer.response.status(), answer.present) => {
                    return Ok(ended);
                }
                Ended::Answered(answer, outcome) => {
                    (*outcome, RetryHint::from_headers(answer.response.headers(), SystemTime::now()))
                }
                Ended::Failed(failed) => (AttemptOutcome::new(failed.ending), RetryHint::None),
            };

            if matches!(outcome.kind, OutcomeKind::Connect(_)) || outcome.advice() == RetryAdvice::Elsewhere {
                // Its addresses may have changed before their TTL says so.
                self.target.local.upstream.shared.refresh();
                if !last && self.moves_on(&outcome, index, carried, &mut so_far) {
                    last_end = Some(ended);
                    continue;
                }
                let in_time = carried.clock.spent(progress, Instant::now()).is_none();
                if in_time
                    && matches!(outcome.kind, OutcomeKind::Connect(_))
                    && self.has_sibling(index, &so_far.tried)
                {
                    so_far.tried.push(index);
                    carried.next = (AttemptReason::Sibling, Duration::ZERO);
                    continue;
                }
            }
            carried.clock.request_sent(progress);
            let time_left = carried.clock.time_left(progress, Instant::now());
            let now = Instant::now().into_std();
            let asked = FailedAttempt {
                method: &carried.outgoing.method,
                grpc: self.call.grpc,
                idempotency_key: self.call.idempotency_key,
                attempts: so_far.counted,
                free_retry_used: so_far.free_used,
                resends: so_far.resent,
                body: body_of(&carried.replay),
                committed: false,
            };
            let moment = RetryContext {
                now,
                time_left,
                hint,
                random: connection.worker.with_rng(|rng| rng.unit_f64()),
                budget: &self.guards().budget,
            };
            let retry = match self.retries.decide(&asked, &outcome, &moment) {
                RetryDecision::Retry(retry) if retry.free || !self.observing(ObservablePolicy::Retry) => {
                    retry
                }
                RetryDecision::Retry(_) => {
                    self.guards().counters.retries.increment("observed");
                    return Ok(ended);
                }
                RetryDecision::Stop(reason) => {
                    if outcome.is_failure() || outcome.advice() == RetryAdvice::No {
                        self.stopped(reason.word());
                        tracing::debug!(
                            upstream = self.name(),
                            outcome = outcome.label(),
                            reason = reason.word(),
                            "no further try"
                        );
                    }
                    return Ok(ended);
                }
            };
            again = Some((!retry.free).then(|| self.guards().budget.guard_grant(now)));
            if retry.free && outcome.is_unsent() {
                so_far.resent += 1;
            } else if retry.free {
                so_far.free_used = true;
            } else {
                so_far.counted += 1;
                so_far.tried.push(index);
            }
            let why = if retry.free { AttemptReason::Reconnect } else { AttemptReason::Retry };
            carried.next = (why, retry.wait);
            last_end = Some(ended);
            if !retry.wait.is_zero() {
                sleep(retry.wait).await;
            }
        }
    }

    /// An attempt that ran out of time may have been processed: only what may be done twice can follow it.
    fn may_repeat(&self, carried: &Carried) -> bool {
        self.retries.may_send_twice(&carried.outgoing.method, self.call.idempotency_key)
    }

    /// The endpoint of the next attempt.
    fn choose(&self, carried: &Carried, so_far: &SoFar) -> Result<usize, ProxyError> {
        let repeatable = self.may_repeat(carried) && carried.replay.is_empty();
        let probe = Some(if repeatable { Probe::Repeatable } else { Probe::Any });
        let wanted = PickCriteria { tried: &so_far.tried, hash: self.hash, probe };
        connect::pick(self.call.connection, &self.target.local, &self.endpoints, &wanted)
    }

    /// Whether the call goes to another endpoint at once, as this one is absent and another one can be used. Notes that.
    fn moves_on(
        &self,
        outcome: &AttemptOutcome,
        index: usize,
        carried: &mut Carried,
        so_far: &mut SoFar,
    ) -> bool {
        let now = Instant::now();
        let another = || {
            let others = self.endpoints.iter().enumerate();
            let mut untried = others.filter(|(other, _)| *other != index && !so_far.tried.contains(other));
            untried.any(|(_, endpoint)| endpoint.is_usable(now.into_std()))
        };
        let moves_on = !so_far.tried.contains(&index)
            && self.retries.may_switch_endpoint(
                outcome,
                self.endpoints[index].is_absent(),
                body_of(&carried.replay),
            )
            && carried.clock.spent(self.call.progress, now).is_none()
            && another()
            && self.guards().may_switch_endpoint(now.into_std());
        if moves_on {
            so_far.tried.push(index);
            carried.next = (AttemptReason::NextEndpoint, Duration::ZERO);
            self.guards().counters.retries.increment("next_endpoint");
        }
        moves_on
    }

    /// No further try follows a failure.
    fn stopped(&self, why: &'static str) {
        self.guards().counters.retries.increment(why);
        self.call.progress.with_record(|record| record.retry_stopped = Some(why));
    }

    /// Notes that a try begins, and tells the next hop whose it is. Returns where it is noted, and how many there are
    /// with it.
    pub(super) fn begin(
        &self,
        asked: &Asked,
        (why, waited): (AttemptReason, Duration),
        now: Instant,
        outgoing: &mut Outgoing,
    ) -> (Number, u32) {
        let worker = &self.call.connection.worker;
        let begun = self.call.progress.with_record(|record| {
            // A call to the service is one span, whatever it takes to reach it.
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
                // Nobody has named the trace, and the service may pass on no other field: by this its own failing
                // requests are known to be part of this one. "Not sampled" would silence a service that exports spans.
                TraceContext { sampled: true, ..record.context }.inject(span, &mut outgoing.headers);
            }
            let address = self.endpoints[asked.index].address();
            let mut one = AttemptRecord::new(why, span, address, outgoing.version, now);
            one.tls = self.connections.tls.is_some();
            one.delay = waited;
            one.is_breaker_trial = asked.permit.as_ref().is_some_and(BreakerPermit::is_trial);
            (record.attempts.push(one), record.attempts.count())
        });
        begun.unwrap_or_default()
    }

    /// The breaker's leave for one try.
    pub(super) fn permit(&self, now: Instant) -> Result<Option<BreakerPermit>, BreakerRefusal> {
        if self.policy.breaker.is_none() {
            return Ok(None);
        }
        let admission = self.guards().breaker.admit(now.into_std());
        self.guards().record_transition(self.name(), admission.transition);
        admission.permit.map(Some)
    }

    /// What becomes of a try that the breaker refused. Where nobody could connect and the upstream may be back any
    /// moment, it waits for that: at most as long as it would have waited between tries that were refused.
    async fn wait_for_comeback(
        &self,
        mut refused: BreakerRefusal,
        carried: &mut Carried,
        so_far: &mut SoFar,
    ) -> Result<Option<BreakerPermit>, ProxyError> {
        let guards = self.guards();
        if self.observing(ObservablePolicy::Breaker) {
            guards.counters.rejected.increment(Cause::BreakerOpen.word());
            tracing::debug!(
                upstream = self.name(),
                "the breaker would have refused this call (observed only)"
            );
            return Ok(None);
        }
        let began = Instant::now();
        let patience = *so_far.patience.get_or_insert_with(|| began + self.retries.max_absence_wait());
        let until = match carried.clock.until(self.call.progress).at() {
            Some(end) => patience.min(end.into()),
            None => patience,
        };
        if let Some(_waiting) = guards.reachability.try_wait() {
            loop {
                let changed = guards.reachability.changed();
                match self.permit(Instant::now()) {
                    Ok(permit) => {
                        carried.next.1 += began.elapsed();
                        return Ok(permit);
                    }
                    Err(again) => refused = again,
                }
                if !guards.reachability.is_unreachable() || timeout_at(until, changed).await.is_err() {
                    break;
                }
            }
        }
        guards.counters.rejected.increment(Cause::BreakerOpen.word());
        Err(admission::breaker_open(self.name(), guards, refused.retry_after))
    }

    /// One try, under the clock.
    async fn attempt(&self, asked: Asked, began: Instant, carried: &mut Carried, so_far: &mut SoFar) -> Over {
        let (number, made) = self.begin(&asked, carried.next, began, &mut carried.outgoing);
        self.tell_next_hop(carried.clock.left(began), &mut carried.outgoing, made);
        if let Some(delay) = self.hedge_delay(&carried.outgoing, &carried.replay, so_far.counted) {
            // Boxed, as every path that few calls take: else its size would be every call's.
            return Box::pin(self.hedged((asked, number), began, delay, carried, so_far)).await;
        }
        let Carried { clock, outgoing, replay, .. } = carried;
        let gate = (self.call.expects_continue && !replay.is_empty()).then(ContinueGate::new);
        let endpoint = &self.endpoints[asked.index];
        let send = pin!(self.send(endpoint, (outgoing, asked.last), replay, gate, (number, began)));
        let result = clock.run(self.call.progress, send).await;
        Over::new(result, (asked.index, asked.permit), number, began)
    }

    pub(super) fn send<'s>(
        &'s self,
        endpoint: &'s Rc<LocalEndpoint>,
        (outgoing, last): (&'s mut Outgoing, bool),
        replay: &'s Replay,
        gate: Option<Rc<ContinueGate>>,
        (number, began): (Number, Instant),
    ) -> impl Future<Output = Result<Answer, Failed>> + 's {
        let opened_by = gate.clone();
        // A stream may be refused after some of the body was sent, and a fallback may take the body over.
        let (by_http1, keep) = (outgoing.version == Version::HTTP_11, outgoing.keep);
        let nothing_follows = move |reused| by_http1 && !keep && !self.retries.may_retry_once_sending(reused);
        let body = move |reused: bool| {
            let connected = (!reused).then(Instant::now);
            self.note_try(number, |one| (one.had_connection, one.connected_at) = (true, connected));
            if nothing_follows(reused) {
                replay.stop_buffering();
            }
            replay.next_attempt(gate)
        };
        let means = Means {
            name: self.name(),
            endpoint,
            settings: &self.connections,
            guards: self.guards(),
            interim: self.call.interim.then_some(&self.call.connection.interim),
            gate: opened_by,
            uploads: !replay.is_empty(),
        };
        attempt::send(means, outgoing, last, began, body)
    }

    /// Which try this is, and how much time is left (product: deadlines travel).
    pub(super) fn tell_next_hop(&self, left: Option<Duration>, outgoing: &mut Outgoing, number: u32) {
        let headers = &mut outgoing.headers;
        // The service hears what its caller's sidecar said.
        let attempt = (self.call.connection.side != Side::Inbound).then_some(number);
        if self.call.grpc
            && let Some(left) = left.filter(|_| headers.contains_key(GRPC_TIMEOUT))
        {
            // Only shortened, never made from `timeout`.
            headers.insert(GRPC_TIMEOUT, deadline::grpc_timeout_value(left));
        }
        // No try begins with less than can be told; what the caller said must not go on unchanged in any case.
        let millis = |left| deadline::timeout_header_millis(left).unwrap_or(NonZeroU64::MIN);
        let millis_left = left.filter(|_| !self.call.grpc).map(millis);
        if outgoing.version == Version::HTTP_2 {
            if let Some(attempt) = attempt {
                headers.insert(X_OUTRIGGER_ATTEMPT, attempt.into());
            }
            if let Some(millis) = millis_left {
                headers.insert(REQUEST_TIMEOUT, self.call.connection.worker.forwarded_timeout.value(millis));
            }
            return;
        }
        outgoing.told = AttemptFields { attempt, millis_left };
        if self.call.tells {
            let said = [attempt.map(|_| X_OUTRIGGER_ATTEMPT), millis_left.map(|_| REQUEST_TIMEOUT)];
            for name in said.into_iter().flatten() {
                headers.remove(name);
            }
        }
    }
}
