//! The running configuration: what a reload replaces as a whole, and each worker's view of it.

mod edits;
pub mod names;
pub mod queue_route;
mod route;
mod side;
mod snapshot;
pub mod unknown;
mod view;

pub use edits::{CompiledEdits, Edits};
pub use names::{ProxyNames, Via};
pub use route::*;
pub use side::Side;
pub use snapshot::{Cluster, ClusterTls, Clusters, Snapshot, inbound_settings};
pub use view::{Destination, View, WorkerCluster};
