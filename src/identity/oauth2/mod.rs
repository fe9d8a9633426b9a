//! Access tokens that this service presents to upstreams: OAuth 2 client credentials (RFC 6749 §4.4).
//!
//! One task per upstream on the control thread fetches; however many requests wait, there is one fetch at a time. A
//! token is fetched at startup and renewed before it expires while requests use it; an unused one is left to expire.
//! While the token endpoint is unavailable, the token is used until it expires.

mod exchange;
mod lifetime;

pub use exchange::TokenRequestError;

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

/// How long a request waits for a token at most.
const TOKEN_TIMEOUT: Duration = Duration::from_secs(6);

/// The token for one upstream, as workers see it.
#[derive(Debug)]
pub struct UpstreamToken {
    current: ArcSwapOption<CurrentToken>,
    started: Instant,
    /// Whether requests have used the token since it was fetched.
    used: AtomicBool,
    /// Whether the upstream rejected it.
    rejected: AtomicBool,
    /// Requests that wait for a token.
    waiters: AtomicUsize,
    /// When the next fetch is due after a failure, in milliseconds since `started`.
    retry_at: AtomicU64,
    /// Counts finished fetches.
    rounds: watch::Sender<u64>,
    wanted: Notify,
    report: Mutex<TokenReport>,
}

#[derive(Debug)]
struct CurrentToken {
    field: HeaderValue,
    usable_until: Instant,
}

/// The state of a token, for `/status` and metrics.
#[derive(Clone, Debug, Default)]
pub struct TokenReport {
    pub fetched: u64,
    pub failed: u64,
    /// Why the last request failed, if it did.
    pub error: Option<String>,
}

/// Renews an [`UpstreamToken`] until it is dropped.
#[derive(Debug)]
pub struct TokenRenewer {
    pub token: Arc<UpstreamToken>,
    pub settings: Oauth2,
    task: JoinHandle<()>,
}

/// There is no token, and none will arrive in time.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot get an access token for it: {reason}")]
pub struct TokenUnavailable {
    pub reason: String,
    /// When the next fetch is due.
    pub retry_after: Duration,
}

impl TokenRenewer {
    /// Starts on `runtime`, the control thread's.
    pub fn start(upstream: &str, settings: &Oauth2, fetcher: &Fetcher, runtime: &Handle) -> Self {
        let token = Arc::new(UpstreamToken::new());
        let renewing = renew_loop(upstream.to_owned(), settings.clone(), fetcher.clone(), Arc::clone(&token));
        Self { token, settings: settings.clone(), task: runtime.spawn(renewing) }
    }
}

impl Drop for TokenRenewer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl UpstreamToken {
    fn new() -> Self {
        Self {
            current: ArcSwapOption::empty(),
            started: Instant::now(),
            used: AtomicBool::new(false),
            rejected: AtomicBool::new(false),
            waiters: AtomicUsize::new(0),
            retry_at: AtomicU64::new(0),
            rounds: watch::Sender::new(0),
            wanted: Notify::new(),
            report: Mutex::default(),
        }
    }

    /// The field value to send, if there is a valid token.
    pub fn current_field(&self, now: Instant) -> Option<HeaderValue> {
        let current = self.current.load();
        let current = current.as_ref().filter(|current| now < current.usable_until)?;
        // Written once per token, so the cache line stays shared between workers.
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
            self.wanted.notify_one();
        }
        Some(current.field.clone())
    }

    /// How long the current token will still be used.
    pub fn valid_for(&self, now: Instant) -> Option<Duration> {
        let usable_until = self.current.load().as_ref()?.usable_until;
        usable_until.checked_duration_since(now).filter(|left| !left.is_zero())
    }

    /// The field value to send; waits for the current or due fetch, at most [`TOKEN_TIMEOUT`].
    ///
    /// # Errors
    /// [`TokenUnavailable`]: that fetch failed, or does not finish in time.
    pub async fn wait_for_field(&self) -> Result<HeaderValue, TokenUnavailable> {
        let mut rounds = self.rounds.subscribe();
        let now = Instant::now();
        if let Some(field) = self.current_field(now) {
            return Ok(field);
        }
        let give_up_at = now + TOKEN_TIMEOUT;
        let retry_at = self.started + Duration::from_millis(self.retry_at.load(Ordering::Acquire));
        if retry_at < give_up_at {
            let _waiter = Waiter::new(&self.waiters);
            self.wanted.notify_one();
            // The sender lives in `self`.
            let _ = timeout_at(give_up_at, rounds.changed()).await;
        }
        let now = Instant::now();
        self.current_field(now).ok_or_else(|| {
            let error = self.report().error;
            let retry_at = self.started + Duration::from_millis(self.retry_at.load(Ordering::Acquire));
            TokenUnavailable {
                reason: error.unwrap_or_else(|| "the token endpoint has not responded yet".to_owned()),
                retry_after: retry_at.saturating_duration_since(now).max(Duration::from_secs(1)),
            }
        })
    }

    /// Records a 401 from the upstream for a request with this token: it is replaced soon, unless it is new.
    pub fn report_unauthorized(&self) {
        if !self.rejected.swap(true, Ordering::Relaxed) {
            self.wanted.notify_one();
        }
    }

    pub fn report(&self) -> TokenReport {
        self.report.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn since_start(&self) -> Duration {
        self.started.elapsed()
    }
}

struct Waiter<'a>(&'a AtomicUsize);

impl<'a> Waiter<'a> {
    fn new(waiters: &'a AtomicUsize) -> Self {
        waiters.fetch_add(1, Ordering::AcqRel);
        Self(waiters)
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

async fn renew_loop(upstream: String, settings: Oauth2, fetcher: Fetcher, token: Arc<UpstreamToken>) {
    let mut lifetime = Lifetime::default();
    let mut rng = Rng::new();
    let mut first = true;
    loop {
        token.wait_until_due(&mut lifetime, first).await;
        first = false;
        let requested = token.since_start();
        let granted = exchange::request_token(&settings, &fetcher).await;
        let now = token.since_start();
        let error = match granted {
            Ok(granted) => {
                lifetime.record_success(requested, now, granted.expires_in, rng.unit_f64());
                let usable_until = token.started + lifetime.usable_until();
                token.current.store(Some(Arc::new(CurrentToken { field: granted.field, usable_until })));
                token.used.store(false, Ordering::Relaxed);
                token.retry_at.store(0, Ordering::Release);
                None
            }
            Err(error) => {
                lifetime.record_failure(now, rng.unit_f64());
                let error = error.to_string();
                let retry_in = lifetime.due().saturating_sub(now);
                tracing::warn!(
                    upstream,
                    error,
                    ?retry_in,
                    "cannot get an access token for this upstream; the current one is used until it expires"
                );
                let at = u64::try_from(lifetime.due().as_millis()).unwrap_or(u64::MAX);
                token.retry_at.store(at, Ordering::Release);
                Some(error)
            }
        };
        {
            let mut report = token.report.lock().unwrap_or_else(PoisonError::into_inner);
            if error.is_none() {
                report.fetched += 1
            } else {
                report.failed += 1
            }
            report.error = error;
        }
        token.rounds.send_modify(|rounds| *rounds += 1);
    }
}

impl UpstreamToken {
    /// Waits until a fetch is due and a request needs the token.
    async fn wait_until_due(&self, lifetime: &mut Lifetime, first: bool) {
        loop {
            if self.rejected.swap(false, Ordering::Relaxed) {
                lifetime.record_rejection(self.since_start());
            }
            tokio::select! {
                () = sleep_until(self.started + lifetime.due()) => {}
                () = self.wanted.notified() => continue,
            }
            let has_waiters = self.waiters.load(Ordering::Acquire) > 0;
            if first || has_waiters || self.used.load(Ordering::Relaxed) {
                return;
            }
            // No request has used the token: the next one triggers the fetch.
            self.wanted.notified().await;
        }
    }
}
