//! Which watched files a writer has open, as far as the system's events tell.
//!
//! A file that is being written must not be read: it may be truncated, or hold the first half of what is meant.

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

/// A file that was created but never written to counts as open for this long. A hard link looks the same, and nobody
/// closes that.
const CREATED: Duration = Duration::from_secs(5);

/// The state of each watched file that somebody writes to.
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

/// What an event means for whoever reads the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meaning {
    /// Somebody read something; so do we, at every event.
    Nothing,
    /// A file may have changed.
    Changed,
}

impl Writers {
    fn note(&mut self, event: &notify::Result<Event>, now: Instant) -> Meaning {
        let Ok(event) = event else { return Meaning::Changed };
        if event.need_rescan() {
            // Events were lost, perhaps that of a close.
            self.open.clear();
            return Meaning::Changed;
        }
        let change: Option<OpenFile> = match event.kind {
            EventKind::Access(AccessKind::Close(AccessMode::Write)) => None,
            EventKind::Access(_) => return Meaning::Nothing,
            EventKind::Modify(ModifyKind::Data(_)) => Some(OpenFile::Written),
            EventKind::Create(CreateKind::File) => Some(OpenFile::Created(now)),
            EventKind::Modify(ModifyKind::Name(_)) | EventKind::Remove(_) => None,
            _ => return Meaning::Changed,
        };
        for path in &event.paths {
            match change {
                None => drop(self.open.remove(path)),
                Some(OpenFile::Created(_)) if !is_plain_file(path) => {}
                Some(open) if self.watched.contains(path) => drop(self.open.insert(path.clone(), open)),
                Some(_) => {}
            }
        }
        Meaning::Changed
    }

    fn being_written(&self, now: Instant) -> Option<&Path> {
        let open = |state: &OpenFile| match state {
            OpenFile::Written => true,
            OpenFile::Created(at) => now.duration_since(*at) < CREATED,
        };
        self.open.iter().find(|(_, state)| open(state)).map(|(path, _)| path.as_path())
    }
}

/// Whether a path is a file under this name alone: a link to one is there at once, whole.
fn is_plain_file(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|file| file.is_file() && file.nlink() == 1)
}

/// Observes files through the directories that hold them: editors replace files, and ConfigMaps, Secrets and CSI
/// drivers swap a link beside them.
#[derive(Debug)]
pub struct Observer {
    writers: Arc<Mutex<Writers>>,
    files: Vec<PathBuf>,
    /// None: nothing can be observed, polling has to do.
    watcher: Option<RecommendedWatcher>,
    directories: BTreeSet<PathBuf>,
}

impl Observer {
    /// Calls `changed`, on a thread of its own, whenever one of `files` may have changed.
    pub fn new(files: &[PathBuf], changed: impl Fn() + Send + 'static) -> Self {
        let files: Vec<PathBuf> = files.iter().map(|file| absolute(file)).collect();
        let writers = Arc::new(Mutex::new(Writers::default()));
        let noted = Arc::clone(&writers);
        let handler = move |event: notify::Result<Event>| {
            let mut writers = noted.lock().unwrap_or_else(PoisonError::into_inner);
            let meaning = writers.note(&event, Instant::now());
            drop(writers);
            if meaning == Meaning::Changed {
                changed();
            }
        };
        let watcher = notify::recommended_watcher(handler).inspect_err(warn_of_polling).ok();
        let mut this = Self { writers, files, watcher, directories: BTreeSet::new() };
        this.refresh();
        this
    }

    /// Follows links anew: they may lead into other directories now, and a directory may have come into being.
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

    /// A file that somebody is writing to.
    pub fn being_written(&self) -> Option<PathBuf> {
        let writers = self.writers.lock().unwrap_or_else(PoisonError::into_inner);
        writers.being_written(Instant::now()).map(Path::to_owned)
    }

    /// What tells a file from what it was, without reading it.
    pub fn stamps(&self) -> Vec<Option<Stamp>> {
        self.files.iter().map(|file| Stamp::of(file).ok()).collect()
    }
}

/// Identity, length and times of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stamp {
    inode: (u64, u64),
    length: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
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
    tracing::warn!(%error, "files cannot be watched; they are looked at every {} s", super::POLL.as_secs());
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
    fn a_file_is_open_from_its_first_byte_until_its_writer_closes_it() {
        let (_dir, file, mut writers) = writers();
        let now = Instant::now();
        let much_later = now + Duration::from_secs(3600);
        for end in [
            CLOSED,
            EventKind::Modify(ModifyKind::Name(RenameMode::To)),
            EventKind::Remove(notify::event::RemoveKind::File),
        ] {
            assert_eq!(writers.note(&event(WRITTEN, &file), now), Meaning::Changed);
            assert_eq!(writers.being_written(much_later), Some(file.as_path()));
            assert_eq!(writers.note(&event(end, &file), now), Meaning::Changed);
            assert_eq!(writers.being_written(now), None, "{end:?}");
        }
    }

    #[test]
    fn a_created_file_is_waited_for_but_a_link_is_not() {
        let (dir, file, mut writers) = writers();
        let now = Instant::now();
        let created = EventKind::Create(CreateKind::File);
        let _ = writers.note(&event(created, &file), now);
        assert!(writers.being_written(now).is_some());
        assert!(writers.being_written(now + CREATED).is_none(), "nobody may ever close it");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let mut writers = Writers { watched: [link.clone()].into(), ..Writers::default() };
        let _ = writers.note(&event(created, &link), now);
        assert!(writers.being_written(now).is_none());
    }

    #[test]
    fn other_files_and_readers_do_not_matter_and_lost_events_hold_nothing_back() {
        let (dir, file, mut writers) = writers();
        let now = Instant::now();
        let _ = writers.note(&event(WRITTEN, &dir.path().join("other")), now);
        assert!(writers.being_written(now).is_none());
        let read = EventKind::Access(AccessKind::Open(AccessMode::Any));
        assert_eq!(writers.note(&event(read, &file), now), Meaning::Nothing);
        let _ = writers.note(&event(WRITTEN, &file), now);
        let lost = Ok(Event::new(EventKind::Other).set_flag(notify::event::Flag::Rescan));
        let _ = writers.note(&lost, now);
        assert!(writers.being_written(now).is_none());
    }
}
