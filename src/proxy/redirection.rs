//! Connections that kernel rules redirected here (`outrigger redirect`): their original destination and its upstream.
//!
//! The client chose the address by dialling it. A redirected connection therefore goes there, whatever `deny_networks`
//! says, unless the request or the ClientHello names an upstream. Connections from the pod arrive at the loopback
//! address, those from outside at an address of this machine; others (a published node port, the address of a
//! Kubernetes Service) were redirected by rules of other software and do not count.

use std::{io, net::SocketAddr, rc::Rc, time::Duration};

use socket2::SockRef;
use tokio::{io::AsyncRead, net::TcpStream};

use super::{
    connection::{Connection, ConnectionError},
    detect::{DetectedProtocol, Detector},
};
use crate::{
    config::{HostMatch, TlsMode, UnknownHostPolicy},
    model::{Side, View, WorkerCluster},
    platform,
    proxy::worker::is_local_address,
    redirect::PROBE_PORT,
    telemetry::metrics::DetectionOutcome,
};

/// How long a client may be silent before its server is dialled. Short: a redirected client is on this machine, or its
/// first bytes have just crossed the network together with its connection.
pub const REDIRECTED_SILENCE: Duration = Duration::from_millis(10);

const DENIED: &str =
    "no upstream has the address or the server name (SNI), and `outbound.unknown` is \"deny\"";

/// The original destination of a redirected connection; `None` for one that was made to this proxy.
pub fn original_destination(stream: &TcpStream, side: &Side) -> Option<SocketAddr> {
    let local = canonical(stream.local_addr().ok()?);
    let original = match side {
        Side::Upstream(_) => return None,
        Side::Outbound if !local.ip().is_loopback() => return None,
        Side::Inbound | Side::Outbound => {
            platform::original_destination(&SockRef::from(stream), local).map(canonical)?
        }
    };
    let is_local = || original.ip() == local.ip() || is_local_address(original.ip());
    (original != local && (*side == Side::Outbound || is_local())).then_some(original)
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Whether this is the probe connection that shows that the rules are in force.
pub fn is_probe(original: SocketAddr) -> bool {
    original.ip().is_loopback() && original.port() == PROBE_PORT
}

/// The upstream of an address: the one that has it among its `hosts`, else among its endpoints.
pub fn by_address(view: &View, address: SocketAddr) -> Option<usize> {
    let ip = address.ip().to_string();
    let named = view.snapshot.router.upstream(&ip, Some(address.port())).filter(|index| {
        let hosts = &view.clusters[*index].cluster.settings.hosts;
        hosts.iter().any(|host| matches!(&host.host, HostMatch::Exact(name) if *name == ip))
    });
    let has = |local: &Rc<WorkerCluster>| {
        local.upstream.shared.endpoints().endpoints.iter().any(|endpoint| endpoint.address == address)
    };
    named.or_else(|| view.clusters.iter().position(has))
}

/// The destination of an outbound byte stream that was dialled to `original`; `None`: unknown ones are denied.
pub fn byte_stream_destination(
    connection: &Connection,
    view: &View,
    original: SocketAddr,
) -> Option<Rc<WorkerCluster>> {
    if let Some(index) = by_address(view, original) {
        return Some(Rc::clone(&view.clusters[index]));
    }
    let config = &view.snapshot.config;
    (config.outbound.unknown == UnknownHostPolicy::Forward)
        .then(|| connection.worker.unknown_address(original, config))
}

impl Connection {
    /// The original destination of an outbound connection.
    pub fn outbound_destination(&self) -> Option<SocketAddr> {
        self.original_destination.filter(|_| self.side == Side::Outbound)
    }

    /// Refuses a connection whose destination is this proxy.
    pub fn check_no_loop(&self) -> Result<(), ConnectionError> {
        match self.original_destination {
            Some(original) if self.worker.shared.own_addresses.contains(original) => {
                Err(ConnectionError::Cut("the original destination is a port of this proxy"))
            }
            _ => Ok(()),
        }
    }

    /// Counts what was detected on a redirected connection; logs once per port how to avoid the wait for a server.
    pub fn note_detected(&self, what: DetectionOutcome) {
        let Some(original) = self.original_destination else { return };
        let inbound = self.side == Side::Inbound;
        let first = self.worker.shared.metrics.detections.record(inbound, original.port(), what);
        if first && what == DetectionOutcome::ServerFirst {
            let port = original.port();
            let remedy = if inbound {
                "an `[[inbound.port]]` for it"
            } else {
                "an `[[upstream]]` with that address among its `endpoints`"
            };
            tracing::info!(
                port,
                "the server of port {port} sends first, so each connection waits to see whether the client does: `protocol = \"tcp\"` in {remedy} avoids the wait"
            );
        }
    }

    /// The same, for the protocol of the client's first bytes.
    pub fn note_protocol(&self, detected: DetectedProtocol) {
        self.note_detected(match detected {
            DetectedProtocol::Http1 => DetectionOutcome::Http1,
            DetectedProtocol::H2 => DetectionOutcome::Http2,
            DetectedProtocol::Tls => DetectionOutcome::Tls,
            DetectedProtocol::Other => DetectionOutcome::Bytes,
            DetectedProtocol::Nothing => return,
        });
    }

    /// Why a byte stream has no destination.
    pub fn no_destination_error(&self) -> ConnectionError {
        let Some(original) = self.outbound_destination() else {
            return ConnectionError::Cut(
                "bytes that are not HTTP came to the outbound port and name no destination: use CONNECT, or the upstream's own `listen`",
            );
        };
        // The log suppresses repetitions.
        tracing::warn!(%original, "outbound connection refused: {DENIED}");
        ConnectionError::Cut(DENIED)
    }

    /// The destination of TLS that the service itself speaks: the upstream of the server name, else `destination`.
    pub async fn destination_by_server_name<S: AsyncRead + Unpin>(
        &self,
        detector: &mut Detector,
        stream: &mut S,
        original: SocketAddr,
        destination: Option<&Rc<WorkerCluster>>,
    ) -> io::Result<Option<Rc<WorkerCluster>>> {
        let name = detector.server_name(stream).await?;
        let view = self.worker.view();
        let index = name.and_then(|name| view.snapshot.router.upstream(&name, Some(original.port())));
        Ok(index.map(|index| Rc::clone(&view.clusters[index])).or_else(|| destination.cloned()))
    }
}

/// Whether the upstream is a plain TLS server, not a sidecar. TLS that the service itself speaks then passes as it is;
/// between sidecars it is carried inside mutual TLS.
pub fn is_tls_server(to: &WorkerCluster) -> bool {
    to.cluster.settings.tls.mode == TlsMode::Simple
}
