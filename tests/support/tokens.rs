//! An issuer of tokens: its keys, the tokens that it signs, and the key set that it publishes.

use std::sync::OnceLock;

use jsonwebtoken::{Algorithm, EncodingKey, crypto, jwk::Jwk};
use rcgen::KeyPair;
use serde_json::{Value, json};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};

/// A private key with its id.
#[derive(Clone)]
pub struct Signer {
    pub kid: String,
    pub algorithm: Algorithm,
    key: EncodingKey,
    /// As PEM: what an attacker could use as an HMAC secret.
    pub public: String,
    raw: Vec<u8>,
}

impl Signer {
    fn new(kid: &str, algorithm: Algorithm, pair: &KeyPair) -> Self {
        let pem = pair.serialize_pem();
        let key = match algorithm {
            Algorithm::RS256 => EncodingKey::from_rsa_pem(pem.as_bytes()),
            Algorithm::ES256 => EncodingKey::from_ec_pem(pem.as_bytes()),
            _ => EncodingKey::from_ed_pem(pem.as_bytes()),
        };
        let (public, raw) = (pair.public_key_pem(), pair.public_key_raw().to_vec());
        Self { kid: kid.to_owned(), algorithm, key: key.expect("a key"), public, raw }
    }

    /// The same key each time: generating one is slow.
    pub fn rsa(kid: &str) -> Self {
        static PAIR: OnceLock<KeyPair> = OnceLock::new();
        let pair = PAIR.get_or_init(|| KeyPair::generate_for(&rcgen::PKCS_RSA_SHA256).expect("a key"));
        Self::new(kid, Algorithm::RS256, pair)
    }

    pub fn ec(kid: &str) -> Self {
        let pair = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).expect("a key");
        Self::new(kid, Algorithm::ES256, &pair)
    }

    pub fn ed(kid: &str) -> Self {
        let pair = KeyPair::generate_for(&rcgen::PKCS_ED25519).expect("a key");
        Self::new(kid, Algorithm::EdDSA, &pair)
    }

    pub fn jwk(&self) -> Value {
        let mut jwk = if self.algorithm == Algorithm::EdDSA {
            json!({ "kty": "OKP", "crv": "Ed25519", "x": encode(&self.raw) })
        } else {
            let jwk = Jwk::from_encoding_key(&self.key, self.algorithm).expect("a public key");
            serde_json::to_value(jwk).expect("JSON")
        };
        jwk["kid"] = json!(self.kid);
        jwk["use"] = json!("sig");
        jwk
    }

    pub fn token(&self, claims: &Value) -> String {
        self.token_with(&json!({ "typ": "JWT" }), claims)
    }

    /// `header` adds to the token's header or replaces its values.
    pub fn token_with(&self, header: &Value, claims: &Value) -> String {
        let mut whole = json!({ "alg": format!("{:?}", self.algorithm), "kid": self.kid });
        for (name, value) in header.as_object().into_iter().flatten() {
            whole[name] = value.clone();
        }
        let message = format!("{}.{}", encode(whole.to_string()), encode(claims.to_string()));
        let signature = crypto::sign(message.as_bytes(), &self.key, self.algorithm).expect("a signature");
        format!("{message}.{signature}")
    }

    /// Signed by HMAC with the public key as the secret: the algorithm confusion attack.
    pub fn confused(&self, claims: &Value) -> String {
        let header = json!({ "alg": "HS256", "kid": self.kid });
        let message = format!("{}.{}", encode(header.to_string()), encode(claims.to_string()));
        let secret = EncodingKey::from_secret(self.public.as_bytes());
        let signature = crypto::sign(message.as_bytes(), &secret, Algorithm::HS256).expect("a signature");
        format!("{message}.{signature}")
    }
}

/// base64url without padding.
pub fn encode(text: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(text)
}

/// The key set that the issuer publishes.
pub fn jwks(signers: &[&Signer]) -> String {
    json!({ "keys": signers.iter().map(|signer| signer.jwk()).collect::<Vec<_>>() }).to_string()
}
