//! A body that is read by several clients while it arrives. A slow reader does not delay the others: the whole body is buffered, up to
//! the store's limit for one response. What turns out to be larger is relayed to its one reader, with back-pressure.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
};

use bytes::{Bytes, BytesMut};

/// How a body ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FillEnd {
    Complete,
    Broken,
}

/// A body on its way.
#[derive(Debug, Default)]
pub struct Fill {
    state: Mutex<State>,
    readers: AtomicUsize,
}

#[derive(Debug, Default)]
struct State {
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
}

impl Fill {
    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A reader from the beginning.
    pub fn reader(self: &Arc<Self>) -> FillReader {
        self.readers.fetch_add(1, Ordering::Relaxed);
        FillReader { fill: Arc::clone(self), next: 0 }
    }

    /// Whether it has readers.
    pub fn has_readers(&self) -> bool {
        self.readers.load(Ordering::Relaxed) > 0
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

    /// Ready when less than `limit` is unread, or there is no reader any more.
    pub fn poll_capacity(&self, cx: &mut Context<'_>, limit: u64) -> Poll<()> {
        self.with(|state| {
            if state.buffered < limit || self.readers.load(Ordering::Relaxed) == 0 {
                return Poll::Ready(());
            }
            state.writer = Some(cx.waker().clone());
            Poll::Pending
        })
    }

    /// All of it, in memory of its own: parts may hold larger buffers.
    pub fn whole(&self) -> Bytes {
        self.with(|state| {
            let mut whole = BytesMut::with_capacity(usize::try_from(state.buffered).unwrap_or_default());
            state.parts.iter().for_each(|part| whole.extend_from_slice(part));
            whole.freeze()
        })
    }
}

impl FillReader {
    /// The next part; `None` at its end.
    pub fn poll_part(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, FillEnd>>> {
        let next = &mut self.next;
        let (part, writer) = self.fill.with(|state| {
            let at = next.saturating_sub(state.first);
            if let Some(part) = state.parts.get(at).cloned() {
                *next += 1;
                let mut writer = None;
                if state.is_relay {
                    while state.first < *next
                        && let Some(read) = state.parts.pop_front()
                    {
                        state.buffered -= read.len() as u64;
                        state.first += 1;
                    }
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
            state.end == Some(FillEnd::Complete) && self.next.saturating_sub(state.first) >= state.parts.len()
        })
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
