//! The service that `run -- CMD` starts as a child process.
//!
//! The module calls `waitpid` itself instead of using tokio's: as PID 1 of a container this process is the parent of
//! every orphan too, and must reap orphans without losing the exit status of the service.

use std::{
    ffi::{OsStr, OsString},
    fs,
    io::{self, ErrorKind, IsTerminal},
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::Path,
    process::Command,
};

use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

use crate::{descriptors, platform};

/// The subcommand with which this program execs the service.
pub const EXEC_COMMAND: &str = "exec-service";
/// The search path where `PATH` is not set, as in `execvp`.
const DEFAULT_PATH: &str = "/bin:/usr/bin";

/// A running service.
#[derive(Clone, Debug)]
pub struct Child {
    pid: Pid,
    /// It leads a process group of its own, so that its descendants can be killed with it.
    leads_group: bool,
    ended: watch::Receiver<Option<u8>>,
}

/// What happens to the service when this process is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnSidecarDeath {
    /// The kernel kills it too (Linux). The service is started through this program, whose `main` must handle
    /// [`EXEC_COMMAND`].
    Kill,
    /// It keeps running.
    Leave,
}

/// Why the service could not be started.
#[derive(Debug, thiserror::Error)]
#[error("cannot start the service: {}: {}", program.to_string_lossy(), explain(source))]
pub struct SpawnError {
    program: OsString,
    source: io::Error,
}

fn explain(error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::NotFound => {
            "no such command, or the interpreter in its first line does not exist".to_owned()
        }
        ErrorKind::PermissionDenied => "not executable".to_owned(),
        _ => error.to_string(),
    }
}

impl SpawnError {
    pub fn new(program: OsString, source: io::Error) -> Self {
        Self { program, source }
    }

    /// The exit code of a shell in this case: 127 not found, 126 found but not executable.
    pub fn exit_code(&self) -> u8 {
        if self.source.kind() == ErrorKind::NotFound { 127 } else { 126 }
    }
}

impl Child {
    /// Starts `command` with `env` added to this process's environment. Needs a tokio runtime.
    ///
    /// On a terminal the service shares this process's group, so that it can read from the terminal and receives
    /// Ctrl-C as it would without the sidecar. Otherwise it leads a group of its own.
    ///
    /// With [`OnSidecarDeath::Kill`] the caller must be a thread that lives as long as the process: the kernel kills
    /// the service when the thread that started it ends.
    pub fn spawn(
        command: &[OsString],
        env: Vec<(&'static str, String)>,
        on_our_death: OnSidecarDeath,
    ) -> Result<Self, SpawnError> {
        let program = command.first().cloned().unwrap_or_default();
        let failed = |source| SpawnError::new(program.clone(), source);
        find_program(&program).map_err(failed)?;
        let leads_group = leads_group();
        let mut command = match own_program(on_our_death) {
            Some(own) => {
                let mut built = Command::new(own);
                built.args([EXEC_COMMAND, "--parent", &std::process::id().to_string(), "--"]).args(command);
                built
            }
            None => {
                let mut built = Command::new(&program);
                built.args(command.get(1..).unwrap_or_default());
                built
            }
        };
        command.envs(env);
        if leads_group {
            command.process_group(0);
        }
        // Listen for SIGCHLD before the start, so that a service that ends at once is not missed.
        let mut signals = signal(SignalKind::child()).map_err(failed)?;
        let child = descriptors::with_inherited_limit(|| command.spawn()).map_err(failed)?;
        let pid = Pid::from_child(&child);
        let (exit_code, ended) = watch::channel(None);
        tokio::spawn(async move {
            let orphans_too = std::process::id() == 1;
            while exit_code.borrow().is_none() || orphans_too {
                if let Some(code) = reap(pid, orphans_too) {
                    exit_code.send_replace(Some(code));
                    continue;
                }
                if signals.recv().await.is_none() {
                    break;
                }
            }
        });
        Ok(Self { pid, leads_group, ended })
    }

    pub fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Waits for its end: its exit code, or 128 + the number of the signal that killed it. Cancel safe; may be called
    /// again.
    pub async fn wait(&mut self) -> u8 {
        match self.ended.wait_for(Option::is_some).await.map(|code| *code) {
            Ok(code) => code.unwrap_or(1),
            Err(_) => 1,
        }
    }

    /// Sends SIGTERM.
    pub fn terminate(&self) {
        self.signal(|pid| rustix::process::kill_process(pid, Signal::TERM));
    }

    /// Sends SIGKILL to it, or to its process group where it leads one.
    pub fn kill(&self) {
        self.signal_all(Signal::KILL);
    }

    /// Forwards a signal. Job control signals go to the whole group.
    pub fn forward(&self, signal: Signal) {
        tracing::debug!(pid = self.pid(), signal = signal.as_raw(), "forwarding a signal to the service");
        match signal {
            Signal::TSTP | Signal::CONT => self.signal_all(signal),
            signal => self.signal(|pid| rustix::process::kill_process(pid, signal)),
        }
    }

    fn signal_all(&self, signal: Signal) {
        if self.leads_group {
            self.signal(|pid| rustix::process::kill_process_group(pid, signal));
        } else {
            self.signal(|pid| rustix::process::kill_process(pid, signal));
        }
    }

    fn signal(&self, send: impl Fn(Pid) -> rustix::io::Result<()>) {
        // After it was reaped, the process ID may belong to another process.
        if self.ended.borrow().is_none()
            && let Err(error) = send(self.pid)
        {
            tracing::debug!(%error, pid = self.pid(), "could not signal the service");
        }
    }
}

/// Whether a service that is started now leads a process group of its own. On a terminal it does not: a terminal has
/// only one foreground group.
pub fn leads_group() -> bool {
    !io::stdin().is_terminal()
}

/// This program, where the service is started through it.
fn own_program(on_our_death: OnSidecarDeath) -> Option<&'static Path> {
    if on_our_death == OnSidecarDeath::Leave {
        return None;
    }
    let own = Path::new(platform::OWN_PROGRAM?);
    if !own.exists() {
        tracing::warn!("/proc is not mounted: the service keeps running if its sidecar is killed");
        return None;
    }
    Some(own)
}

/// Checks that the program exists and is executable. Done before the fork, because a child could report it only by its
/// exit code.
fn find_program(program: &OsStr) -> io::Result<()> {
    let check = |path: &Path| match fs::metadata(path) {
        Ok(found) if found.is_file() && found.permissions().mode() & 0o111 != 0 => Ok(()),
        Ok(_) => Err(ErrorKind::PermissionDenied.into()),
        Err(error) => Err(error),
    };
    if program.is_empty() || program.as_encoded_bytes().contains(&b'/') {
        return check(Path::new(program));
    }
    let path = std::env::var_os("PATH").unwrap_or_else(|| DEFAULT_PATH.into());
    let mut outcome = Err(ErrorKind::NotFound.into());
    for directory in std::env::split_paths(&path) {
        match check(&directory.join(program)) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == ErrorKind::PermissionDenied => outcome = Err(error),
            Err(_) => {}
        }
    }
    outcome
}

/// Reaps children that have ended; returns the service's exit code if it was among them.
fn reap(service: Pid, orphans_too: bool) -> Option<u8> {
    loop {
        let ended = if orphans_too {
            rustix::process::wait(WaitOptions::NOHANG)
        } else {
            rustix::process::waitpid(Some(service), WaitOptions::NOHANG)
        };
        match ended {
            Ok(Some((pid, status))) if pid == service => return Some(exit_code(status)),
            Ok(Some(_)) => {}
            Err(rustix::io::Errno::INTR) => {}
            Ok(None) | Err(_) => return None,
        }
    }
}

fn exit_code(status: WaitStatus) -> u8 {
    let code =
        status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal)).unwrap_or(1);
    u8::try_from(code).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Vec<OsString> {
        ["sh", "-c", script].iter().map(OsString::from).collect()
    }

    #[tokio::test]
    async fn the_exit_code_is_returned() {
        let mut child = Child::spawn(&sh("exit 7"), Vec::new(), OnSidecarDeath::Leave).unwrap();
        assert_eq!(child.wait().await, 7);
        assert_eq!(child.wait().await, 7, "and again");
        child.terminate(); // harmless after the end
    }

    #[tokio::test]
    async fn the_exit_code_of_a_signal_is_128_and_its_number() {
        let mut child = Child::spawn(&sh("exec sleep 60"), Vec::new(), OnSidecarDeath::Leave).unwrap();
        child.terminate();
        assert_eq!(child.wait().await, 128 + 15);
        let mut child =
            Child::spawn(&sh("trap '' TERM; sleep 60"), Vec::new(), OnSidecarDeath::Leave).unwrap();
        child.kill();
        assert_eq!(child.wait().await, 128 + 9);
    }

    #[tokio::test]
    async fn a_signal_is_forwarded() {
        let script = "trap 'exit 42' USR1; while :; do sleep 0.02; done";
        let mut child = Child::spawn(&sh(script), Vec::new(), OnSidecarDeath::Leave).unwrap();
        // Before the shell has set its trap, the signal kills it or is lost.
        let code = loop {
            child.forward(Signal::USR1);
            let limit = std::time::Duration::from_millis(20);
            if let Ok(code) = tokio::time::timeout(limit, child.wait()).await {
                break code;
            }
        };
        assert!(code == 42 || code == 128 + 10, "{code}");
    }

    #[test]
    fn a_program_is_searched_as_by_a_shell() {
        assert!(find_program(OsStr::new("sh")).is_ok());
        assert!(find_program(OsStr::new("/bin/sh")).is_ok());
        for (missing, kind) in [
            ("no-such-program-anywhere", ErrorKind::NotFound),
            ("/no/such", ErrorKind::NotFound),
            ("", ErrorKind::NotFound),
            ("/", ErrorKind::PermissionDenied),
        ] {
            let error = find_program(OsStr::new(missing)).unwrap_err();
            assert_eq!(error.kind(), kind, "{missing}");
        }
    }

    #[tokio::test]
    async fn the_variables_are_set() {
        let env = vec![("http_proxy", "http://127.0.0.1:4140".to_owned())];
        let mut child =
            Child::spawn(&sh("test \"$http_proxy\" = http://127.0.0.1:4140"), env, OnSidecarDeath::Leave)
                .unwrap();
        assert_eq!(child.wait().await, 0);
    }

    #[tokio::test]
    async fn a_failed_start_has_a_reason() {
        let error =
            Child::spawn(&["/no/such/command".into()], Vec::new(), OnSidecarDeath::Leave).unwrap_err();
        assert_eq!(error.exit_code(), 127);
        assert!(error.to_string().contains("no such command"), "{error}");
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = Child::spawn(&[file.path().into()], Vec::new(), OnSidecarDeath::Leave).unwrap_err();
        assert_eq!(error.exit_code(), 126);
        assert!(error.to_string().contains("not executable"), "{error}");
    }
}
