//! HTTP/2 on the wire: what the connections of clients and those to endpoints share. Framing, HPACK and flow control are
//! those of the `h2` crate; this module adds message bodies, tunnels, and a view of the frames that pass.

pub mod arrivals;
pub mod body;
pub mod fields;
pub mod frames;
pub mod guard;
mod hpack;
mod huffman;
mod octets;
pub mod send;
pub mod tunnel;
pub mod wire;

use std::time::Duration;

/// Streams that were reset on this side and whose late frames are still ignored. Frames of a stream that is forgotten are
/// errors (RFC 9113 §5.1), and late trailers even end the connection. About half a KiB each.
pub const REMEMBERED_RESETS: usize = 2048;
/// How long such a stream is remembered: longer than any round trip and any queue on the way.
pub const RESET_MEMORY: Duration = Duration::from_secs(30);
/// Stream errors over a connection's life after which `h2` ends it at once. It bounds the memory that unwritten resets
/// can take; long before, the connection is asked to leave ([`ERRORS_TO_RETIRE`]).
pub const MOST_STREAM_ERRORS: usize = 16_384;
/// Stream errors over a connection's life after which it takes no new streams.
pub const ERRORS_TO_RETIRE: u32 = 8_192;
/// The connection of a client is closed when a PING has not been answered for this long.
pub const PING_CLOSES_AFTER: Duration = Duration::from_secs(20);
