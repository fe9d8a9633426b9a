//! Tokens of this service's own, which it shows to upstreams: OAuth 2 client credentials (RFC 6749 §4.4).
//!
//! One task per upstream on the control thread fetches; however many calls wait, there is one request at a time. A
//! token is fetched at the start, and renewed ahead of its end for as long as calls use it; one that nobody uses is
//! let go. While the endpoint cannot be had, the token is used to its end.

mod exchange;
mod lifetime;

pub use exchange::NoToken;

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwapOption;
use http::HeaderValue;
use tokio::{
    runtime::Handle,
    sync::{Notify, watch},
    task::JoinHandle,
    time::{Instant, sleep_until, timeout_at},
};

use crate::{config::Oauth2, fetch::Fetcher, rng::Rng};
use lifetime::Lifetime;

/// How long a call waits for a token at most.
const PATIENCE: Duration = Duration::from_secs(6);

/// The token for one upstream, as workers see it.
#[derive(Debug)]
pub struct OwnToken {
    current: ArcSwapOption<Current>,
    started: Instant,
    /// Calls have used the token since it was fetched.
    used: AtomicBool,
    /// The upstream did not take it.
    refused: AtomicBool,
    /// Calls that wait for one.
    waiting: AtomicUsize,
    /// Milliseconds since `started` at which the next try is due after a failure.
    retry_at: AtomicU64,
    /// Counts the fetches that have ended.
    rounds: watch::Sender<u64>,
    wanted: Notify,
    told: Mutex<Told>,
}

#[derive(Debug)]
struct Current {
    field: HeaderValue,
    usable_until: Instant,
}

/// What is shown of it.
#[derive(Clone, Debug, Default)]
pub struct Told {
    pub fetched: u64,
    pub failed: u64,
    /// Why the last request failed, if it did.
    pub error: Option<String>,
}

/// Keeps an [`OwnToken`] current until it is dropped.
#[derive(Debug)]
pub struct Keeper {
    pub token: Arc<OwnToken>,
    pub settings: Oauth2,
    task: JoinHandle<()>,
}

/// There is no token, and in time there will be none.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("no token for it can be had: {why}")]
pub struct Unavailable {
    pub why: String,
    /// When the endpoint is asked again.
    pub retry_after: Duration,
}

impl Keeper {
    /// Starts on `runtime`, the control thread's.
    pub fn start(upstream: &str, settings: &Oauth2, fetcher: &Fetcher, runtime: &Handle) -> Self {
        let token = Arc::new(OwnToken::new());
        let keeping = keep(upstream.to_owned(), settings.clone(), fetcher.clone(), Arc::clone(&token));
        Self { token, settings: settings.clone(), task: runtime.spawn(keeping) }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl OwnToken {
    fn new() -> Self {
        Self {
            current: ArcSwapOption::empty(),
            started: Instant::now(),
            used: AtomicBool::new(false),
            refused: AtomicBool::new(false),
            waiting: AtomicUsize::new(0),
            retry_at: AtomicU64::new(0),
            rounds: watch::Sender::new(0),
            wanted: Notify::new(),
            told: Mutex::default(),
        }
    }

    /// The field to send, if there is a token that is still good.
    pub fn ready(&self, now: Instant) -> Option<HeaderValue> {
        let current = self.current.load();
        let current = current.as_ref().filter(|current| now < current.usable_until)?;
        // Written once per token: the line stays in every worker's cache.
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
            self.wanted.notify_one();
        }
        Some(current.field.clone())
    }

    /// For how long the token there is will still be used.
    pub fn good_for(&self, now: Instant) -> Option<Duration> {
        let usable_until = self.current.load().as_ref()?.usable_until;
        usable_until.checked_duration_since(now).filter(|left| !left.is_zero())
    }

    /// The field to send; waits for the fetch that is under way or due, at most [`PATIENCE`].
    ///
    /// # Errors
    /// [`Unavailable`]: that fetch failed, or does not end in time.
    pub async fn field(&self) -> Result<HeaderValue, Unavailable> {
        let mut rounds = self.rounds.subscribe();
        let now = Instant::now();
        if let Some(field) = self.ready(now) {
            return Ok(field);
        }
        let patience = now + PATIENCE;
        let retry_at = self.started + Duration::from_millis(self.retry_at.load(Ordering::Acquire));
        if retry_at < patience {
            let _waiting = Waiting::new(&self.waiting);
            self.wanted.notify_one();
            // The sender lives in `self`.
            let _ = timeout_at(patience, rounds.changed()).await;
        }
        let now = Instant::now();
        self.ready(now).ok_or_else(|| {
            let error = self.told().error;
            let retry_at = self.started + Duration::from_millis(self.retry_at.load(Ordering::Acquire));
            Unavailable {
                why: error.unwrap_or_else(|| "the token endpoint has not answered yet".to_owned()),
                retry_after: retry_at.saturating_duration_since(now).max(Duration::from_secs(1)),
            }
        })
    }

    /// The upstream answered 401 to a call with this token: it is replaced soon, if it is not new.
    pub fn refused(&self) {
        if !self.refused.swap(true, Ordering::Relaxed) {
            self.wanted.notify_one();
        }
    }

    pub fn told(&self) -> Told {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn since_start(&self) -> Duration {
        self.started.elapsed()
    }
}

struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(waiting: &'a AtomicUsize) -> Self {
        waiting.fetch_add(1, Ordering::AcqRel);
        Self(waiting)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

async fn keep(upstream: String, settings: Oauth2, fetcher: Fetcher, token: Arc<OwnToken>) {
    let mut lifetime = Lifetime::default();
    let mut rng = Rng::new();
    let mut first = true;
    loop {
        token.wait_until_due(&mut lifetime, first).await;
        first = false;
        let asked = token.since_start();
        let granted = exchange::ask(&settings, &fetcher).await;
        let now = token.since_start();
        let error = match granted {
            Ok(granted) => {
                lifetime.succeeded(asked, now, granted.expires_in, rng.unit_f64());
                let usable_until = token.started + lifetime.usable_until();
                token.current.store(Some(Arc::new(Current { field: granted.field, usable_until })));
                token.used.store(false, Ordering::Relaxed);
                token.retry_at.store(0, Ordering::Release);
                None
            }
            Err(error) => {
                lifetime.failed(now, rng.unit_f64());
                let error = error.to_string();
                let retry_in = lifetime.due().saturating_sub(now);
                tracing::warn!(
                    upstream,
                    error,
                    ?retry_in,
                    "no token for this upstream; the old one is used to its end"
                );
                let at = u64::try_from(lifetime.due().as_millis()).unwrap_or(u64::MAX);
                token.retry_at.store(at, Ordering::Release);
                Some(error)
            }
        };
        {
            let mut told = token.told.lock().unwrap_or_else(PoisonError::into_inner);
            if error.is_none() {
                told.fetched += 1
            } else {
                told.failed += 1
            }
            told.error = error;
        }
        token.rounds.send_modify(|rounds| *rounds += 1);
    }
}

impl OwnToken {
    /// Waits until a fetch is due that somebody has a use for.
    async fn wait_until_due(&self, lifetime: &mut Lifetime, first: bool) {
        loop {
            if self.refused.swap(false, Ordering::Relaxed) {
                lifetime.refused(self.since_start());
            }
            tokio::select! {
                () = sleep_until(self.started + lifetime.due()) => {}
                () = self.wanted.notified() => continue,
            }
            let waited_for = self.waiting.load(Ordering::Acquire) > 0;
            if first || waited_for || self.used.load(Ordering::Relaxed) {
                return;
            }
            // Nobody has used the token: whoever comes next asks.
            self.wanted.notified().await;
        }
    }
}
