//! A worker's view of the configuration: the snapshot, and the worker's own state for each upstream.

use std::{collections::HashMap, rc::Rc, sync::Arc};

use super::{Cluster, ProxyNames, Snapshot};
use crate::{config::HeaderCase, durations::DurationCell, upstream::local::LocalUpstream};

/// The snapshot, with this worker's pools and latencies for each cluster.
#[derive(Debug)]
pub struct View {
    pub snapshot: Arc<Snapshot>,
    /// In the order of the snapshot's clusters.
    pub clusters: Vec<Rc<WorkerCluster>>,
    /// Indices into `clusters`, sorted by name.
    names_in_order: Vec<usize>,
    pub inbound: Rc<WorkerCluster>,
    pub proxy_names: ProxyNames,
    /// Whether any upstream preserves the client's spelling of header names (`header_case`).
    pub preserves_case: bool,
}

/// An upstream with its current settings and this worker's state of it.
#[derive(Debug)]
pub struct WorkerCluster {
    pub cluster: Arc<Cluster>,
    pub upstream: Rc<LocalUpstream>,
    /// The same upstream, as records of requests refer to it.
    pub destination: Arc<Destination>,
}

/// An upstream as records of requests refer to it. Each worker has its own, so that workers do not contend for one
/// reference count on every request.
#[derive(Debug)]
pub struct Destination {
    pub cluster: Arc<Cluster>,
    /// This worker's duration histogram of the upstream.
    pub durations: Arc<DurationCell>,
}

impl WorkerCluster {
    /// Keeps the worker's state where `old` is the same upstream.
    pub fn new(
        cluster: &Arc<Cluster>,
        old: Option<&Rc<Self>>,
        durations: impl FnOnce() -> Arc<DurationCell>,
    ) -> Rc<Self> {
        let balance = &cluster.settings.balance;
        let (upstream, durations) = match old {
            Some(old) => {
                old.upstream.set_balance(balance);
                (Rc::clone(&old.upstream), Arc::clone(&old.destination.durations))
            }
            None => (LocalUpstream::new(Arc::clone(&cluster.upstream), balance), durations()),
        };
        let destination = Arc::new(Destination { cluster: Arc::clone(cluster), durations });
        Rc::new(Self { cluster: Arc::clone(cluster), upstream, destination })
    }

    fn name(&self) -> &str {
        &self.cluster.settings.name
    }
}

impl View {
    pub fn new(snapshot: Arc<Snapshot>, instance: &str, old: Option<&Self>) -> Rc<Self> {
        let known: HashMap<*const _, &Rc<WorkerCluster>> = old
            .into_iter()
            .flat_map(|old| old.clusters.iter().chain([&old.inbound]))
            .map(|local| (Arc::as_ptr(&local.upstream.shared), local))
            .collect();
        let local = |cluster: &Arc<Cluster>| {
            let upstream = &cluster.upstream;
            let old = known.get(&Arc::as_ptr(upstream)).copied();
            WorkerCluster::new(cluster, old, || upstream.policy_state.durations.cell())
        };
        let clusters: Vec<_> = snapshot.clusters.iter().map(local).collect();
        let mut names_in_order: Vec<_> = (0..clusters.len()).collect();
        names_in_order.sort_unstable_by_key(|index| clusters[*index].name());
        let inbound = local(&snapshot.inbound);
        let names = ProxyNames::new(&snapshot.config.service.name, instance);
        let preserve = |cluster: &Arc<Cluster>| cluster.settings.header_case == HeaderCase::Preserve;
        let preserves_case = snapshot.clusters.iter().any(preserve);
        Rc::new(Self { snapshot, clusters, names_in_order, inbound, proxy_names: names, preserves_case })
    }

    /// The index of an upstream of the configuration.
    pub fn by_name(&self, name: &str) -> Option<usize> {
        let order = &self.names_in_order;
        let at = order.binary_search_by(|index| self.clusters[*index].name().cmp(name)).ok()?;
        Some(order[at])
    }
}
