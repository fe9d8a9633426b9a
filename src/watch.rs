//! Notices that files changed, and when they may be read.
//!
//! A change is read when its writer has closed the file ([`writers`]). An event only means "read again and compare". A
//! slow poll finds what no event reports (network file systems, files that are mounted one by one, no watches left);
//! there a file counts as written when it has stopped changing for [`POLL_SETTLE`].

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

pub use writers::Observer;
use writers::Stamp;

/// Between two looks where no event comes.
const POLL: Duration = Duration::from_secs(5);
/// Writers take several steps: after an event, this long must pass without another.
const SETTLE: Duration = Duration::from_millis(50);
/// But not for ever.
const MAX_SETTLE_ROUNDS: u32 = 20;
/// Where only polling sees a change, a file must stay the same for this long before it is read.
const POLL_SETTLE: Duration = Duration::from_secs(1);
/// A file that stays open for writing this long is worth a line in the log.
const LONG_WRITE: Duration = Duration::from_secs(10);
/// Events that wait; more say nothing new.
const QUEUE: usize = 8;

/// Watches until it is dropped.
#[derive(Debug)]
pub struct Watcher {
    events: SyncSender<Event>,
    asked: Arc<AtomicU8>,
    thread: Option<JoinHandle<()>>,
}

/// Why the files are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// They may have changed, or it is time.
    Change,
    /// Somebody asks for it.
    Asked,
    /// Somebody asks for it and wants what is there, whatever it is.
    Confirmed,
}

impl Reason {
    const fn from_code(code: u8) -> Self {
        match code {
            0 => Self::Change,
            1 => Self::Asked,
            _ => Self::Confirmed,
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Event {
    /// Something happened near the files, or somebody asks.
    Look,
    Stop,
}

/// Calls `look`, on a thread of its own called `name`, whenever one of `files` may have changed, and every few seconds.
///
/// # Errors
///
/// Where no thread can be started. Where no directory can be watched, polling alone has to do.
pub fn watch(
    name: &str,
    files: &[PathBuf],
    mut look: impl FnMut(Reason) + Send + 'static,
) -> std::io::Result<Watcher> {
    let (events, inbox) = sync_channel(QUEUE);
    let asked = Arc::new(AtomicU8::new(0));
    let told = events.clone();
    let observer = Observer::new(files, move || {
        let _ = told.try_send(Event::Look);
    });
    let mut watching = Watching {
        seen: observer.stamps(),
        observer,
        inbox,
        asked: Arc::clone(&asked),
        open_since: None,
        reported: false,
    };
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        while let Some(reason) = watching.wait() {
            watching.observer.refresh();
            watching.seen = watching.observer.stamps();
            look(reason);
        }
    })?;
    Ok(Watcher { events, asked, thread: Some(thread) })
}

impl Watcher {
    /// Has the files looked at now, changed or not.
    pub fn trigger(&self, reason: Reason) {
        self.asked.fetch_max(reason as u8, Ordering::AcqRel);
        // Full: a look is due anyhow, and finds the flag.
        let _ = self.events.try_send(Event::Look);
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        // The thread takes events faster than they are waited for, so this does not block for long.
        let _ = self.events.send(Event::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What the thread of a [`Watcher`] knows.
struct Watching {
    observer: Observer,
    inbox: Receiver<Event>,
    asked: Arc<AtomicU8>,
    /// What the files were when they were looked at last.
    seen: Vec<Option<Stamp>>,
    /// Since when some file has been open for writing.
    open_since: Option<Instant>,
    reported: bool,
}

/// What came out of waiting for an event.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wake {
    Event,
    Time,
    Stop,
}

impl Watching {
    /// Waits until the files may be read; `None` at the end.
    fn wait(&mut self) -> Option<Reason> {
        loop {
            match self.next(POLL) {
                Wake::Stop => return None,
                Wake::Event => self.settle()?,
                Wake::Time => self.settle_polled()?,
            }
            let reason = Reason::from_code(self.asked.swap(0, Ordering::AcqRel));
            // Whoever asks does not wait for a writer.
            if reason != Reason::Change || !self.is_being_written() {
                return Some(reason);
            }
        }
    }

    fn next(&self, limit: Duration) -> Wake {
        match self.inbox.recv_timeout(limit) {
            Ok(Event::Look) => Wake::Event,
            Ok(Event::Stop) | Err(RecvTimeoutError::Disconnected) => Wake::Stop,
            Err(RecvTimeoutError::Timeout) => Wake::Time,
        }
    }

    /// Waits until no event comes any more, or somebody asks, though not for ever. `None` at the end.
    fn settle(&self) -> Option<()> {
        for _ in 0..MAX_SETTLE_ROUNDS {
            if self.is_asked() {
                break;
            }
            match self.next(SETTLE) {
                Wake::Event => {}
                Wake::Time => break,
                Wake::Stop => return None,
            }
        }
        Some(())
    }

    /// Waits until files that changed without an event have stopped changing, or somebody asks.
    fn settle_polled(&self) -> Option<()> {
        let mut last = self.observer.stamps();
        while last != self.seen && !self.is_asked() {
            if self.next(POLL_SETTLE) == Wake::Stop {
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

    fn is_asked(&self) -> bool {
        self.asked.load(Ordering::Acquire) > 0
    }

    fn is_being_written(&mut self) -> bool {
        let Some(file) = self.observer.being_written() else {
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
