//! Whether the kernel leads the pod's traffic here, where it should (`run --redirected`).
//!
//! The proxy's own connections are not led anywhere, but for those to one port on which nobody listens: the rules lead
//! them to the outbound port, where they are noticed. No rules, no arrival, not ready.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    net::TcpStream,
    sync::watch,
    time::{sleep, timeout},
};

use super::worker::Shared;
use crate::redirect::PROBE_PORT;

/// How long a probe, which never leaves the machine, may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two probes while nothing arrives, and while all is well.
const SOON: Duration = Duration::from_millis(250);
const LATER: Duration = Duration::from_secs(10);

/// What is known of it.
#[derive(Debug, Default)]
pub struct Interception {
    /// Traffic is to be led here.
    wanted: AtomicBool,
    seen: AtomicBool,
    /// How many probes have arrived.
    arrived: watch::Sender<u64>,
}

impl Interception {
    /// A probe has arrived at the outbound port.
    pub fn probe_arrived(&self) {
        self.arrived.send_modify(|count| *count += 1);
    }

    /// Why the proxy is not ready.
    pub fn not_ready(&self) -> Option<&'static str> {
        let missing = self.wanted.load(Ordering::Relaxed) && !self.seen.load(Ordering::Relaxed);
        missing.then_some(
            "traffic does not pass through here: the kernel has no rules for it; run `outrigger redirect apply` in this pod",
        )
    }

    async fn probe(&self, probe: SocketAddr) -> bool {
        let mut arrived = self.arrived.subscribe();
        arrived.mark_unchanged();
        let arriving = async {
            let _connection = TcpStream::connect(probe).await.ok()?;
            arrived.changed().await.ok()
        };
        timeout(PATIENCE, arriving).await.ok().flatten().is_some()
    }
}

/// Probes the families that the outbound port is bound to, for as long as the process lives.
pub fn watch_over(shared: Arc<Shared>, outbound: &[SocketAddr]) {
    shared.interception.wanted.store(true, Ordering::Relaxed);
    let probes: Vec<SocketAddr> = outbound
        .iter()
        .map(|address| match address.ip() {
            // Which takes IPv4 too.
            ip if ip.is_unspecified() => IpAddr::from(Ipv4Addr::LOCALHOST),
            ip => ip,
        })
        .map(|ip| SocketAddr::new(ip, PROBE_PORT))
        .collect();
    tokio::spawn(async move {
        let interception = &shared.interception;
        let mut told = None;
        loop {
            let mut missing = None;
            for probe in &probes {
                if !interception.probe(*probe).await {
                    missing = Some(*probe);
                    break;
                }
            }
            let seen = missing.is_none() && !probes.is_empty();
            interception.seen.store(seen, Ordering::Relaxed);
            if told != Some(seen) {
                told = Some(seen);
                match missing {
                    None => tracing::info!("traffic passes through here: a probe has arrived"),
                    Some(probe) => {
                        tracing::warn!(%probe, "traffic does not pass through here: a probe did not arrive")
                    }
                }
            }
            sleep(if seen { LATER } else { SOON }).await;
        }
    });
}
