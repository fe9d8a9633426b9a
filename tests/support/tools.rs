//! External programs that tests use.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use tempfile::TempDir;

use super::{WAIT_LIMIT, proxy::signal, wait_for_port};

fn home() -> PathBuf {
    std::env::var_os("HOME").map(PathBuf::from).unwrap_or_default()
}

/// Where `.ci/tools` installs programs.
fn installed() -> PathBuf {
    std::env::var_os("OUTRIGGER_TOOLS").map_or_else(|| home().join(".cache/outrigger"), PathBuf::from)
}

/// The path of the program, from PATH or from what `.ci/tools` installs.
pub fn tool(name: &str) -> Option<PathBuf> {
    if Path::new(name).is_absolute() {
        return Some(name.into());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places: Vec<PathBuf> = std::env::split_paths(&path).collect();
    places.extend([
        installed().join("bin"),
        installed().join("autobahn/bin"),
        home().join("go/bin"),
        "/usr/sbin".into(),
    ]);
    places.into_iter().map(|place| place.join(name)).find(|file| file.is_file())
}

/// Whether all of them are installed; if not, reports that the test is skipped.
#[track_caller]
pub fn has_tool(names: &[&str]) -> bool {
    let missing: Vec<&str> = names.iter().copied().filter(|name| tool(name).is_none()).collect();
    if missing.is_empty() {
        return true;
    }
    let why = format!("{} not installed", missing.join(", "));
    if missing.iter().all(|name| is_excused(name)) {
        report_skipped(&why)
    } else {
        skip(&why)
    }
    false
}

/// Whether `.ci/run` could not install it and has reported that.
fn is_excused(name: &str) -> bool {
    let excused = std::env::var("OUTRIGGER_WITHOUT").unwrap_or_default();
    excused.split_whitespace().any(|one| one == name)
}

/// A folder that `.ci/tools` installs; if there is none, reports that the test is skipped.
#[track_caller]
pub fn has_folder(name: &str) -> Option<PathBuf> {
    let folder = installed().join(name);
    if folder.is_dir() {
        return Some(folder);
    }
    let why = format!("{name} not installed");
    if is_excused(name) {
        report_skipped(&why)
    } else {
        skip(&why)
    }
    None
}

/// The Python that has this module; if there is none, reports that the test is skipped.
#[track_caller]
pub fn python_with(module: &str) -> Option<PathBuf> {
    let candidates = [Some(installed().join("python/bin/python3")), tool("python3")];
    let found = candidates.into_iter().flatten().find(|python| {
        let mut check = Command::new(python);
        check.args(["-c", &format!("import {module}")]).stdout(Stdio::null()).stderr(Stdio::null());
        check.status().is_ok_and(|status| status.success())
    });
    if found.is_none() {
        skip(&format!("no Python with the module {module}"));
    }
    found
}

/// A script of `tests/peers`.
pub fn peer_script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/peers").join(name)
}

/// Reports that the test did not run. In CI nothing may be missing, so there it fails.
#[track_caller]
pub fn skip(why: &str) {
    assert!(std::env::var_os("CI").is_none_or(|value| value != "true"), "missing in CI: {why}");
    report_skipped(why);
}

fn report_skipped(why: &str) {
    let name = std::thread::current().name().unwrap_or("a test").to_owned();
    // Bypasses the test harness's capture: a skip must be seen.
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "SKIPPED: {name}: {why}");
}

/// A server program in the foreground, with its own directory. Dropping it ends the program.
pub struct Daemon {
    child: Child,
    directory: TempDir,
}

impl Daemon {
    /// Starts `name` with its arguments; `@DIR@` in arguments and files is replaced by its directory.
    #[track_caller]
    pub fn start(name: &str, arguments: &[&str], files: &[(&str, &str)]) -> Self {
        let program = tool(name).unwrap_or_else(|| panic!("{name} is not installed"));
        let directory = tempfile::tempdir().expect("a temporary directory");
        let here = directory.path().display().to_string();
        for (file, text) in files {
            fs::write(directory.path().join(file), text.replace("@DIR@", &here)).expect("write");
        }
        let log = fs::File::create(directory.path().join("log")).expect("create");
        let child = Command::new(program)
            .args(arguments.iter().map(|argument| argument.replace("@DIR@", &here)))
            .current_dir(directory.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log)
            .spawn()
            .expect("the program starts");
        Self { child, directory }
    }

    /// Waits until it listens on this address.
    #[track_caller]
    pub fn listening(self, address: SocketAddr) -> Self {
        wait_for_port(address);
        self
    }

    /// Waits until its output contains `needle`, and returns all of its output.
    #[track_caller]
    pub fn wait_for_output(&self, needle: &str) -> String {
        let mut output = String::new();
        super::eventually(&format!("{needle:?} in the output"), || {
            output = self.output();
            output.contains(needle)
        });
        output
    }

    pub fn output(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        signal(self.pid(), "TERM");
        let begin = std::time::Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) && begin.elapsed() < WAIT_LIMIT / 4 {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- a peer's log\n{}---", self.output());
        }
    }
}
