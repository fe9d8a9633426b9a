//! What came of a try: one classification that retry, breaker, outlier detection, metrics and spans share.
//!
//! Only what the service (or the way to it) caused counts against it. What we refused ourselves, a caller that gave
//! up, and a caller in more of a hurry than our own timeout, say nothing about the service.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use http::{HeaderMap, StatusCode};

pub use super::grpc::GrpcStatus;
use super::retry::Condition;

/// The field by which a sidecar tells the caller's sidecar whether to try again.
pub const RETRY_ADVICE: &str = "x-outrigger-retry";

/// A server whose clock started a moment after ours ends a call "at the deadline" a moment before we do.
const DEADLINE_SLACK: Duration = Duration::from_millis(10);

/// What came of a try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub ending: Ending,
    /// As it was sent; what to heed of it says [`Outcome::advice`].
    pub advice: Advice,
}

/// How a try ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// An answer without a gRPC status.
    Http(StatusCode),
    /// A gRPC status, from headers (Trailers-Only) or trailers.
    Grpc(GrpcStatus),
    /// No connection came about, so nothing of the request was sent.
    Connect(ConnectFailure),
    /// HTTP/2 `REFUSED_STREAM`, or a stream above the last id of a GOAWAY: surely not processed (RFC 9113 §8.7).
    RefusedStream,
    /// The connection or the stream broke.
    Reset(Reset),
    /// `attempt_timeout` ran out.
    AttemptTimeout,
    /// The attempt's share of the client's short deadline ran out: another may follow, and nobody is to blame.
    ClientShare,
    /// `timeout` ran out while the try was under way.
    Timeout,
    /// The caller's deadline, shorter than ours, ran out.
    CallersDeadline,
    /// The caller went away.
    CallerGone,
    /// What the client sent of its body is malformed, so the attempt was broken off.
    ClientError,
    /// We never sent it: breaker, limits, rate limit, an injected fault, draining.
    LocalRefusal,
}

/// Why there was no connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectFailure {
    /// Refused, unreachable, reset while connecting.
    Refused,
    Timeout,
    /// The port accepted the connection, but TLS failed: it speaks no TLS, or rejects our certificate.
    Tls,
    /// The peer's certificate is missing, expired, revoked or untrusted, or names another peer than expected.
    PeerIdentity,
    /// The port accepted the connection, but the HTTP/2 handshake failed.
    Handshake,
    /// No port, descriptor, buffer or route of this machine's own: the endpoint was not even asked.
    LocalResource,
}

/// How far a try had come when its connection broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reset {
    /// The connection came idle out of the pool: the upstream may have closed it just as we sent (the stale
    /// keep-alive race). False on an HTTP/2 connection that carried other streams at the time.
    pub reused: bool,
    /// At least one byte of the request was handed to the kernel.
    pub request_sent: bool,
    /// At least one byte of the response came.
    pub response_begun: bool,
}

impl Reset {
    /// A pooled connection that broke before any response byte: most likely the upstream closed it just as we sent.
    pub const fn is_stale(self) -> bool {
        self.reused && !self.response_begun
    }
}

/// What the upstream's sidecar advises ([`RETRY_ADVICE`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Advice {
    #[default]
    None,
    /// Tries were already spent nearer to the failure: don't multiply them.
    No,
    /// Refused before the service saw anything: another endpoint may be tried, whatever the method.
    Elsewhere,
}

/// What a try says about who served it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    Success,
    Failure,
    /// Neither counts nor breaks a row of failures.
    Neutral,
}

/// Sees to it that a lost connection counts once, whatever it carried: a hundred streams that break together are
/// one failure. One for each connection.
#[derive(Debug, Default)]
pub struct Loss(AtomicBool);

impl Loss {
    /// What a try that broke with this connection counts for: itself for the first, neither for the others. Ask once
    /// a try, and tell the answer to the breaker and the outlier detector. Not for a stream that was reset alone.
    pub fn weigh(&self, health: Health) -> Health {
        if self.0.swap(true, Ordering::Relaxed) { Health::Neutral } else { health }
    }
}

impl Ending {
    /// Nobody was there, as far as a connection can tell: asking for one again says whether that has changed.
    pub const fn found_nobody(self) -> bool {
        matches!(self, Self::Connect(ConnectFailure::Refused | ConnectFailure::Timeout))
    }

    /// Somebody was there and said something.
    pub const fn is_answer(self) -> bool {
        matches!(self, Self::Http(_) | Self::Grpc(_) | Self::RefusedStream)
    }
}

impl Outcome {
    pub const fn new(ending: Ending) -> Self {
        Self { ending, advice: Advice::None }
    }

    /// An answer that carries no gRPC status, with the advice in its headers. Pass no advice of an upstream that
    /// the configuration does not name (`Outcome::new`).
    /// `clients_time_left`: of the client's deadline where that is shorter than ours. The upstream's sidecar was told of
    /// it, and its 504 may be a moment ahead of our own clock.
    pub fn http(status: StatusCode, advice: Advice, clients_time_left: Option<Duration>) -> Self {
        let ending = match clients_time_left {
            Some(left) if status == StatusCode::GATEWAY_TIMEOUT && left <= DEADLINE_SLACK => {
                Ending::CallersDeadline
            }
            _ => Ending::Http(status),
        };
        Self { ending, advice }
    }

    /// A gRPC status. `callers_time_left`: of the caller's deadline where that is shorter than ours; a service that
    /// gives up just then does what it was asked to.
    pub fn grpc(status: GrpcStatus, advice: Advice, callers_time_left: Option<Duration>) -> Self {
        let gave_up = matches!(status, GrpcStatus::DeadlineExceeded | GrpcStatus::Cancelled);
        let ending = match callers_time_left {
            Some(left) if gave_up && left <= DEADLINE_SLACK => Ending::CallersDeadline,
            _ => Ending::Grpc(status),
        };
        Self { ending, advice }
    }

    /// Whether the try failed, as far as the caller is concerned.
    pub fn is_failure(&self) -> bool {
        self.ending.health() == Health::Failure
    }

    /// What it means for who served it: the endpoint, and the upstream with its breaker. A failure from further behind
    /// ([`Advice::No`]) is none of theirs: it would be the same at any other endpoint, and the breaker next to it sheds
    /// load already. One more breaker on the way would refuse what does not need the failing service at all, and keep
    /// that one's trials from it.
    pub fn health(&self) -> Health {
        match (self.advice, self.ending.health()) {
            (Advice::No, Health::Failure) => Health::Neutral,
            (_, health) => health,
        }
    }

    /// What to heed of the upstream's advice: what was done well cannot have been refused before it was seen.
    pub fn advice(&self) -> Advice {
        match self.advice {
            Advice::Elsewhere if self.ending.health() == Health::Success => Advice::None,
            advice => advice,
        }
    }

    /// Whether the service surely saw nothing of the request, so that sending it again cannot do anything twice.
    pub fn never_reached(&self) -> bool {
        let ending = match self.ending {
            Ending::Connect(_) | Ending::RefusedStream | Ending::LocalRefusal => true,
            Ending::Reset(reset) => !reset.request_sent,
            _ => false,
        };
        ending || self.advice() == Advice::Elsewhere
    }

    /// Whether the request counts as never sent (RFC 9113 §8.7): its stream was refused or lay above the last id of a GOAWAY,
    /// or its connection ended before a byte of it was written.
    pub fn is_unsent(&self) -> bool {
        match self.ending {
            Ending::RefusedStream => true,
            Ending::Reset(reset) => !reset.request_sent && !reset.is_stale(),
            _ => false,
        }
    }

    /// Whether `retry.on` means this outcome by that word.
    pub fn meets(&self, condition: Condition) -> bool {
        use Condition as C;
        match (condition, self.ending) {
            (C::Default, _) => C::DEFAULT.iter().any(|condition| self.meets(*condition)),
            (C::ConnectFailure, Ending::Connect(_))
            | (C::RefusedStream, Ending::RefusedStream)
            | (C::Reset, Ending::Reset(_))
            | (C::AttemptTimeout, Ending::AttemptTimeout | Ending::ClientShare) => true,
            (C::GatewayError, Ending::Http(status)) => matches!(status.as_u16(), 502..=504),
            (C::ServerError, Ending::Http(status)) => status.is_server_error(),
            (C::Status(code), Ending::Http(status)) => status.as_u16() == code,
            (C::GrpcUnavailable, Ending::Grpc(status)) => status == GrpcStatus::Unavailable,
            (C::GrpcResourceExhausted, Ending::Grpc(status)) => status == GrpcStatus::ResourceExhausted,
            (C::GrpcDeadlineExceeded, Ending::Grpc(status)) => status == GrpcStatus::DeadlineExceeded,
            (C::GrpcInternal, Ending::Grpc(status)) => status == GrpcStatus::Internal,
            (C::GrpcCancelled, Ending::Grpc(status)) => status == GrpcStatus::Cancelled,
            _ => false,
        }
    }

    /// A stable word, of bounded number: for metrics, spans and logs.
    pub fn label(&self) -> &'static str {
        self.ending.label()
    }
}

impl Ending {
    fn health(self) -> Health {
        match self {
            Self::Http(status) => http_health(status),
            Self::Grpc(status) => status.health(),
            // The race of our own pool; a service that breaks connections breaks fresh ones as well.
            Self::Reset(reset) if reset.is_stale() => Health::Neutral,
            Self::Connect(ConnectFailure::LocalResource) => Health::Neutral,
            Self::Connect(_) | Self::Reset(_) | Self::AttemptTimeout | Self::Timeout => Health::Failure,
            // "Not now, and not processed" is how a well server sheds load or leaves (GOAWAY in a rolling restart).
            Self::RefusedStream => Health::Neutral,
            Self::ClientShare
            | Self::CallersDeadline
            | Self::CallerGone
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
            Self::CallersDeadline => "deadline",
            Self::CallerGone => "caller_gone",
            Self::ClientError => "client_error",
            Self::LocalRefusal => "local_refusal",
        }
    }
}

/// 5xx is the server's fault by definition (RFC 9110 §15.6), but 501 and 505 are about what was asked. 429 is a
/// server that is well enough to say "less": opening a breaker on it would turn a slow-down into an outage.
fn http_health(status: StatusCode) -> Health {
    match status.as_u16() {
        429 => Health::Neutral,
        501 | 505 => Health::Success,
        500.. => Health::Failure,
        _ => Health::Success,
    }
}

impl Advice {
    /// Words that we don't know advise nothing.
    pub fn from_headers(headers: &HeaderMap) -> Self {
        match headers.get(RETRY_ADVICE).map(http::HeaderValue::as_bytes) {
            Some(b"no") => Self::No,
            Some(b"elsewhere") => Self::Elsewhere,
            _ => Self::None,
        }
    }

    /// As it is written in the field; `None` where there is nothing to write.
    pub const fn word(self) -> Option<&'static str> {
        match self {
            Self::None => None,
            Self::No => Some("no"),
            Self::Elsewhere => Some("elsewhere"),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use http::HeaderValue;

    use super::*;

    const LOST: Reset = Reset { reused: false, request_sent: true, response_begun: false };

    /// One of everything that can happen.
    pub fn every_ending() -> Vec<Ending> {
        let mut all: Vec<Ending> =
            [200, 204, 301, 400, 404, 408, 409, 425, 429, 500, 501, 502, 503, 504, 505, 599]
                .iter()
                .filter_map(|code| StatusCode::from_u16(*code).ok())
                .map(Ending::Http)
                .collect();
        all.extend((0..=16).map(|code| Ending::Grpc(GrpcStatus::from_code(code))));
        use ConnectFailure::{Handshake, LocalResource, PeerIdentity, Refused, Timeout, Tls};
        all.extend([Refused, Timeout, Tls, PeerIdentity, Handshake, LocalResource].map(Ending::Connect));
        for bits in 0..8 {
            let reset =
                Reset { reused: bits & 1 > 0, request_sent: bits & 2 > 0, response_begun: bits & 4 > 0 };
            all.push(Ending::Reset(reset));
        }
        all.extend([
            Ending::RefusedStream,
            Ending::AttemptTimeout,
            Ending::ClientShare,
            Ending::Timeout,
            Ending::CallersDeadline,
            Ending::CallerGone,
            Ending::LocalRefusal,
        ]);
        all
    }

    fn http(code: u16) -> Outcome {
        Outcome::new(Ending::Http(StatusCode::from_u16(code).unwrap()))
    }

    fn grpc(status: GrpcStatus) -> Outcome {
        Outcome::grpc(status, Advice::None, None)
    }

    #[test]
    fn only_what_the_server_caused_counts() {
        for code in [500, 502, 503, 504, 507, 599] {
            assert_eq!(http(code).health(), Health::Failure, "{code}");
        }
        for code in [200, 204, 301, 400, 401, 404, 408, 409, 499, 501, 505] {
            assert_eq!(http(code).health(), Health::Success, "{code}");
        }
        assert_eq!(http(429).health(), Health::Neutral);
        for ending in [
            Ending::LocalRefusal,
            Ending::CallerGone,
            Ending::CallersDeadline,
            Ending::RefusedStream,
            Ending::ClientShare,
            Ending::Connect(ConnectFailure::LocalResource),
        ] {
            assert_eq!(Outcome::new(ending).health(), Health::Neutral, "{ending:?}");
        }
        for ending in [
            Ending::Connect(ConnectFailure::Refused),
            Ending::Reset(LOST),
            Ending::AttemptTimeout,
            Ending::Timeout,
        ] {
            assert_eq!(Outcome::new(ending).health(), Health::Failure, "{ending:?}");
        }
        use GrpcStatus as G;
        for status in [G::Unknown, G::DeadlineExceeded, G::Internal, G::Unavailable, G::DataLoss] {
            assert_eq!(grpc(status).health(), Health::Failure, "{status:?}");
        }
        for status in [G::Ok, G::NotFound, G::PermissionDenied, G::Unimplemented, G::Aborted] {
            assert_eq!(grpc(status).health(), Health::Success, "{status:?}");
        }
        assert_eq!(grpc(G::ResourceExhausted).health(), Health::Neutral);
    }

    #[test]
    fn a_failure_from_further_behind_is_one_but_not_of_who_passed_it_on() {
        let outcome = Outcome { advice: Advice::No, ..http(503) };
        assert!(outcome.is_failure());
        assert_eq!(outcome.health(), Health::Neutral);
        let refused = Outcome { advice: Advice::Elsewhere, ..http(503) };
        assert_eq!(refused.health(), Health::Failure);
        assert!(refused.never_reached());
        let well = Outcome { advice: Advice::Elsewhere, ..http(200) };
        assert!(!well.never_reached() && well.health() == Health::Success);
        assert!(!outcome.never_reached());
    }

    #[test]
    fn a_lost_connection_counts_once() {
        let loss = Loss::default();
        let counted: Vec<Health> = (0..100).map(|_| loss.weigh(Health::Failure)).collect();
        assert_eq!(counted[0], Health::Failure);
        assert!(counted[1..].iter().all(|health| *health == Health::Neutral));
    }

    #[test]
    fn a_service_that_gives_up_at_the_callers_deadline_is_not_to_blame() {
        let at = |left| Outcome::grpc(GrpcStatus::DeadlineExceeded, Advice::None, left).health();
        assert_eq!(at(Some(Duration::ZERO)), Health::Neutral);
        assert_eq!(at(Some(Duration::from_millis(4))), Health::Neutral);
        assert_eq!(at(Some(Duration::from_secs(4))), Health::Failure);
        assert_eq!(at(None), Health::Failure);
    }

    /// Its sidecar was told of the client's deadline, and says 504 a moment before our own clock does.
    #[test]
    fn a_504_at_the_clients_deadline_is_nobodys_fault() {
        let at = |status, left| Outcome::http(status, Advice::None, left).health();
        let ms = Duration::from_millis;
        assert_eq!(at(StatusCode::GATEWAY_TIMEOUT, Some(ms(1))), Health::Neutral);
        assert_eq!(at(StatusCode::GATEWAY_TIMEOUT, Some(ms(100))), Health::Failure);
        assert_eq!(at(StatusCode::GATEWAY_TIMEOUT, None), Health::Failure);
        assert_eq!(at(StatusCode::SERVICE_UNAVAILABLE, Some(ms(1))), Health::Failure);
    }

    #[test]
    fn surely_unprocessed_is_only_what_was_refused_or_never_sent() {
        for ending in every_ending() {
            let sure = match ending {
                Ending::Connect(_) | Ending::RefusedStream | Ending::LocalRefusal => true,
                Ending::Reset(reset) => !reset.request_sent,
                _ => false,
            };
            assert_eq!(Outcome::new(ending).never_reached(), sure, "{ending:?}");
        }
    }

    #[test]
    fn conditions_mean_what_they_say() {
        assert!(http(503).meets(Condition::GatewayError) && http(503).meets(Condition::Default));
        assert!(!http(500).meets(Condition::GatewayError) && http(500).meets(Condition::ServerError));
        assert!(http(429).meets(Condition::Status(429)) && !http(429).meets(Condition::Default));
        assert!(grpc(GrpcStatus::Unavailable).meets(Condition::Default));
        assert!(!grpc(GrpcStatus::Internal).meets(Condition::Default));
        assert!(!Outcome::new(Ending::Timeout).meets(Condition::AttemptTimeout));
        for ending in [Ending::CallerGone, Ending::CallersDeadline, Ending::LocalRefusal] {
            let outcome = Outcome::new(ending);
            assert!(!outcome.meets(Condition::Default) && !outcome.meets(Condition::ServerError));
        }
    }

    #[test]
    fn reads_what_the_upstream_advises() {
        let mut headers = HeaderMap::new();
        assert_eq!(Advice::from_headers(&headers), Advice::None);
        for advice in [Advice::No, Advice::Elsewhere] {
            headers.insert(RETRY_ADVICE, HeaderValue::from_static(advice.word().unwrap()));
            assert_eq!(Advice::from_headers(&headers), advice);
        }
        headers.insert(RETRY_ADVICE, HeaderValue::from_static("perhaps"));
        assert_eq!(Advice::from_headers(&headers), Advice::None);
    }
}
