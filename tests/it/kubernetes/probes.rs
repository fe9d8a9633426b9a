//! The probes of the other containers, which the sidecar performs for the kubelet.

use std::net::SocketAddr;

use serde_json::json;

use crate::support::{
    Daemon, Launch, Proxy, RawClient, Upstream, eventually, free_port, peer_script, pki::Pki, python_with,
    text, tls::TlsServer,
};

fn ask(proxy: &Proxy, path: &str) -> (u16, String) {
    let probe = proxy.ready()["probe"].as_str().expect("the probe port").parse().expect("an address");
    let request = format!("GET {path} HTTP/1.1\r\nhost: 10.0.0.1:4192\r\nconnection: close\r\n\r\n");
    let response = RawClient::connect(probe).ask(request);
    let status = response.start.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
    (status, String::from_utf8_lossy(&response.body).into_owned())
}

fn start(probes: &serde_json::Value) -> Proxy {
    Launch::new("[admin]\nprobe_listen = \"127.0.0.1:0\"\n")
        .env("OUTRIGGER_PROBES", &probes.to_string())
        .env("OUTRIGGER_POD_IP", "127.0.0.1")
        .start()
}

#[test]
fn probes_reach_their_container() {
    let server = Upstream::http1(|request| async move {
        let (host, path) =
            (request.headers()["host"].to_str().unwrap_or("").to_owned(), request.uri().clone());
        let mut response = text("x");
        let meant =
            host == "health.internal" && path == "/healthz?full=1" && request.headers()["x-probe"] == "1";
        *response.status_mut() = match path.path() {
            "/moved" => http::StatusCode::FOUND,
            _ if meant => http::StatusCode::OK,
            _ => http::StatusCode::IM_A_TEAPOT,
        };
        response
    });
    let pki = Pki::new();
    let tls = TlsServer::start(&pki.issue("of-nobody", |_| {}), None, &[]);
    let (web, silent) = (server.address().port(), free_port());
    let proxy = start(&json!({
        "app/liveness": {"port": web, "http": "/healthz?full=1", "headers": [["Host", "health.internal"], ["X-Probe", "1"]], "timeout": 5},
        "app/readiness": {"port": web, "http": "healthz", "timeout": 5},
        "app/startup": {"port": web, "http": "/moved", "timeout": 5},
        "secure/liveness": {"port": tls.address().port(), "http": "/", "tls": true, "timeout": 5},
        "db/liveness": {"port": web, "tcp": true, "timeout": 5},
        "db/readiness": {"port": silent, "tcp": true, "timeout": 5},
        "db/startup": {"port": silent, "http": "/", "timeout": 5}
    }));
    for (probe, expected) in [
        ("app/liveness", 200),
        ("app/readiness", 503),
        ("app/startup", 200),
        ("secure/liveness", 200),
        ("db/liveness", 200),
        ("db/readiness", 503),
        ("db/startup", 503),
        ("nobody/liveness", 404),
    ] {
        assert_eq!(ask(&proxy, &format!("/probe/{probe}")).0, expected, "{probe}");
    }
    assert!(ask(&proxy, "/probe/app/readiness").1.contains("418"), "it says why");
    let admin =
        RawClient::connect(proxy.admin()).ask("GET /probe/app/liveness HTTP/1.1\r\nhost: localhost\r\n\r\n");
    assert!(admin.start.contains("404"), "{}", admin.start);
}

#[test]
fn grpc_probes_query_the_health_service() {
    let Some(python) = python_with("grpc_health") else { return };
    let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let script = peer_script("health_server.py").display().to_string();
    let _server = Daemon::start(&python.display().to_string(), &[&script, &address.port().to_string()], &[])
        .listening(address);
    let probe = |service: &str| json!({"port": address.port(), "grpc": service, "timeout": 10});
    let proxy = start(&json!({"a/good": probe("good"), "a/all": probe(""), "a/bad": probe("bad")}));
    for (name, expected) in [("good", 200), ("all", 200), ("bad", 503)] {
        assert_eq!(ask(&proxy, &format!("/probe/a/{name}")).0, expected, "{name}");
    }
}

#[test]
fn status_wait_returns_when_the_sidecar_is_ready() {
    let proxy = Proxy::start("");
    let status = |address: &str, wait: &str| {
        super::outrigger(&["status", "--admin", address, "--wait", wait], "").status.code()
    };
    assert_eq!(status(&proxy.admin().to_string(), "20s"), Some(0));
    assert_eq!(status(&format!("127.0.0.1:{}", free_port()), "10ms"), Some(1));
}

/// The kubelet's event has only the status, so the log has the reason: once, until it changes.
#[test]
fn probe_failure_and_recovery_are_logged_once() {
    let port = free_port();
    let proxy = start(&json!({"app/readiness": {"port": port, "tcp": true, "timeout": 5}}));
    for _ in 0..3 {
        assert_eq!(ask(&proxy, "/probe/app/readiness").0, 503);
    }
    let lines = |what: &str| proxy.stderr().lines().filter(|line| line.contains(what)).count();
    eventually("a line", || lines("container probe failed") > 0);
    let _service = std::net::TcpListener::bind(("127.0.0.1", port)).expect("the port again");
    assert_eq!(ask(&proxy, "/probe/app/readiness").0, 200);
    eventually("another line", || lines("container probe passes again") > 0);
    assert_eq!(lines("container probe failed"), 1, "{}", proxy.stderr());
    assert!(
        proxy.stderr().contains("app/readiness") && proxy.stderr().contains("refused"),
        "{}",
        proxy.stderr()
    );
}
