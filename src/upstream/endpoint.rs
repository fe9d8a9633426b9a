//! One address of an upstream, and the set of them at a time.

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

/// One address of an upstream, with what all workers share about it.
#[derive(Debug)]
pub struct Endpoint {
    pub address: SocketAddr,
    /// The name it was resolved from, where it was.
    pub host: Option<Arc<str>>,
    weight: AtomicU32,
    /// What active health checks say; true without them.
    healthy: AtomicBool,
    /// What requests saw of it.
    pub outcomes: RecentOutcomes,
}

/// Whether the balancer may choose an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndpointState {
    Healthy,
    /// By active health checks.
    Unhealthy,
    /// For what requests saw of it; restored at `until`.
    Ejected {
        until: Instant,
    },
    /// It accepts no connections, or its sidecar has no service behind it.
    Absent,
}

impl EndpointState {
    /// All its words.
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
    pub(super) fn new(found: Found) -> Self {
        Self {
            address: found.address,
            host: found.host,
            weight: AtomicU32::new(found.weight.max(1)),
            healthy: AtomicBool::new(true),
            outcomes: RecentOutcomes::default(),
        }
    }

    /// Its share of the traffic relative to the others, from 1. A new one comes with a new generation of the set.
    pub fn weight(&self) -> u32 {
        self.weight.load(Ordering::Relaxed)
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
    /// The next set: endpoints that stay are the same objects, so their state stays too. One found twice counts once.
    pub(super) fn updated(&self, found: Vec<Found>) -> Self {
        let old: HashMap<_, _> = self.endpoints.iter().map(|e| ((e.address, e.host.clone()), e)).collect();
        let mut seen = HashSet::with_capacity(found.len());
        let endpoints = found
            .into_iter()
            .filter(|found| seen.insert((found.address, found.host.clone())))
            .map(|found| match old.get(&(found.address, found.host.clone())) {
                Some(same) => {
                    same.weight.store(found.weight.max(1), Ordering::Relaxed);
                    Arc::clone(same)
                }
                None => Arc::new(Endpoint::new(found)),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn found(port: u16, weight: u32) -> Found {
        Found { address: SocketAddr::from(([127, 0, 0, 1], port)), host: Some("a".into()), weight }
    }

    #[test]
    fn what_stays_keeps_its_state() {
        let first = EndpointSet::default().updated(vec![found(1, 1), found(2, 1), found(3, 1)]);
        first.endpoints[0].set_healthy(false);
        first.endpoints[1].set_healthy(false);
        let second = first.updated(vec![found(4, 1), found(2, 5), found(1, 1)]);
        assert_eq!(second.generation, 2);
        assert!(Arc::ptr_eq(&second.endpoints[2], &first.endpoints[0]), "the same object");
        let reweighted = &second.endpoints[1];
        assert!(Arc::ptr_eq(reweighted, &first.endpoints[1]), "also with another weight");
        assert_eq!(reweighted.weight(), 5);
        assert!(second.endpoints[0].is_healthy(), "a new one is taken for well");
    }

    #[test]
    fn what_is_found_twice_counts_once() {
        let set = EndpointSet::default().updated(vec![found(1, 1), found(1, 1), found(2, 0)]);
        assert_eq!(
            set.endpoints.iter().map(|e| (e.address.port(), e.weight())).collect::<Vec<_>>(),
            [(1, 1), (2, 1)]
        );
    }
}
