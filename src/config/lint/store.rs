//! Lints of `[store]` and `[[queue]]`.

use super::Lints;
use crate::{
    config::{Config, Node, Route},
    units::ByteSize,
};

impl Lints<'_> {
    pub(super) fn store(&mut self, config: &Config) {
        let Some(store) = &config.store else { return };
        let root = self.root;
        self.bounds(config);
        self.expiry(config);
        if store.key_file.is_some() {
            return;
        }
        let node = root.get("store");
        if config.queues.is_empty() {
            let help = "add a [[queue]], or remove this";
            self.warn(node.and_then(|node| node.origin), "nothing is stored: there is no queue", help);
            return;
        }
        if store.durability == crate::queue::store::settings::Durability::Disk {
            let help =
                "set `key_file` (`openssl rand -base64 32`), or keep the directory on an encrypted disk";
            let origin = node.and_then(|node| node.origin);
            self.warn(origin, "heads and bodies of requests are stored in plain", help);
        }
        let queues = root.get("queue").and_then(Node::as_array).unwrap_or_default();
        for strip in queues.iter().filter_map(|queue| queue.get("strip")) {
            let names = strip.as_array().unwrap_or_default().iter().filter_map(Node::as_str);
            let stripped: Vec<String> = names.map(str::to_ascii_lowercase).collect();
            if ["cookie", "authorization"].iter().any(|name| !stripped.iter().any(|other| other == name)) {
                let help = "set `[store] key_file` to have them stored, encrypted";
                self.warn(strip.origin, "cookie and authorization are not stored without `key_file`", help);
            }
        }
    }

    /// A queue that can fill the store keeps all others from accepting.
    fn bounds(&mut self, config: &Config) {
        let Some(store) = &config.store else { return };
        let sum = config.queues.iter().fold(0_u64, |sum, queue| sum.saturating_add(queue.max_bytes.0));
        if sum > store.max_bytes.0 {
            let max_bytes = |node: &Node| node.get("max_bytes").and_then(|value| value.origin);
            let of_store = self.root.get("store").and_then(max_bytes);
            let of_queues = self.root.get("queue").and_then(Node::as_array).unwrap_or_default();
            let (sum, limit) = (ByteSize(sum), store.max_bytes);
            self.warn(
                of_store.or_else(|| of_queues.iter().find_map(max_bytes)),
                format!("the queues may hold {sum} together, and the store {limit}"),
                "a queue that is not emptied keeps the others from accepting: lower their max_bytes, or raise the store's",
            );
        }
    }

    /// What expires while the breaker is open was never attempted.
    fn expiry(&mut self, config: &Config) {
        let nodes = self.root.get("queue").and_then(Node::as_array).unwrap_or_default();
        let find =
            |name: &str| nodes.iter().find(|node| node.get("name").and_then(Node::as_str) == Some(name));
        for queue in &config.queues {
            let Some(expires) = queue.expires.limit() else { continue };
            let upstreams = config.upstreams.iter().map(|one| (one.name.as_str(), &one.policy, &one.routes));
            let service = ("the service", &config.inbound.policy, &config.inbound.routes);
            let is_queued =
                |route: &Route| route.queue.as_ref().is_some_and(|wanted| wanted.name == queue.name);
            let queued = upstreams.chain([service]).filter(|(_, _, routes)| routes.iter().any(is_queued));
            let longest = queued.filter_map(|(name, policy, _)| {
                let open_for = policy.breaker.0.as_ref()?.open_for.max;
                (*open_for > expires).then_some((name, open_for))
            });
            if let Some((name, open_for)) = longest.max_by_key(|(_, open_for)| *open_for) {
                let node = find(&queue.name);
                let at =
                    node.and_then(|node| node.get("expires").and_then(|value| value.origin).or(node.origin));
                self.warn(
                    at,
                    format!(
                        "deliveries expire after {}, and the breaker of {name} may stay open for {open_for}",
                        queue.expires
                    ),
                    "raise `expires`, or lower `open_for` of the breaker",
                );
            }
        }
    }
}
