//! Notices that files changed.
//!
//! The directories are watched, not the files: editors replace files, and ConfigMaps, Secrets and csi drivers swap the
//! `..data` link beside them. An event only means "read again and compare"; a slow poll finds what no event told
//! (network file systems, links into other directories, no watches left).

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread::JoinHandle,
    time::Duration,
};

use notify::{
    EventKind, RecommendedWatcher, RecursiveMode, Watcher as _,
    event::{AccessKind, AccessMode},
};

/// Between two looks where no event comes.
const POLL: Duration = Duration::from_secs(5);
/// Writers take several steps: after an event, this long must pass without another.
const SETTLE: Duration = Duration::from_millis(50);
/// But not for ever.
const MAX_SETTLE_ROUNDS: u32 = 20;
/// Events that wait; more say nothing new.
const QUEUE: usize = 8;

/// Watches until it is dropped.
#[derive(Debug)]
pub struct Watcher {
    events: SyncSender<Event>,
    forced: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Clone, Copy, Debug)]
enum Event {
    /// Something happened near the files, or somebody asks.
    Look,
    Stop,
}

/// Calls `look`, on a thread of its own called `name`, whenever one of `files` may have changed, and every few seconds.
/// It is told whether [`Watcher::trigger`] asked.
///
/// # Errors
///
/// Where no thread can be started. Where no directory can be watched, polling alone has to do.
pub fn watch(
    name: &str,
    files: &[PathBuf],
    mut look: impl FnMut(bool) + Send + 'static,
) -> std::io::Result<Watcher> {
    let (events, inbox) = sync_channel(QUEUE);
    let forced = Arc::new(AtomicBool::new(false));
    let notify = directories(files, events.clone());
    let asked = Arc::clone(&forced);
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        // Lives as long as the thread.
        let _notify = notify;
        while wait(&inbox) {
            look(asked.swap(false, Ordering::AcqRel));
        }
    })?;
    Ok(Watcher { events, forced, thread: Some(thread) })
}

impl Watcher {
    /// Has the files looked at now, changed or not.
    pub fn trigger(&self) {
        self.forced.store(true, Ordering::Release);
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

/// Waits until it is time to look; false at the end.
fn wait(inbox: &Receiver<Event>) -> bool {
    match inbox.recv_timeout(POLL) {
        Ok(Event::Stop) | Err(RecvTimeoutError::Disconnected) => return false,
        Ok(Event::Look) => {
            for _ in 0..MAX_SETTLE_ROUNDS {
                match inbox.recv_timeout(SETTLE) {
                    Ok(Event::Look) => {}
                    Ok(Event::Stop) | Err(RecvTimeoutError::Disconnected) => return false,
                    Err(RecvTimeoutError::Timeout) => break,
                }
            }
        }
        Err(RecvTimeoutError::Timeout) => {}
    }
    true
}

fn directories(files: &[PathBuf], events: SyncSender<Event>) -> Option<RecommendedWatcher> {
    let told = move |event: notify::Result<notify::Event>| {
        // Reading is an event too, and we read at every event.
        let only_read = event.as_ref().is_ok_and(|event| match event.kind {
            EventKind::Access(AccessKind::Close(AccessMode::Write)) => false,
            kind => kind.is_access(),
        });
        if !only_read {
            let _ = events.try_send(Event::Look);
        }
    };
    let mut watcher = notify::recommended_watcher(told).inspect_err(polling_only).ok()?;
    let parents: BTreeSet<&Path> = files.iter().map(|file| parent(file)).collect();
    for directory in parents {
        let _ = watcher.watch(directory, RecursiveMode::NonRecursive).inspect_err(polling_only);
    }
    Some(watcher)
}

fn parent(file: &Path) -> &Path {
    file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn polling_only(error: &notify::Error) {
    tracing::warn!(%error, "files cannot be watched; they are looked at every {} s", POLL.as_secs());
}
