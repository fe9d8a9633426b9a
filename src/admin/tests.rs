//! The admin server over real sockets, beside a real proxy.

use std::{os::unix::fs::PermissionsExt, sync::Arc};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixStream},
};

use super::{Admin, client::AdminClient};
use crate::{
    config::{AdminListen, Config},
    runtime::{
        self, Proxy,
        lifecycle::Control,
        reload::{Candidate, Reloads},
    },
    telemetry::log::{self, LogHandle},
};

struct Running {
    admin: Admin,
    control: Arc<Control>,
    _proxy: Proxy,
    _log: Box<dyn std::any::Any>,
}

fn start(change: impl FnOnce(&mut Config)) -> Running {
    let mut config = Config::default();
    config.inbound.listen = "127.0.0.1:0".parse().unwrap();
    config.outbound.listen = "127.0.0.1:0".parse().unwrap();
    config.admin.listen = "127.0.0.1:0".parse().unwrap();
    change(&mut config);
    let config = Arc::new(config);
    let proxy = runtime::start(Arc::clone(&config), Arc::default(), 1).unwrap();
    let (log, layer): (LogHandle, _) = log::detached();
    let candidate = Candidate { config: Arc::clone(&config), sources: Arc::default() };
    let control = Control::new(&proxy, log, Reloads::new(Vec::new(), &candidate));
    control.set_discovered();
    let admin = Admin::start(&config.admin, Arc::clone(&control)).unwrap();
    Running { admin, control, _proxy: proxy, _log: Box::new(layer) }
}

impl Running {
    fn client(&self) -> AdminClient {
        AdminClient::new(self.admin.address.parse().unwrap(), None)
    }

    /// Sends raw bytes and returns the whole response.
    async fn raw(&self, address: &str, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut response = String::new();
        let _ = stream.read_to_string(&mut response).await;
        response
    }

    async fn request(&self, line: &str, fields: &str) -> String {
        let request = format!("{line} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{fields}\r\n");
        self.raw(&self.admin.address, &request).await
    }
}

fn status(response: &str) -> u16 {
    response.get(9..12).and_then(|code| code.parse().ok()).unwrap_or(0)
}

#[tokio::test]
async fn reads_are_open_and_changes_need_the_token() {
    let running = start(|_| {});
    for path in ["/", "/live", "/ready", "/status", "/config", "/metrics"] {
        let response = running.request(&format!("GET {path}"), "").await;
        assert_eq!(status(&response), 200, "{path}: {response}");
    }
    for change in ["POST /drain", "PUT /log"] {
        let response = running.request(change, "content-length: 0\r\n").await;
        assert_eq!(status(&response), 401, "{change}: {response}");
        let response = running.request(change, "authorization: Bearer wrong\r\ncontent-length: 0\r\n").await;
        assert_eq!(status(&response), 401, "{change}: {response}");
    }
    assert!(running.control.not_ready().is_none(), "nothing was changed");
    assert!(running.control.request_drain(), "no drain was requested before");
}

#[tokio::test]
async fn the_client_discovers_the_token() {
    let running = start(|_| {});
    let file = running.admin.token_path().unwrap().to_owned();
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    running.client().change(http::Method::PUT, "/log", "warn".to_owned()).await.unwrap();
    let error = running.client().change(http::Method::PUT, "/log", "loud".to_owned()).await.unwrap_err();
    assert!(error.to_string().contains("`loud` is not a log level"), "{error}");
    running.client().change(http::Method::POST, "/drain", String::new()).await.unwrap();
    assert!(!running.control.request_drain(), "the drain was already requested");
    drop(running);
    assert!(!file.exists(), "the token file is removed with the process");
}

#[tokio::test]
async fn a_configured_token_is_used() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "s3cret\n").unwrap();
    let running = start(|config| config.admin.token_file = Some(file.path().to_owned()));
    let response =
        running.request("POST /drain", "authorization: Bearer s3cret\r\ncontent-length: 0\r\n").await;
    assert_eq!(status(&response), 202, "{response}");
}

#[tokio::test]
async fn requests_with_a_foreign_host_are_rejected() {
    let running = start(|_| {});
    let request = "GET /status HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n";
    assert_eq!(status(&running.raw(&running.admin.address, request).await), 403);
}

#[tokio::test]
async fn wrong_paths_and_methods_list_the_valid_ones() {
    let running = start(|_| {});
    let response = running.request("GET /nope", "").await;
    assert_eq!(status(&response), 404);
    assert!(response.contains("/status"), "{response}");
    let response = running.request("GET /drain", "").await;
    assert_eq!(status(&response), 405);
    assert!(response.to_lowercase().contains("allow: post\r\n"), "{response}");
    let response = running.request("DELETE /status", "").await;
    assert!(response.to_lowercase().contains("allow: get, head\r\n"), "{response}");
}

#[tokio::test]
async fn a_body_that_is_too_long_is_rejected() {
    let running = start(|_| {});
    let token = std::fs::read_to_string(running.admin.token_path().unwrap()).unwrap();
    let fields = format!("authorization: Bearer {}\r\ncontent-length: 1000000\r\n", token.trim());
    assert_eq!(status(&running.request("PUT /log", &fields).await), 413);
}

#[tokio::test]
async fn a_drain_shows_in_ready() {
    let running = start(|_| {});
    assert_eq!(status(&running.request("GET /ready", "").await), 200);
    running._proxy.set_phase(crate::proxy::worker::Phase::DrainDelay);
    let response = running.request("GET /ready", "accept: application/json\r\n").await;
    assert_eq!(status(&response), 503);
    assert!(response.contains("leaving"), "{response}");
    assert_eq!(status(&running.request("GET /live", "").await), 200);
}

/// Issue 14, fault 25: `/live` reported a dead worker as live.
#[tokio::test]
async fn a_dead_worker_shows_in_live_and_ready() {
    let running = start(|_| {});
    running.control.failures.guard("worker-0").finish(Err("its listener is gone".to_owned()));
    let response = running.request("GET /live", "").await;
    assert_eq!(status(&response), 503, "{response}");
    assert!(response.ends_with("worker-0 has failed: its listener is gone\n"), "{response}");
    let response = running.request("GET /ready", "").await;
    assert_eq!(status(&response), 503, "{response}");
    assert!(response.contains("has failed"), "{response}");
}

#[tokio::test]
async fn metrics_are_openmetrics() {
    let running = start(|_| {});
    let response = running.request("GET /metrics", "").await;
    assert!(
        response.contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n")
    );
    assert!(response.ends_with("# EOF\n"), "{response}");
    for name in [
        "outrigger_build_info{version=",
        "outrigger_connections{direction=\"inbound\",tls=\"none\",state=\"open\"} 0",
        "outrigger_config_reloads_total{outcome=\"accepted\"} 0",
        "outrigger_config_rejected 0",
        "process_cpu_seconds_total ",
        "process_resident_memory_bytes ",
        "process_open_fds ",
        "process_start_time_seconds ",
    ] {
        assert!(response.contains(name), "{name} is not in\n{response}");
    }
}

#[tokio::test]
async fn the_probe_port_serves_probes_and_nothing_else() {
    let running = start(|config| config.admin.probe_listen = "127.0.0.1:0".parse().ok());
    let address = running.admin.probe.clone().unwrap();
    for (line, expected) in [
        ("GET /live", 200),
        ("GET /ready", 200),
        ("GET /metrics", 200),
        ("GET /status", 404),
        ("POST /drain", 404),
    ] {
        // A kubelet sends the pod's name, a scraper may send any host.
        let request = format!("{line} HTTP/1.1\r\nhost: pod.example\r\nconnection: close\r\n\r\n");
        let response = running.raw(&address, &request).await;
        assert_eq!(status(&response), expected, "{line}: {response}");
    }
}

#[tokio::test]
async fn a_unix_socket_needs_no_token() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("admin.sock");
    let running = start(|config| config.admin.listen = AdminListen::Unix(path.clone()));
    assert_eq!(running.admin.address, format!("unix:{}", path.display()));
    assert!(running.admin.token_path().is_none());
    running.client().get("/status").await.unwrap();
    running.client().change(http::Method::POST, "/drain", String::new()).await.unwrap();
    drop(running);
    assert!(!path.exists());
    assert!(UnixStream::connect(&path).await.is_err());
}

#[tokio::test]
async fn the_client_reports_that_no_sidecar_runs() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let client = AdminClient::new(free.to_string().parse().unwrap(), None);
    for error in [
        client.get("/status").await.unwrap_err(),
        client.change(http::Method::POST, "/drain", String::new()).await.unwrap_err(),
    ] {
        assert!(error.to_string().contains("is a sidecar running"), "{error}");
    }
}
