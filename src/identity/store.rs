//! What holds now: the identity, who is trusted, and what became of the newest files.
//!
//! New material is checked whole before it is taken; what is wrong changes nothing but the status, which says why.
//! Workers read by pointer and never wait.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant, SystemTime},
};

use arc_swap::ArcSwapOption;
use tokio::sync::watch;

use super::{
    counts::Handshakes,
    files,
    material::{self, Expiry, Kind, Material, MaterialError, Pem, Text},
    time::Date,
    tls::{ClientTls, ServerTls, Tickets},
    trust::{Bundle, Trust},
};
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
    /// Roots of upstreams by file: what was read, and what came of it.
    roots: HashMap<PathBuf, Roots>,
    system: Option<Result<Arc<Trust>, String>>,
    /// The warning about each expiry that was given last.
    warned: HashMap<(Kind, String), u8>,
}

#[derive(Debug)]
struct Roots {
    text: Option<Text>,
    trust: Result<Arc<Trust>, String>,
    expiries: Vec<Expiry>,
    /// Why the newest file was refused, where an earlier one holds.
    refused: Option<String>,
}

/// For `/status` and metrics.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Whether this service is to have an identity.
    pub configured: bool,
    pub id: Option<String>,
    pub expiries: Vec<Expiry>,
    /// Why the newest material was refused.
    pub refused: Option<String>,
    pub accepted: u64,
    pub refusals: u64,
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
        let mut changed = state.look_at_roots(now);
        let result = match state.settings.clone() {
            None => Ok(false),
            Some(settings) => self.look_at_own(&mut state, &settings, now),
        };
        changed |= *result.as_ref().unwrap_or(&false);
        if changed {
            self.renew_clients(&mut state);
            self.generation.send_modify(|generation| *generation += 1);
        }
        state.warn(self.own.load().as_deref(), now);
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
                Some(pem) => pem,
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
        let material = match Material::check(&pem, now) {
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
            let trust = state.trust_of(&client.settings, own.as_deref());
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
        let trust = state.trust_of(settings, own.as_deref());
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
        let mut paths: Vec<_> = own.into_iter().chain(state.roots.keys().cloned()).collect();
        paths.sort_unstable();
        paths.dedup();
        paths
    }

    /// Why no calls can be carried for want of a certificate: nothing valid is left.
    pub fn not_ready(&self, now: SystemTime) -> Option<&'static str> {
        self.state().settings.as_ref()?;
        match &*self.own.load() {
            None => Some("there is no valid certificate yet; the log and /status say why"),
            Some(own) if own.own.not_after <= now => {
                Some("the certificate has expired; the log and /status say why there is no newer one")
            }
            Some(_) => None,
        }
    }

    pub fn report(&self) -> Report {
        let own = self.own.load();
        let state = self.state();
        let roots_refused = state.roots.values().find_map(|roots| roots.refused.clone());
        Report {
            configured: state.settings.is_some(),
            id: own.as_ref().map(|own| own.own.to_string()),
            expiries: state.expiries(own.as_deref()),
            refused: state.refused.clone().or(roots_refused),
            accepted: state.accepted,
            refusals: state.refusals,
        }
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

    /// The roots against which an upstream is checked.
    fn trust_of(&mut self, settings: &UpstreamTls, own: Option<&Material>) -> Result<Arc<Trust>, String> {
        match (&settings.ca, settings.mode) {
            (Some(path), _) => {
                if !self.roots.contains_key(path) {
                    self.roots.insert(path.clone(), Roots::new());
                    self.look_at_roots(SystemTime::now());
                }
                self.roots.get(path).map_or(Err("not read yet".to_owned()), |roots| roots.trust.clone())
            }
            (None, TlsMode::Mutual) => own
                .map(|own| Arc::clone(&own.trust))
                .ok_or_else(|| "this service has no valid certificate yet".to_owned()),
            (None, _) => self.system.get_or_insert_with(system_roots).clone(),
        }
    }

    /// Reads the files of upstreams' roots. Whether any changed.
    fn look_at_roots(&mut self, now: SystemTime) -> bool {
        let wanted: Vec<_> =
            self.clients.iter().filter_map(|(_, client)| client.upgrade()?.settings.ca.clone()).collect();
        // One that is being made is not in the list of clients yet.
        self.roots.retain(|path, roots| roots.text.is_none() || wanted.contains(path));
        let mut changed = false;
        for (path, roots) in &mut self.roots {
            let read = files::read_ca(path);
            if let (Ok(text), Some(known)) = (&read, &roots.text)
                && text == known
            {
                roots.refused = None;
                continue;
            }
            let checked = read.and_then(|text| {
                let ca = [(None, text)];
                let trust = material::trust(&ca, None, now)?;
                let expiries = material::trust_expiries(&ca, None);
                let [(_, text)] = ca;
                Ok((text, trust, expiries))
            });
            match checked {
                Ok((text, trust, expiries)) => {
                    *roots = Roots { text: Some(text), trust: Ok(Arc::new(trust)), expiries, refused: None };
                    changed = true;
                }
                Err(error) => {
                    let why = error.to_string();
                    if roots.refused.as_ref() != Some(&why) {
                        tracing::error!("the roots of an upstream are refused: {why}");
                    }
                    roots.refused = Some(why.clone());
                    if roots.text.is_none() {
                        changed |= roots.trust.as_ref().err() != Some(&why);
                        roots.trust = Err(why);
                    }
                }
            }
        }
        changed
    }

    fn expiries(&self, own: Option<&Material>) -> Vec<Expiry> {
        let own = own.into_iter().flat_map(|own| own.expiries.iter().cloned());
        own.chain(self.roots.values().flat_map(|roots| roots.expiries.iter().cloned())).collect()
    }

    /// Warns of what will expire, at each step once.
    fn warn(&mut self, own: Option<&Material>, now: SystemTime) {
        for expiry in self.expiries(own) {
            let urgency = expiry.urgency(now);
            let Expiry { kind, what, at, .. } = expiry;
            let known = self.warned.entry((kind, what.clone())).or_default();
            if urgency > *known {
                *known = urgency;
                match urgency {
                    4 => tracing::error!("the {} {what} expired on {}", kind.word(), Date(at)),
                    _ => tracing::warn!("the {} {what} expires on {}: renew it", kind.word(), Date(at)),
                }
            }
        }
    }
}

impl Roots {
    fn new() -> Self {
        Self { text: None, trust: Err("not read yet".to_owned()), expiries: Vec::new(), refused: None }
    }
}

fn system_roots() -> Result<Arc<Trust>, String> {
    let found = rustls_native_certs::load_native_certs();
    let anchors: Vec<_> = found
        .certs
        .iter()
        .filter_map(|certificate| webpki::anchor_from_trusted_cert(certificate).ok().map(|a| a.to_owned()))
        .collect();
    if anchors.is_empty() {
        return Err(
            "this system has no root certificates (package ca-certificates); name a file by `ca`".to_owned()
        );
    }
    let bundle = Bundle { trust_domain: None, source: "the system's roots".into(), anchors };
    Ok(Arc::new(Trust::new(vec![bundle], Vec::new())))
}
