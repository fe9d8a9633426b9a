//! Kubelet probes of the pod's other containers, executed by the sidecar.
//!
//! With kernel redirection, inbound connections reach the proxy: mutual TLS would reject the kubelet, and a TCP probe
//! would test the proxy instead of the service. So injection points probes to `/probe/CONTAINER/KIND` here and passes
//! the original probes in `OUTRIGGER_PROBES`. The sidecar sends them to the pod's address, as the kubelet would; its
//! own connections are not redirected.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, StatusCode, header};
use http_body_util::Empty;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use serde::Deserialize;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::AdminError;
use crate::{
    descriptors,
    upstream::health::{CheckError, CheckStream, ask_grpc, run_on_connection},
};

/// Most probes. A pod has a handful of containers with three probes each.
const MAX_PROBES: usize = 256;
const USER_AGENT: &str = concat!("kube-probe/outrigger-", env!("CARGO_PKG_VERSION"));

/// The probes of a pod.
#[derive(Debug)]
pub struct Probes {
    /// By `CONTAINER/KIND`.
    probes: HashMap<String, Probe>,
    host: IpAddr,
    tls: Option<Arc<ClientConfig>>,
}

/// Exactly one of HTTP, gRPC or TCP connect.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Probe {
    port: u16,
    /// Path and query.
    http: Option<String>,
    #[serde(default)]
    tls: bool,
    #[serde(default)]
    headers: Vec<(String, String)>,
    /// The gRPC service; empty is the whole server.
    grpc: Option<String>,
    #[serde(default)]
    tcp: bool,
    /// Seconds.
    timeout: u64,
    /// Why the last execution failed; `None` if it passed.
    #[serde(skip)]
    failure: Mutex<Option<String>>,
}

impl Probe {
    /// Logs changes only, so that a probe that keeps failing is one line. The kubelet's event has only the status.
    fn record(&self, name: &str, failure: Option<String>) {
        let mut last = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        if *last == failure {
            return;
        }
        match &failure {
            Some(reason) => tracing::info!(probe = name, reason, "container probe failed"),
            None => tracing::info!(probe = name, "container probe passes again"),
        }
        *last = failure;
    }
}

impl Probes {
    /// Parses the environment variable set by injection. Unset: no probes.
    ///
    /// # Errors
    ///
    /// If it is invalid, which means that injection did not write it.
    pub fn from_env(env: impl Fn(&str) -> Option<String>) -> Result<Arc<Self>, AdminError> {
        let invalid = |reason: String| AdminError::Probes(reason);
        let probes: HashMap<String, Probe> = match env("OUTRIGGER_PROBES") {
            Some(text) => serde_json::from_str(&text).map_err(|error| invalid(error.to_string()))?,
            None => HashMap::new(),
        };
        if probes.len() > MAX_PROBES {
            return Err(invalid(format!("more than {MAX_PROBES} probes")));
        }
        for (name, probe) in &probes {
            let kinds = [probe.http.is_some(), probe.grpc.is_some(), probe.tcp];
            if kinds.iter().filter(|kind| **kind).count() != 1 {
                return Err(invalid(format!("`{name}` must be one of http, grpc and tcp")));
            }
        }
        let host = match env("OUTRIGGER_POD_IP") {
            Some(text) => text.parse().map_err(|_| invalid(format!("OUTRIGGER_POD_IP is `{text}`")))?,
            None => Ipv4Addr::LOCALHOST.into(),
        };
        let tls = probes.values().any(|probe| probe.tls).then(insecure_client_config).transpose();
        Ok(Arc::new(Self { host, tls: tls.map_err(|error| invalid(error.to_string()))?, probes }))
    }

    /// The longest timeout of all probes.
    pub fn longest_timeout(&self) -> Duration {
        self.probes.values().map(|probe| Duration::from_secs(probe.timeout)).max().unwrap_or_default()
    }

    /// Executes the named probe. Returns the response for the kubelet; `None`: there is no such probe.
    pub async fn run(&self, name: &str) -> Option<(StatusCode, String)> {
        let probe = self.probes.get(name)?;
        let limit = Duration::from_secs(probe.timeout);
        let outcome =
            timeout(limit, self.execute(probe, limit)).await.unwrap_or(Err(CheckError::Timeout(limit)));
        let failure = outcome.err().map(|error| error.to_string());
        probe.record(name, failure.clone());
        Some(match failure {
            None => (StatusCode::OK, "ok\n".to_owned()),
            Some(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
        })
    }

    async fn execute(&self, probe: &Probe, limit: Duration) -> Result<(), CheckError> {
        let address = SocketAddr::new(self.host, probe.port);
        let stream = descriptors::connect(address).await.map_err(CheckError::Connect)?;
        match (&probe.http, &probe.grpc, &self.tls) {
            (Some(path), _, Some(tls)) if probe.tls => {
                let name = ServerName::from(self.host);
                let stream = TlsConnector::from(Arc::clone(tls)).connect(name, stream).await;
                get(stream.map_err(CheckError::Connect)?, address, path, &probe.headers).await
            }
            (Some(path), ..) => get(stream, address, path, &probe.headers).await,
            (None, Some(service), _) => ask_grpc(stream, &address.to_string(), service, limit).await,
            (None, None, _) => Ok(()),
        }
    }
}

/// Passes with status 200 to 399, like the kubelet.
async fn get(
    stream: impl CheckStream,
    address: SocketAddr,
    path: &str,
    fields: &[(String, String)],
) -> Result<(), CheckError> {
    let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
    let mut request = Request::get(path).body(Empty::<Bytes>::new())?;
    let headers = request.headers_mut();
    for (name, value) in fields {
        let name = HeaderName::try_from(name).map_err(http::Error::from)?;
        headers.append(name, HeaderValue::try_from(value).map_err(http::Error::from)?);
    }
    headers.entry(header::USER_AGENT).or_insert(HeaderValue::from_static(USER_AGENT));
    headers.entry(header::ACCEPT).or_insert(HeaderValue::from_static("*/*"));
    headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    if !headers.contains_key(header::HOST) {
        headers.insert(header::HOST, HeaderValue::try_from(address.to_string()).map_err(http::Error::from)?);
    }
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let status = run_on_connection(connection, async { sender.send_request(request).await }).await?.status();
    if status.is_success() || status.is_redirection() { Ok(()) } else { Err(CheckError::Status(status)) }
}

/// TLS without certificate verification, like the kubelet.
fn insecure_client_config() -> Result<Arc<ClientConfig>, rustls::Error> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AcceptAnyCertificate(provider)))
        .with_no_client_auth();
    Ok(Arc::new(config))
}

#[derive(Debug)]
struct AcceptAnyCertificate(Arc<rustls::crypto::CryptoProvider>);

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
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probes(text: &str) -> Result<Arc<Probes>, String> {
        Probes::from_env(|name| (name == "OUTRIGGER_PROBES").then(|| text.to_owned()))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn invalid_probes_are_rejected() {
        assert!(probes(r#"{"a/liveness": {"port": 1, "tcp": true, "timeout": 1}}"#).is_ok());
        for invalid in [
            "",
            "[]",
            r#"{"a/liveness": {"port": 1, "timeout": 1}}"#,
            r#"{"a/liveness": {"port": 1, "tcp": true, "http": "/", "timeout": 1}}"#,
            r#"{"a/liveness": {"port": 70000, "tcp": true, "timeout": 1}}"#,
        ] {
            assert!(probes(invalid).unwrap_err().contains("OUTRIGGER_PROBES"), "{invalid}");
        }
    }

    #[tokio::test]
    async fn a_closed_port_fails_the_probe() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        let probes = probes(&format!(r#"{{"a/x": {{"port": {port}, "tcp": true, "timeout": 5}}}}"#)).unwrap();
        assert_eq!(probes.run("a/x").await.unwrap().0, StatusCode::OK);
        drop(free);
        let (status, body) = probes.run("a/x").await.unwrap();
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(body.contains("connect"), "{body}");
        assert!(probes.run("b/x").await.is_none());
    }
}
