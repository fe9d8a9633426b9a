//! Connections that carry bytes rather than calls: CONNECT, and ports that are not HTTP.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    rc::Rc,
    time::{Duration, Instant},
};

use http::{Request, Response};
use tokio::{task::spawn_local, time::timeout};

use super::{
    attempt::connect_ending,
    body::{CallerBody, ResponseBody},
    clock::WaitLimit,
    connection::Connection,
    error::{Cause, ProxyError},
    target::{self, Target},
};
use crate::{
    config::Network,
    discovery::DiscoveryError,
    identity::handshake::{FailureKind, Speaks},
    resilience::{
        classify::{Health, Outcome},
        outlier::{Change, Evidence},
    },
    runtime::{Cluster, LocalCluster, Shared, Snapshot, View, Worker},
    upstream::{
        EndpointSet, Resolution, comeback,
        connect::{ConnectError, TcpLimits, TlsTarget, connect},
        guards::ConnectionSlot,
        local::{InFlight, LocalEndpoint, Probe, Wanted},
        squeeze,
        stream::UpstreamIo,
    },
};

/// Endpoints that a connection is tried to before the caller is told.
const DIALS: usize = 3;
/// How long a call waits for the first answer of discovery.
const DISCOVERY_PATIENCE: Duration = Duration::from_secs(5);

/// What a connection for bytes holds.
#[derive(Debug)]
pub struct Dialled {
    _in_flight: InFlight,
    slot: ConnectionSlot,
}

impl Dialled {
    /// Waits until a request needs the connection slot, and no other connection gives way to it.
    pub async fn is_wanted(&self) {
        loop {
            let wanted = squeeze::wanted();
            if self.slot.is_claimed() {
                return;
            }
            wanted.await;
        }
    }
}

/// Why there is no connection for bytes.
enum DialError {
    Failed(ProxyError),
    /// The other sidecar takes no byte streams for its service.
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

/// Opens a connection to an upstream for bytes.
pub async fn dial(connection: &Connection, to: &LocalCluster) -> Result<(UpstreamIo, Dialled), ProxyError> {
    Ok(dial_allowed(connection, to, to.cluster.tls_target(None), |_| Ok(())).await?)
}

/// Opens one for a service that speaks TLS by itself.
pub async fn dial_bare(
    connection: &Connection,
    to: &LocalCluster,
) -> Result<(UpstreamIo, Dialled), ProxyError> {
    Ok(dial_allowed(connection, to, None, |_| Ok(())).await?)
}

async fn dial_allowed(
    connection: &Connection,
    to: &LocalCluster,
    tls: Option<TlsTarget>,
    allowed: impl Fn(SocketAddr) -> Result<(), ProxyError>,
) -> Result<(UpstreamIo, Dialled), DialError> {
    let mut endpoints = endpoints(&connection.worker, to, WaitLimit::default()).await?;
    if let Some(dialled) = connection.outward() {
        // Whoever dialled one of several meant that one.
        endpoints = only(dialled, &endpoints).unwrap_or(endpoints);
    }
    let settings = &to.cluster.settings;
    let limits = TcpLimits {
        connect: settings.policy.connect_timeout.limit(),
        user: settings.user_timeout(Speaks::Bytes),
    };
    let slot = ConnectionSlot::take(&to.upstream.shared.guards)
        .await
        .map_err(|error| connect_failed(&to.cluster.settings.name, &error))?;
    let mut tried = Vec::new();
    loop {
        let wanted = Wanted { tried: &tried, hash: None, probe: Some(Probe::Repeatable) };
        let endpoint = pick(&connection.worker, to, &endpoints, &wanted)?;
        allowed(endpoints[endpoint].address())?;
        let began = Instant::now();
        let connected =
            connect(endpoints[endpoint].address(), limits, tls.as_ref(), Speaks::ByteStream).await;
        report_dial(connection, to, &endpoints[endpoint], connected.as_ref().err(), began);
        match connected {
            Ok(connected) => {
                let slot = slot.opened(connected.protection());
                let dialled = Dialled { _in_flight: endpoints[endpoint].enter(), slot };
                return Ok((connected.io, dialled));
            }
            Err(error) if takes_no_byte_stream(&error) => {
                return Err(DialError::HttpOnly(connect_failed(&to.cluster.settings.name, &error)));
            }
            Err(error) => {
                tried.push(endpoint);
                if tried.len() >= DIALS.min(endpoints.len()) {
                    to.upstream.shared.refresh();
                    return Err(connect_failed(&to.cluster.settings.name, &error).into());
                }
            }
        }
    }
}

fn takes_no_byte_stream(error: &ConnectError) -> bool {
    matches!(error, ConnectError::Tls { failure, .. } if failure.kind == FailureKind::NoProtocol)
}

/// Tells outlier detection that an endpoint takes connections, or takes none: of a tunnel more is not known.
fn report_dial(
    connection: &Connection,
    to: &LocalCluster,
    endpoint: &LocalEndpoint,
    error: Option<&ConnectError>,
    began: Instant,
) {
    let evidence = match error.map(connect_ending) {
        None => Evidence::Success,
        Some(ending) => Evidence::new(&Outcome::new(ending), Health::Failure, false),
    };
    if evidence.is_absence() || (evidence == Evidence::Success && endpoint.is_absent()) {
        let upstream = &to.upstream.shared;
        let change = endpoint.report(upstream, evidence, (began, Instant::now()), || 0.0);
        if let Some(Change::Absent | Change::StillAbsent) = change {
            comeback::watch(upstream, &connection.worker.shared.control);
        }
    }
}

/// Of these endpoints the one with the address.
pub fn only(address: SocketAddr, endpoints: &[Rc<LocalEndpoint>]) -> Option<Rc<[Rc<LocalEndpoint>]>> {
    let one = endpoints.iter().find(|endpoint| endpoint.address() == address)?;
    Some(Rc::new([Rc::clone(one)]))
}

/// The endpoints of an upstream; waits where discovery has not answered yet, as long as the call may.
pub async fn endpoints(
    worker: &Worker,
    to: &LocalCluster,
    until: WaitLimit,
) -> Result<Rc<[Rc<LocalEndpoint>]>, ProxyError> {
    let shared = &to.upstream.shared;
    if shared.endpoints().generation == 0 {
        let name = &to.cluster.settings.name;
        let answered = Box::pin(until.wait(timeout(DISCOVERY_PATIENCE, shared.resolved()))).await;
        answered.map_err(|time_limit| time_limit.unsent(name, "its endpoints to be known"))?.map_err(
            |_| ProxyError::new(Cause::DnsTimeout, format!("{name}: its endpoints are not known yet")),
        )?;
    }
    let endpoints = worker.with_rng(|rng| to.upstream.endpoints(rng));
    if endpoints.is_empty() {
        shared.refresh();
        return Err(nothing_found(&to.cluster.settings.name, &shared.endpoints()));
    }
    Ok(endpoints)
}

/// The index of the endpoint for the next attempt.
pub fn pick(
    worker: &Worker,
    to: &LocalCluster,
    endpoints: &[Rc<LocalEndpoint>],
    wanted: &Wanted<'_>,
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

fn nothing_found(name: &str, set: &EndpointSet) -> ProxyError {
    match &set.resolution {
        Resolution::Failed(error) => {
            let cause = match **error {
                DiscoveryError::DnsTimeout { .. } => Cause::DnsTimeout,
                DiscoveryError::Dns { .. } | DiscoveryError::DnsServer { .. } => Cause::DnsFailure,
                DiscoveryError::LocalResource { .. } => Cause::LocalResource,
                _ => Cause::NoEndpoint,
            };
            let answer = ProxyError::new(cause, format!("{name}: {error}"));
            if cause == Cause::LocalResource { answer.retry_after(Duration::from_secs(1)) } else { answer }
        }
        _ => ProxyError::new(Cause::NoEndpoint, format!("{name} has no endpoints"))
            .retry_after(Duration::from_secs(1)),
    }
}

pub fn connect_failed(name: &str, error: &ConnectError) -> ProxyError {
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
        ConnectError::Limit { .. } | ConnectError::Streams { .. } => {
            return ProxyError::new(Cause::LimitFull, format!("{name}: {error}"))
                .retry_after(Duration::from_secs(1));
        }
    };
    ProxyError::new(cause, format!("{name}: {error}"))
}

/// Refuses addresses that a caller must not reach by naming them: this proxy itself, and what hands out credentials.
pub fn check_address(
    view: &View,
    worker: &Worker,
    target: &Target,
    address: SocketAddr,
) -> Result<(), ProxyError> {
    if !target.chosen_by_caller {
        return Ok(());
    }
    let cluster = &target.local.cluster;
    let name = &cluster.settings.name;
    denial(&worker.shared, &view.snapshot, cluster, address).map_or(Ok(()), |denial| {
        let why = match denial {
            Denial::Own => {
                "a port of this proxy itself; use it as `http_proxy`, or send the `Host` of an upstream"
                    .to_owned()
            }
            Denial::Network(network) => format!("in {network}, which `outbound.deny_networks` names"),
        };
        Err(ProxyError::new(Cause::DeniedNetwork, format!("{name} is {address}: {why}")))
    })
}

/// Whether a caller may reach an address of this upstream by naming it.
pub fn may_be_reached(shared: &Shared, snapshot: &Snapshot, cluster: &Cluster, address: SocketAddr) -> bool {
    denial(shared, snapshot, cluster, address).is_none()
}

enum Denial {
    Own,
    Network(Network),
}

fn denial(shared: &Shared, snapshot: &Snapshot, cluster: &Cluster, address: SocketAddr) -> Option<Denial> {
    if shared.own.contains(address) {
        return Some(Denial::Own);
    }
    if !cluster.looked_up {
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

/// Answers CONNECT: the connection is made first, so that a failure can still be told.
pub async fn open_tunnel(
    connection: &Rc<Connection>,
    view: &View,
    request: &mut Request<CallerBody>,
) -> Result<Response<ResponseBody>, ProxyError> {
    let authority =
        request.uri().authority().ok_or_else(|| ProxyError::malformed("CONNECT names no host"))?;
    let to = target::host_port(authority, request.method())?;
    let target = target::by_host(connection, view, &to, request)?;
    // Whom the caller named is who must answer, where nothing else says.
    let tls = target.local.cluster.tls_target(Some(authority.as_str()));
    let allowed = |address| check_address(view, &connection.worker, &target, address);
    let dialled = match dial_allowed(connection, &target.local, tls, allowed).await {
        Ok(dialled) => Some(dialled),
        // What comes through the tunnel may be requests.
        Err(DialError::HttpOnly(error)) => {
            tracing::debug!(%error, "a tunnel carries requests only");
            None
        }
        Err(DialError::Failed(error)) => return Err(error),
    };
    let mut upgrade = connection.upgrade(request);
    let inside = connection.inside_tunnel(to);
    spawn_local(async move {
        let _open = inside.worker.shared.metrics.outbound.opened();
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
    fn metadata_addresses_are_known_in_every_disguise() {
        for text in
            ["169.254.169.254", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "64:ff9b:1::a9fe:a9fe"]
        {
            let ip = unmapped(text.parse().unwrap());
            assert_eq!(ip, IpAddr::from([169, 254, 169, 254]), "{text}");
        }
        assert_eq!(unmapped("2001:db8::1".parse().unwrap()), "2001:db8::1".parse::<IpAddr>().unwrap());
    }
}
