//! The outcome of an attempt: one classification that retry, breaker, outlier detection, metrics and spans share.
//!
//! Only failures of the service, or of the connection to it, count against it. Neutral are the proxy's own refusals,
//! requests cancelled by the client, and a client deadline shorter than the proxy's timeout.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use http::{HeaderMap, StatusCode};

pub use super::grpc::GrpcStatus;
use super::retry::RetryCondition;

/// The header field by which a sidecar advises the client's sidecar whether to retry.
pub const RETRY_ADVICE: &str = "x-outrigger-retry";

/// A server may report the expired deadline slightly before the proxy's own timer fires. Within this time of the
/// deadline, its error counts as the expired deadline.
const DEADLINE_SLACK: Duration = Duration::from_millis(10);

/// The outcome of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttemptOutcome {
    pub kind: OutcomeKind,
    /// As received; [`AttemptOutcome::advice`] returns the advice that applies.
    pub advice: RetryAdvice,
}

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutcomeKind {
    /// A response without a gRPC status.
    Http(StatusCode),
    /// A gRPC status, from headers (Trailers-Only) or trailers.
    Grpc(GrpcStatus),
    /// No connection was established, so nothing of the request was sent.
    Connect(ConnectFailure),
    /// HTTP/2 `REFUSED_STREAM`, or a stream above the last ID of a GOAWAY: certainly not processed (RFC 9113 §8.7).
    RefusedStream,
    /// The connection or the stream broke.
    Reset(Reset),
    /// `attempt_timeout` expired.
    AttemptTimeout,
    /// The attempt's share of the client's short deadline expired. Another attempt may follow, and the endpoint is not
    /// to blame.
    ClientShare,
    /// `timeout` expired during the attempt.
    Timeout,
    /// The client's deadline, shorter than the proxy's timeout, expired.
    ClientDeadline,
    /// The client closed its connection or stream.
    ClientGone,
    /// The client's request body is malformed, so the attempt was aborted.
    ClientError,
    /// The proxy did not send the request: breaker, limits, rate limit, an injected fault, drain.
    LocalRefusal,
}

/// Why no connection was established.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectFailure {
    /// Refused, unreachable, or reset while connecting.
    Refused,
    Timeout,
    /// The port accepted the connection, but TLS failed: it speaks no TLS, or rejects this service's certificate.
    Tls,
    /// The peer's certificate is missing, expired, revoked or untrusted, or names another peer than expected.
    PeerIdentity,
    /// The port accepted the connection, but the HTTP/2 handshake failed.
    Handshake,
    /// This machine lacks a port, a file descriptor, a buffer or a route: no connection attempt reached the endpoint.
    LocalResource,
}

/// How far an attempt had progressed when its connection was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reset {
    /// The connection was idle in the pool: the upstream may have closed it just as the request was sent (the stale
    /// keep-alive race). False on an HTTP/2 connection that carried other streams at the time.
    pub reused: bool,
    /// At least one byte of the request was handed to the kernel.
    pub request_sent: bool,
    /// At least one byte of the response arrived.
    pub response_started: bool,
}

impl Reset {
    /// A pooled connection was lost before any response byte: most likely the upstream closed it as the request was
    /// sent.
    pub const fn is_stale(self) -> bool {
        self.reused && !self.response_started
    }
}

/// The retry advice of the upstream's sidecar ([`RETRY_ADVICE`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RetryAdvice {
    #[default]
    None,
    /// A proxy nearer to the failure has already retried: do not multiply the attempts.
    No,
    /// Refused before the service received anything: another endpoint may be tried, whatever the method.
    Elsewhere,
}

/// How an attempt counts for the endpoint and the upstream that served it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    Success,
    Failure,
    /// Not counted. Does not reset the consecutive-failure count either.
    Neutral,
}

/// Counts a lost connection once, however many streams it carried: a hundred streams that fail together are one
/// failure. One per connection.
#[derive(Debug, Default)]
pub struct ConnectionLoss(AtomicBool);

impl ConnectionLoss {
    /// Returns `health` for the first attempt that fails with this connection, `Neutral` for the others. Call it once
    /// per attempt and report the result to breaker and outlier detector. Not for a stream that was reset alone.
    pub fn count_once(&self, health: Health) -> Health {
        if self.0.swap(true, Ordering::Relaxed) { Health::Neutral } else { health }
    }
}

impl OutcomeKind {
    /// The endpoint refused or did not accept the connection. Only another connection attempt shows whether it does
    /// now.
    pub const fn is_unreachable(self) -> bool {
        matches!(self, Self::Connect(ConnectFailure::Refused | ConnectFailure::Timeout))
    }

    /// The endpoint responded, if only by refusing the stream.
    pub const fn is_response(self) -> bool {
        matches!(self, Self::Http(_) | Self::Grpc(_) | Self::RefusedStream)
    }
}

impl AttemptOutcome {
    pub const fn new(ending: OutcomeKind) -> Self {
        Self { kind: ending, advice: RetryAdvice::None }
    }

    /// A response without a gRPC status, with the advice in its headers. Do not pass the advice of an upstream that
    /// the configuration does not name (use `AttemptOutcome::new`).
    /// `client_time_left`: until the client's deadline where that is shorter than the proxy's timeout. The upstream's
    /// sidecar knows this deadline too, and its 504 may arrive just before the proxy's own timer fires.
    pub fn http(status: StatusCode, advice: RetryAdvice, client_time_left: Option<Duration>) -> Self {
        let ending = match client_time_left {
            Some(left) if status == StatusCode::GATEWAY_TIMEOUT && left <= DEADLINE_SLACK => {
                OutcomeKind::ClientDeadline
            }
            _ => OutcomeKind::Http(status),
        };
        Self { kind: ending, advice }
    }

    /// A gRPC status. `client_time_left`: until the client's deadline where that is shorter than the proxy's timeout. A
    /// service that stops at that deadline behaves correctly.
    pub fn grpc(status: GrpcStatus, advice: RetryAdvice, client_time_left: Option<Duration>) -> Self {
        let gave_up = matches!(status, GrpcStatus::DeadlineExceeded | GrpcStatus::Cancelled);
        let ending = match client_time_left {
            Some(left) if gave_up && left <= DEADLINE_SLACK => OutcomeKind::ClientDeadline,
            _ => OutcomeKind::Grpc(status),
        };
        Self { kind: ending, advice }
    }

    /// Whether the attempt failed from the client's point of view.
    pub fn is_failure(&self) -> bool {
        self.kind.health() == Health::Failure
    }

    /// How it counts for the endpoint, and for the upstream with its breaker. A failure from a later hop
    /// ([`RetryAdvice::No`]) is neutral: any other endpoint would return the same, and the breaker next to the failure
    /// already sheds load. A second open breaker on the path would also refuse requests that do not need the failing
    /// service, and would block the trials of the breaker next to the failure.
    pub fn health(&self) -> Health {
        match (self.advice, self.kind.health()) {
            (RetryAdvice::No, Health::Failure) => Health::Neutral,
            (_, health) => health,
        }
    }

    /// The upstream's advice where it applies: a success cannot have been refused before the service received it.
    pub fn advice(&self) -> RetryAdvice {
        match self.advice {
            RetryAdvice::Elsewhere if self.kind.health() == Health::Success => RetryAdvice::None,
            advice => advice,
        }
    }

    /// Whether the service certainly did not process the request, so that sending it again cannot repeat an effect.
    pub fn is_unprocessed(&self) -> bool {
        let ending = match self.kind {
            OutcomeKind::Connect(_) | OutcomeKind::RefusedStream | OutcomeKind::LocalRefusal => true,
            OutcomeKind::Reset(reset) => !reset.request_sent,
            _ => false,
        };
        ending || self.advice() == RetryAdvice::Elsewhere
    }

    /// Whether the request counts as never sent (RFC 9113 §8.7): its stream was refused or above the last ID of a
    /// GOAWAY, or its connection was lost before a byte of the request was written.
    pub fn is_unsent(&self) -> bool {
        match self.kind {
            OutcomeKind::RefusedStream => true,
            OutcomeKind::Reset(reset) => !reset.request_sent && !reset.is_stale(),
            _ => false,
        }
    }

    /// Whether this condition of `retry.on` covers the outcome.
    pub fn matches(&self, condition: RetryCondition) -> bool {
        use RetryCondition as C;
        match (condition, self.kind) {
            (C::Default, _) => C::DEFAULT.iter().any(|condition| self.matches(*condition)),
            (C::ConnectFailure, OutcomeKind::Connect(_))
            | (C::RefusedStream, OutcomeKind::RefusedStream)
            | (C::Reset, OutcomeKind::Reset(_))
            | (C::AttemptTimeout, OutcomeKind::AttemptTimeout | OutcomeKind::ClientShare) => true,
            (C::GatewayError, OutcomeKind::Http(status)) => matches!(status.as_u16(), 502..=504),
            (C::ServerError, OutcomeKind::Http(status)) => status.is_server_error(),
            (C::Status(code), OutcomeKind::Http(status)) => status.as_u16() == code,
            (C::GrpcUnavailable, OutcomeKind::Grpc(status)) => status == GrpcStatus::Unavailable,
            (C::GrpcResourceExhausted, OutcomeKind::Grpc(status)) => status == GrpcStatus::ResourceExhausted,
            (C::GrpcDeadlineExceeded, OutcomeKind::Grpc(status)) => status == GrpcStatus::DeadlineExceeded,
            (C::GrpcInternal, OutcomeKind::Grpc(status)) => status == GrpcStatus::Internal,
            (C::GrpcCancelled, OutcomeKind::Grpc(status)) => status == GrpcStatus::Cancelled,
            _ => false,
        }
    }

    /// A stable word from a bounded set, for metrics, spans and logs.
    pub fn label(&self) -> &'static str {
        self.kind.label()
    }
}

impl OutcomeKind {
    fn health(self) -> Health {
        match self {
            Self::Http(status) => http_health(status),
            Self::Grpc(status) => status.health(),
            // The keep-alive race of the pool. A service that drops connections drops new ones too.
            Self::Reset(reset) if reset.is_stale() => Health::Neutral,
            Self::Connect(ConnectFailure::LocalResource) => Health::Neutral,
            Self::Connect(_) | Self::Reset(_) | Self::AttemptTimeout | Self::Timeout => Health::Failure,
            // A healthy server sheds load or shuts down this way (GOAWAY in a rolling restart).
            Self::RefusedStream => Health::Neutral,
            Self::ClientShare
            | Self::ClientDeadline
            | Self::ClientGone
            | Self::ClientError
            | Self::LocalRefusal => Health::Neutral,
        }
    }

    fn label(self) -> &'static str {
        match self {
            Self::Http(status) => match status.as_u16() {
                100..=199 => "1xx",
                200..=299 => "2xx",
                300..=399 => "3xx",
                429 => "429",
                400..=499 => "4xx",
                502 => "502",
                503 => "503",
                504 => "504",
                _ => "5xx",
            },
            Self::Grpc(status) => status.label(),
            Self::Connect(ConnectFailure::Refused) => "connect_refused",
            Self::Connect(ConnectFailure::Timeout) => "connect_timeout",
            Self::Connect(ConnectFailure::Tls) => "tls_failure",
            Self::Connect(ConnectFailure::PeerIdentity) => "peer_identity",
            Self::Connect(ConnectFailure::LocalResource) => "local_resource",
            Self::Connect(ConnectFailure::Handshake) => "reset",
            Self::RefusedStream => "refused_stream",
            Self::Reset(_) => "reset",
            Self::AttemptTimeout | Self::ClientShare => "attempt_timeout",
            Self::Timeout => "timeout",
            Self::ClientDeadline => "deadline",
            Self::ClientGone => "caller_gone",
            Self::ClientError => "client_error",
            Self::LocalRefusal => "local_refusal",
        }
    }
}

/// 5xx is a server error by definition (RFC 9110 §15.6), but 501 and 505 depend on the request. 429 comes from a
/// server healthy enough to limit its load: opening a breaker on it would turn a slow-down into an outage.
fn http_health(status: StatusCode) -> Health {
    match status.as_u16() {
        429 => Health::Neutral,
        501 | 505 => Health::Success,
        500.. => Health::Failure,
        _ => Health::Success,
    }
}

impl RetryAdvice {
    /// An unknown value is no advice.
    pub fn from_headers(headers: &HeaderMap) -> Self {
        match headers.get(RETRY_ADVICE).map(http::HeaderValue::as_bytes) {
            Some(b"no") => Self::No,
            Some(b"elsewhere") => Self::Elsewhere,
            _ => Self::None,
        }
    }

    /// The header value; `None` if the header field is not sent.
    pub const fn word(self) -> Option<&'static str> {
        match self {
            Self::None => None,
            Self::No => Some("no"),
            Self::Elsewhere => Some("elsewhere"),
        }
    }
}

#[cfg(test)]
pub(super) mod tests;
