//! One token request: client credentials (RFC 6749 §4.4) for an access token (§5.1).

use std::{fmt, path::PathBuf, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::{
    HeaderValue, Request, Response,
    header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE},
};
use serde::Deserialize;

use crate::{
    config::Oauth2,
    fetch::{FetchError, FetchLimits, Fetcher},
};

const LIMITS: FetchLimits = FetchLimits { timeout: Duration::from_secs(5), max_body: 64 * 1024 };
/// The largest secret file, in bytes.
const MAX_SECRET: usize = 64 * 1024;

/// An access token, as the header field value that carries it.
pub struct AccessToken {
    /// `Bearer …`, marked as sensitive: not logged, not indexed by header compression.
    pub field: HeaderValue,
    pub expires_in: Option<Duration>,
}

impl fmt::Debug for AccessToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Granted").field("expires_in", &self.expires_in).finish_non_exhaustive()
    }
}

/// Why a token request failed. Contains neither the secret nor a token.
#[derive(Debug, thiserror::Error)]
pub enum TokenRequestError {
    #[error("{path}: {reason}")]
    Secret { path: PathBuf, reason: String },
    #[error("`{0}` is not a URL")]
    Url(String),
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error("the token endpoint rejects the request: {0}")]
    Rejected(String),
    #[error("the token endpoint responded with {0}")]
    Status(http::StatusCode),
    #[error("the token endpoint's response is invalid: {0}")]
    InvalidResponse(&'static str),
}

/// Requests a token. The secret is read each time: it may have been rotated.
pub async fn request_token(settings: &Oauth2, fetcher: &Fetcher) -> Result<AccessToken, TokenRequestError> {
    let path = &settings.client_secret_file;
    let secret_error = |reason: String| TokenRequestError::Secret { path: path.clone(), reason };
    let secret = tokio::fs::read(path).await.map_err(|error| secret_error(error.to_string()))?;
    if secret.len() > MAX_SECRET {
        return Err(secret_error(format!("longer than {MAX_SECRET} bytes")));
    }
    let secret = String::from_utf8(secret).map_err(|_| secret_error("not text".to_owned()))?;
    let secret = secret.trim_end_matches(['\r', '\n']);
    if secret.is_empty() {
        return Err(secret_error("empty".to_owned()));
    }
    let trusting = settings.ca.as_deref().map(|ca| fetcher.with_roots_from(ca)).transpose()?;
    let request = request(settings, secret)?;
    parse(trusting.as_ref().unwrap_or(fetcher).fetch(request, LIMITS).await?)
}

/// Authenticates the client with HTTP Basic, which every server must support (§2.3.1).
fn request(settings: &Oauth2, secret: &str) -> Result<Request<Bytes>, TokenRequestError> {
    let credentials = format!("{}:{}", url_encoded(&settings.client_id), url_encoded(secret));
    let mut body = "grant_type=client_credentials".to_owned();
    if !settings.scopes.is_empty() {
        body.push_str("&scope=");
        body.push_str(&url_encoded(&settings.scopes.join(" ")));
    }
    Request::post(settings.token_url.expose())
        .header(AUTHORIZATION, format!("Basic {}", STANDARD.encode(credentials)))
        .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
        .header(http::header::CONTENT_LENGTH, body.len())
        .header(ACCEPT, "application/json")
        .body(Bytes::from(body))
        .map_err(|_| TokenRequestError::Url(settings.token_url.to_string()))
}

/// `application/x-www-form-urlencoded` (RFC 6749 appendix B), with `%20` for a space: every decoder of `+` accepts it,
/// and some decoders of HTTP Basic accept only that.
fn url_encoded(text: &str) -> String {
    text.bytes().fold(String::with_capacity(text.len()), |mut out, byte| {
        match byte {
            b'-' | b'.' | b'_' | b'*' => out.push(char::from(byte)),
            byte if byte.is_ascii_alphanumeric() => out.push(char::from(byte)),
            byte => out.push_str(&format!("%{byte:02X}")),
        }
        out
    })
}

fn parse(response: Response<Bytes>) -> Result<AccessToken, TokenRequestError> {
    #[derive(Deserialize)]
    struct Failure {
        error: String,
        error_description: Option<String>,
    }
    #[derive(Deserialize)]
    struct Success {
        access_token: String,
        // Required by the standard; some servers omit it and mean Bearer.
        token_type: Option<String>,
        expires_in: Option<serde_json::Value>,
    }
    let status = response.status();
    // A byte order mark is not JSON (RFC 8259 §8.1), but some servers send one.
    let json = response.body().strip_prefix("\u{feff}".as_bytes()).unwrap_or(response.body());
    if !status.is_success() {
        let failure: Failure = serde_json::from_slice(json).map_err(|_| TokenRequestError::Status(status))?;
        let reason = match failure.error_description {
            Some(description) => format!("{} ({description})", failure.error),
            None => failure.error,
        };
        return Err(TokenRequestError::Rejected(
            reason.chars().filter(|c| !c.is_control()).take(300).collect(),
        ));
    }
    let success: Success = serde_json::from_slice(json).map_err(|_| {
        TokenRequestError::InvalidResponse("it is not a JSON object with `access_token` (RFC 6749 §5.1)")
    })?;
    let kind = success.token_type.as_deref().map_or("", str::trim);
    if !kind.is_empty() && !kind.eq_ignore_ascii_case("bearer") {
        return Err(TokenRequestError::InvalidResponse("its `token_type` is not Bearer"));
    }
    let visible = |byte: u8| (0x21..=0x7e).contains(&byte);
    if success.access_token.is_empty() || !success.access_token.bytes().all(visible) {
        return Err(TokenRequestError::InvalidResponse(
            "its `access_token` is not allowed in a header field",
        ));
    }
    let expires_in = match success.expires_in.as_ref().and_then(seconds) {
        Some(seconds) if seconds < 1.0 => {
            return Err(TokenRequestError::InvalidResponse("its token has already expired"));
        }
        other => other.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()),
    };
    let mut field = HeaderValue::try_from(format!("Bearer {}", success.access_token)).map_err(|_| {
        TokenRequestError::InvalidResponse("its `access_token` is not allowed in a header field")
    })?;
    field.set_sensitive(true);
    Ok(AccessToken { field, expires_in })
}

/// A number of seconds, which some servers send as a string.
fn seconds(value: &serde_json::Value) -> Option<f64> {
    value.as_f64().or_else(|| value.as_str()?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::redact::Secret;

    fn settings() -> Oauth2 {
        Oauth2 {
            token_url: Secret::redact_url("https://id.example/token?tenant=1"),
            client_id: "check out:1".to_owned(),
            client_secret_file: "/run/secret".into(),
            scopes: vec!["pay".to_owned(), "read:all".to_owned()],
            ca: None,
        }
    }

    fn parse_body(status: u16, body: &str) -> Result<AccessToken, String> {
        let response = Response::builder().status(status).body(Bytes::from(body.to_owned())).unwrap();
        parse(response).map_err(|error| error.to_string())
    }

    #[test]
    fn the_request_follows_the_standard() {
        let request = request(&settings(), "s%c:r€t").unwrap();
        assert_eq!(request.method(), "POST");
        let basic = request.headers()[AUTHORIZATION].to_str().unwrap().strip_prefix("Basic ").unwrap();
        assert_eq!(STANDARD.decode(basic).unwrap(), b"check%20out%3A1:s%25c%3Ar%E2%82%ACt");
        assert_eq!(&request.body()[..], b"grant_type=client_credentials&scope=pay%20read%3Aall");
    }

    #[test]
    fn a_token_is_parsed_and_not_printed() {
        let granted =
            parse_body(200, r#"{"access_token":"abc.DEF","token_type":"bearer","expires_in":60}"#).unwrap();
        assert_eq!(granted.field, "Bearer abc.DEF");
        assert_eq!(granted.expires_in, Some(Duration::from_secs(60)));
        assert!(!format!("{granted:?} {:?}", granted.field).contains("abc"));
        let endless = parse_body(200, r#"{"access_token":"abc","token_type":"Bearer"}"#).unwrap();
        assert_eq!(endless.expires_in, None);
    }

    /// Responses of Azure AD v1, some gateways and home-made servers.
    #[test]
    fn deviating_token_responses_are_accepted() {
        for (body, expires_in) in [
            (r#"{"access_token":"abc","token_type":"Bearer","expires_in":"3599"}"#, Some(3599)),
            (r#"{"access_token":"abc","token_type":"Bearer","expires_in":" 60.0 "}"#, Some(60)),
            (r#"{"access_token":"abc","expires_in":60}"#, Some(60)),
            (r#"{"access_token":"abc","token_type":null,"expires_in":null}"#, None),
            (r#"{"access_token":"abc","token_type":"","expires_in":""}"#, None),
            ("\u{feff}{\"access_token\":\"abc\",\"token_type\":\"Bearer\",\"expires_in\":60}", Some(60)),
        ] {
            let granted = parse_body(200, body).unwrap();
            assert_eq!(granted.field, "Bearer abc", "{body}");
            assert_eq!(granted.expires_in, expires_in.map(Duration::from_secs), "{body}");
        }
        let expired = parse_body(200, r#"{"access_token":"abc","token_type":"Bearer","expires_in":"0"}"#);
        assert!(expired.unwrap_err().contains("already expired"));
        let refused = parse_body(400, "\u{feff}{\"error\":\"invalid_scope\"}").unwrap_err();
        assert!(refused.contains("invalid_scope"));
    }

    #[test]
    fn errors_do_not_contain_the_token() {
        for (status, body, expected) in [
            (
                401,
                r#"{"error":"invalid_client","error_description":"no\nsuch"}"#,
                "rejects the request: invalid_client (nosuch)",
            ),
            (400, r#"{"error":"invalid_scope"}"#, "rejects the request: invalid_scope"),
            (503, "busy", "responded with 503"),
            (302, "", "responded with 302"),
            (200, "<html>", "is not a JSON object"),
            (200, r#"{"access_token":"secret","token_type":"mac"}"#, "`token_type` is not Bearer"),
            (200, r#"{"access_token":"secret","token_type":"Bearer","expires_in":0}"#, "already expired"),
            (200, r#"{"access_token":"sec\nret","token_type":"Bearer"}"#, "is not allowed in a header field"),
            (200, r#"{"access_token":"","token_type":"Bearer"}"#, "is not allowed in a header field"),
        ] {
            let error = parse_body(status, body).unwrap_err();
            assert!(error.contains(expected) && !error.contains("sec"), "{error}");
        }
    }
}
