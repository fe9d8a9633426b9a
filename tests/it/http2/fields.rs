//! Header fields that HTTP/2 does not allow reset their stream and nothing else.

use std::sync::{Arc, Mutex};

use http::HeaderMap;

use crate::support::{
    Proxy, Upstream,
    h2::{self, DATA, End, H2Client},
    text,
};

const PROTOCOL_ERROR: u32 = 1;

fn proxy() -> (Upstream, Proxy) {
    // Reads the whole request before it responds.
    let upstream = Upstream::http1(|request| async {
        let _ = http_body_util::BodyExt::collect(request.into_body()).await;
        text("ok")
    });
    proxy_to(upstream)
}

fn proxy_to(upstream: Upstream) -> (Upstream, Proxy) {
    let proxy = Proxy::start(format!(
        "[[upstream]]\nname = \"up\"\nprotocol = \"http1\"\nendpoints = [\"{}\"]\n",
        upstream.address()
    ));
    (upstream, proxy)
}

/// RFC 9113 §8.2.1.
#[test]
fn whitespace_around_a_field_value_is_rejected() {
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
fn whitespace_around_a_trailer_value_is_rejected() {
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

/// RFC 9113 §8.5: CONNECT has no body, so it has no length.
#[test]
fn connect_with_content_length_is_rejected() {
    let (upstream, proxy) = proxy();
    let mut client = H2Client::connect(proxy.outbound());
    let authority = upstream.address().to_string();
    let fields = [(":method", "CONNECT"), (":authority", authority.as_str()), ("content-length", "5")];
    client.headers(1, &h2::block(&fields), false);
    assert_eq!(client.end_of(1), End::Reset(PROTOCOL_ERROR));
    client.must_get(101, "/after");
}

/// The requests inside a tunnel follow the rules of the forward proxy.
#[test]
fn a_connect_stream_forwards_bytes_both_ways() {
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

/// The `h2` library ends the connection for bytes that no field may contain.
#[test]
fn invalid_fields_reset_only_their_stream() {
    let seen = Arc::<Mutex<Vec<HeaderMap>>>::default();
    let log = seen.clone();
    let (_upstream, proxy) = proxy_to(Upstream::http1(move |request| {
        log.lock().expect("no panic").push(request.headers().clone());
        async { text("ok") }
    }));
    let mut client = H2Client::connect(proxy.outbound());
    let bad: [(&[u8], &[u8]); 9] = [
        (b"x-a", b"a\0b"),
        (b"x-a", b"a\r\nx-b: 1"),
        (b"x-a", b"\n"),
        (b"X-A", b"a"),
        (b"x a", b"a"),
        (b"", b"a"),
        (b":unknown", b"a"),
        (b"x-a:", b"a"),
        (b":path", b"/twice"),
    ];
    for (number, (name, value)) in bad.into_iter().enumerate() {
        for (turn, first) in [0x00, 0x10, 0x40].into_iter().enumerate() {
            let stream = 1 + 2 * (3 * number + turn) as u32;
            let mut block = h2::get("/");
            // As a literal of each kind; the last one enters the dynamic table.
            let mut field = h2::block(&[(name, value)]);
            field[0] = first;
            block.extend(field);
            client.headers(stream, &block, true);
            assert_eq!(client.end_of(stream), End::Reset(PROTOCOL_ERROR), "{name:?} {value:?} {first:#x}");
        }
    }
    // Entries beside them in the dynamic table are still found; the invalid field is still invalid; its name may be
    // used again.
    let indexed = |stream: u32, client: &mut H2Client, field: &[u8]| {
        client.headers(stream, &[&h2::get("/")[..], field].concat(), true);
        client.end_of(stream)
    };
    let in_table = |name: &str, value: &str| {
        let mut field = h2::block(&[(name, value)]);
        field[0] = 0x40;
        field
    };
    assert_eq!(indexed(1001, &mut client, &in_table("x-bad", "a\0")), End::Reset(PROTOCOL_ERROR));
    assert_eq!(indexed(1003, &mut client, &in_table("x-good", "1")), End::Response(Some(200)));
    assert_eq!(indexed(1005, &mut client, &[0xbe]), End::Response(Some(200)), "the good one");
    assert_eq!(indexed(1007, &mut client, &[0xbf]), End::Reset(PROTOCOL_ERROR), "the bad one");
    // Never indexed, with the name of the invalid field (index 63) and another value.
    assert_eq!(indexed(1009, &mut client, &[0x1f, 48, 2, b'o', b'k']), End::Response(Some(200)));
    let seen = seen.lock().expect("no panic");
    assert!(
        seen.iter().any(|fields| fields.get("x-bad").is_some_and(|value| value == "ok")),
        "{:?}",
        seen.last()
    );
    assert!(!seen.iter().any(|fields| fields.get("x-bad").is_some_and(|value| value != "ok")));
}

/// RFC 9113 §8.1.
#[test]
fn pseudo_header_fields_in_trailers_are_rejected() {
    let (_upstream, proxy) = proxy();
    let mut client = H2Client::connect(proxy.outbound());
    for (number, name) in [":path", ":status", ":method"].into_iter().enumerate() {
        let stream = 1 + 2 * number as u32;
        client.headers(stream, &h2::request("POST", "up", "/", &[]), false);
        client.send(h2::frame(DATA, 0, stream, b"body"));
        client.headers(stream, &h2::block(&[("x-a", "1"), (name, "200")]), true);
        assert_eq!(client.end_of(stream), End::Reset(PROTOCOL_ERROR), "{name}");
    }
    client.must_get(101, "/after");
}
