//! SPIFFE IDs (the SPIFFE ID standard, §2), and patterns for the names in certificates.
//!
//! Parsing is strict on purpose: IDs are compared byte by byte, so each must have one spelling.

use std::{fmt, str::FromStr};

/// The prefix of every ID.
const SCHEME: &str = "spiffe://";
/// Longest ID, bytes (§2.3).
const MAX_ID: usize = 2048;
/// Longest trust domain, bytes (§2.1).
const MAX_TRUST_DOMAIN: usize = 255;
/// Longest DNS name, bytes (RFC 1035 §2.3.4).
const MAX_DNS: usize = 253;

/// Why a string is not a SPIFFE ID, a trust domain or a pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidId {
    #[error("it does not begin with `spiffe://`")]
    Scheme,
    #[error("it is longer than {MAX_ID} bytes")]
    TooLong,
    #[error("its trust domain is empty or longer than {MAX_TRUST_DOMAIN} bytes")]
    TrustDomainLength,
    #[error("`{0}` is not allowed in a trust domain: use a-z, 0-9, `.`, `-` and `_`")]
    TrustDomainByte(char),
    #[error("`{0}` is not allowed in its path: use letters, digits, `.`, `-`, `_` and `/`")]
    PathByte(char),
    #[error("its path has an empty part, `.` or `..`, or ends in `/`")]
    PathSegment,
    #[error("`*` is allowed only at the end, after the trust domain")]
    Wildcard,
    #[error("this is not a DNS name")]
    Dns,
}

/// The name of a trust domain, e.g. `shop.example`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Box<str>);

impl TrustDomain {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TrustDomain {
    type Err = InvalidId;

    /// Accepts the bare name, or the ID of the trust domain itself (`spiffe://shop.example`).
    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let name = text.strip_prefix(SCHEME).unwrap_or(text);
        check_trust_domain(name)?;
        Ok(Self(name.into()))
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A SPIFFE ID, e.g. `spiffe://shop.example/ns/shop/sa/payments`.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct SpiffeId {
    text: Box<str>,
    /// Where the path begins; the length if there is none.
    path_at: usize,
}

impl SpiffeId {
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The name of its trust domain.
    pub fn trust_domain(&self) -> &str {
        &self.text[SCHEME.len()..self.path_at]
    }

    /// With its leading `/`; empty for a trust domain's own ID.
    pub fn path(&self) -> &str {
        &self.text[self.path_at..]
    }
}

impl FromStr for SpiffeId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let rest = text.strip_prefix(SCHEME).ok_or(InvalidId::Scheme)?;
        if text.len() > MAX_ID {
            return Err(InvalidId::TooLong);
        }
        let end = rest.find('/').unwrap_or(rest.len());
        check_trust_domain(&rest[..end])?;
        if end < rest.len() {
            check_path(&rest[end + 1..])?;
        }
        Ok(Self { text: text.into(), path_at: SCHEME.len() + end })
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

fn check_trust_domain(name: &str) -> Result<(), InvalidId> {
    if name.is_empty() || name.len() > MAX_TRUST_DOMAIN {
        return Err(InvalidId::TrustDomainLength);
    }
    let is_allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '-' | '_');
    name.chars().find(|c| !is_allowed(*c)).map_or(Ok(()), |c| Err(InvalidId::TrustDomainByte(c)))
}

fn check_path_bytes(path: &str) -> Result<(), InvalidId> {
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '/');
    path.chars().find(|c| !is_allowed(*c)).map_or(Ok(()), |c| Err(InvalidId::PathByte(c)))
}

/// A path without its leading `/`.
fn check_path(path: &str) -> Result<(), InvalidId> {
    check_path_bytes(path)?;
    let broken = path.split('/').any(|segment| matches!(segment, "" | "." | ".."));
    if broken { Err(InvalidId::PathSegment) } else { Ok(()) }
}

/// Matches peers: a SPIFFE ID, a prefix of one and `*`, or a DNS name written `dns:NAME`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IdentityPattern {
    Exactly(SpiffeId),
    /// Includes the whole trust domain and `/`, so `spiffe://shop.example/*` matches no other trust domain.
    Prefix(Box<str>),
    /// A DNS SAN, for certificates without a SPIFFE ID. Lower case.
    Dns(Box<str>),
}

impl IdentityPattern {
    pub fn matches(&self, id: &SpiffeId) -> bool {
        match self {
            Self::Exactly(named) => named == id,
            Self::Prefix(prefix) => id.as_str().starts_with(&**prefix),
            Self::Dns(_) => false,
        }
    }

    /// Whether it matches a peer that has this DNS name and no SPIFFE ID.
    pub fn matches_dns(&self, name: &str) -> bool {
        matches!(self, Self::Dns(named) if named.eq_ignore_ascii_case(name))
    }
}

impl FromStr for IdentityPattern {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        if let Some(name) = text.strip_prefix("dns:") {
            return if is_dns_name(name) {
                Ok(Self::Dns(name.to_ascii_lowercase().into()))
            } else {
                Err(InvalidId::Dns)
            };
        }
        let Some(prefix) = text.strip_suffix('*') else {
            return match text.contains('*') {
                true => Err(InvalidId::Wildcard),
                false => text.parse().map(Self::Exactly),
            };
        };
        let rest = prefix.strip_prefix(SCHEME).ok_or(InvalidId::Scheme)?;
        if text.len() > MAX_ID {
            return Err(InvalidId::TooLong);
        }
        let (trust_domain, path) = rest.split_once('/').ok_or(InvalidId::Wildcard)?;
        check_trust_domain(trust_domain)?;
        if path.contains('*') {
            return Err(InvalidId::Wildcard);
        }
        check_path_bytes(path)?;
        let segments = path.rsplit_once('/').map_or("", |(whole, _)| whole);
        if path.starts_with('/') || (!segments.is_empty() && check_path(segments).is_err()) {
            return Err(InvalidId::PathSegment);
        }
        Ok(Self::Prefix(prefix.into()))
    }
}

impl fmt::Display for IdentityPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exactly(id) => f.write_str(id.as_str()),
            Self::Prefix(prefix) => write!(f, "{prefix}*"),
            Self::Dns(name) => write!(f, "dns:{name}"),
        }
    }
}

/// Letters, digits, `-` and `_` in labels of 1 to 63 bytes.
fn is_dns_name(name: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
    };
    name.len() <= MAX_DNS && name.split('.').all(label)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(text: &str) -> Result<SpiffeId, InvalidId> {
        text.parse()
    }

    #[test]
    fn an_id_is_parsed_into_its_parts() {
        let payments = id("spiffe://shop.example/ns/shop/sa/payments").unwrap();
        assert_eq!((payments.trust_domain(), payments.path()), ("shop.example", "/ns/shop/sa/payments"));
        let own = id("spiffe://shop.example").unwrap();
        assert_eq!((own.trust_domain(), own.path()), ("shop.example", ""));
    }

    #[test]
    fn ids_that_have_another_spelling_are_rejected() {
        let long = format!("spiffe://a/{}", "x".repeat(MAX_ID));
        let wide = format!("spiffe://{}/x", "a".repeat(MAX_TRUST_DOMAIN + 1));
        for (text, expected) in [
            ("https://shop.example/a", InvalidId::Scheme),
            ("SPIFFE://shop.example/a", InvalidId::Scheme),
            ("spiffe:///a", InvalidId::TrustDomainLength),
            (&wide, InvalidId::TrustDomainLength),
            (&long, InvalidId::TooLong),
            ("spiffe://Shop.example/a", InvalidId::TrustDomainByte('S')),
            ("spiffe://shop.example:80/a", InvalidId::TrustDomainByte(':')),
            ("spiffe://user@shop.example/a", InvalidId::TrustDomainByte('@')),
            ("spiffe://shop.example/", InvalidId::PathSegment),
            ("spiffe://shop.example/a/", InvalidId::PathSegment),
            ("spiffe://shop.example/a//b", InvalidId::PathSegment),
            ("spiffe://shop.example/a/../b", InvalidId::PathSegment),
            ("spiffe://shop.example/./b", InvalidId::PathSegment),
            ("spiffe://shop.example/a%2fb", InvalidId::PathByte('%')),
            ("spiffe://shop.example/a?b", InvalidId::PathByte('?')),
            ("spiffe://shop.example/a#b", InvalidId::PathByte('#')),
            ("spiffe://shop.example/ü", InvalidId::PathByte('ü')),
        ] {
            assert_eq!(id(text), Err(expected), "{text}");
        }
    }

    #[test]
    fn a_pattern_matches_no_other_trust_domain() {
        let matches = |pattern: &str, text: &str| {
            let id = id(text).unwrap();
            pattern.parse::<IdentityPattern>().unwrap().matches(&id)
        };
        assert!(matches("spiffe://shop.example/ns/shop/sa/*", "spiffe://shop.example/ns/shop/sa/a/b"));
        assert!(matches("spiffe://shop.example/*", "spiffe://shop.example/x"));
        assert!(matches("spiffe://shop.example/sa/pay*", "spiffe://shop.example/sa/payments"));
        assert!(!matches("spiffe://shop.example/*", "spiffe://shop.example.evil/x"));
        assert!(!matches("spiffe://shop.example/sa/a", "spiffe://shop.example/sa/ab"));
        assert!(!matches("dns:shop.example", "spiffe://shop.example/x"));
        for broken in [
            "spiffe://shop.example*",
            "spiffe://*",
            "*",
            "spiffe://shop.example/*/a",
            "spiffe://shop.example/a*b*",
            "spiffe://shop.example//a*",
            "spiffe://shop.example/../a*",
            "dns:",
            "dns:a..b",
            "dns:*.example",
            "shop.example",
        ] {
            assert!(broken.parse::<IdentityPattern>().is_err(), "{broken}");
        }
    }

    #[test]
    fn a_dns_pattern_matches_only_that_name() {
        let pattern: IdentityPattern = "dns:Orders.Example".parse().unwrap();
        assert!(pattern.matches_dns("orders.example"));
        assert!(!pattern.matches_dns("a.orders.example"));
        assert_eq!(pattern.to_string(), "dns:orders.example");
    }

    proptest! {
        #[test]
        fn parsing_never_panics_and_round_trips(text in "(spiffe://)?[a-zA-Z0-9./*_%-]{0,40}") {
            if let Ok(id) = text.parse::<SpiffeId>() {
                prop_assert_eq!(id.as_str(), &text);
                prop_assert_eq!(format!("spiffe://{}{}", id.trust_domain(), id.path()), &text[..]);
                prop_assert!(text.parse::<IdentityPattern>().unwrap().matches(&id));
            }
            if let Ok(pattern) = text.parse::<IdentityPattern>() {
                prop_assert_eq!(pattern.to_string(), text);
            }
        }
    }
}
