//! The sources of endpoints, before names are resolved.

use std::{net::IpAddr, sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{file::File, kubernetes::Kubernetes};
use crate::{
    config::{Endpoints, HostPort},
    dns::Resolver,
    fetch::Fetcher,
    upstream::DiscoveryError,
};

/// An endpoint with its host name or address, before resolution.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub address: HostPort,
    pub weight: u32,
    /// Only the targets of the lowest priority that has addresses are used.
    pub priority: u16,
    /// Its addresses, if the source supplied them; otherwise the name is resolved.
    pub known: Vec<IpAddr>,
}

/// A source of endpoints.
pub(super) enum Source {
    /// A list in the configuration; `dns://` is a list of one.
    Fixed(Vec<Target>),
    Srv(String),
    File(File),
    Kubernetes(Box<Kubernetes>),
}

/// The endpoints of a source, and when to read it again.
pub(super) struct Reading {
    pub targets: Vec<Target>,
    /// `None`: they never change.
    pub valid_for: Option<Duration>,
}

impl Target {
    pub fn new(address: HostPort, weight: u32) -> Self {
        Self { address, weight, priority: 0, known: Vec::new() }
    }
}

impl Source {
    pub fn new(endpoints: &Endpoints, resolver: &Arc<Resolver>) -> Self {
        match endpoints {
            Endpoints::Fixed(list) => {
                Self::Fixed(list.iter().map(|address| Target::new(address.clone(), 1)).collect())
            }
            Endpoints::Dns(address) => Self::Fixed(vec![Target::new(address.clone(), 1)]),
            Endpoints::Srv(name) => Self::Srv(name.clone()),
            Endpoints::File(path) => Self::File(File::new(path.clone())),
            Endpoints::Kubernetes { namespace, service, port } => {
                let fetcher = Fetcher::new(Arc::clone(resolver));
                let (namespace, service, port) = (namespace.clone(), service.clone(), port.clone());
                Self::Kubernetes(Box::new(Kubernetes::new(fetcher, namespace, service, port)))
            }
        }
    }

    pub async fn read(&mut self, resolver: &Resolver) -> Result<Reading, DiscoveryError> {
        match self {
            Self::Fixed(targets) => Ok(Reading { targets: targets.clone(), valid_for: None }),
            Self::Srv(name) => {
                let (services, valid_for) = resolver.services(name).await?;
                let targets = services.into_iter().map(|service| Target {
                    address: HostPort::new(service.target, service.port),
                    weight: u32::from(service.weight).max(1),
                    priority: service.priority,
                    known: service.addresses,
                });
                Ok(Reading { targets: targets.collect(), valid_for: Some(valid_for) })
            }
            Self::File(file) => {
                let targets = file.read().await?;
                Ok(Reading { targets, valid_for: Some(File::POLL) })
            }
            Self::Kubernetes(service) => Ok(Reading { targets: service.read().await?, valid_for: None }),
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
