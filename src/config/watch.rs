//! Reads the configuration again when its files change.
//!
//! The directories are watched, not the files: editors replace files, and a ConfigMap swaps the `..data` link beside
//! them. An event only means "read again and compare"; a slow poll finds what no event told (network file systems,
//! links into other directories, no watches left).

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

use super::{Diagnostics, Loaded, load::read_sources, load_sources, source::Sources};

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

/// Calls `on_change`, on a thread of its own, with what the files hold whenever it differs from before, which at
/// first is `known` (what was loaded), and whenever [`Watcher::trigger`] asks. The environment is read anew.
///
/// # Errors
///
/// Where no thread can be started. Where no directory can be watched, polling alone has to do.
pub fn watch<E, F>(files: Vec<PathBuf>, known: Sources, env: E, on_change: F) -> std::io::Result<Watcher>
where
    E: Fn(&str) -> Option<String> + Send + 'static,
    F: FnMut(Result<Loaded, Diagnostics>) + Send + 'static,
{
    let (events, inbox) = sync_channel(QUEUE);
    let forced = Arc::new(AtomicBool::new(false));
    let notify = directories(&files, events.clone());
    let state = State { files, known: Ok(known), env, on_change, forced: forced.clone() };
    let thread = std::thread::Builder::new().name("config-watch".to_owned()).spawn(move || {
        // Lives as long as the thread.
        let _notify = notify;
        state.run(&inbox);
    })?;
    Ok(Watcher { events, forced, thread: Some(thread) })
}

impl Watcher {
    /// Reads again and tells the outcome, changed or not: for SIGHUP.
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
    tracing::warn!(%error, "cannot watch the configuration; it is looked at every {} s", POLL.as_secs());
}

struct State<E, F> {
    files: Vec<PathBuf>,
    /// What was read last; of what could not be read, the complaint.
    known: Result<Sources, String>,
    env: E,
    on_change: F,
    forced: Arc<AtomicBool>,
}

impl<E, F> State<E, F>
where
    E: Fn(&str) -> Option<String>,
    F: FnMut(Result<Loaded, Diagnostics>),
{
    fn run(mut self, inbox: &Receiver<Event>) {
        loop {
            match inbox.recv_timeout(POLL) {
                Ok(Event::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                Ok(Event::Look) => {
                    for _ in 0..MAX_SETTLE_ROUNDS {
                        match inbox.recv_timeout(SETTLE) {
                            Ok(Event::Look) => {}
                            Ok(Event::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                            Err(RecvTimeoutError::Timeout) => break,
                        }
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            self.look();
        }
    }

    fn look(&mut self) {
        let forced = self.forced.swap(false, Ordering::AcqRel);
        let read = read_sources(&self.files);
        let now = match &read {
            Ok(sources) => Ok(sources.clone()),
            Err(problems) => Err(problems.to_string()),
        };
        if now != self.known || forced {
            self.known = now;
            (self.on_change)(read.and_then(|sources| load_sources(sources, &self.env)));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, sync::mpsc};

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    type Told = mpsc::Receiver<Result<Loaded, Diagnostics>>;

    fn watching(file: &Path) -> (Watcher, Told) {
        let files = vec![file.to_owned()];
        let known = read_sources(&files).unwrap();
        let (tell, told) = mpsc::channel();
        let watcher = watch(files, known, |_| None, move |outcome| tell.send(outcome).unwrap()).unwrap();
        (watcher, told)
    }

    fn workers(told: &Told) -> Option<u16> {
        told.recv_timeout(LONG).unwrap().unwrap().config.runtime.workers
    }

    #[test]
    fn changes_are_told_and_broken_ones_too() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("o.toml");
        fs::write(&file, "[runtime]\nworkers = 1").unwrap();
        let (watcher, told) = watching(&file);
        // In one step: a half-written file may be read, and would be told.
        let replace = |text: &str| {
            fs::write(dir.path().join("new"), text).unwrap();
            fs::rename(dir.path().join("new"), &file).unwrap();
        };
        replace("[runtime]\nworkers = 2");
        assert_eq!(workers(&told), Some(2));
        replace("[runtime]\nworkers = 'x'");
        assert!(told.recv_timeout(LONG).unwrap().is_err());
        replace("[runtime]\nworkers = 3");
        assert_eq!(workers(&told), Some(3));
        // The same content is no news; asked, it is told.
        replace("[runtime]\nworkers = 3");
        watcher.trigger();
        assert_eq!(workers(&told), Some(3));
        drop(watcher);
        assert!(told.try_recv().is_err(), "nothing was told twice");
    }

    #[test]
    fn the_swap_of_a_config_map_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        for (version, count) in [("..1", 1), ("..2", 2)] {
            fs::create_dir(dir.path().join(version)).unwrap();
            fs::write(dir.path().join(version).join("o.toml"), format!("[runtime]\nworkers = {count}"))
                .unwrap();
        }
        let link = |from: &str, to: &str| std::os::unix::fs::symlink(from, dir.path().join(to)).unwrap();
        link("..1", "..data");
        link("..data/o.toml", "o.toml");
        let (_watcher, told) = watching(&dir.path().join("o.toml"));
        link("..2", "..data_tmp");
        fs::rename(dir.path().join("..data_tmp"), dir.path().join("..data")).unwrap();
        assert_eq!(workers(&told), Some(2));
    }
}
