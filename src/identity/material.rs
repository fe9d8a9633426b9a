//! The material of an identity: certificate chain, key, trusted roots. Checked as a whole before it is used.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::sign::CertifiedKey;
use rustls_pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, UnixTime,
    pem::{self, PemObject},
};
use webpki::{CertRevocationList, OwnedCertRevocationList};
use x509_parser::{
    certificate::X509Certificate, prelude::FromDer, revocation_list::CertificateRevocationList,
};

use crate::{
    authorization::peer,
    config::{Config, Mtls, TlsMode},
};

use super::{
    Peer, PeerError, TrustDomain,
    time::Date,
    trust::{Bundle, Role, Trust, VerifyError, provider},
};

/// Most certificates in a chain file.
const MAX_CHAIN: usize = 16;
/// Most roots in one bundle.
const MAX_ROOTS: usize = 1024;

/// The parts of an identity as they were read. Compared to detect changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedIdentity {
    pub cert: EncodedFile,
    pub key: EncodedFile,
    pub ca: Vec<(Option<TrustDomain>, EncodedFile)>,
    pub crl: Vec<EncodedFile>,
}

/// Encoded certificates, keys or revocation lists, and their source.
#[derive(Clone, PartialEq, Eq)]
pub struct EncodedFile {
    /// A file, or a description if the Workload API delivered it.
    pub path: PathBuf,
    pub content: EncodedContent,
}

#[derive(Clone, PartialEq, Eq)]
pub enum EncodedContent {
    /// From a file.
    Pem(Vec<u8>),
    /// From the Workload API: certificates, keys or lists, DER.
    Der(Vec<Vec<u8>>),
}

/// Never prints keys.
impl fmt::Debug for EncodedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())
    }
}

/// What a certificate is used for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CertificateUses {
    /// Inbound connections may use TLS: `inbound.mtls` is not `off`, in general or for a port.
    pub server: bool,
    /// It is presented to upstreams with `tls = "mutual"`.
    pub client: bool,
}

impl CertificateUses {
    pub fn from_config(config: &Config) -> Self {
        let inbound = &config.inbound;
        let ports = inbound.ports.iter().filter_map(|port| port.mtls);
        Self {
            server: ports.chain([inbound.mtls]).any(|mtls| mtls != Mtls::Off),
            client: config.upstreams.iter().any(|upstream| upstream.tls.mode == TlsMode::Mutual),
        }
    }

    const fn include(self, role: Role) -> bool {
        match role {
            Role::Server => self.server,
            Role::Client => self.client,
        }
    }
}

/// A verified identity.
#[derive(Debug)]
pub struct Material {
    /// The identity of this service.
    pub identity: Peer,
    pub key: Arc<CertifiedKey>,
    pub trust: Arc<Trust>,
    /// When each certificate and revocation list expires.
    pub expiries: Vec<Expiry>,
    /// The role that its extended key usage excludes. The configuration does not [need](CertificateUses) it.
    pub unusable: Option<Role>,
}

impl Material {
    /// What will not work if its certificate is valid for one role only.
    pub fn limitation(&self) -> Option<&'static str> {
        self.unusable.map(|role| match role {
            Role::Server => {
                "the certificate may not be used by a server (extended key usage): inbound TLS will not work with it"
            }
            Role::Client => {
                "the certificate may not be used by a client (extended key usage): `tls = \"mutual\"` will not work with it"
            }
        })
    }
}

/// When a certificate or revocation list expires.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expiry {
    pub kind: ExpiryKind,
    /// Its subject, for people.
    pub subject: String,
    /// Start of validity.
    pub not_before: SystemTime,
    pub not_after: SystemTime,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ExpiryKind {
    Leaf,
    Intermediate,
    Root,
    Crl,
}

impl Expiry {
    /// How urgent renewal is. 0: not. 1 to 3: less than a quarter, a tenth, a twentieth of the lifetime is left (and
    /// less than 30, 7, 1 days). 4: expired. A workload's certificate is usually renewed before step 1.
    pub fn urgency(&self, now: SystemTime) -> u8 {
        const DAY: Duration = Duration::from_secs(86_400);
        let Ok(left) = self.not_after.duration_since(now) else { return 4 };
        let life = self.not_after.duration_since(self.not_before).unwrap_or_default();
        let steps = [(life / 4).min(DAY * 30), (life / 10).min(DAY * 7), (life / 20).min(DAY)];
        steps.into_iter().map(|step| u8::from(left < step)).sum()
    }
}

impl ExpiryKind {
    pub const ALL: [Self; 4] = [Self::Leaf, Self::Intermediate, Self::Root, Self::Crl];

    /// The word in metrics and `/status`.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Leaf => "leaf",
            Self::Intermediate => "intermediate",
            Self::Root => "root",
            Self::Crl => "crl",
        }
    }
}

/// Why an identity is rejected. Names the file and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum MaterialError {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{} is larger than {limit} bytes: is it the right file?", path.display())]
    TooLarge { path: PathBuf, limit: u64 },
    #[error("{} is not a PEM file ({reason}): it must contain text between `-----BEGIN …-----` and `-----END …-----`", path.display())]
    Pem { path: PathBuf, reason: String },
    #[error("{} contains no certificate", .0.display())]
    NoCertificate(PathBuf),
    #[error("{} contains more than {limit} certificates", path.display())]
    TooManyCertificates { path: PathBuf, limit: usize },
    #[error("{} contains no usable private key: it must be PKCS #8, PKCS #1 or SEC 1 in PEM, not encrypted ({reason})", path.display())]
    Key { path: PathBuf, reason: String },
    #[error("the key in {} does not match the first certificate in {}: both must be issued together", key.display(), cert.display())]
    Mismatch { cert: PathBuf, key: PathBuf },
    #[error("the certificate in {} cannot be used as this service's identity: {reason}", path.display())]
    Leaf { path: PathBuf, reason: PeerError },
    #[error("the certificate in {} expired on {}: renew it", path.display(), Date(*.at))]
    Expired { path: PathBuf, at: SystemTime },
    #[error("the certificate in {} is not valid before {}: is this machine's clock right?", path.display(), Date(*.at))]
    NotYetValid { path: PathBuf, at: SystemTime },
    #[error("the certificate in {} leads to none of the roots in {trust}, so peers with the same roots would reject it: append its intermediates to the file, or add its root to `ca`", path.display())]
    NoRoot { path: PathBuf, trust: String },
    #[error("the certificate in {} is not valid for this service: {reason}", path.display())]
    Chain { path: PathBuf, reason: VerifyError },
    #[error("the certificate in {} may not be used by a {} (extended key usage), and {}", path.display(), role.word(), match role { Role::Server => "`inbound.mtls` is not \"off\": get one with serverAuth, or switch that off", Role::Client => "an upstream has `tls = \"mutual\"`: get one with clientAuth, or write \"simple\"" })]
    Purpose { path: PathBuf, role: Role },
    #[error("a certificate in {} is not a usable CA certificate: {reason}", path.display())]
    Root { path: PathBuf, reason: String },
    #[error("every root in {} has expired: renew them", .0.display())]
    RootsExpired(PathBuf),
    #[error("{} contains no usable revocation list ({reason})", path.display())]
    Crl { path: PathBuf, reason: String },
    #[error("`{0}` in `ca` is not a trust domain: {1}")]
    TrustDomain(String, super::InvalidId),
}

impl MaterialError {
    /// Whether a file does not exist, as before a volume is filled.
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Read { source, .. } if source.kind() == std::io::ErrorKind::NotFound)
    }
}

impl Material {
    /// Parses and checks: the key matches, the chain leads to a root, is valid at `now` and for its uses.
    ///
    /// # Errors
    ///
    /// Names the file that is wrong, and what to do.
    pub fn check(
        pem: &EncodedIdentity,
        uses: CertificateUses,
        now: SystemTime,
    ) -> Result<Self, MaterialError> {
        let trust = Arc::new(build_trust(&pem.ca, &pem.crl, now)?);
        let path = || pem.cert.path.clone();
        let chain = certificates(&pem.cert, MAX_CHAIN)?;
        let (leaf, intermediates) =
            chain.split_first().ok_or_else(|| MaterialError::NoCertificate(path()))?;
        let own = Peer::from_leaf(leaf).map_err(|reason| MaterialError::Leaf { path: path(), reason })?;
        let unix = UnixTime::since_unix_epoch(now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default());
        let mut unusable = None;
        for role in [Role::Server, Role::Client] {
            match trust.verify(leaf, intermediates, unix, role).map(drop) {
                Ok(()) => Ok(()),
                Err(VerifyError::Purpose(_)) if uses.include(role) => {
                    Err(MaterialError::Purpose { path: path(), role })
                }
                // It must be valid for at least one role.
                Err(VerifyError::Purpose(_)) if unusable.is_none() => {
                    unusable = Some(role);
                    Ok(())
                }
                Err(VerifyError::Expired(at)) => Err(MaterialError::Expired { path: path(), at }),
                Err(VerifyError::NotYetValid(at)) => Err(MaterialError::NotYetValid { path: path(), at }),
                Err(VerifyError::UnknownIssuer(trust)) => Err(MaterialError::NoRoot { path: path(), trust }),
                Err(reason) => Err(MaterialError::Chain { path: path(), reason }),
            }?;
        }
        let mut expiries: Vec<_> = expiry(leaf, ExpiryKind::Leaf)
            .map(|of| Expiry { subject: own.to_string(), ..of })
            .into_iter()
            .collect();
        for certificate in intermediates {
            expiries.extend(expiry(certificate, ExpiryKind::Intermediate));
        }
        expiries.extend(trust_expiries(&pem.ca, &pem.crl));
        let key = private_key(&pem.key)?;
        let key = CertifiedKey::new(chain, key);
        match key.keys_match() {
            Ok(()) | Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::Unknown)) => {}
            Err(_) => {
                return Err(MaterialError::Mismatch { cert: path(), key: pem.key.path.clone() });
            }
        }
        Ok(Self { identity: own, key: Arc::new(key), trust, expiries, unusable })
    }
}

/// Parses roots and revocation lists.
///
/// # Errors
///
/// If a file contains none, or an unusable one; if all roots of a file have expired.
pub fn build_trust(
    ca: &[(Option<TrustDomain>, EncodedFile)],
    crl: &[EncodedFile],
    now: SystemTime,
) -> Result<Trust, MaterialError> {
    let bundles =
        ca.iter().map(|(domain, text)| bundle(domain.clone(), text, now)).collect::<Result<_, _>>()?;
    let lists = crl.iter().map(revocations).collect::<Result<Vec<_>, _>>()?;
    Ok(Trust::new(bundles, lists.into_iter().flatten().collect()))
}

fn bundle(
    trust_domain: Option<TrustDomain>,
    text: &EncodedFile,
    now: SystemTime,
) -> Result<Bundle, MaterialError> {
    let certificates = certificates(text, MAX_ROOTS)?;
    let error_for = |reason: String| MaterialError::Root { path: text.path.clone(), reason };
    let mut anchors = Vec::new();
    let mut any_valid = false;
    for certificate in &certificates {
        let (_, parsed) =
            X509Certificate::from_der(certificate).map_err(|error| error_for(error.to_string()))?;
        // Version 1 has no extensions. Version 3 must have CA:TRUE.
        if parsed.version().0 == 2 && !parsed.is_ca() {
            return Err(error_for(format!(
                "{} is a leaf (CA:FALSE); use the certificate of its issuer",
                peer::rfc2253(parsed.subject())
            )));
        }
        any_valid |= peer::from_unix_seconds(parsed.validity().not_after.timestamp()) > now;
        let anchor =
            webpki::anchor_from_trusted_cert(certificate).map_err(|error| error_for(format!("{error:?}")))?;
        anchors.push(anchor.to_owned());
    }
    if !any_valid {
        return Err(MaterialError::RootsExpired(text.path.clone()));
    }
    Ok(Bundle { trust_domain, source: text.path.display().to_string().into(), anchors })
}

fn revocations(text: &EncodedFile) -> Result<Vec<CertRevocationList<'static>>, MaterialError> {
    let error_for = |reason: String| MaterialError::Crl { path: text.path.clone(), reason };
    let lists = lists(text).map_err(|error| error_for(error.to_string()))?;
    if lists.is_empty() {
        return Err(error_for("it is empty".to_owned()));
    }
    let owned = |list: &CertificateRevocationListDer<'_>| {
        let list =
            OwnedCertRevocationList::from_der(list).map_err(|error| error_for(format!("{error:?}")))?;
        Ok(CertRevocationList::Owned(list))
    };
    lists.iter().map(owned).collect()
}

fn lists(text: &EncodedFile) -> Result<Vec<CertificateRevocationListDer<'static>>, pem::Error> {
    match &text.content {
        EncodedContent::Pem(bytes) => CertificateRevocationListDer::pem_slice_iter(bytes).collect(),
        EncodedContent::Der(lists) => Ok(lists.iter().map(|list| list.clone().into()).collect()),
    }
}

fn certificates(text: &EncodedFile, limit: usize) -> Result<Vec<CertificateDer<'static>>, MaterialError> {
    let path = || text.path.clone();
    let certificates = match &text.content {
        EncodedContent::Pem(bytes) => CertificateDer::pem_slice_iter(bytes).take(limit + 1).collect(),
        EncodedContent::Der(list) => Ok(list.iter().take(limit + 1).map(|one| one.clone().into()).collect()),
    };
    let certificates: Vec<_> =
        certificates.map_err(|error| MaterialError::Pem { path: path(), reason: error.to_string() })?;
    match certificates.len() {
        0 => Err(MaterialError::NoCertificate(path())),
        count if count > limit => Err(MaterialError::TooManyCertificates { path: path(), limit }),
        _ => Ok(certificates),
    }
}

fn private_key(text: &EncodedFile) -> Result<Arc<dyn rustls::sign::SigningKey>, MaterialError> {
    let error_for = |reason: String| MaterialError::Key { path: text.path.clone(), reason };
    let key = match &text.content {
        EncodedContent::Pem(bytes) => {
            PrivateKeyDer::from_pem_slice(bytes).map_err(|error| error_for(error.to_string()))
        }
        EncodedContent::Der(keys) => {
            keys.first().ok_or_else(|| error_for("it is empty".to_owned())).and_then(|key| {
                PrivateKeyDer::try_from(key.clone()).map_err(|error| error_for(error.to_owned()))
            })
        }
    }?;
    provider().key_provider.load_private_key(key).map_err(|error| error_for(error.to_string()))
}

fn expiry(certificate: &[u8], kind: ExpiryKind) -> Option<Expiry> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let at = peer::from_unix_seconds(parsed.validity().not_after.timestamp());
    let from = peer::from_unix_seconds(parsed.validity().not_before.timestamp());
    Some(Expiry { kind, subject: peer::rfc2253(parsed.subject()), not_before: from, not_after: at })
}

/// When roots and revocation lists expire.
pub fn trust_expiries(ca: &[(Option<TrustDomain>, EncodedFile)], crl: &[EncodedFile]) -> Vec<Expiry> {
    let roots = ca.iter().flat_map(|(_, text)| certificates(text, MAX_ROOTS).unwrap_or_default());
    let mut expiries: Vec<_> = roots.filter_map(|root| expiry(&root, ExpiryKind::Root)).collect();
    for list in crl.iter().flat_map(|text| lists(text).unwrap_or_default()) {
        if let Ok((_, parsed)) = CertificateRevocationList::from_der(&list)
            && let Some(next) = parsed.next_update()
        {
            let what = peer::rfc2253(parsed.issuer());
            let from = peer::from_unix_seconds(parsed.last_update().timestamp());
            expiries.push(Expiry {
                kind: ExpiryKind::Crl,
                subject: what,
                not_before: from,
                not_after: peer::from_unix_seconds(next.timestamp()),
            });
        }
    }
    expiries
}

impl EncodedFile {
    /// Reads a file of at most `limit` bytes.
    ///
    /// # Errors
    ///
    /// If it cannot be read, or is larger.
    pub fn read(path: &Path, limit: u64) -> Result<Self, MaterialError> {
        use std::io::Read;
        let error_for = |source| MaterialError::Read { path: path.to_owned(), source };
        let mut bytes = Vec::new();
        let file = std::fs::File::open(path).map_err(error_for)?;
        file.take(limit + 1).read_to_end(&mut bytes).map_err(error_for)?;
        if bytes.len() as u64 > limit {
            return Err(MaterialError::TooLarge { path: path.to_owned(), limit });
        }
        Ok(Self { path: path.to_owned(), content: EncodedContent::Pem(bytes) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urgency_rises_towards_the_expiry() {
        let start = SystemTime::UNIX_EPOCH;
        let hours = |count: u64| Duration::from_secs(count * 3600);
        let of = |life: u64| Expiry {
            kind: ExpiryKind::Leaf,
            subject: String::new(),
            not_before: start,
            not_after: start + hours(life),
        };
        let day = of(24);
        let urgency = |left: u64| day.urgency(start + hours(24) - hours(left));
        assert_eq!([urgency(24), urgency(7), urgency(5), urgency(2), urgency(1)], [0, 0, 1, 2, 3]);
        assert_eq!(day.urgency(start + hours(25)), 4);
        // Ten years: a month before the end, not two and a half years.
        let root = of(87_600);
        assert_eq!(root.urgency(start + hours(87_600 - 24 * 31)), 0);
        assert_eq!(root.urgency(start + hours(87_600 - 24 * 29)), 1);
    }
}
