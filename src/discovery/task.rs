//! The task behind a [`Discovery`](super::Discovery): read the source, resolve names, publish, wait.

use std::{sync::Arc, time::Duration};

use tokio::{task::JoinHandle, time::Instant};

use super::{
    MAX_ENDPOINTS,
    names::Names,
    source::{Source, Target, retry_at},
};
use crate::{
    dns::Resolver,
    rng::Rng,
    upstream::{DiscoveryError, Found, Upstream},
};

/// However often a refresh is asked for, this long passes between two look-ups.
const REFRESH_PAUSE: Duration = Duration::from_secs(1);
/// A file that begins to change gets this long until it is read.
const SETTLE: Duration = Duration::from_millis(50);
/// What a task without anything due sleeps for.
const IDLE: Duration = Duration::from_secs(3600);

pub(super) struct Task {
    source: Source,
    upstream: Arc<Upstream>,
    resolver: Arc<Resolver>,
    rng: Rng,
    targets: Vec<Target>,
    names: Names,
    /// When to read the source again; `None`: never.
    source_due: Option<Instant>,
    source_failures: u32,
    published: Published,
}

/// What the upstream was told last.
#[derive(Default)]
struct Published {
    found: Option<Vec<Found>>,
    failed: bool,
}

impl Task {
    /// Starts the task, unless all is known for good.
    pub fn start(source: Source, upstream: Arc<Upstream>, resolver: Arc<Resolver>) -> Option<JoinHandle<()>> {
        let mut published = Published::default();
        if let Source::Fixed(targets) = &source {
            let literal = Names::default().found(targets).into_iter().filter(|found| found.host.is_none());
            let literal: Vec<_> = literal.collect();
            let complete = literal.len() == targets.len().min(MAX_ENDPOINTS);
            if complete || !literal.is_empty() {
                published.found(&upstream, literal);
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
            names: Names::default(),
            source_due: Some(Instant::now()),
            source_failures: 0,
            published,
            resolver: resolver.clone(),
        };
        Some(resolver.runtime().spawn(task.run()))
    }

    async fn run(mut self) {
        loop {
            self.round().await;
            let asked_at = Instant::now();
            let due = self.source_due.into_iter().chain(self.names.due()).min();
            tokio::select! {
                () = tokio::time::sleep_until(due.unwrap_or(asked_at + IDLE)) => {}
                () = self.source.changed() => {
                    tokio::time::sleep(SETTLE).await;
                    self.source_due = Some(Instant::now());
                }
                () = self.upstream.refresh_wanted() => {
                    tokio::time::sleep_until(asked_at + REFRESH_PAUSE).await;
                    let now = Instant::now();
                    self.source_due = self.source_due.map(|due| due.min(now));
                    self.names.all_due(now);
                }
            }
        }
    }

    async fn round(&mut self) {
        let source_error = match self.source_due {
            Some(due) if due <= Instant::now() => self.read_source().await,
            _ => None,
        };
        self.names.follow(&self.targets, Instant::now());
        let Self { names, targets, published, upstream, .. } = self;
        let names_error = names
            .look_up(&self.resolver, &mut self.rng, |names| {
                // Calls may be waiting for the very first answer: they need not wait for the slowest name too.
                if published.found.is_none() {
                    published.found(upstream, names.found(targets));
                }
            })
            .await;
        let found = names.found(targets);
        match source_error.or(names_error) {
            None if self.source_failures > 0 || names.failing() => published.keep(upstream, found),
            None => published.good(upstream, found),
            Some(error) => {
                published.keep(upstream, found);
                published.failed(upstream, error);
            }
        }
    }

    async fn read_source(&mut self) -> Option<DiscoveryError> {
        let reading = self.source.read(&self.resolver).await;
        let now = Instant::now();
        match reading {
            Ok(reading) => {
                if reading.targets.len() > MAX_ENDPOINTS && reading.targets != self.targets {
                    let (upstream, found) = (&*self.upstream.name, reading.targets.len());
                    tracing::warn!(
                        upstream,
                        found,
                        "more endpoints than {MAX_ENDPOINTS}: the rest is left out"
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
    /// All went well, and this is what was found, be it nothing.
    fn good(&mut self, upstream: &Upstream, found: Vec<Found>) {
        if self.failed {
            tracing::info!(upstream = &*upstream.name, endpoints = found.len(), "endpoints are known again");
        }
        if self.failed || self.found.as_ref() != Some(&found) {
            self.found(upstream, found);
        }
        self.failed = false;
    }

    /// Part of it failed: what was found counts as far as there is something.
    fn keep(&mut self, upstream: &Upstream, found: Vec<Found>) {
        if !found.is_empty() && self.found.as_ref() != Some(&found) {
            self.found(upstream, found);
        }
    }

    fn failed(&mut self, upstream: &Upstream, error: DiscoveryError) {
        if !self.failed {
            let kept = self.found.as_ref().map_or(0, Vec::len);
            tracing::warn!(upstream = &*upstream.name, %error, kept, "endpoints could not be looked up");
        }
        self.failed = true;
        upstream.discovery_failed(error);
    }

    fn found(&mut self, upstream: &Upstream, found: Vec<Found>) {
        tracing::debug!(upstream = &*upstream.name, endpoints = found.len(), "endpoints changed");
        upstream.publish(found.clone());
        self.found = Some(found);
    }
}
