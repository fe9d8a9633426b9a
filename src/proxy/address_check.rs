//! The addresses that a client must not reach by naming them.

use std::net::SocketAddr;

use super::{error::ProxyError, target::RouteTarget};
use crate::{
    cause::Cause,
    config::Network,
    model::{Cluster, Snapshot, View},
    proxy::worker::{Shared, Worker},
};

/// Refuses addresses that a client must not reach by naming them: this proxy itself, and `deny_networks`.
pub fn check_address(
    view: &View,
    worker: &Worker,
    target: &RouteTarget,
    address: SocketAddr,
) -> Result<(), ProxyError> {
    if !target.chosen_by_client {
        return Ok(());
    }
    let cluster = &target.serving.cluster;
    let name = &cluster.settings.name;
    denial(&worker.shared, &view.snapshot, cluster, address).map_or(Ok(()), |denial| {
        let reason = match denial {
            Denial::Own => {
                "a port of this proxy itself; use it as `http_proxy`, or send the `Host` of an upstream"
                    .to_owned()
            }
            Denial::Network(network) => format!("in {network}, which `outbound.deny_networks` names"),
        };
        Err(ProxyError::new(Cause::DeniedNetwork, format!("{name} is {address}: {reason}")))
    })
}

/// Whether a client may reach an address of this upstream by naming it.
pub fn may_be_reached(shared: &Shared, snapshot: &Snapshot, cluster: &Cluster, address: SocketAddr) -> bool {
    denial(shared, snapshot, cluster, address).is_none()
}

enum Denial {
    Own,
    Network(Network),
}

fn denial(shared: &Shared, snapshot: &Snapshot, cluster: &Cluster, address: SocketAddr) -> Option<Denial> {
    if shared.own_addresses.contains(address) {
        return Some(Denial::Own);
    }
    if !cluster.is_resolved {
        return None;
    }
    let denied = &snapshot.config.outbound.deny_networks;
    Network::find(denied, address.ip()).map(Denial::Network)
}
