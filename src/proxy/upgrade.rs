//! Upgrades (WebSocket and others): after `101` the two connections are one tunnel.

use std::{rc::Rc, time::Duration};

use http::Response;
use hyper::{body::Incoming, upgrade::OnUpgrade};
use hyper_util::rt::TokioIo;
use tokio::{task::spawn_local, time::Instant};

use super::{accept::Side, body::Held, connection::Connection, tunnel::relay};
use crate::upstream::Lease;

/// Joins the two sides once both have changed protocol.
pub fn join(
    connection: &Rc<Connection>,
    callers: OnUpgrade,
    response: &mut Response<Incoming>,
    held: (Lease, Held),
    idle: Option<Duration>,
    over_at: Option<Instant>,
) {
    let services = hyper::upgrade::on(response);
    let worker = Rc::clone(&connection.worker);
    let inbound = connection.side == Side::Inbound;
    spawn_local(async move {
        let _held = held;
        let metrics = &worker.shared.metrics;
        let _open = if inbound { metrics.inbound.opened() } else { metrics.outbound.opened() };
        match tokio::try_join!(callers, services) {
            Ok((caller, service)) => {
                let ended = relay(TokioIo::new(caller), TokioIo::new(service), idle, over_at).await;
                tracing::debug!(?ended, "upgraded connection ended");
            }
            Err(error) => tracing::debug!(%error, "an upgrade did not come about"),
        }
    });
}
