//! Races between two events: late bodies, early responses, silence, upgrades, shutdown.

use std::{
    io::{Read, Write},
    net::TcpStream,
    sync::mpsc,
    time::Duration,
};

use http_body_util::BodyExt;

use crate::support::{
    Proxy, RawClient, RawServer, Upstream, WAIT_LIMIT, eventually, free_port,
    strict::{self, Progress},
    text,
};

fn config(server: std::net::SocketAddr, inbound: &str, upstream: &str) -> String {
    format!(
        "[inbound]\nforward_to = \"{server}\"\n{inbound}\n\
         [[upstream]]\nname = \"up\"\nendpoints = [\"{server}\"]\n{upstream}\n"
    )
}

const GET: &str = "GET / HTTP/1.1\r\nHost: up\r\n\r\n";

/// During the back-off before a retry, the attempt that got an early response still reads the body, past the replay
/// buffer. Then there is no further attempt, least of all one with only the rest of the body.
#[test]
fn a_body_read_past_the_buffer_is_not_retried_in_part() {
    let (answered, early_answer) = mpsc::channel();
    let (whole, requests) = mpsc::channel();
    let server = RawServer::start(move |mut stream| {
        let (mut bytes, mut chunk, mut first) = (Vec::new(), [0; 16 * 1024], false);
        while let Ok(count @ 1..) = stream.read(&mut chunk) {
            bytes.extend_from_slice(&chunk[..count]);
            if bytes.ends_with(b"begin\r\n") {
                first = true;
                let _ =
                    stream.write_all(b"HTTP/1.1 503 Busy\r\nRetry-After: 1\r\nContent-Length: 2\r\n\r\nno");
                let _ = answered.send(());
            }
            if let (false, Progress::Complete(message, _)) = (first, strict::request(&bytes)) {
                let _ = whole.send(message.body);
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
            }
        }
    });
    let proxy = Proxy::start(config(server.address(), "", "retry = { max = 2, body_limit = \"1KiB\" }"));
    let mut client = RawClient::connect(proxy.outbound());
    client.send("PUT / HTTP/1.1\r\nHost: up\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nbegin\r\n");
    early_answer.recv_timeout(WAIT_LIMIT).expect("an early answer");
    for _ in 0..8 {
        client.send(format!("400\r\n{}\r\n", "x".repeat(0x400)));
    }
    client.send("0\r\n\r\n");
    let response = client.response().expect("a well-formed response").expect("a response");
    if let Ok(body) = requests.try_recv() {
        assert_eq!(body.len(), 5 + 8 * 0x400, "half a body was sent as a whole one");
    }
    assert_eq!(response.status(), 503);
}

/// A late body is not a slow head of the next request.
#[test]
fn a_connection_is_reused_after_a_late_body() {
    let upstream = Upstream::http1(|request| async {
        let _ = request.into_body().collect().await;
        text("ok")
    });
    let proxy = Proxy::start(config(upstream.address(), "", ""));
    let mut client = RawClient::connect(proxy.outbound()).with_read_timeout(Duration::from_secs(12));
    client.send("POST / HTTP/1.1\r\nHost: up\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n");
    client.read_until(b"100 Continue\r\n\r\n");
    assert_eq!(client.ask("body").text(), "ok");
    let (got, closed) = client.read_to_close();
    assert!(!closed && got.is_empty(), "idle for less than 12 s, and hung up on");
    assert_eq!(client.ask(GET).text(), "ok");
}

/// A client that reads only after it has sent everything must not lose its response to a reset.
#[test]
fn an_early_response_to_an_unread_body_arrives() {
    let unused_address = std::net::SocketAddr::from(([127, 0, 0, 1], free_port()));
    let proxy = Proxy::start(config(unused_address, "", "retry = false"));
    const LENGTH: usize = 900 * 1024;
    let head = |host: &str| format!("POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length: {LENGTH}\r\n\r\n");
    for (head, status) in [(head("up"), 502), (head("a@b"), 400)] {
        let mut client = RawClient::connect(proxy.outbound());
        assert!(client.send(head));
        let part = vec![b'x'; 9 * 1024];
        for sent in 0..LENGTH / part.len() {
            assert!(client.send(&part), "hung up on after {sent} parts");
        }
        let response = client.response().expect("a well-formed response").expect("a response");
        assert_eq!((response.status(), response.field("connection")), (status, Some("close")));
    }
}

fn upgrading() -> RawServer {
    RawServer::start(|mut stream| {
        let mut got = Vec::new();
        let mut chunk = [0; 1000];
        while !got.ends_with(b"\r\n\r\n") {
            match stream.read(&mut chunk) {
                Ok(0) | Err(_) => return,
                Ok(count) => got.extend_from_slice(&chunk[..count]),
            }
        }
        let upgrade = String::from_utf8_lossy(&got).to_ascii_lowercase().contains("upgrade: chatter");
        let response: &[u8] = if upgrade {
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: chatter\r\n\r\n"
        } else {
            b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"
        };
        let _ = stream.write_all(response);
        while upgrade && matches!(stream.read(&mut chunk), Ok(1..)) {}
    })
}

const UPGRADE: &str = "GET / HTTP/1.1\r\nHost: up\r\nConnection: Upgrade\r\nUpgrade: chatter\r\n\r\n";

/// An upgraded connection still counts as a connection (product: `max_connections`).
#[test]
fn upgrades_count_towards_max_connections() {
    let server = upgrading();
    let proxy = Proxy::start(config(server.address(), "", "limits = { max_connections = 1 }"));
    let mut first = RawClient::connect(proxy.outbound());
    first.send(UPGRADE);
    assert!(first.read_until(b"\r\n\r\n").starts_with(b"HTTP/1.1 101 "));
    let response = RawClient::connect(proxy.outbound()).ask(GET);
    assert_eq!(response.status(), 503, "{response:?}");
    drop(first);
    eventually("a free connection slot", || RawClient::connect(proxy.outbound()).ask(GET).status() == 200);
}

/// A client that requests an upgrade just as the drain begins gets a valid response.
#[test]
fn upgrades_during_the_drain_are_answered() {
    let server = upgrading();
    let proxy = Proxy::start(config(server.address(), "", ""));
    let mut probe = RawClient::connect(proxy.inbound());
    let mut client = RawClient::connect(proxy.inbound());
    for early in [&mut probe, &mut client] {
        assert_eq!(early.ask(GET).status(), 200);
    }
    proxy.signal("TERM");
    eventually("the drain to begin", || {
        probe.ask(GET).field("connection").is_some_and(|said| said.contains("close"))
    });
    client.send(UPGRADE);
    let head = String::from_utf8_lossy(&client.read_until(b"\r\n\r\n")).to_ascii_lowercase();
    assert!(head.starts_with("http/1.1 101 ") && head.contains("connection: upgrade"), "{head}");
}

/// A response before the end of the request cannot switch protocols: the rest of the body would be taken for the new
/// protocol.
#[test]
fn an_upgrade_before_the_request_body_ends_is_rejected() {
    let server = upgrading();
    let proxy = Proxy::start(config(server.address(), "", ""));
    for address in [proxy.outbound(), proxy.inbound()] {
        let mut client = RawClient::connect(address);
        client.send(UPGRADE.replace("\r\n\r\n", "\r\nContent-Length: 4\r\n\r\n"));
        let response = client.response().expect("a well-formed response").expect("a response");
        assert_eq!(response.status(), 502, "{response:?}");
        assert!(response.text().contains("101 before all of the request was sent"), "{response:?}");
        client.send("body");
    }
}

/// A client that connects first and sends later gets the same error as any other.
#[test]
fn a_late_request_gets_an_error_while_the_service_is_down() {
    let unused_address = std::net::SocketAddr::from(([127, 0, 0, 1], free_port()));
    let proxy = Proxy::start(config(unused_address, "", "listen = \"127.0.0.1:0\""));
    for address in [proxy.inbound(), proxy.upstream("up")] {
        let mut client = RawClient::connect(address).with_read_timeout(Duration::from_millis(500));
        assert!(!client.read_to_close().1, "closed before the request");
        let mut client = client.with_read_timeout(WAIT_LIMIT);
        assert_eq!(client.ask(GET).status(), 502);
    }
}

/// A connection on which neither side sends is not held for ever.
#[test]
fn connections_silent_on_both_sides_are_closed() {
    let silent = RawServer::start(|mut stream: TcpStream| {
        let _ = stream.read(&mut [0; 10]);
    });
    let idle = "tunnel_idle_timeout = \"400ms\"";
    let proxy = Proxy::start(config(silent.address(), idle, idle));
    let (_, closed) = RawClient::connect(proxy.inbound()).read_to_close();
    assert!(closed, "by the inbound port");
    let mut client = RawClient::connect(proxy.outbound());
    client.send("CONNECT up:80 HTTP/1.1\r\nHost: up:80\r\n\r\n");
    client.read_until(b"\r\n\r\n");
    assert!(client.read_to_close().1, "in a tunnel");
}

/// Requests inside a tunnel have their own connections; the tunnel's connection is not kept beside them.
#[test]
fn a_tunnel_that_carries_http_holds_no_upstream_connection() {
    let upstream = Upstream::http1(|_| async { text("ok") });
    let proxy = Proxy::start(config(upstream.address(), "", "limits = { max_connections = 1 }"));
    let mut client = RawClient::connect(proxy.outbound());
    client.send("CONNECT up:80 HTTP/1.1\r\nHost: up:80\r\n\r\n");
    client.read_until(b"\r\n\r\n");
    let response = client.ask(GET);
    assert_eq!((response.status(), response.text().as_str()), (200, "ok"), "{response:?}");
}

/// `fallback.upstream` is used after a timeout too, with its own timeout; the client's deadline still applies.
#[test]
fn a_fallback_upstream_gets_its_own_timeout() {
    let hangs =
        RawServer::start(|mut stream: TcpStream| while matches!(stream.read(&mut [0; 999]), Ok(1..)) {});
    let standby = Upstream::http1(|_| async { text("standby") });
    let config =
        config(hangs.address(), "", "timeout = \"200ms\"\nretry = false\nfallback = { upstream = \"dr\" }")
            + &format!("[[upstream]]\nname = \"dr\"\nendpoints = [\"{}\"]\n", standby.address());
    let proxy = Proxy::start(config);
    assert_eq!(RawClient::connect(proxy.outbound()).ask(GET).text(), "standby");
    let hurried = RawClient::connect(proxy.outbound())
        .ask("GET / HTTP/1.1\r\nHost: up\r\nx-request-timeout-ms: 50\r\n\r\n");
    assert_eq!(hurried.status(), 504);
}

/// A hundred fields are forwarded and one more is rejected, in a request and in a response.
#[test]
fn a_head_has_at_most_a_hundred_fields() {
    let fields = |count: usize| (0..count).map(|at| format!("x-{at}: 1\r\n")).collect::<String>();
    let server = RawServer::start(move |mut stream: TcpStream| {
        let mut got = Vec::new();
        let mut byte = [0];
        while !got.ends_with(b"\r\n\r\n") && matches!(stream.read(&mut byte), Ok(1)) {
            got.push(byte[0]);
        }
        let more = usize::from(got.windows(5).any(|five| five == b"/more"));
        let _ = write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n{}\r\n", fields(99 + more));
    });
    let proxy = Proxy::start(config(server.address(), "", "retry = false\nbreaker = false\n"));
    let ask = |path: &str, count: usize| {
        let head = format!("GET {path} HTTP/1.1\r\nHost: up\r\n{}\r\n", fields(count));
        RawClient::connect(proxy.outbound()).ask(head).status()
    };
    assert_eq!((ask("/", 99), ask("/", 100)), (200, 431), "Host is one of them");
    assert_eq!(ask("/more", 0), 502);
}
