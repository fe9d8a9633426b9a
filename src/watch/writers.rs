//! Tracks which watched files are open for writing, as far as file system events show.
//!
//! A file that is being written must not be read: it may be truncated or incomplete.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use notify::{
    Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher as _,
    event::{AccessKind, AccessMode, CreateKind, ModifyKind},
};

use crate::platform;

/// A file that was created but never written to counts as open for this long. A hard link causes the same event, but no
/// close event.
const CREATED: Duration = Duration::from_secs(5);

/// The watched files that are open for writing.
#[derive(Debug, Default)]
struct Writers {
    /// Absolute paths.
    watched: BTreeSet<PathBuf>,
    open: BTreeMap<PathBuf, OpenFile>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OpenFile {
    Created(Instant),
    Written,
}

/// The effect of an event on the watched files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    /// A read access, such as the watcher's own.
    None,
    /// A file may have changed.
    Changed,
}

impl Writers {
    fn record(&mut self, event: &notify::Result<Event>, now: Instant) -> Effect {
        let Ok(event) = event else { return Effect::Changed };
        if event.need_rescan() {
            // Events were lost, perhaps a close event.
            self.open.clear();
            return Effect::Changed;
        }
        let change: Option<OpenFile> = match event.kind {
            EventKind::Access(AccessKind::Close(AccessMode::Write)) => None,
            EventKind::Access(_) => return Effect::None,
            EventKind::Modify(ModifyKind::Data(_)) => Some(OpenFile::Written),
            EventKind::Create(CreateKind::File) => Some(OpenFile::Created(now)),
            EventKind::Modify(ModifyKind::Name(_)) | EventKind::Remove(_) => None,
            _ => return Effect::Changed,
        };
        for path in &event.paths {
            match change {
                None => drop(self.open.remove(path)),
                Some(OpenFile::Created(_)) if !is_plain_file(path) => {}
                Some(open) if self.watched.contains(path) => drop(self.open.insert(path.clone(), open)),
                Some(_) => {}
            }
        }
        Effect::Changed
    }

    fn being_written(&self, now: Instant) -> Option<&Path> {
        let open = |state: &OpenFile| match state {
            OpenFile::Written => true,
            OpenFile::Created(at) => now.duration_since(*at) < CREATED,
        };
        self.open.iter().find(|(_, state)| open(state)).map(|(path, _)| path.as_path())
    }
}

/// Whether a path is a file with only this name. A link to a file appears at once and complete.
fn is_plain_file(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|file| file.is_file() && file.nlink() == 1)
}

/// Observes files through their directories: editors replace files, and ConfigMaps, Secrets and CSI drivers swap a link
/// next to them.
#[derive(Debug)]
pub struct FileObserver {
    writers: Arc<Mutex<Writers>>,
    files: Vec<PathBuf>,
    /// `None`: the system reports no events, the files are only polled.
    watcher: Option<RecommendedWatcher>,
    directories: BTreeSet<PathBuf>,
}

impl FileObserver {
    /// Calls `changed`, on its own thread, whenever one of `files` may have changed.
    pub fn new(files: &[PathBuf], changed: impl Fn() + Send + 'static) -> Self {
        let files: Vec<PathBuf> = files.iter().map(|file| absolute(file)).collect();
        let writers = Arc::new(Mutex::new(Writers::default()));
        let writers_of_handler = Arc::clone(&writers);
        let handler = move |event: notify::Result<Event>| {
            let mut writers = writers_of_handler.lock().unwrap_or_else(PoisonError::into_inner);
            let effect = writers.record(&event, Instant::now());
            drop(writers);
            if effect == Effect::Changed {
                changed();
            }
        };
        let watcher = notify::recommended_watcher(handler).inspect_err(warn_of_polling).ok();
        let mut this = Self { writers, files, watcher, directories: BTreeSet::new() };
        this.refresh();
        this
    }

    /// Resolves links again: they may lead into other directories now, and a directory may have been created.
    pub fn refresh(&mut self) {
        let Some(watcher) = &mut self.watcher else { return };
        let real = self.files.iter().filter_map(|file| fs::canonicalize(file).ok());
        let files: BTreeSet<PathBuf> = real.chain(self.files.iter().cloned()).collect();
        let wanted: BTreeSet<PathBuf> = files.iter().filter_map(|file| Some(file.parent()?.into())).collect();
        for gone in self.directories.difference(&wanted) {
            let _ = watcher.unwatch(gone);
        }
        self.writers.lock().unwrap_or_else(PoisonError::into_inner).watched = files;
        self.directories.retain(|directory| wanted.contains(directory));
        for directory in wanted {
            if self.directories.contains(&directory) {
                continue;
            }
            match watcher.watch(&directory, RecursiveMode::NonRecursive) {
                Ok(()) => drop(self.directories.insert(directory)),
                Err(error) if !directory.exists() => {
                    tracing::debug!(path = %directory.display(), %error, "not watched until it exists");
                }
                Err(error) => warn_of_polling(&error),
            }
        }
    }

    /// A file that is open for writing, if any; `None` where no event would report that it is closed.
    pub fn file_being_written(&self) -> Option<PathBuf> {
        if !platform::REPORTS_CLOSED_FILES {
            return None;
        }
        let writers = self.writers.lock().unwrap_or_else(PoisonError::into_inner);
        writers.being_written(Instant::now()).map(Path::to_owned)
    }

    /// The stamps of the files, which change with their content.
    pub fn stamps(&self) -> Vec<Option<FileStamp>> {
        self.files.iter().map(|file| FileStamp::of(file).ok()).collect()
    }
}

/// Identity, length and times of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileStamp {
    inode: (u64, u64),
    length: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl FileStamp {
    fn of(file: &Path) -> io::Result<Self> {
        let of = fs::metadata(file)?;
        Ok(Self {
            inode: (of.dev(), of.ino()),
            length: of.len(),
            modified: (of.mtime(), of.mtime_nsec()),
            changed: (of.ctime(), of.ctime_nsec()),
        })
    }
}

fn absolute(file: &Path) -> PathBuf {
    std::path::absolute(file).unwrap_or_else(|_| file.to_owned())
}

fn warn_of_polling(error: &notify::Error) {
    tracing::warn!(%error, "files cannot be watched; they are polled every {} s", super::POLL.as_secs());
}

#[cfg(test)]
mod tests {
    use notify::event::{DataChange, RenameMode};

    use super::*;

    fn writers() -> (tempfile::TempDir, PathBuf, Writers) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("o.toml");
        fs::write(&file, "").unwrap();
        let writers = Writers { watched: [file.clone()].into(), ..Writers::default() };
        (dir, file, writers)
    }

    fn event(kind: EventKind, path: &Path) -> notify::Result<Event> {
        Ok(Event::new(kind).add_path(path.to_owned()))
    }

    const WRITTEN: EventKind = EventKind::Modify(ModifyKind::Data(DataChange::Any));
    const CLOSED: EventKind = EventKind::Access(AccessKind::Close(AccessMode::Write));

    #[test]
    fn a_file_is_open_from_the_first_write_to_the_close() {
        let (_dir, file, mut writers) = writers();
        let now = Instant::now();
        let much_later = now + Duration::from_secs(3600);
        for end in [
            CLOSED,
            EventKind::Modify(ModifyKind::Name(RenameMode::To)),
            EventKind::Remove(notify::event::RemoveKind::File),
        ] {
            assert_eq!(writers.record(&event(WRITTEN, &file), now), Effect::Changed);
            assert_eq!(writers.being_written(much_later), Some(file.as_path()));
            assert_eq!(writers.record(&event(end, &file), now), Effect::Changed);
            assert_eq!(writers.being_written(now), None, "{end:?}");
        }
    }

    #[test]
    fn a_created_file_counts_as_open_but_a_link_does_not() {
        let (dir, file, mut writers) = writers();
        let now = Instant::now();
        let created = EventKind::Create(CreateKind::File);
        let _ = writers.record(&event(created, &file), now);
        assert!(writers.being_written(now).is_some());
        assert!(writers.being_written(now + CREATED).is_none(), "it may never be closed");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let mut writers = Writers { watched: [link.clone()].into(), ..Writers::default() };
        let _ = writers.record(&event(created, &link), now);
        assert!(writers.being_written(now).is_none());
    }

    #[test]
    fn ignores_other_files_and_readers_and_recovers_from_lost_events() {
        let (dir, file, mut writers) = writers();
        let now = Instant::now();
        let _ = writers.record(&event(WRITTEN, &dir.path().join("other")), now);
        assert!(writers.being_written(now).is_none());
        let read = EventKind::Access(AccessKind::Open(AccessMode::Any));
        assert_eq!(writers.record(&event(read, &file), now), Effect::None);
        let _ = writers.record(&event(WRITTEN, &file), now);
        let lost = Ok(Event::new(EventKind::Other).set_flag(notify::event::Flag::Rescan));
        let _ = writers.record(&lost, now);
        assert!(writers.being_written(now).is_none());
    }
}
