//! Bodies: streamed, with a buffer of what is needed to send a request again.

mod kept;
mod request;
mod response;

pub use request::{CallerBody, ClaimFields, Replay, Replayable, RequestBody, Sent, SourceFailure};
pub use response::{Held, ResponseBody, Streaming};
