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

/// What there is of the request's body to send again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// Nothing of it was read from the client yet, or there is none.
    Untouched,
    /// All that was taken so far was kept.
    Replayable,
    /// Some was sent and not kept: over `body_limit`.
    Gone,
}

/// What is known when an attempt has failed.
#[derive(Clone, Copy, Debug)]
pub struct FailedAttempt {
    /// See [`RetryPolicy::is_repeatable`].
    pub is_repeatable: bool,
    pub is_grpc: bool,
    /// Attempts so far, the failed one and hedges included, free ones not.
    pub attempts: u32,
    /// A free attempt ([`Retry::free`]) has been made for a race of the connection pool.
    pub free_used: bool,
    /// Free attempts that followed ones that count as never sent.
    pub resent: u32,
    pub body: Body,
    /// Response headers went to the client: nothing can be taken back.
    pub is_committed: bool,
}

/// What follows a failed attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    Retry(Retry),
    Stop(Reason),
}

/// A further attempt, at another endpoint where there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    /// How long to wait before it.
    pub wait: Duration,
    /// It mends a race of our own pool, or follows one that counts as never sent; so it costs neither an attempt nor budget and
    /// waits for nothing. Once a request, or [`MOST_RESENT`] times.
    pub free: bool,
}

/// Why there is no further attempt: `outcome` in `outrigger_retries_total`, spans and the access log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// `retry.on` does not name what happened, or retries are off.
    NotRetryable,
    /// The upstream's sidecar said that tries were spent nearer to the failure.
    Suppressed,
    /// Response headers went out already.
    Committed,
    MaxTries,
    /// It may have been processed, and the method does not allow it to be sent twice.
    Method,
    /// The body was too large to keep.
    BodyGone,
    /// No time is left for the wait and an attempt.
    Deadline,
    /// `Retry-After` or gRPC push-back is longer than the time left.
    RetryAfter,
    /// gRPC push-back forbids.
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

/// What the moment allows: the second half of the decision.
#[derive(Clone, Copy, Debug)]
pub struct Moment<'a> {
    pub now: Instant,
    /// Of the request's deadline; `None` = it has none.
    pub time_left: Option<Duration>,
    pub hint: Hint,
    /// From 0 to 1, drawn for this decision.
    pub random: f64,
    pub budget: &'a RetryBudget,
}

/// Tries that follow ones which count as never sent, for free. An endpoint that refuses everything gets no more.
pub const MOST_RESENT: u32 = 2;
/// However patient the back-off is: who calls an upstream that is not there is to hear of it soon.
const LONGEST_PATIENCE: Duration = Duration::from_millis(250);
/// Further ones would pass it for any back-off of a millisecond or more.
const MOST_WAITS: u32 = 8;

/// Retries as a route has them; `None` in place of the settings is `retry = false`.
///
/// With `max = 0` a request is sent at most once, always. With `retry = false` only what counts as never sent is sent
/// again, and the stale keep-alive race is mended where the request may be sent twice.
#[derive(Clone, Debug)]
pub struct RetryPolicy {
    settings: Option<RetrySettings>,
}

impl RetryPolicy {
    pub fn new(settings: Option<RetrySettings>) -> Self {
        Self { settings }
    }

    /// Whether a copy of the request's body could be of use, and how many bytes of it are to be kept at most.
    /// 0 = keep nothing. `refusable`: it goes out by HTTP/2, where a stream may be refused after some of its body was sent.
    pub fn body_limit(&self, method: &Method, idempotency_key: bool, refusable: bool) -> u64 {
        match &self.settings {
            None if is_idempotent(method) || idempotency_key || refusable => {
                *RetrySettings::default().body_limit
            }
            None => 0,
            Some(settings) if settings.max == 0 => 0,
            // Whatever the method: a stream may be refused after some of the body was sent.
            Some(settings) => *settings.body_limit,
        }
    }

    /// Whether any attempt could follow one whose request has begun to be sent by HTTP/1.1. `reused`: its connection has
    /// carried a request before.
    pub fn may_follow(&self, reused: bool) -> bool {
        match &self.settings {
            // Of its own accord only the race of a kept connection is mended.
            None => reused,
            Some(settings) => settings.max > 0,
        }
    }

    /// Whether a failure of the n-th attempt (from 1) could be followed by another, as far as the count goes.
    pub fn another_possible(&self, tries: u32) -> bool {
        self.settings.as_ref().is_some_and(|settings| tries <= settings.max)
    }

    /// How long all waits before further attempts can take together: so long a request may wait for an upstream that is
    /// not there.
    pub fn patience(&self) -> Duration {
        let Some(settings) = &self.settings else { return Duration::ZERO };
        let waits = (1..=settings.max.min(MOST_WAITS)).map(|n| settings.backoff.ceiling(n));
        waits.fold(Duration::ZERO, Duration::saturating_add).min(LONGEST_PATIENCE)
    }

    /// Whether failures are retried at all: false for `retry = false`.
    pub fn is_on(&self) -> bool {
        self.settings.is_some()
    }

    /// Whether a request that may have been processed may be sent again.
    pub fn is_repeatable(&self, method: &Method, idempotency_key: bool) -> bool {
        match &self.settings {
            Some(settings) => settings.methods.allow(method, idempotency_key),
            None => is_idempotent(method) || idempotency_key,
        }
    }

    /// Whether what happened is something to try again at all.
    pub fn names(&self, outcome: &Outcome) -> bool {
        self.settings.as_ref().is_some_and(|settings| {
            settings.on.iter().any(|condition| outcome.meets(*condition))
                || outcome.advice() == Advice::Elsewhere
        })
    }

    /// Whether an attempt that surely never reached the service may be made again at another endpoint at once, as if that
    /// had been chosen first: it spends neither an attempt nor budget. Only where it found its endpoint `absent`, which
    /// happens once: from then on the endpoint is not chosen.
    pub fn may_move_on(&self, outcome: &Outcome, absent: bool, body: Body) -> bool {
        absent
            && self.another_possible(1)
            && outcome.never_reached()
            && body != Body::Gone
            && self.names(outcome)
    }

    /// The whole decision. Where it says retry, the budget has been charged.
    pub fn decide(&self, attempt: &FailedAttempt, outcome: &Outcome, moment: &Moment<'_>) -> Decision {
        let free = match self.eligible(attempt, outcome) {
            Ok(free) => free,
            Err(reason) => return Decision::Stop(reason),
        };
        if free {
            let in_time = moment.time_left.is_none_or(|left| !left.is_zero());
            return if in_time {
                Decision::Retry(Retry { wait: Duration::ZERO, free })
            } else {
                Decision::Stop(Reason::Deadline)
            };
        }
        let Some(settings) = &self.settings else { return Decision::Stop(Reason::NotRetryable) };
        match settings.backoff.wait(attempt.attempts, moment.hint, moment.time_left, moment.random) {
            Wait::Forbidden => Decision::Stop(Reason::Pushback),
            Wait::TooLong if moment.hint == Hint::None => Decision::Stop(Reason::Deadline),
            Wait::TooLong => Decision::Stop(Reason::RetryAfter),
            // Last, so that nothing is spent on an attempt that is not sent.
            Wait::For(_) if !moment.budget.withdraw(moment.now) => Decision::Stop(Reason::Budget),
            Wait::For(wait) => Decision::Retry(Retry { wait, free }),
        }
    }

    /// What the request and the failure allow, whatever the time and the budget; `Ok(true)` = a free attempt.
    pub(super) fn eligible(&self, attempt: &FailedAttempt, outcome: &Outcome) -> Result<bool, Reason> {
        let stale = is_stale(outcome) && !attempt.free_used;
        let unsent = outcome.is_unsent() && attempt.resent < MOST_RESENT;
        let named = self.names(outcome)
            // gRPC's own transparent retry needs no configuration (A6).
            || (self.settings.is_some() && attempt.is_grpc && outcome.ending == Ending::RefusedStream);
        let at_most_once = self.settings.as_ref().is_some_and(|settings| settings.max == 0);
        let twice_is_safe = outcome.never_reached() || attempt.is_repeatable;

        if !stale && !unsent && !named {
            return Err(Reason::NotRetryable);
        }
        if outcome.advice() == Advice::No {
            return Err(Reason::Suppressed);
        }
        if attempt.is_committed {
            return Err(Reason::Committed);
        }
        let free = (stale || unsent) && !at_most_once;
        if !free && !self.another_possible(attempt.attempts) {
            return Err(Reason::MaxTries);
        }
        if !twice_is_safe {
            return Err(Reason::Method);
        }
        if attempt.body == Body::Gone {
            return Err(Reason::BodyGone);
        }
        Ok(free)
    }
}

/// A pooled connection that broke before any response byte: most likely the upstream closed it just as we sent.
fn is_stale(outcome: &Outcome) -> bool {
    matches!(outcome.ending, Ending::Reset(reset) if reset.is_stale())
}
