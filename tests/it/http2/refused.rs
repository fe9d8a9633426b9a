//! Rejected HTTP/2 requests are reported like HTTP/1.1 ones: counted once and logged with their target. What every
//! server accepts is forwarded.

use std::{net::SocketAddr, sync::mpsc};

use http_body_util::BodyExt;
use serde_json::Value;

use crate::{
    support::{
        Proxy, RawClient, Upstream, WAIT_LIMIT, eventually,
        h2::{self, DATA, End, H2Client},
        text,
    },
    wire::{UNUSUAL, config, last_request, malformed, start_line_server},
};

const PROTOCOL_ERROR: u32 = 1;
const CONTINUATION: u8 = h2::CONTINUATION;

fn service() -> Upstream {
    Upstream::http1(|request| async {
        let _ = request.into_body().collect().await;
        text("ok")
    })
}

fn listeners(proxy: &Proxy) -> [(&'static str, SocketAddr); 3] {
    [("other", proxy.outbound()), ("up", proxy.upstream("up")), ("inbound", proxy.inbound())]
}

/// The last request is logged as malformed with this status and these words.
fn is_logged(proxy: &Proxy, status: u16, words: &[&str]) {
    eventually("it is among the last requests", || {
        let last = last_request(proxy);
        let why = last["why"].as_str().unwrap_or_default();
        last["reason"] == "malformed"
            && last["status"] == status
            && words.iter().all(|word| why.contains(word))
    });
}

/// The number of malformed requests for `up` is `count` after this one.
fn is_counted(proxy: &Proxy, count: u64, what: &str) {
    let began = std::time::Instant::now();
    while malformed(proxy, "up") != count {
        let found = malformed(proxy, "up");
        assert!(began.elapsed() < WAIT_LIMIT, "{what}: {found} of {count} counted; {}", last_request(proxy));
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

#[test]
fn rejected_http2_requests_are_counted_once_and_logged_with_their_target() {
    let service = service();
    let proxy = Proxy::start(format!(
        "[inbound]\nforward_to = \"{0}\"\n[[inbound.port]]\nport = {1}\nprotocol = \"http1\"\n\
         [[upstream]]\nname = \"up\"\nprotocol = \"http1\"\nlisten = \"127.0.0.1:0\"\nendpoints = [\"{0}\"]\n",
        service.address(),
        service.address().port()
    ));
    let with = |path: &str, field: (&str, &str)| h2::request("GET", "up", path, &[field]);
    let big = "a".repeat(16_000);
    let too_large: Vec<(&str, &str)> = vec![("x-a", &big); 5];
    let cases: Vec<(Vec<u8>, End, u16, Vec<&str>)> = vec![
        (
            with("/blank?token=hush", ("x-a", " a")),
            End::Reset(PROTOCOL_ERROR),
            400,
            vec!["blank", "/blank?…"],
        ),
        (
            with("/nul?token=hush", ("x-a", "a\0b")),
            End::Reset(PROTOCOL_ERROR),
            400,
            vec!["not allowed", "/nul?…"],
        ),
        (with("/name", ("X-A", "a")), End::Reset(PROTOCOL_ERROR), 400, vec!["name", "`/name`"]),
        (with("/te", ("te", "gzip")), End::Reset(PROTOCOL_ERROR), 400, vec!["TE", "`/te`"]),
        (with("/hop", ("connection", "close")), End::Reset(PROTOCOL_ERROR), 400, vec!["HTTP/1.1", "`/hop`"]),
        (with("/twice", (":path", "/x")), End::Reset(PROTOCOL_ERROR), 400, vec!["pseudo-header"]),
        (with("/a b", ("x-a", "a")), End::Reset(PROTOCOL_ERROR), 400, vec!["a space", "`/a b`"]),
        (
            with("/length", ("content-length", "+5")),
            End::Reset(PROTOCOL_ERROR),
            400,
            vec!["Content-Length", "`/length`"],
        ),
        (with("/body", ("content-length", "5")), End::Reset(PROTOCOL_ERROR), 400, vec!["9113"]),
        (h2::block(&[(":method", "GET"), (":path", "/")]), End::Reset(PROTOCOL_ERROR), 400, vec!["9113"]),
        (h2::request("GET", "u p", "/", &[]), End::Reset(PROTOCOL_ERROR), 400, vec!["9113"]),
        (
            h2::block(&[(":method", "CONNECT"), (":authority", "up:80"), ("content-length", "5")]),
            End::Reset(PROTOCOL_ERROR),
            400,
            vec!["9113"],
        ),
        (h2::request("GET", "up", "/l", &too_large), End::Response(Some(431)), 431, vec!["too large"]),
        (
            h2::request("GET", "up", "/a?b#frag", &[]),
            End::Response(Some(400)),
            400,
            vec!["a fragment", "`/a?…`"],
        ),
        (h2::request("GET", "up", "/\"#", &[]), End::Response(Some(400)), 400, vec!["a fragment"]),
    ];
    let mut lines = 0;
    for (upstream, address) in listeners(&proxy) {
        let mut client = H2Client::connect(address);
        for (at, (block, end, status, words)) in cases.iter().enumerate() {
            let stream = 1 + 2 * at as u32;
            send_block(&mut client, stream, block);
            assert_eq!(client.end_of(stream), *end, "{words:?}");
            lines += 1;
            eventually("it is counted", || malformed(&proxy, upstream) == 1 + at as u64);
            is_logged(&proxy, *status, words);
        }
        client.must_get(1001, "/after");
        assert_eq!(malformed(&proxy, upstream), cases.len() as u64);
        lines += 1;
    }
    eventually("all are in the access log", || proxy.stdout().lines().count() >= lines - 3);
    assert!(!proxy.stdout().contains("hush"), "a query may hold secrets");
}

/// Sends a whole request in as many frames as it needs.
fn send_block(client: &mut H2Client, stream: u32, block: &[u8]) {
    send_fields(client, stream, block, true);
}

fn send_fields(client: &mut H2Client, stream: u32, block: &[u8], ends: bool) {
    let mut parts = block.chunks(16_000).peekable();
    let (mut kind, mut flags) = (h2::HEADERS, if ends { h2::END_STREAM } else { 0 });
    while let Some(part) = parts.next() {
        let last = if parts.peek().is_none() { h2::END_HEADERS } else { 0 };
        client.send(h2::frame(kind, flags | last, stream, part));
        (kind, flags) = (CONTINUATION, 0);
    }
}

/// The response to a rejected target says what is wrong, as over HTTP/1.1.
#[test]
fn a_fragment_in_a_path_is_answered_with_400() {
    let service = service();
    let proxy = Proxy::start(config(service.address()));
    let mut client = H2Client::connect(proxy.outbound());
    client.headers(1, &h2::get("/a#frag"), true);
    let head = client.next_of(1);
    assert_eq!((head.kind, &head.payload[..1]), (h2::HEADERS, &[0x8c][..]), "400");
    let body: Value = serde_json::from_slice(&client.next_of(1).payload).expect("JSON");
    assert_eq!((&body["cause"], &body["status"]), (&"malformed".into(), &400.into()), "{body}");
}

/// Characters that RFC 3986 forbids and every server accepts are forwarded byte for byte, also when a client's encoder
/// takes them from its dynamic table.
#[test]
fn unusual_paths_are_forwarded_byte_for_byte() {
    let (server, seen) = start_line_server();
    let proxy = Proxy::start(format!(
        "[inbound]\nforward_to = \"{0}\"\n[[inbound.port]]\nport = {1}\nprotocol = \"http1\"\n\
         [[upstream]]\nname = \"up\"\nprotocol = \"http1\"\nendpoints = [\"{0}\"]\n",
        server.address(),
        server.address().port()
    ));
    for address in [proxy.outbound(), proxy.inbound()] {
        let mut client = H2Client::connect(address);
        let mut stream = 1;
        for target in UNUSUAL {
            let line = [b"GET ", target, b" HTTP/1.1"].concat();
            let head = h2::block(&[(":method", "GET"), (":scheme", "http"), (":authority", "up")]);
            let mut path = h2::block(&[(&b":path"[..], target)]);
            // A literal that enters the dynamic table; then its first entry; then a literal with the name of that
            // entry.
            path[0] = 0x40;
            let again = [&[0x0f, 62 - 15][..], &path[7..]].concat();
            for path in [&path[..], &[0xbe], &again] {
                client.headers(stream, &[&head[..], path].concat(), true);
                assert_eq!(client.end_of(stream), End::Response(Some(200)), "{}", target.escape_ascii());
                assert_eq!(
                    seen.recv_timeout(WAIT_LIMIT).expect("a request"),
                    line,
                    "{}",
                    target.escape_ascii()
                );
                stream += 2;
            }
        }
    }
}

/// Malformed or too large trailers reset their stream; nothing is truncated, and other streams are not affected.
#[test]
fn malformed_request_trailers_reset_only_their_stream() {
    // The service records each request before it reads the body.
    let (saw, seen) = mpsc::channel();
    let handle = move |request: http::Request<hyper::body::Incoming>| {
        let _ = saw.send(());
        async {
            let _ = request.into_body().collect().await;
            text("ok")
        }
    };
    let services = [Upstream::http1(handle.clone()), Upstream::h2c(handle)];
    let value = "a".repeat(1000);
    let many = |count: usize| -> Vec<u8> {
        (0..count).flat_map(|at| h2::block(&[(format!("x-{at}"), value.clone())])).collect()
    };
    for (service, protocol) in services.iter().zip(["http1", "h2"]) {
        let proxy = Proxy::start(format!(
            "[[upstream]]\nname = \"up\"\nprotocol = \"{protocol}\"\nendpoints = [\"{}\"]\n",
            service.address()
        ));
        let mut client = H2Client::connect(proxy.outbound());
        let mut counted = 0;
        for (at, (trailers, is_bad)) in [
            (many(50), false),
            (many(70), true),
            (many(300), true),
            (many(50), false),
            (h2::block(&[("x-a", " a")]), true),
            (h2::block(&[("x-a", "a\0b")]), true),
            (h2::block(&[(":path", "/b")]), true),
        ]
        .into_iter()
        .enumerate()
        {
            let stream = 1 + 2 * at as u32;
            client.headers(stream, &h2::request("POST", "up", "/", &[("te", "trailers")]), false);
            client.send(h2::frame(DATA, 0, stream, b"body"));
            seen.recv_timeout(WAIT_LIMIT).expect("a request");
            send_fields(&mut client, stream, &trailers, true);
            let end = if is_bad { End::Reset(PROTOCOL_ERROR) } else { End::Response(Some(200)) };
            assert_eq!(client.end_of(stream), end, "{protocol}, case {at}");
            if is_bad {
                counted += 1;
                is_counted(&proxy, counted, &format!("{protocol}, case {at}"));
                is_logged(&proxy, 400, &["trailers"]);
                assert_eq!(last_request(&proxy)["attempts"][0]["outcome"], "client_error");
            }
        }
        // Data whose length does not match Content-Length.
        client.headers(101, &h2::request("POST", "up", "/", &[("content-length", "5")]), false);
        seen.recv_timeout(WAIT_LIMIT).expect("a request");
        client.send(h2::frame(DATA, h2::END_STREAM, 101, b"body"));
        assert_eq!(client.end_of(101), End::Reset(PROTOCOL_ERROR));
        is_counted(&proxy, counted + 1, protocol);
        client.must_get(103, "/after");
        seen.recv_timeout(WAIT_LIMIT).expect("a request");
    }
}

/// Above 1 MiB the `h2` library drops fields silently.
#[test]
fn a_response_with_dropped_trailers_is_reset() {
    let upstream = Upstream::h2c(|request| async move {
        let size: usize = request.uri().path().trim_start_matches('/').parse().unwrap_or(0);
        let mut trailers = http::HeaderMap::new();
        trailers.insert("x-large", http::HeaderValue::try_from("a".repeat(size)).expect("a value"));
        trailers.insert("x-sum", http::HeaderValue::from_static("7"));
        let body = http_body_util::Full::new(bytes::Bytes::from_static(b"abc"))
            // A body of unknown length.
            .map_frame(|frame| frame)
            .with_trailers(async { Some(Ok(trailers)) });
        http::Response::new(body.boxed_unsync())
    });
    let proxy = Proxy::start(format!(
        "[[upstream]]\nname = \"up\"\nprotocol = \"h2\"\nendpoints = [\"{}\"]\nbreaker = false\noutlier = false\n",
        upstream.address()
    ));
    let get = |size: usize| {
        let mut client = RawClient::connect(proxy.outbound());
        client.send(format!("GET /{size} HTTP/1.1\r\nHost: up\r\nTE: trailers\r\nConnection: close\r\n\r\n"));
        String::from_utf8_lossy(&client.read_to_close().0).into_owned()
    };
    for size in [70_000, 1_000_000, 1_040_000, 1_100_000, 1_500_000] {
        let got = get(size);
        assert!(!got.contains("\r\n0\r\n"), "{size}: {got}");
    }
    let got = get(1000);
    assert!(got.starts_with("HTTP/1.1 200") && got.contains("\r\n0\r\n"), "{got}");
}
