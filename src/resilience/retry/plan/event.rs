//! The events that the attempt loop reports, and the actions that it performs.

use std::time::{Duration, Instant};

use super::super::{
    super::{backoff::RetryHint, budget::RetryBudget, classify::AttemptOutcome, rate::RateLimit},
    decide::{Replayability, StopReason},
};

/// What an attempt is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttemptKind {
    First,
    /// The attempt before failed.
    Retry,
    /// Mends a race of the connection pool, or repeats what was never sent; spends neither an attempt nor budget.
    Reconnect,
    /// The endpoint before accepted no connection, or is known to be absent; spends neither an attempt nor budget.
    NextEndpoint,
    /// The other address of `localhost`.
    Sibling,
    /// A second copy beside a slow one.
    Hedge,
    /// At the upstream that the fallback names.
    Fallback,
}

impl AttemptKind {
    pub const fn word(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Retry => "retry",
            Self::Reconnect => "reconnect",
            Self::NextEndpoint => "next_endpoint",
            Self::Sibling => "sibling",
            Self::Hedge => "hedge",
            Self::Fallback => "fallback",
        }
    }
}

/// What the attempts of a request depend on, besides their outcomes.
#[derive(Clone, Copy, Debug)]
pub struct RequestTraits {
    /// It may be sent again although it may have been processed: [`RetryPolicy::is_repeatable`](super::RetryPolicy::is_repeatable).
    pub is_repeatable: bool,
    pub is_grpc: bool,
    /// A fallback may send the head after the last attempt, so no attempt may consume it.
    pub keeps_head: bool,
    /// Retries are decided and counted, but not made (`observe`).
    pub observes_retries: bool,
}

/// What bounds the attempts of all requests to an upstream together.
#[derive(Clone, Copy, Debug)]
pub struct SharedLimits<'a> {
    pub budget: &'a RetryBudget,
    /// Bounds [`AttemptKind::NextEndpoint`].
    pub moves: &'a RateLimit,
}

/// One of two copies of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestCopy {
    First,
    Hedge,
}

/// What has happened. `time_left`: until the deadline of the request; `None` = it has none.
#[derive(Clone, Copy, Debug)]
pub enum Event {
    /// The request may be sent: at the beginning, and when [`Action::Wait`] is over.
    Ready {
        time_left: Option<Duration>,
    },
    /// The breaker admits one attempt.
    Admitted,
    /// The breaker refuses it, and is worth another look after `retry_after`.
    Refused {
        retry_after: Duration,
        time_left: Option<Duration>,
    },
    /// There is an endpoint. `has_body`: the body can be sent to it from its beginning.
    Picked {
        has_body: bool,
    },
    /// No endpoint can be used.
    Unavailable,
    /// The attempt has a response that is not a failure.
    Succeeded,
    Failed(AttemptFailure),
    /// The delay of a hedge is over.
    HedgeDue {
        time_left: Option<Duration>,
    },
    /// The breaker admits a second copy, to this endpoint.
    CopyAdmitted {
        endpoint: usize,
    },
    /// One of two copies has ended.
    CopyEnded {
        copy: RequestCopy,
        succeeded: bool,
    },
}

/// An attempt that failed, and what its failure leaves to be done.
#[derive(Clone, Copy, Debug)]
pub struct AttemptFailure {
    /// The index of its endpoint.
    pub endpoint: usize,
    pub outcome: AttemptOutcome,
    pub hint: RetryHint,
    /// What there is of the request's body to send again.
    pub body: Replayability,
    pub time_left: Option<Duration>,
    /// From 0 to 1, drawn for this outcome.
    pub random: f64,
    /// The endpoint is absent now.
    pub is_absent: bool,
    /// Another endpoint, which this request has not failed at, can be used.
    pub has_alternative: bool,
    /// The host's other loopback address is an endpoint that this request has not failed at.
    pub has_sibling: bool,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Action {
    /// Ask the breaker for a permit: [`Event::Admitted`] or [`Event::Refused`].
    Admit,
    /// Wait until the breaker admits an attempt, if it is open because all endpoints are absent; at most until then.
    /// `retry_after`: as it was refused.
    AwaitRecovery {
        until: Instant,
        retry_after: Duration,
    },
    /// Choose an endpoint, not one of [`RetryPlan::failed_endpoints`](super::RetryPlan::failed_endpoints) if there is another: [`Event::Picked`] or
    /// [`Event::Unavailable`].
    Pick,
    /// Send the request: [`Event::Succeeded`] or [`Event::Failed`]. The result of the attempt before is not needed any more.
    Send(NextAttempt),
    /// Wait, then report [`Event::Ready`].
    Wait(Duration),
    /// Choose another endpoint for a second copy, and ask the breaker: [`Event::CopyAdmitted`]. Where either refuses, go on
    /// as after [`Action::AwaitCopies`].
    PickCopy,
    /// Send the second copy: [`Event::CopyEnded`] for either.
    SendCopy,
    /// Wait for what is under way.
    AwaitCopies,
    /// This copy's result is the attempt's. The other copy is cancelled if it is under way.
    Settle(RequestCopy),
    Finish(Finish),
}

/// An attempt to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NextAttempt {
    pub kind: AttemptKind,
    /// For how long it was held back.
    pub waited: Duration,
    /// If it times out, another one may follow: it gets a part of the time only.
    pub shares_time: bool,
    /// No attempt can follow, whatever happens: its head need not be kept.
    pub is_last: bool,
}

/// How the attempts end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// With the result of the last attempt.
    Result(Stop),
    /// Nothing was sent before the request's time was over.
    Expired,
    /// The breaker refused.
    Refused { retry_after: Duration },
    /// There is no endpoint.
    Unavailable,
}

/// Why no attempt follows the last one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// It needs none, or none could be sent.
    Settled,
    Reason(StopReason),
    /// The breaker has opened meanwhile.
    BreakerOpen,
    /// A retry would follow, but `observe` includes retries. Its budget slot stays taken, so that an exhausted budget is
    /// observed too.
    Observed,
}
