//! A body that is read by several clients while it arrives. A slow reader does not delay the others: the whole body is buffered, up to
//! the store's limit for one response, in memory that is reserved until the last reader is gone. What turns out to be larger, or finds
//! no memory left, is relayed to its one reader, with back-pressure.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
};

use bytes::{Bytes, BytesMut};

use super::reservation::Reservation;

/// What a relayed body buffers at most, beside its last part.
const RELAY_BUFFER: u64 = 64 << 10;
/// What a reader gets at a time of a body that is complete.
const PART: usize = 16 << 10;

/// How a body ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FillEnd {
    Complete,
    Broken,
}

/// A body on its way.
#[derive(Debug)]
pub struct Fill {
    state: Mutex<State>,
    readers: AtomicUsize,
}

#[derive(Debug)]
struct State {
    /// Covers `parts` and `whole`.
    reservation: Reservation,
    /// The complete body, in place of `parts`: the same memory as in the store.
    whole: Option<Bytes>,
    parts: VecDeque<Bytes>,
    /// The number of the first part: those before were relayed.
    first: usize,
    /// Bytes in `parts`.
    buffered: u64,
    end: Option<FillEnd>,
    is_relay: bool,
    readers: Vec<Waker>,
    writer: Option<Waker>,
}

/// One client's position in a body.
#[derive(Debug)]
pub struct FillReader {
    fill: Arc<Fill>,
    next: usize,
    /// Bytes that it has got.
    read: usize,
}

impl Fill {
    pub fn new(reservation: Reservation) -> Self {
        let state = State {
            reservation,
            whole: None,
            parts: VecDeque::new(),
            first: 0,
            buffered: 0,
            end: None,
            is_relay: false,
            readers: Vec::new(),
            writer: None,
        };
        Self { state: Mutex::new(state), readers: AtomicUsize::new(0) }
    }

    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A reader from the beginning.
    pub fn reader(self: &Arc<Self>) -> FillReader {
        self.readers.fetch_add(1, Ordering::Relaxed);
        FillReader { fill: Arc::clone(self), next: 0, read: 0 }
    }

    /// Reserves memory for this many bytes in all; false: there is none left.
    pub fn reserve(&self, bytes: u64) -> bool {
        self.with(|state| state.reservation.grow(bytes))
    }

    pub fn push(&self, part: Bytes) {
        let wakers = self.with(|state| {
            state.buffered += part.len() as u64;
            state.parts.push_back(part);
            std::mem::take(&mut state.readers)
        });
        wakers.into_iter().for_each(Waker::wake);
    }

    pub fn end(&self, end: FillEnd) {
        let wakers = self.with(|state| {
            state.end = Some(end);
            std::mem::take(&mut state.readers)
        });
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Ends it unless it has ended.
    pub fn end_if_open(&self, end: FillEnd) {
        if self.with(|state| state.end.is_none()) {
            self.end(end);
        }
    }

    /// From now on what was read is dropped, and the writer waits for the reader.
    pub fn relay(&self) {
        self.with(|state| state.is_relay = true);
    }

    /// Ready when the reader of a relayed body has capacity for more.
    pub fn poll_capacity(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.with(|state| {
            if state.buffered < RELAY_BUFFER {
                return Poll::Ready(());
            }
            state.writer = Some(cx.waker().clone());
            Poll::Pending
        })
    }

    /// Ready when it has no reader any more.
    pub fn poll_unread(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.with(|state| {
            if self.readers.load(Ordering::Relaxed) == 0 {
                return Poll::Ready(());
            }
            state.writer = Some(cx.waker().clone());
            Poll::Pending
        })
    }

    /// Ends it. Returns all of it, in memory of its own, since parts may hold larger buffers. Readers share that memory.
    pub fn complete(&self) -> Bytes {
        let (whole, wakers) = self.with(|state| {
            let mut whole = BytesMut::with_capacity(usize::try_from(state.buffered).unwrap_or_default());
            state.parts.drain(..).for_each(|part| whole.extend_from_slice(&part));
            let whole = whole.freeze();
            state.whole = Some(whole.clone());
            state.buffered = 0;
            state.end = Some(FillEnd::Complete);
            (whole, std::mem::take(&mut state.readers))
        });
        wakers.into_iter().for_each(Waker::wake);
        whole
    }
}

impl FillReader {
    /// The next part; `None` at its end.
    pub fn poll_part(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, FillEnd>>> {
        let (next, read) = (&mut self.next, &mut self.read);
        let (part, writer) = self.fill.with(|state| {
            if let Some(whole) = &state.whole {
                let part = part_of(whole, *read);
                *read += part.len();
                return (Poll::Ready((!part.is_empty()).then_some(Ok(part))), None);
            }
            let at = next.saturating_sub(state.first);
            if let Some(part) = state.parts.get(at).cloned() {
                *next += 1;
                *read += part.len();
                let mut writer = None;
                if state.is_relay {
                    while state.first < *next
                        && let Some(read) = state.parts.pop_front()
                    {
                        state.buffered -= read.len() as u64;
                        state.first += 1;
                    }
                    state.reservation.shrink(state.buffered);
                    writer = state.writer.take();
                }
                return (Poll::Ready(Some(Ok(part))), writer);
            }
            match state.end {
                Some(FillEnd::Complete) => (Poll::Ready(None), None),
                Some(FillEnd::Broken) => (Poll::Ready(Some(Err(FillEnd::Broken))), None),
                None => {
                    if !state.readers.iter().any(|waker| waker.will_wake(cx.waker())) {
                        state.readers.push(cx.waker().clone());
                    }
                    (Poll::Pending, None)
                }
            }
        });
        if let Some(writer) = writer {
            writer.wake();
        }
        part
    }

    /// Whether there is nothing left.
    pub fn is_at_end(&self) -> bool {
        self.fill.with(|state| {
            if let Some(whole) = &state.whole {
                return self.read >= whole.len();
            }
            state.end == Some(FillEnd::Complete) && self.next.saturating_sub(state.first) >= state.parts.len()
        })
    }
}

/// The part of a complete body that begins here. The last one is a copy: its reader is gone, and with it the reservation,
/// while a connection may hold the part for long.
fn part_of(whole: &Bytes, from: usize) -> Bytes {
    let to = whole.len().min(from.saturating_add(PART));
    match whole.get(from..to) {
        Some(last) if to == whole.len() => Bytes::copy_from_slice(last),
        Some(_) => whole.slice(from..to),
        None => Bytes::new(),
    }
}

impl Drop for FillReader {
    fn drop(&mut self) {
        self.fill.readers.fetch_sub(1, Ordering::Relaxed);
        if let Some(writer) = self.fill.with(|state| state.writer.take()) {
            writer.wake();
        }
    }
}

#[cfg(test)]
mod tests;
