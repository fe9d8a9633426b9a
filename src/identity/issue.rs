//! A throw-away CA for development, the demo and tests. Not for production.

use std::{
    io::{self, Write},
    path::Path,
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, KeyPair, KeyUsagePurpose, SanType,
};

use super::{InvalidId, SpiffeId, TrustDomain};

/// The lifetime of certificates.
const VALIDITY: Duration = Duration::from_secs(365 * 86_400);
/// Certificates are backdated, because clocks differ.
const BACKDATE: Duration = Duration::from_secs(3600);

/// A CA in memory.
pub struct Ca {
    issuer: CertifiedIssuer<'static, KeyPair>,
    trust_domain: TrustDomain,
}

/// A certificate and its key, PEM.
pub struct IssuedCertificate {
    pub certificate: String,
    pub key: String,
}

#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    #[error("`{name}` is not a valid workload name: {reason}")]
    Name { name: String, reason: InvalidId },
    #[error("cannot issue a certificate: {0}")]
    Issue(#[from] rcgen::Error),
}

impl Ca {
    /// # Errors
    ///
    /// If key generation fails.
    pub fn new(trust_domain: TrustDomain) -> Result<Self, IssueError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, format!("{trust_domain} development CA"));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.subject_alt_names = vec![SanType::URI(format!("spiffe://{trust_domain}").try_into()?)];
        set_validity(&mut params);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        Ok(Self { issuer, trust_domain })
    }

    pub fn certificate(&self) -> String {
        self.issuer.pem()
    }

    /// A certificate for `spiffe://TRUST-DOMAIN/ns/default/sa/NAME`, which is also NAME and localhost in DNS.
    ///
    /// # Errors
    ///
    /// If the name is not valid in a SPIFFE ID and in DNS.
    pub fn issue(&self, name: &str) -> Result<IssuedCertificate, IssueError> {
        let id = format!("spiffe://{}/ns/default/sa/{name}", self.trust_domain);
        let invalid_name = |reason| IssueError::Name { name: name.to_owned(), reason };
        if name.contains('/') {
            return Err(invalid_name(InvalidId::PathByte('/')));
        }
        let id: SpiffeId = id.parse().map_err(invalid_name)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.subject_alt_names = vec![
            SanType::URI(id.as_str().try_into()?),
            SanType::DnsName(name.try_into()?),
            SanType::DnsName("localhost".try_into()?),
        ];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        set_validity(&mut params);
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(IssuedCertificate { certificate: certificate.pem(), key: key.serialize_pem() })
    }
}

fn set_validity(params: &mut CertificateParams) {
    let now = SystemTime::now();
    params.not_before = (now - BACKDATE).into();
    params.not_after = (now + VALIDITY).into();
}

/// Writes a key, readable by this user only.
///
/// # Errors
///
/// If it cannot be written.
pub fn write_key(path: &Path, key: &str) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = std::fs::OpenOptions::new();
    // An existing file may be readable by others, so it is replaced.
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    options.write(true).create_new(true).mode(0o600).open(path)?.write_all(key.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::material::{
        CertificateUses, EncodedContent, EncodedFile, EncodedIdentity, Material,
    };

    const USES: CertificateUses = CertificateUses { server: true, client: true };

    fn text(name: &str, content: &str) -> EncodedFile {
        EncodedFile { path: name.into(), content: EncodedContent::Pem(content.as_bytes().to_vec()) }
    }

    #[test]
    fn issued_certificates_are_valid_for_the_proxy() {
        let ca = Ca::new("shop.example".parse().unwrap()).unwrap();
        let issued = ca.issue("payments").unwrap();
        let pem = EncodedIdentity {
            cert: text("crt", &issued.certificate),
            key: text("key", &issued.key),
            ca: vec![(Some("shop.example".parse().unwrap()), text("ca", &ca.certificate()))],
            crl: Vec::new(),
        };
        let material = Material::check(&pem, USES, SystemTime::now()).unwrap();
        assert_eq!(material.identity.to_string(), "spiffe://shop.example/ns/default/sa/payments");
        assert_eq!(material.identity.dns, ["payments".into(), "localhost".into()]);
        let late = SystemTime::now() + VALIDITY;
        assert!(Material::check(&pem, USES, late).unwrap_err().to_string().contains("expired"), "roots too");
    }

    #[test]
    fn invalid_workload_names_are_rejected() {
        let ca = Ca::new("shop.example".parse().unwrap()).unwrap();
        for name in ["", "a/b", "a b", "..", "ü"] {
            assert!(ca.issue(name).is_err(), "{name:?}");
        }
    }
}
