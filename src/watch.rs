//! Watches files: detects that they changed, and when they may be read.
//!
//! A change is read when its writer has closed the file ([`writers`]). An event only means "read again and compare". A
//! slow poll finds changes that no event reports (network file systems, files that are mounted one by one, no watches
//! left). Such a file counts as written when it has not changed for [`POLL_SETTLE`], as does every file where no event
//! reports that its writer has closed it (macOS).

mod writers;

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

pub use writers::FileObserver;
use writers::FileStamp;

use crate::platform;

/// The poll interval without events.
const POLL: Duration = Duration::from_secs(5);
/// Writers take several steps: after an event, this long must pass without another. Longer where no event reports that a
/// writer has finished.
const SETTLE: Duration = if platform::REPORTS_CLOSED_FILES { Duration::from_millis(50) } else { POLL_SETTLE };
/// The most events for which that wait starts again.
const MAX_SETTLE_ROUNDS: u32 = 20;
/// A file whose change is found by polling must stay unchanged for this long before it is read.
const POLL_SETTLE: Duration = Duration::from_secs(1);
/// A file that stays open for writing for this long is logged.
const LONG_WRITE: Duration = Duration::from_secs(10);
/// The capacity for queued events. Further ones add no information.
const QUEUE: usize = 8;

/// Watches files until it is dropped.
#[derive(Debug)]
pub struct Watcher {
    events: SyncSender<Event>,
    requested: Arc<AtomicU8>,
    thread: Option<JoinHandle<()>>,
}

/// Why the files are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum WatchReason {
    /// They may have changed, or the poll interval has elapsed.
    Change,
    /// On request.
    Requested,
    /// On request, which also confirms the content, whatever it is.
    Confirmed,
}

impl WatchReason {
    const fn from_code(code: u8) -> Self {
        match code {
            0 => Self::Change,
            1 => Self::Requested,
            _ => Self::Confirmed,
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Event {
    /// Something changed near the files, or a check was requested.
    Check,
    Stop,
}

/// Calls `check`, on its own thread named `name`, whenever one of `files` may have changed, and every few seconds.
///
/// # Errors
///
/// If no thread can be started. If no directory can be watched, the files are only polled.
pub fn watch(
    name: &str,
    files: &[PathBuf],
    mut check: impl FnMut(WatchReason) + Send + 'static,
) -> std::io::Result<Watcher> {
    let (events, inbox) = sync_channel(QUEUE);
    let requested = Arc::new(AtomicU8::new(0));
    let sender = events.clone();
    let observer = FileObserver::new(files, move || {
        let _ = sender.try_send(Event::Check);
    });
    let mut state = WatchThread {
        checked: observer.stamps(),
        observer,
        inbox,
        requested: Arc::clone(&requested),
        open_since: None,
        reported: false,
    };
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        while let Some(reason) = state.wait() {
            state.observer.refresh();
            state.checked = state.observer.stamps();
            check(reason);
        }
    })?;
    Ok(Watcher { events, requested, thread: Some(thread) })
}

impl Watcher {
    /// Requests a check of the files now, changed or not.
    pub fn trigger(&self, reason: WatchReason) {
        self.requested.fetch_max(reason as u8, Ordering::AcqRel);
        // Full: a check is due anyway, and sees the flag.
        let _ = self.events.try_send(Event::Check);
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        // The thread drains the queue between waits, so this does not block for long.
        let _ = self.events.send(Event::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The state of a [`Watcher`]'s thread.
struct WatchThread {
    observer: FileObserver,
    inbox: Receiver<Event>,
    requested: Arc<AtomicU8>,
    /// The stamps of the files when they were last checked.
    checked: Vec<Option<FileStamp>>,
    /// Since when a file has been open for writing.
    open_since: Option<Instant>,
    reported: bool,
}

/// Why a wait ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum WaitResult {
    Event,
    Timeout,
    Stop,
}

impl WatchThread {
    /// Waits until the files may be read; `None` when the watcher is dropped.
    fn wait(&mut self) -> Option<WatchReason> {
        loop {
            match self.next(POLL) {
                WaitResult::Stop => return None,
                WaitResult::Event => self.settle()?,
                WaitResult::Timeout => self.settle_polled()?,
            }
            let reason = WatchReason::from_code(self.requested.swap(0, Ordering::AcqRel));
            // A request does not wait for a writer.
            if reason != WatchReason::Change || !self.is_being_written() {
                return Some(reason);
            }
        }
    }

    fn next(&self, limit: Duration) -> WaitResult {
        match self.inbox.recv_timeout(limit) {
            Ok(Event::Check) => WaitResult::Event,
            Ok(Event::Stop) | Err(RecvTimeoutError::Disconnected) => WaitResult::Stop,
            Err(RecvTimeoutError::Timeout) => WaitResult::Timeout,
        }
    }

    /// Waits until events have stopped, or a check is requested, at most for [`MAX_SETTLE_ROUNDS`]. `None` when the
    /// watcher is dropped.
    fn settle(&self) -> Option<()> {
        for _ in 0..MAX_SETTLE_ROUNDS {
            if self.is_requested() {
                break;
            }
            match self.next(SETTLE) {
                WaitResult::Event => {}
                WaitResult::Timeout => break,
                WaitResult::Stop => return None,
            }
        }
        Some(())
    }

    /// Waits until files that changed without an event have stopped changing, or a check is requested.
    fn settle_polled(&self) -> Option<()> {
        let mut last = self.observer.stamps();
        while last != self.checked && !self.is_requested() {
            if self.next(POLL_SETTLE) == WaitResult::Stop {
                return None;
            }
            let now = self.observer.stamps();
            if now == last {
                break;
            }
            last = now;
        }
        Some(())
    }

    fn is_requested(&self) -> bool {
        self.requested.load(Ordering::Acquire) > 0
    }

    fn is_being_written(&mut self) -> bool {
        let Some(file) = self.observer.file_being_written() else {
            self.open_since = None;
            self.reported = false;
            return false;
        };
        let since = *self.open_since.get_or_insert_with(Instant::now);
        if since.elapsed() >= LONG_WRITE && !self.reported {
            self.reported = true;
            let file = file.display();
            let seconds = since.elapsed().as_secs();
            tracing::warn!("{file} has been open for writing for {seconds} s; it is read once it is closed");
        }
        true
    }
}
