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

/// Relays bytes between the two sides once the client's stream is available. `service`: the upstream's stream, and the
/// bytes that were already read from it.
pub fn join(
    connection: &Rc<Connection>,
    mut client_upgrade: Upgrade,
    (service, unread): (UpstreamIo, Bytes),
    held: (Lease, RequestResources),
    idle: Option<Duration>,
    over_at: Option<Instant>,
) {
    let connection = Rc::clone(connection);
    let inbound = connection.side == Side::Inbound;
    spawn_local(async move {
        let _held = held;
        let metrics = &connection.worker.shared.metrics;
        let _open = if inbound { metrics.inbound.count_open() } else { metrics.outbound.count_open() };
        let Some(client) = client_upgrade.stream().await else {
            return tracing::debug!("the client's connection ended before the upgrade");
        };
        tokio::select! {
            end = relay(client, Prefixed::new(unread, service), RequestWatch::off(), idle, over_at) => {
                tracing::debug!(?end, "upgraded connection ended");
            }
            () = client_upgrade.wait_until_disallowed(&connection) => {}
            () = connection.wait_until_revoked() => {}
        }
    });
}
