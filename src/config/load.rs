//! Loads files into a [`LoadedConfig`], or returns everything that is wrong with them.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    Config, Diagnostics, Problem,
    diagnostic::Problems,
    environment,
    lint::lint,
    merge::merge,
    node::Node,
    parse::{Env, parse},
    resolve::resolve,
    source::{self, Source, Sources},
};

/// A valid configuration.
#[derive(Clone, Debug)]
pub struct LoadedConfig {
    pub config: Arc<Config>,
    /// The warnings of `lint`.
    pub warnings: Diagnostics,
    /// The merged tree, with the place of every value.
    pub tree: Arc<Node>,
    pub sources: Arc<Sources>,
}

/// The process's environment, for [`load`].
pub fn process_env(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// The files to use: those given with `-c`, else `$OUTRIGGER_CONFIG`, else `outrigger.toml` in `directory` if it
/// exists, else none.
pub fn config_files(given: &[PathBuf], directory: &Path, env: Env<'_>) -> Vec<PathBuf> {
    if !given.is_empty() {
        return given.to_vec();
    }
    if let Some(path) = env("OUTRIGGER_CONFIG").filter(|path| !path.is_empty()) {
        return vec![path.into()];
    }
    let default_file = directory.join("outrigger.toml");
    if default_file.exists() { vec![default_file] } else { Vec::new() }
}

/// Reads, merges, resolves and checks. Later files win, key by key; without files the built-in defaults apply.
pub fn load(files: &[PathBuf], env: Env<'_>) -> Result<LoadedConfig, Diagnostics> {
    let mut problems = Problems::default();
    let sources = read_all(files, &mut problems);
    check(sources, env, problems)
}

/// The texts of the files, or an error for every file that cannot be read.
pub(super) fn read_sources(files: &[PathBuf]) -> Result<Sources, Diagnostics> {
    let mut problems = Problems::default();
    let sources = read_all(files, &mut problems);
    if problems.has_errors() { Err(problems.finish(sources)) } else { Ok(sources) }
}

/// The texts of the files that can be read.
fn read_all(files: &[PathBuf], problems: &mut Problems) -> Sources {
    let mut sources = Sources::default();
    for path in files {
        match source::read(path) {
            Ok(text) => sources.0.push(Source { path: path.clone(), text }),
            Err(reason) => {
                problems.push(Problem::error(None, format!("cannot read {}", path.display())).label(reason));
                problems.mark_incomplete();
            }
        }
    }
    sources
}

/// The same for texts that have been read already.
pub fn load_sources(sources: Sources, env: Env<'_>) -> Result<LoadedConfig, Diagnostics> {
    check(sources, env, Problems::default())
}

/// A configuration as far as it could be read, for further checks.
#[derive(Debug)]
pub struct ExaminedConfig {
    /// Values that could not be read have their defaults.
    pub config: Config,
    pub tree: Node,
    pub diagnostics: Diagnostics,
}

/// Reads files and returns all problems.
pub fn examine(files: &[PathBuf], env: Env<'_>) -> ExaminedConfig {
    let mut problems = Problems::default();
    let sources = read_all(files, &mut problems);
    let (config, tree) = parse_and_resolve(&sources, env, &mut problems);
    ExaminedConfig { config, tree, diagnostics: problems.finish(sources) }
}

/// Reports all problems at once. A value that could not be read causes no further problems.
fn check(sources: Sources, env: Env<'_>, mut problems: Problems) -> Result<LoadedConfig, Diagnostics> {
    let (config, tree) = parse_and_resolve(&sources, env, &mut problems);
    if problems.has_errors() {
        return Err(problems.finish(sources));
    }
    Ok(LoadedConfig {
        config: Arc::new(config),
        tree: Arc::new(tree),
        sources: Arc::new(sources.clone()),
        warnings: problems.finish(sources),
    })
}

fn parse_and_resolve(sources: &Sources, env: Env<'_>, problems: &mut Problems) -> (Config, Node) {
    let mut tree = environment::telemetry(env);
    for (index, source) in sources.0.iter().enumerate() {
        let over = parse(&source.text, index, env, problems);
        tree = merge(tree, over);
    }
    let mut config = resolve(&tree, default_service_name(env), problems);
    if environment::disables_traces(env) {
        config.telemetry.otlp = None;
    }
    if !problems.has_errors() {
        lint(&config, &tree, problems);
    }
    (config, tree)
}

/// `OTEL_SERVICE_NAME`, then the host name, then OpenTelemetry's default.
fn default_service_name(env: Env<'_>) -> String {
    let host = || rustix::system::uname().nodename().to_str().map(str::to_owned).ok();
    let is_set = |name: &String| !name.trim().is_empty();
    env("OTEL_SERVICE_NAME")
        .filter(is_set)
        .or_else(|| env("HOSTNAME").filter(is_set))
        .or_else(|| host().filter(is_set))
        .map_or_else(|| super::Service::default().name, |name| name.trim().to_owned())
}

#[cfg(test)]
mod tests;
