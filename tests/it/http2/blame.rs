//! Which side a failed exchange counts against: a client's error counts against no upstream, an endpoint's invalid
//! response affects no other stream of its connection.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    thread,
    time::Duration,
};

use serde_json::Value;

use super::proxy;
use crate::support::{
    Proxy, RawClient, Upstream,
    h2::{self, DATA, END_HEADERS, END_STREAM, H2Client, HEADERS, SETTINGS},
    text,
};

fn page(proxy: &Proxy, path: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    RawClient::connect(proxy.admin()).ask(request).text()
}

/// `h2` takes an empty Content-Length for 0. Over HTTP/1.1 nothing can be sent with it.
#[test]
fn an_invalid_content_length_counts_against_no_upstream() {
    let upstream = Upstream::http1(|_| async { text("ok") });
    let proxy = Proxy::start(format!(
        "[[upstream]]\nname = \"up\"\nprotocol = \"http1\"\nendpoints = [\"{}\"]\n",
        upstream.address()
    ));
    let mut client = H2Client::connect(proxy.outbound());
    let count = 60;
    for number in 0..count {
        let stream = 1 + 2 * number;
        client.headers(stream, &h2::request("POST", "up", "/", &[("content-length", "")]), true);
        let end = client.end_of(stream);
        assert!(matches!(end, h2::End::Response(Some(400)) | h2::End::Reset(1)), "{number}: {end:?}");
    }
    client.must_get(1 + 2 * count, "/after");
    let metrics = page(&proxy, "/metrics");
    let counted = format!("reason=\"malformed\"}} {count}");
    assert!(
        metrics.lines().any(|line| line.starts_with("outrigger_rejected_total") && line.ends_with(&counted)),
        "{metrics}"
    );
    let status: Value = serde_json::from_str(&page(&proxy, "/status")).expect("JSON");
    assert_eq!(status["upstreams"][0]["breaker"]["state"], "closed", "{status}");
}

/// What a server received, up to the end of its connection.
struct Peer(TcpStream);

impl Peer {
    fn accept(listener: &TcpListener) -> Self {
        let (mut stream, _) = listener.accept().expect("a connection");
        stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
        stream.read_exact(&mut [0; 24]).expect("the preface");
        stream.write_all(&h2::frame(SETTINGS, 0, 0, &[])).expect("written");
        Self(stream)
    }

    /// Kind and stream of the next frame.
    fn next(&mut self) -> Option<(u8, u32)> {
        let mut head = [0; 9];
        self.0.read_exact(&mut head).ok()?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        self.0.read_exact(&mut vec![0; length]).ok()?;
        Some((head[3], u32::from_be_bytes([head[5], head[6], head[7], head[8]])))
    }

    fn headers(&mut self, flags: u8, stream: u32, block: &[u8]) {
        self.0.write_all(&h2::frame(HEADERS, END_HEADERS | flags, stream, block)).expect("written");
    }
}

fn post(address: SocketAddr) -> u16 {
    RawClient::connect(address).ask("POST / HTTP/1.1\r\nHost: up\r\nContent-Length: 0\r\n\r\n").status()
}

/// A field that HTTP/2 does not allow, in head or trailers, in the dynamic table or not.
#[test]
fn an_invalid_response_field_resets_only_its_stream() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("bind");
    let address = listener.local_addr().expect("an address");
    let server = thread::spawn(move || {
        let mut peer = Peer::accept(&listener);
        let (mut first, mut goaway) = (None, false);
        while let Some((kind, stream)) = peer.next() {
            goaway |= kind == h2::GOAWAY;
            if kind != HEADERS {
                continue;
            }
            let Some(bad) = first.take() else {
                first = Some(stream);
                continue;
            };
            // Enters the dynamic table, from which the valid response takes the field before it.
            let good = [&[0x88, 0x40, 1, b'a', 1, b'1', 0x40, 5][..], b"X-Bad\x011"].concat();
            peer.headers(END_STREAM, bad, &good);
            peer.headers(0, stream, &[0x88, 0xbf]);
            peer.0.write_all(&h2::frame(DATA, END_STREAM, stream, b"well")).expect("written");
        }
        goaway
    });
    let proxy = proxy(address, "retry = false");
    for _ in 0..3 {
        let calls: Vec<_> =
            (0..2).map(|_| proxy.outbound()).map(|to| thread::spawn(move || post(to))).collect();
        let mut ends: Vec<u16> = calls.into_iter().map(|call| call.join().expect("no panic")).collect();
        ends.sort_unstable();
        assert_eq!(ends, [200, 502]);
    }
    let requests = page(&proxy, "/requests");
    assert!(requests.contains("not valid HTTP"), "{requests}");
    drop(proxy);
    assert!(!server.join().expect("no panic"), "GOAWAY");
}

/// RFC 9113 §5.3.2: a stream error. What its header block adds to the dynamic table stays there for later blocks.
#[test]
fn a_self_dependent_stream_resets_only_itself() {
    let upstream = Upstream::http1(|request| async move {
        let found = request.headers().get("x-a").is_some_and(|value| value == "1");
        text(if found { "found" } else { "lost" })
    });
    let proxy = Proxy::start(format!(
        "[[upstream]]\nname = \"up\"\nprotocol = \"http1\"\nendpoints = [\"{}\"]\n",
        upstream.address()
    ));
    const PRIORITY_FLAG: u8 = 0x20;
    let mut client = H2Client::connect(proxy.outbound());
    let with_entry = [&[0, 0, 0, 1, 16][..], &h2::get("/"), b"\x40\x03x-a\x011"].concat();
    client.send(h2::frame(HEADERS, END_HEADERS | END_STREAM | PRIORITY_FLAG, 1, &with_entry));
    assert_eq!(client.end_of(1), h2::End::Reset(1));
    client.headers(3, &[&h2::get("/")[..], &[0xbe]].concat(), true);
    assert_eq!(client.next_of(3).kind, HEADERS);
    assert_eq!(client.next_of(3).payload, b"found");
}
