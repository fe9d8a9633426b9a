//! The decision after a failed attempt.

use std::time::{Duration, Instant};

use http::Method;

use super::{
    super::{
        backoff::{Hint, Wait},
        budget::RetryBudget,
        classify::{Advice, Ending, Outcome},
    },
    RetrySettings, is_idempotent,
};

/// Whether the request body can be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// None of it has been read from the client yet, or there is none.
    Untouched,
    /// All that has been read so far was kept.
    Replayable,
    /// Part of it was sent and not kept: it exceeds `body_limit`.
    Gone,
}

/// A failed attempt, and what the request has used up so far.
#[derive(Clone, Copy, Debug)]
pub struct Tried<'a> {
    pub method: &'a Method,
    pub grpc: bool,
    /// The request has an `Idempotency-Key`.
    pub idempotency_key: bool,
    /// Attempts sent so far, including the failed one and hedges, excluding free ones.
    pub tries: u32,
    /// A free retry ([`Retry::free`]) has been sent for a stale keep-alive race.
    pub free_used: bool,
    /// Free retries of attempts that count as never sent.
    pub resent: u32,
    pub body: Body,
    /// Response headers have been sent to the client.
    pub committed: bool,
}

/// What follows a failed attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    Retry(Retry),
    Stop(Reason),
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
pub enum Reason {
    /// `retry.on` does not cover the outcome, or retries are off.
    NotRetryable,
    /// The upstream's sidecar advised against it: a proxy nearer to the failure has already retried.
    Suppressed,
    /// Response headers have been sent.
    Committed,
    MaxTries,
    /// The request may have been processed, and its method does not allow sending it twice.
    Method,
    /// The body was too large to keep.
    BodyGone,
    /// The back-off would pass the deadline.
    Deadline,
    /// `Retry-After` or gRPC pushback is longer than the time left.
    RetryAfter,
    /// gRPC pushback forbids a retry.
    Pushback,
    Budget,
}

impl Reason {
    pub const fn word(self) -> &'static str {
        match self {
            Self::NotRetryable => "not_retryable",
            Self::Suppressed => "suppressed",
            Self::Committed => "committed",
            Self::MaxTries => "max_tries",
            Self::Method => "method",
            Self::BodyGone => "body_gone",
            Self::Deadline => "deadline",
            Self::RetryAfter => "retry_after",
            Self::Pushback => "pushback",
            Self::Budget => "budget",
        }
    }
}

/// Time, random number and budget of a retry decision.
#[derive(Clone, Copy, Debug)]
pub struct Moment<'a> {
    pub now: Instant,
    /// Until the request's deadline; `None` = no deadline.
    pub time_left: Option<Duration>,
    pub hint: Hint,
    /// From 0 to 1, drawn for this decision.
    pub random: f64,
    pub budget: &'a RetryBudget,
}

/// The most free retries of attempts that count as never sent. It bounds those against an endpoint that refuses
/// everything.
pub const MOST_RESENT: u32 = 2;
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
    pub fn may_follow(&self, reused: bool) -> bool {
        match &self.settings {
            // Without settings only the stale keep-alive race is retried.
            None => reused,
            Some(settings) => settings.max > 0,
        }
    }

    /// Whether `retry.max` allows another attempt after this many attempts.
    pub fn another_possible(&self, attempts: u32) -> bool {
        self.settings.as_ref().is_some_and(|settings| attempts <= settings.max)
    }

    /// The longest that all back-offs together can take. A request may wait that long for an upstream whose endpoints
    /// are all absent.
    pub fn patience(&self) -> Duration {
        let Some(settings) = &self.settings else { return Duration::ZERO };
        let waits = (1..=settings.max.min(MAX_SUMMED_BACKOFFS)).map(|n| settings.backoff.ceiling(n));
        waits.fold(Duration::ZERO, Duration::saturating_add).min(MAX_ABSENCE_WAIT)
    }

    /// Whether a request that may have been processed may be sent again. If so, half of the time is reserved for it.
    pub fn may_repeat(&self, method: &Method, idempotency_key: bool) -> bool {
        self.settings.as_ref().is_some_and(|settings| settings.methods.allow(method, idempotency_key))
    }

    /// Whether `retry.on` or the upstream's advice makes this outcome retryable.
    pub fn names(&self, outcome: &Outcome) -> bool {
        self.settings.as_ref().is_some_and(|settings| {
            settings.on.iter().any(|condition| outcome.meets(*condition))
                || outcome.advice() == Advice::Elsewhere
        })
    }

    /// Whether a request that certainly did not reach the service may go to another endpoint at once, as if that one
    /// had been chosen first. This spends neither an attempt nor budget. Only if this attempt found its endpoint
    /// `absent`, which happens once per endpoint: the balancer does not choose it afterwards.
    pub fn may_move_on(&self, outcome: &Outcome, absent: bool, body: Body) -> bool {
        absent
            && self.another_possible(1)
            && outcome.never_reached()
            && body != Body::Gone
            && self.names(outcome)
    }

    /// The whole decision. For a retry that is not free, it has withdrawn from the budget.
    pub fn decide(&self, attempt: &Tried<'_>, outcome: &Outcome, context: &Moment<'_>) -> Decision {
        let free = match self.eligible(attempt, outcome) {
            Ok(free) => free,
            Err(reason) => return Decision::Stop(reason),
        };
        if free {
            let in_time = context.time_left.is_none_or(|left| !left.is_zero());
            return if in_time {
                Decision::Retry(Retry { wait: Duration::ZERO, free })
            } else {
                Decision::Stop(Reason::Deadline)
            };
        }
        let Some(settings) = &self.settings else { return Decision::Stop(Reason::NotRetryable) };
        match settings.backoff.wait(attempt.tries, context.hint, context.time_left, context.random) {
            Wait::Forbidden => Decision::Stop(Reason::Pushback),
            Wait::TooLong if context.hint == Hint::None => Decision::Stop(Reason::Deadline),
            Wait::TooLong => Decision::Stop(Reason::RetryAfter),
            // Last, so that no budget is spent on a retry that is not sent.
            Wait::For(_) if !context.budget.withdraw(context.now) => Decision::Stop(Reason::Budget),
            Wait::For(wait) => Decision::Retry(Retry { wait, free }),
        }
    }

    /// The part of the decision that depends neither on time nor on budget; `Ok(true)` = a free retry.
    pub(super) fn eligible(&self, attempt: &Tried<'_>, outcome: &Outcome) -> Result<bool, Reason> {
        let stale = is_stale(outcome) && !attempt.free_used;
        let unsent = outcome.is_unsent() && attempt.resent < MOST_RESENT;
        let named = self.names(outcome)
            // gRPC's transparent retry needs no configuration (A6).
            || (self.settings.is_some() && attempt.grpc && outcome.ending == Ending::RefusedStream);
        let is_at_most_once = self.settings.as_ref().is_some_and(|settings| settings.max == 0);
        let method_allows = match &self.settings {
            Some(settings) => settings.methods.allow(attempt.method, attempt.idempotency_key),
            None => is_idempotent(attempt.method) || attempt.idempotency_key,
        };
        let may_send_twice = outcome.never_reached() || method_allows;

        if !stale && !unsent && !named {
            return Err(Reason::NotRetryable);
        }
        if outcome.advice() == Advice::No {
            return Err(Reason::Suppressed);
        }
        if attempt.committed {
            return Err(Reason::Committed);
        }
        let free = (stale || unsent) && !is_at_most_once;
        if !free && !self.another_possible(attempt.tries) {
            return Err(Reason::MaxTries);
        }
        if !may_send_twice {
            return Err(Reason::Method);
        }
        if attempt.body == Body::Gone {
            return Err(Reason::BodyGone);
        }
        Ok(free)
    }
}

/// See [`Reset::is_stale`](super::super::classify::Reset::is_stale).
fn is_stale(outcome: &Outcome) -> bool {
    matches!(outcome.ending, Ending::Reset(reset) if reset.is_stale())
}
