//! The files of a store: the database, its write-ahead log, the lock and the reserve.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use super::error::StoreError;
use crate::{platform, unix_time::UnixMillis};

const DATABASE: &str = "queue.db";
const LOG: &str = "queue.db-wal";
const LOCK: &str = "lock";
const RESERVE: &str = "reserve";

/// The reserve is set aside again only where so much more is free: the write-ahead log of what is accepted next.
const HEADROOM: u64 = 4 << 20;

/// A directory that this process owns until the value is dropped.
#[derive(Debug)]
pub struct StoreDirectory {
    path: PathBuf,
    _lock: File,
    reserve: u64,
}

impl StoreDirectory {
    /// Creates what is missing, and locks it.
    pub fn create(path: &Path, reserve: u64) -> Result<Self, StoreError> {
        let new = !path.exists();
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(StoreError::file(path))?;
        if new && let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            sync_directory(parent)?;
        }
        let directory = Self::lock(path, reserve)?;
        let database = directory.database();
        create_database(&database)?;
        sync_directory(path)?;
        Ok(directory)
    }

    /// Locks an existing store.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        if !path.join(DATABASE).is_file() {
            return Err(StoreError::NoStore(path.into()));
        }
        Self::lock(path, 0)
    }

    fn lock(path: &Path, reserve: u64) -> Result<Self, StoreError> {
        let file_path = path.join(LOCK);
        let failed = |error| StoreError::file(&file_path)(error);
        let mut file =
            private().read(true).write(true).create(true).truncate(false).open(&file_path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut owner = String::new();
                let _ = file.take(256).read_to_string(&mut owner);
                let owner = if owner.trim().is_empty() { "unknown" } else { owner.trim() }.to_owned();
                return Err(StoreError::Locked { path: path.into(), owner });
            }
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        let host = rustix::system::uname();
        let owner = format!("process {} on {}\n", std::process::id(), host.nodename().to_string_lossy());
        file.set_len(0).and_then(|()| file.write_all(owner.as_bytes())).map_err(failed)?;
        Ok(Self { path: path.into(), _lock: file, reserve })
    }

    /// Makes lasting which files there are. SQLite need not, when it deletes the journal of its first transactions: that
    /// journal would undo everything if it came back.
    pub fn sync(&self) -> Result<(), StoreError> {
        sync_directory(&self.path)
    }

    pub fn database(&self) -> PathBuf {
        self.path.join(DATABASE)
    }

    /// Cuts the write-ahead log to the commits that were synced: what came after has failed, and must not come back.
    pub fn cut_log(&self, length: u64) -> Result<(), StoreError> {
        let path = self.path.join(LOG);
        match OpenOptions::new().write(true).open(&path) {
            Ok(log) if log.metadata().is_ok_and(|metadata| metadata.len() > length) => {
                log.set_len(length).map_err(StoreError::file(&path))
            }
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(StoreError::file(&path)(error)),
        }
    }

    /// Renames the database and its log, and makes an empty one. Nothing is deleted.
    pub fn set_corrupt_aside(&self, now: UnixMillis) -> Result<PathBuf, StoreError> {
        let database = self.database();
        let aside = self.path.join(format!("{DATABASE}.corrupt-{}", now.0));
        fs::rename(&database, &aside).map_err(StoreError::file(&database))?;
        let log = self.path.join(LOG);
        if log.exists() {
            let log_aside = self.path.join(format!("{DATABASE}.corrupt-{}-wal", now.0));
            fs::rename(&log, log_aside).map_err(StoreError::file(&log))?;
        }
        create_database(&database)?;
        sync_directory(&self.path)?;
        Ok(aside)
    }

    /// Sets disk space aside. Fails where there is too little.
    pub fn create_reserve(&self) -> Result<(), StoreError> {
        let path = self.path.join(RESERVE);
        if fs::metadata(&path).is_ok_and(|metadata| metadata.len() == self.reserve) {
            return Ok(());
        }
        let written = private().write(true).create(true).truncate(true).open(&path).and_then(|file| {
            platform::allocate(&file, self.reserve + HEADROOM)?;
            file.set_len(self.reserve)
        });
        written.map_err(|error| {
            let _ = fs::remove_file(&path);
            StoreError::file(&path)(error)
        })
    }

    pub fn release_reserve(&self) {
        let _ = fs::remove_file(self.path.join(RESERVE));
    }
}

/// Creates the file, which SQLite would create readable for all; the log gets its mode.
fn create_database(path: &Path) -> Result<(), StoreError> {
    private().write(true).create(true).truncate(false).open(path).map_err(StoreError::file(path)).map(drop)
}

/// Options for files that only this user reads.
fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.mode(0o600);
    options
}

fn sync_directory(path: &Path) -> Result<(), StoreError> {
    File::open(path).and_then(|directory| directory.sync_all()).map_err(StoreError::file(path))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_second_owner_is_refused_and_named_the_first() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a/store");
        let first = StoreDirectory::create(&path, 0).unwrap();
        let refused = StoreDirectory::create(&path, 0).unwrap_err().to_string();
        let pid = format!("process {} ", std::process::id());
        assert!(refused.contains(&pid) && refused.contains(path.to_str().unwrap()), "{refused}");
        assert!(StoreDirectory::open(&path).is_err());
        drop(first);
        StoreDirectory::open(&path).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(&path.join(DATABASE)), mode(&path.join(LOCK))), (0o700, 0o600, 0o600));
    }

    #[test]
    fn opening_creates_nothing() {
        let root = tempfile::tempdir().unwrap();
        assert!(matches!(StoreDirectory::open(root.path()), Err(StoreError::NoStore(_))));
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn the_reserve_takes_disk_space() {
        use std::os::unix::fs::MetadataExt;
        let root = tempfile::tempdir().unwrap();
        let directory = StoreDirectory::create(root.path(), 1 << 20).unwrap();
        directory.create_reserve().unwrap();
        let metadata = fs::metadata(root.path().join(RESERVE)).unwrap();
        assert_eq!(metadata.len(), 1 << 20);
        assert!(metadata.blocks() * 512 >= 1 << 20, "{} blocks", metadata.blocks());
        directory.release_reserve();
        assert!(!root.path().join(RESERVE).exists());
    }
}
