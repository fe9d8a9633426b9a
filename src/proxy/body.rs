//! Bodies: streamed, with a buffer of what is needed to send a request again.

mod buffered;
mod copied;
mod replay_buffer;
mod request;
mod response;

pub use buffered::{BufferedBody, ReadBody};
pub use copied::{BodyCopy, CopiedBody};
pub use request::{ClaimFields, ClientBody, Replay, RequestBody, SourceFailure, UploadStatus};
pub use response::{RequestResources, ResponseBody, StreamingBody};
