//! Upstreams: their endpoints, load balancing, and the connections to them.

pub mod balance;
mod body;
pub mod connect;
mod discovery_error;
mod endpoint;
pub mod eviction;
pub mod health;
pub mod http1;
pub mod http2;
mod idle_connections;
mod idle_timeout;
pub mod local;
#[cfg(test)]
mod outage_tests;
pub mod outcomes;
pub mod policy_state;
pub mod pool;
pub mod reachability;
pub mod stream;

pub use body::{BodyError, RequestBody};
pub use discovery_error::DiscoveryError;
pub use endpoint::{DiscoveredEndpoint, Endpoint, EndpointSet, EndpointState, Resolution};
pub use pool::Lease;

use std::{net::SocketAddr, sync::Arc, time::Instant};

use arc_swap::{ArcSwap, Guard};
use tokio::sync::{Notify, watch};

use policy_state::PolicyState;

/// The state of an upstream that all workers share and that outlives a reload of its settings.
#[derive(Debug)]
pub struct Upstream {
    pub name: Arc<str>,
    endpoints: ArcSwap<EndpointSet>,
    generation: watch::Sender<u64>,
    refresh: Notify,
    pub policy_state: Arc<PolicyState>,
}

impl Upstream {
    pub fn new(name: impl Into<Arc<str>>) -> Arc<Self> {
        Arc::new(Self {
            name: name.into(),
            endpoints: ArcSwap::from_pointee(EndpointSet::default()),
            generation: watch::Sender::new(0),
            refresh: Notify::new(),
            policy_state: PolicyState::new(Instant::now()),
        })
    }

    /// The current endpoints. Cheap enough for every request.
    pub fn endpoints(&self) -> Guard<Arc<EndpointSet>> {
        self.endpoints.load()
    }

    /// The state of an endpoint by active health checks and by outlier detection.
    pub fn state_of(&self, endpoint: &Endpoint, now: Instant) -> EndpointState {
        if !endpoint.is_healthy() {
            return EndpointState::Unhealthy;
        }
        if self.policy_state.outliers.is_absent(&endpoint.address, now) {
            return EndpointState::Absent;
        }
        let health = self.policy_state.outliers.endpoint(&endpoint.address);
        let until = health.and_then(|health| health.ejected_until(now));
        until.map_or(EndpointState::Healthy, |until| EndpointState::Ejected { until })
    }

    /// Publishes the result of a discovery. An endpoint that was there before keeps its state; workers drain a
    /// removed one when they see the new generation.
    pub fn publish(&self, endpoints: Vec<DiscoveredEndpoint>) {
        let next = self.endpoints.load().with_endpoints(endpoints);
        let addresses: Vec<SocketAddr> = next.endpoints.iter().map(|endpoint| endpoint.address).collect();
        self.policy_state.outliers.update(&addresses, Instant::now());
        self.replace(next);
    }

    /// Records that discovery failed. The previous endpoints stay in use; requests report the error only if there are
    /// none.
    pub fn record_discovery_failure(&self, error: DiscoveryError) {
        let next = self.endpoints.load().with_failure(error);
        self.replace(next);
    }

    fn replace(&self, next: EndpointSet) {
        let generation = next.generation;
        self.endpoints.store(Arc::new(next));
        self.generation.send_replace(generation);
    }

    /// Waits for the first result of discovery, success or failure.
    pub async fn wait_until_resolved(&self) {
        let mut changes = self.generation.subscribe();
        // `self` holds the sender, so this ends only by the condition.
        let _ = changes.wait_for(|generation| *generation > 0).await;
    }

    /// Asks discovery for a refresh, e.g. because no endpoint accepts connections: their addresses may have changed
    /// before the TTL expires. Cheap; however often it is called, the source is queried at most once a second.
    pub fn refresh(&self) {
        self.refresh.notify_one();
    }

    pub(crate) async fn refresh_requested(&self) {
        self.refresh.notified().await;
    }

    /// Subscribes to new generations of the endpoint set.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }
}
