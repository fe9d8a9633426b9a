//! `outrigger reload`

use std::process::ExitCode;

use clap::Args;
use http::Method;

use super::admin_client::{AdminArgs, finish};
use crate::admin::{
    client::ClientError,
    reload::{self, ReloadRequest, Reloaded},
};

/// Have a running sidecar read its configuration again, and say what became of it.
///
/// Files are watched, so this is needed only where a change is held back: one that empties a file, or that protects the
/// service less. Exits with 1 where the files cannot be used or are held back; what runs goes on then.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger reload                          says what changed, or why nothing did
  outrigger reload --accept-less-security   applies a change that was held back")]
pub struct ReloadArgs {
    /// Apply the files although they protect the service less than what runs, or are empty
    #[arg(long)]
    accept_less_security: bool,
    #[command(flatten)]
    admin: AdminArgs,
}

pub fn run(args: &ReloadArgs) -> ExitCode {
    let client = args.admin.client();
    let request = ReloadRequest { accept_less_security: args.accept_less_security };
    finish(async move {
        let strange = |error: serde_json::Error| ClientError::Strange {
            address: client.address(),
            reason: error.to_string(),
        };
        let body = serde_json::to_string(&request).map_err(strange)?;
        let answer = client.change(Method::POST, reload::PATH, body).await?;
        let Reloaded { changed } = serde_json::from_slice(&answer).map_err(strange)?;
        match changed.as_slice() {
            [] => println!("{} has read its configuration again; nothing changed", client.address()),
            changed => println!("{} has applied changes of: {}", client.address(), changed.join(", ")),
        }
        Ok(())
    })
}
