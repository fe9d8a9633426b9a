//! The public keys of an issuer, from a JWK Set (RFC 7517 §5).
//!
//! Each key is bound to one algorithm when it is parsed, by its `alg` or else by its type. The algorithm in a token
//! selects nothing (RFC 8725 §3.1). Keys that are not for RS256, ES256 or EdDSA signatures are ignored.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm as Signed, DecodingKey, crypto};
use serde::Deserialize;
use serde_json::Value;

/// Most keys in a set; further ones are ignored.
const MAX_KEYS: usize = 64;
/// RFC 7518 §3.3.
const MIN_RSA_BITS: usize = 2048;
const MAX_RSA_BITS: usize = 8192;

/// The accepted signature algorithms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    Rs256,
    Es256,
    EdDsa,
}

/// A public key and the one algorithm it verifies.
#[derive(Clone, Debug)]
pub struct VerificationKey {
    pub id: Option<String>,
    pub algorithm: Algorithm,
    key: DecodingKey,
}

/// The public keys of an issuer.
#[derive(Clone, Debug)]
pub struct KeySet {
    pub keys: Vec<VerificationKey>,
    /// The ignored keys, and why.
    pub skipped: Vec<String>,
    /// Unique for each parsed set.
    pub generation: u64,
}

/// Why a document is not a usable set of keys.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeysError {
    #[error("not a JWK Set: {0}")]
    Json(String),
    #[error("it contains no key for RS256, ES256 or EdDSA signatures{}", .0.as_ref().map_or(String::new(), |reason| format!(" ({reason})")))]
    NoUsableKey(Option<String>),
}

/// The used members of a JWK.
#[derive(Deserialize)]
struct Jwk {
    kty: String,
    kid: Option<String>,
    alg: Option<String>,
    r#use: Option<String>,
    key_ops: Option<Vec<String>>,
    crv: Option<String>,
    n: Option<String>,
    e: Option<String>,
    x: Option<String>,
    y: Option<String>,
}

#[derive(Deserialize)]
struct Jwks {
    keys: Vec<Value>,
}

impl Algorithm {
    /// By its name in a token. `Ed25519` is RFC 9864's name for the one EdDSA variant supported here.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "RS256" => Some(Self::Rs256),
            "ES256" => Some(Self::Es256),
            "EdDSA" | "Ed25519" => Some(Self::EdDsa),
            _ => None,
        }
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rs256 => "RS256",
            Self::Es256 => "ES256",
            Self::EdDsa => "EdDSA",
        })
    }
}

impl VerificationKey {
    /// Whether `signature`, base64url as in the token, is valid for this key and `message`.
    pub fn verifies(&self, message: &[u8], signature: &str) -> bool {
        let signed = match self.algorithm {
            Algorithm::Rs256 => Signed::RS256,
            Algorithm::Es256 => Signed::ES256,
            Algorithm::EdDsa => Signed::EdDSA,
        };
        crypto::verify(signature, message, &self.key, signed).unwrap_or(false)
    }

    fn read(jwk: &Jwk) -> Result<Self, String> {
        if jwk.r#use.as_deref().is_some_and(|usage| usage != "sig") {
            return Err("it is not for signatures".to_owned());
        }
        if jwk.key_ops.as_ref().is_some_and(|ops| ops.iter().all(|op| op != "verify")) {
            return Err("it is not for verifying".to_owned());
        }
        let (algorithm, key) = match (jwk.kty.as_str(), jwk.crv.as_deref()) {
            ("RSA", _) => (Algorithm::Rs256, rsa(jwk)?),
            ("EC", Some("P-256")) => (Algorithm::Es256, p256(jwk)?),
            ("OKP", Some("Ed25519")) => (Algorithm::EdDsa, ed25519(jwk)?),
            (kind, None) => return Err(format!("{kind} is not supported")),
            (kind, Some(curve)) => return Err(format!("{kind} {curve} is not supported")),
        };
        if let Some(declared) =
            jwk.alg.as_deref().filter(|declared| Algorithm::named(declared) != Some(algorithm))
        {
            return Err(format!("it is for {declared}"));
        }
        Ok(Self { id: jwk.kid.clone(), algorithm, key })
    }
}

fn part(text: Option<&String>, name: &str) -> Result<Vec<u8>, String> {
    let text = text.ok_or_else(|| format!("`{name}` is missing"))?;
    URL_SAFE_NO_PAD.decode(text).map_err(|_| format!("`{name}` is not base64url"))
}

fn rsa(jwk: &Jwk) -> Result<DecodingKey, String> {
    let (modulus, exponent) = (part(jwk.n.as_ref(), "n")?, part(jwk.e.as_ref(), "e")?);
    let leading = modulus.iter().take_while(|byte| **byte == 0).count();
    let bits = modulus
        .get(leading)
        .map_or(0, |first| (modulus.len() - leading) * 8 - first.leading_zeros() as usize);
    if !(MIN_RSA_BITS..=MAX_RSA_BITS).contains(&bits) {
        return Err(format!("an RSA key of {bits} bits; {MIN_RSA_BITS} to {MAX_RSA_BITS} are accepted"));
    }
    Ok(DecodingKey::from_rsa_raw_components(&modulus[leading..], &exponent))
}

fn p256(jwk: &Jwk) -> Result<DecodingKey, String> {
    let (x, y) = (part(jwk.x.as_ref(), "x")?, part(jwk.y.as_ref(), "y")?);
    if x.len() != 32 || y.len() != 32 {
        return Err("its coordinates are not 32 bytes each".to_owned());
    }
    // An uncompressed point (SEC 1 §2.3.3).
    Ok(DecodingKey::from_ec_der(&[&[4][..], &x, &y].concat()))
}

fn ed25519(jwk: &Jwk) -> Result<DecodingKey, String> {
    let x = part(jwk.x.as_ref(), "x")?;
    if x.len() != 32 {
        return Err("`x` is not 32 bytes".to_owned());
    }
    Ok(DecodingKey::from_ed_der(&x))
}

impl KeySet {
    /// Parses a JWK Set. Unusable keys are skipped.
    ///
    /// # Errors
    /// It is not a JWK Set, or contains no usable key.
    pub fn parse(json: &[u8]) -> Result<Self, KeysError> {
        let set: Jwks = serde_json::from_slice(json).map_err(|error| KeysError::Json(error.to_string()))?;
        let (mut keys, mut skipped) = (Vec::new(), Vec::new());
        for (at, value) in set.keys.into_iter().enumerate() {
            let name = match value.get("kid").and_then(Value::as_str) {
                Some(id) => format!("key `{id}`"),
                None => format!("key {at}"),
            };
            let read = Jwk::deserialize(value).map_err(|error| error.to_string());
            match read.and_then(|jwk| VerificationKey::read(&jwk)) {
                Ok(_) if keys.len() >= MAX_KEYS => skipped.push(format!("{name}: only {MAX_KEYS} are kept")),
                Ok(key) => keys.push(key),
                Err(reason) => skipped.push(format!("{name}: {reason}")),
            }
        }
        if keys.is_empty() {
            return Err(KeysError::NoUsableKey(skipped.into_iter().next()));
        }
        static GENERATION: AtomicU64 = AtomicU64::new(1);
        Ok(Self { keys, skipped, generation: GENERATION.fetch_add(1, Ordering::Relaxed) })
    }

    /// The keys that may have signed a token: those with its key ID, else those without one; all if it has no key ID.
    pub fn candidates<'a>(&'a self, id: Option<&'a str>) -> impl Iterator<Item = &'a VerificationKey> {
        let named = id.is_some_and(|id| self.keys.iter().any(|key| key.id.as_deref() == Some(id)));
        self.keys.iter().filter(move |key| match id {
            Some(_) if named => key.id.as_deref() == id,
            Some(_) => key.id.is_none(),
            None => true,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::jwt::test_keys::Signer;

    fn jwks(keys: &[&str]) -> String {
        format!("{{\"keys\":[{}]}}", keys.join(","))
    }

    fn jwk(signer: &Signer) -> String {
        signer.jwk().to_string()
    }

    /// The key with another ID and one member replaced.
    fn with_member(signer: &Signer, kid: &str, name: &str, value: &str) -> String {
        let mut jwk = signer.jwk();
        jwk["kid"] = kid.into();
        jwk[name] = value.into();
        jwk.to_string()
    }

    #[test]
    fn keys_of_the_three_types_are_parsed() {
        let set = KeySet::parse(
            jwks(&[&jwk(&Signer::rsa("rsa")), &jwk(&Signer::ec("ec")), &jwk(&Signer::ed("ed"))]).as_bytes(),
        )
        .unwrap();
        let read: Vec<_> = set.keys.iter().map(|key| (key.id.as_deref().unwrap(), key.algorithm)).collect();
        assert_eq!(read, [("rsa", Algorithm::Rs256), ("ec", Algorithm::Es256), ("ed", Algorithm::EdDsa)]);
        assert_eq!(set.skipped, [""; 0]);
    }

    #[test]
    fn unusable_keys_are_skipped_and_reported() {
        let oct = r#"{"kty":"oct","kid":"secret","k":"c2VjcmV0"}"#;
        let rsa = Signer::rsa("rsa");
        let enc = with_member(&rsa, "enc", "use", "enc");
        let pss = with_member(&rsa, "pss", "alg", "PS256");
        let confused = with_member(&rsa, "hs", "alg", "HS256");
        let ed = jwk(&Signer::ed("ed"));
        let small = r#"{"kty":"RSA","kid":"small","n":"AQAB","e":"AQAB"}"#;
        let broken = r#"{"kty":"EC","crv":"P-256","kid":"broken","x":"!","y":"AQ"}"#;
        let set = KeySet::parse(jwks(&[oct, &enc, &pss, &confused, small, broken, "7", &ed]).as_bytes());
        let set = set.unwrap();
        assert_eq!(set.keys.len(), 1);
        let reasons = [
            "key `secret`: oct is not supported",
            "key `enc`: it is not for signatures",
            "key `pss`: it is for PS256",
            "key `hs`: it is for HS256",
            "key `small`: an RSA key of 17 bits; 2048 to 8192 are accepted",
            "key `broken`: `x` is not base64url",
        ];
        assert_eq!(set.skipped[..reasons.len()], reasons);
        assert!(set.skipped[6].starts_with("key 6: "), "{}", set.skipped[6]);
    }

    #[test]
    fn a_set_without_a_usable_key_is_rejected() {
        assert!(matches!(KeySet::parse(b"<html>"), Err(KeysError::Json(_))));
        assert_eq!(KeySet::parse(br#"{"keys":[]}"#).unwrap_err(), KeysError::NoUsableKey(None));
        let error = KeySet::parse(jwks(&[r#"{"kty":"oct","k":"AA"}"#]).as_bytes()).unwrap_err();
        assert!(error.to_string().ends_with("(key 0: oct is not supported)"), "{error}");
    }

    #[test]
    fn the_key_id_selects_the_key() {
        let mut anonymous = Signer::ed("ed").jwk();
        anonymous.as_object_mut().unwrap().remove("kid");
        let (rsa, ec) = (jwk(&Signer::rsa("rsa")), jwk(&Signer::ec("ec")));
        let set = KeySet::parse(jwks(&[&rsa, &ec, &anonymous.to_string()]).as_bytes()).unwrap();
        let chosen = |id| set.candidates(id).map(|key| key.algorithm).collect::<Vec<_>>();
        assert_eq!(chosen(Some("ec")), [Algorithm::Es256]);
        assert_eq!(chosen(Some("other")), [Algorithm::EdDsa], "a key without an ID may match any");
        assert_eq!(chosen(None).len(), 3);
    }
}
