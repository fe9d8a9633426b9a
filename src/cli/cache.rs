//! `outrigger cache`: the stored responses of a running sidecar.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use http::Method;

use super::admin_client::{AdminArgs, finish};
use crate::admin::{
    cache::{CacheList, LIST_PATH, PURGE_PATH, PurgeRequest, Purged},
    client::AdminClientError,
};

/// List or purge the stored responses of a running sidecar.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger cache ls
  outrigger cache purge 'http://catalogue/items/*'
  outrigger cache purge --all")]
pub struct CacheArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand, Debug)]
enum Action {
    Ls(ListArgs),
    Purge(PurgeArgs),
}

/// List what is stored: URL, status, size, age, and the freshness that is left.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger cache ls
  outrigger cache ls --json")]
struct ListArgs {
    /// Write the list as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    admin: AdminArgs,
}

/// Remove stored responses, of every upstream and identity.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger cache purge http://catalogue/items/7
  outrigger cache purge 'http://catalogue/items/*'
  outrigger cache purge --all")]
struct PurgeArgs {
    /// The URL; one that ends in `*` is a prefix
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    url: Option<String>,
    /// Remove everything
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    admin: AdminArgs,
}

pub fn run(args: CacheArgs) -> ExitCode {
    match args.action {
        Action::Ls(args) => finish(list(args)),
        Action::Purge(args) => finish(purge(args)),
    }
}

async fn list(ListArgs { json, admin }: ListArgs) -> Result<(), AdminClientError> {
    let client = admin.client();
    let response = client.get_protected(LIST_PATH).await?;
    if json {
        print!("{}", String::from_utf8_lossy(&response));
        return Ok(());
    }
    let list: CacheList = serde_json::from_slice(&response).map_err(|error| {
        AdminClientError::NotAdminServer { address: client.address(), reason: error.to_string() }
    })?;
    println!("{:>9} {:>6} {:>8} {:>8}  URL", "BYTES", "STATUS", "AGE", "TTL");
    for one in list.responses {
        let more = one.identity.map_or_else(String::new, |identity| format!("  for {identity}"));
        println!(
            "{:>9} {:>6} {:>7}s {:>7}s  {}{more}",
            one.bytes, one.status, one.age_seconds, one.ttl_seconds, one.url
        );
    }
    Ok(())
}

async fn purge(PurgeArgs { url, all, admin }: PurgeArgs) -> Result<(), AdminClientError> {
    let client = admin.client();
    let request = serde_json::to_string(&PurgeRequest { url, all }).unwrap_or_default();
    let response = client.change(Method::POST, PURGE_PATH, request).await?;
    let Purged { purged } = serde_json::from_slice(&response).map_err(|error| {
        AdminClientError::NotAdminServer { address: client.address(), reason: error.to_string() }
    })?;
    println!("{purged} responses purged");
    Ok(())
}
