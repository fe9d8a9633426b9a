//! `outrigger exec-service`: started by `run -- CMD`. It asks the kernel to kill it when its parent is killed, then
//! execs CMD in the same process, so that signals and exit code are CMD's.

use std::{ffi::OsString, os::unix::process::CommandExt, process::Command, process::ExitCode};

use clap::Args;
use rustix::process::{Pid, getppid};

use crate::{platform, runtime::child::SpawnError};

/// Exec the service of `outrigger run -- CMD`.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger exec-service --parent 1 -- node server.js    what `outrigger run -- node server.js` does by itself")]
pub struct ExecServiceArgs {
    /// Process ID of the parent, with which it ends
    #[arg(long, value_name = "PID")]
    parent: u32,
    /// The service, with its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

pub fn run(args: &ExecServiceArgs) -> ExitCode {
    if !end_with(args.parent) {
        eprintln!("outrigger: parent process {} has ended, so the service is not started", args.parent);
        return ExitCode::FAILURE;
    }
    let program = args.command.first().cloned().unwrap_or_default();
    let error = Command::new(&program).args(args.command.get(1..).unwrap_or_default()).exec();
    let error = SpawnError::new(program, error);
    eprintln!("outrigger: {error}");
    ExitCode::from(error.exit_code())
}

/// Has this process killed when its parent is killed; false if the parent has ended already.
fn end_with(parent: u32) -> bool {
    if let Err(error) = platform::end_with_parent() {
        eprintln!("outrigger: the service keeps running if its sidecar is killed: {error}");
    }
    getppid().map(Pid::as_raw_pid).and_then(|pid| u32::try_from(pid).ok()) == Some(parent)
}
