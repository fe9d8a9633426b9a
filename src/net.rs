//! Sockets and timers of connections: nothing of HTTP.

pub mod alpn;
pub mod io;
pub mod watchdog;
