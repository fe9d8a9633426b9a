//! Reload: applying, holding back or rejecting a new configuration while running.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::{
    sync::{Notify, oneshot},
    time::Instant,
};

use super::Proxy;
use crate::{
    config::{Config, Revision, Sources, confirmation_reasons, keys_needing_restart},
    watch::WatchReason,
};

/// Limit of requests to reload that wait for their outcome.
const MAX_REQUESTS: usize = 16;

/// The state of the configuration and its reloads.
#[derive(Debug)]
pub struct Reloads(Mutex<ReloadState>);

#[derive(Clone, Debug)]
pub struct ReloadState {
    pub files: Vec<PathBuf>,
    /// When the current configuration was loaded.
    pub loaded: Instant,
    /// Changes that were applied, and changes that were rejected or held back.
    pub accepted_count: u64,
    pub rejected_count: u64,
    /// Why the current files were rejected or held back; the last good configuration stays in use.
    pub rejection: Option<String>,
    /// Keys that changed and take effect only after a restart.
    pub restart_needed: Vec<String>,
    /// The configuration at the start, against which `restart_needed` is computed.
    started_with: Arc<Config>,
    /// The files of the current configuration, to detect what a new version of them removes.
    sources: Arc<Sources>,
}

impl Reloads {
    pub fn new(files: Vec<PathBuf>, candidate: &Candidate) -> Self {
        Self(Mutex::new(ReloadState {
            files,
            loaded: Instant::now(),
            accepted_count: 0,
            rejected_count: 0,
            rejection: None,
            restart_needed: Vec::new(),
            started_with: Arc::clone(&candidate.config),
            sources: Arc::clone(&candidate.sources),
        }))
    }

    pub fn state(&self) -> ReloadState {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn accept(&self, candidate: &Candidate, changed: bool) -> Vec<String> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.rejection = None;
        state.restart_needed = keys_needing_restart(&state.started_with, &candidate.config);
        state.sources = Arc::clone(&candidate.sources);
        if changed {
            state.accepted_count += 1;
            state.loaded = Instant::now();
        }
        state.restart_needed.clone()
    }

    fn reject(&self, why: String) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.rejected_count += 1;
        state.rejection = Some(why);
    }
}

/// A valid configuration, and the files that it was read from.
#[derive(Clone, Debug)]
pub struct Candidate {
    pub config: Arc<Config>,
    pub sources: Arc<Sources>,
}

/// The result of reading the files: a configuration, or diagnostics.
pub type LoadResult = Result<Candidate, String>;

/// The result of reading the files, and why they were read.
#[derive(Debug)]
pub struct Change {
    pub result: LoadResult,
    pub reason: WatchReason,
}

/// The outcome of a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReloadOutcome {
    /// The sections and upstreams that changed.
    Applied(Vec<String>),
    /// Valid, but needs confirmation, for this reason.
    Held(String),
    /// Invalid, for this reason.
    Rejected(String),
}

/// Applies a configuration that is valid and needs no confirmation; otherwise logs why and keeps the current one.
pub fn apply(proxy: &Proxy, reloads: &Reloads, change: Change) -> ReloadOutcome {
    let candidate = match change.result {
        Ok(candidate) => candidate,
        Err(problems) => return reject(reloads, problems),
    };
    let config = &candidate.config;
    let before = Arc::clone(&proxy.shared.snapshot.load().config);
    if change.reason != WatchReason::Confirmed {
        let sources = reloads.state().sources;
        let reasons = confirmation_reasons(
            Revision { config: &before, sources: &sources },
            Revision { config, sources: &candidate.sources },
        );
        if !reasons.is_empty() {
            return hold(reloads, &reasons);
        }
    }
    let changes = changes(&before, config);
    if let Err(error) = proxy.shared.request_telemetry.configure(&config.telemetry) {
        return reject(reloads, error.to_string());
    }
    let restart = reloads.accept(&candidate, !changes.is_empty());
    if changes.is_empty() {
        let _ = proxy.shared.identity.reload();
        tracing::info!("the configuration was read again; nothing changed");
        return ReloadOutcome::Applied(changes);
    }
    proxy.reload(candidate.config);
    tracing::info!("the configuration was read again; changed: {}", changes.join(", "));
    if !restart.is_empty() {
        tracing::warn!("these keys take effect only after a restart: {}", restart.join(", "));
    }
    ReloadOutcome::Applied(changes)
}

fn reject(reloads: &Reloads, problems: String) -> ReloadOutcome {
    tracing::error!("the configuration is rejected, the last good one stays in use:\n{problems}");
    reloads.reject(problems.clone());
    ReloadOutcome::Rejected(problems)
}

fn hold(reloads: &Reloads, reasons: &[String]) -> ReloadOutcome {
    let why = format!(
        "held back because it protects the service less: {}; to apply it anyway, use `outrigger reload --accept-less-security`, SIGHUP or a restart",
        reasons.join(", ")
    );
    tracing::error!("the configuration is {why}; the last good one stays in use");
    reloads.reject(why.clone());
    ReloadOutcome::Held(why)
}

/// Requests to reload the configuration, and their waiters.
#[derive(Debug, Default)]
pub struct ReloadRequests {
    waiting: Mutex<Vec<ReloadRequest>>,
    arrived: Notify,
}

#[derive(Debug)]
struct ReloadRequest {
    reason: WatchReason,
    reply: oneshot::Sender<ReloadOutcome>,
}

impl ReloadRequests {
    /// Requests a reload; returns a receiver of its outcome. `None`: too many requests wait already.
    pub fn request(&self, reason: WatchReason) -> Option<oneshot::Receiver<ReloadOutcome>> {
        let (reply, outcome) = oneshot::channel();
        let mut waiting = self.waiting();
        waiting.retain(|request| !request.reply.is_closed());
        if waiting.len() >= MAX_REQUESTS {
            return None;
        }
        waiting.push(ReloadRequest { reason, reply });
        drop(waiting);
        self.arrived.notify_one();
        Some(outcome)
    }

    /// Waits for a request; returns the strongest reason of all that wait. Cancel safe.
    pub async fn next(&self) -> WatchReason {
        self.arrived.notified().await;
        self.waiting().iter().map(|request| request.reason).max().unwrap_or(WatchReason::Requested)
    }

    /// Sends the outcome of a reload for `reason` to the requests that it satisfies.
    pub fn reply(&self, reason: WatchReason, outcome: &ReloadOutcome) {
        let mut waiting = self.waiting();
        for request in waiting.extract_if(.., |request| request.reason <= reason) {
            // The receiver may have been dropped.
            let _ = request.reply.send(outcome.clone());
        }
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, Vec<ReloadRequest>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
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

    #[tokio::test]
    async fn a_request_gets_the_outcome_of_a_reload_with_at_least_its_reason() {
        let requests = ReloadRequests::default();
        let mut plain = requests.request(WatchReason::Requested).unwrap();
        let mut confirmed = requests.request(WatchReason::Confirmed).unwrap();
        assert_eq!(requests.next().await, WatchReason::Confirmed);
        requests.reply(WatchReason::Change, &ReloadOutcome::Held(String::new()));
        assert!(plain.try_recv().is_err());
        let held = ReloadOutcome::Held("why".to_owned());
        requests.reply(WatchReason::Requested, &held);
        assert_eq!(plain.try_recv(), Ok(held));
        assert!(confirmed.try_recv().is_err(), "no confirmed reload yet");
        requests.reply(WatchReason::Confirmed, &ReloadOutcome::Applied(Vec::new()));
        assert_eq!(confirmed.try_recv(), Ok(ReloadOutcome::Applied(Vec::new())));
    }

    #[tokio::test]
    async fn requests_are_bounded() {
        let requests = ReloadRequests::default();
        let waiting: Vec<_> =
            (0..MAX_REQUESTS).map(|_| requests.request(WatchReason::Requested).unwrap()).collect();
        assert!(requests.request(WatchReason::Requested).is_none());
        drop(waiting);
        assert!(requests.request(WatchReason::Requested).is_some());
    }

    #[test]
    fn a_rejection_is_shown_until_a_valid_file_is_read() {
        let config = Candidate { config: Arc::default(), sources: Arc::default() };
        let reloads = Reloads::new(Vec::new(), &config);
        reloads.reject("line 3: no".to_owned());
        assert_eq!(reloads.state().rejection.as_deref(), Some("line 3: no"));
        assert_eq!(reloads.state().rejected_count, 1);
        reloads.accept(&config, false);
        assert_eq!(reloads.state().rejection, None);
        assert_eq!(reloads.state().accepted_count, 0, "nothing had changed");
    }
}
