//! Where one thing ends just as another begins: late bodies, early answers, silence, upgrades, leaving.

use std::{
    io::{Read, Write},
    net::TcpStream,
    sync::mpsc,
    time::Duration,
};

use http_body_util::BodyExt;

use crate::support::{
    PATIENCE, Proxy, RawClient, RawServer, Upstream, eventually, free_port,
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

/// While the proxy waits to try again, the try that was answered early still reads the body, past what is kept: then
/// there is no further try, least of all one with the rest of the body only.
#[test]
fn a_body_read_on_during_the_wait_is_not_sent_by_halves() {
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
    early_answer.recv_timeout(PATIENCE).expect("an early answer");
    for _ in 0..8 {
        client.send(format!("400\r\n{}\r\n", "x".repeat(0x400)));
    }
    client.send("0\r\n\r\n");
    let answer = client.response().expect("a well-formed response").expect("a response");
    if let Ok(body) = requests.try_recv() {
        assert_eq!(body.len(), 5 + 8 * 0x400, "half a body was sent as a whole one");
    }
    assert_eq!(answer.status(), 503);
}

/// A body that came by itself is no slow head of the next request.
#[test]
fn a_connection_is_kept_after_a_body_that_came_late() {
    let upstream = Upstream::http1(|request| async {
        let _ = request.into_body().collect().await;
        text("ok")
    });
    let proxy = Proxy::start(config(upstream.address(), "", ""));
    let mut client = RawClient::connect(proxy.outbound()).patience(Duration::from_secs(12));
    client.send("POST / HTTP/1.1\r\nHost: up\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n");
    client.read_until(b"100 Continue\r\n\r\n");
    assert_eq!(client.ask("body").text(), "ok");
    let (got, closed) = client.read_to_close();
    assert!(!closed && got.is_empty(), "idle for less than 12 s, and hung up on");
    assert_eq!(client.ask(GET).text(), "ok");
}

/// A caller that reads only when it has sent all must not lose its answer to a reset.
#[test]
fn an_answer_to_a_body_that_nobody_wants_arrives() {
    let nobody = std::net::SocketAddr::from(([127, 0, 0, 1], free_port()));
    let proxy = Proxy::start(config(nobody, "", "retry = false"));
    const LENGTH: usize = 900 * 1024;
    let head = |host: &str| format!("POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length: {LENGTH}\r\n\r\n");
    for (head, status) in [(head("up"), 502), (head("a@b"), 400)] {
        let mut client = RawClient::connect(proxy.outbound());
        assert!(client.send(head));
        let part = vec![b'x'; 9 * 1024];
        for sent in 0..LENGTH / part.len() {
            assert!(client.send(&part), "hung up on after {sent} parts");
        }
        let answer = client.response().expect("a well-formed response").expect("a response");
        assert_eq!((answer.status(), answer.field("connection")), (status, Some("close")));
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
        let answer: &[u8] = if upgrade {
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: chatter\r\n\r\n"
        } else {
            b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"
        };
        let _ = stream.write_all(answer);
        while upgrade && matches!(stream.read(&mut chunk), Ok(1..)) {}
    })
}

const UPGRADE: &str = "GET / HTTP/1.1\r\nHost: up\r\nConnection: Upgrade\r\nUpgrade: chatter\r\n\r\n";

/// An upgraded connection is a connection still (product: `max_connections`).
#[test]
fn upgrades_count_as_connections() {
    let server = upgrading();
    let proxy = Proxy::start(config(server.address(), "", "limits = { max_connections = 1 }"));
    let mut first = RawClient::connect(proxy.outbound());
    first.send(UPGRADE);
    assert!(first.read_until(b"\r\n\r\n").starts_with(b"HTTP/1.1 101 "));
    let answer = RawClient::connect(proxy.outbound()).ask(GET);
    assert_eq!(answer.status(), 503, "{answer:?}");
    drop(first);
    eventually("the place of the connection", || {
        RawClient::connect(proxy.outbound()).ask(GET).status() == 200
    });
}

/// Whoever asks for a change of protocol just when the proxy leaves gets a proper answer, if any.
#[test]
fn an_upgrade_while_leaving_is_still_one() {
    let server = upgrading();
    let proxy = Proxy::start(config(server.address(), "", ""));
    let mut probe = RawClient::connect(proxy.inbound());
    let mut client = RawClient::connect(proxy.inbound());
    for early in [&mut probe, &mut client] {
        assert_eq!(early.ask(GET).status(), 200);
    }
    proxy.signal("TERM");
    eventually("the proxy to leave", || {
        probe.ask(GET).field("connection").is_some_and(|said| said.contains("close"))
    });
    client.send(UPGRADE);
    let head = String::from_utf8_lossy(&client.read_until(b"\r\n\r\n")).to_ascii_lowercase();
    assert!(head.starts_with("http/1.1 101 ") && head.contains("connection: upgrade"), "{head}");
}

/// What a service says before it has got the whole request cannot change the protocol: the rest would be taken for it.
#[test]
fn an_upgrade_amid_a_request_is_refused() {
    let server = upgrading();
    let proxy = Proxy::start(config(server.address(), "", ""));
    for address in [proxy.outbound(), proxy.inbound()] {
        let mut client = RawClient::connect(address);
        client.send(UPGRADE.replace("\r\n\r\n", "\r\nContent-Length: 4\r\n\r\n"));
        let answer = client.response().expect("a well-formed response").expect("a response");
        assert_eq!(answer.status(), 502, "{answer:?}");
        assert!(answer.text().contains("101 before all of the request was sent"), "{answer:?}");
        client.send("body");
    }
}

/// A caller that connects first and speaks later is told what is wrong like any other.
#[test]
fn a_late_speaker_is_answered_though_the_service_is_down() {
    let nobody = std::net::SocketAddr::from(([127, 0, 0, 1], free_port()));
    let proxy = Proxy::start(config(nobody, "", "listen = \"127.0.0.1:0\""));
    for address in [proxy.inbound(), proxy.upstream("up")] {
        let mut client = RawClient::connect(address).patience(Duration::from_millis(500));
        assert!(!client.read_to_close().1, "hung up on before a word was said");
        let mut client = client.patience(PATIENCE);
        assert_eq!(client.ask(GET).status(), 502);
    }
}

/// Where nobody speaks, a connection is not held for ever.
#[test]
fn silence_on_both_sides_ends() {
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

/// Calls inside a tunnel have connections of their own; the tunnel's is not kept beside them.
#[test]
fn a_tunnel_that_carries_calls_holds_no_connection() {
    let upstream = Upstream::http1(|_| async { text("ok") });
    let proxy = Proxy::start(config(upstream.address(), "", "limits = { max_connections = 1 }"));
    let mut client = RawClient::connect(proxy.outbound());
    client.send("CONNECT up:80 HTTP/1.1\r\nHost: up:80\r\n\r\n");
    client.read_until(b"\r\n\r\n");
    let answer = client.ask(GET);
    assert_eq!((answer.status(), answer.text().as_str()), (200, "ok"), "{answer:?}");
}

/// `fallback.upstream` steps in for a timeout too, with time of its own; the caller's deadline stays.
#[test]
fn a_fallback_upstream_has_time_after_a_timeout() {
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

/// A hundred fields are carried, one more is refused, of a request as of an answer.
#[test]
fn a_head_has_a_hundred_fields_at_most() {
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
