//! What can go wrong with the store.

use std::{
    io,
    path::{Path, PathBuf},
};

use rusqlite::ErrorCode;

use crate::queue::{DeliveryId, request::UnreadableRequest};

/// Why the store could not do what it was asked for. Cloned for every waiter of a commit that failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    #[error("the store or its disk is full")]
    Full,
    #[error("the queue is full")]
    QueueFull,
    #[error("the Idempotency-Key was used before, with another request")]
    KeyReused(DeliveryId),
    #[error("there is no such delivery")]
    NotFound,
    #[error("the delivery is {0}")]
    WrongState(&'static str),
    #[error("the stored content cannot be read: {0}")]
    Unreadable(String),
    /// A commit failed, or the file could not be opened again since.
    #[error("the store has failed: {0}")]
    Failed(String),
    #[error("the store is closed")]
    Closed,
    #[error(
        "the store {path} belongs to another process: {owner}. One process at a time uses a store: stop that one, or \
         name another [store] path"
    )]
    Locked { path: PathBuf, owner: String },
    #[error("no store in {0}: there is no file queue.db")]
    NoStore(PathBuf),
    #[error(
        "{0} is an SQLite database, but not a store of Outrigger; it is left as it is. Name another [store] path"
    )]
    NotAStore(PathBuf),
    #[error(
        "the store {path} was written by a newer version (schema {found}, this one knows {known}); it is left as it is. \
         Run the newer version"
    )]
    NewerSchema { path: PathBuf, found: i64, known: i64 },
    #[error("the store {0} is encrypted: set [store] key_file to its key; nothing was changed")]
    KeyMissing(PathBuf),
    #[error(
        "the store {0} is encrypted with another key: set [store] key_file to that one; nothing was changed"
    )]
    WrongKey(PathBuf),
    #[error("{path} is not a key: write 32 bytes, raw, in hex or base64 (`openssl rand -base64 32`)")]
    InvalidKey { path: PathBuf },
    #[error("cannot use {path}: {reason}")]
    File { path: PathBuf, reason: String },
    #[error("SQLite: {reason}")]
    Database { fault: Fault, reason: String },
}

/// What an error of the database means for the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// No space left. The file is intact.
    DiskFull,
    /// Reading or writing failed: what the kernel still holds of the file may not be on the disk.
    Io,
    Corrupt,
    /// One statement failed; the file is intact.
    Statement,
}

impl StoreError {
    pub(super) fn file(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |error| Self::File { path, reason: error.to_string() }
    }

    pub(super) fn corrupt(reason: impl Into<String>) -> Self {
        Self::Database { fault: Fault::Corrupt, reason: reason.into() }
    }

    pub const fn fault(&self) -> Option<Fault> {
        match self {
            Self::Database { fault, .. } => Some(*fault),
            _ => None,
        }
    }
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        let fault = match error.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => Fault::DiskFull,
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => Fault::Corrupt,
            Some(
                ErrorCode::SystemIoFailure
                | ErrorCode::CannotOpen
                | ErrorCode::ReadOnly
                | ErrorCode::PermissionDenied,
            ) => Fault::Io,
            _ => Fault::Statement,
        };
        Self::Database { fault, reason: error.to_string() }
    }
}

impl From<UnreadableRequest> for StoreError {
    fn from(error: UnreadableRequest) -> Self {
        Self::Unreadable(error.to_string())
    }
}
