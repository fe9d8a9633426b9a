use std::net::{Ipv4Addr, SocketAddr};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpListener,
};
use tokio_rustls::TlsAcceptor;

use super::{
    test_server::{End, Script, TestServer, tls_config},
    *,
};

const LIMITS: FetchLimits = FetchLimits { timeout: Duration::from_secs(20), max_body: 1024 };

fn fetcher() -> Fetcher {
    Fetcher::new(Arc::new(Resolver::from_system().unwrap()))
}

fn get(url: &str) -> Request<Bytes> {
    Request::get(url).body(Bytes::new()).unwrap()
}

/// Reads a request head and responds with a copy of it, and `extra` more bytes.
async fn respond(mut stream: impl AsyncRead + AsyncWrite + Unpin, extra: usize) {
    let mut seen = Vec::new();
    while !seen.ends_with(b"\r\n\r\n") {
        let read = stream.read_buf(&mut seen).await.unwrap_or(0);
        if read == 0 {
            return;
        }
    }
    let head = format!("HTTP/1.1 418 teapot\r\ncontent-length: {}\r\n\r\n", seen.len() + extra);
    seen.resize(seen.len() + extra, b'.');
    let _ = stream.write_all(head.as_bytes()).await;
    let _ = stream.write_all(&seen).await;
    let _ = stream.shutdown().await;
}

async fn plain_server(extra: usize) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { respond(listener.accept().await.unwrap().0, extra).await });
    address
}

/// A server with a certificate for `localhost`, and the PEM file of its CA.
async fn tls_server(directory: &Path) -> (SocketAddr, PathBuf) {
    let ca = directory.join("ca.pem");
    let acceptor = TlsAcceptor::from(tls_config(&ca));
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            if let Ok(stream) = acceptor.accept(tcp).await {
                respond(stream, 0).await;
            }
        }
    });
    (address, ca)
}

#[tokio::test]
async fn returns_a_response_of_any_status() {
    let address = plain_server(0).await;
    let response = fetcher().fetch(get(&format!("http://{address}/keys?a=b")), LIMITS).await.unwrap();
    assert_eq!(response.status(), 418);
    let seen = String::from_utf8(response.into_body().to_vec()).unwrap();
    assert!(seen.starts_with("GET /keys?a=b HTTP/1.1\r\n"), "{seen}");
    assert!(seen.contains(&format!("host: {address}\r\n")), "{seen}");
}

#[tokio::test]
async fn a_too_long_response_is_not_read() {
    let address = plain_server(4096).await;
    let error = fetcher().fetch(get(&format!("http://{address}/")), LIMITS).await.unwrap_err();
    assert_eq!(error.to_string(), format!("the response of {address} is longer than 1024 bytes"));
}

#[tokio::test]
async fn connects_only_to_trusted_servers() {
    let directory = tempfile::tempdir().unwrap();
    let (address, ca) = tls_server(directory.path()).await;
    let url = format!("https://localhost:{}/", address.port());
    let untrusted = fetcher().fetch(get(&url), LIMITS).await.unwrap_err();
    assert!(untrusted.to_string().contains("UnknownIssuer"), "{untrusted}");
    let trusting = fetcher().with_roots_from(&ca).unwrap();
    assert_eq!(trusting.fetch(get(&url), LIMITS).await.unwrap().status(), 418);
    let by_address = trusting.fetch(get(&format!("https://{address}/")), LIMITS).await.unwrap_err();
    assert!(by_address.to_string().contains("not valid for name"), "{by_address}");
}

#[tokio::test(start_paused = true)]
async fn times_out() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let error = fetcher().fetch(get(&format!("http://{address}/")), LIMITS).await.unwrap_err();
    assert_eq!(error.to_string(), format!("{address} did not respond within 20s"));
}

#[tokio::test]
async fn errors_name_the_cause() {
    for (url, message) in [
        ("/keys", "`/keys` is not an http:// or https:// URL with a host"),
        ("ftp://a/", "`ftp://a/` is not an http:// or https:// URL with a host"),
        ("http://127.0.0.1:1/", "127.0.0.1:1 cannot be reached"),
    ] {
        let error = fetcher().fetch(get(url), LIMITS).await.unwrap_err();
        assert!(error.to_string().contains(message), "{error}");
    }
    let directory = tempfile::tempdir().unwrap();
    let empty = directory.path().join("empty.pem");
    std::fs::write(&empty, "").unwrap();
    let error = fetcher().with_roots_from(&empty).unwrap_err();
    assert_eq!(error.to_string(), format!("{}: no certificate in it", empty.display()));
}

#[tokio::test]
async fn fetch_is_send() {
    fn is_send<F: Future + Send>(future: F) -> F {
        future
    }
    let address = plain_server(0).await;
    is_send(fetcher().fetch(get(&format!("http://{address}/")), LIMITS)).await.unwrap();
}

#[tokio::test]
async fn redirects_are_not_followed() {
    const FOUND: &str = "HTTP/1.1 302 Found\r\nlocation: /elsewhere\r\ncontent-length: 0\r\n\r\n";
    let server = TestServer::start(Script { responses: &[FOUND, FOUND], end: End::Wait }).await;
    let response = fetcher().fetch(get(&server.url()), LIMITS).await.unwrap();
    assert_eq!(
        (response.status().as_u16(), &response.headers()["location"]),
        (302, &"/elsewhere".parse().unwrap())
    );
    assert_eq!(server.requests().len(), 1);
}

#[tokio::test]
async fn credentials_of_the_url_are_sent_and_not_shown() {
    let address = plain_server(0).await;
    let url = format!("http://user:secret@{address}?a=hidden");
    let response = fetcher().fetch(get(&url), LIMITS).await.unwrap();
    let seen = String::from_utf8(response.into_body().to_vec()).unwrap();
    assert!(seen.starts_with("GET /?a=hidden HTTP/1.1\r\n"), "{seen}");
    assert!(seen.contains("authorization: Basic dXNlcjpzZWNyZXQ=\r\n"), "{seen}");
    assert!(seen.contains(&format!("host: {address}\r\n")), "{seen}");
    assert!(!seen.contains("secret"), "{seen}");

    let silent = TestServer::start(Script { responses: &[], end: End::CloseOnRequest }).await;
    let slow = TestServer::start(Script { responses: &[], end: End::Wait }).await;
    let limits = FetchLimits { timeout: Duration::from_millis(100), ..LIMITS };
    for server in ["127.0.0.1:1".to_owned(), silent.address.to_string(), slow.address.to_string()] {
        let url = format!("http://user:secret@{server}/?a=hidden");
        let error = fetcher().fetch(get(&url), limits).await.unwrap_err();
        for text in [error.to_string(), format!("{error:?}")] {
            assert!(!text.contains("secret") && !text.contains("hidden"), "{text}");
        }
    }
}
