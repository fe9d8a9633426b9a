//! The upstreams with the tasks that keep them current, and the snapshot that a reload makes of them.

use std::{collections::HashMap, sync::Arc};

use tokio::runtime::Handle;

use super::{Cluster, ClusterTls, Mirrors, Router, Snapshot, Splits, queue_route::queue_routes};
use crate::{
    cache::Store,
    config::{self, Config, Endpoints, HostPort, Policy},
    discovery::{self, Discovery},
    dns::Resolver,
    fetch::Fetcher,
    identity::{
        access_policy::AccessPolicy, jwt, oauth2::TokenRenewer, store::IdentityStore, tls::ClientTls,
    },
    upstream::{
        Upstream,
        health::{self, CheckSettings, HealthChecks},
    },
};

/// The upstreams and the tasks that keep them current. Lives on the control thread.
#[derive(Debug)]
pub struct Clusters {
    resolver: Arc<Resolver>,
    fetcher: Fetcher,
    identity: Arc<IdentityStore>,
    live: HashMap<String, RunningUpstream>,
    inbound: RunningUpstream,
    splits: Splits,
    mirrors: Mirrors,
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
        let (live, splits, mirrors) = Default::default();
        let mut clusters =
            Self { resolver, fetcher, identity, live, inbound, splits, mirrors, issuer: None, cache: None };
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
        self.splits.retain(&config.upstreams);
        let (splits, mirrors) = (&mut self.splits, &mut self.mirrors);
        let clusters = config
            .upstreams
            .iter()
            .filter_map(|settings| {
                let live = self.live.get(&settings.name)?;
                let (upstream, client) = (Arc::clone(&live.upstream), live.client.clone());
                let mut cluster = Cluster::new(settings.clone(), upstream, client);
                cluster.destinations = splits.destinations(settings, index_of);
                cluster.mirrors = mirrors.of_routes(&cluster, index_of);
                cluster.queue_routes = queue_routes(&settings.routes, &config);
                cluster.token = live.token.as_ref().map(|keeper| Arc::clone(&keeper.token));
                Some(Arc::new(cluster))
            })
            .collect();
        let mut inbound = Cluster::new(settings, Arc::clone(&self.inbound.upstream), None);
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

/// The memory that a policy gives the store.
fn cache_bytes(policy: &Policy) -> Option<u64> {
    policy.cache.as_ref().map(|cache| *cache.max_bytes)
}
