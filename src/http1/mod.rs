//! HTTP/1.1 on the wire (RFC 9112): heads, body framing, and the buffers for reading and writing. The users of this
//! module decide which messages are sent and what becomes of a connection: `proxy::connection` towards clients,
//! `upstream::http1` towards endpoints.

#[cfg(test)]
mod conformance_tests;
pub mod decoder;
pub mod framing;
pub mod head;
pub mod read_buffer;
pub mod target;
#[cfg(test)]
mod tests;
pub mod write_buffer;

use framing::FramingError;
use head::HeadError;

/// The largest head of a message.
pub const MAX_HEAD_BYTES: usize = 64 * 1024;

/// Why a message could not be read or sent.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error(transparent)]
    Head(#[from] HeadError),
    #[error(transparent)]
    Framing(#[from] FramingError),
    /// It was closed in the middle of a message.
    #[error("the connection was closed in the middle of a message")]
    UnexpectedEnd,
    /// It was closed where a message could have started.
    #[error("the connection was closed")]
    Closed,
    /// The head to be sent does not delimit its body.
    #[error("the request cannot be sent, because it has no valid framing: {0}")]
    Unsendable(FramingError),
    /// The body to be sent is longer or shorter than its head announces.
    #[error("body length does not match Content-Length")]
    LengthMismatch,
    /// The body to be sent ended early.
    #[error("the body to be sent ended early")]
    BodyEndedEarly,
}

impl Error {
    /// Whether the received bytes are not valid HTTP.
    pub const fn is_malformed(&self) -> bool {
        matches!(self, Self::Head(_) | Self::Framing(_))
    }

    /// Whether the message to be sent is at fault, so that its receiver is not to blame.
    pub const fn is_sender_fault(&self) -> bool {
        matches!(self, Self::Unsendable(_) | Self::LengthMismatch | Self::BodyEndedEarly)
    }
}
