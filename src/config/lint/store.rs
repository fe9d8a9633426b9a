//! Lints of `[store]` and `[[queue]]`.

use super::Lints;
use crate::config::{Config, Node};

impl Lints<'_> {
    pub(super) fn store(&mut self, config: &Config) {
        let Some(store) = config.store.as_ref().filter(|store| store.key_file.is_none()) else { return };
        let root = self.root;
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
}
