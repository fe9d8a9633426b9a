//! Reads the configuration again when its files change.

use std::path::PathBuf;

use super::{
    Diagnostics, Loaded,
    load::read_sources,
    load_sources,
    source::{self, Sources},
};
use crate::watch;
pub use crate::watch::Watcher;

/// Calls `on_change`, on a thread of its own, with what the files hold whenever it differs from before, which at
/// first is `known` (what was loaded), and whenever [`Watcher::trigger`] asks. The environment is read anew.
///
/// # Errors
///
/// Where no thread can be started. Where no directory can be watched, polling alone has to do.
pub fn watch<E, F>(files: Vec<PathBuf>, known: Sources, env: E, mut on_change: F) -> std::io::Result<Watcher>
where
    E: Fn(&str) -> Option<String> + Send + 'static,
    F: FnMut(Result<Loaded, Diagnostics>) + Send + 'static,
{
    // What was read last; of what could not be read, the complaint.
    let mut known = Ok(known);
    let watched: Vec<PathBuf> = files.iter().filter_map(|path| source::file(path)).map(Into::into).collect();
    watch::watch("config-watch", &watched, move |forced| {
        let read = read_sources(&files);
        let now = match &read {
            Ok(sources) => Ok(sources.clone()),
            Err(problems) => Err(problems.to_string()),
        };
        if now != known || forced {
            known = now;
            on_change(read.and_then(|sources| load_sources(sources, &env)));
        }
    })
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path, sync::mpsc, time::Duration};

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
