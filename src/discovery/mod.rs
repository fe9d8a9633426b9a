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
mod names;
mod source;
mod task;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use tokio::task::JoinHandle;

use crate::{config::Endpoints, dns::Resolver, upstream::Upstream};

/// Most endpoints that an upstream may have; what is found beyond them is left out, with a warning.
pub const MAX_ENDPOINTS: usize = 4096;

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
