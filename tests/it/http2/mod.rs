//! HTTP/2 on both sides: streams, windows, limits and errors, as peers see them.

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

/// A proxy with the upstream `up`, reached over HTTP/2.
fn proxy(endpoint: SocketAddr, more: &str) -> Proxy {
    Proxy::start(format!(
        "[runtime]\nworkers = 1\n[[upstream]]\nname = \"up\"\nprotocol = \"h2\"\nendpoints = [\"{endpoint}\"]\n{more}\n"
    ))
}
