//! Upgrades (WebSocket and others): after `101` the two connections are one tunnel.

use std::{rc::Rc, time::Duration};

use bytes::Bytes;
use tokio::{task::spawn_local, time::Instant};

use super::{
    body::Held,
    connection::{Connection, Upgrade},
    detect::RequestWatch,
    tunnel::relay,
};
use crate::{
    model::Side,
    net::io::Prefixed,
    upstream::{Lease, stream::UpstreamIo},
};

/// Joins the two sides once the caller's has changed protocol, too. `service` is its side, and what has come by it
/// already.
pub fn join(
    connection: &Rc<Connection>,
    mut callers: Upgrade,
    (service, unread): (UpstreamIo, Bytes),
    held: (Lease, Held),
    idle: Option<Duration>,
    over_at: Option<Instant>,
) {
    let connection = Rc::clone(connection);
    let inbound = connection.side == Side::Inbound;
    spawn_local(async move {
        let _held = held;
        let metrics = &connection.worker.shared.metrics;
        let _open = if inbound { metrics.inbound.opened() } else { metrics.outbound.opened() };
        let Some(caller) = callers.stream().await else {
            return tracing::debug!("an upgrade did not come about");
        };
        tokio::select! {
            ended = relay(caller, Prefixed::new(unread, service), RequestWatch::off(), idle, over_at) => {
                tracing::debug!(?ended, "upgraded connection ended");
            }
            () = callers.revoked(&connection) => {}
            () = connection.stream_distrusted() => {}
        }
    });
}
