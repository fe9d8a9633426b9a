//! What `queue` of a route means for its requests. Compiled once per configuration.

use http::{
    HeaderName,
    header::{AUTHORIZATION, COOKIE},
};

use crate::{
    config::{self, Config},
    delivery_id::DeliveryId,
    resilience::queue::keys::{QueueSettings, RouteQueue},
};

/// Where the state of a delivery is read: this and its ID, on the host that accepted it.
pub const DELIVERIES: &str = "/.well-known/outrigger/deliveries/";

/// A route whose requests do not simply go to the upstream.
#[derive(Clone, Debug)]
pub enum QueueRoute {
    /// Its requests may be queued.
    Accept(Box<AcceptRoute>),
    /// The deliveries themselves, below [`DELIVERIES`]: added to each upstream with a queue.
    Deliveries,
}

/// A route with `queue`.
#[derive(Clone, Debug)]
pub struct AcceptRoute {
    pub route: RouteQueue,
    pub queue: QueueSettings,
    /// Header fields that are not stored.
    pub strip: Vec<HeaderName>,
}

/// The request target of a delivery's resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeliveryPath {
    pub id: DeliveryId,
    /// The stored response, not the state.
    pub response: bool,
}

impl DeliveryPath {
    /// Only the exact form: what else a server could read as another path is none.
    pub fn parse(path: &str) -> Option<Self> {
        let rest = path.strip_prefix(DELIVERIES)?;
        let (id, response) = match rest.strip_suffix("/response") {
            Some(id) => (id, true),
            None => (rest, false),
        };
        Some(Self { id: id.parse().ok()?, response })
    }
}

/// By the indices of `routes`, and behind them the deliveries; empty where no route has a queue.
pub fn queue_routes(routes: &[config::Route], config: &Config) -> Vec<Option<QueueRoute>> {
    if routes.iter().all(|route| route.queue.is_none()) {
        return Vec::new();
    }
    let keeps_credentials = config.store.as_ref().is_some_and(|store| store.key_file.is_some());
    let accept = |route: &config::Route| {
        let wanted = route.queue.clone()?;
        let queue = config.queues.iter().find(|queue| queue.name == wanted.name)?.clone();
        let mut strip: Vec<HeaderName> = queue.strip.iter().filter_map(|name| name.parse().ok()).collect();
        if !keeps_credentials {
            // They are never stored in plain.
            strip.extend([AUTHORIZATION, COOKIE]);
        }
        Some(QueueRoute::Accept(Box::new(AcceptRoute { route: wanted, queue, strip })))
    };
    routes.iter().map(accept).chain([Some(QueueRoute::Deliveries)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_exact_form_is_the_path_of_a_delivery() {
        let id = "01ARYZ6S41TSV4RRFFQ69G5FAV";
        let parsed = |path: &str| DeliveryPath::parse(path).map(|path| path.response);
        assert_eq!(parsed(&format!("{DELIVERIES}{id}")), Some(false));
        assert_eq!(parsed(&format!("{DELIVERIES}{id}/response")), Some(true));
        for path in [
            format!("{DELIVERIES}{id}/"),
            format!("{DELIVERIES}../admin"),
            format!("{DELIVERIES}{id}/../../x"),
            format!("{DELIVERIES}{id}/response/response"),
            format!("/x{DELIVERIES}{id}"),
            DELIVERIES.to_owned(),
        ] {
            assert_eq!(parsed(&path), None, "{path}");
        }
    }
}
