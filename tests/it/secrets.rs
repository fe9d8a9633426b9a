//! No output of a running sidecar or of a command shows a credential of its configuration.

use std::{fs, process::Command};

use crate::support::{Launch, RawClient, Upstream, binary, eventually, refusing_address, text};

const CANARY: &str = "Canary4711";

fn config(service: &str, unused_address: &str) -> String {
    format!(
        r#"
[inbound]
forward_to = "{service}"
[inbound.jwt]
issuer = "https://id.example"
audiences = ["checkout"]
jwks = "http://user:{CANARY}@{unused_address}/keys?key={CANARY}"
[telemetry]
otlp = "http://user:${{OTLP_PASSWORD}}@{unused_address}"
access_log = "all"
sample = 1
[[upstream]]
name = "payments"
endpoints = ["{service}"]
oauth2 = {{ token_url = "http://user:{CANARY}@{unused_address}/token", client_id = "c", client_secret_file = "secret" }}
[[upstream]]
name = "orders"
endpoints = ["{service}"]
[[upstream.route]]
match = {{ headers = {{ x-api-key = "{CANARY}" }} }}
request_headers = {{ set = {{ x-never = "1" }} }}
[[upstream.route]]
request_headers = {{ set = {{ authorization = "Bearer {CANARY}", x-tier = "${{TIER_TOKEN}}", cookie = "id={CANARY}" }} }}
response_headers = {{ set = {{ set-cookie = "id={CANARY}" }} }}
"#
    )
}

#[test]
fn no_output_shows_a_credential() {
    let service = Upstream::http1(|request| async move {
        let sent = request.headers().get("authorization").is_some();
        text(if sent { "it was sent" } else { "it was not sent" })
    });
    let config = config(&service.address().to_string(), &refusing_address().to_string());
    let variables = [("OTLP_PASSWORD", CANARY), ("TIER_TOKEN", CANARY)];
    let launch = Launch::new(config.clone()).arg("--log").arg("debug");
    let launch = variables.iter().fold(launch, |launch, (name, value)| launch.env(name, value));
    let proxy = launch.start();
    fs::write(proxy.directory().join("secret"), CANARY).expect("write");
    let ask = |host: &str| {
        RawClient::connect(proxy.outbound())
            .ask(format!("GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"))
    };
    assert_eq!(ask("orders").text(), "it was sent", "what is hidden is sent all the same");
    let failed = ask("payments");
    assert!(failed.status() >= 500);
    let inbound = RawClient::connect(proxy.inbound())
        .ask("GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer a.b.c\r\nConnection: close\r\n\r\n");
    let page = |path: &str, accept: &str| {
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept: {accept}\r\nConnection: close\r\n\r\n"
        );
        RawClient::connect(proxy.admin()).ask(request).text()
    };
    eventually("the failing fetches", || {
        let log = proxy.stderr();
        log.contains("keys of the token issuer cannot be fetched")
            && page("/status", "*/*").contains("last_error")
    });
    let mut said = vec![
        ("a failed request", failed.text()),
        ("a refused request", inbound.text()),
        ("/config", page("/config", "*/*")),
        ("/config as TOML", page("/config", "application/toml")),
        ("/status", page("/status", "*/*")),
        ("/requests", page("/requests", "*/*")),
        ("/metrics", page("/metrics", "*/*")),
        ("the page", page("/", "*/*")),
        ("the ready file", proxy.ready().to_string()),
    ];
    assert!(
        said[2].1.contains("http://***@") && said[2].1.contains("\"authorization\": \"***\""),
        "{}",
        said[2].1
    );
    let file = proxy.directory().join("outrigger.toml");
    let run = |arguments: &[&str]| {
        let mut command = Command::new(binary());
        let output =
            command.args(arguments).envs(variables).current_dir(proxy.directory()).output().expect("it runs");
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
    };
    let path = file.to_string_lossy().into_owned();
    let admin = proxy.admin().to_string();
    let broken = proxy.directory().join("broken.toml");
    // Every line of the file is shown in some message.
    let lines = config
        .replace("name = ", "nmae = ")
        .replace("audiences", "audience")
        .replace("sample = 1", "sample = 7");
    fs::write(&broken, lines).expect("write");
    let broken = broken.to_string_lossy().into_owned();
    said.extend([
        ("explain", run(&["explain", "-c", &path, "GET", "http://orders/"])),
        ("explain --json", run(&["explain", "--json", "-c", &path, "GET", "http://payments/"])),
        ("explain --inbound", run(&["explain", "--inbound", "-c", &path, "GET", "http://a/"])),
        ("check", run(&["check", "-c", &path])),
        ("check of a broken file", run(&["check", "-c", &broken])),
        ("check --json", run(&["check", "--json", "-c", &broken])),
        ("status", run(&["status", "--admin", &admin])),
        ("status --json", run(&["status", "--json", "--admin", &admin])),
    ]);
    proxy.reconfigure(&config.replace("sample = 1", "sample = 7"));
    eventually("a refused change", || page("/status", "*/*").contains("is not a ratio"));
    said.push(("/status of a refused change", page("/status", "*/*")));
    said.extend([("the log", proxy.stderr()), ("the access log", proxy.stdout())]);
    for (what, text) in said {
        assert!(!text.contains(CANARY), "{what} shows it:\n{text}");
    }
}
