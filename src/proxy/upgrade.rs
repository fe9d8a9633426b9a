//! Upgrades (WebSocket and others): after `101` the two connections are one tunnel.

use std::{rc::Rc, time::Duration};

use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::{task::spawn_local, time::Instant};

use super::{accept::Side, body::Held, connection::Connection, io::Prefixed, tunnel::relay};
use crate::upstream::Lease;

/// Joins the two sides once the caller's has changed protocol, too.
pub fn join(
    connection: &Rc<Connection>,
    callers: OnUpgrade,
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
        match callers.await {
            Ok(caller) => {
                let service = Prefixed::new(unread, service);
                let ended = relay(TokioIo::new(caller), service, idle, over_at).await;
                tracing::debug!(?ended, "upgraded connection ended");
            }
            Err(error) => tracing::debug!(%error, "an upgrade did not come about"),
        }
    });
}
