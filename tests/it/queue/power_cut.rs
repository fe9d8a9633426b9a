//! Power cuts: the system calls of a real writer are recorded. At random moments the machine "loses power": of what was
//! written since the last sync of a file, any part may be missing or torn. Every such disk must still hold every promise.

use std::fs;

use super::*;
use crate::support::{has_tool, tool};

/// The unit in which a disk writes at least.
const SECTOR: usize = 512;

enum Event {
    Write {
        file: String,
        offset: usize,
        data: Vec<u8>,
    },
    Truncate {
        file: String,
        length: usize,
    },
    Sync {
        file: String,
    },
    Unlink {
        file: String,
    },
    SyncDirectory,
    /// A line that the process has printed.
    Printed(String),
}

/// A file: what a sync has put on the disk, and what was written since.
#[derive(Clone, Default)]
struct DiskFile {
    synced: Vec<u8>,
    unsynced: Vec<Change>,
    /// Deleted, but the directory was not synced since: it may come back.
    unlinked: bool,
}

#[derive(Clone)]
enum Change {
    Write(usize, Vec<u8>),
    Truncate(usize),
}

impl DiskFile {
    fn sync(&mut self) {
        for change in std::mem::take(&mut self.unsynced) {
            change.apply(&mut self.synced, |_| true);
        }
    }

    /// What may be found after the power is back.
    fn after_power_cut(&self, rng: &mut Rng) -> Vec<u8> {
        let mut content = self.synced.clone();
        // Some cuts keep nearly everything, some nearly nothing.
        let kept = rng.unit_f64();
        for change in &self.unsynced {
            match rng.below(3) {
                // Torn: single sectors of it.
                0 => change.apply(&mut content, |_| rng.chance(kept)),
                _ if rng.chance(kept) => change.apply(&mut content, |_| true),
                _ => {}
            }
        }
        content
    }
}

impl Change {
    fn apply(&self, content: &mut Vec<u8>, mut sector_is_written: impl FnMut(usize) -> bool) {
        match self {
            Self::Truncate(length) if sector_is_written(0) => content.resize(*length, 0),
            Self::Truncate(_) => {}
            Self::Write(offset, data) => {
                let mut at = 0;
                while at < data.len() {
                    // To the next boundary between sectors.
                    let end = data.len().min(at + SECTOR - (offset + at) % SECTOR);
                    if sector_is_written(at) {
                        content.resize(content.len().max(offset + end), 0);
                        content[offset + at..offset + end].copy_from_slice(&data[at..end]);
                    }
                    at = end;
                }
            }
        }
    }
}

/// Runs a child test under strace and reads what it did to the files in `store`.
fn record(test: &str, store: &Path) -> Vec<Event> {
    let trace = store.with_extension("trace");
    let strace = tool("strace").expect("strace");
    let tracer = [
        strace.to_str().expect("a path"),
        "-f",
        "-y",
        "-xx",
        "-s",
        "1000000",
        "-e",
        "trace=write,pwrite64,fsync,fdatasync,ftruncate,unlink",
        "-o",
        trace.to_str().expect("a path"),
    ];
    let status = child(test, store, &tracer)
        .env(CALLERS, "6")
        .env(REQUESTS, "25")
        .stdout(std::process::Stdio::piped())
        .output()
        .expect("strace runs");
    assert!(status.status.success(), "{}", String::from_utf8_lossy(&status.stderr));
    read_trace(&fs::read_to_string(&trace).expect("a trace"), store)
}

fn read_trace(trace: &str, store: &Path) -> Vec<Event> {
    let mut unfinished: BTreeMap<&str, String> = BTreeMap::new();
    let mut events = Vec::new();
    for line in trace.lines() {
        let (process, call) = line.split_once(' ').expect("a process");
        let call = call.trim_start();
        if let Some(begin) = call.strip_suffix(" <unfinished ...>") {
            // A promise counts from its beginning, a sync from its end.
            if begin.starts_with("write(1<") {
                events.extend(event(&format!("{begin}) = 0"), store));
            } else {
                unfinished.insert(process, begin.to_owned());
            }
        } else if let Some(end) = call.strip_prefix("<... ") {
            let Some(begin) = unfinished.remove(process) else { continue };
            let end = end.split_once("resumed>").expect("an end").1;
            events.extend(event(&format!("{begin}{end}"), store));
        } else {
            events.extend(event(call, store));
        }
    }
    events
}

/// `pwrite64(5</path>, "\x00…", 4096, 0) = 4096`
fn event(call: &str, store: &Path) -> Option<Event> {
    let (name, rest) = call.split_once('(')?;
    // Short calls are padded: `fsync(9<…>)      = 0`.
    let (arguments, result) = rest.rsplit_once(" = ")?;
    let arguments = arguments.trim_end().strip_suffix(')')?;
    assert!(!result.starts_with('-'), "{name} failed: {result}");
    let bytes = || unescape(arguments.split_once('"').expect("data").1.rsplit_once('"').expect("data").0);
    let file_name = |path: Vec<u8>| {
        let path = String::from_utf8(path).ok()?;
        Some(path.strip_prefix(store.to_str()?)?.trim_start_matches('/').to_owned())
    };
    if name == "unlink" {
        return Some(Event::Unlink { file: file_name(bytes())? });
    }
    let path = arguments.split_once('<')?.1.split_once('>')?.0;
    if name == "write" && arguments.starts_with("1<") {
        return Some(Event::Printed(String::from_utf8_lossy(&bytes()).into_owned()));
    }
    let file = file_name(unescape(path))?;
    if file.is_empty() {
        return Some(Event::SyncDirectory);
    }
    if !file.starts_with("queue.db") {
        return None;
    }
    let last_number = || arguments.rsplit(", ").next().and_then(|text| text.parse().ok()).expect("a number");
    Some(match name {
        "pwrite64" => Event::Write { file, offset: last_number(), data: bytes() },
        "ftruncate" => Event::Truncate { file, length: last_number() },
        "fsync" | "fdatasync" => Event::Sync { file },
        other => panic!("{other} on {file}"),
    })
}

fn unescape(text: &str) -> Vec<u8> {
    if !text.contains("\\x") {
        return text.as_bytes().to_vec();
    }
    text.split("\\x").skip(1).map(|hex| u8::from_str_radix(&hex[..2], 16).expect("hex")).collect()
}

/// Cuts the power at random moments; `check` says what is lost. Returns how many of the disks have lost something.
fn cut_power(
    events: &[Event],
    states: usize,
    mut check: impl FnMut(&Path, &Promises) -> Option<String>,
) -> Vec<String> {
    let mut rng = Rng::from_seed(11);
    let mut moments: Vec<usize> = (0..states).map(|_| rng.below(events.len())).collect();
    moments.sort_unstable();
    let mut moments = moments.into_iter().peekable();
    let (mut files, mut promises): (BTreeMap<String, DiskFile>, _) = (BTreeMap::new(), Promises::default());
    let mut lost = Vec::new();
    fn file<'a>(files: &'a mut BTreeMap<String, DiskFile>, name: &str) -> &'a mut DiskFile {
        let file = files.entry(name.to_owned()).or_default();
        if file.unlinked {
            // A new one of the same name.
            *file = DiskFile::default();
        }
        file
    }
    for (index, event) in events.iter().enumerate() {
        match event {
            Event::Write { file: name, offset, data } => {
                file(&mut files, name).unsynced.push(Change::Write(*offset, data.clone()));
            }
            Event::Truncate { file: name, length } => {
                file(&mut files, name).unsynced.push(Change::Truncate(*length));
            }
            Event::Sync { file: name } => file(&mut files, name).sync(),
            Event::Unlink { file: name } => {
                if let Some(file) = files.get_mut(name) {
                    file.unlinked = true;
                }
            }
            Event::SyncDirectory => files.retain(|_, file| !file.unlinked),
            Event::Printed(text) => text.lines().for_each(|line| promises.read(line)),
        }
        while moments.next_if_eq(&index).is_some() {
            // In memory, where syncs cost nothing.
            let disk =
                tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a directory");
            for (name, file) in &files {
                if file.unlinked && rng.chance(0.5) {
                    continue;
                }
                fs::write(disk.path().join(name), file.after_power_cut(&mut rng)).expect("write");
            }
            lost.extend(check(disk.path(), &promises).map(|what| format!("at {index}: {what}")));
        }
    }
    assert!(moments.next().is_none());
    lost
}

/// What the store in this directory has lost.
fn lost_by_the_store(path: &Path, promises: &Promises) -> Option<String> {
    block_on(async {
        let opened = open(path);
        let status = opened.0.status();
        let lost = if status.is_healthy() {
            check_contents(&opened.0).await.expect("readable");
            promises.broken(&opened.0).await
        } else {
            Some(format!("{status:?}"))
        };
        close(opened);
        lost
    })
}

fn survive_power_cuts(states: usize) {
    if !has_tool(&["strace"]) {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let store = directory.path().join("store");
    let events = record("queue::writer", &store);
    let promised =
        events.iter().filter(|event| matches!(event, Event::Printed(text) if text.contains("ACCEPTED")));
    assert_eq!(promised.count(), 150, "the record is complete");
    assert_eq!(cut_power(&events, states, lost_by_the_store), Vec::<String>::new());
}

#[test]
fn what_was_accepted_survives_a_power_cut() {
    survive_power_cuts(150);
}

/// `cargo test --test it queue::power_cut::what_was_accepted_survives_1500_power_cuts -- --ignored`
#[test]
#[ignore = "minutes"]
fn what_was_accepted_survives_1500_power_cuts() {
    survive_power_cuts(1500);
}

/// The check finds what is lost: SQLite with `synchronous = NORMAL` does not sync its commits.
#[test]
fn the_check_finds_commits_that_were_not_synced() {
    if !has_tool(&["strace"]) {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let store = directory.path().join("store");
    fs::create_dir(&store).expect("a directory");
    let events = record("queue::power_cut::careless_writer", &store);
    let lost = cut_power(&events, 100, |path, promises| {
        let database = rusqlite::Connection::open(path.join("queue.db")).expect("it opens");
        let count = database.query_row("SELECT count(*) FROM delivery", [], |row| row.get::<_, i64>(0));
        let (found, promised) = (count.unwrap_or(0), promises.accepted.len());
        (found < promised as i64).then(|| format!("{found} of {promised}"))
    });
    assert!(lost.len() > 20, "only {} of 100 disks lost something", lost.len());
}

#[test]
#[ignore = "the main function of a child process"]
fn careless_writer() {
    let Some(path) = env::var_os(STORE) else { return };
    let database = rusqlite::Connection::open(Path::new(&path).join("queue.db")).expect("it opens");
    database
        .execute_batch(
            "PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;
             CREATE TABLE delivery (body BLOB)",
        )
        .expect("a table");
    for seed in 0..150 {
        database.execute("INSERT INTO delivery VALUES (?1)", [body(seed)]).expect("a row");
        let id = DeliveryId::new(outrigger::unix_time::UnixMillis(seed), [0; 10]);
        print_line(&format!("ACCEPTED {id} {seed:016x}"));
    }
}
