//! Reads `[store]`, `[[queue]]` and `[[inbound.route]]`.

use schemars::JsonSchema;
use serde::Deserialize;

use super::{
    Policy, Problem, Route, RouteMatch,
    diagnostic::Problems,
    node::{Node, Value},
    read::read,
    validate,
};
use crate::{
    queue::store::settings::StoreSettings,
    resilience::{
        deprecation::DeprecationSettings,
        queue::keys::{QueueSettings, RouteQueue},
    },
};

/// `[[inbound.route]]`, as written.
#[derive(Deserialize, JsonSchema, Default)]
#[serde(default, deny_unknown_fields)]
pub(super) struct InboundRouteKeys {
    /// All given conditions must hold; the most specific match wins.
    #[serde(rename = "match")]
    matches: RouteMatch,
    /// Its name in metrics.
    name: Option<String>,
    /// Announces the end of the version that it serves; absent: none.
    deprecation: Option<DeprecationSettings>,
    /// Keeps requests in a `[[queue]]` and delivers them later; absent: none.
    queue: Option<RouteQueue>,
}

pub(super) fn store(root: &Node, problems: &mut Problems) -> Option<StoreSettings> {
    root.get("store").and_then(|node| read(node, &[], problems))
}

pub(super) fn queues(root: &Node, problems: &mut Problems) -> Vec<QueueSettings> {
    let Some(node) = root.get("queue") else { return Vec::new() };
    list(node, "queue", problems).iter().filter_map(|item| read(item, &[], problems)).collect()
}

/// Takes `route` out of `[inbound]`. All routes have its policy.
pub(super) fn inbound_routes(inbound: &mut Node, policy: &Policy, problems: &mut Problems) -> Vec<Route> {
    let Value::Table(table) = &mut inbound.value else { return Vec::new() };
    let Some(entry) = table.remove("route") else { return Vec::new() };
    let mut routes = Vec::new();
    for item in list(&entry.node, "inbound.route", problems) {
        let Some(keys) = read::<InboundRouteKeys>(item, &[], problems) else { continue };
        let route = Route {
            name: keys.name,
            deprecation: keys.deprecation,
            queue: keys.queue,
            ..Route::new(keys.matches, policy.clone())
        };
        validate::route(&route, item, problems);
        routes.push(route);
    }
    routes
}

fn list<'a>(node: &'a Node, name: &str, problems: &mut Problems) -> &'a [Node] {
    node.as_array().unwrap_or_else(|| {
        let problem = Problem::error(node.origin, format!("`{name}` is a list"));
        problems.push(problem.label(format!("expected [[{name}]], found {}", node.kind())));
        &[]
    })
}
