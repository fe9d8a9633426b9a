//! `outrigger run`: the proxy alone, or with the service as its child process.

use std::{ffi::OsString, path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use clap::{Args, builder::BoolishValueParser};
use tokio::sync::mpsc;

use crate::{
    admin::{Admin, AdminError},
    config::{self, Diagnostics, HostPort, LoadedConfig},
    descriptors,
    identity::{material::MaterialError, store::IdentityStore},
    proxy::interception,
    runtime::{
        self, StartError, cgroup,
        child::{self, Child, OnSidecarDeath, SpawnError},
        lifecycle::{self, Control, Lifecycle},
        ready_file::{ReadyFile, ReadyInfo},
        reload::{Candidate, Change, LoadResult, Reloads},
        service_env,
        signals::{self, Signals},
    },
    telemetry::{
        access_log::{AccessLogError, AccessLogTarget},
        log::{Log, LogError, LogFilter, LogFormat},
    },
};

use super::files::ConfigFiles;

/// Capacity of the channel of configuration changes.
const CHANGES: usize = 1;
/// How long the start waits for the first results of discovery.
const FIRST_DISCOVERY: Duration = Duration::from_secs(5);

/// Run the proxy alone, or together with the service
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger run                                     defaults or ./outrigger.toml, service on 127.0.0.1:8080
  outrigger run --app 3000 -- node server.js        starts the service too, with the proxy in its http_proxy
  outrigger run -c base.toml -c prod.toml           two files, the later one wins key by key
  outrigger run --ready-file /tmp/ready.json        writes the bound addresses to a file once ready

SIGTERM or SIGINT drains and stops, a second one stops at once, SIGHUP reloads.
With CMD, SIGQUIT and SIGWINCH drain inbound and then go to CMD, SIGUSR1, SIGUSR2, SIGTSTP and SIGCONT go to CMD at once,
and CMD is killed if the sidecar is (Linux). The exit code is CMD's; 127 if it was not found, 126 if not executable.")]
pub struct RunArgs {
    #[command(flatten)]
    files: ConfigFiles,
    /// Address of the service (sets inbound.forward_to): 8080, :8080 or host:port
    #[arg(long, value_name = "ADDR", value_parser = parse_app)]
    app: Option<HostPort>,
    /// Kernel rules redirect the pod's traffic to the proxy: become ready only once a probe has shown that they work
    #[arg(long, env = "OUTRIGGER_REDIRECTED", value_parser = BoolishValueParser::new())]
    redirected: bool,
    /// Write the bound addresses to this file as JSON once ready; it is removed at the end
    #[arg(long, value_name = "PATH")]
    ready_file: Option<PathBuf>,
    /// Log filter: a level, or tracing-subscriber's filter syntax
    #[arg(long, value_name = "LEVEL", env = "OUTRIGGER_LOG", default_value_t)]
    log: LogFilter,
    /// Format of the log on stderr
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t)]
    log_format: LogFormat,
    /// The service to start, with its arguments
    #[arg(last = true, value_name = "CMD")]
    command: Vec<OsString>,
}

#[derive(Debug, thiserror::Error)]
enum RunError {
    #[error("invalid configuration:\n{0}")]
    Config(String),
    #[error("cannot load the certificates of [identity]: {0}")]
    Identity(#[from] MaterialError),
    #[error(transparent)]
    Start(#[from] StartError),
    #[error(transparent)]
    Admin(#[from] AdminError),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    AccessLog(#[from] AccessLogError),
    #[error("cannot start the control runtime: {0}")]
    Runtime(#[from] std::io::Error),
    #[error("cannot write the ready file {}: {source}", path.display())]
    ReadyFile { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Service(#[from] SpawnError),
}

pub fn run(args: RunArgs) -> ExitCode {
    let outcome = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(RunError::from)
        .and_then(|runtime| runtime.block_on(run_proxy(args)));
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("outrigger: {error}");
            match error {
                RunError::Service(error) => ExitCode::from(error.exit_code()),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

async fn run_proxy(args: RunArgs) -> Result<u8, RunError> {
    let service = match (args.command.is_empty(), child::leads_group()) {
        (true, _) => signals::ServiceProcess::None,
        (false, false) => signals::ServiceProcess::SharedGroup,
        (false, true) => signals::ServiceProcess::OwnGroup,
    };
    let mut signals = Signals::new(service)?;
    let log = Log::start(args.log_format, &args.log)?;
    match descriptors::raise_limit() {
        Some((from, to)) => tracing::debug!(from, to, "limit of open files raised"),
        None => tracing::debug!(limit = descriptors::limit(), "limit of open files"),
    }
    let files = args.files.paths();
    let loaded = config::load(&files, &config::process_env);
    let sources = loaded.as_ref().map(|loaded| Arc::clone(&loaded.sources)).unwrap_or_default();
    let candidate = with_app(loaded, args.app.as_ref()).map_err(RunError::Config)?;
    let config = Arc::clone(&candidate.config);

    let workers = config.runtime.workers.or_else(cgroup::cpu_limit).unwrap_or(1);
    let identity = Arc::new(IdentityStore::default());
    identity.start(&config).await?;
    let proxy = runtime::start(Arc::clone(&config), identity, workers)?;
    // Under `run -- CMD`, stdout belongs to the service.
    let access_log = if args.command.is_empty() { AccessLogTarget::Stdout } else { AccessLogTarget::Stderr };
    proxy.shared.request_telemetry.set_default_target(access_log);
    proxy.shared.request_telemetry.configure(&config.telemetry)?;
    let reloads = Reloads::new(files.clone(), &candidate);
    let has_service = args.app.is_some() || !args.command.is_empty();
    let (sender, changes) = mpsc::channel(CHANGES);
    let known = Arc::unwrap_or_clone(sources);
    let watcher = config::watch(files, known, config::process_env, move |loaded, reason| {
        let change = Change { result: with_app(loaded, args.app.as_ref()), reason };
        // Blocks the watcher's own thread. Fails only at the end of the process.
        let _ = sender.blocking_send(change);
    })?;
    if args.redirected {
        interception::start_probes(Arc::clone(&proxy.shared), &proxy.addresses.outbound);
    }
    let control = Control::new(&proxy, log.handle(), reloads);
    if has_service {
        control.service_port.watch(&control.shared);
    }
    let admin = Admin::start(&config.admin, Arc::clone(&control))?;
    let ready = ready(&control, &admin);
    tracing::info!(
        outbound = ready.outbound,
        inbound = ready.inbound,
        admin = ready.admin,
        service = %config.inbound.forward_to,
        workers,
        "outrigger {} is up",
        env!("CARGO_PKG_VERSION"),
    );

    tokio::select! {
        () = proxy.wait_first_discovery(FIRST_DISCOVERY) => control.set_discovered(),
        signal = signals.next_stop() => {
            tracing::info!(%signal, "stop signal before the proxy was ready: stopping");
            proxy.stop();
            // A job that never started has not succeeded.
            return Ok(u8::from(!args.command.is_empty()));
        }
        failure = proxy.wait_failure() => {
            lifecycle::log_failure(&failure);
            proxy.stop();
            return Ok(1);
        }
    }
    let _ready_file = args
        .ready_file
        .map(|path| ReadyFile::write(&path, &ready).map_err(|source| RunError::ReadyFile { path, source }))
        .transpose()?;
    let child = if args.command.is_empty() {
        None
    } else {
        let variables = service_env::variables(&control.addresses.outbound, &config);
        // On the main thread, which lives as long as the process.
        Some(Child::spawn(&args.command, variables, OnSidecarDeath::Kill)?)
    };

    Ok(Lifecycle { proxy, control, child, signals, watcher, changes, stop_now: false }.run().await)
}

/// Applies `--app` to the loaded configuration, or renders the diagnostics. Logs warnings.
fn with_app(loaded: Result<LoadedConfig, Diagnostics>, app: Option<&HostPort>) -> LoadResult {
    let loaded = loaded.map_err(|problems| problems.render(false).trim_end().to_owned())?;
    for warning in loaded.warnings.lines() {
        tracing::warn!("{warning}");
    }
    let LoadedConfig { mut config, sources, .. } = loaded;
    if let Some(app) = app {
        Arc::make_mut(&mut config).inbound.forward_to = app.clone();
    }
    Ok(Candidate { config, sources })
}

fn ready(control: &Control, admin: &Admin) -> ReadyInfo {
    let first =
        |addresses: &[std::net::SocketAddr]| addresses.first().map(ToString::to_string).unwrap_or_default();
    ReadyInfo {
        outbound: first(&control.addresses.outbound),
        inbound: first(&control.addresses.inbound),
        admin: admin.address.clone(),
        probe: admin.probe.clone(),
        upstreams: control.addresses.upstreams.iter().map(|(name, at)| (name.clone(), first(at))).collect(),
        admin_token_file: admin.token_path().map(ToOwned::to_owned),
        pid: std::process::id(),
    }
}

/// `8080`, `:8080` or `host:port`.
fn parse_app(text: &str) -> Result<HostPort, String> {
    let port = text.strip_prefix(':').unwrap_or(text);
    match port.parse::<u16>() {
        Ok(0) => Err("port 0 is not a service port".to_owned()),
        Ok(port) => Ok(HostPort::new("127.0.0.1", port)),
        Err(_) if port.bytes().all(|byte| byte.is_ascii_digit()) => format!("127.0.0.1:{port}").parse(),
        Err(_) => text.parse(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn app_may_be_only_a_port() {
        assert_eq!(parse_app("3000"), Ok(HostPort::new("127.0.0.1", 3000)));
        assert_eq!(parse_app(":3000"), Ok(HostPort::new("127.0.0.1", 3000)));
        assert_eq!(parse_app("app.local:3000"), Ok(HostPort::new("app.local", 3000)));
        assert_eq!(parse_app("[::1]:3000"), Ok(HostPort::new("::1", 3000)));
        assert_eq!(parse_app("70000"), Err("`70000` is not a port; ports go up to 65535".to_owned()));
        for wrong in ["", "0", "app", "http://app:3000"] {
            assert!(parse_app(wrong).is_err(), "{wrong}");
        }
    }
}
