//! The identity of a peer: the names in its certificate.
//!
//! Parsing a certificate here verifies nothing; make a [`Peer`] only of one whose chain is verified.

use std::{
    fmt::{self, Write as _},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustls_pki_types::CertificateDer;
use x509_parser::{
    certificate::X509Certificate,
    extensions::GeneralName,
    oid_registry::{self, Oid, OidRegistry},
    prelude::FromDer,
    x509::X509Name,
};

use super::{InvalidId, SpiffeId};

/// Most SAN entries; a certificate with more is rejected.
const MAX_NAMES: usize = 1024;

/// The verified peer of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its SPIFFE ID. If present, this alone is its identity.
    pub spiffe: Option<SpiffeId>,
    /// DNS names of its certificate. They identify the peer only if there is no SPIFFE ID.
    pub dns: Vec<Box<str>>,
    /// The subject in RFC 2253 form; often empty.
    pub subject: Box<str>,
    /// SHA-256 of the leaf certificate (DER).
    pub sha256: [u8; 32],
    /// When its certificate expires.
    pub not_after: SystemTime,
}

/// Why a certificate cannot identify a peer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    #[error("it cannot be read ({0})")]
    Unreadable(String),
    #[error("it is a CA certificate (CA:TRUE), which cannot identify a workload")]
    Ca,
    #[error(
        "its key may sign certificates or revocation lists (key usage), so it cannot identify a workload"
    )]
    SigningKey,
    #[error("its key usage does not allow digital signatures")]
    NoSignature,
    #[error("it has {0} URI names; with a SPIFFE ID there must be exactly one")]
    TooManyUris(usize),
    #[error("its URI name `{id}` is not a SPIFFE ID: {reason}")]
    NotAnId { id: Box<str>, reason: InvalidId },
    #[error("its SPIFFE ID `{0}` names a trust domain, not a workload")]
    NoPath(SpiffeId),
    #[error("it has more than {MAX_NAMES} names")]
    TooManyNames,
}

impl Peer {
    /// A peer with these names and no certificate, to evaluate policies for it.
    pub fn with_names(spiffe: Option<SpiffeId>, dns: &[&str]) -> Self {
        let dns = dns.iter().map(|name| (*name).into()).collect();
        Self { spiffe, dns, subject: "".into(), sha256: [0; 32], not_after: UNIX_EPOCH }
    }

    /// Parses a leaf certificate, by the rules of X.509-SVID (§4, §5.2) if it contains a SPIFFE ID.
    ///
    /// # Errors
    ///
    /// If it cannot identify a workload: a CA certificate, or a SPIFFE ID that is malformed or not the only URI.
    pub fn from_leaf(leaf: &CertificateDer<'_>) -> Result<Self, PeerError> {
        let unreadable = |error: &dyn fmt::Display| PeerError::Unreadable(error.to_string());
        let (rest, certificate) = X509Certificate::from_der(leaf).map_err(|error| unreadable(&error))?;
        if !rest.is_empty() {
            return Err(unreadable(&"bytes follow it"));
        }
        let constraints = certificate.basic_constraints().map_err(|error| unreadable(&error))?;
        if constraints.is_some_and(|constraints| constraints.value.ca) {
            return Err(PeerError::Ca);
        }
        let mut dns = Vec::new();
        let mut uris = Vec::new();
        if let Some(names) = certificate.subject_alternative_name().map_err(|error| unreadable(&error))? {
            if names.value.general_names.len() > MAX_NAMES {
                return Err(PeerError::TooManyNames);
            }
            for name in &names.value.general_names {
                match name {
                    GeneralName::DNSName(name) => dns.push((*name).into()),
                    GeneralName::URI(uri) => uris.push(*uri),
                    GeneralName::Invalid(tag, _) => {
                        return Err(unreadable(&format_args!("a name of kind {} is malformed", tag.0)));
                    }
                    _ => {}
                }
            }
        }
        let spiffe = spiffe_id(&uris)?;
        if spiffe.is_some()
            && let Some(usage) = certificate.key_usage().map_err(|error| unreadable(&error))?
        {
            if usage.value.key_cert_sign() || usage.value.crl_sign() {
                return Err(PeerError::SigningKey);
            }
            if !usage.value.digital_signature() {
                return Err(PeerError::NoSignature);
            }
        }
        Ok(Self {
            spiffe,
            dns,
            subject: rfc2253(certificate.subject()).into(),
            sha256: sha256(leaf),
            not_after: from_unix_seconds(certificate.validity().not_after.timestamp()),
        })
    }
}

/// The name in logs: SPIFFE ID, else DNS name, else subject.
impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.spiffe, self.dns.first()) {
            (Some(id), _) => write!(f, "{id}"),
            (None, Some(name)) => write!(f, "dns:{name}"),
            (None, None) => write!(f, "subject {:?}", &*self.subject),
        }
    }
}

/// A URI with the SPIFFE scheme makes the certificate an SVID, and must then be its only URI.
fn spiffe_id(uris: &[&str]) -> Result<Option<SpiffeId>, PeerError> {
    let is_spiffe = |uri: &&&str| uri.get(..7).is_some_and(|scheme| scheme.eq_ignore_ascii_case("spiffe:"));
    let Some(uri) = uris.iter().find(is_spiffe) else { return Ok(None) };
    if uris.len() > 1 {
        return Err(PeerError::TooManyUris(uris.len()));
    }
    let id: SpiffeId = uri.parse().map_err(|reason| PeerError::NotAnId { id: (*uri).into(), reason })?;
    if id.path().is_empty() { Err(PeerError::NoPath(id)) } else { Ok(Some(id)) }
}

/// SHA-256 of a certificate.
pub fn sha256(der: &[u8]) -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes.copy_from_slice(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, der).as_ref());
    bytes
}

/// When a certificate expires; `None` if it cannot be parsed.
pub fn not_after(certificate: &[u8]) -> Option<SystemTime> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    Some(from_unix_seconds(parsed.validity().not_after.timestamp()))
}

/// Converts seconds since 1970.
pub fn from_unix_seconds(seconds: i64) -> SystemTime {
    match u64::try_from(seconds) {
        Ok(after) => UNIX_EPOCH + Duration::from_secs(after),
        Err(_) => UNIX_EPOCH - Duration::from_secs(seconds.unsigned_abs()),
    }
}

/// A name in RFC 2253 form: the last part first, separated by `,`, special characters escaped.
pub fn rfc2253(name: &X509Name<'_>) -> String {
    let registry = oid_registry::OidRegistry::default().with_all_crypto().with_x509();
    let mut text = String::new();
    let parts: Vec<_> = name.iter_rdn().collect();
    for (at, part) in parts.into_iter().rev().enumerate() {
        if at > 0 {
            text.push(',');
        }
        for (at, attribute) in part.iter().enumerate() {
            if at > 0 {
                text.push('+');
            }
            text.push_str(&attribute_name(attribute.attr_type(), &registry));
            text.push('=');
            match attribute.as_str() {
                Ok(value) => escape(value, &mut text),
                Err(_) => {
                    text.push('#');
                    for byte in attribute.as_slice() {
                        let _ = write!(text, "{byte:02x}");
                    }
                }
            }
        }
    }
    text
}

fn attribute_name(oid: &Oid<'_>, registry: &OidRegistry<'_>) -> String {
    x509_parser::objects::oid2abbrev(oid, registry).map_or_else(|_| oid.to_id_string(), str::to_owned)
}

fn escape(value: &str, text: &mut String) {
    let last = value.chars().count().saturating_sub(1);
    for (at, c) in value.chars().enumerate() {
        let edge = (at == 0 && matches!(c, ' ' | '#')) || (at == last && c == ' ');
        if c.is_control() {
            let mut bytes = [0; 4];
            for byte in c.encode_utf8(&mut bytes).bytes() {
                let _ = write!(text, "\\{byte:02X}");
            }
            continue;
        }
        if edge || matches!(c, ',' | '+' | '"' | '\\' | '<' | '>' | ';') {
            text.push('\\');
        }
        text.push(c);
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, KeyUsagePurpose, SanType};

    use super::*;

    fn certificate(change: impl FnOnce(&mut CertificateParams)) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().der().clone()
    }

    fn uri(text: &str) -> SanType {
        SanType::URI(text.try_into().unwrap())
    }

    const ID: &str = "spiffe://shop.example/ns/shop/sa/payments";

    #[test]
    fn a_workload_certificate_identifies_the_peer() {
        let leaf = certificate(|params| {
            params.subject_alt_names = vec![uri(ID), SanType::DnsName("payments".try_into().unwrap())];
            params.distinguished_name.push(DnType::OrganizationName, "Shop, Inc.");
            params.distinguished_name.push(DnType::CommonName, "payments");
            params.not_after = rcgen::date_time_ymd(2031, 1, 2);
        });
        let peer = Peer::from_leaf(&leaf).unwrap();
        assert_eq!(peer.spiffe.as_ref().map(SpiffeId::as_str), Some(ID));
        assert_eq!(peer.dns, ["payments".into()]);
        assert_eq!(&*peer.subject, "CN=payments,O=Shop\\, Inc.");
        assert_eq!(peer.not_after, UNIX_EPOCH + Duration::from_secs(1_925_078_400));
        assert_eq!(peer.to_string(), ID);
    }

    #[test]
    fn certificates_that_cannot_identify_a_workload_are_rejected() {
        let with = |change: &dyn Fn(&mut CertificateParams)| {
            Peer::from_leaf(&certificate(|params| {
                params.subject_alt_names = vec![uri(ID)];
                change(params);
            }))
            .unwrap_err()
        };
        let two = with(&|params| params.subject_alt_names.push(uri("https://elsewhere.example")));
        assert_eq!(two, PeerError::TooManyUris(2));
        let ca = with(&|params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
        assert_eq!(ca, PeerError::Ca);
        let signs = with(&|params| params.key_usages = vec![KeyUsagePurpose::KeyCertSign]);
        assert_eq!(signs, PeerError::SigningKey);
        let agrees = with(&|params| params.key_usages = vec![KeyUsagePurpose::KeyAgreement]);
        assert_eq!(agrees, PeerError::NoSignature);
        let domain = with(&|params| params.subject_alt_names = vec![uri("spiffe://shop.example")]);
        assert!(matches!(domain, PeerError::NoPath(_)));
        let shouted = with(&|params| params.subject_alt_names = vec![uri("SPIFFE://shop.example/a")]);
        assert!(matches!(shouted, PeerError::NotAnId { .. }));
    }

    #[test]
    fn without_a_spiffe_id_the_dns_names_count() {
        let leaf = certificate(|params| {
            params.subject_alt_names =
                vec![SanType::DnsName("orders.example".try_into().unwrap()), uri("https://a.example")];
        });
        let peer = Peer::from_leaf(&leaf).unwrap();
        assert_eq!((peer.spiffe.as_ref(), peer.to_string()), (None, "dns:orders.example".to_owned()));
    }

    #[test]
    fn malformed_certificates_are_reported() {
        let mut bytes = certificate(|_| {}).to_vec();
        bytes.push(0);
        for bytes in [&b"nonsense"[..], &bytes] {
            let error = Peer::from_leaf(&CertificateDer::from(bytes)).unwrap_err();
            assert!(matches!(error, PeerError::Unreadable(_)), "{error}");
        }
    }
}
