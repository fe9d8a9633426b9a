//! A call to an upstream: its tries, and the one response that comes of them.

use std::{
    rc::Rc,
    time::{Duration, SystemTime},
};

use http::{
    HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, Uri, Version,
    header::{CONNECTION, COOKIE, EXPECT, HOST, UPGRADE},
    request, uri,
};
use hyper::{body::Incoming, upgrade::OnUpgrade};
use tokio::time::{Instant, sleep};

use super::{
    accept::Side,
    attempt::{self, Answer, Failed, Outgoing},
    body::{Replay, Replayable, ResponseBody},
    call::Record,
    clock::{Clock, RanOut},
    connect,
    connection::Connection,
    error::{Cause, ProxyError},
    headers::{self, Caller, X_OUTRIGGER_ATTEMPT, X_OUTRIGGER_RETRY},
    interim::{self, Gate},
    progress::Progress,
    target::Target,
    upgrade,
};
use crate::{
    config::{AttemptTimeout, Balance, Policy, Protocol},
    resilience::{
        backoff::Hint,
        classify::{Advice, Ending, GrpcStatus, Outcome},
        deadline::{self, Deadline, GRPC_TIMEOUT, Limit, REQUEST_TIMEOUT},
        retry::{Body as ReplayState, Decision, Moment, RetryPolicy, Tried},
    },
    runtime::View,
    upstream::{balance::hash_key, local::LocalEndpoint, pool::ConnectionSettings},
};

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const PROXY_STATUS: HeaderName = HeaderName::from_static("proxy-status");

/// What holds for all tries of a call.
struct Exchange<'a> {
    connection: &'a Rc<Connection>,
    view: &'a View,
    target: &'a Target,
    policy: &'a Policy,
    retries: &'a RetryPolicy,
    progress: &'a Rc<Progress>,
    endpoints: Rc<[Rc<LocalEndpoint>]>,
    connection_settings: ConnectionSettings,
    grpc: bool,
    idempotency_key: bool,
    /// The body waits for the upstream's `100 Continue`.
    expects_continue: bool,
    /// The caller can be told of interim responses: HTTP/1.1 on both sides.
    interim: bool,
    hash: Option<u64>,
}

/// How a try ended, and what there is to show for it.
enum Tries {
    Answered(Box<Answer>, Outcome),
    Failed(Failed),
}

/// Carries a call: prepares its head, tries until there is an answer or no try is left, and hands the answer on.
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
    let (mut head, body) = request.into_parts();
    let version = match cluster.settings.protocol {
        Protocol::H2 => Version::HTTP_2,
        Protocol::Http1 => Version::HTTP_11,
        Protocol::Auto | Protocol::Tcp if head.version == Version::HTTP_2 => Version::HTTP_2,
        Protocol::Auto | Protocol::Tcp => Version::HTTP_11,
    };
    let http1 = head.version != Version::HTTP_2 && version == Version::HTTP_11;

    let mut clock = clock(policy, grpc, &head.headers, progress.started());
    let idle = if grpc { policy.tunnel_idle_timeout } else { policy.idle_timeout };
    progress.set_limits(idle.limit(), policy.max_duration.limit());

    let upgrade = prepare_head(connection, view, target, &mut head, version)?;
    let upgrade = upgrade.filter(|_| http1 && head.version == Version::HTTP_11);
    let idempotency_key = head.headers.contains_key(IDEMPOTENCY_KEY);
    let exchange = Exchange {
        endpoints: connect::endpoints(connection, &target.local).await?,
        connection_settings: ConnectionSettings {
            connect_timeout: policy.connect_timeout.limit(),
            pool_idle: cluster.settings.pool_idle_timeout,
            header_case: cluster.settings.header_case,
            max_age: cluster.settings.max_connection_age.limit(),
        },
        expects_continue: http1 && head.headers.contains_key(EXPECT),
        interim: http1 && head.version == Version::HTTP_11,
        hash: hash(&cluster.settings.balance, &head.headers),
        connection,
        view,
        target,
        policy,
        retries,
        progress,
        grpc,
        idempotency_key,
    };
    let replay = Replay::new(body, retries.body_limit(&head.method, idempotency_key), progress);
    let callers_version = head.version;
    let mut outgoing = outgoing(head, version, cluster.settings.name.as_str(), upgrade.as_ref())?;

    target.local.upstream.shared.retry_budget.deposit();
    match exchange.tries(&mut clock, &mut outgoing, &replay, record).await? {
        Tries::Failed(failed) => Err(failed.error),
        Tries::Answered(answer, outcome) => {
            let callers_upgrade = callers_upgrade.filter(|_| upgrade.is_some());
            exchange.hand_on(*answer, &outcome, callers_version, callers_upgrade, record)
        }
    }
}

/// The clocks of a call. gRPC has none but its own, unless a route sets them.
fn clock(policy: &Policy, grpc: bool, headers: &HeaderMap, started: Instant) -> Clock {
    let callers = if grpc { deadline::grpc_timeout(headers) } else { deadline::request_timeout(headers) };
    let timeout = policy.timeout.limit().filter(|_| !grpc || policy.route_sets_timeout);
    let attempt = if grpc && !policy.route_sets_attempt_timeout {
        // Without a timeout of its own there is nothing to halve.
        AttemptTimeout::Fixed(Default::default())
    } else {
        policy.attempt_timeout
    };
    Clock::new(Deadline::from_caller(started.into_std(), callers), timeout, attempt, started)
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

/// Makes the caller's head the one that is sent on. Returns the protocol the caller asks to change to.
fn prepare_head(
    connection: &Connection,
    view: &View,
    target: &Target,
    head: &mut request::Parts,
    version: Version,
) -> Result<Option<HeaderValue>, ProxyError> {
    let headers = &mut head.headers;
    let said = headers::remove_hop_by_hop(headers)?;
    headers::remove_proxy_credentials(headers);
    headers::remove_spoofed(headers);
    view.names.via(&connection.side).append(headers, head.version);
    if connection.side == Side::Inbound {
        let host = headers.get(HOST).cloned().or_else(|| {
            head.uri.authority().and_then(|authority| HeaderValue::from_str(authority.as_str()).ok())
        });
        let caller = Caller { address: &connection.peer, proto: "http", host };
        headers::set_forwarded(headers, view.snapshot.config.inbound.forwarded, caller);
    }
    if version == Version::HTTP_11 && head.version == Version::HTTP_2 {
        headers::join_cookies(headers);
    }
    if let Some(route) = target.route {
        if let Some(edits) = target.matched.cluster.edits.get(route) {
            edits.request.apply(headers);
        }
        if let Some(routes) = target.index.and_then(|index| view.snapshot.router.routes(index))
            && let Some(path) = head.uri.path_and_query()
            && let Some(rewritten) = routes.rewrite(route, path)
        {
            let mut parts = std::mem::take(&mut head.uri).into_parts();
            parts.path_and_query = Some(rewritten);
            head.uri = Uri::from_parts(parts).map_err(|error| ProxyError::malformed(error.to_string()))?;
        }
    }
    Ok(said.upgrade)
}

/// The head as the upstream's protocol has it.
fn outgoing(
    mut head: request::Parts,
    version: Version,
    name: &str,
    upgrade: Option<&HeaderValue>,
) -> Result<Outgoing, ProxyError> {
    let malformed = |error: http::Error| ProxyError::malformed(error.to_string());
    let path = head.uri.path_and_query().cloned().unwrap_or_else(|| uri::PathAndQuery::from_static("/"));
    let uri = if version == Version::HTTP_2 {
        let authority = match head.uri.authority() {
            Some(authority) => authority.as_str().to_owned(),
            None => head.headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or(name).to_owned(),
        };
        head.headers.remove(HOST);
        Uri::builder().scheme("http").authority(authority).path_and_query(path).build().map_err(malformed)?
    } else {
        // The authority of an absolute target, or of HTTP/2, is the Host; it replaces another one (RFC 9112 §3.2.2).
        if let Some(authority) = head.uri.authority() {
            let host = HeaderValue::from_str(authority.as_str()).map_err(|error| malformed(error.into()))?;
            head.headers.insert(HOST, host);
        } else if !head.headers.contains_key(HOST) {
            let host = HeaderValue::from_str(name).map_err(|error| malformed(error.into()))?;
            head.headers.insert(HOST, host);
        }
        Uri::from(path)
    };
    if let Some(protocol) = upgrade {
        head.headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        head.headers.insert(UPGRADE, protocol.clone());
    }
    head.extensions.remove::<OnUpgrade>();
    Ok(Outgoing { method: head.method, uri, version, headers: head.headers, extensions: head.extensions })
}

impl Exchange<'_> {
    fn name(&self) -> &str {
        &self.target.local.cluster.settings.name
    }

    /// Tries until there is an answer to give, or no further try may follow.
    async fn tries(
        &self,
        clock: &mut Clock,
        outgoing: &mut Outgoing,
        replay: &Replay,
        record: &mut Record,
    ) -> Result<Tries, ProxyError> {
        let mut tried = Vec::new();
        // Tries that count, and whether the one that mends a race of our own pool was used up.
        let (mut counted, mut free_used) = (1, false);
        loop {
            let local = &self.target.local;
            let index = connect::pick(self.connection, local, &self.endpoints, &tried, self.hash)?;
            let endpoint = &self.endpoints[index];
            connect::check_address(self.view, self.connection, self.target, endpoint.address())?;
            record.tries += 1;
            record.endpoint = Some(endpoint.address());

            let more = self.retries.another_possible(counted);
            clock.begin_try(more);
            let last = !more && free_used;
            let began = Instant::now();
            let result = self.attempt(clock, endpoint, outgoing, replay, record.tries, last).await;
            let now = Instant::now();
            let tries = self.judge(result, replay, clock, endpoint, now - began);
            let (outcome, hint) = match &tries {
                // What went well is the rule, and needs no decision.
                Tries::Answered(answer, _) if !may_be_failure(&answer.response) => return Ok(tries),
                Tries::Answered(answer, outcome) => {
                    (*outcome, Hint::from_headers(answer.response.headers(), SystemTime::now()))
                }
                Tries::Failed(failed) => (Outcome::new(failed.ending), Hint::None),
            };

            clock.request_sent(self.progress);
            let asked = Tried {
                method: &outgoing.method,
                grpc: self.grpc,
                idempotency_key: self.idempotency_key,
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
                now: now.into_std(),
                time_left: clock.deadline().left(now.into_std()),
                hint,
                random: self.connection.worker.with_rng(|rng| rng.unit_f64()),
                budget: &local.upstream.shared.retry_budget,
            };
            let retry = match self.retries.decide(&asked, &outcome, &moment) {
                Decision::Retry(retry) if !last => retry,
                Decision::Retry(_) => return Ok(tries),
                Decision::Stop(reason) => {
                    tracing::debug!(
                        upstream = self.name(),
                        outcome = outcome.label(),
                        reason = reason.word(),
                        "no further try"
                    );
                    return Ok(tries);
                }
            };
            if retry.free {
                free_used = true;
            } else {
                counted += 1;
                tried.push(index);
            }
            drop(tries);
            if !retry.wait.is_zero() {
                sleep(retry.wait).await;
            }
        }
    }

    /// One try, under the clock.
    async fn attempt(
        &self,
        clock: &mut Clock,
        endpoint: &Rc<LocalEndpoint>,
        outgoing: &mut Outgoing,
        replay: &Replay,
        number: u32,
        last: bool,
    ) -> Result<Result<Answer, Failed>, RanOut> {
        self.tell_next_hop(clock, outgoing, number);
        let gate = (self.expects_continue && !replay.is_empty()).then(Gate::new);
        let version = outgoing.version;
        let wire = &self.connection.wire;
        let make = || {
            let mut request = outgoing.request(replay.next_try(gate.clone()), last);
            if self.interim {
                interim::pass_on(&mut request, wire);
            }
            request
        };
        let work = attempt::send(self.name(), endpoint, &self.connection_settings, version, make);
        clock
            .run(self.progress, work, |cx| {
                if self.interim
                    && wire.poll_continue(cx)
                    && let Some(gate) = &gate
                {
                    gate.open();
                }
            })
            .await
    }

    /// Which try this is, and how much time is left (product: deadlines travel).
    fn tell_next_hop(&self, clock: &Clock, outgoing: &mut Outgoing, number: u32) {
        let headers = &mut outgoing.headers;
        if self.connection.side != Side::Inbound {
            headers.insert(X_OUTRIGGER_ATTEMPT, HeaderValue::from(number));
        }
        let left = clock.left(Instant::now());
        if self.grpc {
            // Only shortened, never made from `timeout`.
            if let Some(left) = left.filter(|_| headers.contains_key(GRPC_TIMEOUT)) {
                headers.insert(GRPC_TIMEOUT, deadline::grpc_timeout_value(left));
            }
        } else if let Some(value) = left.and_then(deadline::request_timeout_value) {
            headers.insert(REQUEST_TIMEOUT, value);
        }
    }

    /// What a try's end means.
    fn judge(
        &self,
        result: Result<Result<Answer, Failed>, RanOut>,
        replay: &Replay,
        clock: &Clock,
        endpoint: &LocalEndpoint,
        took: Duration,
    ) -> Tries {
        let now = Instant::now();
        match result {
            Ok(Ok(answer)) => {
                endpoint.observe(took, now.into_std());
                let response = &answer.response;
                let advice = if self.target.index.is_some() {
                    Advice::from_headers(response.headers())
                } else {
                    Advice::None
                };
                let outcome = match GrpcStatus::from_headers(response.headers()).filter(|_| self.grpc) {
                    Some(status) => {
                        Outcome::grpc(status, advice, clock.deadline().callers_time_left(now.into_std()))
                    }
                    None => Outcome { ending: Ending::Http(response.status()), advice },
                };
                Tries::Answered(Box::new(answer), outcome)
            }
            Ok(Err(mut failed)) => {
                if replay.caller_gone() {
                    failed.ending = Ending::CallerGone;
                }
                Tries::Failed(failed)
            }
            Err(ran_out) => {
                endpoint.observe(took, now.into_std());
                Tries::Failed(self.timed_out(ran_out, endpoint, took))
            }
        }
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
        Failed { ending, error: ProxyError::new(cause, detail) }
    }

    /// Hands an upstream's answer on to the caller.
    fn hand_on(
        &self,
        answer: Answer,
        outcome: &Outcome,
        callers_version: Version,
        callers_upgrade: Option<OnUpgrade>,
        record: &Record,
    ) -> Result<Response<ResponseBody>, ProxyError> {
        let Answer { mut response, mut lease, in_flight } = answer;
        let status = response.status();
        lease.heard(response.headers());
        let broken = |error: ProxyError| {
            ProxyError::new(
                Cause::Reset,
                format!("{}: its response cannot be passed on: {}", self.name(), error.detail),
            )
        };
        let said = headers::remove_hop_by_hop(response.headers_mut()).map_err(broken)?;
        response.headers_mut().remove(X_OUTRIGGER_RETRY);
        if self.connection.side != Side::Inbound {
            let received = response.version();
            self.view.names.via(&self.connection.side).append(response.headers_mut(), received);
        }
        if let Some(edits) = self.target.route.and_then(|route| self.target.matched.cluster.edits.get(route))
        {
            edits.response.apply(response.headers_mut());
        }
        if record.tries > 1 && may_be_failure(&response) {
            self.append_proxy_status(response.headers_mut(), status, outcome, record);
        }
        if status == StatusCode::SWITCHING_PROTOCOLS {
            let (Some(callers), Some(protocol)) = (callers_upgrade, said.upgrade) else {
                return Err(broken(ProxyError::malformed("101 to a request that asked for no upgrade")));
            };
            let idle = self.policy.tunnel_idle_timeout.limit();
            upgrade::join(
                self.connection,
                callers,
                &mut response,
                (lease, in_flight),
                idle,
                self.progress.over_at(),
            );
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
            response.headers_mut().insert(UPGRADE, protocol);
            return Ok(response.map(|_| ResponseBody::Empty));
        }
        // hyper writes the version the caller came by.
        *response.version_mut() = callers_version;
        self.progress.answering();
        let progress = Rc::clone(self.progress);
        Ok(response.map(|body| ResponseBody::streaming(body, lease, in_flight, progress)))
    }

    /// Tells that tries were spent on a failure that is passed on.
    fn append_proxy_status(
        &self,
        headers: &mut HeaderMap,
        status: StatusCode,
        outcome: &Outcome,
        record: &Record,
    ) {
        let member = format!(
            "{}; received-status={}; details=\"{}, {} tries\"",
            self.view.names.deployment,
            status.as_u16(),
            outcome.label(),
            record.tries
        );
        if let Ok(member) = HeaderValue::try_from(member) {
            headers.append(PROXY_STATUS, member);
        }
    }
}

/// Whether a response needs a second look: everything else is success.
fn may_be_failure(response: &Response<Incoming>) -> bool {
    response.status().as_u16() >= 400 || response.headers().contains_key("grpc-status")
}
