//! The clocks of a request until response headers: `timeout`, `attempt_timeout`, the client's deadline.
//!
//! They need no timer of their own: the task that runs the request polls it when [`Progress`] says so.

use std::{
    future::{Future, poll_fn},
    pin::Pin,
    task::Poll,
    time::Duration,
};

use tokio::time::{Instant, timeout_at};

use super::{error::ProxyError, progress::Progress};
use crate::{
    cause::Cause,
    config::AttemptTimeout,
    resilience::{
        classify::OutcomeKind,
        deadline::{self, Deadline, DeadlineLimit},
    },
};

/// Which limit has expired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeLimit {
    Limit(DeadlineLimit),
    /// Nothing of the request's body moved for `idle_timeout`.
    Upload,
    /// `max_duration`.
    Whole,
}

impl TimeLimit {
    /// The outcome for the endpoint, the cause for the client, and the name of the limit.
    pub fn meaning(self) -> (OutcomeKind, Cause, &'static str) {
        match self {
            Self::Limit(DeadlineLimit::Attempt) => {
                (OutcomeKind::AttemptTimeout, Cause::AttemptTimeout, "`attempt_timeout`")
            }
            Self::Limit(DeadlineLimit::ClientShare) => (
                OutcomeKind::ClientShare,
                Cause::AttemptTimeout,
                "half of what was left of the client's deadline",
            ),
            Self::Limit(DeadlineLimit::Timeout) => (OutcomeKind::Timeout, Cause::Timeout, "`timeout`"),
            Self::Limit(DeadlineLimit::ClientDeadline) => {
                (OutcomeKind::ClientDeadline, Cause::Deadline, "the client's deadline")
            }
            Self::Upload => {
                (OutcomeKind::ClientGone, Cause::Timeout, "`idle_timeout`: the request's body stood still")
            }
            Self::Whole => (OutcomeKind::ClientDeadline, Cause::Timeout, "`max_duration`"),
        }
    }

    /// The error of a request whose time expired before anything was sent.
    pub fn unsent(self, name: &str, waited_for: &str) -> ProxyError {
        let (_, cause, limit) = self.meaning();
        ProxyError::new(cause, format!("{name}: {limit} passed while it waited for {waited_for}"))
    }
}

/// Until when a request may wait before its first attempt, and which limit ends the wait.
#[derive(Clone, Copy, Debug, Default)]
pub struct WaitLimit(Option<(Instant, TimeLimit)>);

impl WaitLimit {
    /// As long as the client waits for a response.
    pub fn client(deadline: Deadline) -> Self {
        let at = deadline.at().map(|(at, limit)| (at.into(), TimeLimit::Limit(limit)));
        Self(at)
    }

    pub fn at(self) -> Option<std::time::Instant> {
        self.0.map(|(at, _)| at.into_std())
    }

    /// Waits for `work`, but no longer. It has a timer of its own, for waits that are rare.
    pub async fn wait<F: Future>(self, work: F) -> Result<F::Output, TimeLimit> {
        match self.0 {
            None => Ok(work.await),
            Some((at, time_limit)) => timeout_at(at, work).await.map_err(|_| time_limit),
        }
    }
}

/// The time limits that the configuration sets a request.
#[derive(Clone, Copy, Debug)]
pub struct RequestTimeouts {
    /// `timeout`; `None` = no limit.
    pub request: Option<Duration>,
    /// `attempt_timeout`.
    pub attempt: AttemptTimeout,
}

#[derive(Debug)]
pub struct Clock {
    deadline: Deadline,
    timeout: Option<Duration>,
    attempt_timeout: AttemptTimeout,
    /// The limit of the attempt under way, once its clock runs.
    this_attempt: Option<Option<(Instant, DeadlineLimit)>>,
    attempt_began: Instant,
    /// Another attempt may follow the one under way.
    more: bool,
    /// The latency that the upstream's responses rarely exceed, in microseconds; 0 where it is not known. Small, as each
    /// request stores it.
    usual_micros: u32,
    /// When to look again whether the body has been sent.
    look_at: Instant,
}

impl Clock {
    pub fn new(deadline: Deadline, limits: RequestTimeouts, now: Instant) -> Self {
        Self {
            deadline,
            timeout: limits.request,
            attempt_timeout: limits.attempt,
            this_attempt: None,
            attempt_began: now,
            more: false,
            usual_micros: 0,
            look_at: now,
        }
    }

    /// For the fallback's upstream: a time of its own; the client's deadline stays.
    pub fn afresh(&self, limits: RequestTimeouts, progress: &Progress) -> Self {
        let now = Instant::now();
        let mut deadline = self.deadline.client_only();
        if progress.request_sent_at().is_some() {
            deadline.start(now.into_std(), limits.request);
        }
        Self::new(deadline, limits, now)
    }

    /// Whether the upstream's usual latency matters: the client's own deadline could be divided.
    pub fn divides_clients_deadline(&self) -> bool {
        self.attempt_timeout == AttemptTimeout::Auto && self.deadline.client_deadline().is_some()
    }

    /// An attempt begins; `more`: another may follow it. `usual`: see [`Deadline::attempt`].
    pub fn begin_attempt(&mut self, now: Instant, more: bool, usual: Option<Duration>) {
        self.attempt_began = now;
        self.usual_micros =
            usual.map_or(0, |usual| u32::try_from(usual.as_micros()).unwrap_or(u32::MAX).max(1));
        self.this_attempt = None;
        self.more = more;
        self.look_at = self.attempt_began;
    }

    /// How much time is left, for the next hop; `None` = no limit.
    pub fn left(&self, now: Instant) -> Option<Duration> {
        match (self.deadline.time_left(now.into_std()), self.timeout) {
            // Before the body is sent our own clock stands still: all of it is left.
            (Some(left), Some(timeout)) => Some(left.min(timeout)),
            (left, timeout) => left.or(timeout),
        }
    }

    pub fn deadline(&self) -> &Deadline {
        &self.deadline
    }

    /// Until when the request may wait before its first attempt.
    pub fn until(&self, progress: &Progress) -> WaitLimit {
        let limit = self.deadline.at().map(|(at, limit)| (Instant::from_std(at), TimeLimit::Limit(limit)));
        let whole = progress.must_end_at().map(|at| (at, TimeLimit::Whole));
        WaitLimit(limit.into_iter().chain(whole).min_by_key(|(at, _)| *at))
    }

    /// How long the exchange may still take: to the deadline, or to the end of `max_duration`.
    pub fn time_left(&self, progress: &Progress, now: Instant) -> Option<Duration> {
        self.until(progress).0.map(|(at, _)| at.saturating_duration_since(now))
    }

    /// The limit that leaves less time than the timeout field can express (1 ms), if any. No attempt is sent then.
    pub fn expired(&self, progress: &Progress, now: Instant) -> Option<TimeLimit> {
        let (at, time_limit) = self.until(progress).0?;
        let left = at.saturating_duration_since(now);
        deadline::timeout_header_millis(left).is_none().then_some(time_limit)
    }

    /// Starts the request's clock where the request has been sent.
    pub fn request_sent(&mut self, progress: &Progress) {
        if let Some(sent) = progress.request_sent_at() {
            self.deadline.start(sent.into_std(), self.timeout);
        }
    }

    /// Runs `work` until it is done or a clock runs out.
    pub async fn run<F: Future>(
        &mut self,
        progress: &Progress,
        mut work: Pin<&mut F>,
    ) -> Result<F::Output, TimeLimit> {
        let result = poll_fn(|cx| {
            if let Poll::Ready(output) = work.as_mut().poll(cx) {
                return Poll::Ready(Ok(output));
            }
            let woken = progress.take_timer_fired();
            match self.due(progress) {
                Some((due, Some(time_limit))) if woken && Instant::now() >= due => {
                    return Poll::Ready(Err(time_limit));
                }
                Some((due, _)) => progress.wake_at(Some(due)),
                None => progress.wake_at(None),
            }
            Poll::Pending
        })
        .await;
        progress.wake_at(None);
        result
    }

    /// What comes next: a limit, or (`None`) a moment to look again.
    fn due(&mut self, progress: &Progress) -> Option<(Instant, Option<TimeLimit>)> {
        let whole = progress.must_end_at().map(|at| (at, Some(TimeLimit::Whole)));
        self.request_sent(progress);
        if let Some(sent) = progress.request_sent_at() {
            let more = self.more && progress.is_repeatable();
            let this_attempt = *self.this_attempt.get_or_insert_with(|| {
                let began = sent.max(self.attempt_began);
                let usual = (self.usual_micros != 0).then(|| Duration::from_micros(self.usual_micros.into()));
                let limit = self.deadline.attempt(began.into_std(), self.attempt_timeout, more, usual);
                limit.map(|(at, limit)| (Instant::from_std(at), limit))
            });
            return earliest(whole, this_attempt.map(|(at, limit)| (at, Some(TimeLimit::Limit(limit)))));
        }
        let stalls = progress.upload_stalls_at().map(|at| (at, Some(TimeLimit::Upload)));
        let client =
            self.deadline.at().map(|(at, limit)| (Instant::from_std(at), Some(TimeLimit::Limit(limit))));
        // Timeouts that start when the body is sent cannot expire before this moment, so there is no need to look earlier.
        let look = self.shortest().map(|shortest| {
            let now = Instant::now();
            if now >= self.look_at {
                self.look_at = now + shortest;
            }
            (self.look_at, None)
        });
        earliest(earliest(whole, stalls), earliest(client, look))
    }

    fn shortest(&self) -> Option<Duration> {
        let attempt = match self.attempt_timeout {
            AttemptTimeout::Auto => self.timeout.map(|timeout| timeout / 2),
            AttemptTimeout::Fixed(limit) => limit.limit(),
        };
        match (attempt, self.timeout) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (one, None) | (None, one) => one,
        }
    }
}

type Due = Option<(Instant, Option<TimeLimit>)>;

fn earliest(a: Due, b: Due) -> Due {
    match (a, b) {
        (Some(a), Some(b)) => Some(if b.0 < a.0 { b } else { a }),
        (one, None) | (None, one) => one,
    }
}
