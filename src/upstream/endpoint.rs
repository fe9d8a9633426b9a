//! One address of an upstream, and the set of them at a time.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::discovery::DiscoveryError;

/// One address of an upstream, with what all workers share about it.
#[derive(Debug)]
pub struct Endpoint {
    pub address: SocketAddr,
    /// The name it was resolved from, where it was.
    pub host: Option<Arc<str>>,
    /// Its share of the traffic relative to the others, from 1.
    pub weight: u32,
    /// What active health checks say; true without them.
    healthy: AtomicBool,
}

/// An address as discovery found it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    pub address: SocketAddr,
    pub host: Option<Arc<str>>,
    pub weight: u32,
}

/// The endpoints of an upstream at a time. Replaced as a whole, never changed.
#[derive(Debug, Default)]
pub struct EndpointSet {
    /// Grows with every change; 0 = discovery has not answered yet.
    pub generation: u64,
    pub endpoints: Vec<Arc<Endpoint>>,
    pub resolution: Resolution,
}

/// How the last look-up went.
#[derive(Debug, Default)]
pub enum Resolution {
    #[default]
    Pending,
    Ready,
    /// What was found before stays in use.
    Failed(Arc<DiscoveryError>),
}

impl Endpoint {
    fn new(found: Found) -> Self {
        Self {
            address: found.address,
            host: found.host,
            weight: found.weight.max(1),
            healthy: AtomicBool::new(true),
        }
    }

    pub fn is_healthy(&self) -> bool {
        self.healthy.load(Ordering::Relaxed)
    }

    /// Says what active health checks found; true where this changed something.
    pub fn set_healthy(&self, healthy: bool) -> bool {
        self.healthy.swap(healthy, Ordering::Relaxed) != healthy
    }
}

impl EndpointSet {
    /// The next set: endpoints that stay are the same objects, so their state stays too.
    pub(super) fn updated(&self, found: Vec<Found>) -> Self {
        let endpoints = found
            .into_iter()
            .map(|found| {
                let same = |e: &&Arc<Endpoint>| {
                    e.address == found.address && e.host == found.host && e.weight == found.weight.max(1)
                };
                self.endpoints.iter().find(same).cloned().unwrap_or_else(|| Arc::new(Endpoint::new(found)))
            })
            .collect();
        Self { generation: self.generation + 1, endpoints, resolution: Resolution::Ready }
    }

    pub(super) fn failed(&self, error: DiscoveryError) -> Self {
        Self {
            generation: self.generation + 1,
            endpoints: self.endpoints.clone(),
            resolution: Resolution::Failed(Arc::new(error)),
        }
    }
}
