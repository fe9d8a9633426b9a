//! The store: deliveries on disk, in one SQLite file that one thread owns.
//!
//! ```text
//!  workers, control ── job ──▶ bounded channel ──▶ the store's thread: gather ▶ apply ▶ COMMIT (one sync) ▶ reply to all
//! ```
//!
//! While a commit syncs, further jobs arrive: they are the next batch. So a single caller waits for one sync, and many
//! callers share it; nothing ever waits for company.
//!
//! What is promised when something breaks:
//!
//! - [`Store::accept`] returns only what is on the disk. After a crash or a power cut it is there.
//! - The outcome of an attempt joins the next commit: after a crash a delivery is repeated at most.
//! - A failed write or sync is never repeated on the same file handle: all waiters get an error, the log is cut to the last
//!   good commit, the file is opened again and verified. A corrupt file is renamed and a new one begun ([`committer`]).
//! - On a full disk nothing is accepted; the reserve is freed, so that deliveries can go on and be deleted.
//! - A second process is refused ([`directory`]).

mod batch;
mod cipher;
mod committer;
mod counts;
mod database;
mod directory;
mod error;
mod issue;
mod job;
pub mod offline;
mod query;
mod schema;
pub mod settings;
mod state;
mod status;
mod sweep;
#[cfg(test)]
mod tests;

use std::{sync::Arc, thread, time::Duration};

use tokio::sync::mpsc;

pub use batch::{Accepted, NewDelivery, Outcome};
pub use counts::{Counts, QueueCounts};
pub use error::StoreError;
pub use query::{Filter, Summary};
pub use state::DeliveryState;
pub use status::{StoreFailure, StoreStatus};
pub use sweep::{Sweep, Swept};

use self::{
    batch::Batch,
    committer::Committer,
    job::{Job, Request, Task},
    settings::StoreSettings,
    status::SharedStatus,
};
use crate::{
    queue::{DeliveryId, StoredRequest},
    resilience::queue::{DueDelivery, Verdict},
    unix_time::{SteadyClock, UnixMillis},
};

/// Jobs that wait for the store's thread; further callers wait for a place.
const PENDING_JOBS: usize = 1024;

/// A handle on the store, for every thread. The store closes when the last one is dropped.
#[derive(Clone, Debug)]
pub struct Store {
    jobs: mpsc::Sender<Box<dyn Job>>,
    status: SharedStatus,
    clock: SteadyClock,
}

/// Waits until the store's thread has ended, after the last [`Store`] was dropped.
#[derive(Debug)]
pub struct StoreThread(thread::JoinHandle<()>);

impl StoreThread {
    /// Blocks.
    pub fn join(self) {
        // A panic of the thread has been reported by its hook.
        let _ = self.0.join();
    }
}

impl Store {
    /// Opens or creates the store, and starts its thread. Blocks while the file is verified.
    ///
    /// # Errors
    ///
    /// What an operator has to mend: another owner, a wrong key, a directory that cannot be used. A disk that fails and a
    /// corrupt file are no errors here: [`Store::status`] reports them.
    pub fn open(settings: &StoreSettings, clock: SteadyClock) -> Result<(Self, StoreThread), StoreError> {
        let status = SharedStatus::default();
        let (jobs, receiver) = mpsc::channel(PENDING_JOBS);
        let committer = Committer::open(settings, clock, status.clone())?;
        let thread = thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || committer.run(receiver))
            .map_err(StoreError::file(&settings.path))?;
        Ok((Self { jobs, status, clock }, StoreThread(thread)))
    }

    /// The time by which the store decides what is due.
    pub fn now(&self) -> UnixMillis {
        self.clock.now()
    }

    pub fn status(&self) -> Arc<StoreStatus> {
        self.status.load()
    }

    /// Keeps a request. Returns when it is on the disk.
    pub async fn accept(&self, new: NewDelivery) -> Result<Accepted, StoreError> {
        let mut random = [0; 10];
        getrandom::fill(&mut random).map_err(|error| StoreError::Failed(error.to_string()))?;
        let random = DeliveryId::new(self.now(), random);
        // The head, roughly, so that it is never nothing.
        let bytes = new.body.len() + 512;
        self.submit(Task::growing(bytes, move |batch| batch.accept(random, &new))).await
    }

    /// Notes, on the disk, that an attempt begins which must not be repeated after a crash. False: one has begun before, and
    /// its outcome was not written.
    pub async fn start(&self, id: DeliveryId) -> Result<bool, StoreError> {
        self.run(move |batch| batch.start(id)).await
    }

    /// Writes what an attempt means for its delivery. Returns the next delivery of the same order, which may go now.
    pub async fn settle(
        &self,
        id: DeliveryId,
        verdict: Verdict,
        outcome: Option<Outcome>,
    ) -> Result<Option<DueDelivery>, StoreError> {
        self.run(move |batch| batch.settle(id, verdict, outcome.as_ref())).await
    }

    /// Cancels a pending delivery of this client. One that is under way must not be cancelled: the scheduler knows it.
    pub async fn cancel(&self, id: DeliveryId, identity: String) -> Result<Option<DueDelivery>, StoreError> {
        self.run(move |batch| batch.cancel(id, &identity)).await
    }

    /// Makes dead letters queued deliveries again: the first due at `at`, each of the others `spacing` later than the one
    /// before. Returns how many; what is no dead letter is left as it is.
    pub async fn replay(
        &self,
        ids: Vec<DeliveryId>,
        at: UnixMillis,
        spacing: Duration,
    ) -> Result<u64, StoreError> {
        self.run(move |batch| {
            let (mut at, mut replayed) = (at, 0);
            for id in &ids {
                match batch.replay(*id, at) {
                    Ok(()) => replayed += 1,
                    Err(StoreError::NotFound | StoreError::WrongState(_)) => {}
                    Err(error) => return Err(error),
                }
                at = at + spacing;
            }
            Ok(replayed)
        })
        .await
    }

    /// Notes that an operator has stopped the deliveries of a queue, or that they go on.
    pub async fn set_paused(&self, queue: String, is_paused: bool) -> Result<(), StoreError> {
        self.run(move |batch| batch.set_paused(&queue, is_paused)).await
    }

    /// The queues that an operator has stopped, and since when.
    pub async fn paused(&self) -> Result<Vec<(String, UnixMillis)>, StoreError> {
        self.run(|batch| batch.database.paused()).await
    }

    /// Makes a pending delivery a dead letter, deletes any other. Returns the state that it had.
    pub async fn drop_delivery(&self, id: DeliveryId) -> Result<DeliveryState, StoreError> {
        self.run(move |batch| batch.drop_delivery(id)).await
    }

    /// Expires and deletes what is over. To be called every second or so: this is also when a store that has failed is
    /// opened again, and when the reserve is set aside again.
    pub async fn sweep(&self, sweep: Sweep) -> Result<Swept, StoreError> {
        self.run(move |batch| batch.sweep(&sweep)).await
    }

    /// The deliveries of a queue that are due first, at most `limit`; of each order the first.
    pub async fn due(&self, queue: String, limit: usize) -> Result<Vec<DueDelivery>, StoreError> {
        self.run(move |batch| batch.database.due(&queue, limit)).await
    }

    pub async fn content(&self, id: DeliveryId) -> Result<(StoredRequest, Vec<u8>), StoreError> {
        self.run(move |batch| batch.database.content(id)).await
    }

    pub async fn find(&self, id: DeliveryId) -> Result<Summary, StoreError> {
        self.run(move |batch| batch.database.find(id)).await
    }

    /// Whether this client got this ID from this store, at whatever time.
    pub async fn has_issued(&self, id: DeliveryId, identity: String) -> Result<bool, StoreError> {
        self.run(move |batch| Ok(batch.database.ids.has_issued(id, &identity))).await
    }

    /// The outcome of the last attempt; `None` before the first.
    pub async fn outcome(&self, id: DeliveryId) -> Result<Option<Outcome>, StoreError> {
        self.run(move |batch| batch.database.outcome(id)).await
    }

    /// In the order of acceptance, those after the sequence number `after`, at most `limit`.
    pub async fn list(&self, filter: Filter, after: i64, limit: usize) -> Result<Vec<Summary>, StoreError> {
        self.run(move |batch| batch.database.list(&filter, after, limit)).await
    }

    async fn run<T: Send + 'static>(
        &self,
        apply: impl FnMut(&mut Batch<'_>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.submit(Task::neutral(apply)).await
    }

    async fn submit<T: Send + 'static>(&self, (job, response): Request<T>) -> Result<T, StoreError> {
        self.jobs.send(job).await.map_err(|_| StoreError::Closed)?;
        response.await.map_err(|_| StoreError::Closed)?
    }
}
