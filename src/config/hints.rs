//! Suggestions for keys, values and notations of other proxies.

use super::node::{Node, Value};

/// Keys of Envoy, nginx, HAProxy and Linkerd, and their counterparts here.
const KEYS: &[(&str, &str)] = &[
    ("circuit_breaker", "`breaker`"),
    ("circuit_breakers", "`breaker` (failures) and `limits` (requests and connections)"),
    ("outlier_detection", "`outlier`"),
    ("max_fails", "`outlier = { consecutive_failures = … }`"),
    ("fail_timeout", "`outlier = { eject_for = … }`"),
    ("base_ejection_time", "`eject_for = { base = … }`"),
    ("max_ejection_percent", "`max_ejected`, a ratio from 0 to 1"),
    ("consecutive_5xx", "`consecutive_failures`"),
    ("lb_policy", "`balance`"),
    ("load_balancing", "`balance`"),
    ("load_balancer", "`balance`"),
    ("hash_policy", "`balance = \"hash:header:NAME\"`"),
    ("proxy_pass", "`endpoints`, in an [[upstream]]"),
    ("backend", "`endpoints`, in an [[upstream]]"),
    ("backends", "`endpoints`, in an [[upstream]]"),
    ("server", "`endpoints`, in an [[upstream]]"),
    ("servers", "`endpoints`, in an [[upstream]]"),
    ("address", "`endpoints`, or `listen`"),
    ("load_assignment", "`endpoints`"),
    ("cluster", "[[upstream]]"),
    ("clusters", "[[upstream]]"),
    ("upstreams", "[[upstream]]"),
    ("service_name", "`name`, in [service]"),
    ("listener", "`listen`, in [inbound] and [outbound]"),
    ("listeners", "`listen`, in [inbound] and [outbound]"),
    ("bind", "`listen`"),
    ("port", "`listen`"),
    ("virtual_hosts", "`hosts`, in an [[upstream]]"),
    ("server_names", "`hosts`, in an [[upstream]]"),
    ("domains", "`hosts`"),
    ("host", "`hosts`"),
    ("routes", "[[upstream.route]]"),
    ("location", "[[upstream.route]]"),
    ("locations", "[[upstream.route]]"),
    ("prefix", "`match = { path = \"/prefix*\" }`"),
    ("prefix_rewrite", "`path_rewrite`"),
    ("rewrite", "`path_rewrite`"),
    ("retries", "`retry = { max = … }`"),
    ("retry_policy", "`retry`"),
    ("num_retries", "`max`"),
    ("max_retries", "`retry = { max = … }`"),
    ("retry_on", "`on`, in `retry`"),
    ("proxy_next_upstream", "`retry = { on = … }`"),
    ("proxy_next_upstream_tries", "`retry = { max = … }`"),
    ("retry_budget", "`budget`, in `retry`"),
    ("per_try_timeout", "`attempt_timeout`"),
    ("request_timeout", "`timeout`"),
    ("proxy_read_timeout", "`timeout`, and `idle_timeout` for bodies"),
    ("proxy_connect_timeout", "`connect_timeout`"),
    ("stream_idle_timeout", "`idle_timeout`"),
    ("keepalive_timeout", "`pool_idle_timeout`"),
    ("hedge_policy", "`hedge`"),
    ("max_pending_requests", "`max_pending`, in `limits`"),
    ("adaptive_concurrency", "`adaptive`, in `limits`"),
    ("rate_limits", "`rate_limit`"),
    ("local_ratelimit", "`rate_limit`"),
    ("limit_req", "`rate_limit`"),
    ("health_check", "`health`"),
    ("health_checks", "`health`"),
    ("tls_context", "`tls`"),
    ("transport_socket", "`tls`"),
    ("sni", "`server_name`"),
    ("ca_file", "`ca`"),
    ("trusted_ca", "`ca`"),
    ("cert_file", "`cert`"),
    ("key_file", "`key`"),
    ("ssl_certificate", "`cert`, in [identity]"),
    ("ssl_certificate_key", "`key`, in [identity]"),
    ("http2_protocol_options", "`protocol = \"h2\"`"),
    ("rbac", "[[inbound.allow]]"),
    ("jwt_authn", "[inbound.jwt]"),
    ("request_headers_to_add", "`request_headers = { set = { … } }`"),
    ("response_headers_to_add", "`response_headers = { set = { … } }`"),
    ("proxy_set_header", "`request_headers = { set = { … } }`"),
    ("headers", "`request_headers` and `response_headers`"),
    ("worker_processes", "`workers`, in [runtime]"),
    ("concurrency", "`workers`, in [runtime]"),
    ("tracing", "[telemetry]"),
    ("stats", "[admin]"),
    ("logging", "`--log` on the command line, or `access_log` in [telemetry]"),
];

/// Values of other proxies and common spellings, and the values to write here.
const WORDS: &[(&str, &str)] = &[
    ("http2", "h2"),
    ("http/2", "h2"),
    ("h2c", "h2"),
    ("grpc", "h2"),
    ("http", "http1"),
    ("http/1", "http1"),
    ("http/1.1", "http1"),
    ("http1.1", "http1"),
    ("round_robin", "round-robin"),
    ("roundrobin", "round-robin"),
    ("least_request", "least-request"),
    ("least_conn", "least-request"),
    ("leastconn", "least-request"),
    ("random", "p2c"),
    ("ewma", "p2c"),
    ("peak_ewma", "p2c"),
    ("ring_hash", "hash:header:NAME"),
    ("maglev", "hash:header:NAME"),
    ("ip_hash", "hash:header:NAME"),
    ("required", "strict"),
    ("optional", "permissive"),
    ("disabled", "off"),
    ("none", "off"),
    ("disable", "off"),
    ("mtls", "mutual"),
    ("istio_mutual", "mutual"),
    ("allow", "forward"),
    ("reject", "deny"),
];

/// The counterpart of another proxy's key.
pub fn suggest_key(written: &str) -> Option<String> {
    let written = written.to_ascii_lowercase().replace('-', "_");
    let (_, counterpart) = KEYS.iter().find(|(other, _)| *other == written)?;
    Some(format!("here it is {counterpart}"))
}

/// The value that corresponds to another proxy's, if it is possible here.
pub fn suggest_word(written: &str, is_possible: impl Fn(&str) -> bool) -> Option<&'static str> {
    let written = written.to_ascii_lowercase();
    WORDS.iter().find(|(other, value)| *other == written && is_possible(value)).map(|(_, value)| *value)
}

/// What to write instead of a value of the wrong type whose intent is clear.
pub fn suggest_value(key: &str, node: &Node) -> Option<String> {
    let written = match (key, &node.value) {
        ("retry", Value::Integer(max)) => format!("{{ max = {max} }}"),
        ("limits", Value::Integer(most)) => format!("{{ max_requests = {most} }}"),
        ("rate_limit", Value::Integer(rate)) => format!("{{ rate = {rate}, burst = {rate} }}"),
        ("breaker" | "outlier", Value::Integer(failures)) => {
            format!("{{ consecutive_failures = {failures} }}")
        }
        ("hedge", Value::String { text, .. }) => format!("{{ after = {text:?} }}"),
        ("health", Value::String { text, .. }) if text.starts_with('/') => format!("{{ path = {text:?} }}"),
        ("fallback", Value::Integer(status)) => format!("{{ status = {status} }}"),
        ("match", Value::String { text, .. }) => format!("{{ path = {text:?} }}"),
        ("backoff" | "open_for" | "eject_for", Value::String { text, .. }) => {
            format!("{{ base = {text:?} }}")
        }
        (
            "hosts" | "methods" | "paths" | "identity" | "audiences" | "on" | "deny_networks" | "observe"
            | "scopes" | "except" | "remove",
            Value::String { text, .. },
        ) => format!("[{text:?}]"),
        ("retry" | "breaker" | "outlier" | "limits", Value::Bool(true)) => {
            return Some(format!("leave `{key}` out for its defaults, or write a table"));
        }
        _ => return None,
    };
    Some(format!("write `{key} = {written}`"))
}

/// The message for a file in another notation; `None` if it may be TOML.
pub fn foreign_notation(text: &str) -> Option<&'static str> {
    let lines = text.lines().map(str::trim_end);
    let mut lines = lines.filter(|line| !line.is_empty() && !line.trim_start().starts_with('#'));
    let first = lines.next()?;
    let is_yaml = |line: &str| {
        let (key, rest) = line.trim_start().trim_start_matches("- ").split_once(':').unwrap_or_default();
        let is_key =
            !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte));
        is_key && (rest.is_empty() || rest.starts_with(' ')) && !line.contains('=')
    };
    if first == "---" || is_yaml(first) {
        return Some(
            "this is YAML, and the configuration is TOML: write `key = value`, and `[section]` for a table",
        );
    }
    if first.starts_with('{') {
        return Some(
            "this is JSON, and the configuration is TOML: write `key = value`, and `[section]` for a table",
        );
    }
    let is_nginx = |line: &str| line.ends_with('{') && !line.contains('=');
    is_nginx(first).then_some(
        "this is another proxy's notation, and the configuration is TOML: write `key = value`, and `[section]` for a table",
    )
}

#[cfg(test)]
mod tests {
    use crate::config::{Diagnostics, Source, Sources, load_sources};

    fn problems(text: &str) -> Diagnostics {
        let sources = Sources(vec![Source { path: "o.toml".into(), text: text.to_owned() }]);
        load_sources(sources, &|_| None).unwrap_err()
    }

    /// The text of a file, and what its only problem must contain.
    const HINTS: &[(&str, &str)] = &[
        ("[[upstream]]\nname='a'\nprotocol='http2'", "did you mean \"h2\"?"),
        ("[[upstream]]\nname='a'\nbalance='round_robin'", "did you mean \"round-robin\"?"),
        ("[[upstream]]\nname='a'\nbalance='least_conn'", "did you mean \"least-request\"?"),
        ("[[upstream]]\nname='a'\ncircuit_breaker={}", "here it is `breaker`"),
        ("[[upstream]]\nname='a'\nlb_policy='p2c'", "here it is `balance`"),
        ("[[upstream]]\nname='a'\nproxy_pass='http://b'", "here it is `endpoints`"),
        ("clusters=[]", "here it is [[upstream]]"),
        ("[defaults]\nretry=3", "write `retry = { max = 3 }`"),
        ("[defaults]\nrate_limit=50", "write `rate_limit = { rate = 50, burst = 50 }`"),
        ("[defaults]\nhedge='p95'", "write `hedge = { after = \"p95\" }`"),
        ("[defaults]\nbreaker=true", "leave `breaker` out for its defaults"),
        ("[[upstream]]\nname='a'\nhosts='b'", "write `hosts = [\"b\"]`"),
        ("[[upstream]]\nname='a'\nhealth='/healthz'", "write `health = { path = \"/healthz\" }`"),
        ("[inbound]\nforward_to='http://127.0.0.1:8080/'", "write \"127.0.0.1:8080\""),
        ("[inbound]\nforward_to='http://app'", "write \"app:80\""),
        ("[inbound]\nforward_to=8080", "write \"127.0.0.1:8080\""),
        ("[inbound]\nforward_to='8080'", "write \"127.0.0.1:8080\""),
        ("[inbound]\nlisten=':4143'", "write \"[::]:4143\""),
        ("[inbound]\nlisten='*:4143'", "write \"[::]:4143\""),
        ("[outbound]\nlisten=4140", "write \"127.0.0.1:4140\""),
        ("[[upstream]]\nname='a'\nendpoints='http://b:8080'", "write \"dns://b:8080\""),
        ("[[upstream]]\nname='a'\nendpoints='b:8080'", "write \"dns://b:8080\""),
        ("[[upstream]]\nname='a'\nendpoints='10.0.0.1:8080'", "write [\"10.0.0.1:8080\"]"),
        ("[[upstream]]\nname='a'\nendpoints=['http://b:8080']", "write \"b:8080\""),
        ("[[upstream]]\nname='a'\nhosts=['http://b/']", "write \"b\""),
        ("inbound:\n  listen: \"[::]:4143\"\n", "this is YAML, and the configuration is TOML"),
        ("---\ninbound:\n  - a\n", "this is YAML"),
        ("{\"inbound\": {}}", "this is JSON"),
        ("server {\n  listen 80;\n}\n", "another proxy's notation"),
    ];

    #[test]
    fn notations_of_other_proxies_get_suggestions() {
        for (text, hint) in HINTS {
            let found = problems(text);
            let rendered = found.to_string();
            assert_eq!(found.count().0, 1, "one problem for\n{text}\n{rendered}");
            assert!(rendered.contains(hint), "{hint} is not in\n{rendered}");
        }
    }
}
