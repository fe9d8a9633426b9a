//! A request to an upstream: admission, its attempts, and the one response that comes of them.
//!
//! ```text
//! run: prepare_request ─▶ serve ───────────────────────────────────▶ into_client_response
//!                           │ admission: rate · permit · fault                ▲
//!                           └ RetryPlan: breaker · balance · attempt ─ judge ─┘
//!                                       ▲                               │
//!                                       └──────── wait ◀── retry? ◀─────┘
//! ```
//!
//! `serve` is called once more where the fallback names another upstream. Admission is in [`super::admission`], the
//! decisions of the attempt loop are in [`RetryPlan`](crate::resilience::retry::RetryPlan), which
//! [`super::attempts`] and [`super::judge`] carry out.

#[cfg(test)]
mod tests;

use std::{cell::Cell, mem::take, rc::Rc, sync::Arc, time::Duration};

use http::{HeaderMap, Request, Response, Version};

use super::{
    admission,
    attempt::{AttemptError, Outgoing, UpstreamResponse},
    body::{ClientBody, Replay, ResponseBody},
    cached::standby::Failure,
    clock::{Clock, RequestTimeouts},
    connection::Upgrade,
    credentials::{self, ClientAuthorization},
    deliver::{self, FromFallback},
    endpoints,
    error::ProxyError,
    head::{self, HeadFormat},
    headers::cookie,
    interim::InterimQueue,
    origin::Origin,
    progress::Progress,
    target::{self, RouteTarget},
    worker::Worker,
};
use crate::{
    cause::Cause,
    config::{AttemptTimeout, Balance, ObservablePolicy, Policy, Protocol, UserTimeout},
    field_set::{Field, FieldSet},
    http1::head::recycle_header_map,
    model::Side,
    net::alpn::ApplicationProtocol,
    resilience::{
        classify::AttemptOutcome,
        deadline::{self, Deadline},
        retry::{AttemptKind, RetryPolicy},
    },
    telemetry::record::AttemptRecord,
    upstream::{
        balance::hash_key, connect::TcpTimeouts, http2::PingSettings, local::LocalEndpoint,
        policy_state::PolicyState, pool::ConnectionSettings,
    },
};

/// What is the same for every upstream that a request is sent to.
#[derive(Clone, Copy)]
pub struct RequestContext<'a> {
    pub origin: &'a Origin<'a>,
    pub(super) grpc: bool,
    pub(super) idempotency_key: bool,
    /// Fields that describe an attempt to the next hop may be present already: replace them.
    pub(super) replaces_attempt_fields: bool,
    /// The body waits for the upstream's `100 Continue`.
    pub(super) expects_continue: bool,
    /// Takes interim responses for the client: HTTP/1.1 on both sides.
    pub(super) interim: Option<&'a InterimQueue>,
}

/// The client's protocol, and its stream, where it asks to change the protocol.
pub struct ClientProtocol {
    pub version: Version,
    pub upgrade: Option<Upgrade>,
}

/// What a request keeps from attempt to attempt, and for the fallback's upstream.
pub(super) struct RequestState {
    pub clock: Clock,
    pub outgoing: Outgoing,
    pub replay: Replay,
    /// What the first attempt at the upstream is for.
    pub first: AttemptKind,
    /// The client's own credentials, while a token of this service replaces them.
    pub(super) set_aside: Option<ClientAuthorization>,
}

/// A request to one upstream.
pub struct Exchange<'a> {
    pub request: &'a RequestContext<'a>,
    pub target: &'a RouteTarget,
    pub policy: &'a Policy,
    pub(super) retry_policy: &'a RetryPolicy,
    pub(super) endpoints: Rc<[Rc<LocalEndpoint>]>,
    /// Boxed: otherwise a request's future would hold it twice.
    pub(super) connections: Box<ConnectionSettings>,
    pub(super) hash: Option<u64>,
}

/// How an attempt ended.
pub enum AttemptResult {
    Response(Box<UpstreamResponse>, AttemptOutcome),
    Failed(AttemptError),
}

/// Proxies a request: prepares its head, sends it to its upstream, and to the fallback's if that fails; forwards the
/// response.
pub async fn run(
    origin: &Origin<'_>,
    target: &RouteTarget,
    request: &mut Request<ClientBody>,
    present: FieldSet,
) -> Result<Response<ResponseBody>, ProxyError> {
    let view = origin.view;
    let (policy, _) = target.route_owner.cluster.policy(target.route);
    let (context, client, mut state) = prepare_request(origin, target, request, present)?;
    let result = serve(&context, target, &mut state).await;
    if view.snapshot.config.runtime.observe.contains(&ObservablePolicy::Timeout) {
        note_overrun(target, timeouts(policy, context.grpc, false), origin.progress);
    }
    if let Some(standby) = origin.stale
        && let Some(failure) = replaceable(&result)
    {
        recycle_header_map(state.outgoing.headers);
        drop(result);
        return Ok(standby.respond(origin, failure));
    }
    if let Some(fallback) = &policy.fallback.0
        && let Some(reason) = failure(&result)
    {
        let Some(other) = &fallback.upstream else {
            origin.progress.with_record(|record| record.replaced_cause = Some(reason));
            return Ok(deliver::fallback_response(fallback, &view.proxy_names.deployment, reason));
        };
        if let Some(other) = target::by_name(view, other)
            && state.replay.take_over()
        {
            // Its connection and its permit are not needed any more.
            drop(result);
            origin.progress.with_record(|record| record.replaced_cause = Some(reason));
            // Boxed, as every path that few requests take.
            return Box::pin(async move {
                let (context, client) = prepare_fallback(context, &other, &mut state, client)?;
                let (exchange, result) = serve(&context, &other, &mut state).await?;
                let mut response = into_client_response(&exchange, result, client)?;
                response.extensions_mut().insert(FromFallback);
                Ok(response)
            })
            .await;
        }
    }
    recycle_header_map(state.outgoing.headers);
    let (exchange, result) = result?;
    into_client_response(&exchange, result, client)
}

/// Takes the request apart for its first upstream.
fn prepare_request<'a>(
    origin: &'a Origin<'a>,
    target: &RouteTarget,
    request: &mut Request<ClientBody>,
    present: FieldSet,
) -> Result<(RequestContext<'a>, ClientProtocol, RequestState), ProxyError> {
    let Origin { view, progress, .. } = *origin;
    let cluster = &target.serving.cluster;
    let (policy, retry_policy) = target.route_owner.cluster.policy(target.route);
    let grpc = progress.with_record(|record| record.grpc).unwrap_or_default();
    let clients_upgrade =
        origin.client.filter(|_| present.has(Field::Upgrade)).map(|client| client.upgrade(request));
    let clients_version = request.version();
    let version = version_for(cluster.settings.protocol, clients_version);
    let http1 = clients_version != Version::HTTP_2 && version == Version::HTTP_11;

    let observed_timeout = view.snapshot.config.runtime.observe.contains(&ObservablePolicy::Timeout);
    let deadline = deadline_of(origin, grpc, present, request.headers());
    let clock = Clock::new(deadline, timeouts(policy, grpc, observed_timeout), progress.started());
    let idle = if grpc { policy.tunnel_idle_timeout } else { policy.idle_timeout };
    progress.set_limits(idle.limit(), policy.max_duration.limit());

    let upgrade = head::edit_request(origin, target, request, present, version)?;
    let upgrade = upgrade.filter(|_| http1 && clients_version == Version::HTTP_11);
    let edited =
        target.route.is_some_and(|route| target.route_owner.cluster.header_edits.get(route).is_some());
    let both_http11 = http1 && clients_version == Version::HTTP_11;
    let context = RequestContext {
        origin,
        grpc,
        idempotency_key: present.has(Field::IdempotencyKey),
        replaces_attempt_fields: edited || present.has(Field::RequestTimeout) || present.has(Field::Attempt),
        expects_continue: both_http11 && origin.client.is_some() && present.has(Field::Expect),
        interim: origin.client.filter(|_| both_http11).map(|client| &client.interim),
    };
    let users = view.snapshot.gate.as_ref().and_then(|gate| gate.jwt.as_ref());
    let users = users.filter(|users| *origin.side == Side::Inbound && !users.claim_headers.is_empty());
    let claims = users.map(|users| Arc::clone(&users.claim_headers));
    let limit =
        retry_policy.body_limit(request.method(), context.idempotency_key, version == Version::HTTP_2);
    let replay = Replay::new(take(request.body_mut()), limit, claims, progress);
    let format = HeadFormat::new(cluster, version, !replay.is_empty());
    let mut outgoing = head::take_head(request, format, upgrade.as_ref())?;
    outgoing.keep = policy.fallback.is_some();
    let client =
        ClientProtocol { version: clients_version, upgrade: clients_upgrade.filter(|_| upgrade.is_some()) };
    Ok((
        context,
        client,
        RequestState { clock, outgoing, replay, first: AttemptKind::First, set_aside: None },
    ))
}

/// Why there may be need of a fallback.
fn failure(result: &Result<(Exchange<'_>, AttemptResult), ProxyError>) -> Option<&'static str> {
    let error = match result {
        Ok((_, AttemptResult::Response(_, outcome))) => {
            return outcome.is_failure().then(|| outcome.label());
        }
        Ok((_, AttemptResult::Failed(failed))) => &failed.error,
        Err(error) => error,
    };
    error.cause.is_exhaustion().then(|| error.cause.word())
}

/// The failure that a stale response may replace, if it is one.
fn replaceable(result: &Result<(Exchange<'_>, AttemptResult), ProxyError>) -> Option<Failure> {
    match result {
        Ok((_, AttemptResult::Response(response, _))) => Failure::of_status(response.head.status()),
        Ok((_, AttemptResult::Failed(failed))) => Failure::of_error(&failed.error),
        Err(error) => Failure::of_error(error),
    }
}

/// Prepares the request for the fallback's upstream, which may take another protocol.
fn prepare_fallback<'a>(
    mut context: RequestContext<'a>,
    other: &RouteTarget,
    state: &mut RequestState,
    mut client: ClientProtocol,
) -> Result<(RequestContext<'a>, ClientProtocol), ProxyError> {
    let cluster = &other.serving.cluster;
    let version = version_for(cluster.settings.protocol, client.version);
    // With HTTP/2 they are ordinary fields.
    context.replaces_attempt_fields |= state.outgoing.version == Version::HTTP_2;
    let format = HeadFormat::new(cluster, version, !state.replay.is_empty());
    head::convert_head(&mut state.outgoing, format)?;
    if version != Version::HTTP_11 {
        (context.interim, context.expects_continue, client.upgrade) = (None, false, None);
    }
    let Origin { view, progress, .. } = *context.origin;
    progress.with_record(|record| record.served_by = Some(Arc::clone(&other.serving.destination)));
    state.first = AttemptKind::Fallback;
    let (policy, _) = other.route_owner.cluster.policy(other.route);
    let observed = view.snapshot.config.runtime.observe.contains(&ObservablePolicy::Timeout);
    state.clock = state.clock.afresh(timeouts(policy, context.grpc, observed), progress);
    Ok((context, client))
}

fn into_client_response(
    exchange: &Exchange<'_>,
    result: AttemptResult,
    client: ClientProtocol,
) -> Result<Response<ResponseBody>, ProxyError> {
    match result {
        AttemptResult::Failed(failed) => Err(failed.error),
        AttemptResult::Response(response, outcome) => {
            deliver::forward_response(exchange, *response, &outcome, client)
        }
    }
}

/// The HTTP version of requests to an upstream.
fn version_for(protocol: Protocol, client: Version) -> Version {
    match protocol {
        Protocol::H2 => Version::HTTP_2,
        Protocol::Http1 => Version::HTTP_11,
        Protocol::Auto | Protocol::Tcp if client == Version::HTTP_2 => Version::HTTP_2,
        Protocol::Auto | Protocol::Tcp => Version::HTTP_11,
    }
}

/// Sends the request to an upstream, if its policies admit it: to the first one, and then to the fallback's.
async fn serve<'a>(
    context: &'a RequestContext<'a>,
    target: &'a RouteTarget,
    state: &mut RequestState,
) -> Result<(Exchange<'a>, AttemptResult), ProxyError> {
    let Origin { worker, progress, .. } = *context.origin;
    let (policy, retry_policy) = target.route_owner.cluster.policy(target.route);
    let local = &target.serving;
    let settings = &local.cluster.settings;
    state.clock.request_sent(progress);
    let headers = &state.outgoing.headers;
    let until = state.clock.until(progress);
    let permit = admission::admit(context.origin, target, policy, headers, until).await?;
    let hash = hash(&settings.balance, headers);
    credentials::attach(local, state, until).await?;
    let max_age = settings.max_connection_age.limit();
    let http2 = state.outgoing.version == Version::HTTP_2;
    let mut endpoints = endpoints::endpoints(worker, local, until).await?;
    if let Some(pinned) = target.pinned_endpoint {
        endpoints = endpoints::endpoint_at(pinned, &endpoints).unwrap_or(endpoints);
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
            // With jitter, so that connections do not all end at once.
            max_age: max_age.map(|age| worker.with_rng(|rng| rng.jitter(age, 0.1))),
            ping: PingSettings { interval: settings.ping_interval.limit(), timeout: settings.ping_timeout.0 },
            stream_wait: policy.limits.0.unwrap_or_default().pending_timeout.0,
            queued: Cell::default(),
            tls: local.cluster.tls.as_ref().and_then(|_| local.cluster.tls_target(state.outgoing.host())),
        }),
        hash,
        request: context,
        target,
        policy,
        retry_policy,
    };
    exchange.policy_state().budget.deposit();
    let result = exchange.run_attempts(state).await;
    exchange.record_exhausted(&result);
    let mut result = result?;
    if let AttemptResult::Response(response, _) = &mut result {
        response.held.permit = permit;
    }
    Ok((exchange, result))
}

/// Until when the origin, usually a client, waits for a response.
fn deadline_of(origin: &Origin<'_>, grpc: bool, present: FieldSet, headers: &HeaderMap) -> Deadline {
    let started = origin.progress.started();
    let own = origin.deadline.map(|at| at.saturating_duration_since(started));
    let left = time_from_headers(grpc, present, headers).into_iter().chain(own).min();
    Deadline::from_client(started.into_std(), left)
}

/// The timeout in the request's own fields.
fn time_from_headers(grpc: bool, present: FieldSet, headers: &HeaderMap) -> Option<Duration> {
    if grpc && present.has(Field::GrpcTimeout) {
        deadline::grpc_timeout(headers)
    } else if !grpc && present.has(Field::RequestTimeout) {
        deadline::request_timeout(headers)
    } else {
        None
    }
}

/// The time limits of a request. gRPC has none but its own, unless a route sets them.
fn timeouts(policy: &Policy, grpc: bool, observed: bool) -> RequestTimeouts {
    let request = policy.timeout.limit().filter(|_| !observed && (!grpc || policy.route_sets_timeout));
    let attempt = if observed || (grpc && !policy.route_sets_attempt_timeout) {
        AttemptTimeout::Fixed(Default::default())
    } else {
        policy.attempt_timeout
    };
    RequestTimeouts { request, attempt }
}

/// Counts a request that `timeout`, or a fixed `attempt_timeout`, would have ended.
fn note_overrun(target: &RouteTarget, limits: RequestTimeouts, progress: &Progress) {
    let waited = |limit: &Duration| progress.request_sent_at().is_some_and(|sent| sent.elapsed() > *limit);
    let tried = |limit: &Duration| {
        let sent = progress.request_sent_at();
        let too_long = |one: &AttemptRecord| {
            let began = sent.map_or(one.started_at, |sent| sent.max(one.started_at));
            one.ended_at.is_some_and(|ended| ended.duration_since(began) > *limit)
        };
        progress.with_record(|record| record.attempts.iter().any(too_long)).unwrap_or_default()
    };
    let cause = if limits.request.filter(waited).is_some() {
        Cause::Timeout
    } else if matches!(limits.attempt, AttemptTimeout::Fixed(limit) if limit.limit().filter(tried).is_some())
    {
        Cause::AttemptTimeout
    } else {
        return;
    };
    target.serving.upstream.shared.policy_state.counters.rejected.increment(cause.word());
    let upstream = &target.serving.cluster.settings.name;
    tracing::info!(upstream, "`{}` would have ended this request (observed only)", cause.word());
}

/// What balances by hash.
fn hash(balance: &Balance, headers: &HeaderMap) -> Option<u64> {
    match balance {
        Balance::HashHeader(name) => headers.get(name).map(|value| hash_key(value.as_bytes())),
        Balance::HashCookie(name) => cookie(headers, name).map(|value| hash_key(value.as_bytes())),
        Balance::P2c | Balance::LeastRequest | Balance::RoundRobin => None,
    }
}

impl<'a> Exchange<'a> {
    pub fn name(&self) -> &'a str {
        &self.target.serving.cluster.settings.name
    }

    pub(super) fn policy_state(&self) -> &'a Arc<PolicyState> {
        &self.target.serving.upstream.shared.policy_state
    }

    pub(super) fn worker(&self) -> &'a Rc<Worker> {
        self.request.origin.worker
    }

    pub(super) fn progress(&self) -> &'a Rc<Progress> {
        self.request.origin.progress
    }

    pub(super) fn observing(&self, policy: ObservablePolicy) -> bool {
        self.request.origin.view.snapshot.config.runtime.observe.contains(&policy)
    }
}
