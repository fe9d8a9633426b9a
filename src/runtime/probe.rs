//! Whether an upstream that took no connections takes them again.
//!
//! A breaker that opened because nobody listened need not wait out its time: a connection costs the upstream next to
//! nothing, and says at once that it is back. Trials then decide, as always.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use tokio::{net::TcpStream, time::timeout};

use crate::{
    resilience::breaker::{Mode, State},
    upstream::Upstream,
};

/// Endpoints of an upstream that are asked at a time.
const MOST: usize = 3;
const PATIENCE: Duration = Duration::from_millis(500);

/// Asks, where the breaker is open for that reason and nobody is asking already. Whether it did.
pub fn look(upstream: &Arc<Upstream>) -> bool {
    let guards = &upstream.guards;
    // Taken while one is under way; whoever finds nobody there gives it back.
    if !guards.unreachable.load(Ordering::Relaxed) || !guards.unreachable.swap(false, Ordering::Relaxed) {
        return false;
    }
    let report = guards.breaker.report_state();
    if report.mode != Mode::Auto || report.state != State::Open {
        return false;
    }
    let upstream = Arc::clone(upstream);
    tokio::spawn(async move {
        let addresses: Vec<_> =
            upstream.endpoints().endpoints.iter().map(|endpoint| endpoint.address).take(MOST).collect();
        for address in addresses {
            if matches!(timeout(PATIENCE, TcpStream::connect(address)).await, Ok(Ok(_))) {
                let transition = upstream.guards.breaker.reachable(Instant::now());
                upstream.guards.note(&upstream.name, transition);
                return;
            }
        }
        upstream.guards.unreachable.store(true, Ordering::Relaxed);
    });
    true
}
