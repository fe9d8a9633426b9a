//! HTTP/2 on the wire: what connections of clients and connections to endpoints share. The `h2` crate implements
//! framing, HPACK and flow control; this module adds message bodies, tunnels, and an observer of the frames.

pub mod body;
mod field_bytes;
pub mod fields;
pub mod frames;
pub mod header_filter;
mod hpack;
mod huffman;
pub mod pending_requests;
pub mod send;
pub mod tunnel;
pub mod wire_state;

use std::time::Duration;

/// How many streams that were reset here `h2` remembers, to ignore their late frames. Frames of a stream that is no
/// longer remembered are errors (RFC 9113 §5.1), and late trailers even end the connection. About half a KiB each.
pub const MAX_RESET_STREAMS: usize = 2048;
/// How long such a stream is remembered: longer than any round trip and any queue in between.
pub const RESET_STREAM_DURATION: Duration = Duration::from_secs(30);
/// Stream errors over a connection's life after which `h2` ends it at once. It bounds the memory for resets that are
/// not written yet; long before, the connection is drained ([`ERRORS_TO_RETIRE`]).
pub const MAX_STREAM_ERRORS: usize = 16_384;
/// Stream errors over a connection's life after which it takes no new streams.
pub const ERRORS_TO_RETIRE: u32 = 8_192;
/// The connection of a client is closed when a PING has not been answered for this long.
pub const PING_TIMEOUT: Duration = Duration::from_secs(20);
