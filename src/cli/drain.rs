//! `outrigger drain`

use std::process::ExitCode;

use clap::Args;
use http::Method;

use super::admin_client::{AdminArgs, finish};

/// Drain the inbound requests of a running sidecar; the process stays until SIGTERM.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger drain                                  as a preStop hook: clients get `Connection: close`
  outrigger drain --admin unix:/run/outrigger/admin.sock")]
pub struct DrainArgs {
    #[command(flatten)]
    admin: AdminArgs,
}

pub fn run(args: &DrainArgs) -> ExitCode {
    let client = args.admin.client();
    finish(async move {
        client.change(Method::POST, "/drain", String::new()).await?;
        println!(
            "{} is draining its inbound requests; `outrigger status` shows the progress",
            client.address()
        );
        Ok(())
    })
}
