//! The decision after a failed attempt.

use std::time::{Duration, Instant};

use http::Method;

use super::{
    super::{
        backoff::{BackoffWait, RetryHint},
        budget::RetryBudget,
        classify::{AttemptOutcome, OutcomeKind, RetryAdvice},
    },
    RetrySettings, is_idempotent,
};

/// Whether the request body can be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replayability {
    /// None of it has been read from the client yet, or there is none.
    Unread,
    /// All that has been read so far was kept.
    Buffered,
    /// Part of it was sent and not kept: it exceeds `body_limit`.
    NotKept,
}

/// A failed attempt, and what the request has used up so far.
#[derive(Clone, Copy, Debug)]
pub struct FailedAttempt {
    /// See [`RetryPolicy::is_repeatable`].
    pub is_repeatable: bool,
    pub is_grpc: bool,
    /// Attempts sent so far, including the failed one and hedges, excluding free ones.
    pub attempts: u32,
    /// A free retry ([`Retry::free`]) has been sent for a stale keep-alive race.
    pub free_retry_used: bool,
    /// Free retries of attempts that count as never sent.
    pub resends: u32,
    pub body: Replayability,
    /// Response headers have been sent to the client.
    pub is_committed: bool,
}

/// What follows a failed attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RetryDecision {
    Retry(Retry),
    Stop(StopReason),
}

/// A retry, at another endpoint if there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    /// The back-off before it.
    pub wait: Duration,
    /// It follows a stale keep-alive race (once per request) or an attempt that counts as never sent (at most
    /// [`MAX_RESENDS`] times). It counts as no attempt, costs no budget and has no back-off.
    pub free: bool,
}

/// Why there is no retry: `outcome` in `outrigger_retries_total`, spans and the access log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StopReason {
    /// `retry.on` does not cover the outcome, or retries are off.
    NotRetryable,
    /// The upstream's sidecar advised against it: a proxy nearer to the failure has already retried.
    Suppressed,
    /// Response headers have been sent.
    Committed,
    MaxAttempts,
    /// The request may have been processed, and its method does not allow sending it twice.
    Method,
    /// The body was too large to keep.
    BodyNotKept,
    /// The back-off would pass the deadline.
    Deadline,
    /// `Retry-After` or gRPC pushback is longer than the time left.
    RetryAfter,
    /// gRPC pushback forbids a retry.
    Pushback,
    Budget,
}

impl StopReason {
    pub const fn word(self) -> &'static str {
        match self {
            Self::NotRetryable => "not_retryable",
            Self::Suppressed => "suppressed",
            Self::Committed => "committed",
            Self::MaxAttempts => "max_attempts",
            Self::Method => "method",
            Self::BodyNotKept => "body_not_kept",
            Self::Deadline => "deadline",
            Self::RetryAfter => "retry_after",
            Self::Pushback => "pushback",
            Self::Budget => "budget",
        }
    }
}

/// Time, random number and budget of a retry decision.
#[derive(Clone, Copy, Debug)]
pub struct RetryContext<'a> {
    pub now: Instant,
    /// Until the request's deadline; `None` = no deadline.
    pub time_left: Option<Duration>,
    pub hint: RetryHint,
    /// From 0 to 1, drawn for this decision.
    pub random: f64,
    pub budget: &'a RetryBudget,
}

/// The most free retries of attempts that count as never sent. It bounds those against an endpoint that refuses
/// everything.
pub const MAX_RESENDS: u32 = 2;
/// The longest wait for an upstream that is absent, however long the back-off: its clients get an error soon.
const MAX_ABSENCE_WAIT: Duration = Duration::from_millis(250);
/// More back-offs than these exceed [`MAX_ABSENCE_WAIT`] for any `base` of a millisecond or more.
const MAX_SUMMED_BACKOFFS: u32 = 8;

/// The retry policy of a route; settings `None` stand for `retry = false`.
///
/// With `max = 0` a request is sent at most once, always. With `retry = false` a request is sent again only if it
/// counts as never sent, or after a stale keep-alive race if it may be sent twice.
#[derive(Clone, Debug)]
pub struct RetryPolicy {
    settings: Option<RetrySettings>,
}

impl RetryPolicy {
    pub fn new(settings: Option<RetrySettings>) -> Self {
        Self { settings }
    }

    /// How many bytes of the request body to keep for a retry; 0 = none, since no retry could use them.
    /// `refusable`: sent over HTTP/2, where a stream may be refused after part of its body was sent.
    pub fn body_limit(&self, method: &Method, idempotency_key: bool, refusable: bool) -> u64 {
        match &self.settings {
            None if is_idempotent(method) || idempotency_key || refusable => {
                *RetrySettings::default().body_limit
            }
            None => 0,
            Some(settings) if settings.max == 0 => 0,
            // Whatever the method: a stream may be refused after part of the body was sent.
            Some(settings) => *settings.body_limit,
        }
    }

    /// Whether a retry is possible once an attempt has begun to send its request over HTTP/1.1. `reused`: its
    /// connection has carried a request before.
    pub fn may_retry_once_sending(&self, reused: bool) -> bool {
        match &self.settings {
            // Without settings only the stale keep-alive race is retried.
            None => reused,
            Some(settings) => settings.max > 0,
        }
    }

    /// Whether `retry.max` allows another attempt after this many attempts.
    pub fn has_attempt_left(&self, attempts: u32) -> bool {
        self.settings.as_ref().is_some_and(|settings| attempts <= settings.max)
    }

    /// The longest that all back-offs together can take. A request may wait that long for an upstream whose endpoints
    /// are all absent.
    pub fn max_absence_wait(&self) -> Duration {
        let Some(settings) = &self.settings else { return Duration::ZERO };
        let waits = (1..=settings.max.min(MAX_SUMMED_BACKOFFS)).map(|n| settings.backoff.ceiling(n));
        waits.fold(Duration::ZERO, Duration::saturating_add).min(MAX_ABSENCE_WAIT)
    }

    /// Whether failures are retried at all: false for `retry = false`.
    pub fn is_on(&self) -> bool {
        self.settings.is_some()
    }

    /// Whether a request that may have been processed may be sent again.
    pub fn is_repeatable(&self, method: &Method, idempotency_key: bool) -> bool {
        match &self.settings {
            Some(settings) => settings.methods.allows(method, idempotency_key),
            None => is_idempotent(method) || idempotency_key,
        }
    }

    /// Whether `retry.on` or the upstream's advice makes this outcome retryable.
    pub fn is_retryable(&self, outcome: &AttemptOutcome) -> bool {
        self.settings.as_ref().is_some_and(|settings| {
            settings.on.iter().any(|condition| outcome.matches(*condition))
                || outcome.advice() == RetryAdvice::Elsewhere
        })
    }

    /// Whether a request that certainly did not reach the service may go to another endpoint at once, as if that one
    /// had been chosen first. This spends neither an attempt nor budget. Only if this attempt found its endpoint
    /// `absent`, which happens once per endpoint: the balancer does not choose it afterwards.
    pub fn may_switch_endpoint(&self, outcome: &AttemptOutcome, absent: bool, body: Replayability) -> bool {
        absent
            && self.has_attempt_left(1)
            && outcome.is_unprocessed()
            && body != Replayability::NotKept
            && self.is_retryable(outcome)
    }

    /// The whole decision. For a retry that is not free, it has withdrawn from the budget.
    pub fn decide(
        &self,
        attempt: &FailedAttempt,
        outcome: &AttemptOutcome,
        context: &RetryContext<'_>,
    ) -> RetryDecision {
        let free = match self.eligible(attempt, outcome) {
            Ok(free) => free,
            Err(reason) => return RetryDecision::Stop(reason),
        };
        if free {
            let in_time = context.time_left.is_none_or(|left| !left.is_zero());
            return if in_time {
                RetryDecision::Retry(Retry { wait: Duration::ZERO, free })
            } else {
                RetryDecision::Stop(StopReason::Deadline)
            };
        }
        let Some(settings) = &self.settings else { return RetryDecision::Stop(StopReason::NotRetryable) };
        match settings.backoff.wait(attempt.attempts, context.hint, context.time_left, context.random) {
            BackoffWait::Forbidden => RetryDecision::Stop(StopReason::Pushback),
            BackoffWait::TooLong if context.hint == RetryHint::None => {
                RetryDecision::Stop(StopReason::Deadline)
            }
            BackoffWait::TooLong => RetryDecision::Stop(StopReason::RetryAfter),
            // Last, so that no budget is spent on a retry that is not sent.
            BackoffWait::For(_) if !context.budget.withdraw(context.now) => {
                RetryDecision::Stop(StopReason::Budget)
            }
            BackoffWait::For(wait) => RetryDecision::Retry(Retry { wait, free }),
        }
    }

    /// The part of the decision that depends neither on time nor on budget; `Ok(true)` = a free retry.
    pub(super) fn eligible(
        &self,
        attempt: &FailedAttempt,
        outcome: &AttemptOutcome,
    ) -> Result<bool, StopReason> {
        let stale = is_stale(outcome) && !attempt.free_retry_used;
        let unsent = outcome.is_unsent() && attempt.resends < MAX_RESENDS;
        let named = self.is_retryable(outcome)
            // gRPC's transparent retry needs no configuration (A6).
            || (self.settings.is_some() && attempt.is_grpc && outcome.kind == OutcomeKind::RefusedStream);
        let is_at_most_once = self.settings.as_ref().is_some_and(|settings| settings.max == 0);
        let may_send_twice = outcome.is_unprocessed() || attempt.is_repeatable;

        if !stale && !unsent && !named {
            return Err(StopReason::NotRetryable);
        }
        if outcome.advice() == RetryAdvice::No {
            return Err(StopReason::Suppressed);
        }
        if attempt.is_committed {
            return Err(StopReason::Committed);
        }
        let free = (stale || unsent) && !is_at_most_once;
        if !free && !self.has_attempt_left(attempt.attempts) {
            return Err(StopReason::MaxAttempts);
        }
        if !may_send_twice {
            return Err(StopReason::Method);
        }
        if attempt.body == Replayability::NotKept {
            return Err(StopReason::BodyNotKept);
        }
        Ok(free)
    }
}

/// See [`Reset::is_stale`](super::super::classify::Reset::is_stale).
fn is_stale(outcome: &AttemptOutcome) -> bool {
    matches!(outcome.kind, OutcomeKind::Reset(reset) if reset.is_stale())
}
