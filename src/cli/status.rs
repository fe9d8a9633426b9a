//! `outrigger status`

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
    units::HumanDuration,
};

const REFRESH: Duration = Duration::from_secs(2);
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Show a running sidecar: its traffic, its upstreams, their endpoints, breakers and budgets.
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
mod tests {
    use super::*;

    #[test]
    fn the_status_is_rendered_as_text() {
        let status: Status = serde_json::from_value(serde_json::json!({
            "service": "checkout", "build": {"version": "0.1.0"}, "pid": 7, "uptime_seconds": 61,
            "phase": "running", "ready": true,
            "config": {"files": ["a.toml"], "loaded_seconds_ago": 5, "reloads": 1, "refused": 2,
                       "rejected": "a.toml:3: no such key", "restart_needed": ["inbound.listen"]},
            "listeners": {"outbound": ["127.0.0.1:4140", "[::1]:4140"], "inbound": ["[::]:4143"], "upstreams": {}, "admin": "127.0.0.1:4191"},
            "jwt": {"source": "https://id.example/jwks", "known": 2, "fetched": 1, "failed": 1, "last_seconds_ago": 61, "error": "refused"},
            "connections": {"inbound": {"open": 1, "total": 2}, "outbound": {"open": 3, "total": 4}},
            "workers": [{"connections": 3, "busy_ms": 61000}, {"connections": 1, "busy_ms": 999}],
            "ways": {"inbound": {"count": 3, "last_seconds_ago": 61}, "proxy": {"count": 0, "last_seconds_ago": null}},
            "traces": {"to": "http://c:4317 (OTLP over gRPC)", "sample": 0.1, "sample_errors": true, "waiting": 3, "queue": 2048,
                       "spans": {"exported": 11, "queue_full": 5, "failed": 6}, "last_error": "refused", "failed_seconds_ago": 61},
            "inbound": {"name": "checkout", "source": "[127.0.0.1:8080]", "discovery": "ready",
                        "endpoints": [{"address": "127.0.0.1:8080", "weight": 1, "state": "healthy", "success": 0.987,
                                       "last_error": "503"}],
                        "breaker": {"state": "closed", "mode": "off", "since_seconds_ago": 61, "why": "start", "until_in_seconds": null},
                        "budget": null, "limits": null, "retries": {}, "rejected": {}},
            "inbound_addresses": {"known": 3, "addresses": [{"name": "10.0.0.7:9090", "source": "[10.0.0.7:9090]", "discovery": "ready",
                        "endpoints": [{"address": "10.0.0.7:9090", "weight": 1, "state": "healthy"}],
                        "breaker": {"state": "open", "mode": "open", "since_seconds_ago": 1, "why": "by hand", "until_in_seconds": 8},
                        "budget": null, "limits": {"in_flight": 3, "pending": 0, "max_requests": 8, "connections": 2, "max_connections": 8},
                        "retries": {}, "rejected": {"limit_full": 4}}]},
            "upstreams": [{"name": "payments", "source": "dns://payments:80", "discovery": "failed: no such name",
                           "endpoints": [{"address": "10.0.0.1:80", "weight": 1, "state": "ejected", "until_in_seconds": 8}],
                           "breaker": {"state": "half_open", "mode": "auto", "since_seconds_ago": 2, "why": "time to try again", "until_in_seconds": null},
                           "budget": {"available": 7},
                           "limits": {"in_flight": 1, "pending": 0, "max_requests": 1024, "connections": 2, "max_connections": 4294967295_u32},
                           "retries": {"sent": 12, "budget": 3}, "rejected": {"breaker_open": 90},
                           "token": {"good_for_seconds": 61, "fetched": 2, "failed": 1, "error": "the token endpoint answered with 503"}}],
            "unknown": {"known": 7, "hosts": [], "not_found": {"count": 3, "last": ["no such name: paymets (NXDOMAIN)"]}},
            "access_log": {"mode": "errors", "written": 1, "dropped": 2, "failed": 0},
            "trouble": [{"ended_seconds_ago": 61, "direction": "outbound", "method": "GET", "upstream": "payments",
                         "status": 200, "attempts": 2, "trace_id": "0af7", "why": "10.0.0.1:80 answered 503, second attempt answered 200"}],
        }))
        .unwrap();
        let text = show(&status);
        for part in [
            "checkout: ready, up 1m1s",
            "traces: to http://c:4317 (OTLP over gRPC), 0.1 of those that start here and all that fail",
            "11 spans exported, 5 dropped, 6 failed; 3 of 2048 requests queued",
            "FAILING, 1m1s ago: refused",
            "a.toml:3: no such key",
            "inbound.listen",
            "tokens: 2 keys from https://id.example/jwks, fetched 1m1s ago\n  FAILING: refused",
            "payments  valid for 1m1s  the token endpoint answered with 503",
            "loaded 5s ago, 1 reload, 2 rejected",
            "0       3     1m1s\n1       1     0s",
            "127.0.0.1:4140 [::1]:4140",
            "dns://payments:80 (failed: no such name)",
            "admin     127.0.0.1:4191",
            "(the service)",
            "inbound      3         1m1s ago\nproxy        0         never",
            "ejected, restored in 8s",
            "healthy, 98 % succeed, last error 503",
            "half open for 2s (time to try again)  7             1 of 1024  0        2            budget 3, sent 12  breaker_open 90",
            "(the service)                   off",
            "(the service at 10.0.0.7:9090)  open for 1s (by hand), 8s left        off           3 of 8     0        2 of 8       ",
            "limit_full 4",
            "and 2 more addresses of the service",
            "and 7 more hosts that no upstream names",
            "five minutes:\n  no such name: paymets (NXDOMAIN)\n  and 2 more",
            "access log: 2 lines were not read in time, 0 could not be written",
            "1m1s ago       outbound GET  payments  200       2         10.0.0.1:80 answered 503, second attempt answered 200",
        ] {
            assert!(text.contains(part), "`{part}` is not in\n{text}");
        }
    }
}
