//! The configuration as the data path uses it: prepared once, replaced as a whole on reload.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    net::IpAddr,
    sync::Arc,
    time::Instant,
};

use rustls_pki_types::ServerName;

use crate::{
    cache::Store,
    config::{self, Config, Endpoints, ForwardedHeaders, HeaderEdits, HostMatch, ObservablePolicy, Policy},
    identity::{access_policy::AccessPolicy, oauth2::UpstreamToken, tls::ClientTls},
    model::{CompiledEdits, RouteDestination, RouteMirror, Router, queue_route::QueueRoute},
    resilience::{
        mirror::MirrorSettings,
        rate::RateLimit,
        retry::{RetryPolicy, RetrySettings},
    },
    units::Toggle,
    upstream::{Upstream, connect::TlsTarget},
};

/// The configuration for new requests. A request keeps the snapshot that it started with.
#[derive(Debug)]
pub struct Snapshot {
    pub config: Arc<Config>,
    pub router: Router,
    /// In the order of `config.upstreams`; the router's indices refer to it.
    pub clusters: Vec<Arc<Cluster>>,
    /// The service itself, for inbound requests.
    pub inbound: Arc<Cluster>,
    /// Authorization of inbound requests; `None`: not configured.
    pub gate: Option<AccessPolicy>,
    /// Stored responses; `None`: no route has a cache.
    pub cache: Option<Arc<Store>>,
}

impl Snapshot {
    /// The key of `[inbound]`, outside its policy, that acts on each request. See [`Cluster::request_policy`].
    pub fn inbound_request_policy(&self) -> Option<&'static str> {
        let gate = self.gate.as_ref();
        let allow = gate.is_some_and(|gate| !gate.allow_list.is_empty() && !gate.observe_allow);
        let jwt = gate.is_some_and(|gate| gate.jwt.is_some() && !gate.observe_jwt);
        let forwarded =
            self.config.inbound.sets_forwarded && self.config.inbound.forwarded != ForwardedHeaders::Off;
        [("allow", allow), ("jwt", jwt), ("forwarded", forwarded)]
            .into_iter()
            .find_map(|(key, in_force)| in_force.then_some(key))
    }
}

/// An upstream with its current settings.
#[derive(Clone, Debug)]
pub struct Cluster {
    pub settings: config::Upstream,
    pub upstream: Arc<Upstream>,
    /// Header edits of each route, in the order of `settings.routes`.
    pub header_edits: Vec<CompiledEdits>,
    /// The retry policy of each route, likewise, and of requests that match no route.
    route_retries: Vec<RetryPolicy>,
    retries: RetryPolicy,
    /// The rate limit of each route, likewise; routes that inherit the same one share it.
    route_rates: Vec<Option<Arc<RateLimit>>>,
    rate: Option<Arc<RateLimit>>,
    /// Where the requests of each route go, likewise.
    pub destinations: Vec<RouteDestination>,
    /// The mirror of each route, likewise; empty: no route has one.
    pub mirrors: Vec<Option<Box<RouteMirror>>>,
    /// What `queue` of each route means, likewise; behind them the deliveries. Empty: no route has one.
    pub queue_routes: Vec<Option<QueueRoute>>,
    /// Whether its addresses are resolved rather than written in the configuration: then `deny_networks` applies.
    pub is_resolved: bool,
    /// What each route makes of a request and its response, likewise, as a number: a stored response belongs to it.
    route_fingerprints: Vec<u64>,
    /// The OAuth 2 token that every request to it carries.
    pub token: Option<Arc<UpstreamToken>>,
    /// TLS towards its endpoints.
    pub tls: Option<ClusterTls>,
}

/// TLS with an upstream.
#[derive(Clone, Debug)]
pub struct ClusterTls {
    pub target: TlsTarget,
    /// Neither `server_name` nor `identity` is set, so the certificate must match the host that the client requested.
    name_from_host: bool,
}

impl ClusterTls {
    pub(super) fn new(settings: &config::Upstream, client: Arc<ClientTls>) -> Self {
        let exact = settings.hosts.iter().find_map(|host| match &host.host {
            HostMatch::Exact(name) => Some(name.as_str()),
            _ => None,
        });
        let name = settings.tls.server_name.as_deref().or(exact).unwrap_or(&settings.name);
        // Validated names parse. The fallback is for an upstream whose name is not a host name.
        let name = server_name(name).unwrap_or_else(|| ServerName::from(IpAddr::from([0, 0, 0, 0])));
        let name_from_host = settings.tls.server_name.is_none() && settings.tls.identity.is_empty();
        Self { target: TlsTarget { client, name: Arc::new(name) }, name_from_host }
    }
}

fn server_name(name: &str) -> Option<ServerName<'static>> {
    ServerName::try_from(name.trim_start_matches('[').trim_end_matches(']').to_owned()).ok()
}

impl Cluster {
    /// TLS settings and server name. `host` is the one that the client requested; it decides where the configuration
    /// does not.
    pub fn tls_target(&self, host: Option<&str>) -> Option<TlsTarget> {
        let tls = self.tls.as_ref()?;
        let Some(host) = host.filter(|_| tls.name_from_host) else { return Some(tls.target.clone()) };
        let host =
            host.parse::<http::uri::Authority>().ok().map(|authority| authority.host().to_ascii_lowercase());
        let named = host.filter(|host| self.settings.hosts.iter().any(|pattern| pattern.host.matches(host)));
        let Some(name) = named.as_deref().and_then(server_name) else { return Some(tls.target.clone()) };
        if name == *tls.target.name {
            return Some(tls.target.clone());
        }
        Some(TlsTarget { client: Arc::clone(&tls.target.client), name: Arc::new(name) })
    }

    pub fn new(settings: config::Upstream, upstream: Arc<Upstream>, client: Option<Arc<ClientTls>>) -> Self {
        let edits = settings.routes.iter().map(CompiledEdits::new).collect();
        let route_retries =
            settings.routes.iter().map(|route| RetryPolicy::new(route.policy.retry.0.clone())).collect();
        let retries = RetryPolicy::new(settings.policy.retry.0.clone());
        let now = Instant::now();
        let rate_of = |policy: &Policy| {
            policy.rate_limit.as_ref().map(|settings| upstream.policy_state.rate_limit(settings, now))
        };
        let route_rates = settings.routes.iter().map(|route| rate_of(&route.policy)).collect();
        let rate = rate_of(&settings.policy);
        upstream.policy_state.configure(&settings.policy, now);
        let looked_up = !matches!(&settings.endpoints, Endpoints::Fixed(list) if list.iter().all(|e| e.socket_addr().is_some()));
        let tls = client.map(|client| ClusterTls::new(&settings, client));
        let route_fingerprints = settings.routes.iter().map(route_fingerprint).collect();
        Self {
            settings,
            upstream,
            header_edits: edits,
            route_retries,
            retries,
            route_rates,
            rate,
            destinations: Vec::new(),
            mirrors: Vec::new(),
            queue_routes: Vec::new(),
            is_resolved: looked_up,
            route_fingerprints,
            token: None,
            tls,
        }
    }
}

/// A number for what a route makes of a request and its response.
fn route_fingerprint(route: &config::Route) -> u64 {
    let mut hasher = DefaultHasher::new();
    let (edits, response_edits) = (&route.request_headers, &route.response_headers);
    format!("{:?} {:?} {edits:?} {response_edits:?}", route.matches, route.path_rewrite).hash(&mut hasher);
    hasher.finish()
}

impl Cluster {
    /// A number for what `route` makes of a request and its response; 0 without a route.
    pub fn route_fingerprint(&self, route: Option<usize>) -> u64 {
        route.and_then(|route| self.route_fingerprints.get(route)).copied().unwrap_or(0)
    }

    /// The policy of a request that matched `route`.
    pub fn policy(&self, route: Option<usize>) -> (&Policy, &RetryPolicy) {
        let of_route = route.and_then(|index| {
            Some((&self.settings.routes.get(index)?.policy, self.route_retries.get(index)?))
        });
        of_route.unwrap_or((&self.settings.policy, &self.retries))
    }
}

impl Cluster {
    /// The key of a policy that acts on each request to this upstream, and that a byte stream would bypass. Timeouts,
    /// retries and the breaker are not such policies, nor is one that is only observed.
    pub fn request_policy(&self, observed: &[ObservablePolicy]) -> Option<&'static str> {
        let acts = |policy| !observed.contains(&policy);
        let routes = self.settings.routes.iter();
        let policies = routes.clone().map(|route| &route.policy).chain([&self.settings.policy]);
        let of_policy = |policy: &Policy| {
            [
                ("rate_limit", policy.rate_limit.is_some() && acts(ObservablePolicy::RateLimit)),
                (
                    "limits",
                    policy.sets_request_limits && policy.limits.is_some() && acts(ObservablePolicy::Limits),
                ),
                ("fault", policy.fault.is_some() && acts(ObservablePolicy::Fault)),
                ("cache", policy.cache.is_some()),
            ]
            .into_iter()
            .find_map(|(key, in_force)| in_force.then_some(key))
        };
        let edits = |route: &config::Route| {
            [("request_headers", &route.request_headers), ("response_headers", &route.response_headers)]
                .into_iter()
                .find_map(|(key, edits)| (*edits != HeaderEdits::default()).then_some(key))
                .or_else(|| route.queue.as_ref().map(|_| "queue"))
        };
        policies.into_iter().find_map(of_policy).or_else(|| routes.into_iter().find_map(edits))
    }

    /// The same for deliveries of a queue, which is their retry: each attempt is sent once, and what it returns is the
    /// service's own.
    pub fn for_deliveries(&self) -> Self {
        let mut cluster = self.clone();
        let once = RetrySettings { max: 0, ..RetrySettings::default() };
        let config::Upstream { policy, routes, .. } = &mut cluster.settings;
        for policy in routes.iter_mut().map(|route| &mut route.policy).chain([policy]) {
            policy.retry = Toggle::on(once.clone());
            policy.hedge = Toggle::off();
            policy.fallback = Toggle::off();
        }
        cluster.retries = RetryPolicy::new(Some(once));
        cluster.route_retries.fill(cluster.retries.clone());
        cluster
    }

    /// The same for copies of its requests: each is sent once, with a short timeout, and spends no rate of the clients.
    pub fn for_copies(&self, mirror: &MirrorSettings) -> Self {
        let mut cluster = self.for_deliveries();
        let config::Upstream { policy, routes, .. } = &mut cluster.settings;
        for policy in routes.iter_mut().map(|route| &mut route.policy).chain([policy]) {
            policy.timeout = mirror.timeout;
            policy.rate_limit = Toggle::off();
            policy.fault = Toggle::off();
        }
        cluster.rate = None;
        cluster.route_rates.fill(None);
        cluster
    }

    /// Whether its policy or any route's has a breaker.
    pub fn has_breaker(&self) -> bool {
        let mut routes = self.settings.routes.iter();
        self.settings.policy.breaker.is_some() || routes.any(|route| route.policy.breaker.is_some())
    }

    /// Whether its policy or any route's has a cache.
    pub fn has_cache(&self) -> bool {
        let mut routes = self.settings.routes.iter();
        self.settings.policy.cache.is_some() || routes.any(|route| route.policy.cache.is_some())
    }

    /// The rate limit of a request that matched `route`.
    pub fn rate_limit(&self, route: Option<usize>) -> Option<&Arc<RateLimit>> {
        route.and_then(|route| self.route_rates.get(route)).unwrap_or(&self.rate).as_ref()
    }
}
