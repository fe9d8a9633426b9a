//! The running configuration: what a reload replaces as a whole, and each worker's view of it.

mod clusters;
mod destination;
mod edits;
mod mirror;
pub mod names;
pub mod queue_route;
mod route;
mod side;
mod snapshot;
pub mod unknown;
mod view;

pub use clusters::{Clusters, inbound_settings};
pub use destination::{RouteDestination, RouteSplit, Splits};
pub use edits::{CompiledEdits, Edits};
pub use mirror::{Mirrors, RouteMirror};
pub use names::{ProxyNames, Via};
pub use route::*;
pub use side::Side;
pub use snapshot::{Cluster, ClusterTls, Snapshot};
pub use view::{Destination, View, WorkerCluster};
