//! The commands other than `run`, as an operator types them.

use std::process::{Command, Output};

use crate::support::{Launch, Proxy, Upstream, eventually, free_port, text};

fn outrigger(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_outrigger")).args(arguments).output().expect("it runs")
}

fn out(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn demo_shows_every_step() {
    let output = outrigger(&["demo", "--once"]);
    let said = out(&output);
    assert!(said.contains("checks passed"), "{said}");
    assert!(!said.contains('✗'), "{said}");
}

/// Problems that are visible in the file are reported before the start, with their line and a remedy.
#[test]
fn check_warns_and_explain_shows_each_value_with_its_source() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("outrigger.toml");
    let file = path.to_string_lossy();
    let config = "[runtime]\ndrain_delay = \"10s\"\n[[upstream]]\nname = \"up\"\nendpoints = [\"127.0.0.1:1\"]\n\
        timeout = \"2s\"\nattempt_timeout = \"1s\"\nretry = { methods = [\"POST\"] }\nbreaker = { min_requests = 5000 }\n";
    std::fs::write(&path, config).expect("write");
    let said = out(&outrigger(&["check", "-c", &file]));
    for warning in [
        "draining takes up to 35s",
        "3 attempts of 1s and the waits between them",
        "POST may be sent twice",
        "failure_rate needs 500 requests a second",
        "4 warnings",
    ] {
        assert!(said.contains(warning), "{warning} is not in\n{said}");
    }
    let said = out(&outrigger(&["explain", "-c", &file, "GET", "http://up/"]));
    for (key, value, place) in [
        ("timeout", "2s", "outrigger.toml:6"),
        ("breaker.min_requests", "5000", "outrigger.toml:9"),
        ("breaker.open_for.max", "", ""),
        ("retry.budget.ratio", "0.2", ""),
        ("limits.max_pending", "", ""),
        ("outlier.max_ejected", "0.5", ""),
    ] {
        let line = said.lines().find(|line| line.split_whitespace().next() == Some(key));
        let shown = line.is_some_and(|line| line.contains(value) && line.contains(place));
        assert!(shown, "{key} {value} {place} is not in\n{said}");
    }
}

#[test]
fn status_shows_a_running_sidecar() {
    let server = Upstream::http1(|_| async { text("up") });
    let address = server.address();
    let proxy = Proxy::start(format!(
        "[service]\nname = \"checkout\"\n[[upstream]]\nname = \"payments\"\nendpoints = [\"{address}\"]\n"
    ));
    let admin = proxy.admin().to_string();
    let said = out(&outrigger(&["status", "--admin", &admin]));
    for part in ["checkout: ready", "payments", &address.to_string(), &proxy.outbound().to_string()] {
        assert!(said.contains(part), "`{part}` is not in\n{said}");
    }
    let said = out(&outrigger(&["status", "--admin", &admin, "--json"]));
    let status: serde_json::Value = serde_json::from_str(&said).expect("JSON");
    assert_eq!(status["upstreams"][0]["endpoints"][0]["address"], address.to_string());
    assert_eq!(status["upstreams"][0]["endpoints"][0]["state"], "healthy");
}

#[test]
fn commands_find_the_admin_token_of_a_running_sidecar() {
    let proxy = Proxy::start("");
    let admin = proxy.admin().to_string();
    out(&outrigger(&["set", "log", "debug", "--admin", &admin]));
    eventually("the change in the log", || proxy.stderr().contains("log filter changed"));
    out(&outrigger(&["drain", "--admin", &admin]));
    eventually("the drain", || {
        out(&outrigger(&["status", "--admin", &admin, "--json"])).contains("\"draining_inbound\"")
    });
}

#[test]
fn commands_work_over_a_unix_socket() {
    let proxy = Launch::new("[admin]\nlisten = \"unix:admin.sock\"\n").start();
    let socket = proxy.directory().join("admin.sock");
    let admin = format!("unix:{}", socket.display());
    assert!(out(&outrigger(&["status", "--admin", &admin])).contains("ready"));
    out(&outrigger(&["set", "log", "warn", "--admin", &admin]));
    drop(proxy);
    assert!(!socket.exists());
}

#[test]
fn commands_report_that_no_sidecar_runs() {
    // An address that no other test can get in the meantime.
    let free = std::net::SocketAddr::from(([127, 0, 0, 1], free_port()));
    for command in [&["status"][..], &["set", "log", "debug"], &["drain"]] {
        let admin = free.to_string();
        let output = outrigger(&[command, &["--admin", &admin]].concat());
        assert_eq!(output.status.code(), Some(1), "{command:?}");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains("is a sidecar running"), "{said}");
    }
}

#[test]
fn a_port_in_use_and_a_bad_log_filter_are_explained() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("bound");
    let mut proxy = Launch::new(format!("[admin]\nlisten = \"{address}\"\n")).spawn();
    assert_eq!(proxy.wait().code(), Some(1));
    assert!(
        proxy.stderr().contains(&format!("cannot listen on {address} ([admin] listen)")),
        "{}",
        proxy.stderr()
    );
    assert_eq!(outrigger(&["run", "--log", "loud"]).status.code(), Some(2));
}

#[test]
fn completions_and_manual_are_generated() {
    for shell in ["bash", "zsh", "fish"] {
        assert!(out(&outrigger(&["completions", shell])).contains("ready-file"), "{shell}");
    }
    assert!(out(&outrigger(&["man"])).contains("outrigger"));
    let folder = tempfile::tempdir().expect("a folder");
    out(&outrigger(&["man", "--out", &folder.path().to_string_lossy()]));
    for page in ["outrigger.1", "outrigger-run.1", "outrigger-set-log.1", "outrigger-config-schema.1"] {
        assert!(folder.path().join(page).exists(), "{page}");
    }
}

#[test]
fn check_reports_every_mistake_in_one_run() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("outrigger.toml");
    let file = path.to_string_lossy();
    let missing = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let config = format!(
        "[identity]\ncert = {:?}\nkey = {:?}\nca = {:?}\n[defaults]\nretry = 3\n[[upstream]]\nname = \"up\"\nendpoints = \"file://{}\"\n\
         [[upstream]]\nname = \"two\"\nprotocol = \"http2\"\nendpoints = [\"http://h:1\"]\n",
        missing("tls.crt"),
        missing("tls.key"),
        missing("ca.crt"),
        missing("endpoints.json")
    );
    std::fs::write(&path, config).expect("write");
    let output = outrigger(&["check", "-c", &file]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    for part in [
        "tls.crt",
        "tls.key",
        "ca.crt",
        "{ max = 3 }",
        "did you mean \"h2\"?",
        "write \"h:1\"",
        "endpoints.json",
    ] {
        assert!(said.contains(part), "{part} is not in\n{said}");
    }
    std::fs::write(
        &path,
        format!("[[upstream]]\nname = \"up\"\nendpoints = \"file://{}\"\n", missing("endpoints.json")),
    )
    .expect("write");
    let output = outrigger(&["check", "-c", &file]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("endpoints.json: there is no such file"), "{said}");
}

#[test]
fn misplaced_arguments_get_a_hint_and_a_bare_port_is_an_admin_address() {
    for (arguments, tip) in [
        (&["check", "outrigger.toml"][..], "outrigger check -c outrigger.toml"),
        (&["run", "node", "server.js"], "outrigger run -- node"),
    ] {
        let output = outrigger(arguments);
        assert_eq!(output.status.code(), Some(2));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains(tip), "{said}");
    }
    let proxy = Proxy::start("");
    let port = proxy.admin().port().to_string();
    assert!(out(&outrigger(&["status", "--admin", &port])).contains("ready"));
}

#[test]
fn certs_never_replaces_an_existing_ca() {
    let folder = tempfile::tempdir().expect("a folder");
    let out_dir = folder.path().to_string_lossy();
    let certs = |more: &[&str]| {
        let arguments = ["certs", "--out", &out_dir, "--trust-domain", "shop.example", "checkout"];
        let arguments: Vec<&str> = arguments.iter().chain(more).copied().collect();
        outrigger(&arguments)
    };
    out(&certs(&[]));
    let ca = std::fs::read(folder.path().join("ca.crt")).expect("a CA");
    let again = certs(&[]);
    assert_eq!(again.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&again.stderr).contains("ca.crt already exists"), "{again:?}");
    assert_eq!(std::fs::read(folder.path().join("ca.crt")).expect("a CA"), ca);
    out(&certs(&["--replace"]));
    assert_ne!(std::fs::read(folder.path().join("ca.crt")).expect("a CA"), ca);
}
