//! Names to addresses: literals, `localhost`, `/etc/hosts`, DNS.

mod lookup_error;
mod resolver;
#[cfg(test)]
pub mod test_dns;

use std::time::Duration;

pub use resolver::{AddressFamily, DNS_ENV, LOOKUP_LIMIT, MAX_TTL, MIN_TTL, ResolvedAddresses, Resolver};

/// Why a name could not be resolved.
#[derive(Clone, Debug, thiserror::Error)]
pub enum DnsError {
    #[error("no such name: {name} ({reason})")]
    NotFound { name: String, reason: String },
    #[error("the DNS server could not say where {name} is ({reason})")]
    Server { name: String, reason: String },
    #[error("{name} could not be looked up: {reason}")]
    LocalResource { name: String, reason: String },
    #[error("DNS did not answer for {name} within {limit:?}")]
    Timeout { name: String, limit: Duration },
    #[error("the DNS resolver could not be set up: {reason}")]
    Setup { reason: String },
}
