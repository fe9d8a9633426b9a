//! Certificates, valid and invalid.

use std::{
    fs,
    path::PathBuf,
    sync::atomic::{AtomicU64, Ordering},
    time::SystemTime,
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType,
    SerialNumber,
};
use tempfile::TempDir;

/// A CA in its own directory, and the certificates that it issues.
pub struct Pki {
    directory: TempDir,
    ca: CertifiedIssuer<'static, KeyPair>,
}

/// The parameters of a certificate, for a test to change.
pub type Params = CertificateParams;

pub fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().expect("a URI"))
}

pub fn dns(name: &str) -> SanType {
    SanType::DnsName(name.try_into().expect("a name"))
}

pub fn id(name: &str) -> String {
    format!("spiffe://shop.example/ns/shop/sa/{name}")
}

impl Pki {
    pub fn new() -> Self {
        Self { directory: tempfile::tempdir().expect("a directory"), ca: ca("test CA") }
    }

    /// Replaces the CA; its files are beside those of the first one.
    pub fn renew_ca(&mut self, name: &str) {
        self.ca = ca(name);
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn ca_pem(&self) -> String {
        self.ca.pem()
    }

    /// Writes atomically, as a Secret's files change.
    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let next = self.path(&format!(".{name}.next"));
        fs::write(&next, text).expect("write");
        fs::rename(next, self.path(name)).expect("rename");
        self.path(name)
    }

    pub fn write_ca(&self) -> PathBuf {
        self.write("ca.crt", &self.ca_pem())
    }

    /// A certificate and its key, PEM.
    pub fn issue(&self, name: &str, change: impl FnOnce(&mut Params)) -> (String, String) {
        static SERIAL: AtomicU64 = AtomicU64::new(1);
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.serial_number = Some(SerialNumber::from(SERIAL.fetch_add(1, Ordering::Relaxed)));
        params.subject_alt_names = vec![uri(&id(name)), dns(name), dns("localhost")];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        change(&mut params);
        let key = KeyPair::generate().expect("a key");
        (params.signed_by(&key, &self.ca).expect("a certificate").pem(), key.serialize_pem())
    }

    /// A chain and its key, PEM, with an intermediate that expires at this moment.
    pub fn issue_below(&self, name: &str, expires: SystemTime) -> (String, String) {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "intermediate");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.not_after = expires.into();
        let key = KeyPair::generate().expect("a key");
        let intermediate = CertifiedIssuer::signed_by(params, key, &self.ca).expect("an intermediate");
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![uri(&id(name))];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate().expect("a key");
        let leaf = params.signed_by(&key, &intermediate).expect("a certificate").pem();
        (format!("{leaf}{}", intermediate.pem()), key.serialize_pem())
    }

    /// Writes NAME.crt and NAME.key.
    pub fn write_leaf(&self, name: &str, change: impl FnOnce(&mut Params)) {
        let (certificate, key) = self.issue(name, change);
        // The key first: with the old certificate it is rejected, and with the new one accepted.
        self.write(&format!("{name}.key"), &key);
        self.write(&format!("{name}.crt"), &certificate);
    }

    /// The `[identity]` section of a sidecar, with its files written.
    pub fn identity(&self, name: &str) -> String {
        self.write_ca();
        self.write_leaf(name, |_| {});
        self.section(name)
    }

    pub fn section(&self, name: &str) -> String {
        let (cert, key) = (self.path(&format!("{name}.crt")), self.path(&format!("{name}.key")));
        let ca = self.path("ca.crt");
        format!("[identity]\ncert = {cert:?}\nkey = {key:?}\nca = {ca:?}\n")
    }

    /// Writes crl.pem, which revokes these serial numbers.
    pub fn revoke(&self, serials: &[u64]) -> PathBuf {
        let day = |day| rcgen::date_time_ymd(2026, 1, day);
        let params = CertificateRevocationListParams {
            this_update: day(1),
            next_update: rcgen::date_time_ymd(2099, 1, 1),
            crl_number: SerialNumber::from(1_u64),
            issuing_distribution_point: None,
            revoked_certs: serials
                .iter()
                .map(|serial| RevokedCertParams {
                    serial_number: SerialNumber::from(*serial),
                    revocation_time: day(2),
                    reason_code: None,
                    invalidity_date: None,
                })
                .collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        self.write("crl.pem", &params.signed_by(&self.ca).expect("a list").pem().expect("PEM"))
    }
}

fn ca(name: &str) -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("a CA")
}
