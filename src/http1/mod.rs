//! HTTP/1.1 on the wire (RFC 9112): heads, the framing of bodies, and the bytes on their way in and out. Which messages
//! are sent, and what becomes of a connection, is decided by those who use it: `proxy::connection` towards callers,
//! `upstream::http1` towards endpoints.

pub mod decoder;
pub mod framing;
pub mod head;
pub mod intake;
pub mod outlet;
pub mod target;
#[cfg(test)]
mod tests;

use framing::FramingError;
use head::HeadError;

/// Of the head of a message.
pub const MAX_HEAD_BYTES: usize = 64 * 1024;

/// What is wrong with what came, or why no more of it came.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error(transparent)]
    Head(#[from] HeadError),
    #[error(transparent)]
    Framing(#[from] FramingError),
    /// It ended in the middle of a message.
    #[error("the connection ended in the middle of a message")]
    CutOff,
    /// It ended where a message could have begun.
    #[error("the connection was closed")]
    Closed,
    /// The head to be sent does not say where its body ends.
    #[error("the request to be sent has no valid framing: {0}")]
    Unsendable(FramingError),
    /// The body to be sent is longer or shorter than its head has said.
    #[error("body length does not match Content-Length")]
    WrongLength,
    /// The body to be sent broke off.
    #[error("the body to be sent broke off")]
    BrokenOff,
}

impl Error {
    /// Whether what came is not HTTP.
    pub const fn is_malformed(&self) -> bool {
        matches!(self, Self::Head(_) | Self::Framing(_))
    }

    /// Whether the message to be sent is at fault: its receiver has no part in it.
    pub const fn is_of_sender(&self) -> bool {
        matches!(self, Self::Unsendable(_) | Self::WrongLength | Self::BrokenOff)
    }
}
