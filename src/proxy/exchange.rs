//! A call to an upstream: admission, its tries, and the one response that comes of them.
//!
//! ```text
//! run: clocks ─▶ head ─▶ serve ─────────────────────────────────────▶ deliver
//!                          │ admission: rate · place · fault             ▲
//!                          └ tries: breaker · balance · attempt ─ judge ─┘
//!                               ▲                                  │
//!                               └────── wait ◀── retry? ◀──────────┘
//! ```

use std::{
    pin::pin,
    rc::Rc,
    sync::{Arc, atomic::Ordering},
    task::Context,
    time::{Duration, SystemTime},
};

use http::{
    HeaderMap, HeaderName, HeaderValue, Request, Response, Version,
    header::{COOKIE, EXPECT, UPGRADE},
};
use hyper::body::Incoming;
use tokio::time::{Instant, sleep};

use super::{
    accept::Side,
    admission,
    attempt::{self, Answer, Failed, Outgoing},
    body::{GrpcEnd, Replay, Replayable, ResponseBody},
    call::Record,
    clock::{Clock, RanOut},
    connect,
    connection::Connection,
    deliver::{self, may_be_failure},
    error::{Cause, ProxyError},
    head,
    headers::{self, X_OUTRIGGER_ATTEMPT},
    interim::{self, Gate},
    progress::Progress,
    target::{self, Target},
};
use crate::{
    config::{AttemptTimeout, Balance, Observed, Policy, Protocol},
    resilience::{
        backoff::Hint,
        breaker::{Permit, State},
        classify::{Advice, Ending, GrpcStatus, Health, Outcome},
        deadline::{self, Deadline, GRPC_TIMEOUT, Limit, REQUEST_TIMEOUT},
        retry::{Body as ReplayState, Decision, Moment, Reason, RetryPolicy, Tried},
    },
    runtime::View,
    upstream::{balance::hash_key, guards::Guards, local::LocalEndpoint, pool::ConnectionSettings},
};

/// What a failed try weighs in the balancer, as latency. It is forgotten like any other.
const COST_OF_FAILURE: Duration = Duration::from_secs(1);
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// What holds for a call, whichever upstream serves it in the end.
pub struct Call<'a> {
    pub connection: &'a Rc<Connection>,
    pub view: &'a View,
    pub progress: &'a Rc<Progress>,
    grpc: bool,
    pub(super) idempotency_key: bool,
    /// The body waits for the upstream's `100 Continue`.
    expects_continue: bool,
    /// The caller can be told of interim responses: HTTP/1.1 on both sides.
    interim: bool,
}

/// A call to one upstream.
pub struct Exchange<'a> {
    pub call: &'a Call<'a>,
    pub target: &'a Target,
    pub policy: &'a Policy,
    retries: &'a RetryPolicy,
    pub(super) endpoints: Rc<[Rc<LocalEndpoint>]>,
    connections: ConnectionSettings,
    hash: Option<u64>,
}

/// How the tries ended, and what there is to show for it.
pub enum Ended {
    Answered(Box<Answer>, Outcome),
    Failed(Failed),
}

/// Carries a call: prepares its head, has it served, and hands the answer on, or the fallback.
pub async fn run(
    connection: &Rc<Connection>,
    view: &View,
    target: &Target,
    mut request: Request<Incoming>,
    progress: &Rc<Progress>,
    record: &mut Record,
) -> Result<Response<ResponseBody>, ProxyError> {
    let cluster = &target.local.cluster;
    let (policy, retries) = target.matched.cluster.policy(target.route);
    let grpc = headers::is_grpc(request.headers());
    let callers_upgrade = request.headers().contains_key(UPGRADE).then(|| hyper::upgrade::on(&mut request));
    let (mut parts, body) = request.into_parts();
    let callers_version = parts.version;
    let version = match cluster.settings.protocol {
        Protocol::H2 => Version::HTTP_2,
        Protocol::Http1 => Version::HTTP_11,
        Protocol::Auto | Protocol::Tcp if callers_version == Version::HTTP_2 => Version::HTTP_2,
        Protocol::Auto | Protocol::Tcp => Version::HTTP_11,
    };
    let http1 = callers_version != Version::HTTP_2 && version == Version::HTTP_11;

    let observed_timeout = view.snapshot.config.runtime.observe.contains(&Observed::Timeout);
    let mut clock = clock(policy, grpc, observed_timeout, &parts.headers, progress.started());
    let idle = if grpc { policy.tunnel_idle_timeout } else { policy.idle_timeout };
    progress.set_limits(idle.limit(), policy.max_duration.limit());

    let upgrade = head::prepare(connection, view, target, &mut parts, version)?;
    let upgrade = upgrade.filter(|_| http1 && callers_version == Version::HTTP_11);
    let call = Call {
        connection,
        view,
        progress,
        grpc,
        idempotency_key: parts.headers.contains_key(IDEMPOTENCY_KEY),
        expects_continue: http1 && parts.headers.contains_key(EXPECT),
        interim: http1 && callers_version == Version::HTTP_11,
    };
    let replay = Replay::new(body, retries.body_limit(&parts.method, call.idempotency_key), progress);
    let mut outgoing =
        head::outgoing(parts, version, &cluster.settings.name, upgrade.as_ref(), !replay.is_empty())?;
    outgoing.keep = policy.fallback.is_some();

    let ended = serve(&call, target, policy, retries, &mut clock, &mut outgoing, &replay, record).await;
    if observed_timeout && policy.timeout.limit().is_some_and(|limit| progress.started().elapsed() > limit) {
        tracing::info!(
            upstream = cluster.settings.name,
            "`timeout` would have ended this call (observed only)"
        );
    }
    let callers_upgrade = callers_upgrade.filter(|_| upgrade.is_some());
    let failure = match &ended {
        Ok((_, Ended::Answered(_, outcome))) if outcome.breaker_health() != Health::Failure => None,
        Ok((_, Ended::Answered(_, outcome))) => Some(outcome.label()),
        Ok((_, Ended::Failed(failed))) => {
            failed.error.cause.is_exhaustion().then(|| failed.error.cause.word())
        }
        Err(error) => error.cause.is_exhaustion().then(|| error.cause.word()),
    };
    if let (Some(why), Some(fallback)) = (failure, &policy.fallback.0) {
        let Some(other) = &fallback.upstream else {
            return Ok(deliver::fallback(fallback, &view.names.deployment, why));
        };
        if let Some(other) = target::named(view, other)
            && replay.take_over()
        {
            // Its connection and its place are not needed any more.
            drop(ended);
            let (policy, retries) = other.matched.cluster.policy(None);
            record.upstream = Some(other.local.cluster.settings.name.clone());
            let mut clock = clock.afresh(timeouts(policy, grpc, observed_timeout), progress);
            let ended =
                serve(&call, &other, policy, retries, &mut clock, &mut outgoing, &replay, record).await;
            return finish(ended?, callers_version, callers_upgrade, record);
        }
    }
    finish(ended?, callers_version, callers_upgrade, record)
}

fn finish(
    (exchange, ended): (Exchange<'_>, Ended),
    callers_version: Version,
    callers_upgrade: Option<hyper::upgrade::OnUpgrade>,
    record: &Record,
) -> Result<Response<ResponseBody>, ProxyError> {
    match ended {
        Ended::Failed(failed) => Err(failed.error),
        Ended::Answered(answer, outcome) => {
            deliver::hand_on(&exchange, *answer, &outcome, callers_version, callers_upgrade, record)
        }
    }
}

/// Has an upstream serve the call, if its guards let it in.
#[allow(clippy::too_many_arguments, reason = "the two upstreams of a call share all but the first three")]
async fn serve<'a>(
    call: &'a Call<'a>,
    target: &'a Target,
    policy: &'a Policy,
    retries: &'a RetryPolicy,
    clock: &mut Clock,
    outgoing: &mut Outgoing,
    replay: &Replay,
    record: &mut Record,
) -> Result<(Exchange<'a>, Ended), ProxyError> {
    let local = &target.local;
    let settings = &local.cluster.settings;
    clock.request_sent(call.progress);
    let deadline = clock.deadline().at().map(|(at, _)| at);
    let rate = target.matched.cluster.rate_limit(target.route);
    let place =
        admission::admit(call.connection, call.view, local, policy, rate, &outgoing.headers, deadline)
            .await?;
    let max_age = settings.max_connection_age.limit();
    let exchange = Exchange {
        endpoints: connect::endpoints(call.connection, local).await?,
        connections: ConnectionSettings {
            connect_timeout: policy.connect_timeout.limit(),
            pool_idle: settings.pool_idle_timeout,
            header_case: settings.header_case,
            // Drawn anew, so that not all connections end at once.
            max_age: max_age.map(|age| call.connection.worker.with_rng(|rng| rng.jitter(age, 0.1))),
        },
        hash: hash(&settings.balance, &outgoing.headers),
        call,
        target,
        policy,
        retries,
    };
    exchange.guards().budget.deposit();
    let ended = exchange.tries(clock, outgoing, replay, record).await;
    exchange.note_spent(&ended, record);
    let mut ended = ended?;
    if let Ended::Answered(answer, _) = &mut ended {
        answer.held.place = place;
    }
    Ok((exchange, ended))
}

/// The clocks of a call. gRPC has none but its own, unless a route sets them.
fn clock(policy: &Policy, grpc: bool, observed: bool, headers: &HeaderMap, started: Instant) -> Clock {
    let callers = if grpc { deadline::grpc_timeout(headers) } else { deadline::request_timeout(headers) };
    let (timeout, attempt) = timeouts(policy, grpc, observed);
    Clock::new(Deadline::from_caller(started.into_std(), callers), timeout, attempt, started)
}

fn timeouts(policy: &Policy, grpc: bool, observed: bool) -> (Option<Duration>, AttemptTimeout) {
    let timeout = policy.timeout.limit().filter(|_| !observed && (!grpc || policy.route_sets_timeout));
    let attempt = if observed || (grpc && !policy.route_sets_attempt_timeout) {
        AttemptTimeout::Fixed(Default::default())
    } else {
        policy.attempt_timeout
    };
    (timeout, attempt)
}

/// What balances by hash.
fn hash(balance: &Balance, headers: &HeaderMap) -> Option<u64> {
    match balance {
        Balance::HashHeader(name) => headers.get(name).map(|value| hash_key(value.as_bytes())),
        Balance::HashCookie(name) => headers
            .get_all(COOKIE)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(';'))
            .filter_map(|crumb| crumb.trim().split_once('='))
            .find(|(key, _)| key == name)
            .map(|(_, value)| hash_key(value.as_bytes())),
        Balance::P2c | Balance::LeastRequest | Balance::RoundRobin => None,
    }
}

/// One try to be made.
pub(super) struct Asked {
    pub index: usize,
    pub permit: Option<Permit>,
    /// No other can follow: the head need not be kept.
    pub last: bool,
}

/// One try that is over.
pub(super) struct Over {
    pub result: Result<Result<Answer, Failed>, RanOut>,
    /// Whose result it is, which with a hedge may be another than was asked first.
    pub index: usize,
    pub took: Duration,
    pub permit: Option<Permit>,
}

impl<'a> Exchange<'a> {
    pub fn name(&self) -> &'a str {
        &self.target.local.cluster.settings.name
    }

    pub(super) fn guards(&self) -> &'a Arc<Guards> {
        &self.target.local.upstream.shared.guards
    }

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

    fn observing(&self, policy: Observed) -> bool {
        self.call.view.snapshot.config.runtime.observe.contains(&policy)
    }

    /// Tries until there is an answer to give, or no further try may follow.
    async fn tries(
        &self,
        clock: &mut Clock,
        outgoing: &mut Outgoing,
        replay: &Replay,
        record: &mut Record,
    ) -> Result<Ended, ProxyError> {
        let (connection, progress) = (self.call.connection, self.call.progress);
        let mut tried = Vec::new();
        // Tries that count, and whether the one that mends a race of our own pool was used up.
        let (mut counted, mut free_used) = (1, false);
        let mut last_end: Option<Ended> = None;
        // Another try was decided; whether it is the free one.
        let mut again: Option<bool> = None;
        loop {
            let permit = match self.permit() {
                Ok(permit) => permit,
                // The failure that opened it says more than that it is open.
                Err(error) => {
                    if last_end.is_some() {
                        self.guards().counts.retries.add(error.cause.word());
                        record.stopped = Some(error.cause.word());
                    }
                    return last_end.ok_or(error);
                }
            };
            let index =
                match connect::pick(connection, &self.target.local, &self.endpoints, &tried, self.hash) {
                    Ok(index) => index,
                    Err(error) => return last_end.ok_or(error),
                };
            connect::check_address(self.call.view, connection, self.target, self.endpoints[index].address())?;
            // An early answer leaves its try reading: during the wait it may have read more than is kept.
            if let Some(ended) = last_end.take()
                && !replay.take_over()
            {
                self.guards().counts.retries.add(Reason::BodyGone.word());
                record.stopped = Some(Reason::BodyGone.word());
                return Ok(ended);
            }
            if let Some(free) = again.take() {
                self.guards().counts.retries.add(if free { "reconnect" } else { "sent" });
            }

            let more = self.retries.another_possible(counted);
            // A try that ran out of time may have been processed: only what may be done twice can follow it.
            clock.begin_try(more && self.retries.may_repeat(&outgoing.method, self.call.idempotency_key));
            let first = Asked { index, permit, last: !more && free_used && !outgoing.keep };
            let over = self.attempt(first, clock, outgoing, replay, &mut counted, &mut tried, record).await;
            let index = over.index;
            let ended = self.judge(over, replay, clock);
            let (outcome, hint) = match &ended {
                // What went well is the rule, and needs no decision.
                Ended::Answered(answer, _) if !may_be_failure(&answer.response) => return Ok(ended),
                Ended::Answered(answer, outcome) => {
                    (*outcome, Hint::from_headers(answer.response.headers(), SystemTime::now()))
                }
                Ended::Failed(failed) => (Outcome::new(failed.ending), Hint::None),
            };

            if matches!(outcome.ending, Ending::Connect(_)) {
                // Its addresses may have changed before their TTL says so.
                self.target.local.upstream.shared.refresh();
                if self.has_sibling(index, &tried) {
                    tried.push(index);
                    continue;
                }
            }
            clock.request_sent(progress);
            let now = Instant::now().into_std();
            let asked = Tried {
                method: &outgoing.method,
                grpc: self.call.grpc,
                idempotency_key: self.call.idempotency_key,
                tries: counted,
                free_used,
                body: match replay.replayable() {
                    Replayable::Untouched => ReplayState::Untouched,
                    Replayable::Kept => ReplayState::Replayable,
                    Replayable::Gone => ReplayState::Gone,
                },
                committed: false,
            };
            let moment = Moment {
                now,
                time_left: clock.deadline().left(now),
                hint,
                random: connection.worker.with_rng(|rng| rng.unit_f64()),
                budget: &self.guards().budget,
            };
            let counts = &self.guards().counts.retries;
            let retry = match self.retries.decide(&asked, &outcome, &moment) {
                Decision::Retry(retry) if retry.free || !self.observing(Observed::Retry) => retry,
                Decision::Retry(_) => {
                    counts.add("observed");
                    return Ok(ended);
                }
                Decision::Stop(reason) => {
                    if outcome.breaker_health() == Health::Failure || outcome.advice() == Advice::No {
                        counts.add(reason.word());
                        record.stopped = Some(reason.word());
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
            again = Some(retry.free);
            if retry.free {
                free_used = true;
            } else {
                counted += 1;
                tried.push(index);
            }
            last_end = Some(ended);
            if !retry.wait.is_zero() {
                sleep(retry.wait).await;
            }
        }
    }

    /// The breaker's leave for one try.
    pub(super) fn permit(&self) -> Result<Option<Permit>, ProxyError> {
        if self.policy.breaker.is_none() {
            return Ok(None);
        }
        let guards = self.guards();
        let admission = guards.breaker.admit(Instant::now().into_std());
        guards.note(self.name(), admission.transition);
        match admission.permit {
            Ok(permit) => Ok(Some(permit)),
            Err(refused) => {
                guards.counts.rejected.add(Cause::BreakerOpen.word());
                if self.observing(Observed::Breaker) {
                    tracing::debug!(
                        upstream = self.name(),
                        "the breaker would have refused this call (observed only)"
                    );
                    return Ok(None);
                }
                Err(admission::breaker_open(self.name(), guards, refused.retry_after))
            }
        }
    }

    /// One try, under the clock.
    #[allow(clippy::too_many_arguments, reason = "the state of the loop it is a step of")]
    async fn attempt(
        &self,
        asked: Asked,
        clock: &mut Clock,
        outgoing: &mut Outgoing,
        replay: &Replay,
        counted: &mut u32,
        tried: &mut Vec<usize>,
        record: &mut Record,
    ) -> Over {
        record.tries += 1;
        record.endpoint = Some(self.endpoints[asked.index].address());
        self.tell_next_hop(clock.left(Instant::now()), outgoing, record.tries);
        if let Some(delay) = self.hedge_delay(outgoing, replay, *counted) {
            // Boxed, as every path that few calls take: else its size would be every call's.
            return Box::pin(self.hedged(asked, delay, clock, outgoing, replay, counted, tried, record))
                .await;
        }
        let began = Instant::now();
        let gate = (self.call.expects_continue && !replay.is_empty()).then(Gate::new);
        let endpoint = &self.endpoints[asked.index];
        let send = pin!(self.send(endpoint, outgoing.for_try(asked.last), replay, gate.clone()));
        let result = clock.run(self.call.progress, send, |cx| self.pass_continue(cx, gate.as_ref())).await;
        Over { result, index: asked.index, took: began.elapsed(), permit: asked.permit }
    }

    /// Lets a body that was held back go once the upstream has said `100 Continue`.
    pub(super) fn pass_continue(&self, cx: &mut Context<'_>, gate: Option<&Rc<Gate>>) {
        if self.call.interim
            && self.call.connection.wire.poll_continue(cx)
            && let Some(gate) = gate
        {
            gate.open();
        }
    }

    pub(super) fn send<'s>(
        &'s self,
        endpoint: &'s Rc<LocalEndpoint>,
        request: Request<()>,
        replay: &'s Replay,
        gate: Option<Rc<Gate>>,
    ) -> impl Future<Output = Result<Answer, Failed>> + 's {
        let version = request.version();
        let make = move || {
            let mut request = request.map(|()| replay.next_try(gate));
            if self.call.interim {
                interim::pass_on(&mut request, &self.call.connection.wire);
            }
            request
        };
        attempt::send(self.name(), endpoint, &self.connections, self.guards(), version, make)
    }

    /// Which try this is, and how much time is left (product: deadlines travel).
    pub(super) fn tell_next_hop(&self, left: Option<Duration>, outgoing: &mut Outgoing, number: u32) {
        let headers = &mut outgoing.headers;
        if self.call.connection.side != Side::Inbound {
            headers.insert(X_OUTRIGGER_ATTEMPT, HeaderValue::from(number));
        }
        if self.call.grpc {
            // Only shortened, never made from `timeout`.
            if let Some(left) = left.filter(|_| headers.contains_key(GRPC_TIMEOUT)) {
                headers.insert(GRPC_TIMEOUT, deadline::grpc_timeout_value(left));
            }
        } else if let Some(value) = left.and_then(deadline::request_timeout_value) {
            headers.insert(REQUEST_TIMEOUT, value);
        }
    }

    /// What a try's end means, told to breaker, outlier detection and balancer.
    pub(super) fn judge(&self, over: Over, replay: &Replay, clock: &Clock) -> Ended {
        let now = Instant::now().into_std();
        let endpoint = &self.endpoints[over.index];
        let ended = match over.result {
            Ok(Ok(answer)) => {
                let response = &answer.response;
                // Advice counts from upstreams that the configuration names.
                let named = self.target.index.is_some();
                let advice = if named { Advice::from_headers(response.headers()) } else { Advice::None };
                let outcome = match GrpcStatus::from_headers(response.headers()).filter(|_| self.call.grpc) {
                    Some(status) => Outcome::grpc(status, advice, clock.deadline().callers_time_left(now)),
                    None => Outcome { ending: Ending::Http(response.status()), advice },
                };
                Ended::Answered(Box::new(answer), outcome)
            }
            Ok(Err(mut failed)) => {
                if replay.caller_gone() {
                    failed.ending = Ending::CallerGone;
                }
                Ended::Failed(failed)
            }
            Err(ran_out) => Ended::Failed(self.timed_out(ran_out, endpoint, over.took)),
        };
        let outcome = match &ended {
            Ended::Answered(_, outcome) => *outcome,
            Ended::Failed(failed) => Outcome::new(failed.ending),
        };
        match outcome.endpoint_health() {
            Health::Success => endpoint.observe(over.took, now),
            // Failing fast must not look like answering fast.
            Health::Failure => endpoint.observe(over.took.max(COST_OF_FAILURE), now),
            Health::Neutral => {}
        }
        if self.policy.limits.is_some_and(|limits| limits.adaptive)
            && let Some(adaptive) = &*self.guards().adaptive.load()
        {
            adaptive.record(over.took, outcome.breaker_health(), &self.guards().requests, now);
        }
        if let (Some(hedge), Health::Success) = (&self.policy.hedge.0, outcome.breaker_health())
            && let Some(percent) = hedge.percent()
        {
            self.guards().quantile(percent, now).record(over.took, now);
        }
        self.report(ended, &outcome, endpoint, over.permit)
    }

    /// Tells breaker and outlier detection. A gRPC call that has only begun to answer is told of at its end.
    fn report(
        &self,
        mut ended: Ended,
        outcome: &Outcome,
        endpoint: &Rc<LocalEndpoint>,
        permit: Option<Permit>,
    ) -> Ended {
        let now = Instant::now().into_std();
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
            let named = self.target.local.upstream.shared.name.clone();
            answer.held.grpc = Some(GrpcEnd {
                upstream: named,
                guards: Arc::clone(guards),
                endpoint: Rc::clone(endpoint),
                permit,
                random: random(),
            });
            return ended;
        }
        if let Some(ejection) = endpoint.ejection() {
            let health = weighed(outcome.endpoint_health());
            let ejected = guards.outliers.report(
                &endpoint.address(),
                ejection,
                health,
                now,
                if health == Health::Failure { random() } else { 0.0 },
            );
            if let Some(ejected) = ejected {
                tracing::warn!(upstream = self.name(), endpoint = %ejected.address, failures = ejected.failures_in_a_row, "endpoint ejected");
            }
        }
        if let Some(permit) = permit {
            let health = weighed(outcome.breaker_health());
            let transition = guards.breaker.report(
                permit,
                health,
                now,
                if health == Health::Failure { random() } else { 0.0 },
            );
            if transition.is_some_and(|transition| transition.to == State::Open) {
                guards.unreachable.store(matches!(outcome.ending, Ending::Connect(_)), Ordering::Relaxed);
            }
            guards.note(self.name(), transition);
        }
        ended
    }

    fn timed_out(&self, ran_out: RanOut, endpoint: &LocalEndpoint, took: Duration) -> Failed {
        let name = self.name();
        let address = endpoint.address();
        let (ending, cause, what) = match ran_out {
            RanOut::Limit(Limit::Attempt) => {
                (Ending::AttemptTimeout, Cause::AttemptTimeout, "`attempt_timeout`")
            }
            RanOut::Limit(Limit::Timeout) => (Ending::Timeout, Cause::Timeout, "`timeout`"),
            RanOut::Limit(Limit::Caller) => {
                (Ending::CallersDeadline, Cause::Deadline, "the caller's deadline")
            }
            RanOut::Upload => {
                (Ending::CallerGone, Cause::Timeout, "`idle_timeout`: the request's body stood still")
            }
            RanOut::Whole => (Ending::CallersDeadline, Cause::Timeout, "`max_duration`"),
        };
        let detail = format!("{name}: no answer from {address} after {took:.1?}, within {what}");
        Failed::new(ending, ProxyError::new(cause, detail))
    }

    /// Remembers that this trace's tries were spent here: the inbound side then asks the caller not to repeat them.
    fn note_spent(&self, ended: &Result<Ended, ProxyError>, record: &Record) {
        let failed = match ended {
            Ok(Ended::Answered(_, outcome)) => outcome.breaker_health() == Health::Failure,
            Ok(Ended::Failed(failed)) => failed.error.cause.is_exhaustion(),
            Err(error) => error.cause.is_exhaustion(),
        };
        if failed
            && self.call.connection.side != Side::Inbound
            && let Some(trace) = record.trace
        {
            self.call.connection.worker.shared.spent.note(trace, Instant::now().into_std());
        }
    }
}
