//! `outrigger webhook`

use std::{path::PathBuf, process::ExitCode};

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    config::ListenAddr,
    kubernetes::webhook::{Settings, WebhookError, serve},
    telemetry::log::{Log, LogError, LogFilter, LogFormat},
};

/// Serve injection as a Kubernetes admission webhook.
///
/// POST /mutate adds the sidecar to pods as they are created, POST /validate rejects ConfigMaps with an invalid
/// outrigger.toml, GET /healthz is for probes. Certificate and defaults are reloaded when they change.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger webhook --listen [::]:8443 --tls-cert /certs/tls.crt --tls-key /certs/tls.key
  outrigger webhook --tls-cert tls.crt --tls-key tls.key --defaults defaults.toml

  defaults.toml has the values for what a pod's annotations do not set:
  image = \"registry.example/outrigger:0.1.0\"
  memory = \"48Mi\"
  [proxy.outbound]                 # proxy configuration that overrides a pod's ConfigMap
  unknown = \"deny\"
  [proxy-defaults.telemetry]       # proxy configuration that a pod's ConfigMap overrides
  otlp = \"http://jaeger.outrigger-system:4317\"")]
pub struct WebhookArgs {
    /// Address that the API server connects to
    #[arg(long, value_name = "ADDR", default_value = "[::]:8443")]
    listen: ListenAddr,
    /// The certificate chain (PEM), for the name of the webhook's Service
    #[arg(long, value_name = "FILE")]
    tls_cert: PathBuf,
    /// Its private key (PEM)
    #[arg(long, value_name = "FILE")]
    tls_key: PathBuf,
    /// Defaults for what a pod's annotations do not set (TOML)
    #[arg(long, value_name = "FILE")]
    defaults: Option<PathBuf>,
    /// The webhook's own namespace, whose pods get no sidecar
    #[arg(long, value_name = "NAME", env = "POD_NAMESPACE")]
    own_namespace: Option<String>,
    /// Log filter: a level, or tracing-subscriber's filter syntax
    #[arg(long, value_name = "LEVEL", env = "OUTRIGGER_LOG", default_value_t)]
    log: LogFilter,
    /// Format of the log on stderr
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t)]
    log_format: LogFormat,
}

#[derive(Debug, thiserror::Error)]
enum CliError {
    #[error(transparent)]
    Webhook(#[from] WebhookError),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error("cannot start: {0}")]
    Runtime(#[from] std::io::Error),
}

pub fn run(args: WebhookArgs) -> ExitCode {
    let outcome = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(CliError::from)
        .and_then(|runtime| runtime.block_on(run_webhook(args)));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("outrigger: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run_webhook(args: WebhookArgs) -> Result<(), CliError> {
    let _log = Log::start(args.log_format, &args.log)?;
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let settings = Settings {
        listen: args.listen,
        certificate: args.tls_cert,
        key: args.tls_key,
        defaults: args.defaults,
        own_namespace: args.own_namespace,
    };
    let served = serve(settings, async {
        terminate.recv().await;
    });
    tokio::select! {
        served = served => Ok(served?),
        // SIGINT stops without waiting for requests in flight.
        _ = interrupt.recv() => Ok(()),
    }
}
