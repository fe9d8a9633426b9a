//! The endpoints of a request's upstream, the choice among them, and the errors where none can be used.

use std::{
    net::SocketAddr,
    rc::Rc,
    time::{Duration, Instant},
};

use tokio::time::timeout;

use super::{clock::WaitLimit, error::ProxyError};
use crate::{
    cause::Cause,
    dns::DnsError,
    model::WorkerCluster,
    proxy::worker::Worker,
    upstream::{
        DiscoveryError, EndpointSet, Resolution,
        connect::ConnectError,
        local::{LocalEndpoint, PickCriteria},
    },
};

/// How long a request waits for the first result of discovery.
const DISCOVERY_TIMEOUT: Duration = Duration::from_secs(5);

/// The endpoint with this address, as a set of one.
pub fn endpoint_at(address: SocketAddr, endpoints: &[Rc<LocalEndpoint>]) -> Option<Rc<[Rc<LocalEndpoint>]>> {
    let one = endpoints.iter().find(|endpoint| endpoint.address() == address)?;
    Some(Rc::new([Rc::clone(one)]))
}

/// The endpoints of an upstream. Waits for the first result of discovery, no longer than the request may.
pub async fn endpoints(
    worker: &Worker,
    to: &WorkerCluster,
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
    to: &WorkerCluster,
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
