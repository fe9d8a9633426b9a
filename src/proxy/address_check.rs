//! The addresses that a client must not reach by naming them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

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
    let ip = unmapped(address.ip());
    let denied = &snapshot.config.outbound.deny_networks;
    denied.iter().find(|network| network.contains(ip)).copied().map(Denial::Network)
}

/// The IPv4 address inside an IPv6 one: mapped (`::ffff:a.b.c.d`) or NAT64 (RFC 6052 `64:ff9b::/96`, RFC 8215).
fn unmapped(ip: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = ip else { return ip };
    let nat64 = |v6: Ipv6Addr| {
        let [a, b, c, d, e, f, high, low] = v6.segments();
        let well_known = [a, b, c, d, e, f] == [0x64, 0xff9b, 0, 0, 0, 0];
        let local_use = [a, b, c] == [0x64, 0xff9b, 1];
        (well_known || local_use).then(|| Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low)))
    };
    v6.to_ipv4_mapped().or_else(|| nat64(v6)).map_or(ip, IpAddr::V4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_addresses_are_recognised_in_every_notation() {
        for text in
            ["169.254.169.254", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "64:ff9b:1::a9fe:a9fe"]
        {
            let ip = unmapped(text.parse().unwrap());
            assert_eq!(ip, IpAddr::from([169, 254, 169, 254]), "{text}");
        }
        assert_eq!(unmapped("2001:db8::1".parse().unwrap()), "2001:db8::1".parse::<IpAddr>().unwrap());
    }
}
