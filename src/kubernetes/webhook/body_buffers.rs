//! A memory limit for request bodies that are being received. Received bytes count, not Content-Length, so a slow
//! client holds little. A body that takes longer than a grace period is evicted when another one needs the memory. So
//! memory is bounded, and slow or silent clients delay others only briefly.

use std::{
    collections::BTreeMap,
    fmt::Display,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Buf;
use http_body::Body;
use http_body_util::BodyExt;
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

/// How long a body may take before it can be evicted. An API server's arrive in milliseconds.
const GRACE: Duration = Duration::from_secs(1);

/// Why a body could not be read.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    #[error("{0}")]
    Broken(String),
    #[error("the body took longer than {} s, and the memory is needed for other requests", GRACE.as_secs())]
    Evicted,
}

/// The bodies that share one limit.
#[derive(Debug)]
pub struct BodyBuffers {
    state: Mutex<BufferState>,
    freed: Notify,
}

impl BodyBuffers {
    /// `limit`: the total size in bytes, also of a single body.
    pub fn new(limit: usize) -> Self {
        Self { state: Mutex::new(BufferState::new(limit)), freed: Notify::new() }
    }

    /// Reads a body to its end. Its memory counts until the returned value is dropped.
    pub async fn read<B: Body<Error: Display>>(&self, body: B) -> Result<BufferedBody<'_>, BodyError> {
        let (number, evicted) = self.state().enter(Instant::now());
        let mut buffered = BufferedBody { bytes: Vec::new(), slot: BufferSlot { buffers: self, number } };
        let mut body = pin!(body);
        loop {
            let frame = tokio::select! {
                frame = body.frame() => frame,
                () = evicted.notified() => return Err(BodyError::Evicted),
            };
            let Some(frame) = frame else { return Ok(buffered) };
            let Ok(data) = frame.map_err(|error| BodyError::Broken(error.to_string()))?.into_data() else {
                continue;
            };
            self.grow(number, data.remaining()).await?;
            append(&mut buffered.bytes, data);
        }
    }

    async fn grow(&self, number: u64, more: usize) -> Result<(), BodyError> {
        loop {
            let freed = self.freed.notified();
            let result = self.state().grow(number, more, Instant::now());
            match result {
                GrowResult::Fits => return Ok(()),
                GrowResult::Evicted => return Err(BodyError::Evicted),
                GrowResult::Wait(until) => tokio::select! {
                    () = freed => {}
                    () = sleep_until(until) => {}
                },
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, BufferState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn append(bytes: &mut Vec<u8>, mut data: impl Buf) {
    while data.has_remaining() {
        let chunk = data.chunk();
        bytes.extend_from_slice(chunk);
        let length = chunk.len();
        data.advance(length);
    }
}

/// A complete body; dropping it releases its memory.
#[derive(Debug)]
pub struct BufferedBody<'a> {
    pub bytes: Vec<u8>,
    #[expect(dead_code, reason = "held")]
    slot: BufferSlot<'a>,
}

#[derive(Debug)]
struct BufferSlot<'a> {
    buffers: &'a BodyBuffers,
    number: u64,
}

impl Drop for BufferSlot<'_> {
    fn drop(&mut self) {
        self.buffers.state().remove(self.number);
        self.buffers.freed.notify_waiters();
    }
}

/// The bodies and their sizes, in the order in which they began.
#[derive(Debug)]
struct BufferState {
    limit: usize,
    held: usize,
    bodies: BTreeMap<u64, BodyEntry>,
    next: u64,
}

#[derive(Debug)]
struct BodyEntry {
    bytes: usize,
    started: Instant,
    evicted: Arc<Notify>,
}

#[derive(Debug, PartialEq, Eq)]
enum GrowResult {
    Fits,
    /// Retry at this time: then memory may be free, or a body may be evicted.
    Wait(Instant),
    Evicted,
}

impl BufferState {
    fn new(limit: usize) -> Self {
        Self { limit, held: 0, bodies: BTreeMap::new(), next: 0 }
    }

    fn enter(&mut self, now: Instant) -> (u64, Arc<Notify>) {
        let (number, evicted) = (self.next, Arc::new(Notify::new()));
        self.next += 1;
        self.bodies.insert(number, BodyEntry { bytes: 0, started: now, evicted: Arc::clone(&evicted) });
        (number, evicted)
    }

    /// Reserves `more` bytes. If the limit is reached, evicts the oldest body once its grace period is over.
    fn grow(&mut self, number: u64, more: usize, now: Instant) -> GrowResult {
        while self.held + more > self.limit && self.bodies.contains_key(&number) {
            match self.bodies.first_key_value() {
                Some((_, first)) if now < first.started + GRACE => {
                    return GrowResult::Wait(first.started + GRACE);
                }
                Some((&first, _)) => self.remove(first),
                None => break,
            }
        }
        match self.bodies.get_mut(&number) {
            Some(held) => {
                held.bytes += more;
                self.held += more;
                GrowResult::Fits
            }
            None => GrowResult::Evicted,
        }
    }

    fn remove(&mut self, number: u64) {
        if let Some(held) = self.bodies.remove(&number) {
            self.held -= held.bytes;
            held.evicted.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Waker};

    use super::*;

    #[test]
    fn only_the_oldest_slow_body_is_evicted() {
        let mut state = BufferState::new(100);
        let start = Instant::now();
        let (slow, slow_evicted) = state.enter(start);
        assert_eq!(state.grow(slow, 90, start), GrowResult::Fits);
        let (quick, _) = state.enter(start + GRACE / 2);
        assert_eq!(state.grow(quick, 20, start + GRACE / 2), GrowResult::Wait(start + GRACE));
        assert_eq!(state.grow(quick, 20, start + GRACE), GrowResult::Fits);
        assert_eq!(state.grow(slow, 1, start + GRACE), GrowResult::Evicted);
        assert_eq!((state.held, state.bodies.len()), (20, 1));
        let mut context = Context::from_waker(Waker::noop());
        assert!(pin!(slow_evicted.notified()).poll(&mut context).is_ready());
        // It is the oldest itself, so it is evicted.
        assert_eq!(state.grow(quick, 81, start + GRACE * 2), GrowResult::Evicted);
        assert_eq!((state.held, state.bodies.len()), (0, 0));
    }

    #[test]
    fn memory_is_free_again_when_a_body_is_dropped() {
        let mut state = BufferState::new(100);
        let now = Instant::now();
        let (one, _) = state.enter(now);
        let (two, _) = state.enter(now);
        assert_eq!(state.grow(one, 60, now), GrowResult::Fits);
        assert_eq!(state.grow(two, 60, now), GrowResult::Wait(now + GRACE));
        state.remove(one);
        assert_eq!(state.grow(two, 60, now), GrowResult::Fits);
    }
}
