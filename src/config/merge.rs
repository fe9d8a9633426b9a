//! Merges one tree over another, key by key. Both file overrides and policy inheritance use this rule.

use std::collections::HashMap;

use super::node::{Node, Table, Value};

/// Lists of tables whose entries are identified by a key: entries with equal keys are merged, new ones are appended.
/// All other lists are replaced as a whole, so that a later file can also shorten them.
const KEYED: [(&str, &str); 4] =
    [("upstream", "name"), ("route", "match"), ("port", "port"), ("queue", "name")];

/// Mutually exclusive keys of one table: setting one kind drops the inherited keys of the others, so that e.g.
/// `fallback = { upstream = "dr" }` replaces an inherited fixed response.
const ALTERNATIVES: [(&str, &[&[&str]]); 2] = [
    ("health", &[&["path"], &["grpc"], &["tcp"]]),
    ("fallback", &[&["upstream"], &["status", "body", "content_type"]]),
];

/// `over` wins. Tables merge key by key; anything else replaces (so `false` replaces a table, and a table over
/// `false` starts from the built-in defaults).
pub(super) fn merge(base: Node, over: Node) -> Node {
    merge_as("", base, over)
}

/// The same for two tables.
pub(super) fn merge_tables(base: Table, over: Table) -> Table {
    merge_tables_as("", base, over)
}

fn merge_as(key: &str, base: Node, over: Node) -> Node {
    let value = match (base.value, over.value) {
        (Value::Table(base), Value::Table(over)) => Value::Table(merge_tables_as(key, base, over)),
        (Value::Array(base), Value::Array(over)) => match KEYED.iter().find(|(list, _)| *list == key) {
            Some((_, by)) => Value::Array(merge_lists(by, base, over)),
            None => Value::Array(over),
        },
        (_, over) => over,
    };
    Node { origin: over.origin, value }
}

fn merge_tables_as(key: &str, mut base: Table, over: Table) -> Table {
    if let Some((_, kinds)) = ALTERNATIVES.iter().find(|(table, _)| *table == key)
        && let Some(chosen) = kinds.iter().find(|kind| kind.iter().any(|key| over.contains_key(*key)))
    {
        base.retain(|key, _| {
            chosen.contains(&key.as_str()) || !kinds.iter().any(|kind| kind.contains(&key.as_str()))
        });
    }
    for (key, entry) in over {
        match base.remove(&key) {
            Some(below) => {
                let node = merge_as(&key, below.node, entry.node);
                base.insert(key, super::node::NodeEntry { key: entry.key, node });
            }
            None => {
                base.insert(key, entry);
            }
        }
    }
    base
}

fn merge_lists(by: &str, mut base: Vec<Node>, over: Vec<Node>) -> Vec<Node> {
    // Entries without the key are never merged. Duplicates in one file stay separate, and validation reports them
    // where they are wrong.
    let is_readable = |value: &&Node| value.value != Value::Unknown;
    let identity = |node: &Node| node.get(by).filter(is_readable).map(|value| value.identity());
    let known: HashMap<String, usize> =
        base.iter().enumerate().filter_map(|(at, node)| Some((identity(node)?, at))).collect();
    for node in over {
        match identity(&node).and_then(|id| known.get(&id)) {
            Some(&at) => {
                let below = std::mem::replace(&mut base[at], Node::table(None));
                base[at] = merge_as("", below, node);
            }
            None => base.push(node),
        }
    }
    base
}

impl Node {
    /// A text that is equal for equal values, whatever their places.
    fn identity(&self) -> String {
        match &self.value {
            Value::String { text, .. } => format!("{text:?}"),
            Value::Integer(number) => number.to_string(),
            Value::Float(number) => number.to_string(),
            Value::Bool(flag) => flag.to_string(),
            Value::Datetime(text) => text.clone(),
            Value::Unknown => "?".to_owned(),
            Value::Array(items) => {
                format!("[{}]", items.iter().map(Self::identity).collect::<Vec<_>>().join(","))
            }
            Value::Table(table) => {
                let pair = |(key, entry): (&String, &super::node::NodeEntry)| {
                    format!("{key:?}:{}", entry.node.identity())
                };
                format!("{{{}}}", table.iter().map(pair).collect::<Vec<_>>().join(","))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{diagnostic::Problems, parse::parse};

    fn tree(text: &str) -> Node {
        let mut problems = Problems::default();
        let node = parse(text, 0, &|_| None, &mut problems);
        assert!(!problems.has_errors(), "{text}");
        node
    }

    fn merged(base: &str, over: &str) -> String {
        merge(tree(base), tree(over)).identity()
    }

    #[test]
    fn tables_merge_and_the_rest_replaces() {
        assert_eq!(
            merged("a = 1\n[t]\nx = 1\ny = 2", "b = 2\n[t]\ny = 3"),
            tree("a=1\nb=2\nt={x=1,y=3}").identity()
        );
        assert_eq!(merged("l = [1, 2]", "l = [3]"), tree("l = [3]").identity());
        assert_eq!(merged("[t]\nx = 1", "t = false"), tree("t = false").identity());
        assert_eq!(merged("t = false", "[t]\nx = 1"), tree("t = {x = 1}").identity());
    }

    #[test]
    fn upstreams_merge_by_name_and_their_routes_by_match() {
        let base = "[[upstream]]\nname='a'\nbalance='p2c'\n[[upstream.route]]\nmatch={path='/x'}\ntimeout='1s'\n[[upstream]]\nname='b'";
        let over = "[[upstream]]\nname='c'\n[[upstream]]\nname='a'\n[[upstream.route]]\nmatch={path='/y'}\n[[upstream.route]]\nmatch={path='/x'}\nretry=false";
        let expected = "[[upstream]]\nname='a'\nbalance='p2c'\n[[upstream.route]]\nmatch={path='/x'}\ntimeout='1s'\nretry=false\n[[upstream.route]]\nmatch={path='/y'}\n[[upstream]]\nname='b'\n[[upstream]]\nname='c'";
        assert_eq!(merged(base, over), tree(expected).identity());
    }

    #[test]
    fn an_alternative_drops_the_others() {
        assert_eq!(
            merged("health = { path = '/h', interval = '5s' }", "health = { tcp = true }"),
            tree("health = { tcp = true, interval = '5s' }").identity()
        );
        assert_eq!(
            merged("fallback = { status = 200, body = '[]' }", "fallback = { upstream = 'dr' }"),
            tree("fallback = { upstream = 'dr' }").identity()
        );
        assert_eq!(
            merged("fallback = { status = 200, body = '[]' }", "fallback = { status = 204 }"),
            tree("fallback = { status = 204, body = '[]' }").identity()
        );
    }
}
