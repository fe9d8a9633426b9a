//! Mutual TLS: between two sidecars, with other implementations, with invalid certificates, and during rotation.

mod expired;
mod interop;
mod pairs;
mod refused;
mod rotation;
mod scans;
mod workload;

use std::net::SocketAddr;

use crate::support::{
    Proxy, RawClient,
    pki::{Pki, id},
};

/// The sidecar of a service that accepts mutual TLS only.
pub fn server_sidecar(pki: &Pki, service: SocketAddr, more: &str) -> Proxy {
    let identity = pki.identity("payments");
    Proxy::start(format!("{identity}[inbound]\nforward_to = \"{service}\"\n{more}"))
}

/// The sidecar of its client, which knows it as `payments`.
pub fn client_sidecar(pki: &Pki, server: SocketAddr, more: &str) -> Proxy {
    let identity = pki.identity("checkout");
    let payments = id("payments");
    Proxy::start(format!(
        "{identity}[[upstream]]\nname = \"payments\"\nendpoints = [\"{server}\"]\nidentity = [\"{payments}\"]\n{more}"
    ))
}

/// A request through the outbound port: status and body.
#[track_caller]
pub fn send_get(proxy: &Proxy) -> (u16, String) {
    let response = RawClient::connect(proxy.outbound())
        .ask("GET / HTTP/1.1\r\nHost: payments\r\nConnection: close\r\n\r\n");
    (response.status(), response.text())
}

pub const GET: &str = "GET / HTTP/1.1\r\nHost: payments\r\nConnection: close\r\n\r\n";

/// A value of `/metrics`.
#[track_caller]
pub fn metric(proxy: &Proxy, name: &str) -> f64 {
    let page = RawClient::connect(proxy.admin())
        .ask("GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        .text();
    let line =
        page.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name} in\n{page}"));
    line.rsplit(' ').next().and_then(|number| number.parse().ok()).expect("a number")
}

/// `GET /ready` or another page of the admin server: status and body.
#[track_caller]
pub fn admin(proxy: &Proxy, path: &str) -> (u16, String) {
    let response = RawClient::connect(proxy.admin())
        .ask(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"));
    (response.status(), response.text())
}
