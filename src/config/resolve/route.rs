//! Resolves `[[upstream.route]]`.

use schemars::JsonSchema;
use serde::Deserialize;

use super::{POLICY_KEYS, inherit, limits_requests, policy, split_policy_keys};
use crate::{
    config::{
        HeaderEdits, Policy, Problem, Route, RouteMatch,
        diagnostic::Problems,
        node::{Node, Table},
        read::read,
        validate,
    },
    resilience::{
        deprecation::DeprecationSettings,
        mirror::MirrorSettings,
        queue::keys::RouteQueue,
        split::{RouteTo, StickyKey},
    },
};

/// `[[upstream.route]]` without its policy keys, as written.
#[derive(Deserialize, JsonSchema, Default)]
#[serde(default, deny_unknown_fields)]
pub(in super::super) struct RouteKeys {
    /// All given conditions must hold; the most specific match wins.
    #[serde(rename = "match")]
    matches: RouteMatch,
    /// Its name in commands, metrics and status; unique in its upstream.
    name: Option<String>,
    /// Another upstream that serves the matching requests, or several by weight.
    to: Option<RouteTo>,
    /// What keeps a client on one upstream of `to`.
    sticky: StickyKey,
    /// Replaces the matched literal prefix.
    path_rewrite: Option<String>,
    /// Edits of the request's header fields on the way to the upstream.
    request_headers: HeaderEdits,
    /// Edits of the response's header fields on the way to the client.
    response_headers: HeaderEdits,
    /// Announces the end of the version that the route serves; absent: none.
    deprecation: Option<DeprecationSettings>,
    /// Sends copies of requests to another upstream, whose responses are dropped; absent: none.
    mirror: Option<MirrorSettings>,
    /// Keeps requests in a `[[queue]]` and delivers them later; absent: none.
    queue: Option<RouteQueue>,
}

/// The routes of an upstream. `inherited`: its own policy keys.
pub(super) fn routes(node: &Node, inherited: &Table, problems: &mut Problems) -> Vec<Route> {
    let Some(items) = node.as_array() else {
        problems.push(
            Problem::error(node.origin, "routes are a list")
                .label(format!("expected [[upstream.route]], found {}", node.kind())),
        );
        return Vec::new();
    };
    items.iter().filter_map(|item| route(item, inherited, problems)).collect()
}

fn route(node: &Node, inherited: &Table, problems: &mut Problems) -> Option<Route> {
    let (policy_keys, own) = split_policy_keys(node);
    let route_sets_timeout = policy_keys.contains_key("timeout");
    let route_sets_attempt_timeout = policy_keys.contains_key("attempt_timeout");
    let limits_requests = limits_requests(&policy_keys);
    let policy = policy(node, Some(inherit(inherited, policy_keys)), problems);
    let keys: RouteKeys = read(&own, &POLICY_KEYS, problems)?;
    let mut policy = Policy { route_sets_timeout, route_sets_attempt_timeout, ..policy? };
    policy.sets_request_limits |= limits_requests;
    let route = Route {
        name: keys.name,
        matches: keys.matches,
        to: keys.to,
        sticky: keys.sticky,
        path_rewrite: keys.path_rewrite,
        request_headers: keys.request_headers,
        response_headers: keys.response_headers,
        deprecation: keys.deprecation,
        mirror: keys.mirror,
        queue: keys.queue,
        policy,
    };
    validate::route(&route, node, problems);
    Some(route)
}
