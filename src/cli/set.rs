//! `outrigger set`: changes a running sidecar.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use http::Method;

use super::admin_client::{AdminArgs, finish};
use crate::{
    admin::{
        breaker::{self, WishedState},
        client::ClientError,
        upstreams::BreakerStatus,
    },
    telemetry::log::LogFilter,
    units::HumanDuration,
};

/// Change a running sidecar.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger set breaker payments open --for 10m
  outrigger set log debug
  outrigger set log warn,outrigger::upstream=debug")]
pub struct SetArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Debug)]
enum What {
    Breaker(SetBreakerArgs),
    Log(SetLogArgs),
}

/// Force an upstream's circuit breaker for a while, or let it decide again.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger set breaker payments open             nothing is sent there for an hour
  outrigger set breaker payments closed --for 5m  everything goes through, whatever it answers
  outrigger set breaker payments auto             the breaker decides again")]
struct SetBreakerArgs {
    /// The upstream, or HOST:PORT of one that no upstream names
    #[arg(value_parser = upstream_name)]
    name: String,
    /// What it is to be
    #[arg(value_enum)]
    state: WishedState,
    /// Until it falls back to auto, e.g. 90s, 10m, 1h [default: 1h]
    #[arg(long = "for", value_name = "DURATION")]
    duration: Option<HumanDuration>,
    #[command(flatten)]
    admin: AdminArgs,
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
    match args.what {
        What::Breaker(args) => finish(set_breaker(args)),
        What::Log(args) => finish(set_log(args)),
    }
}

async fn set_breaker(args: SetBreakerArgs) -> Result<(), ClientError> {
    let SetBreakerArgs { name, state, duration, admin } = args;
    let client = admin.client();
    let path = breaker::path(&name);
    let wish = breaker::Wish { state, duration };
    let answer = client.change(Method::POST, &path, wish.to_json()).await?;
    let strange = |error: serde_json::Error| ClientError::Strange {
        address: client.address(),
        reason: error.to_string(),
    };
    let now: BreakerStatus = serde_json::from_slice(&answer).map_err(strange)?;
    let end = now.until_in_seconds.map_or_else(String::new, |left| {
        format!(" for {}, then the breaker decides again", HumanDuration::from_secs(left))
    });
    println!("{name}: {}{end}", now.state.replace('_', " "));
    Ok(())
}

async fn set_log(args: SetLogArgs) -> Result<(), ClientError> {
    let SetLogArgs { filter, admin } = args;
    let client = admin.client();
    client.change(Method::PUT, "/log", filter.to_string()).await?;
    println!("{} logs {filter} from now on", client.address());
    Ok(())
}

/// What an upstream can be called; anything else could not stand in a path either.
fn upstream_name(text: &str) -> Result<String, String> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:[]".contains(&byte);
    if !text.is_empty() && text.bytes().all(fits) {
        Ok(text.to_owned())
    } else {
        Err("no upstream is called so; `outrigger status` lists them".to_owned())
    }
}
