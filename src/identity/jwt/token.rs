//! Verification of a token at a given time: RFC 7519 under the rules of RFC 8725. No clock, no I/O.

use std::{borrow::Cow, fmt};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{
    Deserialize, Deserializer,
    de::{Error as _, IgnoredAny, MapAccess, Visitor},
};
use serde_json::{Map, Value};

use super::keys::{Algorithm, KeySet};
use crate::authorization::ClaimSet;

/// A longer token, in bytes, is rejected unread.
pub const MAX_TOKEN: usize = 8 * 1024;
/// The tolerated difference between the clocks of issuer and proxy, in seconds.
pub const LEEWAY: u64 = 30;
/// Most keys tried for a token without a key ID.
const MAX_KEYS_TRIED: usize = 4;

/// What a token must contain to be accepted by this service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenRequirements {
    pub issuer: String,
    /// Any of these.
    pub audiences: Vec<String>,
}

/// The claims of a valid token.
#[derive(Debug, PartialEq)]
pub struct Claims {
    all: ClaimSet,
    /// Seconds since 1970 (a NumericDate, RFC 7519 §2).
    expires: f64,
    not_before: Option<f64>,
}

/// Why a token is rejected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    #[error("the request has no bearer token")]
    Missing,
    #[error("more than one Authorization field")]
    MultipleFields,
    #[error("the token is longer than {MAX_TOKEN} bytes")]
    TooLong,
    #[error("this is not a JWT: {0}")]
    Malformed(&'static str),
    #[error("the token is signed with `{0}`; RS256, ES256 and EdDSA are accepted")]
    Algorithm(String),
    #[error("the token's header has `crit`: critical extensions are not supported")]
    Critical,
    #[error("the token is a `{0}`, not an access token")]
    Type(String),
    #[error("the token has no `{0}`, or not one valid by RFC 7519")]
    Claim(&'static str),
    #[error("the token's issuer is not `{0}`")]
    Issuer(String),
    #[error("the token's audience is not {0}")]
    Audience(String),
    #[error("the token expired {0} s ago")]
    Expired(u64),
    #[error("the token becomes valid in {0} s")]
    NotYetValid(u64),
    /// The only error that newer keys may resolve.
    #[error("the issuer has no key {0}")]
    UnknownKey(KeyId),
    #[error("the token's key is for {key}, but the token declares {token}")]
    OtherAlgorithm { key: Algorithm, token: Algorithm },
    #[error("the token's signature is invalid")]
    Signature,
}

/// The key ID in a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyId(pub Option<String>);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            // Untrusted text: shortened, without control characters.
            Some(id) => write!(f, "`{}`", id.chars().take(80).map(printable).collect::<String>()),
            None => f.write_str("for this algorithm"),
        }
    }
}

fn printable(c: char) -> char {
    if c.is_control() { '?' } else { c }
}

/// The used members of the header. Keys inside the token (`jwk`, `jku`, `x5c`, `x5u`) are ignored.
#[derive(Deserialize)]
struct Header<'a> {
    #[serde(borrow)]
    alg: Cow<'a, str>,
    #[serde(borrow, default)]
    kid: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    typ: Option<Cow<'a, str>>,
    #[serde(default)]
    crit: Option<IgnoredAny>,
}

/// Claims without duplicates: two readers could use different ones (RFC 7519 §4).
struct UniqueClaims(Map<String, Value>);

impl<'de> Deserialize<'de> for UniqueClaims {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Map<String, Value>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Self::Value, A::Error> {
                let mut all = Map::new();
                while let Some((name, value)) = members.next_entry::<String, Value>()? {
                    if all.insert(name, value).is_some() {
                        return Err(A::Error::custom("duplicate claim"));
                    }
                }
                Ok(all)
            }
        }
        deserializer.deserialize_map(Members).map(Self)
    }
}

/// Verifies a token in compact form (RFC 7515 §7.1). `now`: seconds since 1970.
///
/// The cheap checks come first, the signature last. Nothing of the token is used before that.
///
/// # Errors
/// See [`TokenError`].
pub fn verify(
    token: &str,
    expected: &TokenRequirements,
    keys: &KeySet,
    now: u64,
) -> Result<Claims, TokenError> {
    if token.len() > MAX_TOKEN {
        return Err(TokenError::TooLong);
    }
    let mut parts = token.split('.');
    let (Some(header), Some(payload), Some(signature), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(TokenError::Malformed("it does not have three parts"));
    };
    let header_json = decode(header, "its header is not base64url")?;
    let header: Header<'_> = serde_json::from_slice(&header_json)
        .map_err(|_| TokenError::Malformed("its header is not a JWS header"))?;
    let algorithm = check_header(&header)?;
    let payload = decode(payload, "its claims are not base64url")?;
    let UniqueClaims(all) = serde_json::from_slice(&payload)
        .map_err(|_| TokenError::Malformed("its claims are not an object"))?;
    let claims = Claims::new(all)?;
    claims.check(expected)?;
    claims.check_time(now)?;

    let id = header.kid.as_deref();
    let unknown = || TokenError::UnknownKey(KeyId(id.map(str::to_owned)));
    let mut other = None;
    let mut tried = 0;
    let message = &token.as_bytes()[..token.len() - signature.len() - 1];
    for key in keys.candidates(id) {
        if key.algorithm != algorithm {
            other = Some(key.algorithm);
            continue;
        }
        tried += 1;
        if tried > MAX_KEYS_TRIED {
            break;
        }
        if key.verifies(message, signature) {
            return Ok(claims);
        }
    }
    Err(match (tried, other.filter(|_| id.is_some())) {
        (0, Some(key)) => TokenError::OtherAlgorithm { key, token: algorithm },
        (0, None) => unknown(),
        _ => TokenError::Signature,
    })
}

fn decode(part: &str, reason: &'static str) -> Result<Vec<u8>, TokenError> {
    URL_SAFE_NO_PAD.decode(part).map_err(|_| TokenError::Malformed(reason))
}

fn check_header(header: &Header<'_>) -> Result<Algorithm, TokenError> {
    if header.crit.is_some() {
        return Err(TokenError::Critical);
    }
    let algorithm = Algorithm::named(&header.alg)
        .ok_or_else(|| TokenError::Algorithm(header.alg.chars().take(20).map(printable).collect()))?;
    if let Some(typ) = &header.typ {
        // RFC 8725 §3.11: tokens of another kind (`dpop+jwt`, `logout+jwt`) may be signed by the same key.
        let kind = typ.to_ascii_lowercase();
        let kind = kind.strip_prefix("application/").unwrap_or(&kind);
        if !matches!(kind, "jwt" | "at+jwt") {
            return Err(TokenError::Type(typ.chars().take(40).map(printable).collect()));
        }
    }
    Ok(algorithm)
}

impl Claims {
    fn new(all: Map<String, Value>) -> Result<Self, TokenError> {
        let time = |name: &'static str| match all.get(name) {
            None => Ok(None),
            Some(value) => value.as_f64().filter(|at| *at >= 0.0).map(Some).ok_or(TokenError::Claim(name)),
        };
        let expires = time("exp")?.ok_or(TokenError::Claim("exp"))?;
        let not_before = time("nbf")?;
        Ok(Self { all: ClaimSet(all), expires, not_before })
    }

    fn check(&self, expected: &TokenRequirements) -> Result<(), TokenError> {
        let issuer = self.all.get("iss").and_then(Value::as_str).ok_or(TokenError::Claim("iss"))?;
        if issuer != expected.issuer {
            return Err(TokenError::Issuer(expected.issuer.clone()));
        }
        let is_expected = |audience: &Value| {
            audience
                .as_str()
                .is_some_and(|audience| expected.audiences.iter().any(|expected| expected == audience))
        };
        let matches = match self.all.get("aud") {
            Some(Value::Array(audiences)) => audiences.iter().any(is_expected),
            Some(audience @ Value::String(_)) => is_expected(audience),
            _ => return Err(TokenError::Claim("aud")),
        };
        let names = || expected.audiences.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>();
        if matches { Ok(()) } else { Err(TokenError::Audience(names().join(", "))) }
    }

    /// Checks `exp` and `nbf` at `now`, in seconds since 1970.
    ///
    /// # Errors
    /// [`TokenError::Expired`], [`TokenError::NotYetValid`].
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "seconds since 1970 are small, and the error contains a duration"
    )]
    pub fn check_time(&self, now: u64) -> Result<(), TokenError> {
        let (now, leeway) = (now as f64, LEEWAY as f64);
        if now >= self.expires + leeway {
            return Err(TokenError::Expired((now - self.expires) as u64));
        }
        match self.not_before {
            Some(from) if from > now + leeway => Err(TokenError::NotYetValid((from - now) as u64)),
            _ => Ok(()),
        }
    }

    /// One of them.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.all.get(name)
    }

    /// All of them, by name.
    pub const fn all(&self) -> &ClaimSet {
        &self.all
    }
}

#[cfg(test)]
mod tests;
