//! Where the endpoints of an upstream come from: a fixed list, DNS, a file.
//!
//! Each source is a task on the control thread that publishes what it finds to its
//! [`Upstream`](crate::upstream::Upstream), again whenever it changes. Losing the source loses nothing: the last
//! good set stays in use.

/// Why a source of endpoints could not be read.
#[derive(Debug, thiserror::Error)]
pub enum DiscoveryError {
    #[error("no such name: {name} ({reason})")]
    Dns { name: String, reason: String },
    #[error("DNS did not answer for {name} within {limit:?}")]
    DnsTimeout { name: String, limit: std::time::Duration },
    #[error("{path}: {reason}")]
    File { path: std::path::PathBuf, reason: String },
}
