//! `outrigger set`: changes a running sidecar.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use http::Method;

use super::admin_client::{AdminArgs, finish};
use crate::telemetry::log::LogFilter;

/// Change a running sidecar.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger set log debug
  outrigger set log warn,outrigger::upstream=debug")]
pub struct SetArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Debug)]
enum What {
    Log(SetLogArgs),
}

/// What is logged from now on.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger set log debug
  outrigger set log warn,outrigger::upstream=debug
  outrigger set log info --admin localhost:4291")]
struct SetLogArgs {
    /// A level (off, error, warn, info, debug, trace) or tracing-subscriber's filter syntax
    filter: LogFilter,
    #[command(flatten)]
    admin: AdminArgs,
}

pub fn run(args: SetArgs) -> ExitCode {
    let What::Log(SetLogArgs { filter, admin }) = args.what;
    let client = admin.client();
    finish(async move {
        client.change(Method::PUT, "/log", filter.to_string()).await?;
        println!("{} logs {filter} from now on", client.address());
        Ok(())
    })
}
