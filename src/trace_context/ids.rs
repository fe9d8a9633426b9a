//! Trace and span IDs, and their hexadecimal form.

use std::fmt;

use crate::rng::Rng;

/// The ID of a trace; never zero.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TraceId(u128);

/// The ID of a span; never zero.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SpanId(u64);

impl TraceId {
    pub fn new(id: u128) -> Option<Self> {
        (id != 0).then_some(Self(id))
    }

    pub fn random(rng: &mut Rng) -> Self {
        Self(((u128::from(rng.next_u64()) << 64) | u128::from(rng.next_u64())).max(1))
    }

    pub const fn get(self) -> u128 {
        self.0
    }

    /// Parses 32 lower-case hexadecimal digits.
    pub fn parse(text: &[u8]) -> Option<Self> {
        Self::new(parse_lower_hex(text).filter(|_| text.len() == 32)?)
    }

    /// Writes 32 hexadecimal digits into `out`.
    pub fn encode(self, out: &mut [u8]) {
        encode(self.0.to_be_bytes(), out);
    }
}

impl SpanId {
    pub fn new(id: u64) -> Option<Self> {
        (id != 0).then_some(Self(id))
    }

    pub fn random(rng: &mut Rng) -> Self {
        Self(rng.next_u64().max(1))
    }

    pub const fn get(self) -> u64 {
        self.0
    }

    pub(super) fn encode(self, out: &mut [u8]) {
        encode(self.0.to_be_bytes(), out);
    }
}

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = [0; 32];
        self.encode(&mut text);
        f.write_str(str::from_utf8(&text).unwrap_or_default())
    }
}

impl fmt::Display for SpanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = [0; 16];
        self.encode(&mut text);
        f.write_str(str::from_utf8(&text).unwrap_or_default())
    }
}

impl fmt::Debug for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Debug for SpanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

const DIGITS: &[u8; 16] = b"0123456789abcdef";

/// Writes two hexadecimal digits for each byte into `out`.
fn encode<const N: usize>(number: [u8; N], out: &mut [u8]) {
    for (digits, byte) in out.chunks_exact_mut(2).zip(number) {
        digits[0] = DIGITS[usize::from(byte >> 4)];
        digits[1] = DIGITS[usize::from(byte & 15)];
    }
}

/// Parses lower-case hexadecimal digits.
pub(super) fn parse_lower_hex(text: &[u8]) -> Option<u128> {
    text.iter().try_fold(0u128, |number, byte| {
        let digit = match byte {
            b'0'..=b'9' => byte - b'0',
            b'a'..=b'f' => byte - b'a' + 10,
            _ => return None,
        };
        number.checked_mul(16).map(|number| number | u128::from(digit))
    })
}

/// Parses 1 to `most` hexadecimal digits of either case.
pub(super) fn parse_hex(text: &str, most: usize) -> Option<u128> {
    if text.is_empty() || text.len() > most || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    u128::from_str_radix(text, 16).ok()
}
