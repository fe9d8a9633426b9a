//! Discovery of the endpoints of an upstream: from a fixed list, DNS, a file, or a Kubernetes API server.
//!
//! Each source is a task on the control thread that publishes its endpoints to its
//! [`Upstream`], again whenever they change. If the source fails, the last good set stays
//! in use.
//!
//! ```text
//! source: fixed, dns, srv, file, kubernetes ──host:port, weight, priority──▶ names ──addresses──▶ Upstream
//!                                                                            ▲
//!                                   resolver: literals, localhost, /etc/hosts, DNS
//! ```

mod file;
mod kubernetes;
mod resolved_names;
mod source;
mod task;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use tokio::task::JoinHandle;

use crate::{config::Endpoints, dns::Resolver, upstream::Upstream};

/// The most endpoints of an upstream; further ones are dropped with a warning.
pub const MAX_ENDPOINTS: usize = 4096;

/// Checks a file that lists endpoints.
///
/// # Errors
///
/// The first error in the file, as text.
pub fn check_file(path: &std::path::Path) -> Result<(), String> {
    file::check(path)
}

/// Keeps the endpoints of an upstream up to date; dropping it stops that at once.
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

/// Starts publishing the endpoints of `source` to `upstream`.
///
/// Literal addresses of a fixed list are published before this returns. A task on the runtime of the resolver
/// publishes the rest, so this may be called from any thread.
pub fn spawn(source: &Endpoints, upstream: Arc<Upstream>, resolver: Arc<Resolver>) -> Discovery {
    let source = source::EndpointSource::new(source, &resolver);
    Discovery { task: task::DiscoveryTask::start(source, upstream, resolver) }
}
