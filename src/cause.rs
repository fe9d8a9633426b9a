//! The stable words for what goes wrong, and what each is in HTTP, gRPC and `Proxy-Status` (a table).

use http::StatusCode;

/// Why the proxy made the response itself. Each cause has one stable word: the same in `Proxy-Status`, the problem's
/// `type`, metric labels, spans, the access log and `docs/errors.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cause {
    DnsFailure,
    DnsTimeout,
    DeniedNetwork,
    UnknownUpstream,
    NotAllowed,
    /// The route's API version is no longer served.
    Sunset,
    JwtInvalid,
    /// The issuer of tokens, or its keys, cannot be reached: tokens cannot be checked or obtained.
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
    /// This machine has no port, descriptor, buffer or route left.
    LocalResource,
    /// `only-if-cached`, and nothing is stored.
    NotCached,
    /// The store of the queues, or its disk, is full.
    StoreFull,
    /// The store of the queues cannot be written to.
    StoreFailed,
    /// The request is too large to be queued.
    BodyTooLarge,
    /// The Idempotency-Key was used before, with another request.
    KeyReused,
    /// No such delivery, for this client.
    DeliveryUnknown,
    /// The delivery is in another state than the request needs.
    DeliveryState,
    /// A bug in the proxy, caught.
    Internal,
}

/// How a cause is expressed in each format.
pub struct CauseInfo {
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
    Unimplemented = 12,
    Internal = 13,
    Unavailable = 14,
    Unauthenticated = 16,
}

impl Cause {
    pub const ALL: [Self; 34] = [
        Self::DnsFailure,
        Self::DnsTimeout,
        Self::DeniedNetwork,
        Self::UnknownUpstream,
        Self::NotAllowed,
        Self::Sunset,
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
        Self::NotCached,
        Self::StoreFull,
        Self::StoreFailed,
        Self::BodyTooLarge,
        Self::KeyReused,
        Self::DeliveryUnknown,
        Self::DeliveryState,
        Self::Internal,
    ];

    pub const fn info(self) -> CauseInfo {
        use GrpcCode::{
            DeadlineExceeded, PermissionDenied, ResourceExhausted, Unauthenticated, Unavailable,
            Unimplemented,
        };
        const fn info(
            word: &'static str,
            status: StatusCode,
            grpc: GrpcCode,
            proxy_status: &'static str,
            title: &'static str,
        ) -> CauseInfo {
            CauseInfo { word, status, grpc, proxy_status, title }
        }
        const BAD_GATEWAY: StatusCode = StatusCode::BAD_GATEWAY;
        const UNAVAILABLE: StatusCode = StatusCode::SERVICE_UNAVAILABLE;
        const TIMEOUT: StatusCode = StatusCode::GATEWAY_TIMEOUT;
        const FORBIDDEN: StatusCode = StatusCode::FORBIDDEN;
        match self {
            Self::DnsFailure => info(
                "dns_failure",
                BAD_GATEWAY,
                Unavailable,
                "dns_error",
                "The host name could not be resolved",
            ),
            Self::DnsTimeout => {
                info("dns_timeout", TIMEOUT, Unavailable, "dns_timeout", "DNS did not answer in time")
            }
            Self::DeniedNetwork => info(
                "denied_network",
                BAD_GATEWAY,
                Unavailable,
                "destination_ip_prohibited",
                "The proxy may not connect to this address",
            ),
            Self::UnknownUpstream => info(
                "unknown_upstream",
                FORBIDDEN,
                PermissionDenied,
                "http_request_denied",
                "No upstream has this host",
            ),
            Self::NotAllowed => info(
                "not_allowed",
                FORBIDDEN,
                PermissionDenied,
                "http_request_denied",
                "The client is not allowed to send this request",
            ),
            Self::Sunset => info(
                "sunset",
                StatusCode::GONE,
                Unimplemented,
                "http_request_denied",
                "This version of the API is no longer served",
            ),
            Self::JwtInvalid => info(
                "jwt_invalid",
                StatusCode::UNAUTHORIZED,
                Unauthenticated,
                "http_request_denied",
                "The token is missing or not valid",
            ),
            Self::AuthUnavailable => info(
                "auth_unavailable",
                UNAVAILABLE,
                Unavailable,
                "destination_unavailable",
                "The token issuer cannot be reached",
            ),
            Self::NoEndpoint => info(
                "no_endpoint",
                UNAVAILABLE,
                Unavailable,
                "destination_unavailable",
                "The upstream has no healthy endpoint",
            ),
            Self::BreakerOpen => info(
                "breaker_open",
                UNAVAILABLE,
                Unavailable,
                "destination_unavailable",
                "The circuit breaker of the upstream is open",
            ),
            Self::ConnectRefused => info(
                "connect_refused",
                BAD_GATEWAY,
                Unavailable,
                "connection_refused",
                "The upstream could not be connected to",
            ),
            Self::ConnectTimeout => info(
                "connect_timeout",
                TIMEOUT,
                Unavailable,
                "connection_timeout",
                "The upstream did not accept a connection in time",
            ),
            Self::Reset => info(
                "reset",
                BAD_GATEWAY,
                Unavailable,
                "connection_terminated",
                "The upstream closed the connection before it responded",
            ),
            Self::AttemptTimeout => info(
                "attempt_timeout",
                TIMEOUT,
                DeadlineExceeded,
                "http_response_timeout",
                "The last attempt timed out",
            ),
            Self::Timeout => info(
                "timeout",
                TIMEOUT,
                DeadlineExceeded,
                "http_response_timeout",
                "The upstream did not respond in time",
            ),
            Self::Deadline => info(
                "deadline",
                TIMEOUT,
                DeadlineExceeded,
                "http_response_timeout",
                "The client's deadline has passed",
            ),
            Self::QueueFull => info(
                "queue_full",
                UNAVAILABLE,
                ResourceExhausted,
                "connection_limit_reached",
                "Too many requests are queued for this upstream",
            ),
            Self::LimitFull => info(
                "limit_full",
                UNAVAILABLE,
                ResourceExhausted,
                "connection_limit_reached",
                "The upstream is at its limit",
            ),
            Self::RateLimited => info(
                "rate_limited",
                StatusCode::TOO_MANY_REQUESTS,
                ResourceExhausted,
                "http_request_error",
                "The rate limit is reached",
            ),
            Self::PeerIdentity => info(
                "peer_identity",
                BAD_GATEWAY,
                Unavailable,
                "tls_certificate_error",
                "The peer's identity is not the expected one",
            ),
            Self::TlsFailure => info(
                "tls_failure",
                BAD_GATEWAY,
                Unavailable,
                "tls_protocol_error",
                "TLS with the upstream failed",
            ),
            Self::Malformed => info(
                "malformed",
                StatusCode::BAD_REQUEST,
                GrpcCode::InvalidArgument,
                "http_request_error",
                "The request is malformed",
            ),
            Self::Loop => info(
                "loop",
                BAD_GATEWAY,
                Unavailable,
                "proxy_loop_detected",
                "The request has passed this proxy before",
            ),
            Self::FaultInjected => info(
                "fault_injected",
                UNAVAILABLE,
                Unavailable,
                "http_request_error",
                "A fault was injected by configuration",
            ),
            Self::Draining => info(
                "draining",
                UNAVAILABLE,
                Unavailable,
                "destination_unavailable",
                "The service is shutting down",
            ),
            Self::LocalResource => info(
                "local_resource",
                UNAVAILABLE,
                ResourceExhausted,
                "proxy_internal_error",
                "The proxy has no port, descriptor or route left",
            ),
            Self::NotCached => info(
                "not_cached",
                TIMEOUT,
                Unavailable,
                "http_request_error",
                "No stored response can be used",
            ),
            Self::StoreFull => info(
                "store_full",
                StatusCode::INSUFFICIENT_STORAGE,
                ResourceExhausted,
                "proxy_internal_error",
                "The store of the queues is full",
            ),
            Self::StoreFailed => info(
                "store_failed",
                UNAVAILABLE,
                Unavailable,
                "proxy_internal_error",
                "The store of the queues cannot be used",
            ),
            Self::BodyTooLarge => info(
                "body_too_large",
                StatusCode::PAYLOAD_TOO_LARGE,
                GrpcCode::InvalidArgument,
                "http_request_error",
                "The request is too large to be queued",
            ),
            Self::KeyReused => info(
                "key_reused",
                StatusCode::UNPROCESSABLE_ENTITY,
                GrpcCode::InvalidArgument,
                "http_request_error",
                "The Idempotency-Key belongs to another request",
            ),
            Self::DeliveryUnknown => info(
                "delivery_unknown",
                StatusCode::NOT_FOUND,
                GrpcCode::InvalidArgument,
                "http_request_error",
                "There is no such delivery",
            ),
            Self::DeliveryState => info(
                "delivery_state",
                StatusCode::CONFLICT,
                GrpcCode::InvalidArgument,
                "http_request_error",
                "The state of the delivery does not allow it",
            ),
            Self::Internal => info(
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
        self.info().word
    }

    pub const fn status(self) -> StatusCode {
        self.info().status
    }

    pub const fn grpc_code(self) -> GrpcCode {
        self.info().grpc
    }

    /// The error type registered by RFC 9209 §2.3.
    pub const fn proxy_status(self) -> &'static str {
        self.info().proxy_status
    }

    /// Whether attempts failed or could not be made: a fallback may respond.
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

    /// Whether an inbound sidecar refused before the service saw the request: another endpoint may be tried.
    pub const fn is_retryable_elsewhere(self) -> bool {
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
        self.info().title
    }
}
