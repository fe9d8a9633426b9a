//! Fields that HTTP/2 does not allow end their stream, and nothing else.

use crate::support::{
    Proxy, Upstream,
    h2::{self, DATA, End, H2Client},
    text,
};

const PROTOCOL_ERROR: u32 = 1;

fn proxy() -> (Upstream, Proxy) {
    let upstream = Upstream::http1(|_| async { text("ok") });
    let proxy = Proxy::start(format!(
        "[[upstream]]\nname = \"up\"\nprotocol = \"http1\"\nendpoints = [\"{}\"]\n",
        upstream.address()
    ));
    (upstream, proxy)
}

/// RFC 9113 §8.2.1.
#[test]
fn blanks_around_a_value_are_refused() {
    let (_upstream, proxy) = proxy();
    let mut client = H2Client::connect(proxy.outbound());
    for (number, value) in [" a", "a ", "\ta", "a\t", " "].into_iter().enumerate() {
        let stream = 1 + 2 * number as u32;
        client.headers(stream, &h2::request("GET", "up", "/", &[("x-a", value)]), true);
        assert_eq!(client.end_of(stream), End::Reset(PROTOCOL_ERROR), "{value:?}");
    }
    client.must_get(101, "/after");
}

#[test]
fn blanks_around_the_value_of_a_trailer_are_refused() {
    let (_upstream, proxy) = proxy();
    let mut client = H2Client::connect(proxy.outbound());
    for (number, value) in [" a", "a\t"].into_iter().enumerate() {
        let stream = 1 + 2 * number as u32;
        client.headers(stream, &h2::request("POST", "up", "/", &[]), false);
        client.send(h2::frame(DATA, 0, stream, b"body"));
        client.headers(stream, &h2::block(&[("x-a", value)]), true);
        assert_eq!(client.end_of(stream), End::Reset(PROTOCOL_ERROR), "{value:?}");
    }
    client.must_get(101, "/after");
}

/// RFC 9113 §8.5: there is no body, so there is no length.
#[test]
fn a_connect_with_a_length_is_refused() {
    let (upstream, proxy) = proxy();
    let mut client = H2Client::connect(proxy.outbound());
    let authority = upstream.address().to_string();
    let fields = [(":method", "CONNECT"), (":authority", authority.as_str()), ("content-length", "5")];
    client.headers(1, &h2::block(&fields), false);
    assert_eq!(client.end_of(1), End::Reset(PROTOCOL_ERROR));
    client.must_get(101, "/after");
}

/// What is inside of a tunnel is served by its own rules.
#[test]
fn a_tunnel_inside_a_stream_carries_bytes_both_ways() {
    let (upstream, proxy) = proxy();
    let mut client = H2Client::connect(proxy.outbound());
    let authority = upstream.address().to_string();
    client.headers(1, &h2::block(&[(":method", "CONNECT"), (":authority", authority.as_str())]), false);
    let head = client.next_of(1);
    assert_eq!(head.kind, h2::HEADERS);
    client.send(h2::frame(DATA, 0, 1, b"GET / HTTP/1.1\r\nHost: up\r\nConnection: close\r\n\r\n"));
    let mut text = String::new();
    loop {
        let frame = client.next_of(1);
        text.push_str(&String::from_utf8_lossy(&frame.payload));
        if frame.kind != DATA || frame.flags & h2::END_STREAM != 0 {
            break;
        }
    }
    assert!(text.starts_with("HTTP/1.1 200") && text.ends_with("ok"), "{text:?}");
}
