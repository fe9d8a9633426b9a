//! Why an upstream has no endpoints.

use std::path::PathBuf;

use crate::dns::DnsError;

/// Why a source of endpoints could not be read.
#[derive(Debug, thiserror::Error)]
pub enum DiscoveryError {
    #[error(transparent)]
    Dns(#[from] DnsError),
    #[error("{path}: {reason}")]
    File { path: PathBuf, reason: String },
    #[error("endpoints of the service {service} in Kubernetes: {reason}")]
    Kubernetes { service: String, reason: String },
}
