//! What is reported of an attempt, and what it changes.

use std::{net::SocketAddr, time::Instant};

use crate::resilience::classify::{AttemptOutcome, ConnectFailure, Health, OutcomeKind, RetryAdvice};

/// The outcome of an attempt as it counts for its endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndpointOutcome {
    Success,
    Failure,
    Neutral,
    /// A failure: its connection broke before any byte of the response.
    Reset,
    /// A pooled connection broke before any byte of the response. Most likely the endpoint closed it just as it was
    /// reused, which does not count as a failure.
    StaleConnection,
    /// It refused the connection.
    Refused,
    /// It did not accept a connection in time.
    ConnectTimeout,
    /// Its sidecar has no service behind it and advised `elsewhere`.
    NoService,
}

impl EndpointOutcome {
    /// `health`: how the outcome counts; neutral if its lost connection has been counted already.
    /// `full`: the endpoint refused because its limits are reached, so it is not absent.
    pub fn new(outcome: &AttemptOutcome, health: Health, full: bool) -> Self {
        match (health, outcome.kind) {
            (Health::Success, _) => Self::Success,
            (Health::Neutral, OutcomeKind::Reset(reset)) if reset.is_stale() => Self::StaleConnection,
            (Health::Neutral, _) => Self::Neutral,
            (Health::Failure, OutcomeKind::Reset(reset)) if !reset.response_started => Self::Reset,
            (_, OutcomeKind::Connect(ConnectFailure::Refused)) => Self::Refused,
            (_, OutcomeKind::Connect(ConnectFailure::Timeout)) => Self::ConnectTimeout,
            _ if outcome.advice() == RetryAdvice::Elsewhere && !full => Self::NoService,
            _ => Self::Failure,
        }
    }

    /// The same if only the stream of the attempt was reset (HTTP/2): its connection is intact, so nothing is suspected.
    pub const fn of_stream(self) -> Self {
        match self {
            Self::Reset => Self::Failure,
            Self::StaleConnection => Self::Neutral,
            other => other,
        }
    }

    /// There was no connection. Another connection attempt shows whether the endpoint is back.
    pub const fn is_unreachable(self) -> bool {
        matches!(self, Self::Refused | Self::ConnectTimeout)
    }

    /// Whether it counts towards an ejection.
    pub const fn is_failure(self) -> bool {
        matches!(self, Self::Failure | Self::Reset)
    }

    /// Whether it makes the endpoint absent.
    pub const fn makes_absent(self) -> bool {
        matches!(self, Self::Refused | Self::ConnectTimeout | Self::NoService)
    }
}

/// When an attempt began and ended.
#[derive(Clone, Copy, Debug)]
pub struct AttemptTimes {
    pub began: Instant,
    pub ended: Instant,
}

/// The change of an endpoint's state after an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndpointChange {
    Ejected(Ejection),
    /// It became absent.
    Absent,
    /// It was absent and serves requests again.
    Present,
    /// It remains absent, and its next probe is at another time.
    StillAbsent,
}

/// The ejection of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ejection {
    pub address: SocketAddr,
    pub consecutive_failures: u32,
    pub until: Instant,
}

/// A probe of an absent endpoint that is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DueProbe {
    /// Check whether it accepts a connection.
    Connection(SocketAddr),
    /// Check whether a request succeeds.
    Request(SocketAddr),
}
