//! The error responses that the proxy makes itself: RFC 9457 problem JSON or a gRPC status, with an RFC 9209
//! `Proxy-Status` field.

use std::time::Duration;

use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use serde::Serialize;

use super::body::ResponseBody;

/// Why the proxy made the response itself. Each cause has one stable word: the same in `Proxy-Status`, the problem's
/// `type`, metric labels, spans, the access log and `docs/errors.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cause {
    DnsFailure,
    DnsTimeout,
    DeniedNetwork,
    UnknownUpstream,
    NotAllowed,
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
    /// A bug in the proxy, caught.
    Internal,
}

/// An error that the proxy answers with a response of its own.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{}: {detail}", cause.word())]
pub struct ProxyError {
    pub cause: Cause,
    /// What happened, to which upstream or address, and how long it took.
    pub detail: String,
    /// When the client may retry, where waiting helps.
    pub retry_after: Option<Duration>,
    /// The status in place of the cause's, where a more specific one fits (431, 417, an injected one).
    pub status: Option<StatusCode>,
    /// The authentication challenge for the client.
    pub challenge: Option<Challenge>,
}

/// The error in `WWW-Authenticate` (RFC 6750 §3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Challenge {
    /// The request had no token.
    Bearer,
    InvalidRequest,
    InvalidToken,
    InsufficientScope,
}

/// How a cause is expressed in each format.
struct CauseInfo {
    word: &'static str,
    status: StatusCode,
    grpc: GrpcCode,
    proxy_status: &'static str,
    title: &'static str,
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

    const fn info(self) -> CauseInfo {
        use GrpcCode::{DeadlineExceeded, PermissionDenied, ResourceExhausted, Unauthenticated, Unavailable};
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
        self.info().title
    }
}

impl ProxyError {
    pub fn new(cause: Cause, detail: impl Into<String>) -> Self {
        Self { cause, detail: detail.into(), retry_after: None, status: None, challenge: None }
    }

    pub fn malformed(detail: impl Into<String>) -> Self {
        Self::new(Cause::Malformed, detail)
    }

    pub fn with_status(mut self, status: StatusCode) -> Self {
        self.status = Some(status);
        self
    }

    pub fn retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }
}

/// What an error response contains besides the error.
#[derive(Debug, Default)]
pub struct Context<'a> {
    /// The deployment's name in `Proxy-Status`: `outrigger/SERVICE`.
    pub deployment: &'a str,
    pub request_id: &'a str,
    pub trace_id: Option<&'a str>,
    pub upstream: Option<&'a str>,
    /// The number of attempts that were made.
    pub tries: u32,
    /// The last address that was tried. `None` on the inbound side: clients outside must not learn internal addresses.
    pub next_hop: Option<String>,
    pub grpc: bool,
}

/// An RFC 9457 problem with extension members.
#[derive(Serialize)]
struct Problem<'a> {
    r#type: String,
    title: &'a str,
    status: u16,
    detail: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    instance: &'a str,
    cause: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    trace_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    upstream: Option<&'a str>,
    attempts: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    retry_after_ms: Option<u64>,
}

/// The published address of `docs/errors.md`.
const ERRORS_PAGE: &str = "https://outrigger.dev/errors";

/// Turns an error into a response. The only function that does.
pub fn respond(error: &ProxyError, context: &Context<'_>) -> Response<ResponseBody> {
    let info = error.cause.info();
    let status = error.status.unwrap_or(info.status);
    let mut headers = HeaderMap::with_capacity(6);
    let mut proxy_status =
        format!("{}; error={}; details=\"{}\"", context.deployment, info.proxy_status, info.word);
    if let Some(next_hop) = &context.next_hop {
        proxy_status.push_str(&format!("; next-hop=\"{next_hop}\""));
    }
    insert(&mut headers, "proxy-status", &proxy_status);
    if let Some(wait) = error.retry_after {
        // Whole seconds, rounded up.
        let seconds = wait.as_millis().div_ceil(1000).max(1);
        insert(&mut headers, "retry-after", &seconds.to_string());
    }
    if let Some(challenge) = error.challenge {
        let error = match challenge {
            Challenge::Bearer => "",
            Challenge::InvalidRequest => ", error=\"invalid_request\"",
            Challenge::InvalidToken => ", error=\"invalid_token\"",
            Challenge::InsufficientScope => ", error=\"insufficient_scope\"",
        };
        insert(&mut headers, "www-authenticate", &format!("Bearer realm=\"{}\"{error}", context.deployment));
    }
    let (status, body) = if context.grpc {
        insert(&mut headers, "content-type", "application/grpc");
        insert(&mut headers, "grpc-status", &(info.grpc as u8).to_string());
        insert(&mut headers, "grpc-message", &percent_encoded(&error.to_string()));
        (StatusCode::OK, ResponseBody::Empty)
    } else {
        let problem = Problem {
            r#type: format!("{ERRORS_PAGE}#{}", info.word),
            title: info.title,
            status: status.as_u16(),
            detail: &error.detail,
            instance: context.request_id,
            cause: info.word,
            trace_id: context.trace_id,
            upstream: context.upstream,
            attempts: context.tries,
            retry_after_ms: error.retry_after.map(|wait| u64::try_from(wait.as_millis()).unwrap_or(u64::MAX)),
        };
        insert(&mut headers, "content-type", "application/problem+json");
        insert(&mut headers, "cache-control", "no-store");
        (status, ResponseBody::whole(serde_json::to_vec(&problem).unwrap_or_default()))
    };
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

fn insert(headers: &mut HeaderMap, name: &'static str, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(header::HeaderName::from_static(name), value);
    }
}

/// The value of `grpc-message`: printable ASCII unchanged, everything else and `%` percent-encoded.
fn percent_encoded(text: &str) -> String {
    text.bytes().fold(String::with_capacity(text.len()), |mut out, byte| {
        match byte {
            b' '..=b'~' if byte != b'%' => out.push(char::from(byte)),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
        out
    })
}

/// A deployment's name as an RFC 8941 token: `outrigger/SERVICE`.
pub fn deployment(service: &str) -> String {
    let token = |c: char| if c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~:/".contains(c) { c } else { '-' };
    format!("outrigger/{}", service.chars().map(token).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_distinct_and_stable_in_form() {
        let mut words: Vec<&str> = Cause::ALL.iter().map(|cause| cause.word()).collect();
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), Cause::ALL.len());
        assert!(words.iter().all(|word| word.chars().all(|c| c.is_ascii_lowercase() || c == '_')));
    }

    #[test]
    fn every_cause_is_documented() {
        let page = include_str!("../../docs/errors.md");
        for cause in Cause::ALL {
            let heading = format!("## {}\n", cause.word());
            assert!(page.contains(&heading), "docs/errors.md lacks `{}`", heading.trim());
        }
    }

    #[test]
    fn an_http_client_gets_problem_json() {
        let error = ProxyError::new(Cause::BreakerOpen, "payments: 10 failures in a row")
            .retry_after(Duration::from_millis(1200));
        let context =
            Context { deployment: "outrigger/checkout", request_id: "r1", tries: 2, ..Context::default() };
        let response = respond(&error, &context);
        assert_eq!(response.status(), 503);
        assert_eq!(response.headers()["retry-after"], "2");
        assert_eq!(
            response.headers()["proxy-status"],
            "outrigger/checkout; error=destination_unavailable; details=\"breaker_open\""
        );
        let ResponseBody::Whole(Some(body)) = response.into_body() else {
            unreachable!("a problem has a body")
        };
        let problem: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(problem["cause"], "breaker_open");
        assert_eq!(problem["status"], 503);
        assert_eq!(problem["retry_after_ms"], 1200);
        assert_eq!(problem["detail"], "payments: 10 failures in a row");
    }

    #[test]
    fn a_grpc_client_gets_a_grpc_status() {
        let error = ProxyError::new(Cause::Timeout, "no answer – 100 %");
        let response =
            respond(&error, &Context { deployment: "outrigger/a", grpc: true, ..Context::default() });
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["grpc-status"], "4");
        assert_eq!(response.headers()["grpc-message"], "timeout: no answer %E2%80%93 100 %25");
    }

    #[test]
    fn a_service_name_becomes_a_token() {
        assert_eq!(deployment("check out/ä"), "outrigger/check-out/-");
    }
}
