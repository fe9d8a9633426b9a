//! A cache of valid tokens, so that a client's next request needs no signature verification.
//!
//! One per worker: no lock. The whole token is the key, so only identical tokens hit. Two generations of bounded
//! size: a full young generation becomes the old one, and a hit in the old one moves the token to the young one. That
//! keeps tokens in use, without an LRU list.

use std::{collections::HashMap, mem, rc::Rc};

use super::{
    KeySet,
    token::{Claims, MAX_TOKEN, TokenError, TokenRequirements, verify},
};

/// The limits of each generation: tokens, and their total bytes.
const MAX_TOKENS: usize = 1024;
const MAX_BYTES: usize = 128 * MAX_TOKEN;

/// The settings and keys that the cached tokens were verified with. A change clears the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
struct Basis {
    settings: u64,
    keys: u64,
}

#[derive(Debug, Default)]
pub struct TokenCache {
    basis: Basis,
    young: HashMap<Box<str>, Rc<Claims>>,
    old: HashMap<Box<str>, Rc<Claims>>,
    bytes: usize,
}

impl TokenCache {
    /// Like [`verify`], but caches valid tokens. `settings`: unique for these requirements.
    ///
    /// # Errors
    /// Like [`verify`]; invalid tokens are not cached.
    pub fn verify(
        &mut self,
        token: &str,
        settings: u64,
        expected: &TokenRequirements,
        keys: &KeySet,
        now: u64,
    ) -> Result<Rc<Claims>, TokenError> {
        let basis = Basis { settings, keys: keys.generation };
        if basis != self.basis {
            *self = Self { basis, ..Self::default() };
        }
        if let Some(claims) = self.young.get(token) {
            return claims.check_time(now).map(|()| Rc::clone(claims));
        }
        let claims = match self.old.remove(token) {
            Some(claims) => claims.check_time(now).map(|()| claims)?,
            None => Rc::new(verify(token, expected, keys, now)?),
        };
        if self.young.len() >= MAX_TOKENS || self.bytes + token.len() > MAX_BYTES {
            self.old = mem::take(&mut self.young);
            self.bytes = 0;
        }
        self.bytes += token.len();
        self.young.insert(token.into(), Rc::clone(&claims));
        Ok(claims)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::identity::jwt::test_keys::{Signer, jwks};

    const NOW: u64 = 1_800_000_000;

    fn expected() -> TokenRequirements {
        TokenRequirements { issuer: "i".to_owned(), audiences: vec!["a".to_owned()] }
    }

    fn keys(signer: &Signer) -> KeySet {
        KeySet::parse(jwks(&[signer]).as_bytes()).unwrap()
    }

    fn token(signer: &Signer, number: usize) -> String {
        signer.token(&json!({ "iss": "i", "aud": "a", "exp": NOW + 60, "n": number }))
    }

    #[test]
    fn a_cached_token_is_shared_and_expires() {
        let signer = Signer::ed("d");
        let (keys, expected, token) = (keys(&signer), expected(), token(&signer, 0));
        let mut cache = TokenCache::default();
        let first = cache.verify(&token, 1, &expected, &keys, NOW).unwrap();
        let second = cache.verify(&token, 1, &expected, &keys, NOW).unwrap();
        assert!(Rc::ptr_eq(&first, &second));
        assert_eq!(cache.verify(&token, 1, &expected, &keys, NOW + 90), Err(TokenError::Expired(30)));
        assert!(cache.verify(&format!("{token}A"), 1, &expected, &keys, NOW).is_err());
    }

    #[test]
    fn other_keys_or_settings_clear_the_cache() {
        let signer = Signer::ed("d");
        let (old, expected, token) = (keys(&signer), expected(), token(&signer, 0));
        let new = keys(&Signer::ed("d"));
        let mut cache = TokenCache::default();
        assert!(cache.verify(&token, 1, &expected, &old, NOW).is_ok());
        assert_eq!(cache.verify(&token, 1, &expected, &new, NOW), Err(TokenError::Signature));
        assert!(cache.verify(&token, 1, &expected, &old, NOW).is_ok());
        let stricter = TokenRequirements { audiences: vec!["b".to_owned()], ..expected };
        assert!(cache.verify(&token, 2, &stricter, &old, NOW).is_err());
    }

    /// `cargo test --lib -- --ignored --nocapture a_hit_saves_a_signature`
    #[test]
    #[ignore = "a measurement"]
    fn a_hit_saves_a_signature() {
        for signer in [Signer::rsa("r"), Signer::ec("e"), Signer::ed("d")] {
            let (keys, expected, token) = (keys(&signer), expected(), token(&signer, 0));
            let time = |what: &mut dyn FnMut()| {
                let begin = std::time::Instant::now();
                (0..2_000).for_each(|_| what());
                begin.elapsed().as_nanos() / 2_000
            };
            let uncached = time(&mut || drop(verify(&token, &expected, &keys, NOW).unwrap()));
            let mut cache = TokenCache::default();
            let cached = time(&mut || drop(cache.verify(&token, 1, &expected, &keys, NOW).unwrap()));
            println!("{:?}: {uncached} ns uncached, {cached} ns cached", signer.algorithm);
        }
    }

    #[test]
    fn the_size_is_bounded_and_tokens_in_use_stay() {
        let signer = Signer::ed("d");
        let (keys, expected) = (keys(&signer), expected());
        let mut cache = TokenCache::default();
        let favourite = token(&signer, usize::MAX);
        let first = cache.verify(&favourite, 1, &expected, &keys, NOW).unwrap();
        for number in 0..3 * MAX_TOKENS {
            cache.verify(&token(&signer, number), 1, &expected, &keys, NOW).unwrap();
            let cached = cache.verify(&favourite, 1, &expected, &keys, NOW).unwrap();
            assert!(Rc::ptr_eq(&first, &cached));
            assert!(cache.young.len() <= MAX_TOKENS && cache.old.len() <= MAX_TOKENS);
        }
    }
}
