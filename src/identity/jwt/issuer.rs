//! The keys of a token issuer, refreshed on the control thread and read by all workers.
//!
//! The last keys stay in use until newer ones arrive. A token with an unknown key ID may be signed with a new key:
//! the request then waits for one fetch, which all such requests share. Fetches start at most once in
//! [`MIN_INTERVAL`](super::refresh::MIN_INTERVAL), whatever clients send.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use http::{Request, StatusCode, header::ACCEPT};
use tokio::{
    runtime::Handle,
    sync::{Notify, watch},
    task::JoinHandle,
    time::{Instant, sleep_until, timeout},
};

use super::{
    keys::KeySet,
    refresh::{RefreshSchedule, freshness},
};
use crate::{
    config,
    fetch::{FetchError, FetchLimits, Fetcher},
    rng::Rng,
    watch::{Watcher, watch as watch_files},
};

/// Limits of one fetch.
const LIMITS: FetchLimits = FetchLimits { timeout: Duration::from_secs(5), max_body: 512 * 1024 };
/// How long a request waits for newer keys.
const KEYS_TIMEOUT: Duration = Duration::from_secs(6);
/// Most requests that wait at a time; more get a response at once.
const MAX_WAITERS: usize = 256;

/// The current keys of an issuer, shared with all workers.
#[derive(Debug)]
pub struct Issuer {
    current: ArcSwapOption<KeySet>,
    started: Instant,
    /// The earliest start of a fetch on demand, in milliseconds since `started`.
    earliest: AtomicU64,
    /// Counts finished fetches.
    rounds: watch::Sender<u64>,
    wanted: Notify,
    waiters: AtomicUsize,
    report: Mutex<IssuerReport>,
}

/// The state of an issuer, for `/status` and metrics.
#[derive(Clone, Debug, Default)]
pub struct IssuerReport {
    /// Successful and failed fetches.
    pub fetched: u64,
    pub failed: u64,
    /// When keys were last fetched.
    pub last_success: Option<Instant>,
    /// Why the last fetch failed, if it did.
    pub error: Option<String>,
}

/// Refreshes an [`Issuer`] until it is dropped.
#[derive(Debug)]
pub struct KeyRefresher {
    pub issuer: Arc<Issuer>,
    settings: config::Jwt,
    _source: Source,
}

/// What refreshes the keys: a task or a file watcher.
#[derive(Debug)]
enum Source {
    Url(JoinHandle<()>),
    /// `None` if no thread could be started.
    File(#[expect(dead_code, reason = "it watches until it is dropped")] Option<Watcher>),
}

/// Why a fetch of keys failed.
#[derive(Debug, thiserror::Error)]
enum FetchKeysError {
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error("`{0}` is not a URL")]
    Url(String),
    #[error("the server responded with {0}")]
    Status(StatusCode),
    #[error(transparent)]
    Keys(#[from] super::keys::KeysError),
}

impl KeyRefresher {
    /// Starts on `runtime`, the control thread's.
    pub fn start(settings: &config::Jwt, fetcher: &Fetcher, runtime: &Handle) -> Self {
        let issuer = Arc::new(Issuer::new());
        let source = if settings.jwks.expose().starts_with('/') {
            let (path, mut known) = (PathBuf::from(settings.jwks.expose()), None);
            reload_file(&path, &mut known, &issuer);
            // The watcher sees every change, so requests never trigger a read.
            issuer.earliest.store(u64::MAX, Ordering::Release);
            let (files, watched_issuer) = ([path.clone()], Arc::clone(&issuer));
            let watching =
                watch_files("jwks-watch", &files, move |_| reload_file(&path, &mut known, &watched_issuer));
            Source::File(
                watching.inspect_err(|error| tracing::error!(%error, "cannot watch the JWKS file")).ok(),
            )
        } else {
            Source::Url(runtime.spawn(refresh_loop(settings.clone(), fetcher.clone(), Arc::clone(&issuer))))
        };
        Self { issuer, settings: settings.clone(), _source: source }
    }

    /// Whether `settings` have the same key source.
    pub fn has_same_source(&self, settings: &config::Jwt) -> bool {
        self.settings.jwks == settings.jwks && self.settings.ca == settings.ca
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        if let Self::Url(task) = self {
            task.abort();
        }
    }
}

impl Issuer {
    fn new() -> Self {
        Self {
            current: ArcSwapOption::empty(),
            started: Instant::now(),
            earliest: AtomicU64::new(0),
            rounds: watch::Sender::new(0),
            wanted: Notify::new(),
            waiters: AtomicUsize::new(0),
            report: Mutex::default(),
        }
    }

    /// The current keys; `None`: none have been fetched yet.
    pub fn keys(&self) -> Option<Arc<KeySet>> {
        self.current.load_full()
    }

    pub fn report(&self) -> IssuerReport {
        self.report.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for newer keys than those of `generation` (0: any). `None`: there are none, or no fetch is allowed now.
    pub async fn wait_for_newer_keys(&self, generation: u64) -> Option<Arc<KeySet>> {
        let newer = || self.keys().filter(|keys| keys.generation != generation);
        let mut rounds = self.rounds.subscribe();
        if let Some(keys) = newer() {
            return Some(keys);
        }
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        if now < self.earliest.load(Ordering::Acquire) {
            return None;
        }
        let _waiter = Waiter::register(&self.waiters)?;
        self.wanted.notify_one();
        // The sender lives in `self`.
        let _ = timeout(KEYS_TIMEOUT, rounds.changed()).await;
        newer()
    }

    fn set_keys(&self, keys: KeySet) {
        for skipped in &keys.skipped {
            tracing::warn!("key of the token issuer ignored: {skipped}");
        }
        self.current.store(Some(Arc::new(keys)));
    }

    fn finish_fetch(&self, error: Option<String>) {
        let mut report = self.report.lock().unwrap_or_else(PoisonError::into_inner);
        match &error {
            None => {
                report.fetched += 1;
                report.last_success = Some(Instant::now());
            }
            Some(_) => report.failed += 1,
        }
        report.error = error;
        drop(report);
        self.rounds.send_modify(|rounds| *rounds += 1);
    }
}

/// Counts one waiting request until it is dropped.
struct Waiter<'a>(&'a AtomicUsize);

impl<'a> Waiter<'a> {
    fn register(waiters: &'a AtomicUsize) -> Option<Self> {
        let this = Self(waiters);
        (waiters.fetch_add(1, Ordering::Relaxed) < MAX_WAITERS).then_some(this)
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn refresh_loop(settings: config::Jwt, fetcher: Fetcher, issuer: Arc<Issuer>) {
    let mut refresh = RefreshSchedule::default();
    let mut rng = Rng::new();
    loop {
        tokio::select! {
            () = sleep_until(issuer.started + refresh.due()) => {}
            () = issuer.wanted.notified() => {
                if issuer.started.elapsed() < refresh.earliest_start() {
                    continue;
                }
            }
        }
        refresh.record_start(issuer.started.elapsed());
        let fetched = fetch(&settings, &fetcher).await;
        let now = issuer.started.elapsed();
        let error = match fetched {
            Ok((keys, fresh)) => {
                issuer.set_keys(keys);
                refresh.record_success(now, fresh, rng.unit_f64());
                None
            }
            Err(error) => {
                refresh.record_failure(now, rng.unit_f64());
                let error = error.to_string();
                tracing::warn!(
                    jwks = %settings.jwks,
                    error,
                    retry_in = ?refresh.due().saturating_sub(now),
                    "the keys of the token issuer cannot be fetched; the last known keys stay in use"
                );
                Some(error)
            }
        };
        let earliest = u64::try_from(refresh.earliest_start().as_millis()).unwrap_or(u64::MAX);
        issuer.earliest.store(earliest, Ordering::Release);
        issuer.finish_fetch(error);
    }
}

async fn fetch(
    settings: &config::Jwt,
    fetcher: &Fetcher,
) -> Result<(KeySet, Option<Duration>), FetchKeysError> {
    let request =
        Request::get(settings.jwks.expose()).header(ACCEPT, "application/jwk-set+json, application/json");
    let request = request.body(Bytes::new()).map_err(|_| FetchKeysError::Url(settings.jwks.to_string()))?;
    // The CA file is read each time: it may have been replaced.
    let trusting = settings.ca.as_deref().map(|ca| fetcher.with_roots_from(ca)).transpose()?;
    let answer = trusting.as_ref().unwrap_or(fetcher).fetch(request, LIMITS).await?;
    if answer.status() != StatusCode::OK {
        return Err(FetchKeysError::Status(answer.status()));
    }
    Ok((KeySet::parse(answer.body())?, freshness(answer.headers())))
}

/// Reads keys from the file if it has changed.
fn reload_file(path: &Path, known: &mut Option<Result<Vec<u8>, String>>, issuer: &Issuer) {
    let read = read_file(path).map_err(|error| error.to_string());
    if known.as_ref() == Some(&read) {
        return;
    }
    let outcome = match &read {
        Ok(content) => KeySet::parse(content).map_err(|error| error.to_string()),
        Err(error) => Err(error.clone()),
    };
    let error = outcome.map(|keys| issuer.set_keys(keys)).err();
    if let Some(error) = &error {
        tracing::warn!(
            jwks = %path.display(),
            error,
            "the keys of the token issuer cannot be read; the last known keys stay in use"
        );
    }
    *known = Some(read);
    issuer.finish_fetch(error);
}

fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    // One byte more than allowed distinguishes a file of exactly that size from a larger one.
    File::open(path)?.take(LIMITS.max_body as u64 + 1).read_to_end(&mut content)?;
    if content.len() > LIMITS.max_body {
        return Err(io::Error::other(format!("larger than {} bytes", LIMITS.max_body)));
    }
    Ok(content)
}
