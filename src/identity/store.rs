//! What holds now: the identity, who is trusted, and what became of the newest files.
//!
//! New material is checked whole before it is taken; what is wrong changes nothing but the status, which says why.
//! Workers read by pointer and never wait.

mod report;
mod roots;
#[cfg(test)]
mod tests;

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant, SystemTime},
};

use arc_swap::ArcSwapOption;
use tokio::sync::watch;

use super::{
    counts::Handshakes,
    files,
    material::{Expiry, Material, MaterialError, Pem, Uses},
    time::Date,
    tls::{ClientTls, ServerTls, Tickets},
};
pub use report::Report;

use crate::config::{self, Config, MinTls, TlsMode, UpstreamTls};

/// How long the start waits for files that are not there.
const FIRST_FILES: Duration = Duration::from_secs(10);
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Everything about certificates that threads share.
#[derive(Debug)]
pub struct Store {
    own: ArcSwapOption<Material>,
    server: ArcSwapOption<ServerTls>,
    pub handshakes: Arc<Handshakes>,
    /// Counts what was taken; those who are connected look whether they are still believed.
    generation: watch::Sender<u64>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    settings: Option<config::Identity>,
    /// What the certificate is used for.
    uses: Uses,
    /// What the Workload API told last.
    delivered: Option<Pem>,
    /// Why it cannot be asked now.
    agent_away: Option<String>,
    /// What is held, as it was read.
    pem: Option<Pem>,
    /// What was refused last, so that it is said once.
    refused_pem: Option<Pem>,
    refused: Option<String>,
    accepted: u64,
    refusals: u64,
    tickets: Option<Tickets>,
    clients: Vec<(Arc<str>, Weak<ClientTls>)>,
    roots: roots::Roots,
    warned: report::Warned,
}

impl Default for Store {
    fn default() -> Self {
        Self {
            own: ArcSwapOption::empty(),
            server: ArcSwapOption::empty(),
            handshakes: Arc::default(),
            generation: watch::Sender::new(0),
            state: Mutex::default(),
        }
    }
}

impl Store {
    /// The same at start: files that are not there yet, as before a csi driver has filled its volume, are waited for.
    ///
    /// # Errors
    ///
    /// Why there is no identity where there should be one.
    pub async fn start(&self, config: &Config) -> Result<(), MaterialError> {
        let begun = Instant::now();
        let mut outcome = self.configure(config);
        while let Err(error) = &outcome
            && error.is_missing()
            && begun.elapsed() < FIRST_FILES
        {
            tokio::time::sleep(LOOK_AGAIN).await;
            outcome = self.look();
        }
        outcome
    }

    /// Takes the settings of a configuration, and reads their files.
    ///
    /// # Errors
    ///
    /// Why there is no identity where there should be one; kept from before, it is none.
    pub fn configure(&self, config: &Config) -> Result<(), MaterialError> {
        let mut state = self.state();
        if state.settings != config.identity {
            state.settings.clone_from(&config.identity);
            // Other files may hold the same, for which other settings hold now.
            state.pem = None;
            state.refused_pem = None;
            state.delivered = None;
            state.agent_away = None;
        }
        let uses = Uses::of(config);
        if state.uses != uses {
            state.uses = uses;
            if self.own.load().as_ref().is_none_or(|own| own.unusable.is_some()) {
                // It was good for what it was used for.
                state.pem = None;
                state.refused_pem = None;
            }
        }
        if config.identity.is_none() {
            self.own.store(None);
            self.server.store(None);
            state.refused = None;
        }
        drop(state);
        self.look()
    }

    /// The socket of the Workload API, where certificates come from there.
    pub fn agent(&self) -> Option<String> {
        self.state().settings.as_ref()?.spiffe.clone()
    }

    /// Takes what the Workload API has told. What is wrong with it has been said when this returns.
    pub fn deliver(&self, pem: Pem) {
        let mut state = self.state();
        state.delivered = Some(pem);
        state.agent_away = None;
        drop(state);
        let _ = self.look();
    }

    /// The Workload API cannot be asked. What it told last holds until it expires.
    pub fn agent_is_away(&self, why: String) {
        let mut state = self.state();
        if state.agent_away.as_ref() != Some(&why) {
            let kept = if state.pem.is_some() { "; what it told last holds" } else { "" };
            tracing::warn!("{why}{kept}");
        }
        state.refused = Some(why.clone());
        state.agent_away = Some(why);
    }

    /// Reads the files again and takes what changed.
    ///
    /// # Errors
    ///
    /// Why the identity's files were refused. What held before still does, and the status says so.
    pub fn look(&self) -> Result<(), MaterialError> {
        let mut state = self.state();
        let now = SystemTime::now();
        let wanted = state.wanted_roots();
        let mut changed = state.roots.look(&wanted, now);
        let result = match state.settings.clone() {
            None => Ok(false),
            Some(settings) => self.look_at_own(&mut state, &settings, now),
        };
        changed |= *result.as_ref().unwrap_or(&false);
        if changed {
            self.renew_clients(&mut state);
            self.generation.send_modify(|generation| *generation += 1);
        }
        let expiries = state.expiries(self.own.load().as_deref());
        state.warned.warn(expiries, now);
        result.map(drop)
    }

    /// Whether something new was taken.
    fn look_at_own(
        &self,
        state: &mut State,
        settings: &config::Identity,
        now: SystemTime,
    ) -> Result<bool, MaterialError> {
        let pem = match files::read(settings) {
            Ok(Some(pem)) => pem,
            Ok(None) => match state.delivered.clone() {
                Some(pem) => with_crl(pem, settings).map_err(|error| state.refuse(error, None))?,
                None => return Ok(false),
            },
            Err(error) => return Err(state.refuse(error, None)),
        };
        if state.pem.as_ref() == Some(&pem) {
            // The old files are back, or were never gone.
            state.refused = state.agent_away.clone();
            state.refused_pem = None;
            return Ok(false);
        }
        let material = match Material::check(&pem, state.uses, now) {
            Ok(material) => material,
            Err(error) => return Err(state.refuse(error, Some(pem))),
        };
        let trust_changed = state.pem.as_ref().is_none_or(|old| old.ca != pem.ca || old.crl != pem.crl);
        self.take(state, material, settings.min_tls, trust_changed);
        state.pem = Some(pem);
        Ok(true)
    }

    fn take(&self, state: &mut State, material: Material, min: MinTls, trust_changed: bool) {
        let tickets = match &state.tickets {
            Some(tickets) if !trust_changed => Ok(tickets.clone()),
            _ => Tickets::new(),
        };
        let server = tickets.and_then(|tickets| {
            let server = ServerTls::new(&material, min, &tickets)?;
            state.tickets = Some(tickets);
            Ok(server)
        });
        match server {
            Ok(server) => self.server.store(Some(Arc::new(server))),
            Err(error) => tracing::error!(%error, "TLS for callers cannot be set up"),
        }
        tracing::info!(
            identity = %material.own,
            expires = %Date(material.own.not_after),
            trusted = %material.trust,
            "a certificate was taken"
        );
        if let Some(limitation) = material.limitation() {
            tracing::warn!("{limitation}");
        }
        self.own.store(Some(Arc::new(material)));
        state.accepted += 1;
        state.refused = None;
        state.refused_pem = None;
        state.warned.clear();
    }

    fn renew_clients(&self, state: &mut State) {
        let own = self.own.load();
        state.clients.retain(|(_, client)| client.strong_count() > 0);
        let clients: Vec<_> = state.clients.iter().filter_map(|(_, client)| client.upgrade()).collect();
        for client in clients {
            let trust = state.roots.of(&client.settings, own.as_deref());
            client.renew(trust, own.as_deref());
        }
    }

    /// How an upstream is to be met: the same as before where its settings are the same, so that its connections stay.
    pub fn client(&self, upstream: &str, settings: &UpstreamTls, min: MinTls) -> Option<Arc<ClientTls>> {
        if settings.mode == TlsMode::Off {
            return None;
        }
        let mut state = self.state();
        let same = |(name, client): &(Arc<str>, Weak<ClientTls>)| {
            let client = client.upgrade().filter(|_| &**name == upstream)?;
            (client.settings == *settings && client.min == min).then_some(client)
        };
        if let Some(client) = state.clients.iter().find_map(same) {
            return Some(client);
        }
        state.clients.retain(|(_, client)| client.strong_count() > 0);
        let client = Arc::new(ClientTls::new(settings.clone(), min, Arc::clone(&self.handshakes)));
        let own = self.own.load();
        let trust = state.roots.of(settings, own.as_deref());
        client.renew(trust, own.as_deref());
        state.clients.push((upstream.into(), Arc::downgrade(&client)));
        Some(client)
    }

    /// How callers are met; none where there is no certificate.
    pub fn server(&self) -> arc_swap::Guard<Option<Arc<ServerTls>>> {
        self.server.load()
    }

    /// Who this service is.
    pub fn own(&self) -> arc_swap::Guard<Option<Arc<Material>>> {
        self.own.load()
    }

    /// Told of everything that was taken.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }

    /// All files to be watched.
    pub fn paths(&self) -> Vec<PathBuf> {
        let state = self.state();
        let own = state.settings.as_ref().map(files::paths).unwrap_or_default();
        let mut paths: Vec<_> = own.into_iter().chain(state.roots.paths().cloned()).collect();
        paths.sort_unstable();
        paths.dedup();
        paths
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Notes why new material was not taken; says so once.
    fn refuse(&mut self, error: MaterialError, pem: Option<Pem>) -> MaterialError {
        let why = error.to_string();
        let news = self.refused.as_deref() != Some(&why) || self.refused_pem != pem;
        if news {
            self.refusals += 1;
            let kept = if self.pem.is_some() { "; what was valid before still holds" } else { "" };
            tracing::error!("the new certificates are refused: {why}{kept}");
        }
        self.refused = Some(why);
        self.refused_pem = pem;
        error
    }

    /// The files of upstreams' roots.
    fn wanted_roots(&self) -> Vec<PathBuf> {
        self.clients.iter().filter_map(|(_, client)| client.upgrade()?.settings.ca.clone()).collect()
    }

    fn expiries(&self, own: Option<&Material>) -> Vec<Expiry> {
        let own = own.into_iter().flat_map(|own| own.expiries.iter().cloned());
        own.chain(self.roots.expiries().cloned()).collect()
    }
}

/// What the agent told, and the revocation lists of a file beside it.
fn with_crl(mut pem: Pem, settings: &config::Identity) -> Result<Pem, MaterialError> {
    pem.crl.extend(files::crl(settings)?);
    Ok(pem)
}
