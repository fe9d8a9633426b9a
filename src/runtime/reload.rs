//! Taking a new configuration while running.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::time::Instant;

use super::Proxy;
use crate::config::{Config, needs_restart};

/// What became of the configuration so far.
#[derive(Debug)]
pub struct Reloads(Mutex<ReloadState>);

#[derive(Clone, Debug)]
pub struct ReloadState {
    pub files: Vec<PathBuf>,
    /// When what holds now was loaded.
    pub loaded: Instant,
    /// Changes that took effect, and that did not.
    pub accepted: u64,
    pub refused: u64,
    /// Why the files as they are now were refused; what was valid before holds.
    pub rejected: Option<String>,
    /// Keys that differ from what runs and act only after a restart.
    pub restart_needed: Vec<String>,
    /// What the process started with: the measure of `restart_needed`.
    started_with: Arc<Config>,
}

impl Reloads {
    pub fn new(files: Vec<PathBuf>, config: Arc<Config>) -> Self {
        Self(Mutex::new(ReloadState {
            files,
            loaded: Instant::now(),
            accepted: 0,
            refused: 0,
            rejected: None,
            restart_needed: Vec::new(),
            started_with: config,
        }))
    }

    pub fn state(&self) -> ReloadState {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn accept(&self, config: &Config, changed: bool) -> Vec<String> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.rejected = None;
        state.restart_needed = needs_restart(&state.started_with, config);
        if changed {
            state.accepted += 1;
            state.loaded = Instant::now();
        }
        state.restart_needed.clone()
    }

    fn refuse(&self, why: String) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.refused += 1;
        state.rejected = Some(why);
    }
}

/// What the files hold: a configuration, or the diagnostics that say why not.
pub type Read = Result<Arc<Config>, String>;

/// Takes a configuration where it is valid, else says why not and keeps what runs.
pub fn apply(proxy: &Proxy, reloads: &Reloads, read: Read) {
    let config = match read {
        Ok(config) => config,
        Err(problems) => {
            tracing::error!("the configuration as it is now is refused, the old one stays:\n{problems}");
            reloads.refuse(problems);
            return;
        }
    };
    let before = Arc::clone(&proxy.shared.snapshot.load().config);
    let changes = changes(&before, &config);
    if let Err(error) = proxy.shared.calls.configure(&config.telemetry) {
        tracing::error!("the configuration as it is now is refused, the old one stays: {error}");
        reloads.refuse(error.to_string());
        return;
    }
    let restart = reloads.accept(&config, !changes.is_empty());
    if changes.is_empty() {
        let _ = proxy.shared.identity.look();
        tracing::info!("the configuration was read again; nothing changed");
        return;
    }
    proxy.reload(config);
    tracing::info!("the configuration was read again; changed: {}", changes.join(", "));
    if !restart.is_empty() {
        tracing::warn!("these keys act after a restart only: {}", restart.join(", "));
    }
}

/// The sections and upstreams that differ.
fn changes(old: &Config, new: &Config) -> Vec<String> {
    let sections = [
        ("service", old.service != new.service),
        ("runtime", old.runtime != new.runtime),
        ("inbound", old.inbound != new.inbound),
        ("identity", old.identity != new.identity),
        ("outbound", old.outbound != new.outbound),
        ("admin", old.admin != new.admin),
        ("telemetry", old.telemetry != new.telemetry),
        ("defaults", old.defaults != new.defaults),
    ];
    let mut changes: Vec<String> =
        sections.into_iter().filter(|(_, differs)| *differs).map(|(name, _)| name.to_owned()).collect();
    for upstream in &new.upstreams {
        match old.upstreams.iter().find(|o| o.name == upstream.name) {
            None => changes.push(format!("upstream {} added", upstream.name)),
            Some(o) if o != upstream => changes.push(format!("upstream {}", upstream.name)),
            Some(_) => {}
        }
    }
    for gone in old.upstreams.iter().filter(|o| new.upstreams.iter().all(|n| n.name != o.name)) {
        changes.push(format!("upstream {} removed", gone.name));
    }
    changes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Endpoints, Policy, Upstream};

    fn upstream(name: &str) -> Upstream {
        Upstream::new(name, Endpoints::Fixed(Vec::new()), Policy::default())
    }

    #[test]
    fn changes_are_named() {
        let old = Config { upstreams: vec![upstream("a"), upstream("b")], ..Config::default() };
        assert!(changes(&old, &old.clone()).is_empty());
        let mut new = Config { upstreams: vec![upstream("b"), upstream("c")], ..Config::default() };
        new.service.name = "shop".to_owned();
        new.upstreams[0].balance = crate::config::Balance::RoundRobin;
        assert_eq!(changes(&old, &new), ["service", "upstream b", "upstream c added", "upstream a removed"]);
    }

    #[test]
    fn a_refused_file_is_remembered_until_a_valid_one_comes() {
        let config = Arc::new(Config::default());
        let reloads = Reloads::new(Vec::new(), Arc::clone(&config));
        reloads.refuse("line 3: no".to_owned());
        assert_eq!(reloads.state().rejected.as_deref(), Some("line 3: no"));
        assert_eq!(reloads.state().refused, 1);
        reloads.accept(&config, false);
        assert_eq!(reloads.state().rejected, None);
        assert_eq!(reloads.state().accepted, 0, "nothing had changed");
    }
}
