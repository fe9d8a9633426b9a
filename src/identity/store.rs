//! The identity and trusted roots in use, and the result of the last reload.
//!
//! New material is checked as a whole before it is used. Invalid material changes only the status, which says why.
//! Workers read through an atomic pointer and never wait.

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
    material::{CertificateUses, EncodedIdentity, Expiry, Material, MaterialError},
    time::Date,
    tls::{ClientTls, ServerTls, Tickets},
};
pub use report::IdentityReport;

use crate::config::{self, Config, MinTls, TlsMode, UpstreamTls};

/// How long startup waits for missing files.
const STARTUP_WAIT: Duration = Duration::from_secs(10);
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// All certificate state shared between threads.
#[derive(Debug)]
pub struct IdentityStore {
    material: ArcSwapOption<Material>,
    server: ArcSwapOption<ServerTls>,
    pub handshakes: Arc<Handshakes>,
    /// Counts accepted changes. Open connections then re-verify their peers.
    generation: watch::Sender<u64>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    settings: Option<config::Identity>,
    uses: CertificateUses,
    /// The last delivery of the Workload API.
    delivered: Option<EncodedIdentity>,
    /// Why the Workload API is unavailable now.
    agent_error: Option<String>,
    /// The source of the material in use.
    source: Option<EncodedIdentity>,
    /// The source that was rejected last, so that the rejection is logged once.
    rejected_source: Option<EncodedIdentity>,
    rejection: Option<String>,
    accepted: u64,
    rejections: u64,
    tickets: Option<Tickets>,
    clients: Vec<(Arc<str>, Weak<ClientTls>)>,
    roots: roots::UpstreamRoots,
    warned: report::ExpiryWarnings,
}

impl Default for IdentityStore {
    fn default() -> Self {
        Self {
            material: ArcSwapOption::empty(),
            server: ArcSwapOption::empty(),
            handshakes: Arc::default(),
            generation: watch::Sender::new(0),
            state: Mutex::default(),
        }
    }
}

impl IdentityStore {
    /// Calls [`configure`](Self::configure) at startup and waits for missing files, as before a CSI driver has filled
    /// its volume.
    ///
    /// # Errors
    ///
    /// Why a configured identity could not be loaded.
    pub async fn start(&self, config: &Config) -> Result<(), MaterialError> {
        let started = Instant::now();
        let mut outcome = self.configure(config);
        while let Err(error) = &outcome
            && error.is_missing()
            && started.elapsed() < STARTUP_WAIT
        {
            tokio::time::sleep(POLL_INTERVAL).await;
            outcome = self.reload();
        }
        outcome
    }

    /// Applies the settings of a configuration and reads their files.
    ///
    /// # Errors
    ///
    /// Why the files were rejected. An earlier identity stays in use.
    pub fn configure(&self, config: &Config) -> Result<(), MaterialError> {
        let mut state = self.state();
        if state.settings != config.identity {
            state.settings.clone_from(&config.identity);
            // The same content must be processed again under the new settings.
            state.source = None;
            state.rejected_source = None;
            state.delivered = None;
            state.agent_error = None;
        }
        let uses = CertificateUses::from_config(config);
        if state.uses != uses {
            state.uses = uses;
            if self.material.load().as_ref().is_none_or(|own| own.unusable.is_some()) {
                // It was checked for the old uses only.
                state.source = None;
                state.rejected_source = None;
            }
        }
        if config.identity.is_none() {
            self.material.store(None);
            self.server.store(None);
            state.rejection = None;
        }
        drop(state);
        self.reload()
    }

    /// The socket of the Workload API, if certificates come from there.
    pub fn agent_socket(&self) -> Option<String> {
        self.state().settings.as_ref()?.spiffe.clone()
    }

    /// Applies a delivery of the Workload API. Errors are logged before this returns.
    pub fn deliver(&self, pem: EncodedIdentity) {
        let mut state = self.state();
        state.delivered = Some(pem);
        state.agent_error = None;
        drop(state);
        let _ = self.reload();
    }

    /// Records that the Workload API is unavailable. Its last delivery stays in use until it expires.
    pub fn agent_unavailable(&self, reason: String) {
        let mut state = self.state();
        if state.agent_error.as_ref() != Some(&reason) {
            let consequence =
                if state.source.is_some() { "; the last certificates it delivered stay in use" } else { "" };
            tracing::warn!("{reason}{consequence}");
        }
        state.rejection = Some(reason.clone());
        state.agent_error = Some(reason);
    }

    /// Reads the files again and applies changes.
    ///
    /// # Errors
    ///
    /// Why the identity's files were rejected. The earlier ones stay in use, and the status says so.
    pub fn reload(&self) -> Result<(), MaterialError> {
        let mut state = self.state();
        let now = SystemTime::now();
        let wanted = state.root_paths();
        let mut changed = state.roots.reload(&wanted, now);
        let result = match state.settings.clone() {
            None => Ok(false),
            Some(settings) => self.reload_identity(&mut state, &settings, now),
        };
        changed |= *result.as_ref().unwrap_or(&false);
        if changed {
            self.update_clients(&mut state);
            self.generation.send_modify(|generation| *generation += 1);
        }
        let expiries = state.expiries(self.material.load().as_deref());
        state.warned.warn(expiries, now);
        result.map(drop)
    }

    /// Reloads the identity. Returns whether it changed.
    fn reload_identity(
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
        if state.source.as_ref() == Some(&pem) {
            // Unchanged, or back to the files in use.
            state.rejection = state.agent_error.clone();
            state.rejected_source = None;
            return Ok(false);
        }
        let material = match Material::check(&pem, state.uses, now) {
            Ok(material) => material,
            Err(error) => return Err(state.refuse(error, Some(pem))),
        };
        let trust_changed = state.source.as_ref().is_none_or(|old| old.ca != pem.ca || old.crl != pem.crl);
        self.apply(state, material, settings.min_tls, trust_changed);
        state.source = Some(pem);
        Ok(true)
    }

    fn apply(&self, state: &mut State, material: Material, min: MinTls, trust_changed: bool) {
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
            Err(error) => tracing::error!(%error, "cannot set up TLS for inbound connections"),
        }
        tracing::info!(
            identity = %material.identity,
            expires = %Date(material.identity.not_after),
            trusted = %material.trust,
            "certificate loaded"
        );
        if let Some(limitation) = material.limitation() {
            tracing::warn!("{limitation}");
        }
        self.material.store(Some(Arc::new(material)));
        state.accepted += 1;
        state.rejection = None;
        state.rejected_source = None;
        state.warned.clear();
    }

    fn update_clients(&self, state: &mut State) {
        let own = self.material.load();
        state.clients.retain(|(_, client)| client.strong_count() > 0);
        let clients: Vec<_> = state.clients.iter().filter_map(|(_, client)| client.upgrade()).collect();
        for client in clients {
            let trust = state.roots.for_upstream(&client.settings, own.as_deref());
            client.update(trust, own.as_deref());
        }
    }

    /// The client TLS of an upstream. The same object is returned for the same settings, so its connections stay open.
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
        let own = self.material.load();
        let trust = state.roots.for_upstream(settings, own.as_deref());
        client.update(trust, own.as_deref());
        state.clients.push((upstream.into(), Arc::downgrade(&client)));
        Some(client)
    }

    /// The server TLS; `None` without a certificate.
    pub fn server(&self) -> arc_swap::Guard<Option<Arc<ServerTls>>> {
        self.server.load()
    }

    /// The identity of this service.
    pub fn material(&self) -> arc_swap::Guard<Option<Arc<Material>>> {
        self.material.load()
    }

    /// Notified of every accepted change.
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
    /// Records why new material was rejected; logs it once.
    fn refuse(&mut self, error: MaterialError, pem: Option<EncodedIdentity>) -> MaterialError {
        let reason = error.to_string();
        let is_new = self.rejection.as_deref() != Some(&reason) || self.rejected_source != pem;
        if is_new {
            self.rejections += 1;
            let consequence = if self.source.is_some() { "; the previous ones stay in use" } else { "" };
            tracing::error!("new certificates rejected: {reason}{consequence}");
        }
        self.rejection = Some(reason);
        self.rejected_source = pem;
        error
    }

    /// The files of upstreams' roots.
    fn root_paths(&self) -> Vec<PathBuf> {
        self.clients.iter().filter_map(|(_, client)| client.upgrade()?.settings.ca.clone()).collect()
    }

    fn expiries(&self, own: Option<&Material>) -> Vec<Expiry> {
        let own = own.into_iter().flat_map(|own| own.expiries.iter().cloned());
        own.chain(self.roots.expiries().cloned()).collect()
    }
}

/// Adds the revocation lists of the `crl` file to the agent's delivery.
fn with_crl(mut pem: EncodedIdentity, settings: &config::Identity) -> Result<EncodedIdentity, MaterialError> {
    pem.crl.extend(files::read_crl(settings)?);
    Ok(pem)
}
