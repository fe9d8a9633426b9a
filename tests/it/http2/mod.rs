//! HTTP/2 on both sides: its streams, windows, limits and errors, seen from outside.

mod blame;
mod conduct;
mod early;
mod fields;
mod refused;
mod silence;
mod streams;
mod unsent;
mod windows;

use std::net::SocketAddr;

use crate::support::Proxy;

/// A proxy with the upstream `up`, called by HTTP/2.
fn proxy(endpoint: SocketAddr, more: &str) -> Proxy {
    Proxy::start(format!(
        "[runtime]\nworkers = 1\n[[upstream]]\nname = \"up\"\nprotocol = \"h2\"\nendpoints = [\"{endpoint}\"]\n{more}\n"
    ))
}
