//! Upgrades (WebSocket and others): after `101` the two connections are one tunnel.

use std::{rc::Rc, time::Duration};

use tokio::{task::spawn_local, time::Instant};

use super::{
    accept::Side,
    body::Held,
    connection::{Connection, Upgrade},
    io::Prefixed,
    tunnel::relay,
};
use crate::upstream::Lease;

/// Joins the two sides once the caller's has changed protocol, too.
pub fn join(
    connection: &Rc<Connection>,
    callers: Upgrade,
    (mut lease, held): (Lease, Held),
    idle: Option<Duration>,
    over_at: Option<Instant>,
) {
    let Some((service, unread)) = lease.take_stream() else { return };
    let worker = Rc::clone(&connection.worker);
    let inbound = connection.side == Side::Inbound;
    spawn_local(async move {
        let _held = (lease, held);
        let metrics = &worker.shared.metrics;
        let _open = if inbound { metrics.inbound.opened() } else { metrics.outbound.opened() };
        let Some(caller) = callers.stream().await else {
            return tracing::debug!("an upgrade did not come about");
        };
        let ended = relay(caller, Prefixed::new(unread, service), idle, over_at).await;
        tracing::debug!(?ended, "upgraded connection ended");
    });
}
