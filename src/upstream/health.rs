//! Active health checks: check every endpoint of an upstream at an interval.
//!
//! One task per upstream on the control thread. It follows the endpoint set: a new endpoint is checked at once (and
//! counts as healthy until it fails `unhealthy_after` checks in a row), a removed one is dropped.

mod check;
#[cfg(test)]
mod tests;

pub use check::{CheckError, CheckStream, check_grpc_health as ask_grpc, run_on_connection};

use std::{
    collections::{BTreeSet, HashMap},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use tokio::{
    runtime::Handle,
    sync::watch,
    task::{JoinHandle, JoinSet},
    time::Instant,
};

use super::{Endpoint, Upstream, connect::TlsTarget};
use crate::{
    config::{HealthCheck, Protocol},
    rng::Rng,
};

/// The most concurrent checks of one upstream.
const CONCURRENT: usize = 32;
/// Intervals vary by this share, so that the checks of a fleet do not synchronize.
const JITTER: f64 = 0.1;
/// The shortest interval, whatever is configured.
const MIN_INTERVAL: Duration = Duration::from_millis(10);

/// What to check, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct CheckSettings {
    pub health: HealthCheck,
    /// The upstream's: with [`Protocol::H2`], HTTP checks use HTTP/2 with prior knowledge.
    pub protocol: Protocol,
    pub tls: Option<TlsTarget>,
}

/// Counts consecutive results and decides when an endpoint becomes healthy or unhealthy.
#[derive(Clone, Copy, Debug)]
pub struct Threshold {
    healthy: bool,
    /// Consecutive results that contradict `healthy`.
    contrary: u32,
}

/// Keeps checking the endpoints of an upstream until it is dropped. Then all of them count as healthy again, because
/// nothing would detect their recovery.
#[derive(Debug)]
pub struct HealthChecks {
    settings: watch::Sender<CheckSettings>,
    task: JoinHandle<()>,
    upstream: Arc<Upstream>,
}

impl Threshold {
    pub const fn new(healthy: bool) -> Self {
        Self { healthy, contrary: 0 }
    }

    pub const fn is_healthy(&self) -> bool {
        self.healthy
    }

    /// Records the result of a check; `true` if the state of the endpoint has changed.
    pub fn record(&mut self, passed: bool, settings: &HealthCheck) -> bool {
        if passed == self.healthy {
            self.contrary = 0;
            return false;
        }
        self.contrary = self.contrary.saturating_add(1);
        let needed = if self.healthy { settings.unhealthy_after } else { settings.healthy_after };
        if self.contrary < needed {
            return false;
        }
        *self = Self::new(passed);
        true
    }
}

impl HealthChecks {
    /// Applies new settings and keeps the state of the endpoints.
    pub fn reconfigure(&self, new: CheckSettings) {
        self.settings.send_if_modified(|old| {
            let changed = *old != new;
            *old = new;
            changed
        });
    }
}

impl Drop for HealthChecks {
    fn drop(&mut self) {
        self.task.abort();
        for endpoint in &self.upstream.endpoints().endpoints {
            endpoint.set_healthy(true);
        }
    }
}

/// Starts checking the endpoints of `upstream` on `runtime`, that of the control thread.
pub fn spawn(settings: CheckSettings, upstream: Arc<Upstream>, runtime: &Handle) -> HealthChecks {
    let (settings, receiver) = watch::channel(settings);
    let checker = Checker {
        settings: receiver,
        upstream: upstream.clone(),
        rng: Rng::new(),
        endpoints: HashMap::new(),
        queue: BTreeSet::new(),
        running: JoinSet::new(),
    };
    HealthChecks { settings, task: runtime.spawn(checker.run()), upstream }
}

struct Checker {
    settings: watch::Receiver<CheckSettings>,
    upstream: Arc<Upstream>,
    rng: Rng,
    endpoints: HashMap<EndpointKey, CheckedEndpoint>,
    /// The most overdue first. An entry is valid only while it equals the `due` of its endpoint.
    queue: BTreeSet<(Instant, EndpointKey)>,
    running: JoinSet<(EndpointKey, Result<(), CheckError>)>,
}

type EndpointKey = (SocketAddr, Option<Arc<str>>);

struct CheckedEndpoint {
    endpoint: Arc<Endpoint>,
    threshold: Threshold,
    due: Instant,
}

impl Checker {
    async fn run(mut self) {
        let mut changes = self.upstream.subscribe();
        self.sync_endpoints();
        loop {
            self.start_due();
            let next = self.queue.first().map(|(at, _)| *at);
            let has_capacity = self.running.len() < CONCURRENT;
            tokio::select! {
                Some(done) = self.running.join_next() => {
                    if let Ok((key, result)) = done {
                        self.record_result(&key, result);
                    }
                }
                () = sleep_until(next), if has_capacity => {}
                // The senders live in `self.upstream` and in the handle, whose drop ends this task as well.
                Ok(()) = changes.changed() => self.sync_endpoints(),
                Ok(()) = self.settings.changed() => self.schedule_all(),
            }
        }
    }

    /// Synchronizes with the endpoint set.
    fn sync_endpoints(&mut self) {
        let now = Instant::now();
        let mut old = std::mem::take(&mut self.endpoints);
        for endpoint in &self.upstream.endpoints().endpoints {
            let key = (endpoint.address, endpoint.host.clone());
            let checked = old.remove(&key).unwrap_or_else(|| {
                self.queue.insert((now, key.clone()));
                let threshold = Threshold::new(endpoint.is_healthy());
                CheckedEndpoint { endpoint: endpoint.clone(), threshold, due: now }
            });
            self.endpoints.insert(key, CheckedEndpoint { endpoint: endpoint.clone(), ..checked });
        }
    }

    fn schedule_all(&mut self) {
        let now = Instant::now();
        self.queue.clear();
        for (key, checked) in &mut self.endpoints {
            checked.due = now;
            self.queue.insert((now, key.clone()));
        }
    }

    fn start_due(&mut self) {
        let now = Instant::now();
        while self.running.len() < CONCURRENT
            && self.queue.first().is_some_and(|(at, _)| *at <= now)
            && let Some((at, key)) = self.queue.pop_first()
        {
            let Some(checked) = self.endpoints.get_mut(&key).filter(|checked| checked.due == at) else {
                continue;
            };
            let settings = self.settings.borrow_and_update().clone();
            // If the check ends without a result, it is repeated at this time.
            checked.due = now + *settings.health.timeout + settings.health.interval.0.max(MIN_INTERVAL);
            self.queue.insert((checked.due, key.clone()));
            let check = check::run(settings, checked.endpoint.clone());
            self.running.spawn(async move { (key, check.await) });
        }
    }

    fn record_result(&mut self, key: &EndpointKey, result: Result<(), CheckError>) {
        let settings = &self.settings.borrow().health;
        // The endpoint may have been removed meanwhile.
        let Some(checked) = self.endpoints.get_mut(key) else { return };
        let interval = settings.interval.0.max(MIN_INTERVAL);
        self.queue.remove(&(checked.due, key.clone()));
        checked.due = Instant::now() + self.rng.jitter(interval, JITTER);
        self.queue.insert((checked.due, key.clone()));
        if let Err(error) = &result
            && error.is_local_resource()
        {
            let (upstream, endpoint) = (&*self.upstream.name, checked.endpoint.address);
            tracing::warn!(upstream, %endpoint, %error, cause = "local_resource", "health check not made");
            return;
        }
        let changed = checked.threshold.record(result.is_ok(), settings);
        // Set every time: checks that these replaced may have set another state when they ended.
        checked.endpoint.set_healthy(checked.threshold.is_healthy());
        if !changed {
            return;
        }
        let (upstream, endpoint) = (&*self.upstream.name, checked.endpoint.address);
        match result {
            Ok(()) => tracing::info!(upstream, %endpoint, "endpoint is healthy again"),
            Err(why) => tracing::warn!(upstream, %endpoint, %why, "endpoint is unhealthy"),
        }
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
