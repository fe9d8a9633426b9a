//! The attempt loop of a request as a machine without I/O: an event in, an action out.
//!
//! ```text
//! Ready ─▶ Admit ─▶ Admitted ─▶ Pick ─▶ Picked ─▶ Send ─▶ Succeeded ─▶ Finish
//!   ▲        │                   │                 │
//!   │        │ Refused           │ Unavailable     └─▶ Failed ─▶ Finish
//!   │        ▼                   ▼                       │ │
//!   │   AwaitRecovery ─▶ …     Finish                    │ └─▶ Admit (at once: resend, next endpoint, sibling)
//!   └──────────────────────────── Wait (back-off) ◀──────┘
//! ```
//!
//! While an attempt is under way, a hedge may join it: `HedgeDue ─▶ PickCopy ─▶ CopyAdmitted ─▶ SendCopy`, and then
//! `CopyEnded ─▶ AwaitCopies | Settle`.
//!
//! The caller performs each action and reports what came of it. It owns what a machine without I/O cannot own:
//! connections, the body, the breaker's permit between `Admitted` and the end of the attempt. The machine owns the
//! decisions: order, counts, budget, and which endpoints to avoid. An attempt that the budget has granted and that is
//! not sent returns to the budget when the machine finishes or is dropped.

mod event;
#[cfg(test)]
mod tests;

pub use event::{
    Action, AttemptFailure, AttemptKind, Event, Finish, NextAttempt, RequestCopy, RequestTraits,
    SharedLimits, Stop,
};

use std::time::{Duration, Instant};

use super::{
    super::{
        budget::RetryGrant,
        classify::{OutcomeKind, RetryAdvice},
        deadline::timeout_header_millis,
    },
    decide::{FailedAttempt, MAX_RESENDS, RetryContext, RetryDecision, RetryPolicy, StopReason},
};

/// The least time that can be sent to the next hop.
const LEAST_TIME: Duration = Duration::from_millis(1);

/// What the machine waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Ready,
    Admission {
        has_waited: bool,
    },
    Endpoint,
    Result,
    /// Two copies are under way, or one that has survived the other.
    Copies {
        survivor: Option<RequestCopy>,
    },
    Finished,
}

/// The attempts of one request at one upstream.
#[derive(Debug)]
pub struct RetryPlan<'a> {
    policy: &'a RetryPolicy,
    limits: SharedLimits<'a>,
    request: RequestTraits,
    step: Step,
    kind: AttemptKind,
    waited: Duration,
    /// Those that count: not the free ones.
    attempts: u32,
    /// The free attempt that mends a race of the connection pool was made.
    free_used: bool,
    /// How often a request was sent again that was never sent.
    resent: u32,
    /// The attempt under way is the last one.
    is_last: bool,
    /// There is the result of an attempt to fall back on.
    has_result: bool,
    failed_endpoints: Vec<usize>,
    /// When the breaker refused, for an attempt that waits for recovery.
    refused_at: Option<Instant>,
    /// Until when the request waits for recovery, once it has begun to.
    recovery_until: Option<Instant>,
    /// What the budget has granted for an attempt that is not sent yet.
    held: Option<RetryGrant<'a>>,
}

impl<'a> RetryPlan<'a> {
    /// `kind`: of the first attempt.
    pub fn new(
        policy: &'a RetryPolicy,
        limits: SharedLimits<'a>,
        request: RequestTraits,
        kind: AttemptKind,
    ) -> Self {
        Self {
            policy,
            limits,
            request,
            step: Step::Ready,
            kind,
            waited: Duration::ZERO,
            attempts: 1,
            free_used: false,
            resent: 0,
            is_last: false,
            has_result: false,
            failed_endpoints: Vec::new(),
            refused_at: None,
            recovery_until: None,
            held: None,
        }
    }

    /// Endpoints that this request has failed at, or that have got a copy of it.
    pub fn failed_endpoints(&self) -> &[usize] {
        &self.failed_endpoints
    }

    /// Attempts that count, hedges included and free ones not.
    pub fn attempts(&self) -> u32 {
        self.attempts
    }

    /// What the attempt under way, or the next one, is for.
    pub fn kind(&self) -> AttemptKind {
        self.kind
    }

    /// Whether the request may be sent again although it may have been processed.
    pub fn is_repeatable(&self) -> bool {
        self.request.is_repeatable && self.policy.is_on()
    }

    /// The next action. An event that does not belong to the action before ends the request with what there is.
    #[inline]
    pub fn next(&mut self, event: Event, now: Instant) -> Action {
        match (self.step, event) {
            (Step::Ready, Event::Ready { time_left }) => self.begin(time_left),
            (Step::Admission { .. }, Event::Admitted) => {
                if let Some(refused) = self.refused_at.take() {
                    self.waited += now.saturating_duration_since(refused);
                }
                self.step = Step::Endpoint;
                Action::Pick
            }
            (Step::Endpoint, Event::Picked { has_body: true }) => self.send(),
            (Step::Result | Step::Copies { .. }, Event::Succeeded) => {
                self.has_result = true;
                self.finish(Finish::Result(Stop::Settled))
            }
            (_, event) => self.next_after_trouble(event, now),
        }
    }

    /// What a request that goes well does not meet.
    #[cold]
    fn next_after_trouble(&mut self, event: Event, now: Instant) -> Action {
        match (self.step, event) {
            (Step::Admission { has_waited: false }, Event::Refused { retry_after, time_left }) => {
                let until = self.await_recovery(time_left, now);
                Action::AwaitRecovery { until, retry_after }
            }
            (Step::Admission { has_waited: true }, Event::Refused { retry_after, .. }) => {
                self.finish_early(Stop::BreakerOpen, Finish::Refused { retry_after })
            }
            (Step::Endpoint, Event::Picked { has_body: false }) => {
                self.finish_early(Stop::Reason(StopReason::BodyNotKept), Finish::Unavailable)
            }
            (Step::Result | Step::Copies { .. }, Event::Failed(failed)) => self.follow(&failed, now),
            (Step::Result, Event::HedgeDue { time_left }) => {
                let is_wanted = is_worth_sending(time_left) && self.policy.has_attempt_left(self.attempts);
                if is_wanted { Action::PickCopy } else { Action::AwaitCopies }
            }
            (Step::Result, Event::CopyAdmitted { endpoint }) => self.hedge(endpoint, now),
            (Step::Copies { survivor }, Event::CopyEnded { copy, succeeded }) => {
                if succeeded || survivor.is_some() {
                    return Action::Settle(copy);
                }
                let other = if copy == RequestCopy::First { RequestCopy::Hedge } else { RequestCopy::First };
                self.step = Step::Copies { survivor: Some(other) };
                Action::AwaitCopies
            }
            _ => self.finish_early(Stop::Settled, Finish::Unavailable),
        }
    }

    /// An attempt is wanted.
    fn begin(&mut self, time_left: Option<Duration>) -> Action {
        if !is_worth_sending(time_left) {
            return self.finish_early(Stop::Settled, Finish::Expired);
        }
        self.step = Step::Admission { has_waited: false };
        Action::Admit
    }

    /// The breaker refused. It may be closed soon, where it opened because no endpoint was there: the request waits as long
    /// as it would have waited between attempts that were refused.
    fn await_recovery(&mut self, time_left: Option<Duration>, now: Instant) -> Instant {
        let policy = self.policy;
        let until = *self.recovery_until.get_or_insert_with(|| now + policy.max_absence_wait());
        // Later than this the attempt would not be worth sending.
        let latest = time_left.and_then(|left| now.checked_add(left.saturating_sub(LEAST_TIME)));
        self.refused_at = Some(now);
        self.step = Step::Admission { has_waited: true };
        latest.map_or(until, |latest| until.min(latest))
    }

    fn send(&mut self) -> Action {
        if let Some(held) = self.held.take() {
            held.mark_sent();
        }
        let another_possible = self.policy.has_attempt_left(self.attempts);
        let free_possible = !self.free_used || self.resent < MAX_RESENDS;
        self.is_last = !another_possible && !free_possible && !self.request.keeps_head;
        self.has_result = false;
        self.step = Step::Result;
        Action::Send(NextAttempt {
            kind: self.kind,
            waited: self.waited,
            shares_time: another_possible && self.is_repeatable(),
            is_last: self.is_last,
        })
    }

    /// A second copy was admitted. The budget is asked last, so that nothing is spent on a copy that is not sent.
    fn hedge(&mut self, endpoint: usize, now: Instant) -> Action {
        if !self.limits.budget.withdraw(now) {
            return Action::AwaitCopies;
        }
        self.attempts += 1;
        self.failed_endpoints.push(endpoint);
        self.step = Step::Copies { survivor: None };
        Action::SendCopy
    }

    /// What follows a failed attempt.
    fn follow(&mut self, failed: &AttemptFailure, now: Instant) -> Action {
        self.has_result = true;
        if let Some(kind) = self.elsewhere(failed, now) {
            self.failed_endpoints.push(failed.endpoint);
            // That one of two addresses of a host has no listener is no result of a request.
            self.has_result = kind != AttemptKind::Sibling;
            return self.follow_with(kind, Duration::ZERO, failed.time_left);
        }
        let outcome = &failed.outcome;
        let attempt = FailedAttempt {
            is_repeatable: self.request.is_repeatable,
            is_grpc: self.request.is_grpc,
            attempts: self.attempts,
            free_retry_used: self.free_used,
            resends: self.resent,
            body: failed.body,
            is_committed: false,
        };
        let moment = RetryContext {
            now,
            time_left: failed.time_left,
            hint: failed.hint,
            random: failed.random,
            budget: self.limits.budget,
        };
        let retry = match self.policy.decide(&attempt, outcome, &moment) {
            RetryDecision::Retry(retry) => retry,
            RetryDecision::Stop(reason) if outcome.is_failure() || outcome.advice() == RetryAdvice::No => {
                return self.finish(Finish::Result(Stop::Reason(reason)));
            }
            RetryDecision::Stop(_) => return self.finish(Finish::Result(Stop::Settled)),
        };
        if retry.free {
            if outcome.is_unsent() {
                self.resent += 1;
            } else {
                self.free_used = true;
            }
            return self.follow_with(AttemptKind::Reconnect, retry.wait, failed.time_left);
        }
        if self.request.observes_retries {
            return self.finish(Finish::Result(Stop::Observed));
        }
        self.held = Some(self.limits.budget.guard_grant(now));
        self.attempts += 1;
        self.failed_endpoints.push(failed.endpoint);
        self.follow_with(AttemptKind::Retry, retry.wait, failed.time_left)
    }

    /// Whether the request goes to another endpoint at once, as this one surely did not process it. An endpoint leads
    /// elsewhere once, so this ends.
    fn elsewhere(&self, failed: &AttemptFailure, now: Instant) -> Option<AttemptKind> {
        let is_unreachable = matches!(failed.outcome.kind, OutcomeKind::Connect(_));
        let is_first_failure = !self.failed_endpoints.contains(&failed.endpoint);
        let is_referred = failed.outcome.advice() == RetryAdvice::Elsewhere;
        if !(is_unreachable || is_referred) || !is_first_failure || !is_worth_sending(failed.time_left) {
            return None;
        }
        if !self.is_last
            && failed.has_alternative
            && self.policy.may_switch_endpoint(&failed.outcome, failed.is_absent, failed.body)
            && self.limits.moves.admit(&[], now).is_ok()
        {
            return Some(AttemptKind::NextEndpoint);
        }
        (is_unreachable && failed.has_sibling).then_some(AttemptKind::Sibling)
    }

    fn follow_with(&mut self, kind: AttemptKind, wait: Duration, time_left: Option<Duration>) -> Action {
        (self.kind, self.waited) = (kind, wait);
        if wait.is_zero() {
            return self.begin(time_left);
        }
        self.step = Step::Ready;
        Action::Wait(wait)
    }

    /// Finishes without another attempt. The last attempt's result, if there is one, is returned: it tells the client more
    /// than the reason for stopping.
    fn finish_early(&mut self, stop: Stop, finish: Finish) -> Action {
        let finish = if self.has_result { Finish::Result(stop) } else { finish };
        self.finish(finish)
    }

    fn finish(&mut self, finish: Finish) -> Action {
        // An unsent grant goes back to the budget.
        self.held = None;
        self.step = Step::Finished;
        Action::Finish(finish)
    }
}

/// Whether the time that is left can be sent to the next hop.
fn is_worth_sending(time_left: Option<Duration>) -> bool {
    time_left.is_none_or(|left| timeout_header_millis(left).is_some())
}
