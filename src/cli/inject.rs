//! `outrigger inject [-f FILE]`

use std::{
    fs,
    io::{self, Read, Write},
    path::PathBuf,
    process::ExitCode,
};

use clap::Args;

use crate::kubernetes::{
    inject::{Defaults, InjectError},
    manifest::{self, ManifestError},
};

/// Limit of the input; far above what an API server accepts.
const MAX_BYTES: u64 = 64 << 20;

/// Add the sidecar to the workloads of Kubernetes YAML, or remove it.
///
/// Applies to Pods, Deployments, StatefulSets, DaemonSets, Jobs, CronJobs, ReplicaSets and lists of them, unless
/// labelled `outrigger.dev/inject: disabled`. Annotations `outrigger.dev/…` of the pod configure the sidecar. All other
/// YAML is left byte for byte unchanged, comments included. Idempotent.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger inject -f deployment.yaml --image registry.example/outrigger:0.1.0 | kubectl apply -f -
  helm template shop ./chart | outrigger inject | kubectl apply -f -
  kubectl get deploy checkout -o yaml | outrigger inject --remove | kubectl apply -f -

Workloads that cannot take a sidecar stay unchanged, with the reason on stderr. After an error nothing is written, and
the exit code is 1.")]
pub struct InjectArgs {
    /// File to read; `-` is stdin; several are written one after another
    #[arg(short = 'f', long = "filename", value_name = "FILE", default_value = "-")]
    files: Vec<PathBuf>,
    /// Remove the sidecar and everything that was added with it
    #[arg(long, conflicts_with_all = ["defaults", "image"])]
    remove: bool,
    /// Defaults for what a pod's annotations do not set: a TOML file as for `outrigger webhook`
    #[arg(long, value_name = "FILE")]
    defaults: Option<PathBuf>,
    /// The proxy's image, unless a pod names one
    #[arg(long, value_name = "IMAGE")]
    image: Option<String>,
}

#[derive(Debug, thiserror::Error)]
enum CliError {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: {source}", path.display())]
    Manifest { path: PathBuf, source: ManifestError },
    #[error("{}: {source}", path.display())]
    Defaults { path: PathBuf, source: InjectError },
    #[error(transparent)]
    Image(#[from] InjectError),
    #[error("cannot write: {0}")]
    Write(#[from] io::Error),
}

pub fn run(args: &InjectArgs) -> ExitCode {
    match all(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(errors) => {
            errors.iter().for_each(|error| eprintln!("outrigger: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn all(args: &InjectArgs) -> Result<(), Vec<CliError>> {
    let defaults = defaults(args.defaults.as_ref(), args.image.as_ref()).map_err(|error| vec![error])?;
    let (mut out, mut errors) = (String::new(), Vec::new());
    for path in &args.files {
        let injected = match read(path) {
            Ok(text) => manifest::inject(&text, (!args.remove).then_some(&defaults)),
            Err(error) => {
                errors.push(error);
                continue;
            }
        };
        match injected {
            Ok(injected) => {
                injected.notes.iter().for_each(|note| eprintln!("outrigger: {note}"));
                // Two files are two documents.
                if !out.is_empty() && !injected.text.starts_with("---") {
                    out += if out.ends_with('\n') { "---\n" } else { "\n---\n" };
                }
                out += &injected.text;
            }
            Err(failures) => errors
                .extend(failures.into_iter().map(|source| CliError::Manifest { path: path.clone(), source })),
        }
    }
    // Partial output, once applied, is worse than none.
    if !errors.is_empty() {
        return Err(errors);
    }
    match io::stdout().lock().write_all(out.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(vec![error.into()]),
        _ => Ok(()),
    }
}

fn defaults(file: Option<&PathBuf>, image: Option<&String>) -> Result<Defaults, CliError> {
    let mut defaults = file.map_or(Ok(Defaults::default()), read_defaults)?;
    if let Some(image) = image {
        defaults.set("image", image.clone());
        defaults.read(&serde_json::Value::Null)?;
    }
    Ok(defaults)
}

fn read_defaults(path: &PathBuf) -> Result<Defaults, CliError> {
    let text = fs::read_to_string(path).map_err(|source| CliError::Read { path: path.clone(), source })?;
    Defaults::parse(&text).map_err(|source| CliError::Defaults { path: path.clone(), source })
}

fn read(path: &PathBuf) -> Result<String, CliError> {
    let failed = |source| CliError::Read { path: path.clone(), source };
    let mut text = String::new();
    let input: Box<dyn Read> = match path.to_str() {
        Some("-") => Box::new(io::stdin()),
        _ => Box::new(fs::File::open(path).map_err(failed)?),
    };
    let read = input.take(MAX_BYTES + 1).read_to_string(&mut text).map_err(failed)?;
    if read as u64 > MAX_BYTES {
        return Err(failed(io::Error::other(format!("it is larger than {} MiB", MAX_BYTES >> 20))));
    }
    Ok(text)
}
