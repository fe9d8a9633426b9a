//! Authorization of inbound requests and byte streams: `[[inbound.allow]]` and `[inbound.jwt]`.
//!
//! Each request is checked before anything of it is forwarded, in this order: an ambiguous path is malformed; a peer
//! that no entry could allow is refused before its token is read, so that strangers cause no fetching of keys; then the
//! token is verified; then the claims that entries require.

use std::{
    rc::Rc,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use http::{HeaderMap, HeaderValue, Method, Request, header::AUTHORIZATION};
use serde_json::Value;
use tokio::time::Instant;

use super::{
    clock::WaitLimit,
    connection::Connection,
    error::{Challenge, ProxyError},
    headers,
};
use crate::{
    authorization::{self, AuthorizationRequest, Denial, EndUserToken, RequestedOperation},
    cause::Cause,
    config::Protocol,
    identity::{
        Peer,
        access_policy::{AccessPolicy, JwtPolicy},
        jwt::{Claims, KeySet, TokenError},
    },
    model::{View, WorkerCluster},
    resilience::{
        deadline::{Deadline, grpc_timeout, request_timeout},
        observe::enforce,
    },
    url_path::normalise,
};

/// Fields by which frameworks let a request override its method.
const METHOD_OVERRIDES: [&str; 3] = ["x-http-method-override", "x-http-method", "x-method-override"];
const PATH_OVERRIDES: [&str; 2] = ["x-original-url", "x-rewrite-url"];

/// `Retry-After` where a token could not be checked.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Whose token a request carries: deliveries belong to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndUser(String);

impl EndUser {
    fn of(issuer: &str, claims: &Claims) -> Self {
        Self(serde_json::json!([issuer, claims.get("sub")]).to_string())
    }

    /// No two users have the same.
    pub fn name(&self) -> &str {
        &self.0
    }
}

/// Authorizes a request and writes the claims of its token into the header fields that the configuration names.
pub async fn check_request<B>(
    connection: &Connection,
    view: &View,
    request: &mut Request<B>,
    started: Instant,
) -> Result<(), ProxyError> {
    let Some(gate) = &view.snapshot.gate else { return Ok(()) };
    let note = |error: &ProxyError, observed: bool| {
        // Malformed requests are counted where their response is made.
        if observed || error.cause != Cause::Malformed {
            view.inbound.upstream.shared.policy_state.counters.rejected.increment(error.cause.word());
        }
        let method = request.method().as_str();
        if observed {
            tracing::info!(method, %error, "would be refused (observed only)");
        } else {
            tracing::debug!(method, %error, "refused");
        }
    };
    let allow = |error: &ProxyError| note(error, gate.observe_allow);
    enforce(check_unambiguous(gate, request), gate.observe_allow, allow)?;
    let path = request.uri().path();
    let query = |token| AuthorizationRequest {
        peer: connection.peer_identity.as_deref(),
        operation: RequestedOperation::Http { method: request.method(), path },
        token,
    };
    let Some(users) = &gate.jwt else {
        let decided = gate.allow_list.decide(&query(EndUserToken::None)).map_err(not_allowed);
        return enforce(decided, gate.observe_allow, allow).map(drop);
    };
    let decided = gate.allow_list.decide(&query(EndUserToken::Unverified)).map_err(not_allowed);
    enforce(decided, gate.observe_allow, allow)?;
    let mut claims = None;
    if users.requires_token(&normalise(path)) {
        let read = verify_token(connection, users, request.headers(), started).await;
        claims = enforce(read, gate.observe_jwt, |error| note(error, gate.observe_jwt))?;
    }
    if gate.allow_list.uses_claims() {
        let token = claims.as_deref().map_or(EndUserToken::None, |claims| EndUserToken::Valid(claims.all()));
        let decided = gate.allow_list.decide(&query(token));
        // Where tokens are only observed, required claims are only observed as well.
        let observed = gate.observe_allow
            || gate.observe_jwt && decided.as_ref().is_err_and(|refusal| refusal.lacks_claim_only());
        // Failures for another reason were recorded above.
        let record_failure = |error: &ProxyError| {
            if error.challenge.is_some() {
                note(error, observed);
            }
        };
        enforce(decided.map_err(not_allowed), observed, record_failure)?;
    }
    set_claim_headers(users, claims.as_deref(), request.headers_mut());
    if !view.snapshot.inbound.queue_routes.is_empty()
        && let Some(claims) = &claims
    {
        request.extensions_mut().insert(EndUser::of(&users.expected.issuer, claims));
    }
    Ok(())
}

/// Authorizes a byte stream.
///
/// Byte streams carry no token. Where tokens are required, they pass only on a port that is declared `tcp`: otherwise a
/// client could send HTTP in a form that this proxy does not recognise, and need no token.
pub fn check_byte_stream(connection: &Connection, view: &View, to: &WorkerCluster) -> Result<(), ProxyError> {
    let Some(gate) = &view.snapshot.gate else { return Ok(()) };
    let note = |error: &ProxyError, observed: bool| {
        to.upstream.shared.policy_state.counters.rejected.increment(error.cause.word());
        let outcome = if observed { "would be refused (observed only)" } else { "refused" };
        tracing::info!(%error, "byte stream: {outcome}");
    };
    if gate.jwt.is_some() && to.cluster.settings.protocol != Protocol::Tcp {
        let detail =
            "bytes that are not HTTP carry no token; declare the port `protocol = \"tcp\"` to let them pass";
        let not_allowed = Err::<(), _>(ProxyError::new(Cause::JwtInvalid, detail));
        enforce(not_allowed, gate.observe_jwt, |error| note(error, gate.observe_jwt))?;
    }
    let query = AuthorizationRequest {
        peer: connection.peer_identity.as_deref(),
        operation: RequestedOperation::ByteStream,
        token: EndUserToken::None,
    };
    let decided = gate.allow_list.decide(&query).map_err(not_allowed);
    enforce(decided, gate.observe_allow, |error| note(error, gate.observe_allow)).map(drop)
}

/// Whether the request by which a connection was upgraded would still be allowed, as far as that can be decided without
/// its token.
pub fn check_upgrade(
    connection: &Connection,
    view: &View,
    method: &Method,
    path: &str,
) -> Result<(), ProxyError> {
    check_again(view, connection.peer_identity.as_deref(), method, path)
}

/// The same for a request that was accepted earlier.
pub fn check_again(view: &View, peer: Option<&Peer>, method: &Method, path: &str) -> Result<(), ProxyError> {
    let Some(gate) = view.snapshot.gate.as_ref().filter(|gate| !gate.observe_allow) else { return Ok(()) };
    let token = if gate.jwt.is_some() { EndUserToken::Unverified } else { EndUserToken::None };
    gate.allow_list
        .decide(&AuthorizationRequest { peer, operation: RequestedOperation::Http { method, path }, token })
        .map(drop)
        .map_err(not_allowed)
}

fn not_allowed(refusal: Denial) -> ProxyError {
    let challenge = refusal.lacks_claim_only().then_some(Challenge::InsufficientScope);
    ProxyError { challenge, ..ProxyError::new(Cause::NotAllowed, refusal.to_string()) }
}

/// Refuses a request whose method or path the service could read differently than the rules do.
fn check_unambiguous<B>(gate: &AccessPolicy, request: &Request<B>) -> Result<(), ProxyError> {
    let names = |overrides: &[&'static str]| {
        let found = overrides.iter().find(|name| request.headers().contains_key(**name));
        found.map_or(Ok(()), |name| {
            Err(ProxyError::malformed(format!(
                "`{name}` would override what the allow rules check; remove it from the request"
            )))
        })
    };
    if gate.allow_list.uses_methods() {
        names(&METHOD_OVERRIDES)?;
    }
    if gate.uses_paths {
        names(&PATH_OVERRIDES)?;
        authorization::check_unambiguous(request.uri().path())
            .map_err(|error| ProxyError::malformed(error.to_string()))?;
    }
    Ok(())
}

/// Verifies the token of a request; returns its claims.
async fn verify_token(
    connection: &Connection,
    users: &JwtPolicy,
    headers: &HeaderMap,
    started: Instant,
) -> Result<Rc<Claims>, ProxyError> {
    let token = bearer(headers).map_err(unauthenticated)?;
    let mut keys = users.issuer.keys();
    if keys.is_none() {
        keys = wait_for_newer_keys(users, 0, headers, started).await?;
    }
    let Some(keys) = keys else {
        let error =
            users.issuer.report().error.unwrap_or_else(|| "they have not been fetched yet".to_owned());
        let detail =
            format!("tokens cannot be checked without the keys of `{}`: {error}", users.expected.issuer);
        return Err(ProxyError::new(Cause::AuthUnavailable, detail).retry_after(RETRY_AFTER));
    };
    let verify = |keys| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        connection.worker.tokens.borrow_mut().verify(token, users.id, &users.expected, keys, now)
    };
    let verified = match verify(&keys) {
        // It may be signed with a new key.
        Err(error @ TokenError::UnknownKey(_)) => {
            match wait_for_newer_keys(users, keys.generation, headers, started).await? {
                Some(keys) => verify(&keys),
                None => Err(error),
            }
        }
        verified => verified,
    };
    verified.map_err(unauthenticated)
}

/// Waits for newer keys, no longer than the client's deadline.
async fn wait_for_newer_keys(
    users: &JwtPolicy,
    generation: u64,
    headers: &HeaderMap,
    started: Instant,
) -> Result<Option<Arc<KeySet>>, ProxyError> {
    let left = if headers::is_grpc(headers) { grpc_timeout(headers) } else { request_timeout(headers) };
    let deadline = Deadline::from_client(started.into_std(), left);
    let waited =
        Box::pin(WaitLimit::client(deadline).wait(users.issuer.wait_for_newer_keys(generation))).await;
    waited.map_err(|expired| expired.unsent(&users.expected.issuer, "the keys that tokens are verified with"))
}

fn unauthenticated(invalid: TokenError) -> ProxyError {
    let challenge = match invalid {
        TokenError::Missing => Challenge::Bearer,
        TokenError::MultipleFields => Challenge::InvalidRequest,
        _ => Challenge::InvalidToken,
    };
    ProxyError { challenge: Some(challenge), ..ProxyError::new(Cause::JwtInvalid, invalid.to_string()) }
}

/// The token of the Authorization field (RFC 6750 §2.1). Tokens in other places are ignored.
fn bearer(headers: &HeaderMap) -> Result<&str, TokenError> {
    let mut fields = headers.get_all(AUTHORIZATION).iter();
    let field = fields.next().ok_or(TokenError::Missing)?;
    if fields.next().is_some() {
        return Err(TokenError::MultipleFields);
    }
    let (scheme, token) =
        field.to_str().ok().and_then(|text| text.split_once(' ')).ok_or(TokenError::Missing)?;
    if scheme.eq_ignore_ascii_case("bearer") { Ok(token.trim_matches(' ')) } else { Err(TokenError::Missing) }
}

/// Sets the header fields for claims, and removes those that the client sent.
fn set_claim_headers(users: &JwtPolicy, claims: Option<&Claims>, headers: &mut HeaderMap) {
    for (name, claim) in &*users.claim_headers {
        headers::remove_spellings(headers, name);
        if let Some(value) = claims.and_then(|claims| claims.get(claim)).and_then(field_value) {
            headers.insert(name.clone(), value);
        }
    }
}

/// A claim as a field value: strings, numbers and booleans as they are, lists of them joined by commas.
fn field_value(claim: &Value) -> Option<HeaderValue> {
    fn text(claim: &Value) -> Option<String> {
        match claim {
            Value::String(text) => Some(text.clone()),
            Value::Number(_) | Value::Bool(_) => Some(claim.to_string()),
            _ => None,
        }
    }
    let whole = match claim {
        Value::Array(list) => list.iter().map(text).collect::<Option<Vec<_>>>()?.join(","),
        single => text(single)?,
    };
    // A field value cannot contain control characters.
    HeaderValue::try_from(whole).ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_token_is_read_from_one_authorization_field() {
        let of = |fields: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for field in fields {
                headers.append(AUTHORIZATION, HeaderValue::from_static(field));
            }
            bearer(&headers).map(str::to_owned)
        };
        assert_eq!(of(&["Bearer a.b.c"]), Ok("a.b.c".to_owned()));
        assert_eq!(of(&["bEARER  a.b.c "]), Ok("a.b.c".to_owned()));
        for none in [&[][..], &["Basic YTpi"], &["Bearer"], &["a.b.c"], &[""]] {
            assert_eq!(of(none), Err(TokenError::Missing), "{none:?}");
        }
        assert_eq!(of(&["Bearer a", "Bearer b"]), Err(TokenError::MultipleFields));
    }

    #[test]
    fn simple_claims_become_field_values() {
        for (claim, field) in [
            (json!("ann"), Some("ann")),
            (json!(7), Some("7")),
            (json!(true), Some("true")),
            (json!(["a", 1]), Some("a,1")),
            (json!({ "a": 1 }), None),
            (json!([["a"]]), None),
            (json!(null), None),
            (json!("a\r\nx-admin: 1"), None),
        ] {
            assert_eq!(field_value(&claim), field.map(HeaderValue::from_static), "{claim}");
        }
    }
}
