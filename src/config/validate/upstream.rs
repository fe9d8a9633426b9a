//! Validation of upstreams and routes, and of conditions between them.

use std::collections::{HashMap, HashSet};

use super::{Check, identity, sections::is_url};
use crate::{
    config::{
        Balance, Endpoints, HealthCheck, HostPattern, Node, Problem, Upstream,
        diagnostic::{Problems, did_you_mean},
        source::Origin,
    },
    resilience::split::RouteTo,
};

const MAX_NAME: usize = 128;

/// Checks an upstream by itself.
pub(in super::super) fn upstream(
    upstream: &Upstream,
    node: &Node,
    has_identity: bool,
    problems: &mut Problems,
) {
    let mut check = Check { node, problems };
    let name = &upstream.name;
    if !is_name(name) {
        let help = "use 1 to 128 letters, digits, `-`, `_` and `.`; `hosts` has the names that requests use";
        check.error(&["name"], format!("`{name}` cannot be an upstream's name"), help);
    }
    check.endpoints(&upstream.endpoints);
    if let Some(health) = &upstream.health {
        check.health(health);
    }
    let message = "a PING timeout of 0 would always expire";
    check.require(!upstream.ping_timeout.is_zero(), &["ping_timeout"], message, "write e.g. \"2s\"");
    if let Balance::HashHeader(header) = &upstream.balance {
        check.header_name(&["balance"], header);
    }
    identity::upstream(&mut check, upstream, has_identity);
    if let Some(oauth2) = &upstream.oauth2 {
        check.require(
            is_url(oauth2.token_url.expose()),
            &["oauth2", "token_url"],
            "this is not a URL",
            "write https://…",
        );
        let id = &oauth2.client_id;
        check.require(
            !id.is_empty(),
            &["oauth2", "client_id"],
            "the client has no ID",
            "write the one it is registered by",
        );
        for (at, scope) in oauth2.scopes.iter().enumerate() {
            let fits =
                !scope.is_empty() && scope.bytes().all(|b| matches!(b, 0x21 | 0x23..=0x5b | 0x5d..=0x7e));
            check.require(
                fits,
                &["oauth2", "scopes", &at.to_string()],
                "this is not a single scope",
                "write one scope per item",
            );
        }
    }
}

/// Names of upstreams and routes: they become labels and parts of a path.
pub(super) fn is_name(name: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(fits)
}

impl Check<'_> {
    fn endpoints(&mut self, endpoints: &Endpoints) {
        let help = "write e.g. [\"10.0.0.1:8080\"] or \"dns://HOST:PORT\"";
        match endpoints {
            Endpoints::Fixed(list) => {
                self.require_items(list, &["endpoints"], "there is no endpoint", help);
                for (at, address) in list.iter().enumerate() {
                    let path = ["endpoints", &at.to_string()];
                    self.require(address.port > 0, &path, "port 0 cannot be connected to", help);
                }
            }
            Endpoints::Dns(address) => {
                self.require(address.port > 0, &["endpoints"], "port 0 cannot be connected to", help);
            }
            Endpoints::Kubernetes { namespace, service, port } => {
                let fits = ![namespace, service, port].into_iter().any(|part| part.is_empty());
                let help = "write \"k8s://NAMESPACE/SERVICE:PORT\"";
                self.require(fits, &["endpoints"], "a part is empty", help);
            }
            Endpoints::Srv(_) | Endpoints::File(_) => {}
        }
    }

    fn health(&mut self, health: &HealthCheck) {
        let kinds = usize::from(health.path.is_some())
            + usize::from(health.grpc.is_some())
            + usize::from(health.tcp.is_some());
        let help = "write one of `path = \"/healthz\"`, `grpc = \"SERVICE\"` and `tcp = true`";
        let message = "a health check needs exactly one of `path`, `grpc` and `tcp`";
        self.require_present(kinds > 0, &["health"], message, help);
        self.require(kinds < 2, &["health"], message, help);
        self.require(health.tcp != Some(false), &["health", "tcp"], "`tcp = false` checks nothing", help);
        if let Some(path) = &health.path {
            let fits = path.starts_with('/') && http::uri::PathAndQuery::try_from(path.as_str()).is_ok();
            self.require(fits, &["health", "path"], "this is not a path", "write e.g. \"/healthz\"");
        }
        let message = "a health check without time would never succeed";
        self.require(!health.interval.is_zero(), &["health", "interval"], message, "write e.g. \"10s\"");
        self.require(!health.timeout.is_zero(), &["health", "timeout"], message, "write e.g. \"1s\"");
        for (key, count) in
            [("unhealthy_after", health.unhealthy_after), ("healthy_after", health.healthy_after)]
        {
            self.require(count > 0, &["health", key], "this count must be at least 1", "write at least 1");
        }
    }
}

/// Checks conditions between upstreams, each with its node.
pub(in super::super) fn across_upstreams(upstreams: &[(Upstream, &Node)], problems: &mut Problems) {
    unique_names(upstreams, problems);
    unique_hosts(upstreams, problems);
    unique_routes(upstreams, problems);
    let mut edges: HashMap<&str, Vec<(&str, Option<Origin>)>> = HashMap::new();
    for (upstream, node) in upstreams {
        for (at, route) in upstream.routes.iter().enumerate() {
            // A split may lead to its own upstream: that is the part that stays.
            let Some(RouteTo::One(to)) = &route.to else { continue };
            let route_node = node.get("route").and_then(|routes| routes.item(at));
            let origin = route_node.and_then(|route| route.get("to")).and_then(|to| to.origin);
            edges.entry(&upstream.name).or_default().push((to, origin));
        }
    }
    loops(&edges, problems);
}

/// Checks that every `to` and `fallback.upstream` names an existing upstream. It works on the tree, so that other
/// errors in an upstream do not also break the references to it.
pub(in super::super) fn references(root: &Node, problems: &mut Problems) {
    let upstreams = root.get("upstream").and_then(Node::as_array).unwrap_or_default();
    let names: HashSet<&str> = upstreams.iter().filter_map(|node| node.get("name")?.as_str()).collect();
    let routes = upstreams.iter().filter_map(|node| node.get("route")?.as_array()).flatten();
    let tables = ["inbound", "defaults"].into_iter().filter_map(|section| root.get(section));
    for node in tables.chain(upstreams).chain(routes.clone()) {
        if let Some(upstream) = node.get("fallback").and_then(|fallback| fallback.get("upstream")) {
            exists(upstream, &names, problems);
        }
    }
    for upstream in routes.clone().filter_map(|node| node.get("mirror")?.get("upstream")) {
        exists(upstream, &names, problems);
    }
    for to in routes.filter_map(|node| node.get("to")) {
        let targets = to.as_array().into_iter().flatten().filter_map(|target| target.get("upstream"));
        [to].into_iter().chain(targets).for_each(|reference| exists(reference, &names, problems));
    }
}

fn exists(reference: &Node, names: &HashSet<&str>, problems: &mut Problems) {
    let Some(name) = reference.as_str().filter(|name| !names.contains(name)) else { return };
    let problem = Problem::error(reference.origin, format!("there is no upstream `{name}`")).about_missing();
    problems.push(match did_you_mean(name, names.iter().copied()) {
        Some(near) => problem.label(format!("did you mean `{near}`?")),
        None => problem.help("add an [[upstream]] of this name"),
    });
}

fn place(node: &Node, key: &str) -> Option<Origin> {
    node.get(key).map_or(node.origin, |value| value.origin)
}

fn unique_names(upstreams: &[(Upstream, &Node)], problems: &mut Problems) {
    let mut seen: HashMap<&str, &Node> = HashMap::new();
    for (upstream, node) in upstreams {
        if let Some(first) = seen.insert(&upstream.name, node) {
            problems.push(
                Problem::error(place(node, "name"), format!("two upstreams are called `{}`", upstream.name))
                    .related(place(first, "name"), "the first")
                    .help("combine them, or rename one"),
            );
        }
    }
}

fn unique_routes(upstreams: &[(Upstream, &Node)], problems: &mut Problems) {
    for (upstream, node) in upstreams {
        let mut seen: HashMap<&str, Option<Origin>> = HashMap::new();
        for (at, route) in upstream.routes.iter().enumerate() {
            let Some(name) = &route.name else { continue };
            let origin = node.get("route").and_then(|routes| place(routes.item(at)?, "name"));
            if let Some(first) = seen.insert(name, origin) {
                problems.push(
                    Problem::error(origin, format!("two routes of `{}` are called `{name}`", upstream.name))
                        .related(first, "the first")
                        .help("rename one"),
                );
            }
        }
    }
}

fn unique_hosts(upstreams: &[(Upstream, &Node)], problems: &mut Problems) {
    let mut seen: HashMap<&HostPattern, (&str, Option<Origin>)> = HashMap::new();
    for (upstream, node) in upstreams {
        for (at, host) in upstream.hosts.iter().enumerate() {
            let origin = match node.get("hosts").and_then(|hosts| hosts.item(at)) {
                Some(item) => item.origin,
                None => place(node, "name"),
            };
            let Some((first, first_origin)) = seen.insert(host, (&upstream.name, origin)) else { continue };
            // Reported for the names already.
            if first == upstream.name && (first_origin == origin || node.get("hosts").is_none()) {
                continue;
            }
            problems.push(
                Problem::error(origin, format!("host `{host}` is named twice"))
                    .related(first_origin, format!("leads to `{first}`"))
                    .help("a host leads to one upstream; routes with `to` can divide its paths"),
            );
        }
    }
}

/// Finds a `to` that leads back to its own upstream.
fn loops(edges: &HashMap<&str, Vec<(&str, Option<Origin>)>>, problems: &mut Problems) {
    // 0 unseen, 1 on the current path, 2 done; an explicit stack, since chains may be long.
    let mut state: HashMap<&str, u8> = HashMap::new();
    let mut starts: Vec<&str> = edges.keys().copied().collect();
    starts.sort_unstable();
    for start in starts {
        let mut stack = vec![(start, 0)];
        while let Some((name, next)) = stack.pop() {
            if next == 0 && state.insert(name, 1) == Some(2) {
                state.insert(name, 2);
                continue;
            }
            let Some((to, origin)) = edges.get(name).and_then(|list| list.get(next)) else {
                state.insert(name, 2);
                continue;
            };
            stack.push((name, next + 1));
            match state.get(to).copied().unwrap_or(0) {
                0 => stack.push((to, 0)),
                1 => problems.push(
                    Problem::error(*origin, format!("`to = \"{to}\"` forms a loop"))
                        .label(format!("`{to}` leads back to `{name}`"))
                        .help("remove one of these routes' `to`"),
                ),
                _ => {}
            }
        }
    }
}
