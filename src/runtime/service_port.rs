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

use crate::proxy::worker::Shared;

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
        let (began, mut schedule) = (Instant::now(), Schedule::default());
        loop {
            // A reload may move it.
            let address = shared.snapshot.load().config.inbound.forward_to.clone();
            let connect = TcpStream::connect((address.host.as_str(), address.port));
            if timeout(LOOK, connect).await.is_ok_and(|connected| connected.is_ok()) {
                self.accepts.store(true, Ordering::Relaxed);
                tracing::info!(service = %address, after = ?began.elapsed(), "the service accepts connections");
                return;
            }
            let Next { warn, pause } = schedule.next(began.elapsed());
            if warn {
                tracing::warn!(
                    service = %address,
                    "nothing accepts connections there after {}s: inbound requests get 502 `connect_refused`. If the \
                     service listens elsewhere, name its port by --app or [inbound] forward_to",
                    PATIENCE.as_secs()
                );
            }
            sleep(pause).await;
        }
    }
}

/// What follows a look that found nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Next {
    /// Whether to warn, which is once.
    warn: bool,
    /// Until the next look.
    pause: Duration,
}

/// When to look again, and when to warn.
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
    /// After a look in vain that ended so long after the first began.
    fn next(&mut self, elapsed: Duration) -> Next {
        let warn = !self.warned && elapsed >= PATIENCE;
        self.warned |= warn;
        let pause = if self.warned { LATE_PAUSE } else { self.pause };
        self.pause = (self.pause * 2).min(PAUSE);
        Next { warn, pause }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// When it looks, and when it warns, within the first minutes, at a port where each look takes so long.
    fn looks(each_takes: Duration) -> (Vec<Duration>, Vec<Duration>) {
        let (mut now, mut schedule) = (Duration::ZERO, Schedule::default());
        let (mut looks, mut warnings) = (Vec::new(), Vec::new());
        while now < Duration::from_secs(300) {
            looks.push(now);
            now += each_takes;
            let next = schedule.next(now);
            if next.warn {
                warnings.push(now);
            }
            now += next.pause;
        }
        (looks, warnings)
    }

    #[test]
    fn a_service_that_never_listens_is_warned_of_once() {
        for each_takes in [Duration::ZERO, LOOK] {
            let (_, warnings) = looks(each_takes);
            let [once] = warnings[..] else { panic!("{warnings:?}") };
            assert!((PATIENCE..PATIENCE + each_takes + PAUSE).contains(&once), "{once:?}");
        }
    }

    #[test]
    fn a_service_is_found_soon_after_it_listens() {
        let (looks, _) = looks(Duration::ZERO);
        assert_eq!(looks[..3], [Duration::ZERO, FIRST_PAUSE, FIRST_PAUSE * 3]);
        for pair in looks.windows(2) {
            let most = if pair[0] < PATIENCE { PAUSE } else { LATE_PAUSE };
            assert!(pair[1] - pair[0] <= most, "{pair:?}");
        }
        assert!(looks.len() < 300, "and not asked all the time: {}", looks.len());
    }
}
