//! Reloads the configuration when its files change.

use std::path::PathBuf;

use super::{
    Diagnostics, LoadedConfig,
    load::read_sources,
    load_sources,
    source::{self, Sources},
};
pub use crate::watch::Watcher;
use crate::watch::{self, WatchReason};

/// Calls `on_change`, on a thread of its own, with the loaded files and the reason, whenever their content differs from
/// the content before, which initially is `known`, and after [`Watcher::trigger`]. The environment is read again too.
///
/// # Errors
///
/// If no thread can be started. If no directory can be watched, the files are only polled.
pub fn watch<E, F>(files: Vec<PathBuf>, known: Sources, env: E, mut on_change: F) -> std::io::Result<Watcher>
where
    E: Fn(&str) -> Option<String> + Send + 'static,
    F: FnMut(Result<LoadedConfig, Diagnostics>, WatchReason) + Send + 'static,
{
    // The content read last, or the error if it could not be read.
    let mut known = Ok(known);
    let watched: Vec<PathBuf> = files.iter().filter_map(|path| source::file(path)).map(Into::into).collect();
    watch::watch("config-watch", &watched, move |reason| {
        let read = read_sources(&files);
        let now = match &read {
            Ok(sources) => Ok(sources.clone()),
            Err(problems) => Err(problems.to_string()),
        };
        if now != known || reason != WatchReason::Change {
            known = now;
            on_change(read.and_then(|sources| load_sources(sources, &env)), reason);
        }
    })
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path, sync::mpsc, time::Duration};

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    type Reports = mpsc::Receiver<Result<LoadedConfig, Diagnostics>>;

    fn watching(file: &Path) -> (Watcher, Reports) {
        let files = vec![file.to_owned()];
        let known = read_sources(&files).unwrap();
        let (sender, reports) = mpsc::channel();
        let watcher = watch(files, known, |_| None, move |outcome, _| sender.send(outcome).unwrap()).unwrap();
        (watcher, reports)
    }

    fn workers(reports: &Reports) -> Option<u16> {
        reports.recv_timeout(LONG).unwrap().unwrap().config.runtime.workers
    }

    #[test]
    fn reports_changes_and_errors() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("o.toml");
        fs::write(&file, "[runtime]\nworkers = 1").unwrap();
        let (watcher, reports) = watching(&file);
        // In one step: a half-written file could be read and reported.
        let replace = |text: &str| {
            fs::write(dir.path().join("new"), text).unwrap();
            fs::rename(dir.path().join("new"), &file).unwrap();
        };
        replace("[runtime]\nworkers = 2");
        assert_eq!(workers(&reports), Some(2));
        replace("[runtime]\nworkers = 'x'");
        assert!(reports.recv_timeout(LONG).unwrap().is_err());
        replace("[runtime]\nworkers = 3");
        assert_eq!(workers(&reports), Some(3));
        // The same content is not reported, except on request.
        replace("[runtime]\nworkers = 3");
        watcher.trigger(WatchReason::Requested);
        assert_eq!(workers(&reports), Some(3));
        drop(watcher);
        assert!(reports.try_recv().is_err(), "nothing was reported twice");
    }

    #[test]
    fn a_file_is_read_when_its_writer_has_closed_it() {
        use std::io::Write;

        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("o.toml");
        fs::write(&file, "[runtime]\nworkers = 1").unwrap();
        let (_watcher, reports) = watching(&file);
        let mut writer = fs::File::create(&file).unwrap();
        writer.write_all(b"[runtime]\n").unwrap();
        writer.flush().unwrap();
        // Longer than any wait for a further event.
        let early = reports.recv_timeout(Duration::from_millis(300));
        assert!(early.is_err(), "it was read half written: {early:?}");
        writer.write_all(b"workers = 2").unwrap();
        drop(writer);
        assert_eq!(workers(&reports), Some(2));
    }

    #[test]
    fn a_file_behind_a_link_into_another_directory_is_watched_too() {
        let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let real = elsewhere.path().join("real.toml");
        fs::write(&real, "[runtime]\nworkers = 1").unwrap();
        let link = dir.path().join("o.toml");
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let (_watcher, reports) = watching(&link);
        fs::write(&real, "[runtime]\nworkers = 2").unwrap();
        let began = std::time::Instant::now();
        assert_eq!(workers(&reports), Some(2));
        assert!(began.elapsed() < Duration::from_secs(4), "noticed by an event, not by a poll");
    }

    #[test]
    fn notices_the_swap_of_a_config_map() {
        let dir = tempfile::tempdir().unwrap();
        for (version, count) in [("..1", 1), ("..2", 2)] {
            fs::create_dir(dir.path().join(version)).unwrap();
            fs::write(dir.path().join(version).join("o.toml"), format!("[runtime]\nworkers = {count}"))
                .unwrap();
        }
        let link = |from: &str, to: &str| std::os::unix::fs::symlink(from, dir.path().join(to)).unwrap();
        link("..1", "..data");
        link("..data/o.toml", "o.toml");
        let (_watcher, reports) = watching(&dir.path().join("o.toml"));
        link("..2", "..data_tmp");
        fs::rename(dir.path().join("..data_tmp"), dir.path().join("..data")).unwrap();
        assert_eq!(workers(&reports), Some(2));
    }
}
