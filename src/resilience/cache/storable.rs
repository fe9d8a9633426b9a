//! Whether a response may be stored (RFC 9111 §3), and which others it invalidates (§4.4).

use http::{
    HeaderMap, HeaderName, Method, StatusCode,
    header::{AUTHORIZATION, CONTENT_TYPE, COOKIE, EXPIRES, RANGE, SET_COOKIE, UPGRADE},
};

use super::{
    AuthorizationRule,
    conditional::has_precondition,
    directives::{RequestDirectives, ResponseDirectives},
    freshness::is_heuristically_cacheable,
    vary,
};

/// Why a response is not stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotStored {
    /// The method, or a partial response.
    Kind,
    NoStore,
    Private,
    /// The request had credentials, and the response does not allow to share it.
    Authorization,
    /// The request had cookies, and the response neither says `public` nor varies by them.
    Cookie,
    SetCookie,
    /// `Vary: *`.
    Vary,
    /// Its status needs explicit freshness, and there is none.
    Status,
    /// `text/event-stream`: it has no end.
    EventStream,
}

/// Fields that make another method of a GET.
const METHOD_OVERRIDES: [&str; 3] = ["x-http-method-override", "x-http-method", "x-method-override"];

/// Why the store has no part in a request: it is forwarded as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bypass {
    /// Neither GET nor HEAD.
    Method,
    Body,
    Upgrade,
    /// A field makes another method of it, which must reach the service.
    MethodOverride,
    /// `If-Match` or `If-Unmodified-Since`: only the service can evaluate it.
    Precondition,
    Grpc,
}

impl Bypass {
    /// Why, in words.
    pub const fn reason(self) -> &'static str {
        match self {
            Self::Method => "only GET and HEAD are answered from it",
            Self::Body => "the request has a body",
            Self::Upgrade => "the request asks for an upgrade",
            Self::MethodOverride => "a field of the request overrides its method",
            Self::Precondition => {
                "only the service can evaluate the request's If-Match or If-Unmodified-Since"
            }
            Self::Grpc => "gRPC is not stored",
        }
    }
}

/// Whether a request can be answered from the store, or fill it.
///
/// # Errors
///
/// Why not.
pub fn check_request(method: &Method, headers: &HeaderMap, has_body: bool, grpc: bool) -> Result<(), Bypass> {
    let overrides =
        |name: &HeaderName| name.as_str().starts_with("x-") && METHOD_OVERRIDES.contains(&name.as_str());
    if !is_cacheable_method(method) {
        Err(Bypass::Method)
    } else if has_body {
        Err(Bypass::Body)
    } else if headers.contains_key(UPGRADE) {
        Err(Bypass::Upgrade)
    } else if headers.keys().any(overrides) {
        Err(Bypass::MethodOverride)
    } else if has_precondition(headers) {
        Err(Bypass::Precondition)
    } else if grpc {
        Err(Bypass::Grpc)
    } else {
        Ok(())
    }
}

pub fn is_cacheable_method(method: &Method) -> bool {
    method == Method::GET || method == Method::HEAD
}

/// Whether the response to a GET may be stored.
///
/// # Errors
///
/// Why not.
pub fn check_storable(
    request: &HeaderMap,
    rule: AuthorizationRule,
    status: StatusCode,
    response: &HeaderMap,
) -> Result<(), NotStored> {
    let directives = ResponseDirectives::of(response);
    if status.is_informational()
        || status == StatusCode::PARTIAL_CONTENT
        || status == StatusCode::NOT_MODIFIED
        || (request.contains_key(RANGE) && status == StatusCode::RANGE_NOT_SATISFIABLE)
    {
        return Err(NotStored::Kind);
    }
    // `must-understand` overrides `no-store` where the status is understood (§5.2.2.3).
    let understood = directives.must_understand && is_heuristically_cacheable(status);
    if (directives.no_store && !understood) || RequestDirectives::of(request).no_store {
        return Err(NotStored::NoStore);
    }
    if directives.must_understand && !understood {
        return Err(NotStored::Status);
    }
    if directives.private {
        return Err(NotStored::Private);
    }
    if request.contains_key(AUTHORIZATION)
        && rule == AuthorizationRule::Refuse
        && !is_shared_with_credentials(&directives)
    {
        return Err(NotStored::Authorization);
    }
    let Some(names) = vary::names(response) else { return Err(NotStored::Vary) };
    if request.contains_key(COOKIE) && !directives.public && !names.contains(&COOKIE) {
        return Err(NotStored::Cookie);
    }
    if response.contains_key(SET_COOKIE) && !directives.public {
        return Err(NotStored::SetCookie);
    }
    if is_event_stream(response) {
        return Err(NotStored::EventStream);
    }
    let explicit = directives.public
        || directives.max_age.is_some()
        || directives.s_maxage.is_some()
        || response.contains_key(EXPIRES);
    // Without freshness it is still of use when the upstream fails.
    if explicit || is_heuristically_cacheable(status) { Ok(()) } else { Err(NotStored::Status) }
}

fn is_event_stream(response: &HeaderMap) -> bool {
    let media_type = response.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let media_type = media_type.split(';').next().unwrap_or_default().trim();
    media_type.eq_ignore_ascii_case("text/event-stream")
}

/// Whether a stored response may be sent to a request with these credentials.
pub fn may_be_sent(
    stored: &ResponseDirectives,
    varies_by_cookie: bool,
    request: &HeaderMap,
    rule: AuthorizationRule,
) -> bool {
    let authorization = !request.contains_key(AUTHORIZATION)
        || rule == AuthorizationRule::Key
        || is_shared_with_credentials(stored);
    let cookie = !request.contains_key(COOKIE) || stored.public || varies_by_cookie;
    authorization && cookie
}

/// RFC 9111 §3.5.
const fn is_shared_with_credentials(directives: &ResponseDirectives) -> bool {
    directives.public || directives.must_revalidate || directives.s_maxage.is_some()
}

/// RFC 9110 §9.2.1.
pub fn is_safe(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS | Method::TRACE)
}

/// Whether a response to this method invalidates what is stored for its target (RFC 9111 §4.4).
pub fn invalidates(method: &Method, status: StatusCode) -> bool {
    !is_safe(method) && (status.is_success() || status.is_redirection())
}
