//! Checks whether the service accepts connections on its configured port, from the start until it first does.
//!
//! Only where the sidecar knows that there is a service, by `run -- CMD` or `--app`. Readiness does not wait for the
//! service; `outrigger status --wait` does.

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

use crate::proxy::worker::Shared;

/// The interval between checks: at first, and later.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const PAUSE: Duration = Duration::from_millis(250);
/// The interval after the warning that nothing listens.
const LATE_PAUSE: Duration = Duration::from_secs(2);
/// Timeout of one check; an address on this machine responds at once.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// When to warn: a service that does not listen by then probably listens elsewhere.
const WARN_AFTER: Duration = Duration::from_secs(30);

/// Whether the service's port accepts connections.
#[derive(Debug, Default)]
pub struct ServicePort {
    watched: AtomicBool,
    accepts: AtomicBool,
}

impl ServicePort {
    /// Whether the service has accepted a connection; `None` where the port is not watched.
    pub fn accepts(&self) -> Option<bool> {
        self.watched.load(Ordering::Relaxed).then(|| self.accepts.load(Ordering::Relaxed))
    }

    /// Starts the checks. Needs a tokio runtime.
    pub fn watch(self: &Arc<Self>, shared: &Arc<Shared>) {
        self.watched.store(true, Ordering::Relaxed);
        tokio::spawn(Arc::clone(self).poll(Arc::clone(shared)));
    }

    /// Checks until the service accepts a connection, and warns once after [`WARN_AFTER`].
    async fn poll(self: Arc<Self>, shared: Arc<Shared>) {
        let (began, mut schedule) = (Instant::now(), Schedule::default());
        loop {
            // A reload may change it.
            let address = shared.snapshot.load().config.inbound.forward_to.clone();
            let connect = TcpStream::connect((address.host.as_str(), address.port));
            if timeout(CONNECT_TIMEOUT, connect).await.is_ok_and(|connected| connected.is_ok()) {
                self.accepts.store(true, Ordering::Relaxed);
                tracing::info!(service = %address, after = ?began.elapsed(), "the service accepts connections");
                return;
            }
            let Next { warn, pause } = schedule.next(began.elapsed());
            if warn {
                tracing::warn!(
                    service = %address,
                    "the service does not accept connections after {}s: inbound requests get 502 `connect_refused`. If \
                     it listens on another port, set --app or [inbound] forward_to",
                    WARN_AFTER.as_secs()
                );
            }
            sleep(pause).await;
        }
    }
}

/// What follows a failed check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Next {
    /// Whether to warn; true once.
    warn: bool,
    /// Time until the next check.
    pause: Duration,
}

/// When to check again, and when to warn.
#[derive(Debug)]
struct Schedule {
    pause: Duration,
    warned: bool,
}

impl Default for Schedule {
    fn default() -> Self {
        Self { pause: FIRST_PAUSE, warned: false }
    }
}

impl Schedule {
    /// After a failed check; `elapsed` is the time since the first one.
    fn next(&mut self, elapsed: Duration) -> Next {
        let warn = !self.warned && elapsed >= WARN_AFTER;
        self.warned |= warn;
        let pause = if self.warned { LATE_PAUSE } else { self.pause };
        self.pause = (self.pause * 2).min(PAUSE);
        Next { warn, pause }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The times of checks and of warnings within five minutes, where each check takes `each_takes`.
    fn checks(each_takes: Duration) -> (Vec<Duration>, Vec<Duration>) {
        let (mut now, mut schedule) = (Duration::ZERO, Schedule::default());
        let (mut checks, mut warnings) = (Vec::new(), Vec::new());
        while now < Duration::from_secs(300) {
            checks.push(now);
            now += each_takes;
            let next = schedule.next(now);
            if next.warn {
                warnings.push(now);
            }
            now += next.pause;
        }
        (checks, warnings)
    }

    #[test]
    fn a_service_that_never_listens_causes_one_warning() {
        for each_takes in [Duration::ZERO, CONNECT_TIMEOUT] {
            let (_, warnings) = checks(each_takes);
            let [once] = warnings[..] else { panic!("{warnings:?}") };
            assert!((WARN_AFTER..WARN_AFTER + each_takes + PAUSE).contains(&once), "{once:?}");
        }
    }

    #[test]
    fn a_service_is_noticed_soon_after_it_listens() {
        let (checks, _) = checks(Duration::ZERO);
        assert_eq!(checks[..3], [Duration::ZERO, FIRST_PAUSE, FIRST_PAUSE * 3]);
        for pair in checks.windows(2) {
            let most = if pair[0] < WARN_AFTER { PAUSE } else { LATE_PAUSE };
            assert!(pair[1] - pair[0] <= most, "{pair:?}");
        }
        assert!(checks.len() < 300, "not too often: {}", checks.len());
    }
}
