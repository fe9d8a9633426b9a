//! Provenance: every effective value with the file and line that set it.

use serde::Serialize;
use serde_json::Value as Json;

use super::{
    LoadedConfig, Policy,
    node::{Node, Table, Value},
    resolve::{inbound_policy, inherit, split_policy_keys},
    source::Origin,
};
use crate::redact::redact_userinfo;

/// The part of the configuration whose values are listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    Inbound,
    /// `[defaults]`: hosts that no upstream names.
    Defaults,
    /// By index.
    Upstream(usize),
    /// By the indices of upstream and route.
    Route(usize, usize),
}

/// One effective value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// `retry.backoff.base`
    pub key: String,
    pub value: String,
    /// Where it was set; `None`: built in.
    pub origin: Option<Origin>,
}

impl LoadedConfig {
    /// The effective policy of a scope. `None`: no such scope.
    pub fn policy(&self, scope: Scope) -> Option<&Policy> {
        let upstreams = &self.config.upstreams;
        match scope {
            Scope::Inbound => Some(&self.config.inbound.policy),
            Scope::Defaults => Some(&self.config.defaults),
            Scope::Upstream(at) => upstreams.get(at).map(|upstream| &upstream.policy),
            Scope::Route(at, route) => upstreams.get(at)?.routes.get(route).map(|route| &route.policy),
        }
    }

    /// The effective policy as texts, key by key in the order of the documentation, each with its place.
    pub fn policy_settings(&self, scope: Scope) -> Vec<Setting> {
        let Some(policy) = self.policy(scope) else { return Vec::new() };
        let table = self.policy_table(scope);
        let tree = Node { origin: None, value: Value::Table(table) };
        settings(policy, &tree)
    }

    /// The keys of an upstream other than its policy, likewise.
    pub fn upstream_settings(&self, upstream: usize) -> Vec<Setting> {
        let Some(value) = self.config.upstreams.get(upstream) else { return Vec::new() };
        let empty = Node::table(None);
        let mut settings = settings(value, self.upstream_node(upstream).unwrap_or(&empty));
        settings
            .retain(|setting| !["policy", "routes"].contains(&setting.key.split('.').next().unwrap_or("")));
        settings
    }

    /// The place of an upstream or one of its routes.
    pub fn scope_origin(&self, scope: Scope) -> Option<Origin> {
        match scope {
            Scope::Inbound => self.tree.get("inbound")?.origin,
            Scope::Defaults => self.tree.get("defaults")?.origin,
            Scope::Upstream(at) => self.upstream_node(at)?.origin,
            Scope::Route(at, route) => self.route_node(at, route)?.origin,
        }
    }

    /// The place of an `[[inbound.allow]]` entry, counted from 0.
    pub fn allow_origin(&self, at: usize) -> Option<Origin> {
        self.tree.get("inbound")?.get("allow")?.item(at)?.origin
    }

    fn upstream_node(&self, at: usize) -> Option<&Node> {
        // A loaded configuration has every upstream and route of the tree, in the same order.
        self.tree.get("upstream")?.item(at)
    }

    fn route_node(&self, at: usize, route: usize) -> Option<&Node> {
        self.upstream_node(at)?.get("route")?.item(route)
    }

    fn policy_table(&self, scope: Scope) -> Table {
        let own = |node: Option<&Node>| node.map(|node| split_policy_keys(node).0).unwrap_or_default();
        match scope {
            Scope::Inbound => inbound_policy(&own(self.tree.get("inbound"))),
            Scope::Defaults => own(self.tree.get("defaults")),
            Scope::Upstream(at) => inherit(&self.policy_table(Scope::Defaults), own(self.upstream_node(at))),
            Scope::Route(at, route) => {
                inherit(&self.policy_table(Scope::Upstream(at)), own(self.route_node(at, route)))
            }
        }
    }
}

fn settings(value: &impl Serialize, tree: &Node) -> Vec<Setting> {
    let mut found = Vec::new();
    if let Ok(json) = serde_json::to_value(value) {
        flatten(String::new(), &json, Some(tree), &mut found);
    }
    found
}

fn flatten(key: String, json: &Json, node: Option<&Node>, found: &mut Vec<Setting>) {
    match json {
        Json::Object(map) if !map.is_empty() => {
            for (name, value) in map {
                let key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                flatten(key, value, node.and_then(|node| node.get(name)), found);
            }
        }
        // Not set.
        Json::Null => {}
        Json::Object(_) => {}
        leaf => found.push(Setting { key, value: to_text(leaf), origin: node.and_then(|node| node.origin) }),
    }
}

fn to_text(json: &Json) -> String {
    match json {
        Json::String(text) => redact_userinfo(text).into_owned(),
        Json::Array(items) if items.is_empty() => "none".to_owned(),
        Json::Array(items) => items.iter().map(to_text).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Source, Sources, load_sources, resolve::POLICY_KEYS};

    fn loaded(text: &str) -> LoadedConfig {
        let sources = Sources(vec![Source { path: "f".into(), text: text.to_owned() }]);
        load_sources(sources, &|_| None).unwrap()
    }

    fn line(loaded: &LoadedConfig, settings: &[Setting], key: &str) -> (String, Option<usize>) {
        let setting = settings.iter().find(|setting| setting.key == key).unwrap();
        (
            setting.value.clone(),
            setting.origin.and_then(|at| loaded.sources.position(at)).map(|place| place.line),
        )
    }

    #[test]
    fn every_value_has_the_line_that_set_it() {
        let loaded = loaded(
            "[defaults]\ntimeout = '9s'\nretry = { max = 1 }\n[[upstream]]\nname = 'a'\nbalance = 'round-robin'\nbreaker = false\n[[upstream.route]]\nretry = { body_limit = '1KiB' }",
        );
        let settings = loaded.policy_settings(Scope::Route(0, 0));
        for (key, value, at) in [
            ("timeout", "9s", Some(2)),
            ("retry.max", "1", Some(3)),
            ("retry.body_limit", "1KiB", Some(9)),
            ("breaker", "false", Some(7)),
            ("idle_timeout", "5m", None),
            ("retry.backoff.base", "25ms", None),
        ] {
            assert_eq!(line(&loaded, &settings, key), (value.to_owned(), at), "{key}");
        }
        let upstream = loaded.upstream_settings(0);
        assert_eq!(line(&loaded, &upstream, "balance"), ("round-robin".to_owned(), Some(6)));
        assert_eq!(line(&loaded, &upstream, "endpoints"), ("dns://a:80".to_owned(), None));
        assert_eq!(
            line(&loaded, &loaded.policy_settings(Scope::Inbound), "timeout"),
            ("0s".to_owned(), None)
        );
    }

    #[test]
    fn policy_keys_are_those_of_the_policy() {
        let json = serde_json::to_value(Policy::default()).unwrap();
        let keys: Vec<&str> = json.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, POLICY_KEYS);
    }
}
