//! Bodies: streamed, with a buffer of what is needed to send a request again.

mod kept;
mod request;
mod response;

pub use request::{CallerBody, ClaimFields, Replay, Replayable, RequestBody, Sent, SourceFailure};
pub use response::{Held, ResponseBody, Streaming};

use crate::{http1, upstream::pool::AnswerError};

/// Why a body ended early.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    #[error(transparent)]
    Peer(#[from] h2::Error),
    #[error(transparent)]
    Answer(#[from] AnswerError),
    #[error(transparent)]
    Caller(#[from] http1::Error),
    /// A newer attempt reads the request's body.
    #[error("a newer attempt has taken over the request's body")]
    TakenOver,
}
