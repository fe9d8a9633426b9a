//! Validation of queues, and of what refers to them.

use std::collections::HashMap;

use super::Check;
use crate::{
    config::{
        Config, Node, Problem,
        diagnostic::{Problems, did_you_mean},
    },
    resilience::queue::keys::{DeliveryOrder, QueueSettings},
};

const MAX_NAME: usize = 64;
/// Each delivery in flight holds a body and a response in memory.
const MAX_CONCURRENCY: u32 = 1000;
/// Held in memory while it is read.
const MAX_BODY_LIMIT: u64 = 64 << 20;
/// A client's connection is not kept waiting for longer.
const MAX_WAIT: u64 = 300;

pub(in super::super) fn queues(config: &Config, root: &Node, problems: &mut Problems) {
    let nodes = root.get("queue").and_then(Node::as_array).unwrap_or_default();
    if root.get("store").is_none()
        && let Some(first) = nodes.first()
    {
        problems.push(
            Problem::error(first.origin, "queues need a [store] that keeps what they accept")
                .help("add `[store]` with `path`, a directory that survives a restart; or `durability = \"memory\"`")
                .about_missing(),
        );
    }
    let mut names: HashMap<&str, &Node> = HashMap::new();
    for node in nodes {
        let Some(name) = node.get("name").and_then(Node::as_str) else { continue };
        if let Some(first) = names.insert(name, node) {
            problems.push(
                Problem::error(node.origin, format!("two queues are called `{name}`"))
                    .related(first.origin, "the first")
                    .help("combine them, or rename one"),
            );
        }
        if let Some(queue) = config.queues.iter().find(|queue| queue.name == name) {
            Check { node, problems }.queue(queue);
        }
    }
    let upstreams = root.get("upstream").and_then(Node::as_array).unwrap_or_default();
    let of_upstreams = upstreams.iter().filter_map(|node| node.get("route")?.as_array()).flatten();
    let of_inbound = root.get("inbound").and_then(|node| node.get("route")?.as_array()).unwrap_or_default();
    for queue in of_upstreams.chain(of_inbound).filter_map(|route| route.get("queue")) {
        if let Some(name) = queue.get("name")
            && let Some(text) = name.as_str().filter(|name| !names.contains_key(name))
        {
            let problem = Problem::error(name.origin, format!("there is no queue `{text}`")).about_missing();
            problems.push(match did_you_mean(text, names.keys().copied()) {
                Some(near) => problem.label(format!("did you mean `{near}`?")),
                None => problem.help(format!("add a [[queue]] with `name = \"{text}\"`")),
            });
        }
    }
    let routes = config.upstreams.iter().flat_map(|upstream| &upstream.routes).chain(&config.inbound.routes);
    for route in routes.filter_map(|route| route.queue.as_ref()) {
        if route.wait.0.as_secs() > MAX_WAIT {
            let message = format!("`wait` of queue `{}` is longer than {MAX_WAIT}s", route.name);
            problems.push(
                Problem::error(None, message)
                    .help("clients that need longer ask for the state of the delivery"),
            );
        }
    }
}

impl Check<'_> {
    fn queue(&mut self, queue: &QueueSettings) {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        let name = &queue.name;
        if name.is_empty() || name.len() > MAX_NAME || !name.bytes().all(fits) {
            let help = format!("use 1 to {MAX_NAME} letters, digits, `-`, `_` and `.`");
            self.error(&["name"], format!("`{name}` cannot be a queue's name"), help);
        }
        let help = format!("write 1 to {MAX_CONCURRENCY}");
        self.require(
            (1..=MAX_CONCURRENCY).contains(&queue.concurrency),
            &["concurrency"],
            "the number of deliveries at a time is out of range",
            &help,
        );
        let message = "no delivery would ever be attempted";
        self.require(queue.attempts > 0, &["attempts"], message, "write at least 1");
        self.growing(&["backoff"], queue.backoff);
        if let DeliveryOrder::Header(name) = &queue.order {
            self.header_name(&["order"], name);
        }
        for (at, name) in queue.strip.iter().enumerate() {
            self.header_name(&["strip", &at.to_string()], name);
        }
        let (limit, help) = (queue.body_limit.0, "write a size from 1 byte to 64MiB");
        self.require((1..=MAX_BODY_LIMIT).contains(&limit), &["body_limit"], "it is out of range", help);
        let (limit, help) = (queue.result_limit.0, "write at most 64MiB");
        self.require(limit <= MAX_BODY_LIMIT, &["result_limit"], "it is out of range", help);
        let message = "the queue would accept nothing";
        self.require(queue.max_messages > 0, &["max_messages"], message, "write at least 1");
        self.require(queue.max_bytes.0 > 0, &["max_bytes"], message, "write e.g. \"256MiB\"");
        self.require(queue.dead.max > 0, &["dead", "max"], "it must be at least 1", "write e.g. 10000");
    }
}
