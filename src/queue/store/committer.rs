//! The store's thread: gathers jobs, applies them in one transaction, commits, replies. And what it does when a commit fails.

use std::time::{Duration, Instant};

use rusqlite::TransactionBehavior;
use tokio::sync::mpsc::Receiver;
use tracing::{error, info, warn};

use super::{
    batch::Batch,
    cipher::Cipher,
    database::{Database, KeyCheck},
    directory::StoreDirectory,
    error::{Fault, StoreError},
    job::Job,
    settings::{Durability, StoreSettings},
    status::{SharedStatus, StoreFailure, StoreStatus},
};
use crate::unix_time::SteadyClock;

/// Jobs of one commit, and the bytes of requests from which on it takes no further one.
const BATCH_JOBS: usize = 512;
const BATCH_BYTES: u64 = 1 << 20;
/// How long a failed store waits before the file is opened again; doubles up to the maximum.
const REOPEN_AFTER: Duration = Duration::from_secs(1);
const REOPEN_AFTER_MAX: Duration = Duration::from_secs(60);
/// How often a full disk is looked at again.
const FULL_CHECK: Duration = Duration::from_millis(500);

/// What the thread owns.
pub(super) struct Committer {
    /// `None` for a store in memory.
    directory: Option<StoreDirectory>,
    cipher: Option<Cipher>,
    max_bytes: u64,
    clock: SteadyClock,
    state: State,
    /// The log has to be cut to this length before the file is opened: what follows belongs to commits that failed, whose
    /// callers got an error.
    cut: Option<u64>,
    shared: SharedStatus,
    status: StoreStatus,
}

enum State {
    Open(Database),
    /// Accepts nothing: the reserve is in use.
    Full(Database, Instant),
    /// No file is open; the next attempt to open it is at the instant.
    Failed {
        reason: String,
        retry: Instant,
        wait: Duration,
    },
}

impl State {
    fn failed(reason: String) -> Self {
        Self::Failed { reason, retry: Instant::now(), wait: REOPEN_AFTER }
    }
}

/// How a batch ended that was not committed.
enum BatchError {
    /// The job with this index failed.
    Job(usize, StoreError),
    Commit(StoreError),
}

impl Committer {
    pub(super) fn open(
        settings: &StoreSettings,
        clock: SteadyClock,
        shared: SharedStatus,
    ) -> Result<Self, StoreError> {
        let cipher = settings.key_file.as_deref().map(Cipher::from_file).transpose()?;
        let directory = match settings.durability {
            Durability::Disk => Some(StoreDirectory::create(&settings.path, settings.reserve.0)?),
            Durability::Memory => None,
        };
        let state = State::failed(String::new());
        let (max_bytes, status) = (settings.max_bytes.0, StoreStatus::default());
        let mut committer = Self { directory, cipher, max_bytes, clock, state, cut: None, shared, status };
        let first = committer.open_database();
        match &first {
            // What only an operator can mend ends the start.
            Err(error) if error.fault().is_none() => return Err(error.clone()),
            _ => committer.opened(first),
        }
        committer.publish();
        Ok(committer)
    }

    pub(super) fn run(mut self, mut jobs: Receiver<Box<dyn Job>>) {
        while let Some(first) = jobs.blocking_recv() {
            let mut bytes = first.new_bytes();
            let mut batch = vec![first];
            while batch.len() < BATCH_JOBS
                && bytes < BATCH_BYTES
                && let Ok(next) = jobs.try_recv()
            {
                bytes += next.new_bytes();
                batch.push(next);
            }
            self.process(batch);
            self.publish();
        }
        match &self.state {
            State::Open(database) | State::Full(database, _) => {
                if let Err(error) = database.checkpoint_all() {
                    warn!(%error, "the store's log could not be copied into its file; the next start does it");
                }
            }
            State::Failed { .. } => {
                if let Err(error) = self.cut_log() {
                    error!(%error, "the store's log could not be cut: requests that were refused may be delivered");
                }
            }
        }
    }

    fn process(&mut self, mut jobs: Vec<Box<dyn Job>>) {
        self.reopen_if_due();
        self.leave_full_if_possible();
        if matches!(self.state, State::Full(..)) {
            jobs = refuse_growing(jobs);
        }
        while !jobs.is_empty() {
            let failed = match &self.state {
                State::Open(_) | State::Full(..) => self.commit(&mut jobs),
                State::Failed { reason, .. } => return reply(jobs, &Err(StoreError::Failed(reason.clone()))),
            };
            let Err(failed) = failed else {
                self.publish();
                reply(jobs, &Ok(()));
                return self.checkpoint();
            };
            let (BatchError::Job(_, error) | BatchError::Commit(error)) = &failed;
            match (error.fault(), failed) {
                (Some(Fault::DiskFull), BatchError::Job(_, error) | BatchError::Commit(error)) => {
                    let freed = self.enter_full();
                    let before = jobs.len();
                    jobs = refuse_growing(jobs);
                    if !freed && jobs.len() == before {
                        return reply(jobs, &Err(error));
                    }
                }
                // One bad job: the others do not suffer.
                (Some(Fault::Statement), BatchError::Job(index, error)) => {
                    jobs.remove(index).reply(Err(error))
                }
                (Some(Fault::Io | Fault::Corrupt), BatchError::Job(_, error) | BatchError::Commit(error)) => {
                    // Known to all before a caller hears of it: verifying a large file takes a while.
                    self.status.failure = Some(StoreFailure::Io(error.to_string()));
                    self.shared.store(self.status.clone());
                    reply(jobs, &Err(StoreError::Failed(error.to_string())));
                    return self.recover(&error);
                }
                (_, BatchError::Job(_, error) | BatchError::Commit(error)) => {
                    return reply(jobs, &Err(error));
                }
            }
        }
    }

    /// Applies the jobs and commits.
    fn commit(&mut self, jobs: &mut [Box<dyn Job>]) -> Result<(), BatchError> {
        let (State::Open(database) | State::Full(database, _)) = &mut self.state else { return Ok(()) };
        let begin = Instant::now();
        let database_error = |error: rusqlite::Error| BatchError::Commit(error.into());
        let used = database.used_bytes().map_err(BatchError::Commit)?;
        let behavior = TransactionBehavior::Deferred;
        let transaction =
            rusqlite::Transaction::new_unchecked(&database.connection, behavior).map_err(database_error)?;
        let mut batch = Batch {
            database,
            counts: database.counts.clone(),
            now: self.clock.now(),
            space: self.max_bytes.saturating_sub(used),
        };
        for (index, job) in jobs.iter_mut().enumerate() {
            job.apply(&mut batch).map_err(|error| BatchError::Job(index, error))?;
        }
        let counts = batch.counts;
        transaction.commit().map_err(database_error)?;
        database.counts = counts;
        self.status.commits += 1;
        self.status.commit_time += begin.elapsed();
        Ok(())
    }

    /// The commit is on the disk whatever comes of this.
    fn checkpoint(&mut self) {
        let done = match &self.state {
            State::Open(database) => database.checkpoint_if_long(),
            // Every free byte counts: empty the log at once, and give free pages back.
            State::Full(database, _) => database.shrink().and_then(|()| database.checkpoint_all()),
            State::Failed { .. } => Ok(()),
        };
        match done {
            Ok(()) => {}
            Err(error) if error.fault() == Some(Fault::DiskFull) => {
                self.enter_full();
            }
            Err(error) => self.recover(&error),
        }
    }

    /// Frees the reserve. Returns whether it was still there.
    fn enter_full(&mut self) -> bool {
        if !matches!(self.state, State::Open(_)) {
            return false;
        }
        let Some(database) = self.take_database(String::new()) else { return false };
        warn!("the disk of the store is full: nothing is accepted until deliveries have made space");
        if let Some(directory) = &self.directory {
            directory.release_reserve();
        }
        self.state = State::Full(database, Instant::now());
        true
    }

    /// Sets the reserve aside again, and accepts.
    fn leave_full_if_possible(&mut self) {
        let State::Full(_, checked) = &mut self.state else { return };
        if checked.elapsed() < FULL_CHECK {
            return;
        }
        *checked = Instant::now();
        if self.directory.as_ref().is_none_or(|directory| directory.create_reserve().is_ok())
            && let Some(database) = self.take_database(String::new())
        {
            info!("the disk of the store has space again: accepting");
            self.state = State::Open(database);
        }
    }

    /// The database, if it is open; the store has failed until a state is set again.
    fn take_database(&mut self, reason: String) -> Option<Database> {
        match std::mem::replace(&mut self.state, State::failed(reason)) {
            State::Open(database) | State::Full(database, _) => Some(database),
            State::Failed { .. } => None,
        }
    }

    /// After a failed read or write. What the kernel holds of the file may not be on the disk, and syncing again would not
    /// write it: drop the handle, cut the log to the last good commit, open the file again and verify it.
    fn recover(&mut self, cause: &StoreError) {
        error!(error = %cause, "the store failed; its file is opened again and verified");
        let Some(database) = self.take_database(cause.to_string()) else { return };
        self.cut = database.synced_log();
        drop(database);
        if self.directory.is_none() {
            return;
        }
        let reopened = match cause.fault() {
            Some(Fault::Corrupt) => self.cut_log().and_then(|()| self.begin_anew(cause)),
            _ => self.open_database(),
        };
        self.opened(reopened);
    }

    /// Cuts off the log what must not come back. Until that has succeeded the file is not opened.
    fn cut_log(&mut self) -> Result<(), StoreError> {
        if let (Some(directory), Some(length)) = (&self.directory, self.cut) {
            directory.cut_log(length)?;
        }
        // Not again: commits that follow make the log longer.
        self.cut = None;
        Ok(())
    }

    fn reopen_if_due(&mut self) {
        if matches!(&self.state, State::Failed { retry, .. } if *retry <= Instant::now()) {
            let opened = self.open_database();
            self.opened(opened);
        }
    }

    /// Opens and verifies the file. A corrupt one is set aside.
    fn open_database(&mut self) -> Result<Database, StoreError> {
        match self.open_file() {
            Err(error) if error.fault() == Some(Fault::Corrupt) => self.begin_anew(&error),
            other => other,
        }
    }

    fn open_file(&mut self) -> Result<Database, StoreError> {
        self.cut_log()?;
        let Some(directory) = &self.directory else { return Database::in_memory(self.cipher.clone()) };
        let mut database = Database::open(&directory.database(), self.cipher.clone(), KeyCheck::Required)?;
        database.verify()?;
        database.recover(self.clock.now())?;
        directory.sync()?;
        // Proves that the disk writes, and that no commit depends on the log of an earlier process.
        match database.checkpoint_all() {
            Err(error) if error.fault() != Some(Fault::DiskFull) => Err(error),
            _ => Ok(database),
        }
    }

    fn begin_anew(&mut self, cause: &StoreError) -> Result<Database, StoreError> {
        let Some(directory) = &self.directory else { return Err(cause.clone()) };
        let aside = directory.set_corrupt_aside(self.clock.now())?;
        error!(
            error = %cause,
            file = %aside.display(),
            "the store is corrupt: its file was renamed and is not delivered from; a new one is used"
        );
        self.status.set_aside.push(aside);
        self.open_file()
    }

    fn opened(&mut self, opened: Result<Database, StoreError>) {
        let now = Instant::now();
        self.state = match opened {
            Ok(database) => match self.directory.as_ref().map_or(Ok(()), StoreDirectory::create_reserve) {
                Ok(()) => State::Open(database),
                Err(error) => {
                    warn!(%error, "no disk space for the store's reserve: nothing is accepted until there is");
                    State::Full(database, now)
                }
            },
            Err(error) => {
                let wait = match &self.state {
                    State::Failed { wait, .. } => *wait,
                    _ => REOPEN_AFTER,
                };
                error!(%error, "the store cannot be opened");
                let next = (wait * 2).min(REOPEN_AFTER_MAX);
                State::Failed { reason: error.to_string(), retry: now + wait, wait: next }
            }
        };
    }

    fn publish(&mut self) {
        self.status.failure = match &self.state {
            State::Open(_) => None,
            State::Full(..) => Some(StoreFailure::DiskFull),
            State::Failed { reason, .. } => Some(StoreFailure::Io(reason.clone())),
        };
        if let State::Open(database) | State::Full(database, _) = &self.state {
            self.status.counts = database.counts.clone();
            self.status.used_bytes = database.used_bytes().unwrap_or(self.status.used_bytes);
        }
        self.shared.store(self.status.clone());
    }
}

fn refuse_growing(jobs: Vec<Box<dyn Job>>) -> Vec<Box<dyn Job>> {
    let (growing, others): (Vec<_>, Vec<_>) = jobs.into_iter().partition(|job| job.new_bytes() > 0);
    reply(growing, &Err(StoreError::Full));
    others
}

fn reply(jobs: Vec<Box<dyn Job>>, committed: &Result<(), StoreError>) {
    for job in jobs {
        job.reply(committed.clone());
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::units::ByteSize;

    /// The log cannot be cut when the commit fails, as its file cannot be opened: that is done before the store is opened
    /// again, however much later.
    #[test]
    fn a_refused_request_is_not_delivered_after_the_store_is_opened_again() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("store");
        let settings = StoreSettings { path, reserve: ByteSize(0), ..Default::default() };
        let mut committer =
            Committer::open(&settings, SteadyClock::default(), SharedStatus::default()).unwrap();
        let insert = "INSERT INTO meta VALUES (?1, x'00')";
        let State::Open(database) = &mut committer.state else { panic!("not open") };
        database.connection.execute(insert, ["acknowledged"]).unwrap();
        // What a commit leaves in the log whose sync fails: without the hook its length is not noted.
        database.connection.wal_hook(Some(|_: &mut rusqlite::hooks::Wal, _| Ok(()))).unwrap();
        database.connection.execute(insert, ["refused"]).unwrap();
        let (log, aside) = (settings.path.join("queue.db-wal"), root.path().join("aside"));
        fs::rename(&log, &aside).unwrap();
        fs::create_dir(&log).unwrap();
        let failure = StoreError::Database { fault: Fault::Io, reason: "a sync failed".to_owned() };
        committer.recover(&failure);
        assert!(matches!(committer.state, State::Failed { .. }));

        fs::remove_dir(&log).unwrap();
        fs::rename(&aside, &log).unwrap();
        let opened = committer.open_database();
        committer.opened(opened);
        let State::Open(database) = &committer.state else { panic!("not open again") };
        let mut names = database.connection.prepare("SELECT name FROM meta WHERE name != 'id_key'").unwrap();
        let names: Vec<String> =
            names.query_map([], |row| row.get(0)).unwrap().collect::<Result<_, _>>().unwrap();
        assert_eq!(names, ["acknowledged"]);
    }
}
