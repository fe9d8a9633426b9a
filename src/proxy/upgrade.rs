//! Upgrades (WebSocket and others): after `101` the two connections are one tunnel.

use std::{rc::Rc, time::Duration};

use bytes::Bytes;
use tokio::{task::spawn_local, time::Instant};

use super::{
    body::RequestResources,
    connection::{Connection, Upgrade},
    detect::RequestWatch,
    tunnel::relay,
};
use crate::{
    model::Side,
    net::io::Prefixed,
    upstream::{Lease, stream::UpstreamIo},
};

/// The upstream's side of an upgraded connection, and what it holds until its end.
pub struct UpgradedUpstream {
    pub io: UpstreamIo,
    /// Bytes that were already read from `io`.
    pub unread: Bytes,
    pub lease: Lease,
    pub resources: RequestResources,
}

/// Relays bytes between the two sides once the client's stream is available, until `ends_at` at the latest.
pub fn join(
    connection: &Rc<Connection>,
    mut client_upgrade: Upgrade,
    upstream: UpgradedUpstream,
    idle: Option<Duration>,
    ends_at: Option<Instant>,
) {
    let connection = Rc::clone(connection);
    let inbound = connection.side == Side::Inbound;
    spawn_local(async move {
        let UpgradedUpstream { io, unread, lease: _lease, resources: _resources } = upstream;
        let metrics = &connection.worker.shared.metrics;
        let _open = if inbound { metrics.inbound.count_open() } else { metrics.outbound.count_open() };
        let Some(client) = client_upgrade.stream().await else {
            return tracing::debug!("the client's connection ended before the upgrade");
        };
        tokio::select! {
            end = relay(client, Prefixed::new(unread, io), RequestWatch::off(), idle, ends_at) => {
                tracing::debug!(?end, "upgraded connection ended");
            }
            () = client_upgrade.wait_until_disallowed(&connection) => {}
            () = connection.wait_until_revoked() => {}
        }
    });
}
