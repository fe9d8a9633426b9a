//! `outrigger status`

mod splits;

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io::{IsTerminal, Write},
    process::ExitCode,
    time::Duration,
};

use clap::Args;

use super::admin_client::{AdminArgs, finish};
use crate::{
    admin::{
        client::{AdminClient, AdminClientError},
        status::{AccessLogStatus, ServiceAddressesStatus, Status, TracesStatus, UnknownHostsStatus},
        upstreams::{BreakerStatus, UpstreamStatus},
    },
    units::{ByteSize, HumanDuration},
};

const REFRESH: Duration = Duration::from_secs(2);
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Show a running sidecar: its traffic, its upstreams, their endpoints, breakers and budgets, and its queues.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger status
  outrigger status --watch
  outrigger status --wait 60s
  outrigger status --admin localhost:4291 --json | jq .upstreams")]
pub struct StatusArgs {
    #[command(flatten)]
    admin: AdminArgs,
    /// Print JSON, for scripts
    #[arg(long)]
    json: bool,
    /// Refresh every two seconds, until Ctrl-C
    #[arg(long)]
    watch: bool,
    /// Wait until the sidecar is ready, and under `run -- CMD` or `--app` until the service's port accepts
    /// connections; at most this long. Shows nothing; exits with 1 after that time
    #[arg(long, value_name = "DURATION", conflicts_with_all = ["json", "watch"])]
    wait: Option<HumanDuration>,
}

pub fn run(args: &StatusArgs) -> ExitCode {
    let client = args.admin.client();
    finish(async {
        if let Some(limit) = args.wait {
            return wait_ready(&client, limit.0).await;
        }
        loop {
            let text = fetch(&client, args.json).await?;
            let clear = if args.watch && std::io::stdout().is_terminal() { "\x1b[2J\x1b[H" } else { "" };
            // A closed pipe (`| head`) is not a failure.
            if write!(std::io::stdout(), "{clear}{text}").is_err() || !args.watch {
                return Ok(());
            }
            tokio::time::sleep(REFRESH).await;
        }
    })
}

/// Polls until the sidecar is ready and its service accepts connections. The error says what is missing.
async fn wait_ready(client: &AdminClient, limit: Duration) -> Result<(), AdminClientError> {
    let deadline = tokio::time::Instant::now() + limit;
    loop {
        match check_ready(client).await {
            Ok(()) => return Ok(()),
            Err(error) if tokio::time::Instant::now() >= deadline => return Err(error),
            Err(_) => tokio::time::sleep(POLL_INTERVAL).await,
        }
    }
}

async fn check_ready(client: &AdminClient) -> Result<(), AdminClientError> {
    client.get("/ready").await?;
    // An older sidecar does not report `service_port`.
    let status: serde_json::Value = serde_json::from_str(&fetch(client, true).await?).unwrap_or_default();
    let service = &status["service_port"];
    if service["accepts"] == false {
        let service = service["address"].as_str().unwrap_or_default().to_owned();
        return Err(AdminClientError::NoService { service });
    }
    Ok(())
}

async fn fetch(client: &AdminClient, json: bool) -> Result<String, AdminClientError> {
    let body = client.get("/status").await?;
    let unexpected = |reason: String| AdminClientError::NotAdminServer { address: client.address(), reason };
    if json {
        return String::from_utf8(body.into()).map_err(|error| unexpected(error.to_string()));
    }
    serde_json::from_slice(&body).map(|status| show(&status)).map_err(|error| unexpected(error.to_string()))
}

fn show(status: &Status) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = write_status(&mut out, status);
    out
}

fn write_status(out: &mut String, status: &Status) -> std::fmt::Result {
    let ready = status.not_ready.as_deref().unwrap_or("ready");
    let up = seconds(status.uptime_seconds);
    writeln!(
        out,
        "{}: {ready}, up {up} (outrigger {}, pid {})",
        status.service, status.build.version, status.pid
    )?;

    if let Some(port) = status.service_port.as_ref().filter(|port| !port.accepts) {
        writeln!(out, "service: NOTHING ACCEPTS connections at {} yet", port.address)?;
    }

    let config = &status.config;
    let files: Vec<String> = config.files.iter().map(|file| file.display().to_string()).collect();
    let files = if files.is_empty() { "built-in defaults".to_owned() } else { files.join(", ") };
    let age = seconds(config.loaded_seconds_ago);
    writeln!(
        out,
        "config: {files}, loaded {age} ago, {} reload{}, {} rejected",
        config.reloads,
        if config.reloads == 1 { "" } else { "s" },
        config.refused
    )?;
    if let Some(rejected) = &config.rejected {
        writeln!(out, "  REJECTED, the last good configuration stays in use:")?;
        rejected.lines().try_for_each(|line| writeln!(out, "    {line}"))?;
    }
    if !config.restart_needed.is_empty() {
        writeln!(out, "  take effect only after a restart: {}", config.restart_needed.join(", "))?;
    }

    if let Some(traces) = &status.traces {
        write_traces(out, traces)?;
    }
    if let Some(identity) = &status.identity {
        let expires: Vec<String> =
            identity.expires.iter().map(|(kind, date)| format!("{kind} expires {date}")).collect();
        let id = identity.id.as_deref().unwrap_or("none yet");
        writeln!(out, "identity: {id}, {}", expires.join(", "))?;
        if let Some(error) = &identity.error {
            writeln!(out, "  REJECTED, earlier certificates stay in use: {error}")?;
        }
    }

    if let Some(keys) = &status.jwt {
        let last = keys.last_seconds_ago.map(|ago| format!(", fetched {} ago", seconds(ago)));
        writeln!(out, "tokens: {} keys from {}{}", keys.known, keys.source, last.unwrap_or_default())?;
        if let Some(error) = &keys.error {
            writeln!(out, "  FAILING: {error}")?;
        }
    }

    write_entry_points(out, status)?;
    write_upstreams(out, status)?;
    write_cache(out, status)?;
    write_queues(out, status)?;
    write_problems(out, status)
}

fn write_traces(out: &mut String, traces: &TracesStatus) -> std::fmt::Result {
    let count = |word: &str| traces.spans.get(word).copied().unwrap_or(0);
    writeln!(
        out,
        "traces: to {}, {} of those that start here{}; {} spans exported, {} dropped, {} failed; {} of {} requests queued",
        traces.to,
        traces.sample,
        if traces.sample_errors { " and all that fail" } else { "" },
        count("exported"),
        count("queue_full"),
        count("failed"),
        traces.waiting,
        traces.queue
    )?;
    match (&traces.last_error, traces.failed_seconds_ago) {
        (Some(error), Some(ago)) => writeln!(out, "  FAILING, {} ago: {error}", seconds(ago)),
        _ => Ok(()),
    }
}

fn write_entry_points(out: &mut String, status: &Status) -> std::fmt::Result {
    let mut rows = vec![row(["LISTENER", "ADDRESS", "OPEN", "SINCE START"])];
    for (name, addresses) in
        [("outbound", &status.listeners.outbound), ("inbound", &status.listeners.inbound)]
    {
        let counts = status.connections.get(name);
        let open = counts.map_or_else(String::new, |counts| counts.open.to_string());
        let total = counts.map_or_else(String::new, |counts| counts.total.to_string());
        rows.push(row([name, &addresses.join(" "), &open, &total]));
    }
    for (name, addresses) in &status.listeners.upstreams {
        rows.push(row([name, &addresses.join(" "), "", ""]));
    }
    rows.push(row(["admin", &status.listeners.admin, "", ""]));
    if let Some(probe) = &status.listeners.probe {
        rows.push(row(["probe", probe, "", ""]));
    }
    table(out, &rows)?;

    // With one worker the table says nothing new.
    if status.workers.len() > 1 {
        let mut rows = vec![row(["WORKER", "OPEN", "BUSY SINCE START"])];
        for (index, worker) in status.workers.iter().enumerate() {
            let busy = seconds(worker.busy_ms / 1000).to_string();
            rows.push(row([&index.to_string(), &worker.connections.to_string(), &busy]));
        }
        table(out, &rows)?;
    }

    let mut rows = vec![row(["ENTRY POINT", "REQUESTS", "LAST"])];
    for (name, entry_point) in &status.ways {
        let last = entry_point
            .last_seconds_ago
            .map_or_else(|| "never".to_owned(), |ago| format!("{} ago", seconds(ago)));
        rows.push(row([name, &entry_point.count.to_string(), &last]));
    }
    table(out, &rows)
}

fn write_upstreams(out: &mut String, status: &Status) -> std::fmt::Result {
    let UnknownHostsStatus { known, hosts, not_found } = &status.unknown;
    let ServiceAddressesStatus { known: known_addresses, addresses } = &status.inbound_addresses;
    let titles: Vec<String> =
        addresses.iter().map(|upstream| format!("(the service at {})", upstream.name)).collect();
    let all = || {
        let named = status.upstreams.iter().map(|upstream| (upstream.name.as_str(), upstream));
        let unknown = hosts.iter().map(|upstream| (upstream.name.as_str(), upstream));
        let service = addresses.iter().zip(&titles).map(|(upstream, title)| (title.as_str(), upstream));
        named.chain(unknown).chain([("(the service)", &status.inbound)]).chain(service)
    };
    let mut rows = vec![row(["UPSTREAM", "ENDPOINT", "STATE", "FROM"])];
    all().for_each(|(name, upstream)| endpoint_rows(&mut rows, name, upstream));
    table(out, &rows)?;
    if *known > hosts.len() {
        writeln!(out, "and {} more hosts that no upstream names", known - hosts.len())?;
    }
    if *known_addresses > addresses.len() {
        writeln!(out, "and {} more addresses of the service", known_addresses - addresses.len())?;
    }
    if not_found.count > 0 {
        writeln!(out, "\nHosts not found in the last five minutes:")?;
        for why in &not_found.last {
            writeln!(out, "  {why}")?;
        }
        if not_found.count > not_found.last.len() {
            writeln!(out, "  and {} more", not_found.count - not_found.last.len())?;
        }
    }

    let titles =
        ["UPSTREAM", "BREAKER", "RETRIES LEFT", "IN FLIGHT", "WAITING", "CONNECTIONS", "RETRIES", "REFUSED"];
    let mut rows = vec![row(titles)];
    all().for_each(|(name, upstream)| rows.push(guard_row(name, upstream)));
    table(out, &rows)?;

    let mut rows = vec![row(["UPSTREAM", "TOKEN", "LAST ERROR"])];
    for (name, token) in all().filter_map(|(name, upstream)| Some((name, upstream.token.as_ref()?))) {
        let valid = token.good_for_seconds.map(|left| format!("valid for {}", seconds(left)));
        let error = token.error.as_deref().unwrap_or_default();
        rows.push(row([name, valid.as_deref().unwrap_or("none"), error]));
    }
    if rows.len() > 1 {
        table(out, &rows)?;
    }
    let rows = splits::rows(all());
    if rows.is_empty() { Ok(()) } else { table(out, &rows) }
}

fn write_cache(out: &mut String, status: &Status) -> std::fmt::Result {
    let Some(cache) = &status.cache else { return Ok(()) };
    // Whole KiB are easier to read.
    let (bytes, max_bytes) = (ByteSize(cache.bytes.next_multiple_of(1024)), ByteSize(cache.max_bytes));
    writeln!(out, "\ncache: {} keys, {bytes} of {max_bytes}, {} dropped", cache.keys, cache.evictions)?;
    if cache.waiting > 0 {
        writeln!(out, "  {} requests wait for a response that is being fetched", cache.waiting)?;
    }
    let mut rows = vec![row(["UPSTREAM", "CACHE RESULTS"])];
    for upstream in status.upstreams.iter().chain(&status.unknown.hosts).chain([&status.inbound]) {
        if !upstream.cache.is_empty() {
            rows.push(row([&upstream.name, &counts(&upstream.cache)]));
        }
    }
    if rows.len() > 1 { table(out, &rows) } else { Ok(()) }
}

fn write_queues(out: &mut String, status: &Status) -> std::fmt::Result {
    if let Some(store) = &status.store {
        if let Some(failure) = &store.failure {
            writeln!(out, "\nstore: FAILING, {failure}")?;
        }
        for file in &store.set_aside {
            writeln!(out, "\nstore: CORRUPT, its file was renamed: {}", file.display())?;
        }
    }
    let mut rows = vec![row(["QUEUE", "QUEUED", "WAITING", "DELIVERING", "DONE", "DEAD", "OLDEST", "STATE"])];
    for queue in &status.queues {
        let count = |state: &str| queue.messages.get(state).copied().unwrap_or(0).to_string();
        let oldest = queue.oldest_seconds.map_or_else(String::new, |age| seconds(age).to_string());
        let state =
            queue.paused.as_ref().map_or_else(|| "delivers".to_owned(), |why| format!("paused: {why}"));
        let counts = ["queued", "waiting", "delivering", "done", "dead"].map(count);
        let [queued, waiting, delivering, done, dead] = &counts;
        rows.push(row([&queue.name, queued, waiting, delivering, done, dead, &oldest, &state]));
    }
    if rows.len() > 1 { table(out, &rows) } else { Ok(()) }
}

fn write_problems(out: &mut String, status: &Status) -> std::fmt::Result {
    let AccessLogStatus { dropped, failed, .. } = status.access_log;
    if dropped + failed > 0 {
        writeln!(out, "\naccess log: {dropped} lines were not read in time, {failed} could not be written")?;
    }
    if status.trouble.is_empty() {
        return Ok(());
    }
    let mut rows = vec![row(["LAST PROBLEMS", "REQUEST", "UPSTREAM", "RESPONSE", "ATTEMPTS", "WHY"])];
    for request in &status.trouble {
        let ago = format!("{} ago", seconds(request.ended_seconds_ago));
        let what = format!("{} {}", request.direction, request.method);
        let response = request.status.map_or_else(|| "none".to_owned(), |status| status.to_string());
        let (upstream, why) =
            (request.upstream.as_deref().unwrap_or_default(), request.why.as_deref().unwrap_or_default());
        rows.push(row([&ago, &what, upstream, &response, &request.attempts.to_string(), why]));
    }
    table(out, &rows)
}

fn endpoint_rows(rows: &mut Vec<Row>, name: &str, upstream: &UpstreamStatus) {
    let mut from = upstream.source.clone();
    if upstream.discovery != "ready" {
        let _ = write!(from, " ({})", upstream.discovery);
    }
    if upstream.endpoints.is_empty() {
        rows.push(row([name, "none", "", &from]));
    }
    for (index, endpoint) in upstream.endpoints.iter().enumerate() {
        let (name, from) = if index == 0 { (name, from.as_str()) } else { ("", "") };
        let mut state = endpoint.state.clone();
        if let Some(left) = endpoint.until_in_seconds {
            let _ = write!(state, ", restored in {}", seconds(left));
        }
        state.push_str(&endpoint.describe_failures());
        rows.push(row([name, &endpoint.address, &state, from]));
    }
}

fn guard_row(name: &str, upstream: &UpstreamStatus) -> Row {
    let of = |count: u32, limit: u32| match limit {
        u32::MAX => count.to_string(),
        limit => format!("{count} of {limit}"),
    };
    let off = || "off".to_owned();
    let budget = upstream.budget.as_ref().map_or_else(off, |budget| budget.available.to_string());
    let [in_flight, pending, connections] = match &upstream.limits {
        None => [off(), off(), off()],
        Some(limits) => [
            of(limits.in_flight, limits.max_requests),
            limits.pending.to_string(),
            of(limits.connections, limits.max_connections),
        ],
    };
    let breaker = breaker(&upstream.breaker);
    let (retries, rejected) = (counts(&upstream.retries), counts(&upstream.rejected));
    row([name, &breaker, &budget, &in_flight, &pending, &connections, &retries, &rejected])
}

fn breaker(breaker: &BreakerStatus) -> String {
    let BreakerStatus { state, mode, since_seconds_ago, why, until_in_seconds } = breaker;
    if mode == "off" {
        return mode.clone();
    }
    let mut text = state.replace('_', " ");
    // A breaker that never changed state needs no explanation.
    if why != "start" {
        let _ = write!(text, " for {} ({why})", seconds(*since_seconds_ago));
    }
    if let Some(left) = until_in_seconds {
        let _ = write!(text, ", {} left", seconds(*left));
    }
    text
}

fn counts(counts: &BTreeMap<String, u64>) -> String {
    let each: Vec<String> = counts.iter().map(|(word, count)| format!("{word} {count}")).collect();
    each.join(", ")
}

type Row = Vec<String>;

fn row<const N: usize>(cells: [&str; N]) -> Row {
    cells.map(ToOwned::to_owned).into()
}

/// Writes an empty line and a table whose columns are as wide as their widest cell.
fn table(out: &mut String, rows: &[Row]) -> std::fmt::Result {
    writeln!(out)?;
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    for row in rows {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        writeln!(out, "{}", cells.join("  ").trim_end())?;
    }
    Ok(())
}

fn seconds(seconds: u64) -> HumanDuration {
    HumanDuration::from_secs(seconds)
}

#[cfg(test)]
mod tests;
