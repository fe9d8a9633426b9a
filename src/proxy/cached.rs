//! Requests of routes with a cache: answered from the store, or forwarded once for all that wait for the same response.
//!
//! ```text
//! run ─▶ find in the store ─▶ fresh ──────────────────────────────────▶ respond
//!          │                  stale, revalidated meanwhile ─▶ fetch ··▶ respond
//!          └ miss, stale ─▶ join: follow another fetch ────────────────▶ respond
//!                              └ lead, or go alone ─▶ fetch ─▶ (exchange) ─▶ store ─▶ respond
//!                                                               └ failed: the stale response
//! ```
//!
//! This comes before admission and breaker: what the store answers costs no permit. A route without `cache` never gets
//! here.

mod detached;
mod fetch;
mod key;
pub mod respond;
pub mod standby;
mod storing;

use std::{
    rc::Rc,
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::{
    HeaderMap, Method, Request, Response, StatusCode, Version,
    header::{AUTHORIZATION, CONTENT_LOCATION, COOKIE, LOCATION, RANGE},
};
use http_body::Body as _;
use tokio::time::Instant;

use self::{
    fetch::{Fetch, OwnedOrigin},
    key::CacheKey,
    respond::{Forwarded, Note},
    standby::StaleStandby,
};
use super::{
    body::{ClientBody, ResponseBody},
    error::ProxyError,
    exchange,
    origin::Origin,
    target::RouteTarget,
};
use crate::{
    cache::{
        Entry, Store,
        flight::{FlightState, Follower, Joined},
    },
    cause::Cause,
    field_set::FieldSet,
    resilience::{
        cache::{
            AuthorizationRule, CacheSettings,
            conditional::{has_condition, is_not_modified},
            directives::RequestDirectives,
            freshness::{Assessment, Reuse},
            storable::{self, check_request, is_cacheable_method, may_be_sent},
        },
        deadline,
    },
    telemetry::record::CacheResult,
};

/// How often a request looks into the store again, because the response that it waited for cannot answer it.
const MAX_ROUNDS: usize = 3;

/// What the client asked for, kept for responses from the store.
#[derive(Debug)]
pub struct ClientRequest {
    pub method: Method,
    pub version: Version,
    pub headers: HeaderMap,
    pub directives: RequestDirectives,
    /// When it arrived.
    pub at: SystemTime,
}

/// A request to a route with a cache.
pub struct CachedRoute<'a> {
    pub origin: &'a Origin<'a>,
    pub target: &'a RouteTarget,
    pub settings: &'a CacheSettings,
    pub store: &'a Arc<Store>,
}

/// Sends on a request of any route: from the cache, where it has one.
pub async fn forward(
    origin: &Origin<'_>,
    target: &RouteTarget,
    request: &mut Request<ClientBody>,
    present: FieldSet,
) -> Result<Response<ResponseBody>, ProxyError> {
    match CachedRoute::of(origin, target) {
        Some(route) => Box::pin(run(route, request, present)).await,
        None => exchange::run(origin, target, request, present).await,
    }
}

/// Sends on a request that has to reach the service. It can invalidate what is stored.
pub async fn bypass(
    origin: &Origin<'_>,
    target: &RouteTarget,
    request: &mut Request<ClientBody>,
    present: FieldSet,
) -> Result<Response<ResponseBody>, ProxyError> {
    match CachedRoute::of(origin, target) {
        Some(route) => Box::pin(async move { route.pass_by(request, present).await }).await,
        None => exchange::run(origin, target, request, present).await,
    }
}

/// Handles a request of a route with a cache.
pub async fn run(
    route: CachedRoute<'_>,
    request: &mut Request<ClientBody>,
    present: FieldSet,
) -> Result<Response<ResponseBody>, ProxyError> {
    let response = if is_looked_up(&route, request) {
        route.look_up(request, present).await
    } else {
        route.pass_by(request, present).await
    };
    let result = route.origin.progress.with_record(|record| *record.cache.get_or_insert(CacheResult::Miss));
    let counters = &route.target.serving.upstream.shared.policy_state.counters;
    counters.cache.increment(result.unwrap_or(CacheResult::Miss).word());
    response
}

/// Whether the store is asked. Everything else is forwarded as it is.
fn is_looked_up(route: &CachedRoute<'_>, request: &Request<ClientBody>) -> bool {
    let grpc = route.origin.progress.with_record(|record| record.grpc).unwrap_or_default();
    let has_body = !request.body().is_end_stream();
    check_request(request.method(), request.headers(), has_body, grpc).is_ok()
}

impl<'a> CachedRoute<'a> {
    /// `None`: the route has no cache.
    pub fn of(origin: &'a Origin<'a>, target: &'a RouteTarget) -> Option<Self> {
        let (policy, _) = target.route_owner.cluster.policy(target.route);
        let settings = policy.cache.0.as_ref()?;
        Some(Self { origin, target, settings, store: origin.view.snapshot.cache.as_ref()? })
    }
}

impl CachedRoute<'_> {
    /// Forwards a request that the cache has no part in, but for what it invalidates.
    async fn pass_by(
        &self,
        request: &mut Request<ClientBody>,
        present: FieldSet,
    ) -> Result<Response<ResponseBody>, ProxyError> {
        self.record(CacheResult::Bypass);
        let (method, url) = (request.method().clone(), key::url(self.origin, self.target, request));
        let mut response = exchange::run(self.origin, self.target, request, present).await?;
        if storable::invalidates(&method, response.status()) {
            self.store.invalidate(&url);
            for name in [LOCATION, CONTENT_LOCATION] {
                let location = response.headers().get(name).and_then(|value| value.to_str().ok());
                if let Some(other) = location.and_then(|location| key::same_origin(&url, location)) {
                    self.store.invalidate(&other);
                }
            }
        }
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            let forwarded = if is_cacheable_method(&method) { "bypass" } else { "method" };
            let note = Note { forwarded: Some(Forwarded::new(forwarded)), ..Note::default() };
            note.append(response.headers_mut(), &self.origin.view.proxy_names.deployment);
        }
        Ok(response)
    }

    /// Answers a request from the store, or fetches the response.
    async fn look_up(
        &self,
        request: &mut Request<ClientBody>,
        present: FieldSet,
    ) -> Result<Response<ResponseBody>, ProxyError> {
        let client_request = Rc::new(ClientRequest {
            method: request.method().clone(),
            version: request.version(),
            headers: request.headers().clone(),
            directives: RequestDirectives::of(request.headers()),
            at: SystemTime::now(),
        });
        let key = CacheKey::of(self, request);
        let mut may_wait = true;
        let mut turn = None;
        for _ in 0..MAX_ROUNDS {
            let found = self.store.find(&key.0, &client_request.headers);
            let stored = found.entry.filter(|entry| self.may_send(entry, &client_request));
            let assessment = stored.as_ref().map(|entry| {
                entry.timing.assess(&client_request.directives, self.settings, SystemTime::now())
            });
            if let (Some(entry), Some(assessed)) = (&stored, assessment)
                && assessed.reuse != Reuse::Validate
            {
                return Ok(self.reuse((entry, assessed), &client_request, &key, request));
            }
            if client_request.directives.only_if_cached {
                self.record(CacheResult::Miss);
                return Err(ProxyError::new(
                    Cause::NotCached,
                    "the request says `only-if-cached`, and no stored response can be used",
                ));
            }
            let shares = may_wait && !found.alone && self.may_share(&client_request, stored.is_some());
            let flight_key =
                key.of_flight(found.other.as_deref().or(stored.as_deref()), &client_request.headers);
            let joined = if shares { self.store.flights.join(&flight_key) } else { Joined::Alone };
            let lead = match joined {
                Joined::Leads(lead) => Some(lead),
                Joined::Alone => None,
                Joined::Follows(mut follower) => {
                    match self.follow(&mut follower, &client_request, stored.as_ref().zip(assessment)).await {
                        Followed::Response(response) => return Ok(*response),
                        Followed::Again => continue,
                        Followed::Alone => {
                            may_wait = false;
                            turn = follower.turn(self.time_left(&client_request)).await;
                            continue;
                        }
                        Followed::TooLong => {
                            may_wait = false;
                            continue;
                        }
                    }
                }
            };
            let fetch = Fetch {
                origin: OwnedOrigin::new(self.origin),
                target: self.target.clone(),
                request: std::mem::take(request),
                present,
                store: Arc::clone(self.store),
                settings: self.settings.clone(),
                key,
                client_request,
                had_other: found.other.is_some(),
                stored: stored.zip(assessment),
                lead,
                turn,
            };
            return fetch.run_for_client().await;
        }
        // Each response that it waited for was for other requests: it goes alone.
        let response = exchange::run(self.origin, self.target, request, present).await;
        self.record(CacheResult::Miss);
        response.map(|mut response| {
            let note = Note { forwarded: Some(Forwarded::new("miss")), ..Note::default() };
            note.append(response.headers_mut(), &self.origin.view.proxy_names.deployment);
            response
        })
    }

    /// Whether the response may be sent to a request with these credentials.
    fn may_send(&self, entry: &Entry, client_request: &ClientRequest) -> bool {
        let varies = entry.selection.names().any(|name| *name == COOKIE);
        may_be_sent(entry.timing.directives(), varies, &client_request.headers, self.settings.authorization)
    }

    /// Whether requests like this one may wait for one response.
    fn may_share(&self, client_request: &ClientRequest, is_stored: bool) -> bool {
        let credentials = client_request.headers.contains_key(AUTHORIZATION)
            && self.settings.authorization == AuthorizationRule::Refuse
            || client_request.headers.contains_key(COOKIE);
        client_request.method == Method::GET
            && !self.settings.coalesce.is_zero()
            && !credentials
            && !client_request.directives.no_cache
            && !client_request.directives.no_store
            && !client_request.headers.contains_key(RANGE)
            // Without a stored response the condition goes to the service, and its 304 is for this client.
            && (is_stored || !has_condition(&client_request.headers))
    }

    /// Answers from the store.
    fn reuse(
        &self,
        (entry, assessed): (&Arc<Entry>, Assessment),
        client_request: &Rc<ClientRequest>,
        key: &CacheKey,
        request: &Request<ClientBody>,
    ) -> Response<ResponseBody> {
        let result = if assessed.reuse == Reuse::Fresh { CacheResult::Hit } else { CacheResult::Stale };
        self.record(result);
        let mut note = Note { hit: true, ttl: Some(assessed.ttl), ..Note::default() };
        if assessed.reuse == Reuse::WhileRevalidating {
            note.detail = Some("stale_while_revalidate");
            let flight_key = key.of_flight(Some(entry), &client_request.headers);
            // Only the response to a GET is stored.
            if client_request.method == Method::GET
                && let Some(lead) = self.store.flights.lead(&flight_key)
            {
                fetch::revalidate_in_background(
                    self,
                    (entry, assessed),
                    client_request,
                    key,
                    (lead, request),
                );
            }
        }
        respond::from_entry(entry, client_request, &note, &self.origin.view.proxy_names.deployment)
    }

    /// Waits for the response that another request fetches.
    async fn follow(
        &self,
        follower: &mut Follower,
        client_request: &Rc<ClientRequest>,
        stored: Option<(&Arc<Entry>, Assessment)>,
    ) -> Followed {
        let limit = (*self.settings.coalesce).min(self.time_left(client_request));
        let Some(state) = follower.wait(limit).await else { return Followed::TooLong };
        let (entry, fill) = match state {
            FlightState::Stored(entry) => (entry, None),
            FlightState::Streaming(entry, fill) => (entry, Some(fill)),
            FlightState::Failed(cause) => {
                // An error is not shared, the stale response is.
                let Some((entry, assessed)) = stored.filter(|(_, assessed)| assessed.on_error) else {
                    return Followed::Alone;
                };
                let note = Note {
                    hit: true,
                    ttl: Some(assessed.ttl.min(-1)),
                    detail: Some(cause),
                    ..Note::default()
                };
                self.record(CacheResult::Stale);
                self.origin.progress.with_record(|record| {
                    record.replaced_cause = Some(cause);
                });
                let deployment = &self.origin.view.proxy_names.deployment;
                return Followed::Response(Box::new(respond::from_entry(
                    entry,
                    client_request,
                    &note,
                    deployment,
                )));
            }
            FlightState::Alone | FlightState::Pending => return Followed::Alone,
        };
        let assessed = entry.timing.assess(&client_request.directives, self.settings, SystemTime::now());
        if !entry.selection.matches(&client_request.headers) {
            // Its `Vary` is known now.
            return Followed::Again;
        }
        if !self.may_send(&entry, client_request) || assessed.reuse != Reuse::Fresh {
            return Followed::Alone;
        }
        let note = Note { hit: true, ttl: Some(assessed.ttl), is_collapsed: true, ..Note::default() };
        let deployment = &self.origin.view.proxy_names.deployment;
        self.record(CacheResult::Hit);
        Followed::Response(Box::new(match fill {
            None => respond::from_entry(&entry, client_request, &note, deployment),
            // The head is enough for a 304.
            Some(_)
                if entry.status == StatusCode::OK
                    && is_not_modified(&client_request.headers, &entry.headers) =>
            {
                respond::from_entry(&entry, client_request, &note, deployment)
            }
            Some(fill) => {
                self.limit_body();
                respond::from_fill(&entry, &fill, client_request, &note, self.origin)
            }
        }))
    }

    /// A body that arrives through another request's fetch is cut as one of its own.
    fn limit_body(&self) {
        let (policy, _) = self.target.route_owner.cluster.policy(self.target.route);
        self.origin.progress.set_limits(policy.idle_timeout.limit(), policy.max_duration.limit());
        self.origin.progress.response_begins();
    }

    /// How long the client can still wait for a response.
    fn time_left(&self, client_request: &ClientRequest) -> Duration {
        let (policy, _) = self.target.route_owner.cluster.policy(self.target.route);
        let limits = [policy.timeout.limit(), deadline::request_timeout(&client_request.headers)];
        let started = self.origin.progress.started();
        let own = self.origin.deadline.map(|at| at.saturating_duration_since(started));
        let limit = limits.into_iter().chain([own]).flatten().min().unwrap_or(Duration::from_secs(3600));
        limit.saturating_sub(Instant::now().saturating_duration_since(started))
    }

    fn record(&self, result: CacheResult) {
        self.origin.progress.with_record(|record| {
            record.cache = Some(result);
        });
    }
}

/// What became of a request that waited.
enum Followed {
    Response(Box<Response<ResponseBody>>),
    /// Look again.
    Again,
    /// Fetch, when it is its turn.
    Alone,
    TooLong,
}
