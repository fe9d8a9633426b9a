//! What a caller speaks, told from its first bytes.

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

/// The client connection preface of HTTP/2 (RFC 9113 §3.4).
const H2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// What else begins with a word has its whole first line within so many bytes.
const LONGEST_LINE: usize = 4096;

/// The longest method that is taken for HTTP/1.
const LONGEST_METHOD: usize = 24;

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
            if let Some(spoken) = judge(&self.seen) {
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
                return Ok(if self.seen.is_empty() { Spoken::Nothing } else { Spoken::Other });
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

    /// What was read, to be read again.
    pub fn into_bytes(self) -> Bytes {
        self.seen.freeze()
    }
}

/// `None`: more bytes are needed.
fn judge(bytes: &[u8]) -> Option<Spoken> {
    // Empty lines before a request line are tolerated (RFC 9112 §2.2).
    let start = bytes.iter().position(|b| !matches!(b, b'\r' | b'\n')).unwrap_or(bytes.len());
    let bytes = if start <= 2 { &bytes[start..] } else { bytes };
    if bytes.len() >= H2_PREFACE.len() && bytes.starts_with(H2_PREFACE) {
        return Some(Spoken::H2);
    }
    if H2_PREFACE.starts_with(bytes) {
        return None;
    }
    match bytes {
        // A handshake record of SSL 3.0 or later (RFC 8446 §5.1).
        [0x16, 0x03, minor, ..] if *minor <= 4 => return Some(Spoken::Tls),
        [0x16] | [0x16, 0x03] => return None,
        _ => {}
    }
    let token = bytes.iter().take(LONGEST_METHOD + 1).take_while(|b| is_method_byte(**b)).count();
    match bytes.get(token) {
        _ if token > LONGEST_METHOD => Some(Spoken::Other),
        Some(b' ') if token > 0 => is_request_line(&bytes[..token], &bytes[token + 1..])
            .map(|is_one| if is_one { Spoken::Http1 } else { Spoken::Other }),
        Some(_) => Some(Spoken::Other),
        None => None,
    }
}

/// Whether a word and a space are how HTTP begins, or how memcached, a shell of Redis or a mail client does: the target is
/// written as HTTP writes it, or else the line says which version of HTTP it is.
fn is_request_line(method: &[u8], rest: &[u8]) -> Option<bool> {
    let shouted = !method.iter().any(u8::is_ascii_lowercase);
    let target = |begin: &[u8]| rest.starts_with(begin);
    if shouted && (method == b"CONNECT" || target(b"/") || target(b"http://") || target(b"https://")) {
        return Some(true);
    }
    match rest.iter().position(|byte| *byte == b'\n') {
        Some(end) => Some(rest[..end].windows(6).any(|six| six == b" HTTP/")),
        // Whoever reads HTTP will say that it is too long.
        None => (rest.len() > LONGEST_LINE).then_some(true),
    }
}

/// Methods are any token by the standard; those in use are letters, digits and `-`. Narrow on purpose: what is no
/// HTTP must not be answered with an HTTP error.
fn is_method_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_protocols_apart_with_the_fewest_bytes() {
        for (bytes, expected) in [
            (&b"GET / HTTP/1.1\r\n"[..], Some(Spoken::Http1)),
            (b"GET /", Some(Spoken::Http1)),
            (b"GET ", None),
            (b"GET http:/", None),
            (b"GET http://a", Some(Spoken::Http1)),
            (b"CONNECT ", Some(Spoken::Http1)),
            (b"GET a HTTP/1.1\r\n", Some(Spoken::Http1)),
            (b"get / HTTP/1.1\r\n", Some(Spoken::Http1)),
            (b"get /key\r\n", Some(Spoken::Other)),
            (b"set key 0 0 5\r\n", Some(Spoken::Other)),
            (b"KEYS *\r\n", Some(Spoken::Other)),
            (b"GET key\n", Some(Spoken::Other)),
            (b"NICK outrigger\r\n", Some(Spoken::Other)),
            (b"GE", None),
            (b"", None),
            (b"\r\nPOST /", Some(Spoken::Http1)),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Some(Spoken::H2)),
            (b"PRI * HTTP/2.0\r\n\r\n", None),
            (b"PRI * HTTP/1.1\r\n", Some(Spoken::Http1)),
            (b"M-SEARCH * HTTP/1.1\r\n", Some(Spoken::Http1)),
            (b"\x16\x03\x01\x02\x00\x01", Some(Spoken::Tls)),
            (b"\x16\x03", None),
            (b"\x16\x04\x01", Some(Spoken::Other)),
            (b"*1\r\n$4\r\nPING\r\n", Some(Spoken::Other)),
            (b"\x00\x00\x00\x08\x04\xd2\x16\x2f", Some(Spoken::Other)),
            (b"SSH-2.0-OpenSSH_9.2\r\n", Some(Spoken::Other)),
            (b"ABCDEFGHIJKLMNOPQRSTUVWXYZABC", Some(Spoken::Other)),
        ] {
            assert_eq!(judge(bytes), expected, "{:?}", String::from_utf8_lossy(bytes));
        }
    }

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
