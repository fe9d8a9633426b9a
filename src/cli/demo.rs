//! `outrigger demo`: the product on one machine, nothing else installed.

mod http;
mod services;
mod sidecar;
mod stage;
mod story;
mod tour;

use std::process::ExitCode;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

/// Show it working: two small services with their sidecars, and what callers see when one of them fails.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger demo           a tour, then light traffic until Ctrl-C, with the admin page to look at
  outrigger demo --once    the tour alone; exit 0 only if all that it shows happened
  outrigger demo --otlp http://127.0.0.1:4317    the same, and traces of all requests in Jaeger")]
pub struct DemoArgs {
    /// End after the tour
    #[arg(long)]
    once: bool,
    /// Send traces of all requests to this collector, e.g. a Jaeger started beside it
    #[arg(long, value_name = "URL", env = "OTEL_EXPORTER_OTLP_ENDPOINT")]
    otlp: Option<String>,
}

pub fn run(args: &DemoArgs) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("outrigger: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(until_interrupted(args.once, args.otlp.as_deref())) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("outrigger: the demo could not go on: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all that was shown happened.
async fn until_interrupted(once: bool, otlp: Option<&str>) -> Result<bool, DemoError> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        outcome = tour::tour(once, otlp) => outcome,
        _ = interrupt.recv() => Ok(!once),
        _ = terminate.recv() => Ok(!once),
    }
}

/// What keeps the demo itself from going on.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error("a call failed: {0}")]
    Call(#[from] hyper::Error),
    #[error("a request could not be built: {0}")]
    Request(#[from] ::http::Error),
    #[error("no answer to a call within {0:?}")]
    NoAnswer(std::time::Duration),
    #[error(transparent)]
    Certificates(#[from] crate::identity::issue::IssueError),
    #[error("{name}'s sidecar {what}; its log:\n{log}")]
    Sidecar { name: &'static str, what: String, log: String },
}
