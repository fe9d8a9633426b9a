//! Duration histograms with exemplars, and their consumers: promtool, Prometheus, the alert rules, the dashboard.

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use http::StatusCode;
use serde_json::Value;

use crate::support::{Daemon, Proxy, RawClient, Upstream, eventually, free_port, has_tool, text, tool};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

/// A service that responds with the status at the end of its path.
fn service() -> Upstream {
    Upstream::http1(|request| async move {
        let mut response = text("a");
        let status = request.uri().path().rsplit('/').next().and_then(|status| status.parse::<u16>().ok());
        if let Some(status) = status.and_then(|status| StatusCode::from_u16(status).ok()) {
            *response.status_mut() = status;
        }
        response
    })
}

/// The service behind `inbound`, and as the upstream `up`.
fn proxy(service: &Upstream, more: &str) -> Proxy {
    let address = service.address();
    Proxy::start(format!(
        "[inbound]\nforward_to = \"{address}\"\n{more}\n\
         [[upstream]]\nname = \"up\"\nhosts = [\"up.example\", \"up\"]\nendpoints = [\"{address}\"]\nretry = false\nbreaker = false\n",
    ))
}

fn get(target: &str, more: &str) -> String {
    format!("GET {target} HTTP/1.1\r\nHost: up\r\n{more}\r\n")
}

fn scrape(proxy: &Proxy, accept: &str) -> (String, String) {
    let mut client = RawClient::connect(proxy.admin());
    let request =
        format!("GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept: {accept}\r\nConnection: close\r\n\r\n");
    let response = client.ask(request);
    assert_eq!(response.status(), 200, "{response:?}");
    (response.field("content-type").unwrap_or_default().to_owned(), response.text())
}

fn metrics(proxy: &Proxy) -> String {
    scrape(proxy, "*/*").1
}

fn config_file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("config").join(name)
}

fn promtool(arguments: &[&str], directory: &Path, stdin: &str) {
    let mut command = Command::new(tool("promtool").expect("promtool"));
    command.args(arguments).current_dir(directory);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("promtool starts");
    child.stdin.take().expect("piped").write_all(stdin.as_bytes()).expect("it reads");
    let output = child.wait_with_output().expect("it ends");
    let said =
        [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat();
    assert!(output.status.success(), "promtool {arguments:?}: {said}");
}

#[test]
fn requests_are_counted_by_outcome() {
    let service = service();
    let proxy = proxy(&service, "");
    let mut inbound = RawClient::connect(proxy.inbound());
    let mut outbound = RawClient::connect(proxy.outbound());
    for (target, status) in [("/200", 200), ("/200", 200), ("/404", 404), ("/503", 503)] {
        assert_eq!(inbound.ask(get(target, "")).status(), status);
        assert_eq!(outbound.ask(get(target, "")).status(), status);
    }
    outbound.ask("BREW /200 HTTP/1.1\r\nHost: up\r\nContent-Length: 0\r\n\r\n");
    // Rejected before it had an upstream.
    RawClient::connect(proxy.outbound()).ask("GET http://up:x/ HTTP/1.1\r\nHost: up:x\r\n\r\n");
    let up = "upstream=\"up\",server_address=\"up.example\"";
    let metrics = metrics(&proxy);
    for line in [
        "http_server_request_duration_seconds_count{http_request_method=\"GET\",http_response_status_code=\"200\"} 2",
        "http_server_request_duration_seconds_count{http_request_method=\"GET\",http_response_status_code=\"404\"} 1",
        "http_server_request_duration_seconds_count{http_request_method=\"GET\",http_response_status_code=\"503\",error_type=\"503\"} 1",
        &format!(
            "http_client_request_duration_seconds_count{{http_request_method=\"GET\",http_response_status_code=\"200\",{up}}} 2"
        ),
        &format!(
            "http_client_request_duration_seconds_count{{http_request_method=\"GET\",http_response_status_code=\"404\",error_type=\"404\",{up}}} 1"
        ),
        &format!(
            "http_client_request_duration_seconds_count{{http_request_method=\"_OTHER\",http_response_status_code=\"200\",{up}}} 1"
        ),
        "http_client_request_duration_seconds_count{http_request_method=\"GET\",http_response_status_code=\"400\",error_type=\"malformed\",upstream=\"none\"} 1",
        "# UNIT http_client_request_duration_seconds seconds",
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line} is not in\n{metrics}");
    }
    for bound in [
        "0.005", "0.01", "0.025", "0.05", "0.075", "0.1", "0.25", "0.5", "0.75", "1.0", "2.5", "5.0", "7.5",
        "10.0", "+Inf",
    ] {
        assert!(metrics.contains(&format!("{up},le=\"{bound}\"}}")), "{bound} is not in\n{metrics}");
    }
    assert!(metrics.ends_with("# EOF\n"));
}

#[test]
fn an_exemplar_has_the_clients_trace_id() {
    let service = service();
    let proxy = proxy(&service, "");
    let mut client = RawClient::connect(proxy.outbound());
    let unsampled = TRACE.replace('0', "1");
    for (trace, flag) in [(TRACE, "01"), (unsampled.as_str(), "00")] {
        let field = format!("traceparent: 00-{trace}-b7ad6b7169203331-{flag}\r\n");
        assert_eq!(client.ask(get("/200", &field)).status(), 200);
    }
    let text = metrics(&proxy);
    let exemplar = text
        .lines()
        .filter(|line| line.starts_with("http_client_request_duration_seconds_bucket{"))
        .find_map(|line| line.split_once(" # "));
    let (series, exemplar) = exemplar.unwrap_or_else(|| panic!("no exemplar in\n{text}"));
    assert!(series.contains("upstream=\"up\""), "{series}");
    assert!(exemplar.starts_with(&format!("{{trace_id=\"{TRACE}\",span_id=\"")), "{exemplar}");
    assert!(!text.contains(&unsampled), "that trace is not exported");
}

#[test]
fn the_exposition_format_follows_the_accept_header() {
    let service = service();
    let proxy = proxy(&service, "");
    let field = format!("traceparent: 00-{TRACE}-b7ad6b7169203331-01\r\n");
    RawClient::connect(proxy.outbound()).ask(get("/200", &field));
    let (kind, open_metrics) = scrape(&proxy, "application/openmetrics-text;version=1.0.0,text/plain;q=0.5");
    assert!(kind.starts_with("application/openmetrics-text; version=1.0.0"), "{kind}");
    assert!(open_metrics.contains("# TYPE outrigger_calls counter\n") && open_metrics.contains(TRACE));
    let (kind, plain) = scrape(&proxy, "text/plain;version=0.0.4");
    assert!(kind.starts_with("text/plain; version=0.0.4"), "{kind}");
    assert!(plain.contains("# TYPE outrigger_calls_total counter\n"), "{plain}");
    assert!(!plain.contains(TRACE) && !plain.contains("# EOF") && !plain.contains("# UNIT"), "{plain}");
    let count = |text: &str| text.lines().filter(|line| !line.starts_with('#')).count();
    assert_eq!(count(&plain), count(&open_metrics));
    if has_tool(&["promtool"]) {
        promtool(&["check", "metrics"], proxy.directory(), &plain);
    }
}

#[test]
fn input_from_clients_and_services_creates_bounded_series() {
    const REQUESTS: usize = 10_000;
    let service = service();
    let proxy = proxy(&service, "[outbound]\nunknown = \"deny\"");
    let mut client = RawClient::connect(proxy.outbound());
    for number in 0..REQUESTS {
        let method = if number % 2 == 0 { format!("M{number}") } else { "GET".to_owned() };
        let status = 200 + number % 400;
        let host = if number % 3 == 0 { "up".to_owned() } else { format!("h{number}.example") };
        let request = format!("{method} /{status} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n\r\n");
        let response = client.ask(request);
        assert!([status, 403].contains(&usize::from(response.status())), "{response:?}");
        if response.field("connection").is_some() {
            client = RawClient::connect(proxy.outbound());
        }
    }
    let metrics = metrics(&proxy);
    let counts: Vec<&str> = metrics
        .lines()
        .filter(|line| line.starts_with("http_client_request_duration_seconds_count"))
        .collect();
    assert!((60..=2 * 65).contains(&counts.len()), "{} series", counts.len());
    let total: usize = counts.iter().filter_map(|line| line.rsplit(' ').next()?.parse::<usize>().ok()).sum();
    assert_eq!(total, REQUESTS, "nothing goes uncounted");
    assert!(metrics.lines().count() < 4000, "{} lines", metrics.lines().count());
}

/// Series that only a proxy with `[identity]` has; `identity` checks them.
const IDENTITY_METRICS: &[&str] = &["outrigger_certificate_expiry_timestamp_seconds"];

#[test]
fn metrics_used_by_alerts_and_dashboard_are_exposed() {
    let service = service();
    let address = service.address();
    let upstream = format!("[[upstream]]\nname = \"up\"\nendpoints = [\"{address}\"]\n");
    let proxy = Proxy::start(format!(
        "[telemetry]\notlp = \"http://127.0.0.1:1\"\n[inbound]\nforward_to = \"{address}\"\n{upstream}\
         [store]\ndurability = \"memory\"\n[[queue]]\nname = \"orders\"\n\
         [[upstream.route]]\nqueue = {{ name = \"orders\" }}\n"
    ));
    RawClient::connect(proxy.inbound()).ask(get("/200", ""));
    RawClient::connect(proxy.outbound()).ask(get("/200", ""));
    let order = "POST /200 HTTP/1.1\r\nHost: up\r\nPrefer: respond-async\r\ncontent-length: 0\r\n\r\n";
    assert_eq!(RawClient::connect(proxy.outbound()).ask(order).status(), 202);
    eventually("the delivery", || metrics(&proxy).contains("outrigger_queue_deliveries_total{"));
    let metrics = metrics(&proxy);
    let exposed = |name: &str| metrics.lines().any(|line| line.split(['{', ' ']).next() == Some(name));
    let mut named = 0;
    for file in ["prometheus/alerts.yml", "grafana/outrigger.json"] {
        let text = std::fs::read_to_string(config_file(file)).expect(file);
        let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
        let metric = |word: &&str| {
            ["outrigger_", "http_server_", "http_client_", "process_"].iter().any(|p| word.starts_with(p))
        };
        for name in words.filter(metric) {
            let elsewhere = IDENTITY_METRICS.contains(&name);
            assert!(exposed(name) != elsewhere, "{file} names {name}; elsewhere: {elsewhere}");
            named += 1;
        }
    }
    assert!(named > 40, "only {named}: is the test looking right?");
}

#[test]
fn the_alert_rules_are_valid_and_fire() {
    if !has_tool(&["promtool"]) {
        return;
    }
    let directory = config_file("prometheus");
    promtool(&["check", "rules", "alerts.yml"], &directory, "");
    promtool(&["test", "rules", "alerts_test.yml"], &directory, "");
}

/// The dashboard is importable by Grafana: panels with queries, no address of ours in it.
#[test]
fn the_dashboard_is_well_formed() {
    let text = std::fs::read_to_string(config_file("grafana/outrigger.json")).expect("the dashboard");
    let dashboard: Value = serde_json::from_str(&text).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    let queries = panels.iter().filter(|panel| panel["targets"][0]["expr"].is_string()).count();
    assert!(queries >= 15, "{queries} panels with queries");
}

#[test]
fn a_prometheus_scrapes_and_keeps_the_exemplars() {
    if !has_tool(&["prometheus"]) {
        return;
    }
    let service = service();
    let proxy = proxy(&service, "");
    let field = format!("traceparent: 00-{TRACE}-b7ad6b7169203331-01\r\n");
    RawClient::connect(proxy.outbound()).ask(get("/200", &field));
    let listen = format!("127.0.0.1:{}", free_port());
    let rules = config_file("prometheus/alerts.yml");
    let config = format!(
        "global: {{scrape_interval: 1s}}\nrule_files: ['{}']\n\
         scrape_configs: [{{job_name: outrigger, static_configs: [{{targets: ['{}']}}]}}]\n",
        rules.display(),
        proxy.admin()
    );
    let _prometheus = Daemon::start(
        "prometheus",
        &[
            "--config.file=@DIR@/prometheus.yml",
            "--storage.tsdb.path=@DIR@/data",
            &format!("--web.listen-address={listen}"),
            "--enable-feature=exemplar-storage",
        ],
        &[("prometheus.yml", &config)],
    )
    .listening(listen.parse().expect("an address"));
    let ask = |path: &str| {
        let mut client = RawClient::connect(listen.parse().expect("an address"));
        let request = format!("GET /api/v1/{path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        serde_json::from_str::<Value>(&client.ask(request).text()).unwrap_or_default()
    };
    let query = "http_client_request_duration_seconds_count%7Bupstream=%22up%22,job=%22outrigger%22%7D";
    eventually("the scrape", || ask(&format!("query?query={query}"))["data"]["result"][0]["value"][1] == "1");
    let query = "query_exemplars?query=http_client_request_duration_seconds_bucket&start=0&end=9999999999";
    let exemplars = ask(query);
    assert_eq!(exemplars["data"][0]["exemplars"][0]["labels"]["trace_id"], TRACE, "{exemplars}");
    let target = &ask("targets")["data"]["activeTargets"][0];
    assert_eq!((&target["health"], &target["lastError"]), (&"up".into(), &"".into()), "{target}");
}
