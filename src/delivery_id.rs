//! The ID of a delivery: 48 bits of milliseconds and 80 random bits, written as 26 digits of Crockford's base 32. IDs sort by time.

use std::{fmt, str::FromStr};

use crate::unix_time::UnixMillis;

/// Crockford's base 32: without I, L, O and U.
const DIGITS: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";

/// The number of digits: 128 bits, five a digit.
const LENGTH: u32 = 26;

/// See the [module](self).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeliveryId(u128);

/// A text that is not an ID.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not the ID of a delivery: 26 letters and digits, as `outrigger queue ls` shows them")]
pub struct InvalidDeliveryId(String);

impl DeliveryId {
    pub fn new(now: UnixMillis, random: [u8; 10]) -> Self {
        let mut bytes = [0; 16];
        bytes[6..].copy_from_slice(&random);
        Self((u128::from(now.0) << 80) | u128::from_be_bytes(bytes))
    }

    pub const fn to_bytes(self) -> [u8; 16] {
        self.0.to_be_bytes()
    }

    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(u128::from_be_bytes(bytes))
    }
}

impl fmt::Display for DeliveryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = [0; LENGTH as usize];
        for (digit, position) in text.iter_mut().zip((0..LENGTH).rev()) {
            *digit = DIGITS[(self.0 >> (5 * position)) as usize & 31];
        }
        f.write_str(&String::from_utf8_lossy(&text))
    }
}

impl fmt::Debug for DeliveryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for DeliveryId {
    type Err = InvalidDeliveryId;

    /// Lower case is accepted, and the letters that Crockford reads as digits: I, L and O.
    fn from_str(text: &str) -> Result<Self, InvalidDeliveryId> {
        let invalid = || InvalidDeliveryId(text.chars().take(64).collect());
        if text.len() != LENGTH as usize {
            return Err(invalid());
        }
        let mut value: u128 = 0;
        for byte in text.bytes() {
            let digit = match byte.to_ascii_uppercase() {
                b'I' | b'L' => b'1',
                b'O' => b'0',
                other => other,
            };
            let digit = DIGITS.iter().position(|known| *known == digit).ok_or_else(invalid)?;
            // The first digit has only three bits.
            value = value.checked_mul(32).ok_or_else(invalid)? | digit as u128;
        }
        Ok(Self(value))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn is_written_as_crockfords_base_32() {
        let id = DeliveryId::new(UnixMillis(1_469_918_176_385), [0xff; 10]);
        assert_eq!(id.to_string(), "01ARYZ6S41ZZZZZZZZZZZZZZZZ");
        assert_eq!("olaryz6s4izzzzzzzzzzzzzzzz".parse(), Ok(id));
        for text in ["", "01ARYZ6S41", "81ARYZ6S41ZZZZZZZZZZZZZZZZ", "01ARYZ6S41ZZZZZZZZZZZZZZZU", "0é"] {
            assert!(text.parse::<DeliveryId>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn text_and_bytes_give_the_same_id_again(now in 0u64..1 << 48, random: [u8; 10]) {
            let id = DeliveryId::new(UnixMillis(now), random);
            prop_assert_eq!(id.to_string().parse(), Ok(id));
            prop_assert_eq!(DeliveryId::from_bytes(id.to_bytes()), id);
            let later = DeliveryId::new(UnixMillis(now + 1), [0; 10]);
            prop_assert!(now + 1 == 1 << 48 || (id < later && id.to_string() < later.to_string()));
        }
    }
}
