//! Encryption at rest: AES-256-GCM over heads and bodies, with a key of its own for each delivery.

use std::{fmt, fs, path::Path};

use aws_lc_rs::{
    aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey},
    hmac,
};
use base64::{Engine, engine::general_purpose::STANDARD};

use super::error::StoreError;
use crate::queue::DeliveryId;

const KEY_LENGTH: usize = 32;

/// A key file is at most so long: 64 hex digits and a line end.
const MAX_FILE: usize = 128;

/// Which part of a delivery a sealed text is. One part does not open in the place of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    RequestHead,
    RequestBody,
    ResponseHead,
    ResponseBody,
}

/// The key of a store. The key of a delivery is derived from it by HMAC-SHA-256, so few texts share a key and random
/// nonces cannot collide.
#[derive(Clone)]
pub struct Cipher(hmac::Key);

impl fmt::Debug for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Cipher")
    }
}

impl Cipher {
    pub fn from_file(path: &Path) -> Result<Self, StoreError> {
        let content = fs::read(path).map_err(StoreError::file(path))?;
        parse_key(&content)
            .map(|key| Self::new(&key))
            .ok_or_else(|| StoreError::InvalidKey { path: path.into() })
    }

    pub fn new(key: &[u8; KEY_LENGTH]) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, key))
    }

    /// Identifies the key without revealing it.
    pub(super) fn check(&self) -> [u8; 16] {
        let mut check = [0; 16];
        check.copy_from_slice(&hmac::sign(&self.0, b"outrigger store key check").as_ref()[..16]);
        check
    }

    fn key(&self, id: DeliveryId) -> Result<RandomizedNonceKey, StoreError> {
        let mut context = hmac::Context::with_key(&self.0);
        context.update(b"outrigger delivery");
        context.update(&id.to_bytes());
        RandomizedNonceKey::new(&AES_256_GCM, context.sign().as_ref())
            .map_err(|_| StoreError::Unreadable("no key can be derived".to_owned()))
    }

    /// The nonce, the ciphertext, the tag.
    pub(super) fn seal(&self, id: DeliveryId, part: Part, plain: &[u8]) -> Result<Vec<u8>, StoreError> {
        let mut text = plain.to_vec();
        let nonce = self
            .key(id)?
            .seal_in_place_append_tag(Aad::from([part as u8]), &mut text)
            .map_err(|_| StoreError::Unreadable("encryption failed".to_owned()))?;
        Ok([nonce.as_ref().as_slice(), &text].concat())
    }

    pub(super) fn open(&self, id: DeliveryId, part: Part, sealed: &[u8]) -> Result<Vec<u8>, StoreError> {
        let unreadable =
            || StoreError::Unreadable("it does not decrypt: the stored bytes changed".to_owned());
        let (nonce, text) = sealed.split_at_checked(NONCE_LEN).ok_or_else(unreadable)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| unreadable())?;
        let mut text = text.to_vec();
        let length = self
            .key(id)?
            .open_in_place(nonce, Aad::from([part as u8]), &mut text)
            .map_err(|_| unreadable())?
            .len();
        text.truncate(length);
        Ok(text)
    }
}

/// 32 bytes, raw, in hex or base64.
fn parse_key(content: &[u8]) -> Option<[u8; KEY_LENGTH]> {
    if content.len() > MAX_FILE {
        return None;
    }
    if let Ok(raw) = content.try_into() {
        return Some(raw);
    }
    let text = std::str::from_utf8(content).ok()?.trim();
    let decoded = if text.len() == 2 * KEY_LENGTH {
        text.as_bytes()
            .chunks(2)
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
            .collect()
    } else {
        STANDARD.decode(text).ok()
    };
    decoded?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unix_time::UnixMillis;

    #[test]
    fn reads_keys_in_three_forms() {
        let key: [u8; 32] = std::array::from_fn(|index| index as u8 * 7);
        let hex: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
        for text in [hex.clone() + "\n", STANDARD.encode(key), STANDARD.encode(key) + "\n"] {
            assert_eq!(parse_key(text.as_bytes()), Some(key), "{text}");
        }
        assert_eq!(parse_key(&key), Some(key));
        for text in ["", "short", &hex[..63], &(hex.clone() + "0"), &"g".repeat(64), &"a".repeat(1000)] {
            assert_eq!(parse_key(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn opens_only_the_same_part_of_the_same_delivery_with_the_same_key() {
        let (cipher, other) = (Cipher::new(&[1; 32]), Cipher::new(&[2; 32]));
        let id = |time| DeliveryId::new(UnixMillis(time), [9; 10]);
        let sealed = cipher.seal(id(1), Part::RequestBody, b"order 66").unwrap();
        assert!(!sealed.windows(5).any(|part| part == b"order"));
        assert_ne!(
            sealed,
            cipher.seal(id(1), Part::RequestBody, b"order 66").unwrap(),
            "a new nonce each time"
        );
        assert_eq!(cipher.open(id(1), Part::RequestBody, &sealed).unwrap(), b"order 66");
        for wrong in [
            cipher.open(id(2), Part::RequestBody, &sealed),
            cipher.open(id(1), Part::RequestHead, &sealed),
            other.open(id(1), Part::RequestBody, &sealed),
            cipher.open(id(1), Part::RequestBody, &sealed[..sealed.len() - 1]),
            cipher.open(id(1), Part::RequestBody, b"x"),
        ] {
            assert!(matches!(wrong, Err(StoreError::Unreadable(_))));
        }
        assert_ne!(cipher.check(), other.check());
    }
}
