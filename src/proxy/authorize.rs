//! Whether an inbound call, or connection of bytes, may reach the service: `[[inbound.allow]]` and `[inbound.jwt]`.
//!
//! Asked per request, before anything of it is passed on. In this order: a path that could be read in two ways is
//! malformed; a peer that no entry could let in is refused before its token is looked at, so that strangers cause no
//! fetching of keys; then the token; then the claims that entries ask for.

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
    error::{Cause, Challenge, ProxyError},
    headers,
};
use crate::{
    config::{Protocol, normalise},
    identity::{
        authorize::{Asked, Refusal, Token, What, unambiguous},
        gate::{Gate, Users},
        jwt::{Claims, Invalid, KeySet},
    },
    resilience::{
        deadline::{Deadline, grpc_timeout, request_timeout},
        observe::enforce,
    },
    runtime::{LocalCluster, View},
};

/// By which frameworks let a request say that it is another one than its first line says.
const METHOD_OVERRIDES: [&str; 3] = ["x-http-method-override", "x-http-method", "x-method-override"];
const PATH_OVERRIDES: [&str; 2] = ["x-original-url", "x-rewrite-url"];

/// When a caller may ask again whose token nobody could check.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// Lets a call in, or says why not. What the service learns of the end user is written into the call's header.
pub async fn call<B>(
    connection: &Connection,
    view: &View,
    request: &mut Request<B>,
    started: Instant,
) -> Result<(), ProxyError> {
    let Some(gate) = &view.snapshot.gate else { return Ok(()) };
    let note = |error: &ProxyError, observed: bool| {
        // What is malformed is counted where it is answered.
        if observed || error.cause != Cause::Malformed {
            view.inbound.upstream.shared.guards.counts.rejected.add(error.cause.word());
        }
        let method = request.method().as_str();
        if observed {
            tracing::info!(method, %error, "would be refused (observed only)");
        } else {
            tracing::debug!(method, %error, "refused");
        }
    };
    let allow = |error: &ProxyError| note(error, gate.observe_allow);
    enforce(one_reading(gate, request), gate.observe_allow, allow)?;
    let path = request.uri().path();
    let asked = |token| Asked {
        peer: connection.peer_identity.as_deref(),
        what: What::Call { method: request.method(), path },
        token,
    };
    let Some(users) = &gate.users else {
        let decided = gate.rules.decide(&asked(Token::None)).map_err(refused);
        return enforce(decided, gate.observe_allow, allow).map(drop);
    };
    let decided = gate.rules.decide(&asked(Token::Unread)).map_err(refused);
    enforce(decided, gate.observe_allow, allow)?;
    let mut claims = None;
    if users.are_asked(&normalise(path)) {
        let read = end_user(connection, users, request.headers(), started).await;
        claims = enforce(read, gate.observe_jwt, |error| note(error, gate.observe_jwt))?;
    }
    if gate.rules.look_at_claims() {
        let token = claims.as_deref().map_or(Token::None, Token::Good);
        let decided = gate.rules.decide(&asked(token));
        // Where tokens are only observed, so is what they must hold.
        let observed = gate.observe_allow
            || gate.observe_jwt && decided.as_ref().is_err_and(|refusal| refusal.is_for_claims());
        // What fails for another reason has been noted above.
        let told = |error: &ProxyError| {
            if error.challenge.is_some() {
                note(error, observed);
            }
        };
        enforce(decided.map_err(refused), observed, told)?;
    }
    pass_on(users, claims.as_deref(), request.headers_mut());
    Ok(())
}

/// Lets a connection of bytes in, or says why not.
///
/// Bytes show no token: where tokens are asked for, they pass only on a port that is declared `tcp`, else whoever
/// speaks HTTP in a way that this proxy does not recognise would pass without one.
pub fn bytes(connection: &Connection, view: &View, to: &LocalCluster) -> Result<(), ProxyError> {
    let Some(gate) = &view.snapshot.gate else { return Ok(()) };
    let note = |error: &ProxyError, observed: bool| {
        to.upstream.shared.guards.counts.rejected.add(error.cause.word());
        let outcome = if observed { "would be refused (observed only)" } else { "refused" };
        tracing::info!(%error, "a connection that is not HTTP: {outcome}");
    };
    if gate.users.is_some() && to.cluster.settings.protocol != Protocol::Tcp {
        let detail =
            "bytes that are not HTTP carry no token; a port that takes such bytes says `protocol = \"tcp\"`";
        let refused = Err::<(), _>(ProxyError::new(Cause::JwtInvalid, detail));
        enforce(refused, gate.observe_jwt, |error| note(error, gate.observe_jwt))?;
    }
    let asked = Asked { peer: connection.peer_identity.as_deref(), what: What::Bytes, token: Token::None };
    let decided = gate.rules.decide(&asked).map_err(refused);
    enforce(decided, gate.observe_allow, |error| note(error, gate.observe_allow)).map(drop)
}

/// Whether the request that a connection was upgraded by would still be let in, as far as that can be told without its token.
pub fn upgraded(
    connection: &Connection,
    view: &View,
    (method, path): (&Method, &str),
) -> Result<(), ProxyError> {
    let Some(gate) = view.snapshot.gate.as_ref().filter(|gate| !gate.observe_allow) else { return Ok(()) };
    let token = if gate.users.is_some() { Token::Unread } else { Token::None };
    let peer = connection.peer_identity.as_deref();
    gate.rules.decide(&Asked { peer, what: What::Call { method, path }, token }).map(drop).map_err(refused)
}

fn refused(refusal: Refusal) -> ProxyError {
    let challenge = refusal.is_for_claims().then_some(Challenge::InsufficientScope);
    ProxyError { challenge, ..ProxyError::new(Cause::NotAllowed, refusal.to_string()) }
}

/// Refuses a request whose method or path the service could take for another one than the rules do.
fn one_reading<B>(gate: &Gate, request: &Request<B>) -> Result<(), ProxyError> {
    let names = |overrides: &[&'static str]| {
        let found = overrides.iter().find(|name| request.headers().contains_key(**name));
        found.map_or(Ok(()), |name| {
            Err(ProxyError::malformed(format!(
                "`{name}` says that this is another request, and allow rules look at that"
            )))
        })
    };
    if gate.rules.look_at_methods() {
        names(&METHOD_OVERRIDES)?;
    }
    if gate.looks_at_paths {
        names(&PATH_OVERRIDES)?;
        unambiguous(request.uri().path()).map_err(|error| ProxyError::malformed(error.to_string()))?;
    }
    Ok(())
}

/// Whom the token of a call is of.
async fn end_user(
    connection: &Connection,
    users: &Users,
    headers: &HeaderMap,
    started: Instant,
) -> Result<Rc<Claims>, ProxyError> {
    let token = bearer(headers).map_err(unauthenticated)?;
    let mut keys = users.issuer.keys();
    if keys.is_none() {
        keys = newer(users, 0, headers, started).await?;
    }
    let Some(keys) = keys else {
        let error = users.issuer.told().error.unwrap_or_else(|| "they have not been fetched yet".to_owned());
        let detail =
            format!("tokens cannot be checked without the keys of `{}`: {error}", users.expected.issuer);
        return Err(ProxyError::new(Cause::AuthUnavailable, detail).retry_after(ASK_AGAIN));
    };
    let verify = |keys| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        connection.worker.tokens.borrow_mut().verify(token, (users.number, &users.expected), keys, now)
    };
    let verified = match verify(&keys) {
        // It may be signed by a key that is new.
        Err(error @ Invalid::UnknownKey(_)) => match newer(users, keys.generation, headers, started).await? {
            Some(keys) => verify(&keys),
            None => Err(error),
        },
        verified => verified,
    };
    verified.map_err(unauthenticated)
}

/// Waits for newer keys, no longer than the caller waits for an answer.
async fn newer(
    users: &Users,
    generation: u64,
    headers: &HeaderMap,
    started: Instant,
) -> Result<Option<Arc<KeySet>>, ProxyError> {
    let left = if headers::is_grpc(headers) { grpc_timeout(headers) } else { request_timeout(headers) };
    let deadline = Deadline::from_caller(started.into_std(), left);
    let waited = Box::pin(WaitLimit::callers(deadline).wait(users.issuer.newer(generation))).await;
    waited.map_err(|ran_out| ran_out.unsent(&users.expected.issuer, "the keys that tokens are checked by"))
}

fn unauthenticated(invalid: Invalid) -> ProxyError {
    let challenge = match invalid {
        Invalid::Missing => Challenge::Bearer,
        Invalid::Several => Challenge::InvalidRequest,
        _ => Challenge::InvalidToken,
    };
    ProxyError { challenge: Some(challenge), ..ProxyError::new(Cause::JwtInvalid, invalid.to_string()) }
}

/// The token of the Authorization field (RFC 6750 §2.1), the only place where one is looked for.
fn bearer(headers: &HeaderMap) -> Result<&str, Invalid> {
    let mut fields = headers.get_all(AUTHORIZATION).iter();
    let field = fields.next().ok_or(Invalid::Missing)?;
    if fields.next().is_some() {
        return Err(Invalid::Several);
    }
    let (scheme, token) =
        field.to_str().ok().and_then(|text| text.split_once(' ')).ok_or(Invalid::Missing)?;
    if scheme.eq_ignore_ascii_case("bearer") { Ok(token.trim_matches(' ')) } else { Err(Invalid::Missing) }
}

/// Tells the service what it was promised to learn, and lets nobody else tell it.
fn pass_on(users: &Users, claims: Option<&Claims>, headers: &mut HeaderMap) {
    for (name, claim) in &*users.claim_headers {
        headers::remove_spellings(headers, name);
        if let Some(value) = claims.and_then(|claims| claims.get(claim)).and_then(field_value) {
            headers.insert(name.clone(), value);
        }
    }
}

/// A claim as a field: texts, numbers and booleans as they are, lists of them with commas between.
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
    // Control characters cannot stand in a field.
    HeaderValue::try_from(whole).ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_token_is_where_it_belongs() {
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
            assert_eq!(of(none), Err(Invalid::Missing), "{none:?}");
        }
        assert_eq!(of(&["Bearer a", "Bearer b"]), Err(Invalid::Several));
    }

    #[test]
    fn a_claim_becomes_a_field_where_it_can() {
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
