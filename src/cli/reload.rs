//! `outrigger reload`

use std::process::ExitCode;

use clap::Args;
use http::Method;

use super::admin_client::{AdminArgs, finish};
use crate::admin::{
    client::AdminClientError,
    reload::{self, ReloadRequest, ReloadResponse},
};

/// Reload the configuration of a running sidecar, and print the outcome.
///
/// Files are watched, so this is needed only where a change is held back: one that empties a file, or that protects the
/// service less. Exits with 1 if the files are rejected or held back; the last good configuration then stays in use.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger reload                          prints what changed, or why nothing did
  outrigger reload --accept-less-security   applies a change that was held back")]
pub struct ReloadArgs {
    /// Apply the files although they protect the service less than the running configuration, or are empty
    #[arg(long)]
    accept_less_security: bool,
    #[command(flatten)]
    admin: AdminArgs,
}

pub fn run(args: &ReloadArgs) -> ExitCode {
    let client = args.admin.client();
    let request = ReloadRequest { accept_less_security: args.accept_less_security };
    finish(async move {
        let unexpected = |error: serde_json::Error| AdminClientError::NotAdminServer {
            address: client.address(),
            reason: error.to_string(),
        };
        let body = serde_json::to_string(&request).map_err(unexpected)?;
        let response = client.change(Method::POST, reload::PATH, body).await?;
        let ReloadResponse { changed } = serde_json::from_slice(&response).map_err(unexpected)?;
        match changed.as_slice() {
            [] => println!("{} has reloaded its configuration; nothing changed", client.address()),
            changed => println!("{} has applied changes of: {}", client.address(), changed.join(", ")),
        }
        Ok(())
    })
}
