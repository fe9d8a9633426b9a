//! `outrigger demo`: the product on one machine, with nothing else installed.

mod http;
mod services;
mod sidecar;
mod stage;
mod story;
mod tour;

use std::process::ExitCode;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

/// Demonstrate the proxy: two small services with their sidecars, and what clients see when one service fails.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger demo           a tour, then light traffic and the admin page until Ctrl-C
  outrigger demo --once    only the tour; exit 0 only if every check of it passed
  outrigger demo --otlp http://127.0.0.1:4317    the same, and traces of all requests in Jaeger")]
pub struct DemoArgs {
    /// Exit after the tour
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
            eprintln!("outrigger: the demo failed: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Returns whether all checks passed.
async fn until_interrupted(once: bool, otlp: Option<&str>) -> Result<bool, DemoError> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        outcome = tour::tour(once, otlp) => outcome,
        _ = interrupt.recv() => Ok(!once),
        _ = terminate.recv() => Ok(!once),
    }
}

/// Why the demo itself cannot continue.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error("a request failed: {0}")]
    Http(#[from] hyper::Error),
    #[error("a request could not be built: {0}")]
    Request(#[from] ::http::Error),
    #[error("no response to a request within {0:?}")]
    NoResponse(std::time::Duration),
    #[error(transparent)]
    Certificates(#[from] crate::identity::issue::IssueError),
    #[error("{name}'s sidecar {what}; its log:\n{log}")]
    Sidecar { name: &'static str, what: String, log: String },
}
