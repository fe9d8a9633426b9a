//! What the store's thread is asked to do, with the channel for the reply.

use tokio::sync::oneshot;

use super::{batch::Batch, error::StoreError};

/// One caller's part of a batch.
pub(super) trait Job: Send {
    /// Applies it, and keeps what is to be replied. It is applied again if the batch was rolled back for another job's
    /// sake. The error is the database's: this batch must be rolled back.
    fn apply(&mut self, batch: &mut Batch<'_>) -> Result<(), StoreError>;
    /// How much more space it needs; such a job is refused while the disk is full.
    fn new_bytes(&self) -> u64;
    /// Replies with what [`Job::apply`] kept, or with this error.
    fn reply(self: Box<Self>, committed: Result<(), StoreError>);
}

/// A job with the channel for its reply.
pub(super) type Request<T> = (Box<dyn Job>, oneshot::Receiver<Result<T, StoreError>>);

/// A closure as a [`Job`].
pub(super) struct Task<T, F> {
    apply: F,
    new_bytes: u64,
    result: Option<Result<T, StoreError>>,
    reply: oneshot::Sender<Result<T, StoreError>>,
}

impl<T, F> Task<T, F>
where
    T: Send + 'static,
    F: FnMut(&mut Batch<'_>) -> Result<T, StoreError> + Send + 'static,
{
    /// A job that needs more space.
    pub(super) fn growing(new_bytes: usize, apply: F) -> Request<T> {
        Self::with_reply(apply, new_bytes as u64)
    }

    /// A job that reads, changes or deletes.
    pub(super) fn neutral(apply: F) -> Request<T> {
        Self::with_reply(apply, 0)
    }

    fn with_reply(apply: F, new_bytes: u64) -> Request<T> {
        let (reply, response) = oneshot::channel();
        (Box::new(Self { apply, new_bytes, result: None, reply }), response)
    }
}

impl<T, F> Job for Task<T, F>
where
    T: Send + 'static,
    F: FnMut(&mut Batch<'_>) -> Result<T, StoreError> + Send + 'static,
{
    fn apply(&mut self, batch: &mut Batch<'_>) -> Result<(), StoreError> {
        let result = (self.apply)(batch);
        let database_error = result.as_ref().err().filter(|error| error.fault().is_some()).cloned();
        self.result = Some(result);
        database_error.map_or(Ok(()), Err)
    }

    fn new_bytes(&self) -> u64 {
        self.new_bytes
    }

    fn reply(self: Box<Self>, committed: Result<(), StoreError>) {
        let result = match (committed, self.result) {
            (Err(error), _) => Err(error),
            (Ok(()), Some(result)) => result,
            (Ok(()), None) => Err(StoreError::Closed),
        };
        // A caller that no longer waits has left the outcome to the store.
        let _ = self.reply.send(result);
    }
}
