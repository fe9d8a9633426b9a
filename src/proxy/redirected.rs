//! Connections that the kernel led here (`outrigger redirect`): where they were going, and whom that is.
//!
//! Whoever dialled an address chose it: so redirected connections go there, `deny_networks` or not, unless the request, or
//! the TLS greeting, names an upstream. From the pod by the loopback address, from outside by an address of this machine:
//! what was led here by rules of others (a port of the node that is published, a service's address) is not taken for it.

use std::{io, net::SocketAddr, rc::Rc, time::Duration};

use socket2::SockRef;
use tokio::{io::AsyncRead, net::TcpStream};

use super::{
    connection::{Connection, ConnectionError},
    detect::{Detector, Spoken},
};
use crate::{
    config::{HostMatch, TlsMode, Unknown},
    model::{LocalCluster, Side, View},
    proxy::worker::is_of_this_machine,
    redirect::PROBE_PORT,
    telemetry::metrics::Detected,
};

/// How long a caller may be silent before its server is asked: what is led here comes from this machine, or has just come
/// over the network together with its first bytes.
pub const SILENCE: Duration = Duration::from_millis(10);

const DENIED: &str =
    "no upstream has the address, or the name in the TLS greeting, and `outbound.unknown` is \"deny\"";

/// Where a connection was going before it was led here; none where it came by itself.
pub fn destination(stream: &TcpStream, side: &Side) -> Option<SocketAddr> {
    let local = canonical(stream.local_addr().ok()?);
    let original = match side {
        Side::Upstream(_) => return None,
        Side::Outbound if !local.ip().is_loopback() => return None,
        Side::Inbound | Side::Outbound => original(stream, local)?,
    };
    let here = || original.ip() == local.ip() || is_of_this_machine(original.ip());
    (original != local && (*side == Side::Outbound || here())).then_some(original)
}

#[cfg(target_os = "linux")]
fn original(stream: &TcpStream, local: SocketAddr) -> Option<SocketAddr> {
    let socket = SockRef::from(stream);
    let original = if local.is_ipv4() { socket.original_dst_v4() } else { socket.original_dst_v6() };
    original.ok()?.as_socket().map(canonical)
}

#[cfg(not(target_os = "linux"))]
fn original(_: &TcpStream, _: SocketAddr) -> Option<SocketAddr> {
    None
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Whether this is the connection by which the rules show that they work.
pub fn is_probe(original: SocketAddr) -> bool {
    original.ip().is_loopback() && original.port() == PROBE_PORT
}

/// The upstream that an address belongs to: one that names it, else one that has it among its endpoints.
pub fn by_address(view: &View, address: SocketAddr) -> Option<usize> {
    let ip = address.ip().to_string();
    let named = view.snapshot.router.upstream(&ip, Some(address.port())).filter(|index| {
        let hosts = &view.clusters[*index].cluster.settings.hosts;
        hosts.iter().any(|host| matches!(&host.host, HostMatch::Exact(name) if *name == ip))
    });
    let has = |local: &Rc<LocalCluster>| {
        local.upstream.shared.endpoints().endpoints.iter().any(|endpoint| endpoint.address == address)
    };
    named.or_else(|| view.clusters.iter().position(has))
}

/// Whom bytes of the service go to that were going to `original`; nobody where only upstreams may be called.
pub fn behind(connection: &Connection, view: &View, original: SocketAddr) -> Option<Rc<LocalCluster>> {
    if let Some(index) = by_address(view, original) {
        return Some(Rc::clone(&view.clusters[index]));
    }
    let config = &view.snapshot.config;
    (config.outbound.unknown == Unknown::Forward).then(|| connection.worker.address(original, config))
}

impl Connection {
    /// Where the service's own connection was going.
    pub fn outward(&self) -> Option<SocketAddr> {
        self.redirected_to.filter(|_| self.side == Side::Outbound)
    }

    /// A connection that would come back to us is not begun.
    pub fn check_no_loop(&self) -> Result<(), ConnectionError> {
        match self.redirected_to {
            Some(original) if self.worker.shared.own.contains(original) => {
                Err(ConnectionError::Cut("it was redirected from a port of this proxy itself"))
            }
            _ => Ok(()),
        }
    }

    /// Notes what a redirected connection speaks, and says once for each port what would spare the guessing.
    pub fn note_detected(&self, what: Detected) {
        let Some(original) = self.redirected_to else { return };
        let inbound = self.side == Side::Inbound;
        let first = self.worker.shared.metrics.detections.note(inbound, original.port(), what);
        if first && what == Detected::ServerFirst {
            let port = original.port();
            let remedy = if inbound {
                "an [[inbound.port]] of that port"
            } else {
                "an upstream that has that address among its `endpoints`"
            };
            tracing::info!(
                port,
                "connections to port {port} wait for their server to speak first: `protocol = \"tcp\"` in {remedy} spares them the moment in which the caller might"
            );
        }
    }

    /// The same, told by what the caller said first.
    pub fn note_spoken(&self, spoken: Spoken) {
        self.note_detected(match spoken {
            Spoken::Http1 => Detected::Http1,
            Spoken::H2 => Detected::Http2,
            Spoken::Tls => Detected::Tls,
            Spoken::Other => Detected::Bytes,
            Spoken::Nothing => return,
        });
    }

    /// Bytes for nobody.
    pub fn nowhere(&self) -> ConnectionError {
        let Some(original) = self.outward() else {
            return ConnectionError::Cut(
                "the outbound port was sent bytes that are not HTTP: they name nobody to carry them to; use CONNECT, or an upstream's own `listen`",
            );
        };
        // Repetitions are held back by the log.
        tracing::warn!(%original, "a connection of the service's was refused: {DENIED}");
        ConnectionError::Cut(DENIED)
    }

    /// Whom TLS of the service's own goes to: the upstream that its greeting names, else `behind`.
    pub async fn by_server_name<S: AsyncRead + Unpin>(
        &self,
        detector: &mut Detector,
        stream: &mut S,
        original: SocketAddr,
        behind: Option<&Rc<LocalCluster>>,
    ) -> io::Result<Option<Rc<LocalCluster>>> {
        let name = detector.server_name(stream).await?;
        let view = self.worker.view();
        let index = name.and_then(|name| view.snapshot.router.upstream(&name, Some(original.port())));
        Ok(index.map(|index| Rc::clone(&view.clusters[index])).or_else(|| behind.cloned()))
    }
}

/// Whether the upstream's TLS is a server's, not a sidecar's: then a service that speaks TLS by itself does just that.
/// Between sidecars it goes inside of theirs.
pub fn is_simple(to: &LocalCluster) -> bool {
    to.cluster.settings.tls.mode == TlsMode::Simple
}
