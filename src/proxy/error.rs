//! The error responses that the proxy makes itself: RFC 9457 problem JSON or a gRPC status, with an RFC 9209
//! `Proxy-Status` field.

use std::time::Duration;

use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use serde::Serialize;

use super::body::ResponseBody;
use crate::{
    cause::Cause,
    resilience::deprecation::{SUNSET, http_date},
    units::Date,
};

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
    /// The date in `Sunset`.
    pub sunset: Option<Date>,
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

impl ProxyError {
    pub fn new(cause: Cause, detail: impl Into<String>) -> Self {
        Self { cause, detail: detail.into(), retry_after: None, status: None, challenge: None, sunset: None }
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
pub struct ErrorContext<'a> {
    /// The deployment's name in `Proxy-Status`: `outrigger/SERVICE`.
    pub deployment: &'a str,
    pub request_id: &'a str,
    pub trace_id: Option<&'a str>,
    pub upstream: Option<&'a str>,
    /// The number of attempts that were made.
    pub attempts: u32,
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
pub fn respond(error: &ProxyError, context: &ErrorContext<'_>) -> Response<ResponseBody> {
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
    if let Some(date) = error.sunset {
        headers.insert(SUNSET, http_date(date));
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
            attempts: context.attempts,
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
        let context = ErrorContext {
            deployment: "outrigger/checkout",
            request_id: "r1",
            attempts: 2,
            ..ErrorContext::default()
        };
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
        let response = respond(
            &error,
            &ErrorContext { deployment: "outrigger/a", grpc: true, ..ErrorContext::default() },
        );
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["grpc-status"], "4");
        assert_eq!(response.headers()["grpc-message"], "timeout: no answer %E2%80%93 100 %25");
    }
}
