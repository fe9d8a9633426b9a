//! The configuration as the data path uses it: prepared once, replaced as a whole on reload.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    net::IpAddr,
    sync::Arc,
    time::Instant,
};

use rustls_pki_types::ServerName;

use tokio::runtime::Handle;

use crate::{
    cache::Store,
    config::{
        self, Config, Endpoints, ForwardedHeaders, HeaderEdits, HostMatch, HostPort, ObservablePolicy, Policy,
    },
    discovery::{self, Discovery},
    dns::Resolver,
    fetch::Fetcher,
    identity::{
        access_policy::AccessPolicy,
        jwt,
        oauth2::{TokenRenewer, UpstreamToken},
        store::IdentityStore,
        tls::ClientTls,
    },
    model::{
        CompiledEdits, Router,
        queue_route::{QueueRoute, queue_routes},
    },
    resilience::{
        rate::RateLimit,
        retry::{RetryPolicy, RetrySettings},
    },
    units::Toggle,
    upstream::{
        Upstream,
        connect::TlsTarget,
        health::{self, CheckSettings, HealthChecks},
    },
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
    /// Index of the upstream that `to` of each route names, likewise.
    pub route_to: Vec<Option<usize>>,
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
    fn new(settings: &config::Upstream, client: Arc<ClientTls>) -> Self {
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

    pub fn new(
        settings: config::Upstream,
        upstream: Arc<Upstream>,
        client: Option<Arc<ClientTls>>,
        index_of: impl Fn(&str) -> Option<usize>,
    ) -> Self {
        let edits = settings
            .routes
            .iter()
            .map(|route| CompiledEdits::new(&route.request_headers, &route.response_headers))
            .collect();
        let route_to = settings.routes.iter().map(|route| route.to.as_deref().and_then(&index_of)).collect();
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
            route_to,
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

/// The memory that a policy gives the store.
fn cache_bytes(policy: &Policy) -> Option<u64> {
    policy.cache.as_ref().map(|cache| *cache.max_bytes)
}

/// The upstreams and the tasks that keep them current. Lives on the control thread.
#[derive(Debug)]
pub struct Clusters {
    resolver: Arc<Resolver>,
    fetcher: Fetcher,
    identity: Arc<IdentityStore>,
    live: HashMap<String, RunningUpstream>,
    inbound: RunningUpstream,
    /// The keys of `[inbound.jwt]`.
    issuer: Option<jwt::issuer::KeyRefresher>,
    cache: Option<Arc<Store>>,
}

#[derive(Debug)]
struct RunningUpstream {
    upstream: Arc<Upstream>,
    source: Endpoints,
    _discovery: Discovery,
    health_checks: Option<HealthChecks>,
    token: Option<TokenRenewer>,
    client: Option<Arc<ClientTls>>,
}

impl RunningUpstream {
    fn start(
        settings: &config::Upstream,
        resolver: &Arc<Resolver>,
        upstream: Arc<Upstream>,
        client: Option<Arc<ClientTls>>,
    ) -> Self {
        let discovery = discovery::spawn(&settings.endpoints, Arc::clone(&upstream), Arc::clone(resolver));
        let health_checks = Self::check(settings, resolver, &upstream, client.as_ref());
        Self {
            upstream,
            source: settings.endpoints.clone(),
            _discovery: discovery,
            health_checks,
            token: None,
            client,
        }
    }

    /// Keeps the token where its settings did not change.
    fn keep_token(&mut self, settings: &config::Upstream, fetcher: &Fetcher, runtime: &Handle) {
        let known = self.token.take().filter(|token| Some(&token.settings) == settings.oauth2.as_ref());
        self.token = known.or_else(|| {
            Some(TokenRenewer::start(&settings.name, settings.oauth2.as_ref()?, fetcher, runtime))
        });
    }

    fn check(
        settings: &config::Upstream,
        resolver: &Arc<Resolver>,
        upstream: &Arc<Upstream>,
        client: Option<&Arc<ClientTls>>,
    ) -> Option<HealthChecks> {
        let check = Self::check_settings(settings, client)?;
        Some(health::spawn(check, Arc::clone(upstream), resolver.runtime()))
    }

    fn check_settings(settings: &config::Upstream, client: Option<&Arc<ClientTls>>) -> Option<CheckSettings> {
        let tls = client.map(|client| ClusterTls::new(settings, Arc::clone(client)).target);
        Some(CheckSettings { health: settings.health.clone()?, protocol: settings.protocol, tls })
    }

    /// Keeps discovery and health checks where their settings did not change. The state of the upstream is always kept.
    fn renew(
        old: Option<Self>,
        settings: &config::Upstream,
        resolver: &Arc<Resolver>,
        client: Option<Arc<ClientTls>>,
    ) -> Self {
        match old {
            Some(mut old) if old.source == settings.endpoints => {
                match (Self::check_settings(settings, client.as_ref()), &old.health_checks) {
                    (Some(check), Some(checks)) => checks.reconfigure(check),
                    _ => old.health_checks = Self::check(settings, resolver, &old.upstream, client.as_ref()),
                }
                old.client = client;
                old
            }
            Some(old) => {
                let token = old.token;
                Self { token, ..Self::start(settings, resolver, old.upstream, client) }
            }
            None => Self::start(settings, resolver, Upstream::new(settings.name.as_str()), client),
        }
    }
}

/// The service behind the inbound listener, at one of its addresses, as an upstream.
pub fn inbound_settings(config: &Config, service: HostPort) -> config::Upstream {
    let protocol = config.inbound.ports.iter().find(|p| p.port == service.port).map(|p| p.protocol);
    let mut settings = config::Upstream::new(
        config.service.name.as_str(),
        Endpoints::Fixed(vec![service]),
        config.inbound.policy.clone(),
    );
    settings.protocol = protocol.unwrap_or_default();
    settings.routes.clone_from(&config.inbound.routes);
    settings
}

impl Clusters {
    pub fn build(
        config: Arc<Config>,
        resolver: Arc<Resolver>,
        identity: Arc<IdentityStore>,
    ) -> (Self, Snapshot) {
        let settings = inbound_settings(&config, config.inbound.forward_to.clone());
        let inbound =
            RunningUpstream::start(&settings, &resolver, Upstream::new(settings.name.as_str()), None);
        let fetcher = Fetcher::new(Arc::clone(&resolver));
        let mut clusters =
            Self { resolver, fetcher, identity, live: HashMap::new(), inbound, issuer: None, cache: None };
        let snapshot = clusters.rebuild(config);
        (clusters, snapshot)
    }

    /// Starts tasks of new upstreams, ends those of removed ones, keeps the rest.
    pub fn rebuild(&mut self, config: Arc<Config>) -> Snapshot {
        let mut old = std::mem::take(&mut self.live);
        let min = config.identity.as_ref().map(|identity| identity.min_tls).unwrap_or_default();
        for settings in &config.upstreams {
            let min = settings.tls.min_tls.unwrap_or(min);
            let client = self.identity.client(&settings.name, &settings.tls, min);
            let mut live =
                RunningUpstream::renew(old.remove(&settings.name), settings, &self.resolver, client);
            live.keep_token(settings, &self.fetcher, self.resolver.runtime());
            self.live.insert(settings.name.clone(), live);
        }
        let settings = inbound_settings(&config, config.inbound.forward_to.clone());
        if self.inbound.source != settings.endpoints {
            self.inbound =
                RunningUpstream::start(&settings, &self.resolver, Arc::clone(&self.inbound.upstream), None);
        }

        let names: HashMap<&str, usize> = config
            .upstreams
            .iter()
            .enumerate()
            .map(|(index, upstream)| (upstream.name.as_str(), index))
            .collect();
        let index_of = |name: &str| names.get(name).copied();
        let clusters = config
            .upstreams
            .iter()
            .filter_map(|settings| {
                let live = self.live.get(&settings.name)?;
                let (upstream, client) = (Arc::clone(&live.upstream), live.client.clone());
                let mut cluster = Cluster::new(settings.clone(), upstream, client, index_of);
                cluster.queue_routes = queue_routes(&settings.routes, &config);
                cluster.token = live.token.as_ref().map(|keeper| Arc::clone(&keeper.token));
                Some(Arc::new(cluster))
            })
            .collect();
        let mut inbound = Cluster::new(settings, Arc::clone(&self.inbound.upstream), None, |_| None);
        inbound.queue_routes = queue_routes(&config.inbound.routes, &config);
        let inbound = Arc::new(inbound);
        let gate = self.gate(&config);
        let cache = self.cache(&config);
        Snapshot { router: Router::new(&config), clusters, inbound, gate, cache, config }
    }

    /// The store, with what it has. Without a route that uses it there is none.
    fn cache(&mut self, config: &Config) -> Option<Arc<Store>> {
        let of_upstream = |upstream: &config::Upstream| {
            let routes = upstream.routes.iter().map(|route| cache_bytes(&route.policy));
            routes.chain([cache_bytes(&upstream.policy)]).flatten().max()
        };
        let all = [cache_bytes(&config.defaults), cache_bytes(&config.inbound.policy)];
        let max_bytes = config.upstreams.iter().map(of_upstream).chain(all).flatten().max();
        self.cache = max_bytes.map(|max_bytes| match self.cache.take() {
            Some(store) => {
                store.resize(max_bytes);
                store
            }
            None => Arc::new(Store::new(max_bytes)),
        });
        self.cache.clone()
    }

    /// Keeps the issuer's keys where their source did not change.
    fn gate(&mut self, config: &Config) -> Option<AccessPolicy> {
        let settings = config.inbound.jwt.as_ref();
        let known = self
            .issuer
            .take()
            .filter(|known| settings.is_some_and(|settings| known.has_same_source(settings)));
        let start =
            |settings| jwt::issuer::KeyRefresher::start(settings, &self.fetcher, self.resolver.runtime());
        self.issuer = known.or_else(|| settings.map(start));
        AccessPolicy::new(config, self.issuer.as_ref().map(|watch| Arc::clone(&watch.issuer)))
    }
}
