//! `outrigger set`: changes settings of a running sidecar.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use http::Method;

use super::admin_client::{AdminArgs, finish};
use crate::{
    admin::{
        breaker::{self, OverrideState},
        client::AdminClientError,
        split::{self, SplitOverride, SplitStatus},
        upstreams::BreakerStatus,
    },
    telemetry::log::LogFilter,
    units::HumanDuration,
};

/// Change settings of a running sidecar.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger set breaker payments open --for 10m
  outrigger set split shop/orders 10
  outrigger set log debug
  outrigger set log warn,outrigger::upstream=debug")]
pub struct SetArgs {
    #[command(subcommand)]
    setting: Setting,
}

#[derive(Subcommand, Debug)]
enum Setting {
    Breaker(SetBreakerArgs),
    Split(SetSplitArgs),
    Log(SetLogArgs),
}

/// Force an upstream's circuit breaker open or closed for a while, or return it to auto.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger set breaker payments open             sends no requests there for an hour
  outrigger set breaker payments closed --for 5m  sends all requests, even while they fail
  outrigger set breaker payments auto             lets the breaker decide again")]
struct SetBreakerArgs {
    /// The upstream, or HOST:PORT of an unknown host
    #[arg(value_parser = upstream_name)]
    name: String,
    /// The state to force, or auto
    #[arg(value_enum)]
    state: OverrideState,
    /// Time until it falls back to auto, e.g. 90s, 10m, 1h [default: 1h]
    #[arg(long = "for", value_name = "DURATION")]
    duration: Option<HumanDuration>,
    #[command(flatten)]
    admin: AdminArgs,
}

/// Change how many requests of a route go to the last upstream of its `to`.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger set split shop/orders 10     10 % to the last upstream, the rest to the others
  outrigger set split shop/orders 0      none: back to what served before
  outrigger set split shop/orders auto   the weights of the configuration again

It lasts until the weights in the configuration change or the sidecar restarts.")]
struct SetSplitArgs {
    /// The upstream and the `name` of its route
    #[arg(value_name = "UPSTREAM/ROUTE", value_parser = route_name)]
    route: RouteName,
    /// Percent, 0 to 100, or auto
    #[arg(value_parser = percent)]
    share: SplitOverride,
    #[command(flatten)]
    admin: AdminArgs,
}

#[derive(Clone, Debug)]
struct RouteName {
    upstream: String,
    route: String,
}

/// Change the log filter.
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
    match args.setting {
        Setting::Breaker(args) => finish(set_breaker(args)),
        Setting::Split(args) => finish(set_split(args)),
        Setting::Log(args) => finish(set_log(args)),
    }
}

async fn set_breaker(args: SetBreakerArgs) -> Result<(), AdminClientError> {
    let SetBreakerArgs { name, state, duration, admin } = args;
    let client = admin.client();
    let path = breaker::path(&name);
    let request = breaker::BreakerOverride { state, duration };
    let response = client.change(Method::POST, &path, request.to_json()).await?;
    let unexpected = |error: serde_json::Error| AdminClientError::NotAdminServer {
        address: client.address(),
        reason: error.to_string(),
    };
    let now: BreakerStatus = serde_json::from_slice(&response).map_err(unexpected)?;
    let expiry = now.until_in_seconds.map_or_else(String::new, |left| {
        format!(" for {}, then the breaker decides again", HumanDuration::from_secs(left))
    });
    println!("{name}: {}{expiry}", now.state.replace('_', " "));
    Ok(())
}

async fn set_split(args: SetSplitArgs) -> Result<(), AdminClientError> {
    let SetSplitArgs { route: RouteName { upstream, route }, share, admin } = args;
    let client = admin.client();
    let response = client.change(Method::POST, &split::path(&upstream, &route), share.to_json()).await?;
    let unexpected = |error: serde_json::Error| AdminClientError::NotAdminServer {
        address: client.address(),
        reason: error.to_string(),
    };
    let now: SplitStatus = serde_json::from_slice(&response).map_err(unexpected)?;
    println!("{upstream}/{route}: {}", now.shares());
    Ok(())
}

async fn set_log(args: SetLogArgs) -> Result<(), AdminClientError> {
    let SetLogArgs { filter, admin } = args;
    let client = admin.client();
    client.change(Method::PUT, "/log", filter.to_string()).await?;
    println!("{}: log filter is now {filter}", client.address());
    Ok(())
}

/// UPSTREAM/ROUTE.
fn route_name(text: &str) -> Result<RouteName, String> {
    let (upstream, route) = text.split_once('/').ok_or_else(|| {
        format!("write UPSTREAM/ROUTE, e.g. {text}/orders, where the route has `name = \"orders\"`")
    })?;
    Ok(RouteName {
        upstream: upstream_name(upstream)?,
        route: upstream_name(route).map_err(|_| "not a valid route name".to_owned())?,
    })
}

/// A percentage, or `auto`.
fn percent(text: &str) -> Result<SplitOverride, String> {
    if text == "auto" {
        return Ok(SplitOverride { percent: None });
    }
    let number = text.strip_suffix('%').unwrap_or(text).parse().ok().filter(|percent| *percent <= 100);
    let percent = number.ok_or_else(|| "write a whole number from 0 to 100, or auto".to_owned())?;
    Ok(SplitOverride { percent: Some(percent) })
}

/// Validates an upstream's name, which becomes a path segment.
fn upstream_name(text: &str) -> Result<String, String> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:[]".contains(&byte);
    if !text.is_empty() && text.bytes().all(fits) {
        Ok(text.to_owned())
    } else {
        Err("not a valid upstream name; `outrigger status` lists the upstreams".to_owned())
    }
}
