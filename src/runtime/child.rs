//! The service that `run -- CMD` starts and outlives.
//!
//! Its end is collected by our own `waitpid`, not by a runtime's: as PID 1 of a container we are the parent of every
//! orphan too, and must collect those without taking the service's status from anybody.

use std::{
    ffi::OsString,
    io::{self, ErrorKind, IsTerminal},
    os::unix::process::CommandExt,
    process::Command,
};

use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

use crate::descriptors;

/// A running service.
#[derive(Debug)]
pub struct Child {
    pid: Pid,
    /// It leads a process group of its own, so that all it started can be ended with it.
    leads_group: bool,
    ended: watch::Receiver<Option<u8>>,
}

/// Why the service could not be started.
#[derive(Debug, thiserror::Error)]
#[error("{}: {}", program.to_string_lossy(), explain(source))]
pub struct SpawnError {
    program: OsString,
    source: io::Error,
}

fn explain(error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::NotFound => {
            "no such command (nor the interpreter that its first line may name)".to_owned()
        }
        ErrorKind::PermissionDenied => "not executable".to_owned(),
        _ => error.to_string(),
    }
}

impl SpawnError {
    /// What a shell would exit with: 127 not found, 126 found but not to be run.
    pub fn exit_code(&self) -> u8 {
        if self.source.kind() == ErrorKind::NotFound { 127 } else { 126 }
    }
}

impl Child {
    /// Starts `command` with `env` added to ours. Needs a tokio runtime.
    ///
    /// On a terminal it shares our process group, so that it can read from the terminal and Ctrl-C reaches it as it
    /// would without us. Else it leads a group of its own.
    pub fn spawn(command: &[OsString], env: Vec<(&'static str, String)>) -> Result<Self, SpawnError> {
        let program = command.first().cloned().unwrap_or_default();
        let failed = |source| SpawnError { program: program.clone(), source };
        let leads_group = !io::stdin().is_terminal();
        let mut command = {
            let arguments = command.get(1..).unwrap_or_default();
            let mut built = Command::new(&program);
            built.args(arguments).envs(env);
            built
        };
        if leads_group {
            command.process_group(0);
        }
        // Listening comes first: a service that ends at once must not be missed.
        let mut signals = signal(SignalKind::child()).map_err(failed)?;
        let child = descriptors::with_inherited_limit(|| command.spawn()).map_err(failed)?;
        let pid = Pid::from_child(&child);
        let (tell, ended) = watch::channel(None);
        tokio::spawn(async move {
            let orphans_too = std::process::id() == 1;
            while tell.borrow().is_none() || orphans_too {
                if let Some(code) = reap(pid, orphans_too) {
                    tell.send_replace(Some(code));
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

    /// Waits for its end: its exit code, or 128 + the signal that ended it. May be cancelled, and asked again.
    pub async fn ended(&mut self) -> u8 {
        match self.ended.wait_for(Option::is_some).await.map(|code| *code) {
            Ok(code) => code.unwrap_or(1),
            Err(_) => 1,
        }
    }

    /// Asks it to end.
    pub fn terminate(&self) {
        self.signal(|pid| rustix::process::kill_process(pid, Signal::TERM));
    }

    /// Ends it, and all that it started where that is known.
    pub fn kill(&self) {
        if self.leads_group {
            self.signal(|pid| rustix::process::kill_process_group(pid, Signal::KILL));
        } else {
            self.signal(|pid| rustix::process::kill_process(pid, Signal::KILL));
        }
    }

    fn signal(&self, send: impl Fn(Pid) -> rustix::io::Result<()>) {
        // Once collected, the number may belong to somebody else.
        if self.ended.borrow().is_none()
            && let Err(error) = send(self.pid)
        {
            tracing::debug!(%error, pid = self.pid(), "could not signal the service");
        }
    }
}

/// Collects what has ended; the service's exit code where it was among them.
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
    async fn its_exit_code_is_told() {
        let mut child = Child::spawn(&sh("exit 7"), Vec::new()).unwrap();
        assert_eq!(child.ended().await, 7);
        assert_eq!(child.ended().await, 7, "and can be asked again");
        child.terminate(); // harmless by now
    }

    #[tokio::test]
    async fn a_signal_is_128_and_its_number() {
        let mut child = Child::spawn(&sh("exec sleep 60"), Vec::new()).unwrap();
        child.terminate();
        assert_eq!(child.ended().await, 128 + 15);
        let mut child = Child::spawn(&sh("trap '' TERM; sleep 60"), Vec::new()).unwrap();
        child.kill();
        assert_eq!(child.ended().await, 128 + 9);
    }

    #[tokio::test]
    async fn it_sees_the_variables() {
        let env = vec![("http_proxy", "http://127.0.0.1:4140".to_owned())];
        let mut child = Child::spawn(&sh("test \"$http_proxy\" = http://127.0.0.1:4140"), env).unwrap();
        assert_eq!(child.ended().await, 0);
    }

    #[tokio::test]
    async fn what_cannot_be_started_says_why() {
        let error = Child::spawn(&["/no/such/command".into()], Vec::new()).unwrap_err();
        assert_eq!(error.exit_code(), 127);
        assert!(error.to_string().contains("no such command"), "{error}");
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = Child::spawn(&[file.path().into()], Vec::new()).unwrap_err();
        assert_eq!(error.exit_code(), 126);
        assert!(error.to_string().contains("not executable"), "{error}");
    }
}
