//! `outrigger queue`: what is stored for delivery, of a running sidecar or offline.

mod offline;
mod online;
mod print;

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use clap::{Args, Subcommand};

use super::admin_client::{AdminArgs, run_to_end};
use crate::{
    admin::{
        client::AdminClientError,
        deliveries::{DeliveryFilter, Rate},
    },
    queue::{DeliveryId, store::StoreError},
    resilience::queue::DeadReason,
    units::HumanDuration,
};

/// Show and change queued deliveries, of a running sidecar or of a store that no process uses.
///
/// Without --store the sidecar is asked by its admin address, with the admin token. With --store the store is locked while
/// the command runs, and the command fails while a sidecar runs on it.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger queue ls --dead
  outrigger queue show 01JE2V7Q8S3W6Z0000000000A1 --admin localhost:4291
  outrigger queue replay --all --reason attempts --rate 10/s
  outrigger queue pause orders
  outrigger queue ls --dead --store /var/lib/outrigger")]
pub struct QueueArgs {
    #[command(subcommand)]
    command: QueueCommand,
}

#[derive(Subcommand, Debug)]
enum QueueCommand {
    Ls(LsArgs),
    Show(ShowArgs),
    Replay(ReplayArgs),
    Drop(DropArgs),
    Pause(PauseArgs),
    Resume(ResumeArgs),
}

/// Where the deliveries are.
#[derive(Args, Debug)]
struct SourceArgs {
    /// The directory of a store that no process uses, `path` of `[store]`, in place of a running sidecar
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
    #[command(flatten)]
    admin: AdminArgs,
}

#[derive(Args, Debug)]
struct FilterArgs {
    /// Only of this queue
    #[arg(long, value_name = "NAME", value_parser = queue_name)]
    queue: Option<String>,
    /// Only dead letters for this reason: permanent, attempts, expired, ambiguous, poison, operator
    #[arg(long, value_parser = dead_reason)]
    reason: Option<DeadReason>,
    /// Only what was accepted longer ago, e.g. 30m, 2d
    #[arg(long, value_name = "DURATION")]
    older: Option<HumanDuration>,
}

/// List deliveries, oldest first.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger queue ls
  outrigger queue ls --dead --older 1d --store /var/lib/outrigger
  outrigger queue ls --json | jq .id")]
struct LsArgs {
    /// Only dead letters
    #[arg(long)]
    dead: bool,
    #[command(flatten)]
    filter: FilterArgs,
    /// Print one JSON object a line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    source: SourceArgs,
}

/// Show one delivery: its state, its request, its last response. Credentials are hidden, bodies too without --body.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger queue show 01JE2V7Q8S3W6Z0000000000A1 --body
  outrigger queue show 01JE2V7Q8S3W6Z0000000000A1 --store /var/lib/outrigger --key-file /run/secrets/k")]
struct ShowArgs {
    id: DeliveryId,
    /// Print the bodies of request and response
    #[arg(long)]
    body: bool,
    /// With --store: the key of an encrypted store, `key_file` of `[store]`
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    #[command(flatten)]
    source: SourceArgs,
}

/// Queue dead letters again, with all their attempts before them. With --store they are delivered when a sidecar runs.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger queue replay 01JE2V7Q8S3W6Z0000000000A1
  outrigger queue replay --all --queue orders --rate 10/s")]
struct ReplayArgs {
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    id: Vec<DeliveryId>,
    /// All dead letters that pass --queue, --reason and --older
    #[arg(long)]
    all: bool,
    /// So many become due in a second, e.g. 10/s; default: all at once
    #[arg(long, value_name = "N/s")]
    rate: Option<Rate>,
    #[command(flatten)]
    filter: FilterArgs,
    #[command(flatten)]
    source: SourceArgs,
}

/// Give up a delivery. One that is still to be delivered becomes a dead letter (reason: operator); any other is deleted.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger queue drop 01JE2V7Q8S3W6Z0000000000A1")]
struct DropArgs {
    #[arg(required = true)]
    id: Vec<DeliveryId>,
    #[command(flatten)]
    source: SourceArgs,
}

/// Stop the deliveries of a queue, which goes on accepting. It holds until `resume`, also across restarts.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger queue pause orders")]
struct PauseArgs {
    /// The `[[queue]]`
    #[arg(value_parser = queue_name)]
    name: String,
    #[command(flatten)]
    source: SourceArgs,
}

/// Let the deliveries of a queue go on after `pause`.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger queue resume orders")]
struct ResumeArgs {
    /// The `[[queue]]`
    #[arg(value_parser = queue_name)]
    name: String,
    #[command(flatten)]
    source: SourceArgs,
}

fn dead_reason(text: &str) -> Result<DeadReason, String> {
    DeadReason::from_word(text).ok_or_else(|| {
        format!("`{text}` is no reason: write one of {}", DeadReason::ALL.map(DeadReason::word).join(", "))
    })
}

/// It becomes a segment of a path.
fn queue_name(text: &str) -> Result<String, String> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if !text.is_empty() && text.bytes().all(fits) {
        Ok(text.to_owned())
    } else {
        Err("not the name of a queue; `outrigger status` lists the queues".to_owned())
    }
}

impl FilterArgs {
    fn filter(&self, dead: bool) -> DeliveryFilter {
        DeliveryFilter {
            queue: self.queue.clone(),
            state: (dead || self.reason.is_some()).then(|| "dead".to_owned()),
            reason: self.reason.map(|reason| reason.word().to_owned()),
            older: self.older,
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum QueueError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("{id}: {error}")]
    Delivery { id: DeliveryId, error: StoreError },
    #[error(transparent)]
    Admin(#[from] AdminClientError),
    #[error("cannot write: {0}")]
    Output(#[from] io::Error),
}

pub fn run(args: &QueueArgs) -> ExitCode {
    run_to_end(async {
        let mut out = io::stdout().lock();
        let done = match &args.command {
            QueueCommand::Ls(args) => list(args, &mut out).await,
            QueueCommand::Show(args) => show(args, &mut out).await,
            QueueCommand::Replay(args) => replay(args, &mut out).await,
            QueueCommand::Drop(args) => drop_deliveries(args, &mut out).await,
            QueueCommand::Pause(PauseArgs { name, source }) => pause(name, true, source, &mut out).await,
            QueueCommand::Resume(ResumeArgs { name, source }) => pause(name, false, source, &mut out).await,
        };
        match done.and_then(|()| Ok(out.flush()?)) {
            // `| head`
            Err(QueueError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            done => done,
        }
    })
}

async fn list(args: &LsArgs, out: &mut impl Write) -> Result<(), QueueError> {
    if !args.json {
        print::heading(out)?;
    }
    let mut written = Ok(());
    let mut each = |delivery| {
        written = print::row(out, &delivery, args.json);
        written.is_ok()
    };
    let filter = args.filter.filter(args.dead);
    match &args.source.store {
        Some(path) => offline::list(path, &filter, &mut each)?,
        None => online::list(&args.source.admin.client(), &filter, &mut each).await?,
    }
    Ok(written?)
}

async fn show(args: &ShowArgs, out: &mut impl Write) -> Result<(), QueueError> {
    let delivery = match &args.source.store {
        Some(path) => offline::show(path, args.key_file.as_deref(), args.id, args.body)?,
        None => online::show(&args.source.admin.client(), args.id, args.body).await?,
    };
    Ok(print::detail(out, &delivery)?)
}

async fn replay(args: &ReplayArgs, out: &mut impl Write) -> Result<(), QueueError> {
    let filter = args.filter.filter(true);
    let replayed = match &args.source.store {
        Some(path) => {
            let all = args.all.then_some(&filter);
            offline::replay(path, &args.id, all, args.rate)?
        }
        None => online::replay(&args.source.admin.client(), args, filter).await?,
    };
    Ok(writeln!(out, "{replayed} queued again")?)
}

async fn drop_deliveries(args: &DropArgs, out: &mut impl Write) -> Result<(), QueueError> {
    let dropped = match &args.source.store {
        Some(path) => offline::drop_deliveries(path, &args.id)?,
        None => online::drop_deliveries(&args.source.admin.client(), &args.id).await?,
    };
    for delivery in dropped {
        let now = if delivery.is_dead_letter { "a dead letter now" } else { "deleted" };
        writeln!(out, "{}: was {}, {now}", delivery.id, delivery.was)?;
    }
    Ok(())
}

async fn pause(
    name: &str,
    is_paused: bool,
    source: &SourceArgs,
    out: &mut impl Write,
) -> Result<(), QueueError> {
    match &source.store {
        Some(path) => offline::pause(path, name, is_paused)?,
        None => online::pause(&source.admin.client(), name, is_paused).await?,
    }
    let now = if is_paused { "paused: it accepts, and delivers nothing until `resume`" } else { "resumed" };
    Ok(writeln!(out, "{name}: {now}")?)
}
