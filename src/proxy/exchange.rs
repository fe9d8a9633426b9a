//! A call to an upstream: admission, its tries, and the one response that comes of them.
//!
//! ```text
//! run: clocks ─▶ head ─▶ serve ─────────────────────────────────────▶ deliver
//!                          │ admission: rate · place · fault             ▲
//!                          └ tries: breaker · balance · attempt ─ judge ─┘
//!                               ▲                                  │
//!                               └────── wait ◀── retry? ◀──────────┘
//! ```
//!
//! The second line is in [`super::admission`], the third and the fourth are in [`super::tries`] and [`super::judge`].

use std::{cell::Cell, mem::take, rc::Rc, sync::Arc, time::Duration};

use http::{HeaderMap, Request, Response, Version, header::COOKIE};

use super::{
    admission,
    attempt::{Answer, Failed, Outgoing},
    body::{ClientBody, Replay, ResponseBody},
    clock::Clock,
    connect,
    connection::{Connection, Upgrade},
    credentials::{self, ClientAuthorization},
    deliver,
    error::ProxyError,
    head,
    progress::Progress,
    target::{self, RouteTarget},
};
use crate::{
    cause::Cause,
    config::{AttemptTimeout, Balance, ObservablePolicy, Policy, Protocol, UserTimeout},
    field_set::{Field, FieldSet},
    http1::head::recycle_header_map,
    model::{Side, View},
    net::alpn::ApplicationProtocol,
    resilience::{
        classify::AttemptOutcome,
        deadline::{self, Deadline},
        retry::RetryPolicy,
    },
    telemetry::record::{AttemptReason, AttemptRecord},
    upstream::{
        balance::hash_key, connect::TcpTimeouts, guards::Guards, http2::PingSettings, local::LocalEndpoint,
        pool::ConnectionSettings,
    },
};

/// What holds for a call, whichever upstream serves it in the end.
#[derive(Clone, Copy)]
pub struct Call<'a> {
    pub connection: &'a Rc<Connection>,
    pub view: &'a View,
    pub progress: &'a Rc<Progress>,
    pub(super) grpc: bool,
    pub(super) idempotency_key: bool,
    /// What the next hop is told of a try may be among the fields already.
    pub(super) tells: bool,
    /// The body waits for the upstream's `100 Continue`.
    pub(super) expects_continue: bool,
    /// The caller can be told of interim responses: HTTP/1.1 on both sides.
    pub(super) interim: bool,
}

/// How the caller came, and its stream, where it asks to change the protocol.
struct Callers {
    version: Version,
    upgrade: Option<Upgrade>,
}

/// What a call takes along from try to try, and to the upstream that is asked in place of the first one.
pub(super) struct Carried {
    pub clock: Clock,
    pub outgoing: Outgoing,
    pub replay: Replay,
    /// What the next try is for, and how long it was waited for.
    pub next: (AttemptReason, Duration),
    /// The caller's own credentials, while a token of ours stands in their place.
    pub(super) set_aside: Option<ClientAuthorization>,
}

/// A call to one upstream.
pub struct Exchange<'a> {
    pub call: &'a Call<'a>,
    pub target: &'a RouteTarget,
    pub policy: &'a Policy,
    pub(super) retries: &'a RetryPolicy,
    pub(super) endpoints: Rc<[Rc<LocalEndpoint>]>,
    /// Boxed: it would lie in a request's future twice.
    pub(super) connections: Box<ConnectionSettings>,
    pub(super) hash: Option<u64>,
}

/// How the tries ended, and what there is to show for it.
pub enum Ended {
    Answered(Box<Answer>, AttemptOutcome),
    Failed(Failed),
}

/// Carries a call: prepares its head, has it served, and hands the answer on, or the fallback.
pub async fn run(
    connection: &Rc<Connection>,
    view: &View,
    target: &RouteTarget,
    request: &mut Request<ClientBody>,
    present: FieldSet,
    progress: &Rc<Progress>,
) -> Result<Response<ResponseBody>, ProxyError> {
    let cluster = &target.local.cluster;
    let (policy, retries) = target.matched.cluster.policy(target.route);
    let grpc = progress.with_record(|record| record.grpc).unwrap_or_default();
    let callers_upgrade = present.has(Field::Upgrade).then(|| connection.upgrade(request));
    let callers_version = request.version();
    let version = version_for(cluster.settings.protocol, callers_version);
    let http1 = callers_version != Version::HTTP_2 && version == Version::HTTP_11;

    let observed_timeout = view.snapshot.config.runtime.observe.contains(&ObservablePolicy::Timeout);
    let callers = callers_time(grpc, present, request.headers());
    let deadline = Deadline::from_client(progress.started().into_std(), callers);
    let (timeout, attempt) = timeouts(policy, grpc, observed_timeout);
    let clock = Clock::new(deadline, timeout, attempt, progress.started());
    let idle = if grpc { policy.tunnel_idle_timeout } else { policy.idle_timeout };
    progress.set_limits(idle.limit(), policy.max_duration.limit());

    let upgrade = head::prepare(connection, view, target, request, present, version)?;
    let upgrade = upgrade.filter(|_| http1 && callers_version == Version::HTTP_11);
    let edited = target.route.is_some_and(|route| target.matched.cluster.header_edits.get(route).is_some());
    let call = Call {
        connection,
        view,
        progress,
        grpc,
        idempotency_key: present.has(Field::IdempotencyKey),
        tells: edited || present.has(Field::RequestTimeout) || present.has(Field::Attempt),
        expects_continue: http1 && callers_version == Version::HTTP_11 && present.has(Field::Expect),
        interim: http1 && callers_version == Version::HTTP_11,
    };
    let users = view.snapshot.gate.as_ref().and_then(|gate| gate.jwt.as_ref());
    let users = users.filter(|users| connection.side == Side::Inbound && !users.claim_headers.is_empty());
    let claims = users.map(|users| Arc::clone(&users.claim_headers));
    let limit = retries.body_limit(request.method(), call.idempotency_key, version == Version::HTTP_2);
    let replay = Replay::new(take(request.body_mut()), limit, claims, progress);
    let mut outgoing = head::outgoing(
        request,
        version,
        &cluster.settings.name,
        upgrade.as_ref(),
        !replay.is_empty(),
        cluster.tls.is_some(),
    )?;
    outgoing.keep = policy.fallback.is_some();

    let mut carried =
        Carried { clock, outgoing, replay, next: (AttemptReason::First, Duration::ZERO), set_aside: None };
    let callers =
        Callers { version: callers_version, upgrade: callers_upgrade.filter(|_| upgrade.is_some()) };
    drop(upgrade);
    let ended = serve(&call, target, policy, retries, &mut carried).await;
    if observed_timeout {
        note_overrun(target, timeouts(policy, grpc, false), progress);
    }
    if let Some(fallback) = &policy.fallback.0
        && let Some(why) = failure(&ended)
    {
        let Some(other) = &fallback.upstream else {
            progress.with_record(|record| record.fallback_cause = Some(why));
            return Ok(deliver::fallback_response(fallback, &view.proxy_names.deployment, why));
        };
        if let Some(other) = target::by_name(view, other)
            && carried.replay.take_over()
        {
            // Its connection and its place are not needed any more.
            drop(ended);
            return Box::pin(fall_back(call, other, why, carried, callers)).await;
        }
    }
    recycle_header_map(carried.outgoing.headers);
    finish(ended?, callers)
}

/// Why there may be need of a fallback.
fn failure(ended: &Result<(Exchange<'_>, Ended), ProxyError>) -> Option<&'static str> {
    let error = match ended {
        Ok((_, Ended::Answered(_, outcome))) => return outcome.is_failure().then(|| outcome.label()),
        Ok((_, Ended::Failed(failed))) => &failed.error,
        Err(error) => error,
    };
    error.cause.is_exhaustion().then(|| error.cause.word())
}

/// Has another upstream serve a call.
async fn fall_back(
    mut call: Call<'_>,
    other: RouteTarget,
    why: &'static str,
    mut carried: Carried,
    mut callers: Callers,
) -> Result<Response<ResponseBody>, ProxyError> {
    let cluster = &other.local.cluster;
    let version = version_for(cluster.settings.protocol, callers.version);
    let has_body = !carried.replay.is_empty();
    // By HTTP/2 it was told among the fields.
    call.tells |= carried.outgoing.version == Version::HTTP_2;
    head::convert_head(
        &mut carried.outgoing,
        version,
        &cluster.settings.name,
        has_body,
        cluster.tls.is_some(),
    )?;
    if version != Version::HTTP_11 {
        (call.interim, call.expects_continue, callers.upgrade) = (false, false, None);
    }
    let (policy, retries) = other.matched.cluster.policy(None);
    call.progress.with_record(|record| {
        record.fallback_cause = Some(why);
        record.served_by = Some(Arc::clone(&other.local.destination));
    });
    carried.next = (AttemptReason::Fallback, Duration::ZERO);
    let observed = call.view.snapshot.config.runtime.observe.contains(&ObservablePolicy::Timeout);
    carried.clock = carried.clock.afresh(timeouts(policy, call.grpc, observed), call.progress);
    let ended = serve(&call, &other, policy, retries, &mut carried).await;
    finish(ended?, callers)
}

fn finish(
    (exchange, ended): (Exchange<'_>, Ended),
    callers: Callers,
) -> Result<Response<ResponseBody>, ProxyError> {
    match ended {
        Ended::Failed(failed) => Err(failed.error),
        Ended::Answered(answer, outcome) => {
            deliver::forward_response(&exchange, *answer, &outcome, callers.version, callers.upgrade)
        }
    }
}

/// What an upstream is called by.
fn version_for(protocol: Protocol, callers: Version) -> Version {
    match protocol {
        Protocol::H2 => Version::HTTP_2,
        Protocol::Http1 => Version::HTTP_11,
        Protocol::Auto | Protocol::Tcp if callers == Version::HTTP_2 => Version::HTTP_2,
        Protocol::Auto | Protocol::Tcp => Version::HTTP_11,
    }
}

/// Has an upstream serve the call, if its guards let it in.
async fn serve<'a>(
    call: &'a Call<'a>,
    target: &'a RouteTarget,
    policy: &'a Policy,
    retries: &'a RetryPolicy,
    carried: &mut Carried,
) -> Result<(Exchange<'a>, Ended), ProxyError> {
    let local = &target.local;
    let settings = &local.cluster.settings;
    carried.clock.request_sent(call.progress);
    let headers = &carried.outgoing.headers;
    let until = carried.clock.until(call.progress);
    let rate = target.matched.cluster.rate_limit(target.route);
    let place = admission::admit(call.connection, call.view, local, policy, rate, headers, until).await?;
    let hash = hash(&settings.balance, headers);
    credentials::attach(local, carried, until).await?;
    let max_age = settings.max_connection_age.limit();
    let http2 = carried.outgoing.version == Version::HTTP_2;
    let mut endpoints = connect::endpoints(call.connection, local, until).await?;
    if let Some(pinned) = target.pinned_endpoint {
        endpoints = connect::endpoint_at(pinned, &endpoints).unwrap_or(endpoints);
    }
    let exchange = Exchange {
        endpoints,
        connections: Box::new(ConnectionSettings {
            tcp: TcpTimeouts {
                connect: policy.connect_timeout.limit(),
                user_timeout: settings.user_timeout(if http2 {
                    ApplicationProtocol::H2
                } else {
                    ApplicationProtocol::Http1
                }),
            },
            clear_user_timeout_on_upgrade: settings.tcp_user_timeout == UserTimeout::Auto,
            pool_idle: settings.pool_idle_timeout,
            header_case: settings.header_case,
            // Drawn anew, so that not all connections end at once.
            max_age: max_age.map(|age| call.connection.worker.with_rng(|rng| rng.jitter(age, 0.1))),
            ping: PingSettings { interval: settings.ping_interval.limit(), timeout: settings.ping_timeout.0 },
            stream_wait: policy.limits.0.unwrap_or_default().pending_timeout.0,
            queued: Cell::default(),
            tls: local.cluster.tls.as_ref().and_then(|_| local.cluster.tls_target(carried.outgoing.host())),
        }),
        hash,
        call,
        target,
        policy,
        retries,
    };
    exchange.guards().budget.deposit();
    let ended = exchange.tries(carried).await;
    exchange.note_spent(&ended);
    let mut ended = ended?;
    if carried.next.0 != AttemptReason::First {
        // It may have come before a wait for another try that was then not made.
        call.progress.moved();
    }
    if let Ended::Answered(answer, _) = &mut ended {
        answer.held.permit = place;
    }
    Ok((exchange, ended))
}

/// How much time the caller has.
fn callers_time(grpc: bool, present: FieldSet, headers: &HeaderMap) -> Option<Duration> {
    if grpc && present.has(Field::GrpcTimeout) {
        deadline::grpc_timeout(headers)
    } else if !grpc && present.has(Field::RequestTimeout) {
        deadline::request_timeout(headers)
    } else {
        None
    }
}

/// The limits of a call. gRPC has none but its own, unless a route sets them.
fn timeouts(policy: &Policy, grpc: bool, observed: bool) -> (Option<Duration>, AttemptTimeout) {
    let timeout = policy.timeout.limit().filter(|_| !observed && (!grpc || policy.route_sets_timeout));
    let attempt = if observed || (grpc && !policy.route_sets_attempt_timeout) {
        AttemptTimeout::Fixed(Default::default())
    } else {
        policy.attempt_timeout
    };
    (timeout, attempt)
}

/// Counts a call that `timeout`, or a fixed `attempt_timeout`, would have ended.
fn note_overrun(
    target: &RouteTarget,
    (timeout, attempt): (Option<Duration>, AttemptTimeout),
    progress: &Progress,
) {
    let waited = |limit: &Duration| progress.request_sent_at().is_some_and(|sent| sent.elapsed() > *limit);
    let tried = |limit: &Duration| {
        let sent = progress.request_sent_at();
        let too_long = |one: &AttemptRecord| {
            let began = sent.map_or(one.started_at, |sent| sent.max(one.started_at));
            one.ended_at.is_some_and(|ended| ended.duration_since(began) > *limit)
        };
        progress.with_record(|record| record.attempts.iter().any(too_long)).unwrap_or_default()
    };
    let cause = if timeout.filter(waited).is_some() {
        Cause::Timeout
    } else if matches!(attempt, AttemptTimeout::Fixed(limit) if limit.limit().filter(tried).is_some()) {
        Cause::AttemptTimeout
    } else {
        return;
    };
    target.local.upstream.shared.guards.counters.rejected.increment(cause.word());
    let upstream = &target.local.cluster.settings.name;
    tracing::info!(upstream, "`{}` would have ended this call (observed only)", cause.word());
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

impl<'a> Exchange<'a> {
    pub fn name(&self) -> &'a str {
        &self.target.local.cluster.settings.name
    }

    pub(super) fn guards(&self) -> &'a Arc<Guards> {
        &self.target.local.upstream.shared.guards
    }

    pub(super) fn observing(&self, policy: ObservablePolicy) -> bool {
        self.call.view.snapshot.config.runtime.observe.contains(&policy)
    }
}
