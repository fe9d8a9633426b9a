//! Whether the service listens where it is said to: looked at from the start until it first does.
//!
//! Only where the sidecar knows that a service belongs to it, by `run -- CMD` or `--app`. Readiness never waits for it;
//! `outrigger status --wait` does.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    net::TcpStream,
    time::{Instant, sleep, timeout},
};

use super::Shared;

/// How long after the last look it is looked again: at first, and then.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const PAUSE: Duration = Duration::from_millis(250);
/// The same once it has been warned that nothing listens.
const LATE_PAUSE: Duration = Duration::from_secs(2);
/// An address on this machine answers at once.
const LOOK: Duration = Duration::from_secs(1);
/// A service that does not listen by then probably listens elsewhere.
const PATIENCE: Duration = Duration::from_secs(30);

/// What is known of the service's port.
#[derive(Debug, Default)]
pub struct ServicePort {
    watched: AtomicBool,
    accepts: AtomicBool,
}

impl ServicePort {
    /// Whether the service has accepted a connection; `None` where nothing is known of a service.
    pub fn accepts(&self) -> Option<bool> {
        self.watched.load(Ordering::Relaxed).then(|| self.accepts.load(Ordering::Relaxed))
    }

    /// Begins to look. Needs a tokio runtime.
    pub fn watch(self: &Arc<Self>, shared: &Arc<Shared>) {
        self.watched.store(true, Ordering::Relaxed);
        tokio::spawn(Arc::clone(self).look(Arc::clone(shared)));
    }

    /// Looks until the service accepts a connection, and warns where it takes long.
    async fn look(self: Arc<Self>, shared: Arc<Shared>) {
        let (began, mut pause, mut warned) = (Instant::now(), FIRST_PAUSE, false);
        loop {
            // A reload may move it.
            let address = shared.snapshot.load().config.inbound.forward_to.clone();
            let connect = TcpStream::connect((address.host.as_str(), address.port));
            if timeout(LOOK, connect).await.is_ok_and(|connected| connected.is_ok()) {
                self.accepts.store(true, Ordering::Relaxed);
                tracing::info!(service = %address, after = ?began.elapsed(), "the service accepts connections");
                return;
            }
            if !warned && began.elapsed() >= PATIENCE {
                warned = true;
                tracing::warn!(
                    service = %address,
                    "nothing accepts connections there after {}s: inbound requests get 502 `connect_refused`. If the \
                     service listens elsewhere, name its port by --app or [inbound] forward_to",
                    PATIENCE.as_secs()
                );
            }
            sleep(pause).await;
            pause = if warned { LATE_PAUSE } else { (pause * 2).min(PAUSE) };
        }
    }
}
