//! Test support: the real binary, servers behind it, sockets, and external tools.

#![allow(dead_code, unused_imports, reason = "not every test uses every prop")]

mod dns;
pub mod h2;
pub mod h2_server;
pub mod issuer;
pub mod netns;
pub mod otlp;
pub mod pki;
mod proxy;
mod raw;
pub mod rotel;
pub mod strict;
pub mod tls;
pub mod tokens;
mod tools;
mod upstream;

use std::{
    net::{SocketAddr, TcpListener},
    thread,
    time::{Duration, Instant},
};

use socket2::{Domain, Socket, Type};

pub use dns::Dns;
pub use proxy::{Launch, Proxy, binary, binary_for_any_user, signal};
pub use raw::{RawClient, RawServer};
pub use tools::{Daemon, has_folder, has_tool, peer_script, python_with, skip, tool};
pub use upstream::{Upstream, UpstreamResponse, text};

/// How long anything that must happen may take on a slow and busy machine.
pub const WAIT_LIMIT: Duration = Duration::from_secs(20);

/// Waits until `condition` holds; fails the test, saying `what`, if it does not within [`WAIT_LIMIT`].
#[track_caller]
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < WAIT_LIMIT, "waited {WAIT_LIMIT:?} in vain for: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// An address that refuses connections: bound until the process ends and never listened to, so that no other process
/// gets it.
pub fn refusing_address() -> SocketAddr {
    let kept = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    kept.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("a port");
    let address = kept.local_addr().ok().and_then(|address| address.as_socket()).expect("its address");
    std::mem::forget(kept);
    address
}

/// A port that was free a moment ago, for tools that cannot bind port 0. Taken from below the ephemeral range.
pub fn free_port() -> u16 {
    use std::sync::atomic::{AtomicU16, Ordering};
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = u16::try_from(std::process::id() % 12_000).unwrap_or(0);
    loop {
        let port = 16_000 + (start + NEXT.fetch_add(1, Ordering::Relaxed)) % 12_000;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Waits until something accepts connections there.
#[track_caller]
pub fn wait_for_port(address: SocketAddr) {
    eventually(&format!("a listener on {address}"), || std::net::TcpStream::connect(address).is_ok());
}
