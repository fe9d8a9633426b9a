//! `POST /upstreams/NAME/routes/NAME/split`: changes the share of the last upstream of a route's `to`.

use http::StatusCode;
use serde::{Deserialize, Serialize};

use super::api::{ApiResponse, json, problem};
use crate::{
    config::Route,
    model::{Cluster, RouteDestination},
    runtime::lifecycle::Control,
};

/// The body of the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SplitOverride {
    /// The share of the last upstream, 0 to 100; `null`: the weights of the configuration again.
    pub percent: Option<u8>,
}

impl SplitOverride {
    pub fn to_json(self) -> String {
        // Cannot fail: one plain value.
        serde_json::to_string(&self).unwrap_or_default()
    }
}

/// A split route, in `/status` and as the answer to a change.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SplitStatus {
    /// The route's name, else what it matches.
    pub route: String,
    pub to: Vec<ShareStatus>,
    /// The share of the last upstream that was set; `None`: the weights are those of the configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub set_percent: Option<u8>,
}

/// One upstream of a split.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShareStatus {
    pub upstream: String,
    /// Of the route's requests, in percent.
    pub percent: f64,
    /// Requests since the split was configured.
    pub requests: u64,
}

impl SplitStatus {
    /// The splits of an upstream's routes.
    pub fn all_of(cluster: &Cluster) -> Vec<Self> {
        let routes = cluster.settings.routes.iter().zip(&cluster.destinations);
        routes.filter_map(|(route, destination)| Self::of(route, destination)).collect()
    }

    fn of(route: &Route, destination: &RouteDestination) -> Option<Self> {
        let RouteDestination::Split(divided) = destination else { return None };
        let share = |share: crate::resilience::split::ShareReport| ShareStatus {
            upstream: share.upstream,
            percent: (share.share * 1000.0).round() / 10.0,
            requests: share.chosen,
        };
        Some(Self {
            route: route.label(),
            to: divided.split.report().into_iter().map(share).collect(),
            set_percent: divided.split.last_percent(),
        })
    }

    /// E.g. `90 % shop, 10 % orders-v2`.
    pub fn shares(&self) -> String {
        let share = |share: &ShareStatus| format!("{} % {}", share.percent, share.upstream);
        self.to.iter().map(share).collect::<Vec<_>>().join(", ")
    }
}

/// The path for a route of an upstream. Names contain only characters that are valid in a path.
pub fn path(upstream: &str, route: &str) -> String {
    format!("/upstreams/{upstream}/routes/{route}/split")
}

/// The names of upstream and route in such a path.
pub fn names_from_path(path: &str) -> Option<(&str, &str)> {
    let (upstream, route) =
        path.strip_prefix("/upstreams/")?.strip_suffix("/split")?.split_once("/routes/")?;
    let is_one = |name: &str| !name.is_empty() && !name.contains('/');
    (is_one(upstream) && is_one(route)).then_some((upstream, route))
}

/// Sets the share of the last upstream of a route.
pub fn set(control: &Control, path: &str, body: &[u8]) -> ApiResponse {
    let (upstream, name) = names_from_path(path).unwrap_or_default();
    let snapshot = control.shared.snapshot.load();
    let Some(cluster) = snapshot.clusters.iter().find(|cluster| &*cluster.upstream.name == upstream) else {
        let names: Vec<&str> = snapshot.clusters.iter().map(|cluster| &*cluster.upstream.name).collect();
        let detail = format!("there is no upstream `{upstream}`; available: {}", listed(&names));
        return problem(StatusCode::NOT_FOUND, "No such upstream", &detail);
    };
    let routes = || cluster.settings.routes.iter().zip(&cluster.destinations);
    let named = routes().find(|(route, _)| route.name.as_deref() == Some(name));
    let Some((route, destination)) = named else {
        let names: Vec<&str> = routes().filter_map(|(route, _)| route.name.as_deref()).collect();
        let detail = format!(
            "`{upstream}` has no route with `name = \"{name}\"`; routes with names: {}",
            listed(&names)
        );
        return problem(StatusCode::NOT_FOUND, "No such route", &detail);
    };
    let RouteDestination::Split(divided) = destination else {
        let detail = format!("`to` of {upstream}/{name} is not a list of upstreams with weights");
        return problem(StatusCode::CONFLICT, "Not a split route", &detail);
    };
    let wanted: SplitOverride = match serde_json::from_slice(body) {
        Ok(wanted) => wanted,
        Err(error) => {
            let detail = format!("{error}; send e.g. {{\"percent\":10}}");
            return problem(StatusCode::BAD_REQUEST, "Invalid share", &detail);
        }
    };
    if wanted.percent.is_some_and(|percent| percent > 100) {
        return problem(StatusCode::BAD_REQUEST, "Invalid share", "`percent` is 0 to 100");
    }
    divided.split.set_last(wanted.percent);
    let status = SplitStatus::of(route, destination);
    let shares = status.as_ref().map(SplitStatus::shares).unwrap_or_default();
    tracing::info!(upstream, route = name, shares, "split changed through the admin server");
    json(StatusCode::OK, &status)
}

fn listed(names: &[&str]) -> String {
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_names_an_upstream_and_a_route() {
        assert_eq!(names_from_path(&path("shop", "orders")), Some(("shop", "orders")));
        for other in ["/upstreams/shop/split", "/upstreams//routes/a/split", "/upstreams/a/routes/b/c/split"]
        {
            assert_eq!(names_from_path(other), None, "{other}");
        }
    }
}
