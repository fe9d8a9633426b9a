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
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::identity::jwt::test_keys::{Signer, encode, jwks};

    const NOW: u64 = 1_800_000_000;

    fn expected() -> TokenRequirements {
        TokenRequirements { issuer: "https://id.example".to_owned(), audiences: vec!["checkout".to_owned()] }
    }

    fn good() -> Value {
        json!({ "iss": "https://id.example", "aud": "checkout", "exp": NOW + 60, "sub": "ann" })
    }

    fn with(name: &str, value: Value) -> Value {
        let mut claims = good();
        claims[name] = value;
        claims
    }

    fn keys(signers: &[&Signer]) -> KeySet {
        KeySet::parse(jwks(signers).as_bytes()).unwrap()
    }

    fn verify_error(token: &str, keys: &KeySet) -> TokenError {
        verify(token, &expected(), keys, NOW).unwrap_err()
    }

    #[test]
    fn each_signature_is_verified_by_its_own_key_only() {
        let signers = [Signer::rsa("r"), Signer::ec("e"), Signer::ed("d")];
        let all = keys(&signers.each_ref());
        for signer in &signers {
            let claims = verify(&signer.token(&good()), &expected(), &all, NOW).unwrap();
            assert_eq!(claims.get("sub"), Some(&json!("ann")));
            // Only the signature differs.
            let stranger = Signer::ec(&signer.kid);
            assert!(verify(&stranger.token(&good()), &expected(), &all, NOW).is_err());
        }
        let other = Signer::ec("e");
        assert_eq!(verify_error(&other.token(&good()), &all), TokenError::Signature);
        let anonymous = signers[2].token_with(&json!({ "kid": null }), &good());
        assert!(
            verify(&anonymous, &expected(), &all, NOW).is_ok(),
            "all keys of its algorithm are candidates"
        );
    }

    #[test]
    fn algorithms_are_not_confused() {
        let rsa = Signer::rsa("r");
        let keys = keys(&[&rsa, &Signer::ec("e")]);
        assert_eq!(verify_error(&rsa.confused(&good()), &keys), TokenError::Algorithm("HS256".to_owned()));
        for none in ["none", "None", "NONE", "nOnE", "", "RS512", "PS256", "HS256", "ES384"] {
            let token = rsa.token_with(&json!({ "alg": none }), &good());
            assert_eq!(verify_error(&token, &keys), TokenError::Algorithm(none.to_owned()), "{none}");
            let unsigned = format!("{}.", token.rsplit_once('.').unwrap().0);
            assert_eq!(verify_error(&unsigned, &keys), TokenError::Algorithm(none.to_owned()), "{none}");
        }
        // An RSA key never verifies an ECDSA signature, whatever the token declares.
        let token = rsa.token_with(&json!({ "alg": "ES256" }), &good());
        let (key, token_says) = (Algorithm::Rs256, Algorithm::Es256);
        assert_eq!(verify_error(&token, &keys), TokenError::OtherAlgorithm { key, token: token_says });
        let unsigned = format!("{}.", rsa.token(&good()).rsplit_once('.').unwrap().0);
        assert_eq!(verify_error(&unsigned, &keys), TokenError::Signature);
    }

    #[test]
    fn keys_inside_the_token_are_ignored() {
        let (signer, attacker) = (Signer::ec("e"), Signer::ec("mine"));
        let keys = keys(&[&signer]);
        let embedded =
            json!({ "jwk": attacker.jwk(), "jku": "https://evil.example", "x5u": "https://evil.example" });
        let unknown = TokenError::UnknownKey(KeyId(Some("mine".to_owned())));
        assert_eq!(verify_error(&attacker.token_with(&embedded, &good()), &keys), unknown);
        let mut embedded = embedded;
        embedded["kid"] = json!("e");
        assert_eq!(verify_error(&attacker.token_with(&embedded, &good()), &keys), TokenError::Signature);
        assert!(verify(&signer.token_with(&embedded, &good()), &expected(), &keys, NOW).is_ok());
    }

    #[test]
    fn critical_extensions_and_other_token_types_are_rejected() {
        let signer = Signer::ec("e");
        let keys = keys(&[&signer]);
        let token = signer.token_with(&json!({ "crit": ["b64"], "b64": false }), &good());
        assert_eq!(verify_error(&token, &keys), TokenError::Critical);
        for (typ, accepted) in
            [("JWT", true), ("at+jwt", true), ("application/at+JWT", true), ("dpop+jwt", false)]
        {
            let token = signer.token_with(&json!({ "typ": typ }), &good());
            assert_eq!(verify(&token, &expected(), &keys, NOW).is_ok(), accepted, "{typ}");
        }
    }

    #[test]
    fn issuer_audience_and_validity_are_checked() {
        let signer = Signer::ec("e");
        let keys = keys(&[&signer]);
        let at = |claims: Value| verify(&signer.token(&claims), &expected(), &keys, NOW).map(drop);
        let audience = || TokenError::Audience("`checkout`".to_owned());
        for (claims, outcome) in [
            (
                with("iss", json!("https://evil.example")),
                Err(TokenError::Issuer("https://id.example".to_owned())),
            ),
            (
                with("iss", json!(["https://id.example", "https://evil.example"])),
                Err(TokenError::Claim("iss")),
            ),
            (with("iss", Value::Null), Err(TokenError::Claim("iss"))),
            (with("aud", json!("billing")), Err(audience())),
            (with("aud", json!(["billing", "checkout"])), Ok(())),
            (with("aud", json!([])), Err(audience())),
            (with("aud", Value::Null), Err(TokenError::Claim("aud"))),
            (with("aud", json!("checkout billing")), Err(audience())),
            (with("exp", json!(NOW - LEEWAY + 1)), Ok(())),
            (with("exp", json!(NOW - LEEWAY)), Err(TokenError::Expired(LEEWAY))),
            (with("exp", json!(0)), Err(TokenError::Expired(NOW))),
            (with("exp", json!("soon")), Err(TokenError::Claim("exp"))),
            (with("exp", json!(-1)), Err(TokenError::Claim("exp"))),
            (with("exp", Value::Null), Err(TokenError::Claim("exp"))),
            (with("exp", json!(NOW as f64 + 0.5)), Ok(())),
            (with("nbf", json!(NOW + LEEWAY)), Ok(())),
            (with("nbf", json!(NOW + LEEWAY + 1)), Err(TokenError::NotYetValid(LEEWAY + 1))),
            (with("nbf", json!(true)), Err(TokenError::Claim("nbf"))),
        ] {
            assert_eq!(at(claims.clone()), outcome, "{claims}");
        }
        let mut endless = good();
        endless.as_object_mut().unwrap().remove("exp");
        assert_eq!(at(endless), Err(TokenError::Claim("exp")));
    }

    #[test]
    fn a_duplicate_claim_is_rejected() {
        let signer = Signer::ec("e");
        let keys = keys(&[&signer]);
        let text = good().to_string().replacen('{', r#"{"sub":"root","#, 1);
        let token = format!("{}.{}.AAAA", encode(r#"{"alg":"ES256","kid":"e"}"#), encode(text));
        assert_eq!(verify_error(&token, &keys), TokenError::Malformed("its claims are not an object"));
        let token =
            format!("{}.{}.AAAA", encode(r#"{"alg":"none","alg":"ES256"}"#), encode(good().to_string()));
        assert_eq!(verify_error(&token, &keys), TokenError::Malformed("its header is not a JWS header"));
    }

    #[test]
    fn claims_are_compared_as_strings_and_lists() {
        let mut claims = good();
        claims["scope"] = json!("orders:read orders:write");
        claims["groups"] = json!(["a", "b c", 7]);
        claims["admin"] = json!(true);
        claims["nested"] = json!({ "a": "b" });
        let claims = Claims::new(claims.as_object().unwrap().clone()).unwrap();
        for (name, wanted, holds) in [
            ("scope", "orders:read", true),
            ("scope", "orders", false),
            ("scope", "orders:read orders:write", true),
            ("scope", "", false),
            ("groups", "b c", true),
            ("groups", "b", false),
            ("groups", "7", true),
            ("admin", "true", true),
            ("admin", "false", false),
            ("nested", "b", false),
            ("missing", "", false),
        ] {
            assert_eq!(claims.all().has(name, wanted), holds, "{name} = {wanted}");
        }
    }

    #[test]
    fn untrusted_text_in_errors_is_short_and_printable() {
        let signer = Signer::ec(&format!("\n\u{7f}{}", "k".repeat(500)));
        let error = verify_error(&signer.token(&good()), &keys(&[&Signer::ec("e")])).to_string();
        assert!(error.len() < 150 && !error.contains('\n'), "{error}");
        assert_eq!(verify_error(&"a".repeat(MAX_TOKEN + 1), &keys(&[&Signer::ec("e")])), TokenError::TooLong);
    }

    proptest! {
        /// A valid token with any byte changed is rejected, and no input panics.
        #[test]
        fn only_the_signed_token_is_accepted(at in 0_usize..400, byte in 0_u8..128, noise in ".{0,80}") {
            thread_local! {
                static SIGNED: (KeySet, String) = {
                    let signer = Signer::ed("d");
                    (keys(&[&signer]), signer.token(&good()))
                };
            }
            SIGNED.with(|(keys, token)| {
                let mut bytes = token.clone().into_bytes();
                let at = at % bytes.len();
                let differs = bytes[at] != byte;
                bytes[at] = byte;
                let changed = String::from_utf8(bytes).unwrap();
                prop_assert_eq!(verify(&changed, &expected(), keys, NOW).is_err(), differs);
                prop_assert!(verify(&noise, &expected(), keys, NOW).is_err());
                Ok(())
            })?;
        }
    }
}
