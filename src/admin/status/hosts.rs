//! Destinations that no upstream of the configuration names.

use std::{sync::Arc, time::Instant};

use serde::{Deserialize, Serialize};

use crate::{
    admin::upstreams::UpstreamStatus,
    model::{Cluster, Snapshot},
    proxy::{address_check::may_be_reached, worker::Shared},
    upstream::Resolution,
};

/// Most unknown hosts, and most addresses of the service, shown in full.
const SHOWN_HOSTS: usize = 50;
/// Most unresolvable names: enough to see a misspelt one, too few to fill a screen with names that clients make up.
const SHOWN_NOT_FOUND: usize = 5;

/// Addresses of the service that redirected requests recently went to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ServiceAddressesStatus {
    /// How many are known now.
    pub known: usize,
    /// The most recently used.
    pub addresses: Vec<UpstreamStatus>,
}

impl ServiceAddressesStatus {
    pub(super) fn of(shared: &Shared, now: Instant) -> Self {
        let known = shared.inbound_addresses.read().0;
        let statuses = known.iter().take(SHOWN_HOSTS).map(|cluster| UpstreamStatus::of(cluster, now));
        Self { known: known.len(), addresses: statuses.collect() }
    }
}

/// Hosts that no upstream names, seen since startup.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UnknownHostsStatus {
    /// How many are known now.
    pub known: usize,
    /// The most recently used.
    pub hosts: Vec<UpstreamStatus>,
    /// Requested names that do not resolve.
    #[serde(default)]
    pub not_found: UnresolvedNames,
}

impl UnknownHostsStatus {
    /// Separates hosts that requests can have reached from names that do not resolve.
    pub(super) fn of(shared: &Shared, snapshot: &Snapshot, now: Instant) -> Self {
        let reached = |cluster: &Arc<Cluster>| {
            let set = cluster.upstream.endpoints();
            set.endpoints.iter().any(|endpoint| may_be_reached(shared, snapshot, cluster, endpoint.address))
        };
        let (known, unresolved): (Vec<_>, Vec<_>) =
            shared.unknown_hosts.read().0.into_iter().partition(reached);
        let statuses = known.iter().take(SHOWN_HOSTS).map(|cluster| UpstreamStatus::of(cluster, now));
        Self { known: known.len(), hosts: statuses.collect(), not_found: UnresolvedNames::of(&unresolved) }
    }
}

/// Names without an address, requested in the last five minutes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnresolvedNames {
    /// How many there are.
    pub count: usize,
    /// The errors of the most recently requested ones.
    pub last: Vec<String>,
}

impl UnresolvedNames {
    fn of(clusters: &[Arc<Cluster>]) -> Self {
        let resolution_error = |cluster: &Arc<Cluster>| {
            let set = cluster.upstream.endpoints();
            match &set.resolution {
                Resolution::Failed(error) if set.endpoints.is_empty() => Some(error.to_string()),
                _ => None,
            }
        };
        let mut errors = clusters.iter().filter_map(resolution_error);
        let last: Vec<_> = errors.by_ref().take(SHOWN_NOT_FOUND).collect();
        Self { count: last.len() + errors.count(), last }
    }
}
