//! `outrigger drain`

use std::process::ExitCode;

use clap::Args;
use http::Method;

use super::admin_client::{AdminArgs, finish};

/// Let a running sidecar finish its inbound calls; it stays until SIGTERM.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger drain                                  as a preStop hook: callers hear that this one leaves
  outrigger drain --admin unix:/run/outrigger/admin.sock")]
pub struct DrainArgs {
    #[command(flatten)]
    admin: AdminArgs,
}

pub fn run(args: &DrainArgs) -> ExitCode {
    let client = args.admin.client();
    finish(async move {
        client.change(Method::POST, "/drain", String::new()).await?;
        println!("{} drains its inbound calls; `outrigger status` shows how far it is", client.address());
        Ok(())
    })
}
