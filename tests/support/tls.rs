//! TLS peers: a client with any certificate, and a server.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    thread,
};

use rustls::{
    ClientConfig, ClientConnection, ServerConfig, ServerConnection, StreamOwned,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::CryptoProvider,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject};

use super::WAIT_LIMIT;

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

fn parsed(pair: &(String, String)) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let chain = CertificateDer::pem_slice_iter(pair.0.as_bytes()).collect::<Result<_, _>>().expect("PEM");
    (chain, PrivateKeyDer::from_pem_slice(pair.1.as_bytes()).expect("a key"))
}

/// Accepts every certificate: the test checks what the proxy does.
#[derive(Debug)]
struct AcceptAnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AcceptAnyCertificate {
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
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verify_tls13_signature(message, leaf, signature)
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

/// A TLS client with any certificate.
pub struct TlsClient {
    config: Arc<ClientConfig>,
}

pub type TlsSocket = StreamOwned<ClientConnection, TcpStream>;

impl TlsClient {
    pub fn new(certificate: Option<&(String, String)>, alpn: &[&str]) -> Self {
        Self::with_versions(certificate, alpn, rustls::DEFAULT_VERSIONS)
    }

    fn with_versions(
        certificate: Option<&(String, String)>,
        alpn: &[&str],
        versions: &[&'static rustls::SupportedProtocolVersion],
    ) -> Self {
        let builder = ClientConfig::builder_with_provider(provider()).with_protocol_versions(versions);
        let builder = builder.expect("versions").dangerous();
        let builder = builder.with_custom_certificate_verifier(Arc::new(AcceptAnyCertificate(provider())));
        let mut config = match certificate.map(parsed) {
            Some((chain, key)) => builder.with_client_auth_cert(chain, key).expect("a certificate"),
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        Self { config: Arc::new(config) }
    }

    /// A client that speaks at most TLS 1.2.
    pub fn with_tls12(certificate: Option<&(String, String)>, alpn: &[&str]) -> Self {
        Self::with_versions(certificate, alpn, &[&rustls::version::TLS12])
    }

    #[track_caller]
    pub fn connect(&self, address: SocketAddr) -> TlsSocket {
        let stream = TcpStream::connect(address).expect("connect");
        stream.set_read_timeout(Some(WAIT_LIMIT)).expect("a timeout");
        self.connect_over(stream)
    }

    /// The same over an open connection.
    pub fn connect_over(&self, stream: TcpStream) -> TlsSocket {
        let name = ServerName::try_from("localhost").expect("a name");
        let connection = ClientConnection::new(Arc::clone(&self.config), name).expect("a connection");
        StreamOwned::new(connection, stream)
    }

    /// The response to some bytes, up to the close by the other side; or the error.
    pub fn send_and_read(&self, address: SocketAddr, bytes: &str) -> io::Result<String> {
        Self::send_and_read_on(self.connect(address), bytes)
    }

    /// The same over an open connection.
    pub fn send_and_read_on(mut stream: TlsSocket, bytes: &str) -> io::Result<String> {
        stream.write_all(bytes.as_bytes())?;
        let mut response = Vec::new();
        match stream.read_to_end(&mut response) {
            // Closed without close_notify.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
            done => drop(done?),
        }
        Ok(String::from_utf8_lossy(&response).into_owned())
    }
}

/// `client_ca`: the CA that client certificates must come from; without it, no certificate is requested.
pub fn server_config(certificate: &(String, String), client_ca: Option<&str>, alpn: &[&str]) -> ServerConfig {
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
    config
}

/// A server that speaks at most TLS 1.2.
pub fn tls12_config(certificate: &(String, String)) -> ServerConfig {
    let (chain, key) = parsed(certificate);
    let builder = ServerConfig::builder_with_provider(provider());
    let builder = builder.with_protocol_versions(&[&rustls::version::TLS12]).expect("versions");
    builder.with_no_client_auth().with_single_cert(chain, key).expect("a certificate")
}

/// A TLS server that responds to each connection's first request with 200 and closes.
pub struct TlsServer {
    address: SocketAddr,
}

impl TlsServer {
    /// See [`server_config`].
    pub fn start(certificate: &(String, String), client_ca: Option<&str>, alpn: &[&str]) -> Self {
        Self::start_at(([127, 0, 0, 1], 0).into(), certificate, client_ca, alpn)
    }

    pub fn start_at(
        address: SocketAddr,
        certificate: &(String, String),
        client_ca: Option<&str>,
        alpn: &[&str],
    ) -> Self {
        Self::start_with(address, server_config(certificate, client_ca, alpn))
    }

    pub fn start_with(address: SocketAddr, config: ServerConfig) -> Self {
        Self::start_answering(address, config, "hello".to_owned())
    }

    /// The same with another body.
    pub fn start_answering(address: SocketAddr, config: ServerConfig, body: String) -> Self {
        let config = Arc::new(config);
        let response = Arc::new(format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        ));
        let listener = TcpListener::bind(address).expect("bind");
        let address = listener.local_addr().expect("an address");
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (config, response) = (Arc::clone(&config), Arc::clone(&response));
                thread::spawn(move || {
                    let connection = ServerConnection::new(config).expect("a connection");
                    let mut stream = StreamOwned::new(connection, stream);
                    let mut seen = [0; 4096];
                    if stream.read(&mut seen).is_ok_and(|count| count > 0) {
                        let _ = stream.write_all(response.as_bytes());
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
