//! Connections to upstreams for byte streams: CONNECT, and ports that are not HTTP.

use std::{net::SocketAddr, time::Instant};

use super::{
    attempt::connect_ending,
    clock::WaitLimit,
    connection::Connection,
    endpoints::{connect_error, endpoint_at, endpoints, pick},
    error::ProxyError,
};
use crate::{
    identity::handshake::FailureKind,
    model::WorkerCluster,
    net::alpn::ApplicationProtocol,
    resilience::{
        classify::{AttemptOutcome, Health},
        outlier::{AttemptTimes, EndpointChange, EndpointOutcome},
    },
    upstream::{
        connect::{ConnectError, TcpTimeouts, TlsTarget, connect},
        eviction,
        local::{InFlight, LocalEndpoint, PickCriteria, Probe},
        policy_state::ConnectionSlot,
        reachability,
        stream::UpstreamIo,
    },
};

/// The most endpoints that are dialled before the client gets an error.
const MAX_DIALS: usize = 3;

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
pub(super) enum DialError {
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
    to: &WorkerCluster,
) -> Result<(UpstreamIo, ByteStreamGuard), ProxyError> {
    Ok(dial_allowed(connection, to, to.cluster.tls_target(None), |_| Ok(())).await?)
}

/// Opens one without TLS, for a service that speaks TLS itself.
pub async fn dial_without_tls(
    connection: &Connection,
    to: &WorkerCluster,
) -> Result<(UpstreamIo, ByteStreamGuard), ProxyError> {
    Ok(dial_allowed(connection, to, None, |_| Ok(())).await?)
}

/// Opens a connection to the first endpoint that accepts one. `allowed` refuses addresses.
pub(super) async fn dial_allowed(
    connection: &Connection,
    to: &WorkerCluster,
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
    let slot = ConnectionSlot::acquire(&to.upstream.shared.policy_state)
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
    to: &WorkerCluster,
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
        let times = AttemptTimes { began, ended: Instant::now() };
        let change = endpoint.report(upstream, evidence, times, || 0.0);
        if let Some(EndpointChange::Absent | EndpointChange::StillAbsent) = change {
            reachability::watch_absent_endpoints(upstream, &connection.worker.shared.control_runtime);
        }
    }
}
