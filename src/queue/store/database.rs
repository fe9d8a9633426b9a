//! The SQLite file: how it is opened, verified, committed and checkpointed.
//!
//! `synchronous = FULL` with a write-ahead log: a commit is one `fdatasync`. Checkpoints are made here and not by SQLite,
//! which ignores their errors. Closing never syncs: after a failed `fdatasync` a second one may succeed without having
//! written anything.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use rusqlite::{Connection, OpenFlags, config::DbConfig, wal::CheckpointMode};

use super::{
    cipher::Cipher,
    counts::Counts,
    error::StoreError,
    issue::IdKey,
    schema::{self, FileKind, MIGRATIONS},
};
use crate::unix_time::UnixMillis;

/// The log is copied into the database when it has so many pages, 2 MiB.
const CHECKPOINT_PAGES: u32 = 512;
/// The log file keeps at most this size when it is empty.
const LOG_FILE_LIMIT: i64 = 4 << 20;
const PAGE: u64 = 4096;
/// The log of an earlier process, until the first checkpoint or commit.
const UNKNOWN: u32 = u32::MAX;
/// Of the log file: its header, and the header of each page.
const LOG_HEADER: u64 = 32;
const PAGE_HEADER: u64 = 24;
/// Pages that one call gives back to the file system, 2 MiB.
const VACUUM_PAGES: u32 = 512;

/// An open database, whose schema is current.
pub struct Database {
    pub(super) connection: Connection,
    pub(super) cipher: Option<Cipher>,
    pub(super) counts: Counts,
    pub(super) ids: IdKey,
    /// Pages in the log that a commit has synced, or [`UNKNOWN`].
    log_pages: Arc<AtomicU32>,
    on_disk: bool,
}

/// Whether the key is checked: reading the list of deliveries needs none.
pub(super) enum KeyCheck {
    Required,
    IfGiven,
}

impl Database {
    /// Opens the file; an empty one becomes a store. Leaves a file that it refuses byte for byte as it was.
    pub(super) fn open(path: &Path, cipher: Option<Cipher>, check: KeyCheck) -> Result<Self, StoreError> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
            | OpenFlags::SQLITE_OPEN_NO_MUTEX
            | OpenFlags::SQLITE_OPEN_EXRESCODE;
        let connection = Connection::open_with_flags(path, flags)?;
        connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
        connection.busy_timeout(std::time::Duration::ZERO)?;
        connection.execute_batch("PRAGMA locking_mode = EXCLUSIVE; PRAGMA cell_size_check = ON")?;
        match schema::file_kind(&connection)? {
            FileKind::Empty => connection.execute_batch("PRAGMA auto_vacuum = INCREMENTAL")?,
            FileKind::Store { version } if version > MIGRATIONS.len() as i64 => {
                let known = MIGRATIONS.len() as i64;
                return Err(StoreError::NewerSchema { path: path.into(), found: version, known });
            }
            FileKind::Store { .. } => check_key(&connection, path, cipher.as_ref(), &check)?,
            FileKind::Foreign => return Err(StoreError::NotAStore(path.into())),
        }
        connection.execute_batch(&format!(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA wal_autocheckpoint = 0;
             PRAGMA journal_size_limit = {LOG_FILE_LIMIT}"
        ))?;
        Self::prepare(connection, cipher, true)
    }

    pub(super) fn in_memory(cipher: Option<Cipher>) -> Result<Self, StoreError> {
        Self::prepare(Connection::open_in_memory()?, cipher, false)
    }

    fn prepare(
        mut connection: Connection,
        cipher: Option<Cipher>,
        on_disk: bool,
    ) -> Result<Self, StoreError> {
        connection.execute_batch("PRAGMA temp_store = MEMORY")?;
        connection.set_prepared_statement_cache_capacity(64);
        let log_pages = Arc::new(AtomicU32::new(UNKNOWN));
        let pages = log_pages.clone();
        connection.wal_hook(Some(move |_: &mut rusqlite::hooks::Wal, count| {
            pages.store(u32::try_from(count).unwrap_or(UNKNOWN), Ordering::Relaxed);
            Ok(())
        }))?;
        schema::migrate(&mut connection, MIGRATIONS)?;
        let (counts, ids) = (Counts::read(&connection)?, IdKey::of(&connection)?);
        Ok(Self { connection, cipher, counts, ids, log_pages, on_disk })
    }

    /// Reads the whole structure of the file.
    pub(super) fn verify(&self) -> Result<(), StoreError> {
        let result: String = self.connection.pragma_query_value(None, "quick_check", |row| row.get(0))?;
        if result == "ok" { Ok(()) } else { Err(StoreError::corrupt(result)) }
    }

    /// After a start: the key of a new store, what a crash has interrupted, and a clock that was set back.
    pub(super) fn recover(&mut self, now: UnixMillis) -> Result<(), StoreError> {
        let now = now.0 as i64;
        let transaction = self.connection.transaction()?;
        if let Some(cipher) = &self.cipher {
            let insert = "INSERT INTO meta VALUES ('key_check', ?1) ON CONFLICT DO NOTHING";
            transaction.execute(insert, [cipher.check().as_slice()])?;
        }
        // An attempt that must not be repeated was under way.
        transaction.execute(
            "UPDATE delivery SET state = 3, reason = 'ambiguous', next = NULL, started = NULL, ended = ?1
             WHERE started IS NOT NULL",
            [now],
        )?;
        // Waits that were decided later than now count as over. A second of correction is normal.
        transaction.execute(
            "UPDATE delivery SET next = ?1, scheduled = ?1
             WHERE state < 2 AND next IS NOT NULL AND scheduled > ?1 + 1000",
            [now],
        )?;
        // Where the first of an order has ended in this way, the next one may go.
        transaction.execute(
            "UPDATE delivery SET next = ?1, scheduled = ?1 WHERE state < 2 AND next IS NULL AND seq IN
             (SELECT min(seq) FROM delivery WHERE order_key IS NOT NULL AND state < 2 GROUP BY queue, order_key
              HAVING count(next) = 0)",
            [now],
        )?;
        transaction.commit()?;
        self.counts = Counts::read(&self.connection)?;
        Ok(())
    }

    /// The length of the log up to the last synced commit, if that is known.
    pub(super) fn synced_log(&self) -> Option<u64> {
        match self.log_pages.load(Ordering::Relaxed) {
            UNKNOWN => None,
            0 => Some(0),
            pages => Some(LOG_HEADER + u64::from(pages) * (PAGE_HEADER + PAGE)),
        }
    }

    /// Copies a long log into the database.
    pub(super) fn checkpoint_if_long(&self) -> Result<(), StoreError> {
        if self.log_pages.load(Ordering::Relaxed) < CHECKPOINT_PAGES {
            return Ok(());
        }
        self.checkpoint(CheckpointMode::PASSIVE)
    }

    /// Copies the log into the database and empties its file.
    pub(super) fn checkpoint_all(&self) -> Result<(), StoreError> {
        self.checkpoint(CheckpointMode::TRUNCATE)
    }

    fn checkpoint(&self, mode: CheckpointMode) -> Result<(), StoreError> {
        if !self.on_disk {
            return Ok(());
        }
        let (log, copied) = self.connection.wal_checkpoint_v2(None::<&str>, mode)?;
        // Completely copied: the next commit begins at the start of the log.
        if log <= copied {
            self.log_pages.store(0, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Gives free pages back to the file system.
    pub(super) fn shrink(&self) -> Result<(), StoreError> {
        // Each step frees a page: `execute_batch` would do only the first.
        let mut statement = self.connection.prepare(&format!("PRAGMA incremental_vacuum({VACUUM_PAGES})"))?;
        let mut rows = statement.query([])?;
        while rows.next()?.is_some() {}
        Ok(())
    }

    /// Bytes of the file that hold something.
    pub(super) fn used_bytes(&self) -> Result<u64, StoreError> {
        let number =
            |pragma: &str| self.connection.pragma_query_value(None, pragma, |row| row.get::<_, i64>(0));
        let pages = number("page_count")?.saturating_sub(number("freelist_count")?);
        Ok(u64::try_from(pages).unwrap_or(0) * PAGE)
    }
}

fn check_key(
    connection: &Connection,
    path: &Path,
    cipher: Option<&Cipher>,
    check: &KeyCheck,
) -> Result<(), StoreError> {
    use rusqlite::OptionalExtension;
    let stored: Option<Vec<u8>> = connection
        .query_row("SELECT value FROM meta WHERE name = 'key_check'", [], |row| row.get(0))
        .optional()?;
    match (stored, cipher, check) {
        (Some(stored), Some(cipher), _) if stored != cipher.check() => Err(StoreError::WrongKey(path.into())),
        (Some(_), None, KeyCheck::Required) => Err(StoreError::KeyMissing(path.into())),
        _ => Ok(()),
    }
}
