//! An endpoint of an upstream, and the current set of endpoints.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Instant,
};

use super::outcomes::RecentOutcomes;
use crate::upstream::DiscoveryError;

/// One address of an upstream, with the state that all workers share.
#[derive(Debug)]
pub struct Endpoint {
    pub address: SocketAddr,
    /// The name it was resolved from, if any.
    pub host: Option<Arc<str>>,
    weight: AtomicU32,
    /// The result of active health checks; true without them.
    healthy: AtomicBool,
    /// Outcomes of recent requests.
    pub outcomes: RecentOutcomes,
}

/// Whether the balancer may choose an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndpointState {
    Healthy,
    /// By active health checks.
    Unhealthy,
    /// By outlier detection; restored at `until`.
    Ejected {
        until: Instant,
    },
    /// It accepts no connections, or its sidecar has no service behind it.
    Absent,
}

impl EndpointState {
    /// All values of [`Self::word`].
    pub const WORDS: [&str; 4] = ["healthy", "unhealthy", "ejected", "absent"];

    pub const fn word(self) -> &'static str {
        match self {
            Self::Healthy => Self::WORDS[0],
            Self::Unhealthy => Self::WORDS[1],
            Self::Ejected { .. } => Self::WORDS[2],
            Self::Absent => Self::WORDS[3],
        }
    }
}

/// An endpoint as discovery returned it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiscoveredEndpoint {
    pub address: SocketAddr,
    pub host: Option<Arc<str>>,
    pub weight: u32,
}

/// The endpoints of an upstream at one time. Immutable; replaced as a whole.
#[derive(Debug, Default)]
pub struct EndpointSet {
    /// Increases with every change; 0 = discovery has not completed yet.
    pub generation: u64,
    pub endpoints: Vec<Arc<Endpoint>>,
    pub resolution: Resolution,
}

/// The result of the last lookup.
#[derive(Debug, Default)]
pub enum Resolution {
    #[default]
    Pending,
    Ready,
    /// The endpoints discovered before stay in use.
    Failed(Arc<DiscoveryError>),
}

impl Endpoint {
    pub(super) fn new(discovered: DiscoveredEndpoint) -> Self {
        Self {
            address: discovered.address,
            host: discovered.host,
            weight: AtomicU32::new(discovered.weight.max(1)),
            healthy: AtomicBool::new(true),
            outcomes: RecentOutcomes::default(),
        }
    }

    /// Its share of the traffic relative to the others, from 1. A changed weight comes with a new generation of the
    /// set.
    pub fn weight(&self) -> u32 {
        self.weight.load(Ordering::Relaxed)
    }

    pub fn is_healthy(&self) -> bool {
        self.healthy.load(Ordering::Relaxed)
    }

    /// Records the result of active health checks; returns whether it changed.
    pub fn set_healthy(&self, healthy: bool) -> bool {
        self.healthy.swap(healthy, Ordering::Relaxed) != healthy
    }
}

impl EndpointSet {
    /// The next set. Endpoints that stay keep their object, and so their state. Duplicates are dropped.
    pub(super) fn with_endpoints(&self, discovered: Vec<DiscoveredEndpoint>) -> Self {
        let old: HashMap<_, _> = self.endpoints.iter().map(|e| ((e.address, e.host.clone()), e)).collect();
        let mut seen = HashSet::with_capacity(discovered.len());
        let endpoints = discovered
            .into_iter()
            .filter(|discovered| seen.insert((discovered.address, discovered.host.clone())))
            .map(|discovered| match old.get(&(discovered.address, discovered.host.clone())) {
                Some(same) => {
                    same.weight.store(discovered.weight.max(1), Ordering::Relaxed);
                    Arc::clone(same)
                }
                None => Arc::new(Endpoint::new(discovered)),
            })
            .collect();
        Self { generation: self.generation + 1, endpoints, resolution: Resolution::Ready }
    }

    pub(super) fn with_failure(&self, error: DiscoveryError) -> Self {
        Self {
            generation: self.generation + 1,
            endpoints: self.endpoints.clone(),
            resolution: Resolution::Failed(Arc::new(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn discovered(port: u16, weight: u32) -> DiscoveredEndpoint {
        DiscoveredEndpoint {
            address: SocketAddr::from(([127, 0, 0, 1], port)),
            host: Some("a".into()),
            weight,
        }
    }

    #[test]
    fn remaining_endpoints_keep_their_state() {
        let first =
            EndpointSet::default().with_endpoints(vec![discovered(1, 1), discovered(2, 1), discovered(3, 1)]);
        first.endpoints[0].set_healthy(false);
        first.endpoints[1].set_healthy(false);
        let second = first.with_endpoints(vec![discovered(4, 1), discovered(2, 5), discovered(1, 1)]);
        assert_eq!(second.generation, 2);
        assert!(Arc::ptr_eq(&second.endpoints[2], &first.endpoints[0]), "the same object");
        let reweighted = &second.endpoints[1];
        assert!(Arc::ptr_eq(reweighted, &first.endpoints[1]), "also with another weight");
        assert_eq!(reweighted.weight(), 5);
        assert!(second.endpoints[0].is_healthy(), "a new endpoint starts healthy");
    }

    #[test]
    fn duplicate_endpoints_are_dropped() {
        let set =
            EndpointSet::default().with_endpoints(vec![discovered(1, 1), discovered(1, 1), discovered(2, 0)]);
        assert_eq!(
            set.endpoints.iter().map(|e| (e.address.port(), e.weight())).collect::<Vec<_>>(),
            [(1, 1), (2, 1)]
        );
    }
}
