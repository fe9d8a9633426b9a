//! Which protocol a client speaks, by its first bytes.

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
pub use watch::{ReadsAsRequest, RequestWatch};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spoken {
    Http1,
    H2,
    /// The first record of a TLS handshake.
    Tls,
    /// A database, anything: bytes.
    Other,
    /// The caller left without a word.
    Nothing,
}

/// From the first byte to enough of them.
const PATIENCE: Duration = Duration::from_secs(10);
const FIRST_READ: usize = 1024;
/// Greetings are a few kilobytes, with post-quantum keys.
const LONGEST_GREETING: usize = 64 * 1024;

/// Reads as few bytes as it takes to tell. What it has read survives when it is cancelled and asked again.
#[derive(Debug, Default)]
pub struct Detector {
    seen: BytesMut,
}

impl Detector {
    pub async fn spoken(&mut self, stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Spoken> {
        loop {
            if let Some(spoken) = classify(&self.seen) {
                return Ok(spoken);
            }
            let begun = !self.seen.is_empty();
            let read = poll_fn(|cx| {
                // Large enough for most requests; not held while the caller is silent.
                self.seen.reserve(FIRST_READ);
                let read = pin!(stream.read_buf(&mut self.seen)).poll(cx);
                if self.seen.is_empty() {
                    self.seen = BytesMut::new();
                }
                read
            });
            let count = if begun { timeout(PATIENCE, read).await?? } else { read.await? };
            if count == 0 {
                return Ok(classify_ended(&self.seen));
            }
        }
    }

    /// The host that a TLS greeting, which has begun, is for; none where it names none or is none.
    pub async fn server_name(&mut self, stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<String>> {
        let mut acceptor = Acceptor::default();
        let mut told = 0;
        loop {
            while told < self.seen.len() {
                match acceptor.read_tls(&mut &self.seen[told..]) {
                    Ok(0) | Err(_) => return Ok(None),
                    Ok(count) => told += count,
                }
                match acceptor.accept() {
                    Ok(Some(accepted)) => {
                        return Ok(accepted.client_hello().server_name().map(str::to_owned));
                    }
                    Ok(None) => {}
                    Err(_) => return Ok(None),
                }
            }
            if self.seen.len() > LONGEST_GREETING {
                return Ok(None);
            }
            self.seen.reserve(FIRST_READ);
            if timeout(PATIENCE, stream.read_buf(&mut self.seen)).await?? == 0 {
                return Ok(None);
            }
        }
    }

    /// Whether anything has come.
    pub fn has_begun(&self) -> bool {
        !self.seen.is_empty()
    }

    /// What was read, to be read again.
    pub fn into_bytes(self) -> Bytes {
        self.seen.freeze()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a client says first, for `name`.
    fn greeting(name: &str) -> Vec<u8> {
        let config =
            rustls::ClientConfig::builder_with_provider(rustls::crypto::aws_lc_rs::default_provider().into())
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_root_certificates(rustls::RootCertStore::empty())
                .with_no_client_auth();
        let name = rustls_pki_types::ServerName::try_from(name.to_owned()).unwrap();
        let mut client = rustls::ClientConnection::new(config.into(), name).unwrap();
        let mut said = Vec::new();
        client.write_tls(&mut said).unwrap();
        said
    }

    #[tokio::test]
    async fn the_name_in_a_greeting_is_found_however_it_comes() {
        for (name, expected) in [("db.example", Some("db.example")), ("192.0.2.1", None)] {
            let said = greeting(name);
            let mut stream = tokio::io::BufReader::with_capacity(100, &said[..]);
            let mut detector = Detector::default();
            assert_eq!(detector.spoken(&mut stream).await.unwrap(), Spoken::Tls);
            assert_eq!(detector.server_name(&mut stream).await.unwrap().as_deref(), expected);
            assert_eq!(detector.into_bytes(), said, "nothing is lost");
        }
    }

    #[tokio::test]
    async fn what_only_begins_like_a_greeting_names_nobody() {
        let mut other = greeting("db.example");
        other[5] = 0xff;
        let short = greeting("db.example")[..40].to_vec();
        let endless = [&[0x16, 3, 1, 0x40, 0, 1, 0, 0xff, 0xff][..], &[0; 200_000]].concat();
        for said in [other, short, endless, b"\x16\x03\x01\xff\xff".to_vec()] {
            let (mut stream, mut detector) = (&said[..], Detector::default());
            assert_eq!(detector.spoken(&mut stream).await.unwrap(), Spoken::Tls);
            assert_eq!(detector.server_name(&mut stream).await.unwrap(), None);
            assert!(detector.into_bytes().len() <= LONGEST_GREETING * 2);
        }
    }

    #[tokio::test]
    async fn what_was_read_comes_back() {
        let mut stream: &[u8] = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";
        let mut detector = Detector::default();
        let spoken = detector.spoken(&mut stream).await.unwrap();
        assert_eq!(
            (spoken, &detector.into_bytes()[..]),
            (Spoken::Http1, &b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"[..])
        );
    }
}
