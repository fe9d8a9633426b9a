//! The tables, and how an older file becomes a current one.

use rusqlite::{Connection, TransactionBehavior};

use super::error::StoreError;

/// Marks the file as a store of Outrigger: "OUTR".
const APPLICATION_ID: i64 = 0x4f55_5452;

/// One script a version: `MIGRATIONS[0]` makes version 1 of an empty file. A released script is never changed.
pub(super) const MIGRATIONS: &[&str] = &["
-- What the scheduler reads: small, and written at each change.
CREATE TABLE delivery (
  seq INTEGER PRIMARY KEY,
  id BLOB NOT NULL UNIQUE,
  queue TEXT NOT NULL,
  identity TEXT NOT NULL,           -- of the client: only it may read the result
  idempotency_key TEXT,             -- the client's
  fingerprint BLOB,                 -- of the request with that key
  order_key TEXT,                   -- deliveries with the same one go in order of seq
  state INTEGER NOT NULL,           -- 0 queued, 1 waiting, 2 done, 3 dead, 4 cancelled
  reason TEXT,                      -- why it is dead
  attempts INTEGER NOT NULL,        -- that reached the service
  accepted INTEGER NOT NULL,        -- all times: milliseconds since 1970
  since INTEGER NOT NULL,           -- accepted or replayed: `expires` counts from here
  next INTEGER,                     -- not before; NULL: it has ended, or an earlier one of its order_key has not
  scheduled INTEGER NOT NULL,       -- when `next` was decided: a clock behind this was set back
  started INTEGER,                  -- an attempt is under way that must not be repeated after a crash
  ended INTEGER,
  bytes INTEGER NOT NULL            -- of the request
) STRICT;
CREATE INDEX due ON delivery(queue, next) WHERE next IS NOT NULL;
CREATE INDEX pending ON delivery(queue, since) WHERE state < 2;
CREATE INDEX ordered ON delivery(queue, order_key, next) WHERE order_key IS NOT NULL AND state < 2;
CREATE INDEX ended ON delivery(queue, state, ended) WHERE ended IS NOT NULL;
CREATE INDEX started ON delivery(started) WHERE started IS NOT NULL;
CREATE UNIQUE INDEX idempotency ON delivery(queue, identity, idempotency_key) WHERE idempotency_key IS NOT NULL;

-- The request. Written once, read when it is sent.
CREATE TABLE content (
  seq INTEGER PRIMARY KEY,
  sealed INTEGER NOT NULL,
  head BLOB NOT NULL,
  body BLOB NOT NULL
) STRICT;

-- The last response, or why there is none.
CREATE TABLE outcome (
  seq INTEGER PRIMARY KEY,
  at INTEGER NOT NULL,
  status INTEGER,
  cause TEXT,
  sealed INTEGER NOT NULL,
  head BLOB NOT NULL,
  body BLOB NOT NULL,
  truncated INTEGER NOT NULL
) STRICT;

CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT, WITHOUT ROWID;
"];

/// Whose file this is, and which version.
pub(super) enum FileKind {
    Empty,
    Store { version: i64 },
    Foreign,
}

pub(super) fn file_kind(connection: &Connection) -> Result<FileKind, StoreError> {
    let number = |pragma: &str| connection.pragma_query_value(None, pragma, |row| row.get::<_, i64>(0));
    let version = number("user_version")?;
    let tables: i64 = connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
    Ok(match number("application_id")? {
        APPLICATION_ID => FileKind::Store { version },
        0 if tables == 0 => FileKind::Empty,
        _ => FileKind::Foreign,
    })
}

/// Brings the file to the last version, all or nothing.
pub(super) fn migrate(connection: &mut Connection, migrations: &[&str]) -> Result<(), StoreError> {
    let version: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    let done = usize::try_from(version).unwrap_or(0);
    if done >= migrations.len() {
        return Ok(());
    }
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    for script in &migrations[done..] {
        transaction.execute_batch(script)?;
    }
    transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
    transaction.pragma_update(None, "user_version", migrations.len() as i64)?;
    Ok(transaction.commit()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(connection: &Connection) -> i64 {
        connection.pragma_query_value(None, "user_version", |row| row.get(0)).unwrap()
    }

    #[test]
    fn a_migration_keeps_what_is_stored() {
        let mut connection = Connection::open_in_memory().unwrap();
        migrate(&mut connection, &MIGRATIONS[..1]).unwrap();
        connection.execute("INSERT INTO content VALUES (1, 0, x'61', x'62')", []).unwrap();
        let next = [MIGRATIONS[0], "ALTER TABLE content ADD COLUMN kind TEXT NOT NULL DEFAULT 'request'"];
        migrate(&mut connection, &next).unwrap();
        let row: (Vec<u8>, String) = connection
            .query_row("SELECT body, kind FROM content", [], |row| Ok((row.get(0)?, row.get(1)?)))
            .unwrap();
        assert_eq!((row.0.as_slice(), row.1.as_str(), version(&connection)), (&b"b"[..], "request", 2));
        migrate(&mut connection, &next).unwrap();
    }

    #[test]
    fn a_migration_that_fails_changes_nothing() {
        let mut connection = Connection::open_in_memory().unwrap();
        migrate(&mut connection, &MIGRATIONS[..1]).unwrap();
        let broken = [MIGRATIONS[0], "CREATE TABLE one (a); CREATE TABLE one (a)"];
        assert!(migrate(&mut connection, &broken).is_err());
        assert_eq!(version(&connection), 1);
        assert!(connection.execute("INSERT INTO one VALUES (1)", []).is_err());
    }

    #[test]
    fn foreign_files_are_recognised() {
        let mut connection = Connection::open_in_memory().unwrap();
        assert!(matches!(file_kind(&connection), Ok(FileKind::Empty)));
        migrate(&mut connection, MIGRATIONS).unwrap();
        assert!(matches!(file_kind(&connection), Ok(FileKind::Store { version: 1 })));
        let other = Connection::open_in_memory().unwrap();
        other.execute_batch("CREATE TABLE other (a)").unwrap();
        assert!(matches!(file_kind(&other), Ok(FileKind::Foreign)));
    }
}
