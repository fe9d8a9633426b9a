//! Single exchanges in detail: interim responses, trailers, empty bodies, header fields that the proxy adds.

use std::{
    io::{Read, Write},
    net::TcpStream,
    sync::mpsc,
};

use crate::{
    identity::metric,
    support::{Proxy, RawClient, RawServer, eventually, refusing_address, strict::Message},
};

/// Reads until `needle` has arrived.
fn read_until(stream: &mut TcpStream, needle: &[u8]) -> Vec<u8> {
    let (mut got, mut chunk) = (Vec::new(), [0; 4096]);
    while !got.windows(needle.len()).any(|window| window == needle) {
        match stream.read(&mut chunk) {
            Ok(0) | Err(_) => break,
            Ok(count) => got.extend_from_slice(&chunk[..count]),
        }
    }
    got
}

fn config(server: &RawServer) -> String {
    format!(
        "[service]\nname = \"shop\"\n[inbound]\nforward_to = \"{0}\"\n\
         [[upstream]]\nname = \"up\"\nendpoints = [\"{0}\"]\n",
        server.address()
    )
}

fn lower(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).to_ascii_lowercase()
}

/// Starts a server with this response, sends a request through both listeners, and gives `check` what server and
/// client received.
#[track_caller]
fn through(reply: &str, request: &str, check: impl Fn(&str, &Message)) {
    let server = RawServer::scripted(reply);
    let proxy = Proxy::start(config(&server));
    for address in [proxy.outbound(), proxy.inbound()] {
        let before = server.received().len();
        let response = RawClient::connect(address).ask(request);
        check(&lower(&server.received()[before..]), &response);
    }
}

const GET: &str = "GET / HTTP/1.1\r\nHost: up\r\n\r\n";

/// The head is forwarded at once; the body waits for the service's 100, which is forwarded (RFC 9110 §10.1.1).
#[test]
fn the_service_answers_expect_100_continue() {
    let (saw_head, head_seen) = mpsc::channel();
    let (go, may_go) = mpsc::channel::<()>();
    let may_go = std::sync::Mutex::new(may_go);
    let server = RawServer::start(move |mut stream| {
        let head = read_until(&mut stream, b"\r\n\r\n");
        let _ = saw_head.send(lower(&head));
        let _ = may_go.lock().expect("no panic").recv();
        let _ = stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n");
        read_until(&mut stream, b"hello");
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\ndone");
    });
    let proxy = Proxy::start(config(&server));
    for address in [proxy.outbound(), proxy.inbound()] {
        let mut client = RawClient::connect(address);
        client.send("POST / HTTP/1.1\r\nHost: up\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n");
        let head =
            head_seen.recv_timeout(crate::support::WAIT_LIMIT).expect("the head goes on without the body");
        assert!(head.contains("expect: 100-continue"), "{head}");
        go.send(()).expect("the server waits");
        let interim = client.read_until(b"\r\n\r\n");
        assert!(interim.starts_with(b"HTTP/1.1 100 "), "{:?}", lower(&interim));
        assert_eq!(client.ask("hello").text(), "done");
    }
}

/// A final response in place of 100 ends the exchange: no body is requested.
#[test]
fn a_final_response_to_expect_100_continue_skips_the_body() {
    let server = RawServer::scripted("HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno");
    let proxy = Proxy::start(config(&server));
    for address in [proxy.outbound(), proxy.inbound()] {
        let mut client = RawClient::connect(address);
        let response =
            client.ask("POST / HTTP/1.1\r\nHost: up\r\nExpect: 100-continue\r\nContent-Length: 90\r\n\r\n");
        assert_eq!((response.status(), response.text().as_str()), (403, "no"));
        // The client chooses whether the body or another request follows, so nothing after it is parsed.
        assert_eq!(response.field("connection"), Some("close"));
        client.send("GET /victim HTTP/1.1\r\nHost: up\r\nCookie: secret\r\n\r\n");
        client.finish();
        assert_eq!(client.read_to_close(), (Vec::new(), true));
    }
    assert!(!lower(&server.received()).contains("victim"), "{}", lower(&server.received()));
}

/// The response has begun while the client still sends: a client disconnect is detected and reaches the service.
#[test]
fn a_client_disconnect_during_an_early_response_is_detected() {
    let (saw_end, end_seen) = mpsc::channel();
    let server = RawServer::start(move |mut stream| {
        read_until(&mut stream, b"\r\n\r\n");
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nearly\r\n");
        while matches!(stream.read(&mut [0; 1000]), Ok(1..)) {}
        let _ = saw_end.send(());
    });
    let proxy = Proxy::start(config(&server));
    for address in [proxy.outbound(), proxy.inbound()] {
        let mut client = RawClient::connect(address);
        client.send("POST / HTTP/1.1\r\nHost: up\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n");
        assert!(!client.read_until(b"early").is_empty());
        drop(client);
        end_seen.recv_timeout(crate::support::WAIT_LIMIT).expect("the service sees the end");
    }
}

/// A service that responds early and stops reading must not keep resources of the request once it is over.
#[test]
fn an_unread_upload_ends_with_its_request() {
    let (go, may_go) = mpsc::channel::<()>();
    let may_go = std::sync::Mutex::new(may_go);
    let server = RawServer::start(move |mut stream| {
        read_until(&mut stream, b"\r\n\r\n");
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nearly");
        // Neither reads nor closes.
        let _ = may_go.lock().expect("no panic").recv();
    });
    let proxy = Proxy::start(format!("{}[defaults]\nidle_timeout = \"1s\"\n", config(&server)));
    let open = || metric(&proxy, "outrigger_connections{direction=\"outbound\",tls=\"none\",state=\"open\"}");
    let mut client = TcpStream::connect(proxy.outbound()).expect("it connects");
    let mut writes = client.try_clone().expect("a second handle");
    let sends = std::thread::spawn(move || {
        let _ = writes.write_all(b"POST / HTTP/1.1\r\nHost: up\r\nContent-Length: 100000000\r\n\r\n");
        while writes.write_all(&[b'x'; 100_000]).is_ok() {}
    });
    assert!(!read_until(&mut client, b"early").is_empty());
    assert!(open() > 0.0);
    eventually("the connection to the service is closed", || open() == 0.0);
    sends.join().expect("no panic");
    drop((go, client));
}

/// A body that was announced and turned out to be empty is announced and ended again with each attempt.
#[test]
fn an_empty_chunked_body_is_retried() {
    let asked = std::sync::atomic::AtomicUsize::new(0);
    let server = RawServer::start(move |mut stream| {
        let got = lower(&read_until(&mut stream, b"\r\n0\r\n\r\n"));
        let whole = got.contains("transfer-encoding: chunked") && got.ends_with("\r\n0\r\n\r\n");
        let first = asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed).is_multiple_of(2);
        let status = if whole && !first { "200 OK" } else { "503 Service Unavailable" };
        let _ = write!(stream, "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
    });
    let proxy = Proxy::start(config(&server));
    let put = "PUT / HTTP/1.1\r\nHost: up\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n";
    assert_eq!(RawClient::connect(proxy.outbound()).ask(put).status(), 200);
    assert_eq!(server.connections(), 2);
}

#[test]
fn early_hints_are_forwarded() {
    let server = RawServer::scripted(
        "HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\nConnection: x-hop\r\nX-Hop: 1\r\n\
         Keep-Alive: timeout=5\r\nProxy-Connection: close\r\nUpgrade: x\r\n\r\n\
         HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    );
    let proxy = Proxy::start(config(&server));
    for address in [proxy.outbound(), proxy.inbound()] {
        let mut client = RawClient::connect(address);
        client.send(GET);
        let got = lower(&client.read_until(b"\r\n\r\nok"));
        assert!(got.starts_with("http/1.1 103 ") && got.contains("link: </a.css>; rel=preload"), "{got}");
        let hints = got.split("\r\n\r\n").next().expect("a first head");
        for hop_by_hop in ["x-hop", "connection", "keep-alive", "upgrade"] {
            assert!(!hints.contains(hop_by_hop), "{hop_by_hop} is for one hop only: {hints}");
        }
        // HTTP/1.0 has no interim responses.
        let mut client = RawClient::connect(address);
        client.send("GET / HTTP/1.0\r\nHost: up\r\n\r\n");
        let got = lower(&client.read_to_close().0);
        assert!(!got.contains("103 ") && got.contains(" 200 "), "{got}");
    }
}

#[test]
fn trailers_are_forwarded_both_ways() {
    through(
        "HTTP/1.1 200 OK\r\nTrailer: x-sum\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nx-sum: 42\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: up\r\nTE: trailers\r\nConnection: TE\r\nTrailer: x-check\r\n\
         Transfer-Encoding: chunked\r\n\r\n0\r\nx-check: 7\r\n\r\n",
        |got, response| {
            assert!(got.contains("0\r\nx-check: 7\r\n\r\n"), "{got}");
            assert_eq!(response.trailers, [("x-sum".to_owned(), "42".to_owned())], "{response:?}");
        },
    );
}

#[test]
fn responses_without_a_body_stay_without_a_body() {
    for status in ["204 No Content", "304 Not Modified"] {
        through(&format!("HTTP/1.1 {status}\r\nETag: \"a\"\r\n\r\n"), GET, |_, response| {
            assert!(
                response.body.is_empty() && response.field("transfer-encoding").is_none(),
                "{response:?}"
            );
            assert_eq!(response.field("etag"), Some("\"a\""));
        });
    }
    // A response to HEAD keeps the length of the absent body.
    let server = RawServer::scripted("HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n");
    let proxy = Proxy::start(config(&server));
    for address in [proxy.outbound(), proxy.inbound()] {
        let mut client = RawClient::connect(address);
        client.send("HEAD / HTTP/1.1\r\nHost: up\r\n\r\n");
        let got = lower(&client.read_until(b"\r\n\r\n"));
        assert!(got.starts_with("http/1.1 200 ") && got.contains("content-length: 1234"), "{got}");
    }
}

/// Errors of the service are forwarded unchanged.
#[test]
fn error_responses_of_the_service_are_unchanged() {
    through("HTTP/1.1 418 Teapot\r\nX-Why: tea\r\nContent-Length: 5\r\n\r\nshort", GET, |_, response| {
        assert_eq!((response.status(), response.text().as_str()), (418, "short"));
        assert_eq!(response.field("x-why"), Some("tea"));
    });
}

#[test]
fn inbound_adds_forwarded_headers() {
    let server = RawServer::scripted("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    let proxy = Proxy::start(config(&server));
    RawClient::connect(proxy.inbound()).ask(GET);
    let got = lower(&server.received());
    for needle in
        ["x-forwarded-for: 127.0.0.1", "x-forwarded-proto: http", "x-forwarded-host: up", "via: 1.1 "]
    {
        assert!(got.contains(needle), "no {needle:?} in {got}");
    }
    assert!(got.contains("x-request-id: "), "{got}");
}

/// A refused connection is a 502 with everything that §4.6 promises.
#[test]
fn proxy_generated_errors_are_marked() {
    let refused = refusing_address();
    let proxy = Proxy::start(format!(
        "[service]\nname = \"shop\"\n[[upstream]]\nname = \"up\"\nendpoints = [\"{refused}\"]\n"
    ));
    let response = RawClient::connect(proxy.outbound()).ask(GET);
    assert_eq!(response.status(), 502, "{response:?}");
    let said = response.field("proxy-status").unwrap_or_default();
    assert!(said.contains("shop") && said.contains("error=connection_refused"), "{said}");
    assert!(said.contains("connect_refused"), "{said}");
    assert_eq!(response.field("content-type"), Some("application/problem+json"));
    let problem: serde_json::Value = serde_json::from_slice(&response.body).expect("JSON");
    assert_eq!(problem["status"], 502);
    assert!(problem["type"].as_str().is_some_and(|kind| kind.contains("connect_refused")), "{problem}");
}

/// A connection that the service closes while it is idle in the pool causes no error.
#[test]
fn stale_pooled_connections_fail_no_request() {
    // Each connection serves one response without `close`, and closes when the next request arrives.
    let server = RawServer::start(|mut stream| {
        read_until(&mut stream, b"\r\n\r\n");
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
        let _ = stream.read(&mut [0; 1]);
    });
    let proxy = Proxy::start(config(&server));
    for address in [proxy.outbound(), proxy.inbound()] {
        let mut client = RawClient::connect(address);
        for number in 0..20 {
            assert_eq!(client.ask(GET).status(), 200, "request {number} by {address}");
        }
    }
}

/// Clients of the forward proxy cannot reach metadata services and the proxy's own ports.
#[test]
fn the_forward_proxy_denies_forbidden_addresses() {
    let proxy = Proxy::start("");
    for host in ["169.254.169.254", "[::ffff:169.254.169.254]", "[fe80::1]", "0.0.0.0:80"] {
        let request = format!("GET http://{host}/ HTTP/1.1\r\nHost: {host}\r\n\r\n");
        let response = RawClient::connect(proxy.outbound()).ask(request);
        assert_eq!(response.status(), 502, "{host}: {response:?}");
        let said = response.field("proxy-status").unwrap_or_default().to_owned();
        assert!(said.contains("destination_ip_prohibited"), "{host}: {said}");
    }
    for own in [proxy.admin(), proxy.outbound(), proxy.inbound()] {
        for request in [
            format!("GET http://{own}/ HTTP/1.1\r\nHost: {own}\r\n\r\n"),
            format!("CONNECT {own} HTTP/1.1\r\nHost: {own}\r\n\r\n"),
        ] {
            let mut client = RawClient::connect(proxy.outbound());
            let response = client.ask(&request);
            assert!(response.status() >= 400, "{request}: {response:?}");
        }
    }
}
