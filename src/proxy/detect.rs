//! Protocol detection by the client's first bytes.

mod opening;
mod watch;

use std::{
    future::{Future, poll_fn},
    io,
    pin::pin,
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use rustls::server::Acceptor;
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    time::timeout,
};

use opening::classify_ended;
pub use opening::{classify, server_speaks_http};
pub use watch::{HiddenRequest, RequestWatch};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DetectedProtocol {
    Http1,
    H2,
    /// TLS: the first record of a handshake.
    Tls,
    /// Any other protocol.
    Other,
    /// The client closed without sending a byte.
    Nothing,
}

/// The limit from the first byte until the protocol is known.
const DETECTION_TIMEOUT: Duration = Duration::from_secs(10);
const FIRST_READ: usize = 1024;
/// The most bytes of a ClientHello that are read. With post-quantum keys it has a few kilobytes.
const MAX_CLIENT_HELLO: usize = 64 * 1024;

/// Reads as few bytes as it takes to detect the protocol. Cancel-safe: it keeps the bytes that it has read.
#[derive(Debug, Default)]
pub struct Detector {
    received: BytesMut,
}

impl Detector {
    pub async fn detect(&mut self, stream: &mut (impl AsyncRead + Unpin)) -> io::Result<DetectedProtocol> {
        loop {
            if let Some(detected) = classify(&self.received) {
                return Ok(detected);
            }
            let begun = !self.received.is_empty();
            let read = poll_fn(|cx| {
                // Large enough for most requests; not held while the client is silent.
                self.received.reserve(FIRST_READ);
                let read = pin!(stream.read_buf(&mut self.received)).poll(cx);
                if self.received.is_empty() {
                    self.received = BytesMut::new();
                }
                read
            });
            let count = if begun { timeout(DETECTION_TIMEOUT, read).await?? } else { read.await? };
            if count == 0 {
                return Ok(classify_ended(&self.received));
            }
        }
    }

    /// Reads the rest of a ClientHello and returns its server name (SNI); `None` if it has none or is malformed.
    pub async fn server_name(&mut self, stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<String>> {
        let mut acceptor = Acceptor::default();
        let mut fed = 0;
        loop {
            while fed < self.received.len() {
                match acceptor.read_tls(&mut &self.received[fed..]) {
                    Ok(0) | Err(_) => return Ok(None),
                    Ok(count) => fed += count,
                }
                match acceptor.accept() {
                    Ok(Some(accepted)) => {
                        return Ok(accepted.client_hello().server_name().map(str::to_owned));
                    }
                    Ok(None) => {}
                    Err(_) => return Ok(None),
                }
            }
            if self.received.len() > MAX_CLIENT_HELLO {
                return Ok(None);
            }
            self.received.reserve(FIRST_READ);
            if timeout(DETECTION_TIMEOUT, stream.read_buf(&mut self.received)).await?? == 0 {
                return Ok(None);
            }
        }
    }

    /// Whether any byte was received.
    pub fn has_bytes(&self) -> bool {
        !self.received.is_empty()
    }

    /// The bytes that were read.
    pub fn into_bytes(self) -> Bytes {
        self.received.freeze()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A ClientHello for `name`.
    fn client_hello_for(name: &str) -> Vec<u8> {
        let config =
            rustls::ClientConfig::builder_with_provider(rustls::crypto::aws_lc_rs::default_provider().into())
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_root_certificates(rustls::RootCertStore::empty())
                .with_no_client_auth();
        let name = rustls_pki_types::ServerName::try_from(name.to_owned()).unwrap();
        let mut client = rustls::ClientConnection::new(config.into(), name).unwrap();
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        bytes
    }

    #[tokio::test]
    async fn the_server_name_is_read_from_any_pieces() {
        for (name, expected) in [("db.example", Some("db.example")), ("192.0.2.1", None)] {
            let bytes = client_hello_for(name);
            let mut stream = tokio::io::BufReader::with_capacity(100, &bytes[..]);
            let mut detector = Detector::default();
            assert_eq!(detector.detect(&mut stream).await.unwrap(), DetectedProtocol::Tls);
            assert_eq!(detector.server_name(&mut stream).await.unwrap().as_deref(), expected);
            assert_eq!(detector.into_bytes(), bytes, "nothing is lost");
        }
    }

    #[tokio::test]
    async fn a_malformed_client_hello_has_no_server_name() {
        let mut other = client_hello_for("db.example");
        other[5] = 0xff;
        let short = client_hello_for("db.example")[..40].to_vec();
        let endless = [&[0x16, 3, 1, 0x40, 0, 1, 0, 0xff, 0xff][..], &[0; 200_000]].concat();
        for bytes in [other, short, endless, b"\x16\x03\x01\xff\xff".to_vec()] {
            let (mut stream, mut detector) = (&bytes[..], Detector::default());
            assert_eq!(detector.detect(&mut stream).await.unwrap(), DetectedProtocol::Tls);
            assert_eq!(detector.server_name(&mut stream).await.unwrap(), None);
            assert!(detector.into_bytes().len() <= MAX_CLIENT_HELLO * 2);
        }
    }

    #[tokio::test]
    async fn the_detected_bytes_are_returned() {
        let mut stream: &[u8] = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";
        let mut detector = Detector::default();
        let detected = detector.detect(&mut stream).await.unwrap();
        assert_eq!(
            (detected, &detector.into_bytes()[..]),
            (DetectedProtocol::Http1, &b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"[..])
        );
    }
}
