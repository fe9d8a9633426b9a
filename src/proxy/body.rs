//! The bodies that pass through: streamed, with what is needed to send a request again.

mod kept;
mod request;
mod response;

pub use request::{CallerBody, ClaimFields, Replay, Replayable, RequestBody, Sent, SourceFailure};
pub use response::{Held, ResponseBody, Streaming};
