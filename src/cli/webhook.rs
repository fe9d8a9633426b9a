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
/// POST /mutate puts the sidecar into pods as they are created, POST /validate refuses ConfigMaps whose outrigger.toml
/// no sidecar could use, GET /healthz says that it is there. Certificate and defaults are read again when they change.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger webhook --listen [::]:8443 --tls-cert /certs/tls.crt --tls-key /certs/tls.key
  outrigger webhook --tls-cert tls.crt --tls-key tls.key --defaults defaults.toml

  defaults.toml says what holds where a pod's annotations say nothing:
  image = \"registry.example/outrigger:0.1.0\"
  memory = \"48Mi\"
  [proxy.outbound]                 # of the proxy's configuration: holds whatever a pod's ConfigMap says
  unknown = \"deny\"
  [proxy-defaults.telemetry]       # the same, where the ConfigMap says nothing
  otlp = \"http://jaeger.outrigger-system:4317\"")]
pub struct WebhookArgs {
    /// Where the API server calls
    #[arg(long, value_name = "ADDR", default_value = "[::]:8443")]
    listen: ListenAddr,
    /// The certificate chain (PEM), for the name of the webhook's Service
    #[arg(long, value_name = "FILE")]
    tls_cert: PathBuf,
    /// Its private key (PEM)
    #[arg(long, value_name = "FILE")]
    tls_key: PathBuf,
    /// What holds where a pod says nothing (TOML)
    #[arg(long, value_name = "FILE")]
    defaults: Option<PathBuf>,
    /// The namespace that it runs in, whose pods get no sidecar
    #[arg(long, value_name = "NAME", env = "POD_NAMESPACE")]
    own_namespace: Option<String>,
    /// What is logged: a level, or tracing-subscriber's filter syntax
    #[arg(long, value_name = "LEVEL", env = "OUTRIGGER_LOG", default_value_t)]
    log: LogFilter,
    /// How the log is written to stderr
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
        .and_then(|runtime| runtime.block_on(live(args)));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("outrigger: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn live(args: WebhookArgs) -> Result<(), CliError> {
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
        // Somebody at a terminal waits for nothing.
        _ = interrupt.recv() => Ok(()),
    }
}
