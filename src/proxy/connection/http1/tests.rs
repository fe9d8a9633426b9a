//! A whole connection against clients of every kind, in virtual time. Responses are injected faults, some delayed.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use tokio::io::{AsyncReadExt, AsyncWriteExt, BufWriter, DuplexStream, duplex};

use super::{super::HEADER_TIMEOUT, *};
use crate::{
    config::{Source, Sources, load_sources},
    model::Side,
    proxy::worker::{Phase, Worker},
    runtime::{self, Proxy},
};

const SLOW: Duration = Duration::from_secs(5);
pub(super) const CONFIG: &str = r#"
    inbound.listen = "127.0.0.1:0"
    outbound.listen = "127.0.0.1:0"
    [[upstream]]
    name = "fast"
    endpoints = ["127.0.0.1:1"]
    fault = { abort = 503, abort_ratio = 1.0 }
    [[upstream]]
    name = "slow"
    endpoints = ["127.0.0.1:1"]
    fault = { delay = "5s", delay_ratio = 1.0, abort = 503, abort_ratio = 1.0 }
"#;

/// Serves one connection while `client` runs; returns how it ended.
async fn serve<F: Future>(
    buffer: usize,
    client: impl FnOnce(Client, Arc<crate::proxy::worker::Shared>) -> F,
) -> (Result<(), ConnectionError>, F::Output) {
    let source = Source { path: PathBuf::from("test.toml"), text: CONFIG.to_owned() };
    let loaded = load_sources(Sources(vec![source]), &|_| None).unwrap();
    let proxy: Proxy = runtime::start(loaded.config, Arc::default(), 1).unwrap();
    let worker = Worker::new(Arc::clone(&proxy.shared), 0);
    let address: SocketAddr = "192.0.2.1:1000".parse().unwrap();
    let connection = Connection::new(&worker, Side::Outbound, address, None);
    let (near, far) = duplex(buffer);
    // Dropped after it was served, as a socket is.
    let served = async { connection.serve_http1(Box::new(far), Bytes::new()).await };
    let outcome = tokio::join!(served, client(Client(near, Vec::new()), Arc::clone(&proxy.shared)));
    proxy.stop();
    outcome
}

pub(super) struct Client(pub(super) DuplexStream, pub(super) Vec<u8>);

impl Client {
    pub(super) async fn send(&mut self, bytes: &str) {
        self.0.write_all(bytes.as_bytes()).await.unwrap();
    }

    /// The head of the next response, which has no body.
    pub(super) async fn head(&mut self) -> String {
        let end = loop {
            if let Some(at) = self.1.windows(4).position(|four| four == b"\r\n\r\n") {
                break at + 4;
            }
            assert_ne!(self.0.read_buf(&mut self.1).await.unwrap(), 0, "closed after {:?}", self.1);
        };
        String::from_utf8(self.1.drain(..end).collect()).unwrap()
    }

    /// The head of the next response, whose body is read and dropped.
    pub(super) async fn response(&mut self) -> String {
        let head = self.head().await;
        let length = head.split("content-length: ").nth(1).and_then(|rest| rest.split('\r').next());
        let length: usize = length.map_or(0, |length| length.parse().unwrap());
        while self.1.len() < length {
            assert_ne!(self.0.read_buf(&mut self.1).await.unwrap(), 0, "closed within a body");
        }
        self.1.drain(..length);
        head
    }

    pub(super) async fn is_closed(&mut self) -> bool {
        self.1.is_empty() && matches!(self.0.read(&mut [0]).await, Ok(0) | Err(_))
    }
}

const GET: &str = "GET / HTTP/1.1\r\nhost: fast\r\n\r\n";
const GET_SLOW: &str = "GET / HTTP/1.1\r\nhost: slow\r\n\r\n";

fn is_cut(ended: &Result<(), ConnectionError>, why: &str) -> bool {
    matches!(ended, Err(ConnectionError::Cut(text)) if text.contains(why))
}

#[tokio::test(start_paused = true)]
async fn responses_are_in_the_order_of_the_requests() {
    let (ended, ()) = serve(1 << 16, |mut client, _| async move {
        client.send(&format!("{GET_SLOW}{GET}\r\n{}", &GET[..9])).await;
        let begun = Instant::now();
        assert!(client.response().await.starts_with("HTTP/1.1 503 "));
        assert_eq!(begun.elapsed(), SLOW);
        assert!(client.response().await.starts_with("HTTP/1.1 503 "));
        for byte in GET[9..].chars() {
            client.send(&byte.to_string()).await;
        }
        let response = client.response().await;
        assert!(response.contains("\r\ndate: ") && !response.contains("connection:"), "{response}");
        client.send("GET / HTTP/1.1\r\nhost: fast\r\nconnection: close\r\n\r\n").await;
        assert!(client.response().await.contains("connection: close"));
        assert!(client.is_closed().await);
    })
    .await;
    ended.unwrap();
}

/// Requests are parsed alike wherever their bytes are split.
#[tokio::test(start_paused = true)]
async fn requests_may_be_split_anywhere() {
    const REQUESTS: &str = concat!(
        "\r\nGET / HTTP/1.1\r\nhost: slow\r\n\r\n",
        "POST / HTTP/1.1\r\nhost: slow\r\ncontent-length: 4\r\n\r\nbody",
        "POST / HTTP/1.1\r\nhost: slow\r\ntransfer-encoding: chunked\r\n\r\n",
        "3;x=y\r\nabc\r\n1\r\nd\r\n0\r\nx-sum: 1\r\n\r\n",
        "HEAD / HTTP/1.0\r\nhost: slow\r\nconnection: keep-alive\r\n\r\n",
    );
    let (ended, ()) = serve(1 << 16, |mut client, _| async move {
        for at in 1..REQUESTS.len() {
            client.send(&REQUESTS[..at]).await;
            tokio::time::sleep(Duration::from_millis(1)).await;
            client.send(&REQUESTS[at..]).await;
            for kept in ["HTTP/1.1 503 ", "HTTP/1.1 503 ", "HTTP/1.1 503 "] {
                let response = client.response().await;
                assert!(
                    response.starts_with(kept) && !response.contains("connection:"),
                    "cut at {at}: {response}"
                );
            }
            let last = client.head().await;
            assert!(last.starts_with("HTTP/1.0 503 ") && last.contains("connection: keep-alive"), "{last}");
        }
    })
    .await;
    ended.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_incomplete_head_times_out() {
    let begun = Instant::now();
    let (ended, ()) = serve(1 << 16, |mut client, _| async move {
        client.send(GET).await;
        client.response().await;
        client.send("GET / HT").await;
        assert!(client.is_closed().await);
    })
    .await;
    assert!(is_cut(&ended, "head took too long"), "{ended:?}");
    assert_eq!(begun.elapsed(), HEADER_TIMEOUT);
}

/// Some clients send an empty line after a body (RFC 9112 §2.2).
#[tokio::test(start_paused = true)]
async fn an_empty_line_after_a_body_begins_no_head() {
    for blank in ["\r\n", "\r", "\r\n\r\n"] {
        let (ended, ()) = serve(1 << 16, |mut client, _| async move {
            client
                .send(&format!("POST / HTTP/1.1\r\nhost: fast\r\ncontent-length: 4\r\n\r\nbody{blank}"))
                .await;
            client.response().await;
            tokio::time::sleep(2 * HEADER_TIMEOUT).await;
            client.send(if blank == "\r" { "\n" } else { "" }).await;
            client.send(GET).await;
            assert!(client.response().await.starts_with("HTTP/1.1 503 "), "{blank:?}");
        })
        .await;
        ended.unwrap();
    }
    // Nor does it hide that the client has closed.
    let begun = Instant::now();
    let slow = format!("{GET_SLOW}\r\n");
    let (ended, ()) = serve(1 << 16, |mut client, _| async move { client.send(&slow).await }).await;
    assert!(ended.is_err());
    assert_eq!(begun.elapsed(), Duration::ZERO);
}

/// Bytes that follow a CONNECT are meant for its tunnel, whether or not there is one.
#[tokio::test(start_paused = true)]
async fn a_connection_ends_after_a_refused_connect() {
    for host in ["unknown", "unknown:80", "/path", "127.0.0.1:1"] {
        let (ended, ()) = serve(1 << 16, |mut client, _| async move {
            client.send(&format!("CONNECT {host} HTTP/1.1\r\nhost: fast\r\n\r\n{GET}")).await;
            let response = client.response().await;
            assert!(response.contains("connection: close"), "{host}: {response}");
            client.0.shutdown().await.unwrap();
            assert!(client.is_closed().await, "{host}: {:?}", client.1);
        })
        .await;
        ended.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_ends_after_an_hour() {
    let begun = Instant::now();
    let (ended, ()) = serve(1 << 16, |mut client, _| async move {
        client.send(GET).await;
        client.response().await;
        assert!(client.is_closed().await);
    })
    .await;
    assert!(is_cut(&ended, "idle"), "{ended:?}");
    assert_eq!(begun.elapsed(), super::super::CLIENT_IDLE_TIMEOUT);
}

#[tokio::test(start_paused = true)]
async fn a_request_ends_when_its_client_closes() {
    for (request, ends_well) in [(GET_SLOW, false), ("", true), ("GET / HT", true)] {
        let begun = Instant::now();
        let (ended, ()) = serve(1 << 16, |mut client, _| async move { client.send(request).await }).await;
        assert_eq!(ended.is_ok(), ends_well, "{request:?}: {ended:?}");
        assert_eq!(begun.elapsed(), Duration::ZERO, "{request:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_unneeded_body_is_read_if_it_has_arrived() {
    let (ended, ()) = serve(1 << 16, |mut client, _| async move {
        for framing in
            ["content-length: 4\r\n\r\nbody", "transfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"]
        {
            client.send(&format!("POST / HTTP/1.1\r\nhost: fast\r\n{framing}")).await;
            assert!(!client.response().await.contains("connection:"), "{framing}");
        }
        client.send(GET).await;
        client.response().await;
    })
    .await;
    ended.unwrap();
}

/// What else the client sends is dropped for a while, so that the response is not lost.
#[tokio::test(start_paused = true)]
async fn a_long_unneeded_body_closes_the_connection_after_the_response() {
    let begun = Instant::now();
    let (ended, _client) = serve(4096, |mut client, _| async move {
        client.send("POST / HTTP/1.1\r\nhost: fast\r\ncontent-length: 1000000\r\n\r\n").await;
        for _ in 0..50 {
            client.send(&"x".repeat(10_000)).await;
        }
        assert!(client.response().await.contains("connection: close"));
        assert!(client.is_closed().await);
        client
    })
    .await;
    assert!(is_cut(&ended, "does not close the connection"), "{ended:?}");
    assert_eq!(begun.elapsed(), Duration::from_secs(2));
}

#[tokio::test(start_paused = true)]
async fn no_100_continue_is_sent_for_an_unneeded_body() {
    let (ended, ()) = serve(4096, |mut client, _| async move {
        client
            .send("POST / HTTP/1.1\r\nhost: fast\r\ncontent-length: 5\r\nexpect: 100-continue\r\n\r\n")
            .await;
        let response = client.response().await;
        assert!(
            response.starts_with("HTTP/1.1 503 ") && response.contains("connection: close"),
            "{response}"
        );
    })
    .await;
    ended.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_client_that_reads_nothing_is_cut() {
    let begun = Instant::now();
    let (ended, _client) = serve(64, |mut client, _| async move {
        client.send(GET).await;
        client
    })
    .await;
    assert!(is_cut(&ended, "reads nothing"), "{ended:?}");
    assert_eq!(begun.elapsed(), super::super::WRITE_STALL_TIMEOUT);
}

#[tokio::test(start_paused = true)]
async fn invalid_requests_are_refused() {
    for (bytes, status) in [
        ("GET / HTTP/1.1\r\nhost: fast\r\na b: 1\r\n\r\n", 400),
        ("GET / HTTP/3.0\r\n\r\n", 400),
        ("GET /a#b HTTP/1.1\r\nhost: fast\r\n\r\n", 400),
        ("GET /a b HTTP/1.1\r\nhost: fast\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nhost: [::1%zone]\r\n\r\n", 400),
        ("GET http://[::1%25zone]/ HTTP/1.1\r\nhost: a\r\n\r\n", 400),
        ("POST / HTTP/1.1\r\nhost: fast\r\ncontent-length: 1x\r\n\r\n", 400),
        ("POST / HTTP/1.1\r\nhost: fast\r\ncontent-length: 1, 1\r\n\r\n", 400),
        ("POST / HTTP/1.1\r\nhost: fast\r\ntransfer-encoding: gzip\r\n\r\n", 400),
        (&format!("GET / HTTP/1.1\r\n{}\r\n", "a: 1\r\n".repeat(101)), 431),
        (&format!("GET / HTTP/1.1\r\na: {}", "x".repeat(70_000)), 431),
    ] {
        let (ended, response) = serve(1 << 18, |mut client, _| async move {
            client.send(bytes).await;
            let response = client.response().await;
            client.0.shutdown().await.unwrap();
            assert!(client.is_closed().await);
            response
        })
        .await;
        ended.unwrap();
        assert!(response.starts_with(&format!("HTTP/1.1 {status} ")), "{bytes:.40?}: {response}");
        assert!(response.contains("connection: close"), "{response}");
        assert!(
            response.contains("application/problem+json") && response.contains("malformed"),
            "{response}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn http_1_0_is_kept_alive_if_it_requests_that() {
    let (ended, ()) = serve(1 << 16, |mut client, _| async move {
        client.send("GET / HTTP/1.0\r\nhost: fast\r\nconnection: keep-alive\r\n\r\n").await;
        let response = client.response().await;
        assert!(
            response.starts_with("HTTP/1.0 ") && response.contains("connection: keep-alive"),
            "{response}"
        );
        client.send("GET / HTTP/1.0\r\nhost: fast\r\n\r\n").await;
        assert!(!client.response().await.contains("keep-alive"));
        assert!(client.is_closed().await);
    })
    .await;
    ended.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_draining_connection_serves_its_last_request() {
    let begun = Instant::now();
    let (ended, _stays) = serve(1 << 16, |mut client, shared| async move {
        client.send(GET).await;
        client.response().await;
        shared.phase.send_replace(Phase::DrainingAll);
        assert!(client.is_closed().await, "idle");
        client
    })
    .await;
    ended.unwrap();
    assert_eq!(begun.elapsed(), super::super::CLOSE_GRACE);
    let (ended, ()) = serve(1 << 16, |mut client, shared| async move {
        client.send(GET_SLOW).await;
        tokio::time::sleep(SLOW / 2).await;
        shared.phase.send_replace(Phase::DrainingAll);
        assert!(client.response().await.contains("connection: close"));
        assert!(client.is_closed().await, "after the request in progress");
    })
    .await;
    ended.unwrap();
}

/// The reader of a body may be another task than the one that serves the connection.
#[tokio::test(start_paused = true)]
async fn a_body_breaks_off_when_its_connection_is_cut() {
    let (mut near, far) = duplex(1 << 16);
    let served = ConnectionGuard(ServerConnection::new(Box::new(far), Bytes::new()));
    let mut body = ServerConnection::begin_request(&served.0, Framing::Length(10), false);
    near.write_all(b"half").await.unwrap();
    let reads = async {
        let first = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await;
        assert_eq!(first.unwrap().unwrap().into_data().unwrap(), "half");
        poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await
    };
    let cut = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        drop(served);
    };
    let (second, ()) = tokio::join!(reads, cut);
    assert!(matches!(second, Some(Err(Error::UnexpectedEnd))), "{second:?}");
    assert!(!body.is_end_stream(), "half a body has not ended");
    assert_eq!(near.read(&mut [0]).await.unwrap(), 0, "the stream is closed although the body is still held");
}

/// TLS buffers records: a response is written when the socket has taken its last record.
#[tokio::test(start_paused = true)]
async fn a_response_is_written_when_its_last_record_is() {
    let (mut near, far) = duplex(64);
    // Like TLS, it accepts all bytes and passes them on when it is flushed.
    let connection = ServerConnection::new(Box::new(BufWriter::new(far)), Bytes::new());
    connection.borrow_mut().outlet.head_buffer().extend_from_slice(&[b'x'; 1000]);
    let first = poll_fn(|cx| Poll::Ready(connection.borrow_mut().poll_flush(cx))).await;
    assert!(first.is_pending() && connection.borrow().outlet.is_empty());
    let is_blocked = || connection.borrow().next_deadline(None).1.contains("reads nothing");
    assert!(is_blocked());
    let mut got = Vec::new();
    let reads = async {
        while got.len() < 1000 {
            assert_ne!(near.read_buf(&mut got).await.unwrap(), 0, "cut after {} bytes", got.len());
        }
    };
    let flushes = async {
        poll_fn(|cx| connection.borrow_mut().poll_flush(cx)).await.unwrap();
        // What the socket has not taken by now is lost.
        connection.borrow_mut().shut_down();
    };
    tokio::join!(flushes, reads);
    assert!(!is_blocked());
}
