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
    assert!(verify(&anonymous, &expected(), &all, NOW).is_ok(), "all keys of its algorithm are candidates");
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
        (with("iss", json!(["https://id.example", "https://evil.example"])), Err(TokenError::Claim("iss"))),
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
    let token = format!("{}.{}.AAAA", encode(r#"{"alg":"none","alg":"ES256"}"#), encode(good().to_string()));
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
