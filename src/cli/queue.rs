//! `outrigger queue`: what is stored for delivery, offline.

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
    str::FromStr,
    time::{Duration, SystemTime},
};

use clap::{Args, Subcommand};
use http::HeaderMap;
use serde_json::json;

use crate::{
    queue::{
        DeliveryId, StoredRequest,
        store::{DeliveryState, Filter, StoreError, Summary, offline::OfflineStore},
    },
    redact::{REDACTED, Secret, is_credential_name},
    resilience::queue::DeadReason,
    telemetry::timestamp::Timestamp,
    units::HumanDuration,
    unix_time::UnixMillis,
};

/// Show and change the deliveries of a store that no process uses.
///
/// The store is locked while a command runs, and the command fails while a sidecar runs on it: stop the sidecar first.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger queue ls --store /var/lib/outrigger --dead
  outrigger queue show 01JE2V7Q8S3W6Z0000000000A1 --store /var/lib/outrigger
  outrigger queue replay --all --reason attempts --rate 10/s --store /var/lib/outrigger")]
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
}

#[derive(Args, Debug)]
struct StoreArgs {
    /// The directory of the store: `path` of `[store]`
    #[arg(long, value_name = "DIR")]
    store: PathBuf,
}

#[derive(Args, Debug)]
struct FilterArgs {
    /// Only of this queue
    #[arg(long, value_name = "NAME")]
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
  outrigger queue ls --store /var/lib/outrigger
  outrigger queue ls --store /var/lib/outrigger --dead --older 1d
  outrigger queue ls --store /var/lib/outrigger --json | jq .id")]
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
    store: StoreArgs,
}

/// Show one delivery: its state, its request, its last response. Credentials are hidden, bodies too without --body.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger queue show 01JE2V7Q8S3W6Z0000000000A1 --store /var/lib/outrigger
  outrigger queue show 01JE2V7Q8S3W6Z0000000000A1 --store /var/lib/outrigger --body --key-file /run/secrets/k")]
struct ShowArgs {
    id: DeliveryId,
    /// Print the bodies of request and response
    #[arg(long)]
    body: bool,
    /// The key of an encrypted store: `key_file` of `[store]`
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    #[command(flatten)]
    store: StoreArgs,
}

/// Queue dead letters again, with all their attempts before them. They are delivered when a sidecar runs.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger queue replay 01JE2V7Q8S3W6Z0000000000A1 --store /var/lib/outrigger
  outrigger queue replay --all --queue orders --rate 10/s --store /var/lib/outrigger")]
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
    store: StoreArgs,
}

/// Give up a delivery. One that is still to be delivered becomes a dead letter (reason: operator); any other is deleted.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger queue drop 01JE2V7Q8S3W6Z0000000000A1 --store /var/lib/outrigger")]
struct DropArgs {
    #[arg(required = true)]
    id: Vec<DeliveryId>,
    #[command(flatten)]
    store: StoreArgs,
}

/// `N/s`: the time between two.
#[derive(Clone, Copy, Debug)]
struct Rate(Duration);

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.strip_suffix("/s").unwrap_or(text).trim().parse::<f64>();
        match number {
            Ok(number) if number >= 0.001 && number.is_finite() => {
                Ok(Self(Duration::from_secs_f64(1.0 / number)))
            }
            _ => Err(format!("`{text}` is not a rate: write e.g. 10/s")),
        }
    }
}

fn dead_reason(text: &str) -> Result<DeadReason, String> {
    DeadReason::from_word(text).ok_or_else(|| {
        format!("`{text}` is no reason: write one of {}", DeadReason::ALL.map(DeadReason::word).join(", "))
    })
}

impl FilterArgs {
    fn filter(&self, dead: bool) -> Filter {
        Filter {
            queue: self.queue.clone(),
            state: (dead || self.reason.is_some()).then_some(DeliveryState::Dead),
            reason: self.reason,
            accepted_before: self.older.map(|age| UnixMillis::now().before(age.0)),
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum QueueError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("{id}: {error}")]
    Delivery { id: DeliveryId, error: StoreError },
    #[error("cannot write: {0}")]
    Output(#[from] io::Error),
}

pub fn run(args: &QueueArgs) -> ExitCode {
    let mut out = io::stdout().lock();
    let done = match &args.command {
        QueueCommand::Ls(args) => list(args, &mut out),
        QueueCommand::Show(args) => show(args, &mut out),
        QueueCommand::Replay(args) => replay(args, &mut out),
        QueueCommand::Drop(args) => drop_deliveries(args, &mut out),
    };
    match done.and_then(|()| Ok(out.flush()?)) {
        Ok(()) => ExitCode::SUCCESS,
        // `| head`
        Err(QueueError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("outrigger: {error}");
            ExitCode::FAILURE
        }
    }
}

fn list(args: &LsArgs, out: &mut impl Write) -> Result<(), QueueError> {
    let store = OfflineStore::open(&args.store.store, None)?;
    let now = UnixMillis::now();
    if !args.json {
        writeln!(
            out,
            "{:26}  {:16} {:9} {:10} {:>8} {:>8} {:>9}  LAST",
            "ID", "QUEUE", "STATE", "REASON", "ATTEMPTS", "AGE", "BYTES"
        )?;
    }
    let mut written = Ok(());
    store.list(&args.filter.filter(args.dead), |delivery| {
        written = if args.json {
            writeln!(out, "{}", to_json(&delivery))
        } else {
            writeln!(
                out,
                "{:26}  {:16} {:9} {:10} {:>8} {:>8} {:>9}  {}",
                delivery.id,
                delivery.queue,
                delivery.state.word(),
                delivery.reason.map_or("-", DeadReason::word),
                delivery.attempts,
                age(now, delivery.accepted),
                delivery.bytes,
                last_outcome(&delivery)
            )
        };
        written.is_ok()
    })?;
    Ok(written?)
}

fn show(args: &ShowArgs, out: &mut impl Write) -> Result<(), QueueError> {
    let store = OfflineStore::open(&args.store.store, args.key_file.as_deref())?;
    let of_delivery = |error| QueueError::Delivery { id: args.id, error };
    let delivery = store.find(args.id).map_err(of_delivery)?;
    writeln!(out, "id          {}", delivery.id)?;
    writeln!(out, "queue       {}", delivery.queue)?;
    let reason = delivery.reason.map_or_else(String::new, |reason| format!(" ({})", reason.word()));
    writeln!(out, "state       {}{reason}", delivery.state.word())?;
    writeln!(out, "attempts    {}", delivery.attempts)?;
    writeln!(out, "last        {}", last_outcome(&delivery))?;
    writeln!(out, "accepted    {}", rfc3339(delivery.accepted))?;
    for (name, time) in [("next", delivery.next), ("ended", delivery.ended)] {
        if let Some(time) = time {
            writeln!(out, "{name:11} {}", rfc3339(time))?;
        }
    }
    writeln!(out, "client      {}", if delivery.identity.is_empty() { "-" } else { &delivery.identity })?;
    for (name, value) in [("key", &delivery.idempotency_key), ("order", &delivery.order_key)] {
        if let Some(value) = value {
            writeln!(out, "{name:11} {value}")?;
        }
    }
    let (request, body) = store.content(args.id).map_err(of_delivery)?;
    write_request(&request, out)?;
    write_body(args.body, &body, out)?;
    if let Some(outcome) =
        store.outcome(args.id).map_err(of_delivery)?.filter(|outcome| outcome.status.is_some())
    {
        writeln!(out, "\nresponse {}", outcome.status.unwrap_or_default())?;
        write_body(args.body, &outcome.body, out)?;
    }
    Ok(())
}

fn write_request(request: &StoredRequest, out: &mut impl Write) -> io::Result<()> {
    let uri = Secret::redact_url(request.uri.to_string());
    writeln!(out, "\n{} request\n{} {uri}", request.direction.word(), request.method)?;
    write_fields(&request.headers, out)
}

fn write_fields(fields: &HeaderMap, out: &mut impl Write) -> io::Result<()> {
    for (name, value) in fields {
        let hidden = is_credential_name(name.as_str());
        let value = if hidden { REDACTED.into() } else { String::from_utf8_lossy(value.as_bytes()) };
        writeln!(out, "{name}: {value}")?;
    }
    Ok(())
}

fn write_body(shown: bool, body: &[u8], out: &mut impl Write) -> io::Result<()> {
    if shown && !body.is_empty() {
        writeln!(out)?;
        out.write_all(body)?;
        writeln!(out)
    } else {
        writeln!(out, "({} bytes of body)", body.len())
    }
}

fn replay(args: &ReplayArgs, out: &mut impl Write) -> Result<(), QueueError> {
    let mut store = OfflineStore::open(&args.store.store, None)?;
    let mut ids = args.id.clone();
    if args.all {
        store.list(&args.filter.filter(true), |delivery| {
            ids.push(delivery.id);
            true
        })?;
    }
    let spacing = args.rate.map_or(Duration::ZERO, |rate| rate.0);
    for id in &args.id {
        let delivery = store.find(*id).map_err(|error| QueueError::Delivery { id: *id, error })?;
        if delivery.state != DeliveryState::Dead {
            let error = StoreError::WrongState(delivery.state.word());
            return Err(QueueError::Delivery { id: *id, error });
        }
    }
    store.replay(&ids, spacing)?;
    Ok(writeln!(out, "{} queued again", ids.len())?)
}

fn drop_deliveries(args: &DropArgs, out: &mut impl Write) -> Result<(), QueueError> {
    let mut store = OfflineStore::open(&args.store.store, None)?;
    for id in &args.id {
        let before = store.drop_delivery(*id).map_err(|error| QueueError::Delivery { id: *id, error })?;
        let now = if before.is_pending() { "a dead letter now" } else { "deleted" };
        writeln!(out, "{id}: was {}, {now}", before.word())?;
    }
    Ok(())
}

fn to_json(delivery: &Summary) -> serde_json::Value {
    json!({
        "id": delivery.id.to_string(),
        "queue": delivery.queue,
        "state": delivery.state.word(),
        "reason": delivery.reason.map(DeadReason::word),
        "attempts": delivery.attempts,
        "accepted": rfc3339(delivery.accepted),
        "next": delivery.next.map(rfc3339),
        "bytes": delivery.bytes,
        "status": delivery.status,
        "cause": delivery.cause,
    })
}

fn last_outcome(delivery: &Summary) -> String {
    match (delivery.status, &delivery.cause) {
        (Some(status), Some(cause)) => format!("{status} {cause}"),
        (Some(status), None) => status.to_string(),
        (None, Some(cause)) => cause.clone(),
        (None, None) => "-".to_owned(),
    }
}

fn age(now: UnixMillis, then: UnixMillis) -> String {
    let seconds = now.since(then).as_secs();
    let (number, unit) = match seconds {
        0..60 => (seconds, "s"),
        60..3600 => (seconds / 60, "m"),
        3600..86_400 => (seconds / 3600, "h"),
        _ => (seconds / 86_400, "d"),
    };
    format!("{number}{unit}")
}

fn rfc3339(time: UnixMillis) -> String {
    Timestamp::from(SystemTime::from(time)).to_string()
}
