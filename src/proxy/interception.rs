//! Checks that kernel rules redirect the pod's traffic to the proxy, where they should (`run --redirected`).
//!
//! The rules exempt the proxy's own connections, except those to one probe port on which no process listens: these are
//! redirected to the outbound port, where the proxy recognises them. Without rules no probe arrives, and the proxy is
//! not ready.

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

/// Timeout of a probe, which never leaves the machine.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// Interval between probes while they fail, and while they arrive.
const RETRY_INTERVAL: Duration = Duration::from_millis(250);
const INTERVAL: Duration = Duration::from_secs(10);

/// The result of the probes.
#[derive(Debug, Default)]
pub struct Interception {
    /// Redirection is expected (`--redirected`).
    expected: AtomicBool,
    /// The last probes arrived.
    works: AtomicBool,
    /// How many probes have arrived.
    arrived: watch::Sender<u64>,
}

impl Interception {
    /// Notes that a probe arrived at the outbound port.
    pub fn probe_arrived(&self) {
        self.arrived.send_modify(|count| *count += 1);
    }

    /// Why the proxy is not ready, where redirection is expected and does not work.
    pub fn not_ready(&self) -> Option<&'static str> {
        let missing = self.expected.load(Ordering::Relaxed) && !self.works.load(Ordering::Relaxed);
        missing.then_some(
            "traffic is not redirected to the proxy: no kernel rules; run `outrigger redirect apply` in this pod",
        )
    }

    async fn probe(&self, probe: SocketAddr) -> bool {
        let mut arrived = self.arrived.subscribe();
        arrived.mark_unchanged();
        let arriving = async {
            let _connection = TcpStream::connect(probe).await.ok()?;
            arrived.changed().await.ok()
        };
        timeout(PROBE_TIMEOUT, arriving).await.ok().flatten().is_some()
    }
}

/// Probes the families that the outbound port is bound to, for as long as the process lives.
pub fn start_probes(shared: Arc<Shared>, outbound: &[SocketAddr]) {
    shared.interception.expected.store(true, Ordering::Relaxed);
    let probes: Vec<SocketAddr> = outbound
        .iter()
        .map(|address| match address.ip() {
            // An unspecified IPv6 address accepts IPv4 too.
            ip if ip.is_unspecified() => IpAddr::from(Ipv4Addr::LOCALHOST),
            ip => ip,
        })
        .map(|ip| SocketAddr::new(ip, PROBE_PORT))
        .collect();
    tokio::spawn(async move {
        let interception = &shared.interception;
        let mut reported = None;
        loop {
            let mut missing = None;
            for probe in &probes {
                if !interception.probe(*probe).await {
                    missing = Some(*probe);
                    break;
                }
            }
            let works = missing.is_none() && !probes.is_empty();
            interception.works.store(works, Ordering::Relaxed);
            if reported != Some(works) {
                reported = Some(works);
                match missing {
                    None => tracing::info!("traffic is redirected to the proxy: a probe arrived"),
                    Some(probe) => {
                        tracing::warn!(%probe, "traffic is not redirected to the proxy: a probe did not arrive")
                    }
                }
            }
            sleep(if works { INTERVAL } else { RETRY_INTERVAL }).await;
        }
    });
}
