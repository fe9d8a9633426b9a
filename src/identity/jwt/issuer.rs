//! The keys of an issuer, kept current on the control thread and read by all workers.
//!
//! What was read last stays in use for as long as nothing newer can be had. A token that names a key which is not
//! known may be signed by a new one: then the call waits for one fetch, which all such calls share, and which begins
//! at most once in [`MIN_INTERVAL`](super::refresh::MIN_INTERVAL) whatever callers send.

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
    refresh::{Refresh, freshness},
};
use crate::{
    config,
    fetch::{FetchError, Fetcher, Limits},
    rng::Rng,
    watch::{Watcher, watch as watch_files},
};

/// What a fetch may take.
const LIMITS: Limits = Limits { patience: Duration::from_secs(5), answer: 512 * 1024 };
/// How long a call waits for newer keys.
const PATIENCE: Duration = Duration::from_secs(6);
/// Calls that wait at a time; more are answered at once.
const MAX_WAITING: usize = 256;

/// What workers see of an issuer.
#[derive(Debug)]
pub struct Issuer {
    current: ArcSwapOption<KeySet>,
    started: Instant,
    /// Milliseconds since `started` from when on a fetch may begin because somebody asks.
    allowed: AtomicU64,
    /// Counts the fetches that have ended.
    rounds: watch::Sender<u64>,
    wanted: Notify,
    waiting: AtomicUsize,
    told: Mutex<Told>,
}

/// What is shown of an issuer.
#[derive(Clone, Debug, Default)]
pub struct Told {
    /// Fetches that brought keys, and that failed.
    pub fetched: u64,
    pub failed: u64,
    /// When keys were last brought.
    pub last: Option<Instant>,
    /// Why the last fetch failed, if it did.
    pub error: Option<String>,
}

/// Keeps an [`Issuer`] current until it is dropped.
#[derive(Debug)]
pub struct Watch {
    pub issuer: Arc<Issuer>,
    settings: config::Jwt,
    _source: Source,
}

/// Where keys come from, as what keeps looking there.
#[derive(Debug)]
enum Source {
    Url(JoinHandle<()>),
    /// None where no thread could be started.
    File(#[expect(dead_code, reason = "it watches until it is dropped")] Option<Watcher>),
}

/// Why there are no new keys.
#[derive(Debug, thiserror::Error)]
enum NoKeys {
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error("`{0}` is not a URL")]
    Url(String),
    #[error("it answered with {0}")]
    Status(StatusCode),
    #[error(transparent)]
    Keys(#[from] super::keys::KeysError),
}

impl Watch {
    /// Starts on `runtime`, the control thread's.
    pub fn start(settings: &config::Jwt, fetcher: &Fetcher, runtime: &Handle) -> Self {
        let issuer = Arc::new(Issuer::new());
        let source = if settings.jwks.expose().starts_with('/') {
            let (path, mut known) = (PathBuf::from(settings.jwks.expose()), None);
            look(&path, &mut known, &issuer);
            // A look that a call asks for brings nothing that the watch does not.
            issuer.allowed.store(u64::MAX, Ordering::Release);
            let (files, fed) = ([path.clone()], Arc::clone(&issuer));
            let watching = watch_files("jwks-watch", &files, move |_| look(&path, &mut known, &fed));
            Source::File(
                watching.inspect_err(|error| tracing::error!(%error, "the keys are not watched")).ok(),
            )
        } else {
            Source::Url(runtime.spawn(keep(settings.clone(), fetcher.clone(), Arc::clone(&issuer))))
        };
        Self { issuer, settings: settings.clone(), _source: source }
    }

    /// Whether keys come from the same place as under other settings.
    pub fn serves(&self, settings: &config::Jwt) -> bool {
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
            allowed: AtomicU64::new(0),
            rounds: watch::Sender::new(0),
            wanted: Notify::new(),
            waiting: AtomicUsize::new(0),
            told: Mutex::default(),
        }
    }

    /// The keys as of now; `None`: none were ever had.
    pub fn keys(&self) -> Option<Arc<KeySet>> {
        self.current.load_full()
    }

    pub fn told(&self) -> Told {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for newer keys than those of `generation` (0: any). `None`: there are none, or none can be had now.
    pub async fn newer(&self, generation: u64) -> Option<Arc<KeySet>> {
        let newer = || self.keys().filter(|keys| keys.generation != generation);
        let mut rounds = self.rounds.subscribe();
        if let Some(keys) = newer() {
            return Some(keys);
        }
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        if now < self.allowed.load(Ordering::Acquire) {
            return None;
        }
        let _waiting = Waiting::among(&self.waiting)?;
        self.wanted.notify_one();
        // The sender lives in `self`.
        let _ = timeout(PATIENCE, rounds.changed()).await;
        newer()
    }

    fn take(&self, keys: KeySet) {
        for skipped in &keys.skipped {
            tracing::warn!("a key of the token issuer is left out: {skipped}");
        }
        self.current.store(Some(Arc::new(keys)));
    }

    fn ended(&self, error: Option<String>) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        match &error {
            None => {
                told.fetched += 1;
                told.last = Some(Instant::now());
            }
            Some(_) => told.failed += 1,
        }
        told.error = error;
        drop(told);
        self.rounds.send_modify(|rounds| *rounds += 1);
    }
}

/// One of the calls that wait, until it is dropped.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn among(waiting: &'a AtomicUsize) -> Option<Self> {
        let this = Self(waiting);
        (waiting.fetch_add(1, Ordering::Relaxed) < MAX_WAITING).then_some(this)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn keep(settings: config::Jwt, fetcher: Fetcher, issuer: Arc<Issuer>) {
    let mut refresh = Refresh::default();
    let mut rng = Rng::new();
    loop {
        tokio::select! {
            () = sleep_until(issuer.started + refresh.due()) => {}
            () = issuer.wanted.notified() => {
                if issuer.started.elapsed() < refresh.allowed() {
                    continue;
                }
            }
        }
        refresh.begin(issuer.started.elapsed());
        let fetched = fetch(&settings, &fetcher).await;
        let now = issuer.started.elapsed();
        let error = match fetched {
            Ok((keys, fresh)) => {
                issuer.take(keys);
                refresh.succeeded(now, fresh, rng.unit_f64());
                None
            }
            Err(error) => {
                refresh.failed(now, rng.unit_f64());
                let error = error.to_string();
                tracing::warn!(
                    jwks = %settings.jwks,
                    error,
                    retry_in = ?refresh.due().saturating_sub(now),
                    "the keys of the token issuer cannot be fetched; what is known of them stays in use"
                );
                Some(error)
            }
        };
        let allowed = u64::try_from(refresh.allowed().as_millis()).unwrap_or(u64::MAX);
        issuer.allowed.store(allowed, Ordering::Release);
        issuer.ended(error);
    }
}

async fn fetch(settings: &config::Jwt, fetcher: &Fetcher) -> Result<(KeySet, Option<Duration>), NoKeys> {
    let request =
        Request::get(settings.jwks.expose()).header(ACCEPT, "application/jwk-set+json, application/json");
    let request = request.body(Bytes::new()).map_err(|_| NoKeys::Url(settings.jwks.to_string()))?;
    // Read anew each time: it may have been replaced.
    let trusting = settings.ca.as_deref().map(|ca| fetcher.trusting(ca)).transpose()?;
    let answer = trusting.as_ref().unwrap_or(fetcher).fetch(request, LIMITS).await?;
    if answer.status() != StatusCode::OK {
        return Err(NoKeys::Status(answer.status()));
    }
    Ok((KeySet::parse(answer.body())?, freshness(answer.headers())))
}

/// Reads keys from a file whenever it has changed.
fn look(path: &Path, known: &mut Option<Result<Vec<u8>, String>>, issuer: &Issuer) {
    let read = read_file(path).map_err(|error| error.to_string());
    if known.as_ref() == Some(&read) {
        return;
    }
    let outcome = match &read {
        Ok(content) => KeySet::parse(content).map_err(|error| error.to_string()),
        Err(error) => Err(error.clone()),
    };
    let error = outcome.map(|keys| issuer.take(keys)).err();
    if let Some(error) = &error {
        tracing::warn!(
            jwks = %path.display(),
            error,
            "the keys of the token issuer cannot be read; what is known of them stays in use"
        );
    }
    *known = Some(read);
    issuer.ended(error);
}

fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    // One byte more than allowed tells a file of just that size from a larger one.
    File::open(path)?.take(LIMITS.answer as u64 + 1).read_to_end(&mut content)?;
    if content.len() > LIMITS.answer {
        return Err(io::Error::other(format!("larger than {} bytes", LIMITS.answer)));
    }
    Ok(content)
}
