//! Everything that the proxy itself can answer, and how it says so.

use std::time::Duration;

/// Why the proxy answered in place of the service. One stable word each: the same in `Proxy-Status`, the problem's
/// `type`, metric labels, spans, the access log and `docs/errors.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cause {
    DnsFailure,
    DnsTimeout,
    DeniedNetwork,
    UnknownUpstream,
    NotAllowed,
    JwtInvalid,
    NoEndpoint,
    BreakerOpen,
    ConnectRefused,
    ConnectTimeout,
    Reset,
    AttemptTimeout,
    Timeout,
    Deadline,
    QueueFull,
    LimitFull,
    RateLimited,
    PeerIdentity,
    TlsFailure,
    Malformed,
    Loop,
    FaultInjected,
    Draining,
}

/// An answer of the proxy's own.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{}: {detail}", cause.word())]
pub struct ProxyError {
    pub cause: Cause,
    /// What happened, in plain words: which upstream, which address, how long.
    pub detail: String,
    pub retry_after: Option<Duration>,
}

impl Cause {
    pub const fn word(self) -> &'static str {
        match self {
            Self::DnsFailure => "dns_failure",
            Self::DnsTimeout => "dns_timeout",
            Self::DeniedNetwork => "denied_network",
            Self::UnknownUpstream => "unknown_upstream",
            Self::NotAllowed => "not_allowed",
            Self::JwtInvalid => "jwt_invalid",
            Self::NoEndpoint => "no_endpoint",
            Self::BreakerOpen => "breaker_open",
            Self::ConnectRefused => "connect_refused",
            Self::ConnectTimeout => "connect_timeout",
            Self::Reset => "reset",
            Self::AttemptTimeout => "attempt_timeout",
            Self::Timeout => "timeout",
            Self::Deadline => "deadline",
            Self::QueueFull => "queue_full",
            Self::LimitFull => "limit_full",
            Self::RateLimited => "rate_limited",
            Self::PeerIdentity => "peer_identity",
            Self::TlsFailure => "tls_failure",
            Self::Malformed => "malformed",
            Self::Loop => "loop",
            Self::FaultInjected => "fault_injected",
            Self::Draining => "draining",
        }
    }
}
