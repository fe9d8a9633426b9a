//! Clients that try to exhaust the proxy: their connection is closed, another one survives (CVE-2023-44487,
//! CVE-2025-8671, VU#421644, CVE-2019-9511 and following).

use std::time::Duration;

use crate::support::{
    Proxy, RawClient, RawServer, Upstream,
    h2::{self, End, Frame, H2Client},
    text,
};

/// Runs the flood, which returns how the request ended for the client. The connection must be closed by then, memory
/// must not have grown much, and another connection must survive.
#[track_caller]
fn assert_connection_ends(proxy: &Proxy, address: std::net::SocketAddr, flood: impl FnOnce(&mut H2Client)) {
    let mut bystander = H2Client::connect(address);
    bystander.must_get(1, "/before");
    let before = proxy.resident_kib();
    let mut client = H2Client::connect(address);
    flood(&mut client);
    let end = loop {
        match client.next() {
            Ok(Frame { kind: h2::GOAWAY, payload, .. }) if payload.get(7).is_some_and(|&code| code != 0) => {
                break None;
            }
            Ok(_) => {}
            Err(end) => break Some(end),
        }
    };
    assert_ne!(end, Some(End::Silent), "the connection lives on");
    let grown = proxy.resident_kib().saturating_sub(before);
    assert!(grown < 32 * 1024, "resident memory has grown by {grown} KiB");
    bystander.must_get(3, "/after");
}

fn proxy() -> (Upstream, Proxy) {
    let upstream = Upstream::http1(|_| async { text("ok") });
    let config = format!(
        "[inbound]\nforward_to = \"{0}\"\n[[inbound.port]]\nport = {1}\nprotocol = \"http1\"\n\
         [[upstream]]\nname = \"up\"\nprotocol = \"http1\"\nendpoints = [\"{0}\"]\n",
        upstream.address(),
        upstream.address().port()
    );
    (upstream, Proxy::start(config))
}

/// Requests that are cancelled as soon as they are sent.
#[test]
fn rapid_reset_flood_ends_its_connection_only() {
    // A slow service: the requests that reach it are the cost of the attack.
    let slow = RawServer::start(|mut stream| {
        use std::io::{Read, Write};
        let mut chunk = [0; 4096];
        while let Ok(count @ 1..) = stream.read(&mut chunk) {
            if chunk[..count].windows(7).any(|window| window == b"/before" || window == b"/after ") {
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
            }
        }
    });
    let proxy = Proxy::start(format!(
        "[[upstream]]\nname = \"up\"\nprotocol = \"http1\"\nendpoints = [\"{}\"]\n",
        slow.address()
    ));
    assert_connection_ends(&proxy, proxy.outbound(), |client| {
        let block = h2::get("/reset");
        for pair in 0..20_000 {
            let stream = 1 + 2 * pair;
            client.headers(stream, &block, true);
            client.send(h2::frame(h2::RST_STREAM, 0, stream, &8_u32.to_be_bytes()));
        }
    });
    assert!(slow.connections() < 2_000, "{} connections to the service", slow.connections());
}

/// Requests that the server is made to reset: a window update of zero is a stream error.
#[test]
fn made_you_reset_flood_ends_its_connection_only() {
    let (_upstream, proxy) = proxy();
    assert_connection_ends(&proxy, proxy.outbound(), |client| {
        let block = h2::get("/reset");
        for pair in 0..20_000 {
            let stream = 1 + 2 * pair;
            client.headers(stream, &block, false);
            client.send(h2::frame(h2::WINDOW_UPDATE, 0, stream, &0_u32.to_be_bytes()));
        }
    });
}

/// Other ways to make a server reset a stream (VU#767506): each stream has cost a request by then.
#[test]
fn other_made_you_reset_floods_end_their_connection_only() {
    let (_upstream, proxy) = proxy();
    let overflow = 0x7fff_ffff_u32.to_be_bytes();
    let itself = |stream: u32| [&stream.to_be_bytes()[..], &[16]].concat();
    type ResetMethod<'a> = (&'a str, bool, &'a dyn Fn(u32) -> Vec<u8>);
    let means: [ResetMethod<'_>; 4] = [
        ("a window that overflows", false, &|stream| h2::frame(h2::WINDOW_UPDATE, 0, stream, &overflow)),
        ("more fields that are no trailers", true, &|stream| {
            h2::frame(h2::HEADERS, h2::END_HEADERS, stream, &h2::block(&[("x-a", "1")]))
        }),
        ("a stream that depends on itself", false, &|stream| {
            h2::frame(h2::PRIORITY, 0, stream, &itself(stream))
        }),
        ("more data than its length", false, &|stream| h2::frame(h2::DATA, 0, stream, b"12345")),
    ];
    for (what, ended, frame) in means {
        assert_connection_ends(&proxy, proxy.outbound(), |client| {
            let block =
                h2::request("POST", "up", "/reset", if ended { &[] } else { &[("content-length", "3")] });
            for pair in 0..20_000 {
                let stream = 1 + 2 * pair;
                client.headers(stream, &block, ended);
                client.send(frame(stream));
            }
        });
        eprintln!("{what}: ended");
    }
}

#[test]
fn continuation_flood_ends_its_connection_only() {
    let (_upstream, proxy) = proxy();
    for address in [proxy.outbound(), proxy.inbound()] {
        assert_connection_ends(&proxy, address, |client| {
            client.send(h2::frame(h2::HEADERS, h2::END_STREAM, 1, &h2::get("/")));
            let piece = h2::block(&[("x-a", "a".repeat(8000))]);
            for _ in 0..4_000 {
                client.send(h2::frame(h2::CONTINUATION, 0, 1, &piece));
            }
        });
    }
}

#[test]
fn empty_continuation_flood_ends_its_connection_only() {
    let (_upstream, proxy) = proxy();
    assert_connection_ends(&proxy, proxy.outbound(), |client| {
        client.send(h2::frame(h2::HEADERS, h2::END_STREAM, 1, &h2::get("/")));
        let frames = h2::frame(h2::CONTINUATION, 0, 1, &[]).repeat(1_000);
        for _ in 0..200 {
            client.send(&frames);
        }
    });
}

/// One entry of the dynamic table, referenced thousands of times: few bytes on the wire, many in memory.
#[test]
fn hpack_bomb_ends_its_connection_only() {
    let (_upstream, proxy) = proxy();
    for address in [proxy.outbound(), proxy.inbound()] {
        let mut bystander = H2Client::connect(address);
        bystander.must_get(1, "/before");
        let before = proxy.resident_kib();
        let mut client = H2Client::connect(address);
        let mut block = h2::get("/");
        block.push(0x40); // a literal that is put into the table
        block.extend(&h2::block(&[("x-bomb", "a".repeat(3_000))])[1..]);
        block.extend(vec![0xbe; 12_000]); // the table's newest entry
        client.headers(1, &block, true);
        let end = client.end_of(1);
        assert!(
            matches!(end, End::Response(Some(431 | 400)) | End::Reset(_) | End::GoAway(_) | End::Closed),
            "a header list of 36 MiB: {end:?}"
        );
        let grown = proxy.resident_kib().saturating_sub(before);
        assert!(grown < 32 * 1024, "resident memory has grown by {grown} KiB");
        bystander.must_get(3, "/after");
    }
}

#[test]
fn empty_data_flood_ends_its_connection_only() {
    let (_upstream, proxy) = proxy();
    assert_connection_ends(&proxy, proxy.outbound(), |client| {
        client.headers(1, &h2::get("/"), false);
        let frames = h2::frame(h2::DATA, 0, 1, &[]).repeat(1_000);
        for _ in 0..200 {
            client.send(&frames);
        }
    });
}

/// Unread responses to PING and SETTINGS must not accumulate.
#[test]
fn unread_ping_and_settings_acks_are_bounded() {
    let (_upstream, proxy) = proxy();
    for (kind, payload) in [(h2::PING, &[0_u8; 8][..]), (h2::SETTINGS, &[])] {
        let mut bystander = H2Client::connect(proxy.outbound());
        bystander.must_get(1, "/before");
        let before = proxy.resident_kib();
        let mut client = H2Client::connect(proxy.outbound());
        client.raw.stream.set_write_timeout(Some(Duration::from_millis(500))).expect("a timeout");
        let frames = h2::frame(kind, 0, 0, payload).repeat(1_000);
        let sent = (0..1_000).take_while(|_| client.send(&frames)).count();
        assert!(sent < 1_000, "ten million acknowledgements were kept for a reader that does not read");
        let grown = proxy.resident_kib().saturating_sub(before);
        assert!(grown < 32 * 1024, "resident memory has grown by {grown} KiB");
        bystander.must_get(3, "/after");
    }
}

/// An endless head times out after 10 s.
#[test]
fn slow_request_heads_time_out() {
    let (_upstream, proxy) = proxy();
    let begins = ["GET /", "GET / HTTP/1.1\r\nHost: up\r\nX-A: ", "PRI * HTTP/2.0\r\n\r\nS"];
    let mut clients = Vec::new();
    for address in [proxy.outbound(), proxy.inbound()] {
        for begin in begins {
            let mut client = RawClient::connect(address).with_read_timeout(Duration::from_secs(25));
            client.send(begin);
            clients.push((begin, client));
        }
    }
    for (begin, client) in &mut clients {
        let (_, closed) = client.read_to_close();
        assert!(closed, "still open after 25 s, having sent {begin:?}");
    }
}
