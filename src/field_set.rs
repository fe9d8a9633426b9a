//! The set of header fields in a message that a proxy acts on, found by one pass over the names.
//!
//! The proxy checks some forty times per request for a field that is rarely present. A lookup in the header map hashes
//! the name; a lookup here tests one bit.

use http::{HeaderMap, HeaderName};

macro_rules! fields {
    ($($field:ident = $name:literal),+ $(,)?) => {
        /// A field that the proxy acts on.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Field { $($field),+ }

        const NAMES: &[&str] = &[$($name),+];
    };
}

fields! {
    // Hop-by-hop.
    Connection = "connection",
    Upgrade = "upgrade",
    Http2Settings = "http2-settings",
    KeepAlive = "keep-alive",
    ProxyConnection = "proxy-connection",
    TransferEncoding = "transfer-encoding",
    Te = "te",
    // Framing and routing.
    ContentLength = "content-length",
    Expect = "expect",
    Host = "host",
    Via = "via",
    // For proxies, or set by proxies.
    ProxyAuthorization = "proxy-authorization",
    ProxyAuthenticate = "proxy-authenticate",
    ForwardedClientCert = "x-forwarded-client-cert",
    Retry = "x-outrigger-retry",
    Attempt = "x-outrigger-attempt",
    RequestId = "x-request-id",
    IdempotencyKey = "idempotency-key",
    RequestTimeout = "x-request-timeout-ms",
    GrpcTimeout = "grpc-timeout",
    GrpcStatus = "grpc-status",
    Cookie = "cookie",
    // Traces.
    Traceparent = "traceparent",
    Tracestate = "tracestate",
    B3 = "b3",
    B3TraceId = "x-b3-traceid",
    B3Sampled = "x-b3-sampled",
    UberTraceId = "uber-trace-id",
}

const MAX_NAME_LENGTH: usize = 24;

/// For each length, the fields with names of that length.
const BY_LENGTH: [u64; MAX_NAME_LENGTH] = {
    let mut table = [0; MAX_NAME_LENGTH];
    let mut at = 0;
    while at < NAMES.len() {
        table[NAMES[at].len()] |= 1 << at;
        at += 1;
    }
    table
};

/// For each first letter, the fields whose names begin with it.
const BY_FIRST: [u64; 256] = {
    let mut table = [0; 256];
    let mut at = 0;
    while at < NAMES.len() {
        table[NAMES[at].as_bytes()[0] as usize] |= 1 << at;
        at += 1;
    }
    table
};

/// Tests eight bytes at a time, since it runs on every field name of every message.
fn has_underscore(name: &[u8]) -> bool {
    const ONES: u64 = u64::from_ne_bytes([1; 8]);
    const HIGH: u64 = ONES << 7;
    let (eights, rest) = name.as_chunks::<8>();
    let hit = |eight: &[u8; 8]| {
        let differs = u64::from_ne_bytes(*eight) ^ (ONES * b'_' as u64);
        differs.wrapping_sub(ONES) & !differs & HIGH != 0
    };
    eights.iter().any(hit) || rest.contains(&b'_')
}

/// A set of fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FieldSet(u64);

impl FieldSet {
    /// The hop-by-hop fields of a connection.
    pub const HOP_BY_HOP: Self = Self::set(&[
        Field::Connection,
        Field::Upgrade,
        Field::Http2Settings,
        Field::KeepAlive,
        Field::ProxyConnection,
        Field::TransferEncoding,
        Field::Te,
    ]);
    /// The fields in which a client sends trace context.
    pub const TRACE: Self = Self::set(&[
        Field::Traceparent,
        Field::Tracestate,
        Field::B3,
        Field::B3TraceId,
        Field::B3Sampled,
        Field::UberTraceId,
    ]);
    /// A name with `_`, which some services read as `-`.
    const UNDERSCORE: u64 = 1 << 63;

    const fn set(fields: &[Field]) -> Self {
        let (mut bits, mut at) = (0, 0);
        while at < fields.len() {
            bits |= 1 << fields[at] as u64;
            at += 1;
        }
        Self(bits)
    }

    pub fn of(headers: &HeaderMap) -> Self {
        let mut found = Self::default();
        headers.keys().for_each(|name| found.add(name));
        found
    }

    /// Adds a field.
    pub fn add(&mut self, name: &HeaderName) {
        let name = name.as_str().as_bytes();
        // A name is never empty.
        let first = name.first().copied().unwrap_or_default();
        let mut candidates = BY_LENGTH.get(name.len()).copied().unwrap_or(0) & BY_FIRST[usize::from(first)];
        while candidates != 0 {
            let at = candidates.trailing_zeros() as usize;
            if NAMES[at].as_bytes() == name {
                self.0 |= 1 << at;
                break;
            }
            candidates &= candidates - 1;
        }
        if has_underscore(name) {
            self.0 |= Self::UNDERSCORE;
        }
    }

    /// Removes a field.
    pub const fn remove(&mut self, field: Field) {
        self.0 &= !(1 << field as u64);
    }

    pub const fn has(self, field: Field) -> bool {
        self.0 & (1 << field as u64) != 0
    }

    pub const fn has_any(self, of: Self) -> bool {
        self.0 & of.0 != 0
    }

    /// Whether a name contains `_`, which some services read as `-`.
    pub const fn has_underscore(self) -> bool {
        self.0 & Self::UNDERSCORE != 0
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn map(names: &[&str]) -> HeaderMap {
        let field = |name: &&str| (name.parse::<HeaderName>().unwrap(), HeaderValue::from_static("x"));
        names.iter().map(field).collect()
    }

    #[test]
    fn finds_fields_by_exact_name() {
        for (at, name) in NAMES.iter().enumerate() {
            assert_eq!(FieldSet::of(&map(&[name])).0, 1 << at, "{name}");
            let longer = format!("{name}s");
            assert_eq!(FieldSet::of(&map(&[&longer])).0 & (1 << at), 0, "{longer}");
        }
        assert!(NAMES.len() < 63, "one bit is for `_`");
    }

    #[test]
    fn ignores_other_fields() {
        let present = FieldSet::of(&map(&["accept", "host", "user-agent", &"x".repeat(40)]));
        assert_eq!(present, FieldSet::set(&[Field::Host]));
        assert!(!present.has_any(FieldSet::HOP_BY_HOP) && !present.has_underscore());
        assert!(!FieldSet::of(&map(&["x-request-id-of-another"])).has_underscore());
        for disguised in ["x_request_id", "_", "a_", "_aaaaaaaa", "aaaaaaa_aaaaaaaa", "aaaaaaaaaaaa_"] {
            assert!(FieldSet::of(&map(&[disguised])).has_underscore(), "{disguised}");
        }
    }
}
