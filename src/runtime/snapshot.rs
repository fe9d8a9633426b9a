//! The configuration as the data path sees it: resolved once, replaced as a whole.

use std::{collections::HashMap, sync::Arc, time::Instant};

use tokio::runtime::Handle;

use crate::{
    config::{self, Config, Endpoints, Policy},
    discovery::{self, Discovery, Resolver},
    fetch::Fetcher,
    identity::{
        gate::Gate,
        jwt,
        oauth2::{Keeper, OwnToken},
    },
    proxy::{headers::CompiledEdits, route::Router},
    resilience::{rate::RateLimit, retry::RetryPolicy},
    upstream::{
        Upstream,
        health::{self, HealthChecks},
    },
};

/// What holds for new calls. A call keeps the snapshot it began with.
#[derive(Debug)]
pub struct Snapshot {
    pub config: Arc<Config>,
    pub router: Router,
    /// In the order of `config.upstreams`, which is what the router's indexes mean.
    pub clusters: Vec<Arc<Cluster>>,
    /// The service itself, for inbound calls.
    pub inbound: Arc<Cluster>,
    /// What an inbound call must show; `None`: nothing.
    pub gate: Option<Gate>,
}

/// An upstream with the settings that hold for it now.
#[derive(Debug)]
pub struct Cluster {
    pub settings: config::Upstream,
    pub upstream: Arc<Upstream>,
    /// Header edits of each route, in the order of `settings.routes`.
    pub edits: Vec<CompiledEdits>,
    /// The retry policy of each route, likewise, and of calls that no route matches.
    route_retries: Vec<RetryPolicy>,
    retries: RetryPolicy,
    /// The rate limit of each route, likewise; shared by all that inherit the same.
    route_rates: Vec<Option<Arc<RateLimit>>>,
    rate: Option<Arc<RateLimit>>,
    /// Index of the upstream that serves each route instead, likewise.
    pub route_to: Vec<Option<usize>>,
    /// Whether its addresses were looked up rather than written: then `deny_networks` is heeded.
    pub looked_up: bool,
    /// What every call to it carries.
    pub token: Option<Arc<OwnToken>>,
}

impl Cluster {
    pub fn new(
        settings: config::Upstream,
        upstream: Arc<Upstream>,
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
            policy.rate_limit.as_ref().map(|settings| upstream.guards.rate_limit(settings, now))
        };
        let route_rates = settings.routes.iter().map(|route| rate_of(&route.policy)).collect();
        let rate = rate_of(&settings.policy);
        upstream.guards.configure(&settings.policy, now);
        let looked_up = !matches!(&settings.endpoints, Endpoints::Fixed(list) if list.iter().all(|e| e.literal().is_some()));
        Self {
            settings,
            upstream,
            edits,
            route_retries,
            retries,
            route_rates,
            rate,
            route_to,
            looked_up,
            token: None,
        }
    }
}

impl Cluster {
    /// What holds for a call that matched `route`.
    pub fn policy(&self, route: Option<usize>) -> (&Policy, &RetryPolicy) {
        let of_route = route.and_then(|index| {
            Some((&self.settings.routes.get(index)?.policy, self.route_retries.get(index)?))
        });
        of_route.unwrap_or((&self.settings.policy, &self.retries))
    }
}

impl Cluster {
    /// Whether any call asks its breaker.
    pub fn has_breaker(&self) -> bool {
        let mut routes = self.settings.routes.iter();
        self.settings.policy.breaker.is_some() || routes.any(|route| route.policy.breaker.is_some())
    }

    /// The rate limit of a call that matched `route`.
    pub fn rate_limit(&self, route: Option<usize>) -> Option<&Arc<RateLimit>> {
        route.and_then(|route| self.route_rates.get(route)).unwrap_or(&self.rate).as_ref()
    }
}

/// The upstreams and the tasks that keep them current. Lives on the control thread.
#[derive(Debug)]
pub(super) struct Clusters {
    resolver: Arc<Resolver>,
    fetcher: Fetcher,
    live: HashMap<String, Live>,
    inbound: Live,
    /// The keys of `[inbound.jwt]`.
    issuer: Option<jwt::issuer::Watch>,
}

#[derive(Debug)]
struct Live {
    upstream: Arc<Upstream>,
    source: Endpoints,
    _discovery: Discovery,
    health_checks: Option<HealthChecks>,
    token: Option<Keeper>,
}

impl Live {
    fn start(settings: &config::Upstream, resolver: &Arc<Resolver>, upstream: Arc<Upstream>) -> Self {
        let discovery = discovery::spawn(&settings.endpoints, Arc::clone(&upstream), Arc::clone(resolver));
        let health_checks = Self::check(settings, resolver, &upstream);
        Self {
            upstream,
            source: settings.endpoints.clone(),
            _discovery: discovery,
            health_checks,
            token: None,
        }
    }

    /// Keeps the token where nothing changed for it.
    fn keep_token(&mut self, settings: &config::Upstream, fetcher: &Fetcher, runtime: &Handle) {
        let known = self.token.take().filter(|token| Some(&token.settings) == settings.oauth2.as_ref());
        self.token = known
            .or_else(|| Some(Keeper::start(&settings.name, settings.oauth2.as_ref()?, fetcher, runtime)));
    }

    fn check(
        settings: &config::Upstream,
        resolver: &Arc<Resolver>,
        upstream: &Arc<Upstream>,
    ) -> Option<HealthChecks> {
        let health = settings.health.clone()?;
        Some(health::spawn(health, settings.protocol, Arc::clone(upstream), resolver.runtime()))
    }

    /// Keeps what runs where nothing changed for it; the state of the upstream is kept in any case.
    fn renew(old: Option<Self>, settings: &config::Upstream, resolver: &Arc<Resolver>) -> Self {
        match old {
            Some(mut old) if old.source == settings.endpoints => {
                match (&settings.health, &old.health_checks) {
                    (Some(health), Some(checks)) => checks.reconfigure(health.clone(), settings.protocol),
                    _ => old.health_checks = Self::check(settings, resolver, &old.upstream),
                }
                old
            }
            Some(old) => {
                let token = old.token;
                Self { token, ..Self::start(settings, resolver, old.upstream) }
            }
            None => Self::start(settings, resolver, Upstream::new(settings.name.as_str())),
        }
    }
}

/// The service behind the inbound listener, as an upstream.
fn inbound_settings(config: &Config) -> config::Upstream {
    let service = config.inbound.forward_to.clone();
    let protocol = config.inbound.ports.iter().find(|p| p.port == service.port).map(|p| p.protocol);
    let mut settings = config::Upstream::new(
        config.service.name.as_str(),
        Endpoints::Fixed(vec![service]),
        config.inbound.policy.clone(),
    );
    settings.protocol = protocol.unwrap_or_default();
    settings
}

impl Clusters {
    pub fn build(config: Arc<Config>, resolver: Arc<Resolver>) -> (Self, Snapshot) {
        let settings = inbound_settings(&config);
        let inbound = Live::start(&settings, &resolver, Upstream::new(settings.name.as_str()));
        let fetcher = Fetcher::new(Arc::clone(&resolver));
        let mut clusters = Self { resolver, fetcher, live: HashMap::new(), inbound, issuer: None };
        let snapshot = clusters.rebuild(config);
        (clusters, snapshot)
    }

    /// Starts what is new, ends what is gone, keeps the rest.
    pub fn rebuild(&mut self, config: Arc<Config>) -> Snapshot {
        let mut old = std::mem::take(&mut self.live);
        for settings in &config.upstreams {
            let mut live = Live::renew(old.remove(&settings.name), settings, &self.resolver);
            live.keep_token(settings, &self.fetcher, self.resolver.runtime());
            self.live.insert(settings.name.clone(), live);
        }
        let settings = inbound_settings(&config);
        if self.inbound.source != settings.endpoints {
            self.inbound = Live::start(&settings, &self.resolver, Arc::clone(&self.inbound.upstream));
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
                let mut cluster = Cluster::new(settings.clone(), Arc::clone(&live.upstream), index_of);
                cluster.token = live.token.as_ref().map(|keeper| Arc::clone(&keeper.token));
                Some(Arc::new(cluster))
            })
            .collect();
        let inbound = Arc::new(Cluster::new(settings, Arc::clone(&self.inbound.upstream), |_| None));
        let gate = self.gate(&config);
        Snapshot { router: Router::new(&config), clusters, inbound, gate, config }
    }

    /// Keeps the issuer's keys where they come from the same place as before.
    fn gate(&mut self, config: &Config) -> Option<Gate> {
        let settings = config.inbound.jwt.as_ref();
        let known =
            self.issuer.take().filter(|known| settings.is_some_and(|settings| known.serves(settings)));
        let start = |settings| jwt::issuer::Watch::start(settings, &self.fetcher, self.resolver.runtime());
        self.issuer = known.or_else(|| settings.map(start));
        Gate::new(config, self.issuer.as_ref().map(|watch| Arc::clone(&watch.issuer)))
    }
}
