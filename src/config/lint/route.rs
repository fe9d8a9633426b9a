//! Lints of routes: settings that act for a whole upstream only.

use super::Lints;
use crate::config::node::Node;

/// The keys of a policy that are one state per upstream: in a route they do nothing. `false` for the whole table acts.
const SHARED: [(&str, &[&str]); 4] = [
    ("breaker", &[]),
    ("outlier", &[]),
    ("limits", &["max_connections", "max_requests", "max_pending", "adaptive"]),
    ("retry", &["budget"]),
];

impl Lints<'_> {
    /// `route`: the table as written.
    pub(super) fn shared_state(&mut self, route: &Node) {
        for (table, keys) in SHARED {
            let Some(settings) = route.get(table) else { continue };
            let names = settings.as_table().into_iter().flat_map(|entries| entries.keys());
            let is_shared = |name: &&String| keys.is_empty() || keys.contains(&name.as_str());
            let shared: Vec<&String> = names.filter(is_shared).collect();
            let (origin, what) = match shared.first() {
                Some(first) => {
                    let keys: Vec<_> = shared.iter().map(|key| format!("`{table}.{key}`")).collect();
                    (settings.get(first).and_then(|node| node.origin), keys.join(", "))
                }
                // Endpoints are ejected for all requests or for none.
                None if table == "outlier" => (settings.origin, "`outlier`".to_owned()),
                None => continue,
            };
            let help = "all requests of an upstream share it: set it in `[[upstream]]`, or give these paths an upstream of their own";
            self.warn(origin, format!("{what} has no effect in a route"), help);
        }
    }
}
