//! Where the endpoints of an upstream come from: a fixed list, DNS, a file, a Kubernetes API server.
//!
//! Each source is a task on the control thread that publishes what it finds to its
//! [`Upstream`](crate::upstream::Upstream), again whenever it changes. Losing the source loses nothing: the last
//! good set stays in use.
//!
//! ```text
//! source: fixed · dns · srv · file · kubernetes ──targets (host:port, weight, priority)──▶ names ──addresses──▶ Upstream
//!                                                                                           ▲
//!                                                   resolver: literals, localhost, /etc/hosts, DNS
//! ```

mod file;
mod kubernetes;
mod miss;
mod names;
mod resolver;
mod source;
mod task;
#[cfg(test)]
mod test_dns;
#[cfg(test)]
mod tests;

pub use resolver::{Answer, DNS_ENV, LOOKUP_LIMIT, MAX_TTL, MIN_TTL, Resolver};

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio::task::JoinHandle;

use crate::{config::Endpoints, upstream::Upstream};

/// Most endpoints that an upstream may have; what is found beyond them is left out, with a warning.
pub const MAX_ENDPOINTS: usize = 4096;

/// Why a source of endpoints could not be read.
#[derive(Debug, thiserror::Error)]
pub enum DiscoveryError {
    #[error("no such name: {name} ({reason})")]
    Dns { name: String, reason: String },
    #[error("the DNS server could not say where {name} is ({reason})")]
    DnsServer { name: String, reason: String },
    #[error("{name} could not be looked up: {reason}")]
    LocalResource { name: String, reason: String },
    #[error("DNS did not answer for {name} within {limit:?}")]
    DnsTimeout { name: String, limit: Duration },
    #[error("{path}: {reason}")]
    File { path: PathBuf, reason: String },
    #[error("the DNS resolver could not be set up: {reason}")]
    Setup { reason: String },
    #[error("endpoints of the service {service} in Kubernetes: {reason}")]
    Kubernetes { service: String, reason: String },
}

/// What is wrong with a file that lists endpoints.
///
/// # Errors
///
/// Says it.
pub fn check_file(path: &std::path::Path) -> Result<(), String> {
    file::check(path)
}

/// Keeps the endpoints of an upstream up to date for as long as it lives; dropping it ends that at once.
#[derive(Debug)]
pub struct Discovery {
    task: Option<JoinHandle<()>>,
}

impl Drop for Discovery {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

/// Starts to publish the endpoints of `source` to `upstream`.
///
/// Literal addresses of a fixed list are published before this returns; the rest follows by a task on the runtime
/// that the resolver was made on, so this may be called from any thread.
pub fn spawn(source: &Endpoints, upstream: Arc<Upstream>, resolver: Arc<Resolver>) -> Discovery {
    let source = source::Source::new(source, &resolver);
    Discovery { task: task::Task::start(source, upstream, resolver) }
}
