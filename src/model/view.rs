//! The configuration as one worker sees it: beside each upstream what that worker knows of it.

use std::{collections::HashMap, rc::Rc, sync::Arc};

use super::{Cluster, Names, Snapshot};
use crate::{config::HeaderCase, durations::Cell, upstream::local::LocalUpstream};

/// The snapshot, with this worker's pools and latencies beside each cluster.
#[derive(Debug)]
pub struct View {
    pub snapshot: Arc<Snapshot>,
    /// In the order of the snapshot's.
    pub clusters: Vec<Rc<LocalCluster>>,
    /// Their indices, in the order of their names.
    names_in_order: Vec<usize>,
    pub inbound: Rc<LocalCluster>,
    pub names: Names,
    /// Whether any upstream wants field names as the caller spelled them.
    pub preserves_case: bool,
}

/// An upstream with its settings of now and what this worker knows of it.
#[derive(Debug)]
pub struct LocalCluster {
    pub cluster: Arc<Cluster>,
    pub upstream: Rc<LocalUpstream>,
    /// Who this is, for what is told of calls.
    pub whom: Arc<Whom>,
}

/// An upstream as the records of calls name it. Each worker has its own, so that no two count references to the same
/// at the same time, for every call.
#[derive(Debug)]
pub struct Whom {
    pub cluster: Arc<Cluster>,
    /// Where this worker counts how long its calls took.
    pub durations: Arc<Cell>,
}

impl LocalCluster {
    /// Keeps what the worker knows of the same upstream.
    pub fn new(
        cluster: &Arc<Cluster>,
        old: Option<&Rc<Self>>,
        durations: impl FnOnce() -> Arc<Cell>,
    ) -> Rc<Self> {
        let balance = &cluster.settings.balance;
        let (upstream, durations) = match old {
            Some(old) => {
                old.upstream.set_balance(balance);
                (Rc::clone(&old.upstream), Arc::clone(&old.whom.durations))
            }
            None => (LocalUpstream::new(Arc::clone(&cluster.upstream), balance), durations()),
        };
        let whom = Arc::new(Whom { cluster: Arc::clone(cluster), durations });
        Rc::new(Self { cluster: Arc::clone(cluster), upstream, whom })
    }

    fn name(&self) -> &str {
        &self.cluster.settings.name
    }
}

impl View {
    pub fn new(snapshot: Arc<Snapshot>, instance: &str, old: Option<&Self>) -> Rc<Self> {
        let known: HashMap<*const _, &Rc<LocalCluster>> = old
            .into_iter()
            .flat_map(|old| old.clusters.iter().chain([&old.inbound]))
            .map(|local| (Arc::as_ptr(&local.upstream.shared), local))
            .collect();
        let local = |cluster: &Arc<Cluster>| {
            let upstream = &cluster.upstream;
            let old = known.get(&Arc::as_ptr(upstream)).copied();
            LocalCluster::new(cluster, old, || upstream.guards.durations.cell())
        };
        let clusters: Vec<_> = snapshot.clusters.iter().map(local).collect();
        let mut names_in_order: Vec<_> = (0..clusters.len()).collect();
        names_in_order.sort_unstable_by_key(|index| clusters[*index].name());
        let inbound = local(&snapshot.inbound);
        let names = Names::new(&snapshot.config.service.name, instance);
        let preserve = |cluster: &Arc<Cluster>| cluster.settings.header_case == HeaderCase::Preserve;
        let preserves_case = snapshot.clusters.iter().any(preserve);
        Rc::new(Self { snapshot, clusters, names_in_order, inbound, names, preserves_case })
    }

    /// The index of an upstream of the configuration.
    pub fn by_name(&self, name: &str) -> Option<usize> {
        let order = &self.names_in_order;
        let at = order.binary_search_by(|index| self.clusters[*index].name().cmp(name)).ok()?;
        Some(order[at])
    }
}
