//! The sources of endpoints, before names are resolved.

use std::{net::IpAddr, sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{file::EndpointFile, kubernetes::KubernetesSource};
use crate::{
    config::{Endpoints, HostPort},
    dns::Resolver,
    fetch::Fetcher,
    upstream::DiscoveryError,
};

/// An endpoint with its host name or address, before resolution.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct UnresolvedEndpoint {
    pub address: HostPort,
    pub weight: u32,
    /// Only the targets of the lowest priority that has addresses are used.
    pub priority: u16,
    /// Its addresses, if the source supplied them; otherwise the name is resolved.
    pub known_addresses: Vec<IpAddr>,
}

/// A source of endpoints.
pub(super) enum EndpointSource {
    /// A list in the configuration; `dns://` is a list of one.
    Fixed(Vec<UnresolvedEndpoint>),
    Srv(String),
    File(EndpointFile),
    Kubernetes(Box<KubernetesSource>),
}

/// The endpoints of a source, and when to read it again.
pub(super) struct SourceSnapshot {
    pub targets: Vec<UnresolvedEndpoint>,
    /// `None`: they never change.
    pub valid_for: Option<Duration>,
}

impl UnresolvedEndpoint {
    pub fn new(address: HostPort, weight: u32) -> Self {
        Self { address, weight, priority: 0, known_addresses: Vec::new() }
    }
}

impl EndpointSource {
    pub fn new(endpoints: &Endpoints, resolver: &Arc<Resolver>) -> Self {
        match endpoints {
            Endpoints::Fixed(list) => {
                Self::Fixed(list.iter().map(|address| UnresolvedEndpoint::new(address.clone(), 1)).collect())
            }
            Endpoints::Dns(address) => Self::Fixed(vec![UnresolvedEndpoint::new(address.clone(), 1)]),
            Endpoints::Srv(name) => Self::Srv(name.clone()),
            Endpoints::File(path) => Self::File(EndpointFile::new(path.clone())),
            Endpoints::Kubernetes { namespace, service, port } => {
                let fetcher = Fetcher::new(Arc::clone(resolver));
                let (namespace, service, port) = (namespace.clone(), service.clone(), port.clone());
                Self::Kubernetes(Box::new(KubernetesSource::new(fetcher, namespace, service, port)))
            }
        }
    }

    pub async fn read(&mut self, resolver: &Resolver) -> Result<SourceSnapshot, DiscoveryError> {
        match self {
            Self::Fixed(targets) => Ok(SourceSnapshot { targets: targets.clone(), valid_for: None }),
            Self::Srv(name) => {
                let (services, valid_for) = resolver.srv_records(name).await?;
                let targets = services.into_iter().map(|service| UnresolvedEndpoint {
                    address: HostPort::new(service.target, service.port),
                    weight: u32::from(service.weight).max(1),
                    priority: service.priority,
                    known_addresses: service.addresses,
                });
                Ok(SourceSnapshot { targets: targets.collect(), valid_for: Some(valid_for) })
            }
            Self::File(file) => {
                let targets = file.read().await?;
                Ok(SourceSnapshot { targets, valid_for: Some(EndpointFile::POLL) })
            }
            Self::Kubernetes(service) => {
                Ok(SourceSnapshot { targets: service.read().await?, valid_for: None })
            }
        }
    }

    /// Waits until the source itself reports a change.
    pub async fn changed(&mut self) {
        match self {
            Self::File(file) => file.changed().await,
            Self::Kubernetes(service) => service.changed().await,
            Self::Fixed(_) | Self::Srv(_) => std::future::pending().await,
        }
    }
}

/// When to retry after `failures` in a row: 1 s, 2 s, 4 s … 30 s, half of it random.
pub(super) fn retry_at(now: Instant, failures: u32, rng: &mut crate::rng::Rng) -> Instant {
    let full = Duration::from_secs(1 << failures.saturating_sub(1).min(5)).min(Duration::from_secs(30));
    now + full.mul_f64(1.0 - rng.unit_f64() / 2.0).max(Duration::from_secs(1))
}
