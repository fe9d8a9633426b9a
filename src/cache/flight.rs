//! Requests that wait for the response that another one fetches: one fetch for many concurrent misses.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::timeout,
};

use super::{Entry, fill::Fill};

/// Requests that wait, in the whole process. Further ones go alone.
const MAX_FOLLOWERS: usize = 65_536;
/// Requests that a failed fetch releases at a time.
const ALONE_AT_ONCE: usize = 32;

/// How far the fetch is that others wait for.
#[derive(Clone, Debug)]
pub enum FlightState {
    Pending,
    /// The head is known, the body is arriving.
    Streaming(Arc<Entry>, Arc<Fill>),
    Stored(Arc<Entry>),
    /// It failed, for this cause.
    Failed(&'static str),
    /// Its response cannot be shared.
    Alone,
}

/// A fetch that others may wait for.
#[derive(Debug)]
struct Flight {
    state: watch::Sender<FlightState>,
    turns: Arc<Semaphore>,
}

type Table = Arc<Mutex<HashMap<Vec<u8>, Arc<Flight>>>>;

/// The fetches in progress.
#[derive(Debug, Default)]
pub struct Flights {
    table: Table,
    followers: Arc<AtomicUsize>,
}

/// What a request does that needs a fetch.
#[derive(Debug)]
pub enum Joined {
    /// It fetches, for itself and for those that come meanwhile.
    Leads(Leader),
    Follows(Follower),
    /// Too many wait already.
    Alone,
}

/// Fetches. When it is dropped without a result, the others go alone.
#[derive(Debug)]
pub struct Leader {
    key: Vec<u8>,
    flight: Arc<Flight>,
    table: Table,
    is_resolved: bool,
}

/// Waits for a leader.
#[derive(Debug)]
pub struct Follower {
    state: watch::Receiver<FlightState>,
    turns: Arc<Semaphore>,
    followers: Arc<AtomicUsize>,
}

impl Flights {
    /// Joins the fetch with this key, or begins it.
    pub fn join(&self, key: &[u8]) -> Joined {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(flight) = table.get(key) else { return Joined::Leads(self.begin(&mut table, key)) };
        if self.followers.fetch_add(1, Ordering::Relaxed) >= MAX_FOLLOWERS {
            self.followers.fetch_sub(1, Ordering::Relaxed);
            return Joined::Alone;
        }
        Joined::Follows(Follower {
            state: flight.state.subscribe(),
            turns: Arc::clone(&flight.turns),
            followers: Arc::clone(&self.followers),
        })
    }

    /// Begins a fetch unless there is one.
    pub fn lead(&self, key: &[u8]) -> Option<Leader> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        (!table.contains_key(key)).then(|| self.begin(&mut table, key))
    }

    fn begin(&self, table: &mut HashMap<Vec<u8>, Arc<Flight>>, key: &[u8]) -> Leader {
        let flight = Arc::new(Flight {
            state: watch::Sender::new(FlightState::Pending),
            turns: Arc::new(Semaphore::new(ALONE_AT_ONCE)),
        });
        table.insert(key.to_vec(), Arc::clone(&flight));
        Leader { key: key.to_vec(), flight, table: Arc::clone(&self.table), is_resolved: false }
    }

    /// How many requests wait.
    pub fn waiting(&self) -> usize {
        self.followers.load(Ordering::Relaxed)
    }
}

/// The requests that wait for a fetch.
#[derive(Debug)]
pub struct Followers(Arc<Flight>);

impl Followers {
    pub fn are_waiting(&self) -> bool {
        self.0.state.receiver_count() > 0
    }
}

impl Leader {
    /// Whether requests wait for it.
    pub fn has_followers(&self) -> bool {
        self.flight.state.receiver_count() > 0
    }

    pub fn followers(&self) -> Followers {
        Followers(Arc::clone(&self.flight))
    }

    /// Tells the others that they can read the body while it arrives.
    pub fn stream(&self, entry: &Arc<Entry>, fill: &Arc<Fill>) {
        self.flight.state.send_replace(FlightState::Streaming(Arc::clone(entry), Arc::clone(fill)));
    }

    /// Ends the fetch.
    pub fn resolve(mut self, state: FlightState) {
        self.end(state);
    }

    fn end(&mut self, state: FlightState) {
        self.is_resolved = true;
        // Those that come from now on look into the store first.
        self.table.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
        self.flight.state.send_replace(state);
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        if !self.is_resolved {
            self.end(FlightState::Alone);
        }
    }
}

impl Follower {
    /// Waits for something to read, at most this long; `None`: it took longer.
    pub async fn wait(&mut self, limit: Duration) -> Option<FlightState> {
        let ready = self.state.wait_for(|state| !matches!(state, FlightState::Pending));
        match timeout(limit, ready).await {
            Ok(Ok(state)) => Some(state.clone()),
            Ok(Err(_)) => Some(FlightState::Alone),
            Err(_) => None,
        }
    }

    /// Waits for a turn to fetch for itself, at most this long: a fetch that failed for thousands must not become
    /// thousands at once.
    pub async fn turn(&self, limit: Duration) -> Option<OwnedSemaphorePermit> {
        timeout(limit, Arc::clone(&self.turns).acquire_owned()).await.ok()?.ok()
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.followers.fetch_sub(1, Ordering::Relaxed);
    }
}
