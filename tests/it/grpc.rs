//! gRPC with the client and server of another language's library: all four kinds of methods.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
};

use crate::support::{Daemon, Proxy, peer_script, python_with, refusing_address};

fn server(python: &Path) -> (Daemon, SocketAddr) {
    let script = peer_script("grpc_server.py").display().to_string();
    let server = Daemon::start(&python.display().to_string(), &[&script], &[]);
    let output = server.wait_for_output("port ");
    let port = output.split("port ").nth(1).and_then(|rest| rest.trim().parse().ok()).expect("a port");
    (server, SocketAddr::from(([127, 0, 0, 1], port)))
}

#[track_caller]
fn client(python: &Path, arguments: &[&str], proxy: Option<SocketAddr>) {
    let mut command = Command::new(python);
    command.arg(peer_script("grpc_client.py")).args(arguments).env_remove("no_proxy").env_remove("NO_PROXY");
    for name in ["http_proxy", "https_proxy", "grpc_proxy"] {
        command.env_remove(name);
    }
    if let Some(proxy) = proxy {
        command.env("http_proxy", format!("http://{proxy}"));
    }
    let output = command.output().expect("Python runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{arguments:?}: {said}");
}

fn python() -> Option<PathBuf> {
    python_with("grpc")
}

#[test]
fn all_grpc_method_kinds_work() {
    let Some(python) = python() else { return };
    let (_server, address) = server(&python);
    let proxy = Proxy::start(format!(
        "[inbound]\nforward_to = \"{address}\"\n[[upstream]]\nname = \"up\"\nendpoints = [\"{address}\"]\n"
    ));
    client(&python, &[&proxy.outbound().to_string(), "up"], None);
    client(&python, &[&proxy.inbound().to_string(), "up"], None);
    // The library's default when a proxy is configured: a CONNECT tunnel, whose content the proxy parses.
    client(&python, &["up:80", "up"], Some(proxy.outbound()));
}

/// gRPC clients get the proxy's errors as gRPC statuses.
#[test]
fn a_rejected_grpc_request_is_unavailable() {
    let Some(python) = python() else { return };
    let refused = refusing_address();
    let proxy = Proxy::start(format!("[[upstream]]\nname = \"up\"\nendpoints = [\"{refused}\"]\n"));
    client(&python, &[&proxy.outbound().to_string(), "up", "refused"], None);
}
