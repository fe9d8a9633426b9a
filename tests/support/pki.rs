//! Certificates, good and bad, and TLS from the outside.

use std::{
    fs,
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType,
    SerialNumber,
};
use rustls::{
    ClientConfig, ClientConnection, ServerConfig, ServerConnection, StreamOwned,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::CryptoProvider,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject};
use tempfile::TempDir;

use super::PATIENCE;

/// A CA in a directory of its own, and what it issues.
pub struct Pki {
    directory: TempDir,
    ca: CertifiedIssuer<'static, KeyPair>,
}

/// What an issued certificate is made of, to be changed.
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

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

impl Pki {
    pub fn new() -> Self {
        Self { directory: tempfile::tempdir().expect("a directory"), ca: ca("test CA") }
    }

    /// Another CA, whose files are beside those of this one.
    pub fn renew_ca(&mut self, name: &str) {
        self.ca = ca(name);
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn ca_pem(&self) -> String {
        self.ca.pem()
    }

    /// Writes in one step, as a Secret's files change.
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

    /// Writes NAME.crt and NAME.key.
    pub fn write_leaf(&self, name: &str, change: impl FnOnce(&mut Params)) {
        let (certificate, key) = self.issue(name, change);
        // The key first: with the old certificate it is refused, and with the new one taken.
        self.write(&format!("{name}.key"), &key);
        self.write(&format!("{name}.crt"), &certificate);
    }

    /// The `[identity]` of a sidecar, its files written.
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

fn parsed(pair: &(String, String)) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let chain = CertificateDer::pem_slice_iter(pair.0.as_bytes()).collect::<Result<_, _>>().expect("PEM");
    (chain, PrivateKeyDer::from_pem_slice(pair.1.as_bytes()).expect("a key"))
}

/// Believes everybody: the test looks at what the proxy does.
#[derive(Debug)]
struct Gullible(Arc<CryptoProvider>);

impl ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// A caller by TLS that can show any certificate.
pub struct TlsCaller {
    config: Arc<ClientConfig>,
}

pub type TlsSocket = StreamOwned<ClientConnection, TcpStream>;

impl TlsCaller {
    pub fn new(certificate: Option<&(String, String)>, alpn: &[&str]) -> Self {
        let builder = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
        let builder = builder.expect("versions").dangerous();
        let builder = builder.with_custom_certificate_verifier(Arc::new(Gullible(provider())));
        let mut config = match certificate.map(parsed) {
            Some((chain, key)) => builder.with_client_auth_cert(chain, key).expect("a certificate"),
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        Self { config: Arc::new(config) }
    }

    #[track_caller]
    pub fn connect(&self, address: SocketAddr) -> TlsSocket {
        let stream = TcpStream::connect(address).expect("connect");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let name = ServerName::try_from("localhost").expect("a name");
        let connection = ClientConnection::new(Arc::clone(&self.config), name).expect("a connection");
        StreamOwned::new(connection, stream)
    }

    /// What comes back for some bytes, until the other side closes; or how that failed.
    pub fn say(&self, address: SocketAddr, bytes: &str) -> io::Result<String> {
        let mut stream = self.connect(address);
        stream.write_all(bytes.as_bytes())?;
        let mut answer = Vec::new();
        match stream.read_to_end(&mut answer) {
            // Closed without a farewell.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
            done => drop(done?),
        }
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }
}

/// A server by TLS that answers each connection's first request with 200 and closes.
pub struct TlsServer {
    address: SocketAddr,
}

impl TlsServer {
    /// `client_ca`: whom client certificates must be from; none: no certificate is asked for.
    pub fn start(certificate: &(String, String), client_ca: Option<&str>, alpn: &[&str]) -> Self {
        let (chain, key) = parsed(certificate);
        let builder = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
        let builder = builder.expect("versions");
        let builder = match client_ca {
            None => builder.with_no_client_auth(),
            Some(ca) => {
                let mut roots = rustls::RootCertStore::empty();
                let ca = CertificateDer::from_pem_slice(ca.as_bytes()).expect("PEM");
                roots.add(ca).expect("a root");
                let verifier =
                    rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider());
                builder.with_client_cert_verifier(verifier.build().expect("a verifier"))
            }
        };
        let mut config = builder.with_single_cert(chain, key).expect("a certificate");
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        let config = Arc::new(config);
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = listener.local_addr().expect("an address");
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let config = Arc::clone(&config);
                thread::spawn(move || {
                    let connection = ServerConnection::new(config).expect("a connection");
                    let mut stream = StreamOwned::new(connection, stream);
                    let mut seen = [0; 4096];
                    if stream.read(&mut seen).is_ok_and(|count| count > 0) {
                        let _ = stream.write_all(
                            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello",
                        );
                        stream.conn.send_close_notify();
                        let _ = stream.flush();
                    }
                });
            }
        });
        Self { address }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }
}
