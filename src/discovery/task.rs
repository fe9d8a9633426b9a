//! The task of a [`Discovery`](super::Discovery): read the source, resolve names, publish, wait.

use std::{sync::Arc, time::Duration};

use tokio::{task::JoinHandle, time::Instant};

use super::{
    MAX_ENDPOINTS,
    resolved_names::ResolvedNames,
    source::{EndpointSource, UnresolvedEndpoint, retry_at},
};
use crate::{
    dns::Resolver,
    rng::Rng,
    upstream::{DiscoveredEndpoint, DiscoveryError, Upstream},
};

/// The shortest time between two lookups, however often a refresh is requested.
const REFRESH_PAUSE: Duration = Duration::from_secs(1);
/// The delay before a changed file is read.
const SETTLE: Duration = Duration::from_millis(50);
/// How long a task with nothing due sleeps.
const IDLE: Duration = Duration::from_secs(3600);

pub(super) struct DiscoveryTask {
    source: EndpointSource,
    upstream: Arc<Upstream>,
    resolver: Arc<Resolver>,
    rng: Rng,
    targets: Vec<UnresolvedEndpoint>,
    names: ResolvedNames,
    /// When to read the source again; `None`: never.
    source_due: Option<Instant>,
    source_failures: u32,
    published: Published,
}

/// What was last published to the upstream.
#[derive(Default)]
struct Published {
    endpoints: Option<Vec<DiscoveredEndpoint>>,
    failed: bool,
}

impl DiscoveryTask {
    /// Starts the task, unless everything is known already.
    pub fn start(
        source: EndpointSource,
        upstream: Arc<Upstream>,
        resolver: Arc<Resolver>,
    ) -> Option<JoinHandle<()>> {
        let mut published = Published::default();
        if let EndpointSource::Fixed(targets) = &source {
            let literal = ResolvedNames::default()
                .endpoints(targets)
                .into_iter()
                .filter(|endpoint| endpoint.host.is_none());
            let literal: Vec<_> = literal.collect();
            let complete = literal.len() == targets.len().min(MAX_ENDPOINTS);
            if complete || !literal.is_empty() {
                published.publish(&upstream, literal);
            }
            if complete {
                return None;
            }
        }
        let task = Self {
            source,
            upstream,
            rng: Rng::new(),
            targets: Vec::new(),
            names: ResolvedNames::default(),
            source_due: Some(Instant::now()),
            source_failures: 0,
            published,
            resolver: resolver.clone(),
        };
        Some(resolver.runtime().spawn(task.run()))
    }

    async fn run(mut self) {
        loop {
            self.run_once().await;
            let completed_at = Instant::now();
            let due = self.source_due.into_iter().chain(self.names.due()).min();
            tokio::select! {
                () = tokio::time::sleep_until(due.unwrap_or(completed_at + IDLE)) => {}
                () = self.source.changed() => {
                    tokio::time::sleep(SETTLE).await;
                    self.source_due = Some(Instant::now());
                }
                () = self.upstream.refresh_requested() => {
                    tokio::time::sleep_until(completed_at + REFRESH_PAUSE).await;
                    let now = Instant::now();
                    self.source_due = self.source_due.map(|due| due.min(now));
                    self.names.expire_all(now);
                }
            }
        }
    }

    async fn run_once(&mut self) {
        let source_error = match self.source_due {
            Some(due) if due <= Instant::now() => self.read_source().await,
            _ => None,
        };
        self.names.sync(&self.targets, Instant::now());
        let Self { names, targets, published, upstream, .. } = self;
        let names_error = names
            .look_up(&self.resolver, &mut self.rng, |names| {
                // Requests may be waiting for the first result: they need not wait for the slowest name as well.
                if published.endpoints.is_none() {
                    published.publish(upstream, names.endpoints(targets));
                }
            })
            .await;
        let endpoints = names.endpoints(targets);
        match source_error.or(names_error) {
            None if self.source_failures > 0 || names.has_failures() => {
                published.publish_partial(upstream, endpoints)
            }
            None => published.publish_complete(upstream, endpoints),
            Some(error) => {
                published.publish_partial(upstream, endpoints);
                published.report_failure(upstream, error);
            }
        }
    }

    async fn read_source(&mut self) -> Option<DiscoveryError> {
        let reading = self.source.read(&self.resolver).await;
        let now = Instant::now();
        match reading {
            Ok(reading) => {
                if reading.targets.len() > MAX_ENDPOINTS && reading.targets != self.targets {
                    let (upstream, count) = (&*self.upstream.name, reading.targets.len());
                    tracing::warn!(
                        upstream,
                        count,
                        "more endpoints than the limit of {MAX_ENDPOINTS}: the rest is ignored"
                    );
                }
                self.targets = reading.targets;
                self.source_failures = 0;
                self.source_due = reading.valid_for.map(|time| now + self.rng.jitter(time, 0.1));
                None
            }
            Err(error) => {
                self.source_failures = self.source_failures.saturating_add(1);
                self.source_due = Some(retry_at(now, self.source_failures, &mut self.rng));
                Some(error)
            }
        }
    }
}

impl Published {
    /// Publishes the result of a complete discovery, even if it is empty.
    fn publish_complete(&mut self, upstream: &Upstream, endpoints: Vec<DiscoveredEndpoint>) {
        if self.failed {
            tracing::info!(upstream = &*upstream.name, endpoints = endpoints.len(), "discovery works again");
        }
        if self.failed || self.endpoints.as_ref() != Some(&endpoints) {
            self.publish(upstream, endpoints);
        }
        self.failed = false;
    }

    /// Publishes the result of a partly failed discovery, unless it is empty.
    fn publish_partial(&mut self, upstream: &Upstream, endpoints: Vec<DiscoveredEndpoint>) {
        if !endpoints.is_empty() && self.endpoints.as_ref() != Some(&endpoints) {
            self.publish(upstream, endpoints);
        }
    }

    fn report_failure(&mut self, upstream: &Upstream, error: DiscoveryError) {
        if !self.failed {
            let kept = self.endpoints.as_ref().map_or(0, Vec::len);
            tracing::warn!(upstream = &*upstream.name, %error, kept, "endpoints could not be looked up");
        }
        self.failed = true;
        upstream.record_discovery_failure(error);
    }

    fn publish(&mut self, upstream: &Upstream, endpoints: Vec<DiscoveredEndpoint>) {
        tracing::debug!(upstream = &*upstream.name, endpoints = endpoints.len(), "endpoints changed");
        upstream.publish(endpoints.clone());
        self.endpoints = Some(endpoints);
    }
}
