//! Inbound or outbound.

use std::sync::Arc;

/// Which way calls go that come in by a listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Side {
    /// To this service.
    Inbound,
    /// From this service, to whomever the call names.
    Outbound,
    /// From this service, to one upstream, by its name.
    Upstream(Arc<str>),
}
