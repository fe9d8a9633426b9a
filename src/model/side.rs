//! Inbound or outbound.

use std::sync::Arc;

/// The direction of the requests that a listener accepts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Side {
    /// Requests to this service.
    Inbound,
    /// Requests from this service, to the host that each one names.
    Outbound,
    /// Requests from this service to one upstream, by its name.
    Upstream(Arc<str>),
}
