use super::*;
use crate::config::{Source, Sources, load_sources};

const FILE: &str = "
[defaults]
timeout = '9s'
[[upstream]]
name = 'payments'
hosts = ['payments', '*.pay']
retry = { max = 1 }
[[upstream.route]]
match = { methods = ['POST'], path = '/v1/charge*' }
retry = { max = 0 }
path_rewrite = '/charge'
request_headers = { set = { x-tier = '1' } }
[[upstream]]
name = 'db'
protocol = 'tcp'
[[upstream]]
name = 'shop'
route = [{ to = 'payments' }]
";

fn explained(text: &str, method: &str, url: &str, headers: &[&str], inbound: bool) -> String {
    let sources = Sources(vec![Source { path: "o.toml".into(), text: text.to_owned() }]);
    let loaded = load_sources(sources, &|_| None).unwrap();
    let headers: Vec<String> = headers.iter().map(ToString::to_string).collect();
    let target = ExplainedRequest::parse(method, url, &headers, inbound).unwrap();
    explain(&loaded, &target).to_string()
}

/// Asserts that a line occurs, with runs of blanks as one.
#[track_caller]
fn says(text: &str, line: &str) {
    let found = text.lines().any(|l| l.split_whitespace().collect::<Vec<_>>().join(" ") == line);
    assert!(found, "{line:?} not in\n{text}");
}

#[test]
fn route_values_and_source_locations_are_shown() {
    let text = explained(FILE, "POST", "http://payments/v1/charge/5?q", &[], false);
    for line in [
        "upstream payments o.toml:4",
        "route POST /v1/charge* o.toml:8",
        "path /charge/5?q o.toml:8",
        "note request header x-tier is set to 1",
        "timeout 9s o.toml:3",
        "retry.max 0 o.toml:10",
        "retry.body_limit 64KiB default (inactive: max = 0)",
        "idle_timeout 5m default",
        "endpoints dns://payments:80 default",
        "identity none default",
    ] {
        says(&text, line);
    }
}

#[test]
fn the_upstream_that_serves_is_shown() {
    let text = explained(FILE, "GET", "http://shop/", &[], false);
    for line in ["upstream shop o.toml:16", "to payments o.toml:18", "endpoints dns://payments:80 default"] {
        says(&text, line);
    }
    // The policy stays that of the route.
    says(&text, "retry.max 2 default");
}

#[test]
fn settings_that_do_not_apply_are_marked() {
    let text = explained(FILE, "GET", "http://payments/", &[], false);
    says(&text, "route none matches: the upstream's own policy");
    says(&text, "retry.max 1 o.toml:7");
    let text = explained(FILE, "POST", "http://x.pay/", &["content-type: application/grpc"], false);
    says(
        &text,
        "timeout 9s o.toml:3 (inactive: gRPC requests have their grpc-timeout, unless a route sets one)",
    );
    says(
        &text,
        "note POST is not retried once it may have reached the service; an attempt that certainly did not is",
    );
    let text = explained(FILE, "CONNECT", "payments:443", &[], false);
    says(&text, "note CONNECT: bytes only, call http://payments/ to get policies");
    says(&text, "timeout 9s o.toml:3 (inactive: bytes only)");
    says(&text, "connect_timeout 1s default");
    says(&text, "max_duration 0s default");
    let text = explained(FILE, "GET", "https://payments/a", &[], false);
    says(&text, "note https goes through CONNECT: bytes only, call http://payments/a to get policies");
    says(&explained(FILE, "GET", "http://db/", &[], false), "note protocol = tcp: bytes only");
}

#[test]
fn hosts_that_no_upstream_names_are_forwarded_or_refused() {
    let text = explained(FILE, "GET", "http://other/", &[], false);
    says(&text, "upstream none names this host: forwarded with the policy of [defaults] o.toml:2");
    says(&explained(FILE, "GET", "http://paiments/", &[], false), "note did you mean `payments`?");
    let text = explained("[outbound]\nunknown = 'deny'", "GET", "http://other/", &[], false);
    assert!(text.contains("refused, unknown = deny") && !text.contains("timeout"), "{text}");
    let text = explained("", "GET", "http://169.254.169.254/", &[], false);
    assert!(text.contains("169.254.0.0/16 is in deny_networks"), "{text}");
}

#[test]
fn inbound_requests_have_their_own_policy() {
    let text = explained(FILE, "GET", "/healthz", &[], true);
    says(&text, "service 127.0.0.1:8080");
    says(&text, "timeout 0s default");
    says(&text, "retry false default");
}

#[test]
fn invalid_requests_are_refused() {
    for (method, url, headers) in [
        ("G T", "http://a/", vec![]),
        ("GET", "/a", vec![]),
        ("GET", "ftp://a/", vec![]),
        ("GET", "http://", vec![]),
        ("CONNECT", "a", vec![]),
        ("GET", "http://a/", vec!["x".to_owned()]),
    ] {
        assert!(ExplainedRequest::parse(method, url, &headers, false).is_err(), "{method} {url} {headers:?}");
    }
}

#[test]
fn it_says_whether_the_cache_answers() {
    const CACHED: &str = "[[upstream]]\nname='up'\ncache = {}\n[[upstream.route]]\nmatch = { path = '/live' }\ncache = false\n\
        [[upstream]]\nname='keyed'\ncache = { authorization = 'key', stale_if_error = '0s' }\n";
    let cached = |method: &str, url: &str, headers: &[&str]| explained(CACHED, method, url, headers, false);
    let fresh = "cache answered from what is stored while that is fresh, else forwarded";
    let stale = "; stale for 10m if that fails";
    says(&cached("GET", "http://up/", &[]), &format!("{fresh}{stale}"));
    says(&cached("GET", "http://keyed/", &[]), fresh);
    says(&cached("GET", "http://keyed/", &[]), "cache.authorization key o.toml:9");
    for (headers, expected) in [
        (
            &["authorization: Bearer a"][..],
            "; with Authorization only responses that say public, s-maxage or must-revalidate",
        ),
        (&["cookie: a=b"], "; with Cookie only responses that say public or vary by Cookie"),
    ] {
        says(&cached("GET", "http://up/", headers), &format!("{fresh}{stale}{expected}"));
    }
    says(
        &cached("GET", "http://keyed/", &["authorization: Bearer a"]),
        &format!("{fresh}; only responses to the same Authorization"),
    );
    says(
        &cached("GET", "http://up/", &["cache-control: no-cache"]),
        "cache forwarded: the request says no-cache; the response replaces what is stored",
    );
    says(
        &cached("POST", "http://up/", &[]),
        "cache forwarded: only GET and HEAD are answered from it; a success removes what is stored for the URL",
    );
    says(&cached("OPTIONS", "http://up/", &[]), "cache forwarded: only GET and HEAD are answered from it");
    says(
        &cached("GET", "http://up/", &["x-http-method-override: DELETE"]),
        "cache forwarded: a field of the request overrides its method",
    );
    assert!(!cached("GET", "http://up/live", &[]).contains("answered from"), "the route has none");
    assert!(!cached("GET", "https://up/", &[]).contains("answered from"), "bytes");
}
