//! Every configuration key, changed while the proxy runs: the new value applies, or the proxy reports that it needs a
//! restart. The schema is walked, so a new key fails here until it has a line.

mod security;

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read, Write},
    net::SocketAddr,
    process::Command,
    sync::Mutex,
    thread,
    time::Duration,
};

use serde_json::Value;
use socket2::{Domain, Socket, Type};

use crate::support::{Launch, Proxy, RawClient, RawServer, binary, eventually, strict::Message};

/// How a key is shown to act after a reload.
enum Coverage {
    /// By a case of this file: what a probe returns before and after.
    Here(Case),
    /// With another key, in one value that is replaced as a whole.
    With(&'static str),
    /// By this test, which changes it by a reload and checks the effect.
    By(&'static str),
    /// It needs a restart, and the status names it. The line changes it.
    Restart(&'static str),
}

/// A key, or the table that contains it, changed by a reload.
#[derive(Clone, Copy)]
struct Case {
    /// Lines of `[[upstream]] up`; of the head of the file if they begin with `[`.
    before: &'static str,
    after: &'static str,
    probe: Probe,
    tells: (&'static str, &'static str),
}

type Probe = fn(&Stage) -> String;

use Coverage::{By, Restart, With};

fn case(
    before: &'static str,
    after: &'static str,
    probe: Probe,
    tells: (&'static str, &'static str),
) -> Coverage {
    Coverage::Here(Case { before, after, probe, tells })
}

/// Policy keys, the same in `[defaults]`, `[inbound]`, `[[upstream]]` and `[[upstream.route]]`: one value, resolved
/// when a file is read. Most of these cases need retries to be off.
fn policy_keys() -> Vec<(&'static str, Coverage)> {
    vec![
        (
            "connect_timeout",
            case(
                "connect_timeout = \"40ms\"\nretry = false",
                "connect_timeout = \"90ms\"\nretry = false",
                full,
                ("40ms", "90ms"),
            ),
        ),
        (
            "timeout",
            case(
                "timeout = \"60ms\"\nretry = false",
                "timeout = \"10s\"\nretry = false",
                |s| s.cause("/slow"),
                ("timeout", "200"),
            ),
        ),
        (
            "attempt_timeout",
            case(
                "attempt_timeout = \"60ms\"\nretry = false",
                "attempt_timeout = \"10s\"\nretry = false",
                |s| s.cause("/slow"),
                ("attempt_timeout", "200"),
            ),
        ),
        (
            "idle_timeout",
            case(
                "idle_timeout = \"60ms\"",
                "idle_timeout = \"10s\"",
                |s| s.body("/stall", ""),
                ("cut", "whole"),
            ),
        ),
        (
            "tunnel_idle_timeout",
            case(
                "tunnel_idle_timeout = \"60ms\"",
                "tunnel_idle_timeout = \"10s\"",
                |s| s.body("/stall", "content-type: application/grpc\r\n"),
                ("cut", "whole"),
            ),
        ),
        (
            "max_duration",
            case(
                "max_duration = \"60ms\"",
                "max_duration = \"10s\"",
                |s| s.body("/stall", ""),
                ("cut", "whole"),
            ),
        ),
        ("retry", With("retry.max")),
        (
            "retry.max",
            case(
                "breaker = false\nretry = { max = 0 }",
                "breaker = false\nretry = { max = 2, backoff = { base = \"1ms\" }, budget = { min_per_second = 1000 } }",
                |s| s.attempts("GET"),
                ("1", "3"),
            ),
        ),
        (
            "retry.on",
            case(
                "breaker = false\nretry = { on = [\"502\"], backoff = { base = \"1ms\" }, budget = { min_per_second = 1000 } }",
                "breaker = false\nretry = { on = [\"503\"], backoff = { base = \"1ms\" }, budget = { min_per_second = 1000 } }",
                |s| s.attempts("GET"),
                ("1", "3"),
            ),
        ),
        (
            "retry.methods",
            case(
                "breaker = false\nretry = { backoff = { base = \"1ms\" }, budget = { min_per_second = 1000 } }",
                "breaker = false\nretry = { methods = \"all\", backoff = { base = \"1ms\" }, budget = { min_per_second = 1000 } }",
                |s| s.attempts("POST"),
                ("1", "3"),
            ),
        ),
        ("retry.backoff.base", With("retry.max")),
        ("retry.backoff.max", With("retry.max")),
        ("retry.body_limit", With("retry.max")),
        ("retry.budget.ratio", By("upstream::policy_state::reload_tests::retry_budget_keys")),
        ("retry.budget.min_per_second", By("upstream::policy_state::reload_tests::retry_budget_keys")),
        ("retry.budget.window", By("upstream::policy_state::reload_tests::retry_budget_keys")),
        (
            "breaker",
            case(
                "retry = false\nbreaker = false",
                "retry = false\nbreaker = { consecutive_failures = 1, open_for = { base = \"60s\" } }",
                |s| s.cause("/503"),
                ("503", "breaker_open"),
            ),
        ),
        (
            "breaker.consecutive_failures",
            By("upstream::policy_state::reload_tests::breaker_consecutive_failures"),
        ),
        (
            "breaker.failure_rate",
            By("upstream::policy_state::reload_tests::breaker_failure_rate_and_min_requests"),
        ),
        (
            "breaker.min_requests",
            By("upstream::policy_state::reload_tests::breaker_failure_rate_and_min_requests"),
        ),
        ("breaker.window", By("upstream::policy_state::reload_tests::breaker_window")),
        (
            "breaker.open_for.base",
            By("upstream::policy_state::reload_tests::breaker_open_for_and_trial_requests"),
        ),
        (
            "breaker.open_for.max",
            By("upstream::policy_state::reload_tests::breaker_open_for_and_trial_requests"),
        ),
        (
            "breaker.trial_requests",
            By("upstream::policy_state::reload_tests::breaker_open_for_and_trial_requests"),
        ),
        ("outlier", By("upstream::policy_state::reload_tests::outlier_keys")),
        ("outlier.consecutive_failures", By("upstream::policy_state::reload_tests::outlier_keys")),
        ("outlier.eject_for.base", By("upstream::policy_state::reload_tests::outlier_keys")),
        ("outlier.eject_for.max", By("upstream::policy_state::reload_tests::outlier_keys")),
        ("outlier.max_ejected", By("upstream::policy_state::reload_tests::outlier_keys")),
        (
            "limits",
            case(
                "limits = { max_connections = 7 }",
                "limits = false",
                |s| s.status("/limits/max_connections"),
                ("7", "null"),
            ),
        ),
        ("limits.max_connections", By("upstream::policy_state::reload_tests::limits_keys")),
        ("limits.max_requests", By("upstream::policy_state::reload_tests::limits_keys")),
        ("limits.max_pending", By("upstream::policy_state::reload_tests::limits_keys")),
        ("limits.pending_timeout", By("upstream::policy_state::reload_tests::limits_keys")),
        ("limits.adaptive", By("upstream::policy_state::reload_tests::limits_keys")),
        ("rate_limit", With("rate_limit.rate")),
        (
            "rate_limit.rate",
            case(
                "rate_limit = { rate = 1, burst = 1 }",
                "rate_limit = { rate = 1000000, burst = 1000000 }",
                |s| (0..3).map(|_| s.cause("/")).next_back().unwrap_or_default(),
                ("rate_limited", "200"),
            ),
        ),
        ("rate_limit.burst", With("rate_limit.rate")),
        ("rate_limit.per", With("rate_limit.rate")),
        ("hedge", With("hedge.after")),
        (
            "hedge.after",
            case(
                "hedge = { after = \"60s\" }",
                "hedge = { after = \"20ms\" }",
                |s| s.attempts_at("GET", "/slow"),
                ("1", "2"),
            ),
        ),
        ("fault", With("fault.abort")),
        (
            "fault.abort",
            case(
                "fault = { abort = 418, abort_ratio = 1 }",
                "fault = { abort = 451, abort_ratio = 1 }",
                |s| s.get("/", "").status().to_string(),
                ("418", "451"),
            ),
        ),
        ("fault.abort_ratio", With("fault.abort")),
        ("fault.delay", With("fault.abort")),
        ("fault.delay_ratio", With("fault.abort")),
        ("fallback", With("fallback.status")),
        (
            "fallback.status",
            case(
                "retry = false\nbreaker = false\nfallback = { status = 203 }",
                "retry = false\nbreaker = false\nfallback = { status = 206 }",
                |s| s.get("/503", "").status().to_string(),
                ("203", "206"),
            ),
        ),
        ("fallback.body", With("fallback.status")),
        ("fallback.content_type", With("fallback.status")),
        ("fallback.upstream", With("fallback.status")),
        (
            "cache",
            case(
                "cache = false",
                "cache = { max_bytes = \"1MiB\" }",
                |s| s.get("/", "").field("cache-status").is_some().to_string(),
                ("false", "true"),
            ),
        ),
        ("cache.max_bytes", With("cache")),
        ("cache.object_limit", With("cache")),
        ("cache.stale_if_error", With("cache")),
        ("cache.stale_while_revalidate", With("cache")),
        ("cache.coalesce", With("cache")),
        ("cache.authorization", With("cache")),
        ("cache.shared_between_peers", With("cache")),
    ]
}

/// All other keys.
fn keys() -> Vec<(&'static str, Coverage)> {
    vec![
        ("service.name", Restart("[service]\nname = \"another\"")),
        ("runtime.workers", Restart("[runtime]\nworkers = 3")),
        ("runtime.drain_delay", By("reload::the_drain_uses_the_times_of_the_last_reload")),
        ("runtime.drain_timeout", By("reload::the_drain_uses_the_times_of_the_last_reload")),
        (
            "runtime.observe",
            case(
                "[runtime]\nobserve = []\n[defaults]\nfault = { abort = 418, abort_ratio = 1 }",
                "[runtime]\nobserve = [\"fault\"]\n[defaults]\nfault = { abort = 418, abort_ratio = 1 }",
                |s| s.get("/", "").status().to_string(),
                ("418", "200"),
            ),
        ),
        ("inbound.route.match", With("inbound.route.queue.name")),
        ("inbound.route.match.methods", With("inbound.route.queue.name")),
        ("inbound.route.match.path", With("inbound.route.queue.name")),
        ("inbound.route.match.headers", With("inbound.route.queue.name")),
        ("inbound.route.name", With("inbound.route.queue.name")),
        ("inbound.route.deprecation.since", With("inbound.route.queue.name")),
        ("inbound.route.deprecation.sunset", With("inbound.route.queue.name")),
        ("inbound.route.deprecation.link", With("inbound.route.queue.name")),
        ("inbound.route.deprecation.after", With("inbound.route.queue.name")),
        ("inbound.route.match.version.header", With("inbound.route.queue.name")),
        ("inbound.route.match.version.media_type", With("inbound.route.queue.name")),
        ("inbound.route.match.version.path", With("inbound.route.queue.name")),
        ("inbound.route.match.version.is", With("inbound.route.queue.name")),
        ("inbound.route.queue.name", By("deliveries::reload::a_route_is_queued_after_a_reload")),
        ("inbound.route.queue.when", By("deliveries::reload::a_route_is_queued_after_a_reload")),
        ("inbound.route.queue.wait", With("inbound.route.queue.name")),
        ("upstream.route.queue.name", By("deliveries::reload::a_route_is_queued_after_a_reload")),
        ("upstream.route.queue.when", By("deliveries::reload::a_route_is_queued_after_a_reload")),
        ("upstream.route.queue.wait", With("upstream.route.queue.name")),
        ("store.path", Restart("[store]\npath = \"/tmp\"")),
        ("store.durability", Restart("[store]\ndurability = \"memory\"")),
        ("store.max_bytes", Restart("[store]\nmax_bytes = \"1MiB\"")),
        ("store.reserve", Restart("[store]\nreserve = \"1MiB\"")),
        ("store.key_file", Restart("[store]\nkey_file = \"/none\"")),
        ("queue.concurrency", By("deliveries::reload::every_key_of_a_queue_applies_after_a_reload")),
        ("queue.rate", By("deliveries::reload::every_key_of_a_queue_applies_after_a_reload")),
        ("queue.order", By("deliveries::reload::every_key_of_a_queue_applies_after_a_reload")),
        ("queue.attempts", By("deliveries::reload::every_key_of_a_queue_applies_after_a_reload")),
        ("queue.backoff.base", By("deliveries::reload::every_key_of_a_queue_applies_after_a_reload")),
        ("queue.backoff.max", By("deliveries::reload::every_key_of_a_queue_applies_after_a_reload")),
        ("queue.permanent", By("deliveries::reload::every_key_of_a_queue_applies_after_a_reload")),
        ("queue.ambiguous", By("deliveries::reload::every_key_of_a_queue_applies_after_a_reload")),
        ("queue.expires", By("deliveries::reload::every_key_of_a_queue_applies_after_a_reload")),
        ("queue.keep_done", By("deliveries::reload::every_key_of_a_queue_applies_after_a_reload")),
        ("queue.result_limit", By("deliveries::reload::every_key_of_a_queue_applies_after_a_reload")),
        ("queue.body_limit", By("deliveries::reload::every_key_of_a_queue_applies_after_a_reload")),
        ("queue.max_messages", By("deliveries::reload::every_key_of_a_queue_applies_after_a_reload")),
        ("queue.max_bytes", By("deliveries::reload::every_key_of_a_queue_applies_after_a_reload")),
        ("queue.dead.keep", By("deliveries::reload::every_key_of_a_queue_applies_after_a_reload")),
        ("queue.dead.max", By("deliveries::reload::every_key_of_a_queue_applies_after_a_reload")),
        ("queue.dead.when_full", By("deliveries::reload::every_key_of_a_queue_applies_after_a_reload")),
        ("queue.strip", By("deliveries::reload::every_key_of_a_queue_applies_after_a_reload")),
        // A queue by another name is another queue.
        ("queue.name", With("queue.concurrency")),
        ("queue.backend", With("queue.concurrency")),
        ("inbound.listen", Restart("[inbound]\nlisten = \"127.0.0.1:1\"")),
        (
            "inbound.forward_to",
            case(
                "[inbound]\nforward_to = \"SERVICE\"",
                "[inbound]\nforward_to = \"REFUSING\"",
                |s| s.inbound("/").status().to_string(),
                ("200", "502"),
            ),
        ),
        ("inbound.mtls", By("config_changes::switching_to_strict_drains_live_plaintext_connections")),
        (
            "inbound.forwarded",
            case(
                "[inbound]\nforward_to = \"SERVICE\"\nforwarded = \"off\"",
                "[inbound]\nforward_to = \"SERVICE\"\nforwarded = \"replace\"",
                |s| s.inbound("/head").text().contains("x-forwarded-proto").to_string(),
                ("false", "true"),
            ),
        ),
        ("inbound.port.port", With("inbound.forward_to")),
        ("inbound.port.mtls", With("inbound.forward_to")),
        ("inbound.port.protocol", With("inbound.forward_to")),
        ("inbound.allow.identity", With("inbound.allow.paths")),
        ("inbound.allow.methods", With("inbound.allow.paths")),
        (
            "inbound.allow.paths",
            case(
                "[inbound]\nforward_to = \"SERVICE\"",
                "[inbound]\nforward_to = \"SERVICE\"\n[[inbound.allow]]\nidentity = [\"spiffe://a.example/b\"]\npaths = [\"/no\"]",
                |s| s.inbound("/").status().to_string(),
                ("200", "403"),
            ),
        ),
        ("inbound.allow.claims", With("inbound.allow.paths")),
        ("inbound.jwt", By("reload::security::every_key_of_jwt_applies_after_a_reload")),
        ("inbound.jwt.issuer", By("reload::security::every_key_of_jwt_applies_after_a_reload")),
        ("inbound.jwt.audiences", By("reload::security::every_key_of_jwt_applies_after_a_reload")),
        ("inbound.jwt.jwks", By("reload::security::every_key_of_jwt_applies_after_a_reload")),
        ("inbound.jwt.ca", By("reload::security::every_key_of_jwt_applies_after_a_reload")),
        ("inbound.jwt.except", By("reload::security::every_key_of_jwt_applies_after_a_reload")),
        ("inbound.jwt.claim_headers", By("reload::security::every_key_of_jwt_applies_after_a_reload")),
        ("outbound.listen", Restart("[outbound]\nlisten = \"127.0.0.1:1\"")),
        (
            "outbound.unknown",
            // The opposite change is held back until it is confirmed.
            case(
                "[outbound]\nunknown = \"forward\"",
                "[outbound]\nunknown = \"deny\"",
                |s| s.stranger("127.0.0.1"),
                ("200", "unknown_upstream"),
            ),
        ),
        (
            "outbound.deny_networks",
            case(
                "[outbound]\ndeny_networks = []",
                "[outbound]\ndeny_networks = [\"127.0.0.0/8\", \"::1/128\"]",
                |s| s.stranger("localhost"),
                ("200", "denied_network"),
            ),
        ),
        ("identity.cert", By("reload::security::every_key_of_identity_applies_after_a_reload")),
        ("identity.key", By("reload::security::every_key_of_identity_applies_after_a_reload")),
        ("identity.ca", By("reload::security::every_key_of_identity_applies_after_a_reload")),
        ("identity.min_tls", By("reload::security::every_key_of_identity_applies_after_a_reload")),
        ("identity.crl", By("reload::security::every_key_of_identity_applies_after_a_reload")),
        ("identity.spiffe", By("identity::workload::a_reload_switches_to_another_agent")),
        ("admin.listen", Restart("[admin]\nlisten = \"127.0.0.1:1\"")),
        ("admin.probe_listen", Restart("[admin]\nprobe_listen = \"127.0.0.1:1\"")),
        ("admin.token_file", Restart("[admin]\ntoken_file = \"/dev/null\"")),
        ("telemetry.otlp", Restart("[telemetry]\notlp = \"http://127.0.0.1:1\"")),
        ("telemetry.protocol", Restart("[telemetry]\nprotocol = \"http\"")),
        ("telemetry.sample", With("telemetry.access_log")),
        ("telemetry.sample_errors", With("telemetry.access_log")),
        (
            "telemetry.access_log",
            case(
                "[telemetry]\naccess_log = \"off\"",
                "[telemetry]\naccess_log = \"all\"",
                |s| {
                    s.get("/", "");
                    s.proxy.stdout().contains("\"duration_ms\"").to_string()
                },
                ("false", "true"),
            ),
        ),
        ("telemetry.access_log_file", By("access_log::all_logs_every_request_and_a_reload_changes_it")),
        (
            "upstream.name",
            case("hosts = [\"up\", \"second\"]", "hosts = [\"up\"]", |s| s.host("second"), ("200", "other")),
        ),
        (
            "upstream.hosts",
            case("hosts = [\"up\"]", "hosts = [\"up\", \"second\"]", |s| s.host("second"), ("other", "200")),
        ),
        (
            "upstream.endpoints",
            case(
                "endpoints = [\"REFUSING\"]\nretry = false",
                "endpoints = [\"SERVICE\"]",
                |s| s.cause("/"),
                ("connect_refused", "200"),
            ),
        ),
        (
            "upstream.protocol",
            case(
                "protocol = \"h2\"\nretry = false",
                "protocol = \"http1\"",
                |s| (s.get("/", "").status() == 200).to_string(),
                ("false", "true"),
            ),
        ),
        (
            "upstream.tls",
            case(
                "tls = \"off\"\nretry = false",
                "tls = \"simple\"\nretry = false",
                |s| (s.get("/", "").status() == 200).to_string(),
                ("true", "false"),
            ),
        ),
        ("upstream.server_name", With("upstream.tls")),
        ("upstream.ca", With("upstream.tls")),
        ("upstream.identity", With("upstream.tls")),
        ("upstream.min_tls", By("reload::security::min_tls_of_an_upstream_applies_after_a_reload")),
        (
            "upstream.balance",
            case(
                "endpoints = [\"SERVICE\", \"OTHER\"]\nbalance = \"hash:header:x-key\"\nretry = false\noutlier = false\nbreaker = false",
                "endpoints = [\"SERVICE\", \"OTHER\"]\nbalance = \"round-robin\"\nretry = false\noutlier = false\nbreaker = false",
                |s| {
                    let which = (0..4).map(|_| s.get("/", "x-key: 1\r\n").status()).collect::<BTreeSet<_>>();
                    which.len().to_string()
                },
                ("1", "2"),
            ),
        ),
        ("upstream.listen", Restart("listen = \"127.0.0.1:1\"")),
        ("upstream.health", With("upstream.health.path")),
        (
            "upstream.health.path",
            case(
                "health = { path = \"/503\", interval = \"20ms\", unhealthy_after = 1, healthy_after = 1 }",
                "health = { path = \"/\", interval = \"20ms\", unhealthy_after = 1, healthy_after = 1 }",
                |s| s.status("/endpoints/0/state"),
                ("unhealthy", "healthy"),
            ),
        ),
        ("upstream.health.grpc", With("upstream.health.path")),
        ("upstream.health.tcp", With("upstream.health.path")),
        ("upstream.health.interval", With("upstream.health.path")),
        ("upstream.health.timeout", With("upstream.health.path")),
        ("upstream.health.unhealthy_after", With("upstream.health.path")),
        ("upstream.health.healthy_after", With("upstream.health.path")),
        (
            "upstream.header_case",
            case(
                "header_case = \"lower\"\nmax_connection_age = \"1ms\"",
                "header_case = \"preserve\"\nmax_connection_age = \"1ms\"",
                |s| s.get("/head", "X-MiXed: 1\r\n").text().contains("X-MiXed").to_string(),
                ("false", "true"),
            ),
        ),
        ("upstream.pool_idle_timeout", With("upstream.header_case")),
        ("upstream.max_connection_age", With("upstream.header_case")),
        ("upstream.tcp_user_timeout", With("upstream.header_case")),
        ("upstream.ping_interval", With("upstream.header_case")),
        ("upstream.ping_timeout", With("upstream.header_case")),
        ("upstream.oauth2", By("reload::security::every_key_of_oauth2_applies_after_a_reload")),
        ("upstream.oauth2.token_url", By("reload::security::every_key_of_oauth2_applies_after_a_reload")),
        ("upstream.oauth2.client_id", By("reload::security::every_key_of_oauth2_applies_after_a_reload")),
        (
            "upstream.oauth2.client_secret_file",
            By("reload::security::every_key_of_oauth2_applies_after_a_reload"),
        ),
        ("upstream.oauth2.scopes", By("reload::security::every_key_of_oauth2_applies_after_a_reload")),
        ("upstream.oauth2.ca", By("reload::security::every_key_of_oauth2_applies_after_a_reload")),
        ("upstream.route.match.methods", With("upstream.route.match.path")),
        ("upstream.route.match.headers", With("upstream.route.match.path")),
        (
            "upstream.route.match.path",
            case(
                "[[upstream.route]]\nmatch = { path = \"/a*\" }\nfault = { abort = 418, abort_ratio = 1 }",
                "[[upstream.route]]\nmatch = { path = \"/b*\" }\nfault = { abort = 418, abort_ratio = 1 }",
                |s| s.get("/a", "").status().to_string(),
                ("418", "200"),
            ),
        ),
        ("upstream.route.to", With("upstream.route.path_rewrite")),
        ("upstream.route.mirror.upstream", With("upstream.route.mirror.ratio")),
        ("upstream.route.mirror.ratio", By("shifting::a_mirror_follows_a_reload")),
        ("upstream.route.mirror.methods", With("upstream.route.mirror.ratio")),
        ("upstream.route.mirror.unsafe", With("upstream.route.mirror.ratio")),
        ("upstream.route.mirror.max_in_flight", With("upstream.route.mirror.ratio")),
        ("upstream.route.mirror.timeout", With("upstream.route.mirror.ratio")),
        ("upstream.route.mirror.credentials", With("upstream.route.mirror.ratio")),
        ("upstream.route.to.weight", By("shifting::a_share_that_was_set_lasts_until_the_file_changes_it")),
        ("upstream.route.to.upstream", With("upstream.route.to.weight")),
        ("upstream.route.sticky", With("upstream.route.to.weight")),
        ("upstream.route.name", With("upstream.route.to.weight")),
        ("upstream.route.deprecation.since", By("shifting::a_deprecation_is_announced_after_a_reload")),
        ("upstream.route.deprecation.sunset", With("upstream.route.deprecation.since")),
        ("upstream.route.deprecation.link", With("upstream.route.deprecation.since")),
        ("upstream.route.deprecation.after", With("upstream.route.deprecation.since")),
        ("upstream.route.match.version.header", With("upstream.route.deprecation.since")),
        ("upstream.route.match.version.media_type", With("upstream.route.deprecation.since")),
        ("upstream.route.match.version.path", With("upstream.route.deprecation.since")),
        ("upstream.route.match.version.is", With("upstream.route.deprecation.since")),
        (
            "upstream.route.path_rewrite",
            case(
                "[[upstream.route]]\nmatch = { path = \"/a*\" }\npath_rewrite = \"/head\"",
                "[[upstream.route]]\nmatch = { path = \"/a*\" }\npath_rewrite = \"/\"",
                |s| s.get("/a", "").text().contains("GET /head").to_string(),
                ("true", "false"),
            ),
        ),
        (
            "upstream.route.request_headers.set",
            case(
                "[[upstream.route]]\nmatch = { path = \"/*\" }\nrequest_headers = { set = { x-tier = \"1\" } }",
                "[[upstream.route]]\nmatch = { path = \"/*\" }\nrequest_headers = { set = { x-tier = \"2\" } }",
                |s| s.get("/head", "").text().contains("x-tier: 2").to_string(),
                ("false", "true"),
            ),
        ),
        ("upstream.route.request_headers.remove", With("upstream.route.request_headers.set")),
        ("upstream.route.response_headers.set", With("upstream.route.request_headers.set")),
        ("upstream.route.response_headers.remove", With("upstream.route.request_headers.set")),
    ]
}

/// A service, an address that refuses connections, one that never accepts them, and the proxy.
struct Stage {
    proxy: Proxy,
    service: SocketAddr,
}

/// `/`: 200 · `/slow`: after 300 ms · `/stall`: a pause of 300 ms in the body · `/503` · `/head`: the request's own
/// head.
fn serve(stream: std::net::TcpStream) {
    respond(stream, "200 OK");
}

fn serve_other(stream: std::net::TcpStream) {
    respond(stream, "201 Created");
}

fn respond(mut stream: std::net::TcpStream, success: &str) {
    let mut buffer = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        while !buffer.windows(4).any(|window| window == b"\r\n\r\n") {
            match stream.read(&mut chunk) {
                Ok(0) | Err(_) => return,
                Ok(count) => buffer.extend_from_slice(&chunk[..count]),
            }
        }
        let head = String::from_utf8_lossy(&buffer).into_owned();
        buffer.clear();
        let attempt = head.lines().find_map(|line| line.strip_prefix("x-outrigger-attempt: ")).unwrap_or("");
        let path = head.split(' ').nth(1).unwrap_or_default();
        let (status, body) = match path {
            "/503" => ("503 Service Unavailable", attempt.to_owned()),
            "/head" => (success, head.clone()),
            _ => (success, attempt.to_owned()),
        };
        if path == "/slow" {
            thread::sleep(Duration::from_millis(300));
        }
        let length = body.len() + if path == "/stall" { 4 } else { 0 };
        let kind = if head.contains("application/grpc") { "application/grpc" } else { "text/plain" };
        let response =
            format!("HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n\r\n{body}");
        if stream.write_all(response.as_bytes()).is_err() {
            return;
        }
        if path == "/stall" {
            thread::sleep(Duration::from_millis(300));
            if stream.write_all(b"rest").is_err() {
                return;
            }
        }
    }
}

/// An address with a full backlog: connections to it are neither accepted nor refused.
fn full_backlog() -> SocketAddr {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("a port");
    socket.listen(0).expect("listen");
    let address = socket.local_addr().ok().and_then(|address| address.as_socket()).expect("its address");
    for _ in 0..4 {
        let filler = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        filler.set_nonblocking(true).expect("non-blocking");
        let _ = filler.connect(&address.into());
        std::mem::forget(filler);
    }
    std::mem::forget(socket);
    address
}

fn full(stage: &Stage) -> String {
    let text = stage.get("/", "Host: full\r\n").text();
    ["40ms", "90ms"].into_iter().find(|limit| text.contains(limit)).unwrap_or("neither").to_owned()
}

impl Stage {
    fn get(&self, path: &str, fields: &str) -> Message {
        let host = if fields.contains("Host:") { "" } else { "Host: up\r\n" };
        let request = format!("GET {path} HTTP/1.1\r\n{host}{fields}\r\n");
        RawClient::connect(self.proxy.outbound()).ask(request)
    }

    fn inbound(&self, path: &str) -> Message {
        RawClient::connect(self.proxy.inbound()).ask(format!("GET {path} HTTP/1.1\r\nHost: here\r\n\r\n"))
    }

    /// The status, or the cause if the proxy generated the response.
    fn cause_of(response: &Message) -> String {
        let cause = response.field("proxy-status").and_then(|field| {
            field.split("error=").nth(1)?.split("details=\"").nth(1)?.split('"').next().map(str::to_owned)
        });
        cause.unwrap_or_else(|| response.status().to_string())
    }

    fn cause(&self, path: &str) -> String {
        Self::cause_of(&self.get(path, ""))
    }

    fn host(&self, host: &str) -> String {
        match self.get("/", &format!("Host: {host}\r\n")).status() {
            200 => "200".to_owned(),
            _ => "other".to_owned(),
        }
    }

    /// Through the forward proxy, to the service's address under this name.
    fn stranger(&self, name: &str) -> String {
        let to = format!("{name}:{}", self.service.port());
        let request = format!("GET http://{to}/ HTTP/1.1\r\nHost: {to}\r\n\r\n");
        Self::cause_of(&RawClient::connect(self.proxy.outbound()).ask(request))
    }

    /// Whether a stalling body arrives.
    fn body(&self, path: &str, fields: &str) -> String {
        let mut client = RawClient::connect(self.proxy.outbound());
        client.send(format!("GET {path} HTTP/1.1\r\nHost: up\r\nConnection: close\r\n{fields}\r\n"));
        let (bytes, _) = client.read_to_close();
        if bytes.ends_with(b"rest") { "whole".to_owned() } else { "cut".to_owned() }
    }

    fn attempts(&self, method: &str) -> String {
        self.attempts_at(method, "/503")
    }

    /// The number of the last attempt.
    fn attempts_at(&self, method: &str, path: &str) -> String {
        let before = self.retries();
        let length = if method == "POST" { "Content-Length: 0\r\n" } else { "" };
        RawClient::connect(self.proxy.outbound())
            .ask(format!("{method} {path} HTTP/1.1\r\nHost: up\r\n{length}\r\n"));
        (1 + self.retries() - before).to_string()
    }

    fn retries(&self) -> u64 {
        let retries = &self.whole_status()["upstreams"][0]["retries"];
        ["sent", "hedge"].iter().filter_map(|word| retries[word].as_u64()).sum()
    }

    fn whole_status(&self) -> Value {
        let request = "GET /status HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
        let response = RawClient::connect(self.proxy.admin()).ask(request);
        serde_json::from_str(&response.text()).expect("JSON")
    }

    /// A value of the upstream's status, by JSON pointer.
    fn status(&self, pointer: &str) -> String {
        let status = self.whole_status();
        match status["upstreams"][0].pointer(pointer) {
            Some(Value::String(text)) => text.clone(),
            Some(value) => value.to_string(),
            None => "null".to_owned(),
        }
    }
}

/// The addresses that a configuration may name.
#[derive(Clone, Copy)]
struct Addresses {
    service: SocketAddr,
    /// Another service, which responds with 201.
    other: SocketAddr,
    refuses: SocketAddr,
    /// Neither accepts nor refuses.
    full: SocketAddr,
}

impl Addresses {
    fn new(service: &RawServer, other: &RawServer) -> Self {
        let (service, other) = (service.address(), other.address());
        Self { service, other, refuses: crate::support::refusing_address(), full: full_backlog() }
    }

    fn config(&self, lines: &str) -> String {
        let of_upstream = !lines.starts_with('[') || lines.starts_with("[[upstream.route]]");
        let (head, of_up) = if of_upstream { ("", lines) } else { (lines, "") };
        let endpoints = if of_up.contains("endpoints") { "" } else { "endpoints = [\"SERVICE\"]\n" };
        // The same policies for the upstream that accepts nothing.
        let second = if of_up.starts_with("connect_timeout") { of_up } else { "" };
        let text = format!(
            "{head}\n[[upstream]]\nname = \"up\"\n{endpoints}{of_up}\n[[upstream]]\nname = \"full\"\nendpoints = [\"FULL\"]\n{second}\n"
        );
        text.replace("SERVICE", &self.service.to_string())
            .replace("OTHER", &self.other.to_string())
            .replace("REFUSING", &self.refuses.to_string())
            .replace("FULL", &self.full.to_string())
    }
}

/// The keys of the schema, dotted.
fn schema_keys() -> BTreeSet<String> {
    fn walk(root: &Value, node: &Value, path: &str, keys: &mut BTreeSet<String>) {
        let node = match node["$ref"].as_str() {
            Some(reference) => root.pointer(reference.trim_start_matches('#')).unwrap_or(&Value::Null),
            None => node,
        };
        if let Some(properties) = node["properties"].as_object() {
            for (name, property) in properties {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                keys.insert(path.clone());
                walk(root, property, &path, keys);
            }
        }
        if node["items"].is_object() {
            walk(root, &node["items"], path, keys);
        }
        for several in ["anyOf", "oneOf", "allOf"] {
            for one in node[several].as_array().into_iter().flatten() {
                walk(root, one, path, keys);
            }
        }
    }
    let output = Command::new(binary()).args(["config", "schema"]).output().expect("the binary runs");
    let schema: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let mut keys = BTreeSet::new();
    walk(&schema, &schema, "", &mut keys);
    keys
}

/// Every key of the schema has a line above, and every line has a key.
#[test]
fn every_key_has_a_reload_case() {
    let policy: BTreeMap<_, _> = policy_keys().into_iter().collect();
    let others: BTreeMap<_, _> = keys().into_iter().collect();
    let all = schema_keys();
    let holders = ["defaults.", "inbound.", "upstream.route.", "upstream."];
    let as_policy = |key: &str| holders.iter().find_map(|holder| key.strip_prefix(holder)).map(str::to_owned);
    // A table is covered by its keys.
    let is_table = |key: &str| all.iter().any(|other| other.starts_with(&format!("{key}.")));
    let missing: Vec<&String> = all
        .iter()
        .filter(|key| {
            let known = others.contains_key(key.as_str())
                || as_policy(key).is_some_and(|key| policy.contains_key(key.as_str()));
            !known && !is_table(key)
        })
        .collect();
    assert!(missing.is_empty(), "no line says how a reload of these keys is shown to act: {missing:?}");
    let stale: Vec<_> = others
        .keys()
        .filter(|key| !all.contains(**key))
        .chain(policy.keys().filter(|key| !all.contains(&format!("defaults.{key}"))))
        .collect();
    assert!(stale.is_empty(), "no such keys: {stale:?}");
    for (key, shown) in others.iter().chain(&policy) {
        if let With(other) = shown {
            let lines = [others.get(other), policy.get(other)];
            let by_itself = |line: &Coverage| !matches!(line, With(_));
            assert!(
                lines.into_iter().flatten().any(by_itself),
                "{key} travels with {other}, which shows nothing"
            );
        }
        if let By(test) = shown {
            assert!(exists(test), "{key}: there is no test {test}");
        }
    }
}

/// Whether a test, or a module of tests, exists: `module::test`, `module::`.
fn exists(test: &str) -> bool {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let (module, name) = test.rsplit_once("::").unwrap_or((test, ""));
    let module = module.replace("::", "/");
    let files = ["src", "tests/it"].iter().flat_map(|folder| {
        let path = root.join(folder).join(&module);
        [path.with_extension("rs"), path.join("mod.rs")]
    });
    files
        .filter_map(|file| std::fs::read_to_string(file).ok())
        .any(|text| text.contains(&format!("fn {name}")))
}

/// Makes the change of a case and probes.
fn check(key: &str, case: &Case, addresses: Addresses) -> Result<(), String> {
    let proxy = Launch::new(addresses.config(case.before)).start();
    let stage = Stage { proxy, service: addresses.service };
    let settles = |expected: &str| {
        let begin = std::time::Instant::now();
        loop {
            let probed = (case.probe)(&stage);
            if probed == expected {
                return Ok(());
            }
            if begin.elapsed() > crate::support::WAIT_LIMIT {
                return Err(format!("{key}: `{probed}`, not `{expected}`\n{}", stage.proxy.stderr()));
            }
            thread::sleep(Duration::from_millis(20));
        }
    };
    settles(case.tells.0)?;
    stage.proxy.reconfigure(&addresses.config(case.after));
    settles(case.tells.1)
}

#[test]
fn every_reloadable_key_applies_after_a_reload() {
    let (service, other) = (RawServer::start(serve), RawServer::start(serve_other));
    let addresses = Addresses::new(&service, &other);
    let cases = policy_keys().into_iter().chain(keys());
    let cases: Vec<_> = cases
        .filter_map(|(key, shown)| match shown {
            Coverage::Here(case) => Some((key, case)),
            _ => None,
        })
        .collect();
    assert!(cases.len() > 25);
    let (queue, failed) = (Mutex::new(cases), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                loop {
                    let Some((key, case)) = queue.lock().expect("no panic").pop() else { return };
                    if let Err(why) = check(key, &case, addresses) {
                        failed.lock().expect("no panic").push(why);
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().expect("no panic");
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

#[test]
fn every_key_that_needs_a_restart_is_reported() {
    let (service, other) = (RawServer::start(serve), RawServer::start(serve_other));
    let addresses = Addresses::new(&service, &other);
    let stage = Stage { proxy: Launch::new(addresses.config("")).start(), service: addresses.service };
    for (key, shown) in keys() {
        let Restart(line) = shown else { continue };
        stage.proxy.reconfigure(&addresses.config(line));
        let named = key.replace("upstream.listen", "upstream.up.listen");
        eventually(&format!("the status to say that {named} needs a restart"), || {
            stage.whole_status()["config"]["restart_needed"]
                .as_array()
                .is_some_and(|keys| keys.contains(&named.clone().into()))
        });
    }
}

/// A drain uses `drain_delay` and `drain_timeout` as they are in the file when it begins.
#[test]
fn the_drain_uses_the_times_of_the_last_reload() {
    let service = RawServer::start(serve);
    let address = service.address();
    let file = |delay: &str, timeout: &str| {
        format!(
            "[runtime]\ndrain_delay = \"{delay}\"\ndrain_timeout = \"{timeout}\"\n[inbound]\nforward_to = \"{address}\"\n"
        )
    };
    let mut proxy = Launch::new(file("600s", "600s")).start();
    // An endless request: its body never arrives.
    let mut client = RawClient::connect(proxy.inbound());
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n");
    proxy.reconfigure(&file("50ms", "100ms"));
    eventually("the reload", || proxy.stderr().contains("the configuration was read again"));
    proxy.signal("TERM");
    proxy.wait();
}
