//! The stable words for what goes wrong, and what each is in HTTP, gRPC and `Proxy-Status` (a table).

use http::StatusCode;

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
    /// Tokens cannot be checked, or none can be had: who could say is away.
    AuthUnavailable,
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
    /// No port, descriptor, buffer or route of this machine's own.
    LocalResource,
    /// A bug of ours, caught.
    Internal,
}

/// How a cause is told in each language.
pub struct Telling {
    pub word: &'static str,
    pub status: StatusCode,
    pub grpc: GrpcCode,
    pub proxy_status: &'static str,
    pub title: &'static str,
}

/// The gRPC status codes the proxy uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GrpcCode {
    InvalidArgument = 3,
    DeadlineExceeded = 4,
    PermissionDenied = 7,
    ResourceExhausted = 8,
    Internal = 13,
    Unavailable = 14,
    Unauthenticated = 16,
}

impl Cause {
    pub const ALL: [Self; 26] = [
        Self::DnsFailure,
        Self::DnsTimeout,
        Self::DeniedNetwork,
        Self::UnknownUpstream,
        Self::NotAllowed,
        Self::JwtInvalid,
        Self::AuthUnavailable,
        Self::NoEndpoint,
        Self::BreakerOpen,
        Self::ConnectRefused,
        Self::ConnectTimeout,
        Self::Reset,
        Self::AttemptTimeout,
        Self::Timeout,
        Self::Deadline,
        Self::QueueFull,
        Self::LimitFull,
        Self::RateLimited,
        Self::PeerIdentity,
        Self::TlsFailure,
        Self::Malformed,
        Self::Loop,
        Self::FaultInjected,
        Self::Draining,
        Self::LocalResource,
        Self::Internal,
    ];

    pub const fn telling(self) -> Telling {
        use GrpcCode::{DeadlineExceeded, PermissionDenied, ResourceExhausted, Unauthenticated, Unavailable};
        const fn telling(
            word: &'static str,
            status: StatusCode,
            grpc: GrpcCode,
            proxy_status: &'static str,
            title: &'static str,
        ) -> Telling {
            Telling { word, status, grpc, proxy_status, title }
        }
        const BAD_GATEWAY: StatusCode = StatusCode::BAD_GATEWAY;
        const UNAVAILABLE: StatusCode = StatusCode::SERVICE_UNAVAILABLE;
        const TIMEOUT: StatusCode = StatusCode::GATEWAY_TIMEOUT;
        const FORBIDDEN: StatusCode = StatusCode::FORBIDDEN;
        match self {
            Self::DnsFailure => telling(
                "dns_failure",
                BAD_GATEWAY,
                Unavailable,
                "dns_error",
                "The host name could not be resolved",
            ),
            Self::DnsTimeout => {
                telling("dns_timeout", TIMEOUT, Unavailable, "dns_timeout", "DNS did not answer in time")
            }
            Self::DeniedNetwork => telling(
                "denied_network",
                BAD_GATEWAY,
                Unavailable,
                "destination_ip_prohibited",
                "The address may not be called through this proxy",
            ),
            Self::UnknownUpstream => telling(
                "unknown_upstream",
                FORBIDDEN,
                PermissionDenied,
                "http_request_denied",
                "No upstream has this host",
            ),
            Self::NotAllowed => telling(
                "not_allowed",
                FORBIDDEN,
                PermissionDenied,
                "http_request_denied",
                "The caller may not do this",
            ),
            Self::JwtInvalid => telling(
                "jwt_invalid",
                StatusCode::UNAUTHORIZED,
                Unauthenticated,
                "http_request_denied",
                "The token is missing or not valid",
            ),
            Self::AuthUnavailable => telling(
                "auth_unavailable",
                UNAVAILABLE,
                Unavailable,
                "destination_unavailable",
                "Who issues tokens cannot be asked",
            ),
            Self::NoEndpoint => telling(
                "no_endpoint",
                UNAVAILABLE,
                Unavailable,
                "destination_unavailable",
                "The upstream has no healthy endpoint",
            ),
            Self::BreakerOpen => telling(
                "breaker_open",
                UNAVAILABLE,
                Unavailable,
                "destination_unavailable",
                "The circuit breaker of the upstream is open",
            ),
            Self::ConnectRefused => telling(
                "connect_refused",
                BAD_GATEWAY,
                Unavailable,
                "connection_refused",
                "The upstream could not be connected to",
            ),
            Self::ConnectTimeout => telling(
                "connect_timeout",
                TIMEOUT,
                Unavailable,
                "connection_timeout",
                "The upstream did not accept a connection in time",
            ),
            Self::Reset => telling(
                "reset",
                BAD_GATEWAY,
                Unavailable,
                "connection_terminated",
                "The upstream ended the connection before it answered",
            ),
            Self::AttemptTimeout => telling(
                "attempt_timeout",
                TIMEOUT,
                DeadlineExceeded,
                "http_response_timeout",
                "The last try took too long",
            ),
            Self::Timeout => telling(
                "timeout",
                TIMEOUT,
                DeadlineExceeded,
                "http_response_timeout",
                "The upstream did not answer in time",
            ),
            Self::Deadline => telling(
                "deadline",
                TIMEOUT,
                DeadlineExceeded,
                "http_response_timeout",
                "The caller's deadline passed",
            ),
            Self::QueueFull => telling(
                "queue_full",
                UNAVAILABLE,
                ResourceExhausted,
                "connection_limit_reached",
                "Too many calls wait for this upstream",
            ),
            Self::LimitFull => telling(
                "limit_full",
                UNAVAILABLE,
                ResourceExhausted,
                "connection_limit_reached",
                "The upstream is at its limit",
            ),
            Self::RateLimited => telling(
                "rate_limited",
                StatusCode::TOO_MANY_REQUESTS,
                ResourceExhausted,
                "http_request_error",
                "The rate limit is reached",
            ),
            Self::PeerIdentity => telling(
                "peer_identity",
                BAD_GATEWAY,
                Unavailable,
                "tls_certificate_error",
                "The peer is not who it should be",
            ),
            Self::TlsFailure => telling(
                "tls_failure",
                BAD_GATEWAY,
                Unavailable,
                "tls_protocol_error",
                "TLS with the upstream failed",
            ),
            Self::Malformed => telling(
                "malformed",
                StatusCode::BAD_REQUEST,
                GrpcCode::InvalidArgument,
                "http_request_error",
                "The request is malformed",
            ),
            Self::Loop => telling(
                "loop",
                BAD_GATEWAY,
                Unavailable,
                "proxy_loop_detected",
                "The request came back to this proxy",
            ),
            Self::FaultInjected => telling(
                "fault_injected",
                UNAVAILABLE,
                Unavailable,
                "http_request_error",
                "A fault was injected by configuration",
            ),
            Self::Draining => telling(
                "draining",
                UNAVAILABLE,
                Unavailable,
                "destination_unavailable",
                "The service is shutting down",
            ),
            Self::LocalResource => telling(
                "local_resource",
                UNAVAILABLE,
                ResourceExhausted,
                "proxy_internal_error",
                "The proxy has no port, descriptor or route left",
            ),
            Self::Internal => telling(
                "internal",
                StatusCode::INTERNAL_SERVER_ERROR,
                GrpcCode::Internal,
                "proxy_internal_error",
                "The proxy failed",
            ),
        }
    }

    /// The stable word.
    pub const fn word(self) -> &'static str {
        self.telling().word
    }

    pub const fn status(self) -> StatusCode {
        self.telling().status
    }

    pub const fn grpc_code(self) -> GrpcCode {
        self.telling().grpc
    }

    /// The error type registered by RFC 9209 §2.3.
    pub const fn proxy_status(self) -> &'static str {
        self.telling().proxy_status
    }

    /// Whether the upstream was tried in vain, or kept from being tried: a fallback may answer.
    pub const fn is_exhaustion(self) -> bool {
        matches!(
            self,
            Self::DnsFailure
                | Self::DnsTimeout
                | Self::AuthUnavailable
                | Self::NoEndpoint
                | Self::BreakerOpen
                | Self::ConnectRefused
                | Self::ConnectTimeout
                | Self::Reset
                | Self::AttemptTimeout
                | Self::Timeout
                | Self::QueueFull
                | Self::LimitFull
                | Self::TlsFailure
                | Self::FaultInjected
                | Self::LocalResource
        )
    }

    /// Whether inbound refused before the service saw anything: another endpoint may be tried.
    pub const fn is_elsewhere(self) -> bool {
        matches!(
            self,
            Self::ConnectRefused
                | Self::ConnectTimeout
                | Self::AuthUnavailable
                | Self::NoEndpoint
                | Self::QueueFull
                | Self::LimitFull
                | Self::LocalResource
                | Self::Draining
        )
    }

    pub const fn title(self) -> &'static str {
        self.telling().title
    }
}
