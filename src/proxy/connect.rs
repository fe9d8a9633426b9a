//! Connections to upstreams for byte streams (CONNECT, ports that are not HTTP), and the choice of an endpoint.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    rc::Rc,
    time::{Duration, Instant},
};

use http::{Request, Response};
use tokio::{task::spawn_local, time::timeout};

use super::{
    attempt::connect_ending,
    body::{ClientBody, ResponseBody},
    clock::WaitLimit,
    connection::Connection,
    error::ProxyError,
    target::{self, RouteTarget},
};
use crate::{
    cause::Cause,
    config::Network,
    dns::DnsError,
    identity::handshake::FailureKind,
    model::{Cluster, LocalCluster, Snapshot, View},
    net::alpn::ApplicationProtocol,
    proxy::worker::{Shared, Worker},
    resilience::{
        classify::{AttemptOutcome, Health},
        outlier::{EndpointChange, EndpointOutcome},
    },
    upstream::{
        DiscoveryError, EndpointSet, Resolution,
        connect::{ConnectError, TcpTimeouts, TlsTarget, connect},
        eviction,
        guards::ConnectionSlot,
        local::{InFlight, LocalEndpoint, PickCriteria, Probe},
        reachability,
        stream::UpstreamIo,
    },
};

/// The most endpoints that are dialled before the client gets an error.
const MAX_DIALS: usize = 3;
/// How long a request waits for the first result of discovery.
const DISCOVERY_TIMEOUT: Duration = Duration::from_secs(5);

/// The resources that a connection for a byte stream holds.
#[derive(Debug)]
pub struct ByteStreamGuard {
    _in_flight: InFlight,
    slot: ConnectionSlot,
}

impl ByteStreamGuard {
    /// Waits until a request needs the connection slot and no idle connection can be closed for it.
    pub async fn wait_until_reclaimed(&self) {
        loop {
            let wanted = eviction::requested();
            if self.slot.claim_eviction() {
                return;
            }
            wanted.await;
        }
    }
}

/// Why there is no connection for a byte stream.
enum DialError {
    Failed(ProxyError),
    /// The peer is a sidecar that accepts no byte streams for its service.
    HttpOnly(ProxyError),
}

impl From<ProxyError> for DialError {
    fn from(error: ProxyError) -> Self {
        Self::Failed(error)
    }
}

impl From<DialError> for ProxyError {
    fn from(error: DialError) -> Self {
        match error {
            DialError::Failed(error) | DialError::HttpOnly(error) => error,
        }
    }
}

/// Opens a connection to an upstream for a byte stream.
pub async fn dial(
    connection: &Connection,
    to: &LocalCluster,
) -> Result<(UpstreamIo, ByteStreamGuard), ProxyError> {
    Ok(dial_allowed(connection, to, to.cluster.tls_target(None), |_| Ok(())).await?)
}

/// Opens one without TLS, for a service that speaks TLS itself.
pub async fn dial_without_tls(
    connection: &Connection,
    to: &LocalCluster,
) -> Result<(UpstreamIo, ByteStreamGuard), ProxyError> {
    Ok(dial_allowed(connection, to, None, |_| Ok(())).await?)
}

async fn dial_allowed(
    connection: &Connection,
    to: &LocalCluster,
    tls: Option<TlsTarget>,
    allowed: impl Fn(SocketAddr) -> Result<(), ProxyError>,
) -> Result<(UpstreamIo, ByteStreamGuard), DialError> {
    let mut endpoints = endpoints(&connection.worker, to, WaitLimit::default()).await?;
    if let Some(dialled) = connection.outbound_destination() {
        // A client that dialled one of several endpoints meant that one.
        endpoints = endpoint_at(dialled, &endpoints).unwrap_or(endpoints);
    }
    let settings = &to.cluster.settings;
    let limits = TcpTimeouts {
        connect: settings.policy.connect_timeout.limit(),
        user_timeout: settings.user_timeout(ApplicationProtocol::Opaque),
    };
    let slot = ConnectionSlot::acquire(&to.upstream.shared.guards)
        .await
        .map_err(|error| connect_error(&to.cluster.settings.name, &error))?;
    let mut tried = Vec::new();
    loop {
        let wanted = PickCriteria { tried: &tried, hash: None, probe: Some(Probe::Repeatable) };
        let endpoint = pick(&connection.worker, to, &endpoints, &wanted)?;
        allowed(endpoints[endpoint].address())?;
        let began = Instant::now();
        let connected =
            connect(endpoints[endpoint].address(), limits, tls.as_ref(), ApplicationProtocol::ByteStream)
                .await;
        report_dial(connection, to, &endpoints[endpoint], connected.as_ref().err(), began);
        match connected {
            Ok(connected) => {
                let slot = slot.mark_open(connected.protection());
                let dialled = ByteStreamGuard { _in_flight: endpoints[endpoint].count_in_flight(), slot };
                return Ok((connected.io, dialled));
            }
            Err(error) if is_http_only(&error) => {
                return Err(DialError::HttpOnly(connect_error(&to.cluster.settings.name, &error)));
            }
            Err(error) => {
                tried.push(endpoint);
                if tried.len() >= MAX_DIALS.min(endpoints.len()) {
                    to.upstream.shared.refresh();
                    return Err(connect_error(&to.cluster.settings.name, &error).into());
                }
            }
        }
    }
}

fn is_http_only(error: &ConnectError) -> bool {
    matches!(error, ConnectError::Tls { failure, .. } if failure.kind == FailureKind::NoProtocol)
}

/// Reports to outlier detection whether an endpoint accepts connections: nothing else is known of a byte stream.
fn report_dial(
    connection: &Connection,
    to: &LocalCluster,
    endpoint: &LocalEndpoint,
    error: Option<&ConnectError>,
    began: Instant,
) {
    let evidence = match error.map(connect_ending) {
        None => EndpointOutcome::Success,
        Some(ending) => EndpointOutcome::new(&AttemptOutcome::new(ending), Health::Failure, false),
    };
    if evidence.makes_absent() || (evidence == EndpointOutcome::Success && endpoint.is_absent()) {
        let upstream = &to.upstream.shared;
        let change = endpoint.report(upstream, evidence, (began, Instant::now()), || 0.0);
        if let Some(EndpointChange::Absent | EndpointChange::StillAbsent) = change {
            reachability::watch_absent_endpoints(upstream, &connection.worker.shared.control_runtime);
        }
    }
}

/// The endpoint with this address, as a set of one.
pub fn endpoint_at(address: SocketAddr, endpoints: &[Rc<LocalEndpoint>]) -> Option<Rc<[Rc<LocalEndpoint>]>> {
    let one = endpoints.iter().find(|endpoint| endpoint.address() == address)?;
    Some(Rc::new([Rc::clone(one)]))
}

/// The endpoints of an upstream. Waits for the first result of discovery, no longer than the request may.
pub async fn endpoints(
    worker: &Worker,
    to: &LocalCluster,
    until: WaitLimit,
) -> Result<Rc<[Rc<LocalEndpoint>]>, ProxyError> {
    let shared = &to.upstream.shared;
    if shared.endpoints().generation == 0 {
        let name = &to.cluster.settings.name;
        let resolved = Box::pin(until.wait(timeout(DISCOVERY_TIMEOUT, shared.wait_until_resolved()))).await;
        resolved.map_err(|expired| expired.unsent(name, "the first result of discovery"))?.map_err(|_| {
            ProxyError::new(
                Cause::DnsTimeout,
                format!("{name}: the first result of discovery is still pending"),
            )
        })?;
    }
    let endpoints = worker.with_rng(|rng| to.upstream.endpoints(rng));
    if endpoints.is_empty() {
        shared.refresh();
        return Err(no_endpoints_error(&to.cluster.settings.name, &shared.endpoints()));
    }
    Ok(endpoints)
}

/// Picks the endpoint of the next attempt; returns its index.
pub fn pick(
    worker: &Worker,
    to: &LocalCluster,
    endpoints: &[Rc<LocalEndpoint>],
    wanted: &PickCriteria<'_>,
) -> Result<usize, ProxyError> {
    let now = Instant::now();
    worker.with_rng(|rng| to.upstream.pick(endpoints, wanted, now, rng)).ok_or_else(|| {
        let unhealthy = endpoints.iter().filter(|endpoint| !endpoint.shared.is_healthy()).count();
        let detail = format!(
            "{}: none of its {} endpoints can be used ({unhealthy} failed their health checks)",
            to.cluster.settings.name,
            endpoints.len()
        );
        ProxyError::new(Cause::NoEndpoint, detail).retry_after(Duration::from_secs(1))
    })
}

fn no_endpoints_error(name: &str, set: &EndpointSet) -> ProxyError {
    match &set.resolution {
        Resolution::Failed(error) => {
            let cause = match **error {
                DiscoveryError::Dns(DnsError::Timeout { .. }) => Cause::DnsTimeout,
                DiscoveryError::Dns(DnsError::NotFound { .. } | DnsError::Server { .. }) => Cause::DnsFailure,
                DiscoveryError::Dns(DnsError::LocalResource { .. }) => Cause::LocalResource,
                _ => Cause::NoEndpoint,
            };
            let failure = ProxyError::new(cause, format!("{name}: {error}"));
            if cause == Cause::LocalResource { failure.retry_after(Duration::from_secs(1)) } else { failure }
        }
        _ => ProxyError::new(Cause::NoEndpoint, format!("{name} has no endpoints"))
            .retry_after(Duration::from_secs(1)),
    }
}

pub fn connect_error(name: &str, error: &ConnectError) -> ProxyError {
    let cause = match error {
        ConnectError::Refused { .. } => Cause::ConnectRefused,
        ConnectError::Timeout { .. } => Cause::ConnectTimeout,
        ConnectError::LocalResource { .. } => {
            return ProxyError::new(Cause::LocalResource, format!("{name}: {error}"))
                .retry_after(Duration::from_secs(1));
        }
        ConnectError::Handshake { .. } => Cause::Reset,
        ConnectError::Tls { failure, .. } if failure.kind.is_about_identity() => Cause::PeerIdentity,
        ConnectError::Tls { .. } => Cause::TlsFailure,
        ConnectError::ConnectionLimit { .. } | ConnectError::StreamLimit { .. } => {
            return ProxyError::new(Cause::LimitFull, format!("{name}: {error}"))
                .retry_after(Duration::from_secs(1));
        }
    };
    ProxyError::new(cause, format!("{name}: {error}"))
}

/// Refuses addresses that a client must not reach by naming them: this proxy itself, and `deny_networks`.
pub fn check_address(
    view: &View,
    worker: &Worker,
    target: &RouteTarget,
    address: SocketAddr,
) -> Result<(), ProxyError> {
    if !target.chosen_by_client {
        return Ok(());
    }
    let cluster = &target.local.cluster;
    let name = &cluster.settings.name;
    denial(&worker.shared, &view.snapshot, cluster, address).map_or(Ok(()), |denial| {
        let reason = match denial {
            Denial::Own => {
                "a port of this proxy itself; use it as `http_proxy`, or send the `Host` of an upstream"
                    .to_owned()
            }
            Denial::Network(network) => format!("in {network}, which `outbound.deny_networks` names"),
        };
        Err(ProxyError::new(Cause::DeniedNetwork, format!("{name} is {address}: {reason}")))
    })
}

/// Whether a client may reach an address of this upstream by naming it.
pub fn may_be_reached(shared: &Shared, snapshot: &Snapshot, cluster: &Cluster, address: SocketAddr) -> bool {
    denial(shared, snapshot, cluster, address).is_none()
}

enum Denial {
    Own,
    Network(Network),
}

fn denial(shared: &Shared, snapshot: &Snapshot, cluster: &Cluster, address: SocketAddr) -> Option<Denial> {
    if shared.own_addresses.contains(address) {
        return Some(Denial::Own);
    }
    if !cluster.is_resolved {
        return None;
    }
    let ip = unmapped(address.ip());
    let denied = &snapshot.config.outbound.deny_networks;
    denied.iter().find(|network| network.contains(ip)).copied().map(Denial::Network)
}

/// The IPv4 address inside an IPv6 one: mapped (`::ffff:a.b.c.d`) or NAT64 (RFC 6052 `64:ff9b::/96`, RFC 8215).
fn unmapped(ip: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = ip else { return ip };
    let nat64 = |v6: Ipv6Addr| {
        let [a, b, c, d, e, f, high, low] = v6.segments();
        let well_known = [a, b, c, d, e, f] == [0x64, 0xff9b, 0, 0, 0, 0];
        let local_use = [a, b, c] == [0x64, 0xff9b, 1];
        (well_known || local_use).then(|| Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low)))
    };
    v6.to_ipv4_mapped().or_else(|| nat64(v6)).map_or(ip, IpAddr::V4)
}

/// Handles CONNECT. Dials first, so that a failure can still be reported in the response.
pub async fn open_tunnel(
    connection: &Rc<Connection>,
    view: &View,
    request: &mut Request<ClientBody>,
) -> Result<Response<ResponseBody>, ProxyError> {
    let authority =
        request.uri().authority().ok_or_else(|| ProxyError::malformed("CONNECT names no host"))?;
    let to = target::host_port(authority, request.method())?;
    let target = target::by_host(connection, view, &to, request)?;
    // The server must have the identity that the client named, unless the configuration names another one.
    let tls = target.local.cluster.tls_target(Some(authority.as_str()));
    let allowed = |address| check_address(view, &connection.worker, &target, address);
    let dialled = match dial_allowed(connection, &target.local, tls, allowed).await {
        Ok(dialled) => Some(dialled),
        // The tunnel may still carry requests.
        Err(DialError::HttpOnly(error)) => {
            tracing::debug!(%error, "the CONNECT tunnel accepts requests only");
            None
        }
        Err(DialError::Failed(error)) => return Err(error),
    };
    let mut upgrade = connection.upgrade(request);
    let inside = connection.inner_for_tunnel(to);
    spawn_local(async move {
        let _open = inside.worker.shared.metrics.outbound.count_open();
        let Some(stream) = upgrade.stream().await else { return };
        let ended = inside.serve_tunnel(stream, dialled, &target.local).await;
        if let Err(error) = ended {
            tracing::debug!(upstream = target.local.cluster.settings.name, %error, "tunnel ended");
        }
    });
    Ok(Response::new(ResponseBody::Empty))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_addresses_are_recognised_in_every_notation() {
        for text in
            ["169.254.169.254", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "64:ff9b:1::a9fe:a9fe"]
        {
            let ip = unmapped(text.parse().unwrap());
            assert_eq!(ip, IpAddr::from([169, 254, 169, 254]), "{text}");
        }
        assert_eq!(unmapped("2001:db8::1".parse().unwrap()), "2001:db8::1".parse::<IpAddr>().unwrap());
    }
}
