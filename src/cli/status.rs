//! `outrigger status`

use std::{
    fmt::Write as _,
    io::{IsTerminal, Write},
    process::ExitCode,
    time::Duration,
};

use clap::Args;

use super::admin_client::{AdminArgs, finish};
use crate::{
    admin::{
        client::{Client, ClientError},
        status::{Status, UpstreamStatus},
    },
    units::HumanDuration,
};

const REFRESH: Duration = Duration::from_secs(2);

/// Show a running sidecar: its upstreams, their endpoints, what it listens on.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger status
  outrigger status --watch
  outrigger status --admin localhost:4291 --json | jq .upstreams")]
pub struct StatusArgs {
    #[command(flatten)]
    admin: AdminArgs,
    /// JSON, for scripts
    #[arg(long)]
    json: bool,
    /// Show it again every two seconds, until Ctrl-C
    #[arg(long)]
    watch: bool,
}

pub fn run(args: &StatusArgs) -> ExitCode {
    let client = args.admin.client();
    finish(async {
        loop {
            let text = fetch(&client, args.json).await?;
            let clear = if args.watch && std::io::stdout().is_terminal() { "\x1b[2J\x1b[H" } else { "" };
            // A reader that has gone (`| head`) is no failure.
            if write!(std::io::stdout(), "{clear}{text}").is_err() || !args.watch {
                return Ok(());
            }
            tokio::time::sleep(REFRESH).await;
        }
    })
}

async fn fetch(client: &Client, json: bool) -> Result<String, ClientError> {
    let body = client.get("/status").await?;
    let strange = |reason: String| ClientError::Strange { address: client.address(), reason };
    if json {
        return String::from_utf8(body.into()).map_err(|error| strange(error.to_string()));
    }
    serde_json::from_slice(&body).map(|status| show(&status)).map_err(|error| strange(error.to_string()))
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

    let config = &status.config;
    let files: Vec<String> = config.files.iter().map(|file| file.display().to_string()).collect();
    let files = if files.is_empty() { "built-in defaults".to_owned() } else { files.join(", ") };
    let age = seconds(config.loaded_seconds_ago);
    writeln!(
        out,
        "config: {files}, loaded {age} ago, {} reloads, {} refused",
        config.reloads, config.refused
    )?;
    if let Some(rejected) = &config.rejected {
        writeln!(out, "  REFUSED as it is now, an earlier one holds:")?;
        rejected.lines().try_for_each(|line| writeln!(out, "    {line}"))?;
    }
    if !config.restart_needed.is_empty() {
        writeln!(out, "  act after a restart only: {}", config.restart_needed.join(", "))?;
    }

    writeln!(out)?;
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

    writeln!(out)?;
    let mut rows = vec![row(["UPSTREAM", "ENDPOINT", "STATE", "FROM"])];
    for upstream in &status.upstreams {
        upstream_rows(&mut rows, &upstream.name, upstream);
    }
    upstream_rows(&mut rows, "(the service)", &status.inbound);
    table(out, &rows)
}

fn upstream_rows(rows: &mut Vec<[String; 4]>, name: &str, upstream: &UpstreamStatus) {
    let mut from = upstream.source.clone();
    if upstream.discovery != "ready" {
        let _ = write!(from, " ({})", upstream.discovery);
    }
    if upstream.endpoints.is_empty() {
        rows.push(row([name, "none", "", &from]));
    }
    for (index, endpoint) in upstream.endpoints.iter().enumerate() {
        let (name, from) = if index == 0 { (name, from.as_str()) } else { ("", "") };
        rows.push(row([name, &endpoint.address, &endpoint.state, from]));
    }
}

fn row(cells: [&str; 4]) -> [String; 4] {
    cells.map(ToOwned::to_owned)
}

fn table(out: &mut String, rows: &[[String; 4]]) -> std::fmt::Result {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let (a, b, c) = (width(0), width(1), width(2));
    for [name, address, state, rest] in rows {
        let line = format!("{name:a$}  {address:b$}  {state:c$}  {rest}");
        writeln!(out, "{}", line.trim_end())?;
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
    fn a_person_sees_what_matters() {
        let status: Status = serde_json::from_value(serde_json::json!({
            "service": "checkout", "build": {"version": "0.1.0"}, "pid": 7, "uptime_seconds": 61,
            "phase": "running", "ready": true,
            "config": {"files": ["a.toml"], "loaded_seconds_ago": 5, "reloads": 1, "refused": 2,
                       "rejected": "a.toml:3: no such key", "restart_needed": ["inbound.listen"]},
            "listeners": {"outbound": ["127.0.0.1:4140", "[::1]:4140"], "inbound": ["[::]:4143"], "upstreams": {}, "admin": "127.0.0.1:4191"},
            "connections": {"inbound": {"open": 1, "total": 2}, "outbound": {"open": 3, "total": 4}},
            "inbound": {"name": "checkout", "source": "[127.0.0.1:8080]", "discovery": "ready",
                        "endpoints": [{"address": "127.0.0.1:8080", "weight": 1, "state": "healthy"}]},
            "upstreams": [{"name": "payments", "source": "dns://payments:80", "discovery": "failed: no such name", "endpoints": []}],
        }))
        .unwrap();
        let text = show(&status);
        for part in [
            "checkout: ready, up 1m1s",
            "a.toml:3: no such key",
            "inbound.listen",
            "127.0.0.1:4140 [::1]:4140",
            "dns://payments:80 (failed: no such name)",
            "admin     127.0.0.1:4191",
            "(the service)",
        ] {
            assert!(text.contains(part), "`{part}` is not in\n{text}");
        }
    }
}
