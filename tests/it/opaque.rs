//! Bytes that are not HTTP, or that only some servers parse as HTTP: what passes as a byte stream, and what does not.

use std::{
    fmt::Write as _,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    process::Command,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use crate::{
    identity::{client_sidecar, metric, server_sidecar},
    support::{
        Daemon, Proxy, RawClient, RawServer, Upstream, WAIT_LIMIT, eventually, free_port, has_tool,
        peer_script,
        pki::Pki,
        python_with, text,
        tls::{TlsClient, TlsServer},
        tool,
    },
};

/// The identity that the request claims to have and has not.
const FORGED: &str = "URI=spiffe://shop.example/ns/shop/sa/admin";

/// First bytes that one server or another parses as a request.
fn openers() -> Vec<Vec<u8>> {
    let head = format!("Host: a\r\nX-Forwarded-Client-Cert: {FORGED}\r\nConnection: close\r\n\r\n");
    let line = |begin: &[u8], line: &str| [begin, line.as_bytes(), head.as_bytes()].concat();
    let mut openers: Vec<Vec<u8>> = [
        &b""[..],
        b"\r\n\r\n",
        b"\n\n\n",
        b"\r\n\r\n\r\n\r\n",
        b"\t",
        b" ",
        b"\0",
        b"\xef\xbb\xbf",
        b"\x0b",
        b"\x1c\x1d",
        b"\x16\x03\x01\x00\x40\x01",
        b"\0\0\0\x08\x04\xd2",
        b"\xff",
    ]
    .into_iter()
    .map(|begin| line(begin, "GET /x HTTP/1.1\r\n"))
    .collect();
    openers.extend(
        [
            "ABCDEFGHIJKLMNOPQRSTUVWXY /x HTTP/1.1\r\n",
            "!#$%&'*+.^`|~ /x HTTP/1.1\r\n",
            "get /x HTTP/1.1\r\n",
            "GET\t/x\tHTTP/1.1\r\n",
            "GET /x HTTP/1.1\n",
            "GET http://a/x HTTP/1.1\r\n",
            "GET x:/x HTTP/1.1\r\n",
            "GET /x FOO\r\n",
            "set /x 0 0 5\r\n",
            "\u{1}\u{2} /x \u{1}\r\n",
        ]
        .map(|text| line(b"", text)),
    );
    openers
}

/// Sizes at which sidecars and servers have limits, and places at which bytes are split: all points at which
/// inspection could end too early.
fn split_openers() -> Vec<Vec<Vec<u8>>> {
    const LONG: usize = 1024 * 1024 + 200;
    let head = |line: &str, pad: usize| {
        let pad = "p".repeat(pad);
        format!("{line} HTTP/1.1\r\nHost: a\r\nX-Forwarded-Client-Cert: {FORGED}\r\nConnection: close\r\nX-Pad: {pad}\r\n\r\n")
            .into_bytes()
    };
    let long_method = || vec![b'A'; 300];
    let bytes = |text: &[u8]| text.to_vec();
    vec![
        vec![long_method(), head(" /x", 0)],
        vec![long_method(), head(" /x", LONG)],
        vec![long_method(), head(&format!(" /x?{}", "p".repeat(LONG)), 0)],
        vec![vec![b'A'; LONG], head(" /x", 0)],
        vec![bytes(b"\x01\x02"), head(" /x", 0)],
        vec![bytes(b"\x01\x02"), head(" /x", LONG)],
        vec![bytes(b"\x01\x02 /x HTTP/1.1"), head("", 0).split_off(9)],
        vec![bytes(b"GET\t"), head("/x\t", 0)],
        vec![bytes(b"\xef\xbb"), [&b"\xbf"[..], &head("GET /x", 0)].concat()],
    ]
}

/// A server whose program prints `port N`.
fn printing(program: &str, arguments: &[&str]) -> (Daemon, SocketAddr) {
    let daemon = Daemon::start(program, arguments, &[]);
    let output = daemon.wait_for_output("port ");
    let port = output.split("port ").nth(1).and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    (daemon, ([127, 0, 0, 1], port.expect("a port")).into())
}

fn nginx() -> (Daemon, SocketAddr) {
    let port = free_port();
    let config = format!(
        "daemon off; pid @DIR@/pid; error_log stderr; worker_processes 1; events {{}}\n\
         http {{ access_log off; client_body_temp_path @DIR@/a; proxy_temp_path @DIR@/b; fastcgi_temp_path @DIR@/c;\n\
         uwsgi_temp_path @DIR@/d; scgi_temp_path @DIR@/e;\n\
         server {{ listen 127.0.0.1:{port}; location / {{ return 200 \"caller=$http_x_forwarded_client_cert\\n\"; }} }} }}\n"
    );
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    (
        Daemon::start("nginx", &["-c", "@DIR@/conf", "-p", "@DIR@"], &[("conf", &config)]).listening(address),
        address,
    )
}

/// The response to these first bytes; empty if the connection is closed.
fn send(mut stream: impl Read + Write, opener: &[u8]) -> String {
    let _ = stream.write_all(opener);
    let mut response = Vec::new();
    let mut chunk = [0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut chunk) {
        response.extend_from_slice(&chunk[..count]);
        if response.windows(7).any(|seven| seven == b"caller=") && response.ends_with(b"\n") {
            break;
        }
    }
    String::from_utf8_lossy(&response).into_owned()
}

/// The same for first bytes in parts, each read separately.
fn send_parts(mut stream: impl Read + Write, parts: &[Vec<u8>]) -> String {
    for part in parts {
        let _ = stream.write_all(part);
        let _ = stream.flush();
        // No observable condition shows that the proxy has read it.
        thread::sleep(Duration::from_millis(150));
    }
    send(stream, b"")
}

fn plain(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).expect("connect");
    stream.set_read_timeout(Some(Duration::from_secs(2))).expect("a timeout");
    stream
}

/// Sends all first bytes through all entry points to a service, and checks that none of them lets the client claim an
/// identity.
#[track_caller]
fn no_opener_reaches(service: SocketAddr) {
    // Otherwise the test would prove nothing.
    let forged = openers().iter().filter(|opener| send(plain(service), opener).contains(FORGED)).count();
    assert!(forged >= 3, "the service itself accepts the forged identity from only {forged} openers");

    let pki = Pki::new();
    let mine = pki.issue("checkout", |_| {});
    let (port, alpn_less) = (service.port(), TlsClient::new(Some(&mine), &[]));
    let strict = server_sidecar(&pki, service, "");
    let permissive = server_sidecar(&pki, service, "mtls = \"permissive\"\n");
    let upstream = "[[upstream]]\nname = \"up\"\nlisten = \"127.0.0.1:0\"\n";
    let open = Proxy::start(format!(
        "[inbound]\nforward_to = \"{service}\"\n{upstream}endpoints = [\"{service}\"]\n[upstream.rate_limit]\nrate = 1000\nburst = 1000\n"
    ));
    let declared = Proxy::start(format!(
        "[inbound]\nforward_to = \"{service}\"\n[[inbound.port]]\nport = {port}\nprotocol = \"http1\"\n"
    ));
    let mut wrong = String::new();
    for opener in openers() {
        let tunnel = || {
            let mut client = RawClient::connect(open.outbound()).with_read_timeout(Duration::from_secs(2));
            client.send("CONNECT up:80 HTTP/1.1\r\nHost: up:80\r\n\r\n");
            client.read_until(b"\r\n\r\n");
            client.stream
        };
        for (listener, response) in [
            ("TLS without ALPN", send(alpn_less.connect(strict.inbound()), &opener)),
            ("TLS to permissive", send(alpn_less.connect(permissive.inbound()), &opener)),
            ("plaintext to permissive", send(plain(permissive.inbound()), &opener)),
            ("plaintext without identity", send(plain(open.inbound()), &opener)),
            ("declared http1", send(plain(declared.inbound()), &opener)),
        ] {
            let refused = response.starts_with("HTTP/1.1 400 ") || response.is_empty();
            if response.contains(FORGED) || !(refused || response.starts_with("HTTP/1.1 ")) {
                let _ = writeln!(wrong, "by {listener}: {} got {response}", opener.escape_ascii());
            }
        }
        // Outbound, the service's own claim is removed likewise.
        for (listener, response) in
            [("listen", send(plain(open.upstream("up")), &opener)), ("CONNECT", send(tunnel(), &opener))]
        {
            if response.contains(FORGED) {
                let _ = writeln!(wrong, "by {listener}: {} got {response}", opener.escape_ascii());
            }
        }
    }
    let sidecar = TlsClient::new(Some(&mine), &["outrigger-tcp"]);
    for parts in split_openers() {
        for (listener, response) in [
            ("byte stream of a sidecar", send_parts(sidecar.connect(strict.inbound()), &parts)),
            ("plaintext", send_parts(plain(open.inbound()), &parts)),
        ] {
            if response.contains(FORGED) {
                let begin: Vec<_> =
                    parts.iter().map(|part| part[..part.len().min(20)].escape_ascii()).collect();
                let _ = writeln!(wrong, "by {listener}: {begin:?} got {response}");
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

/// How a client or the proxy may end a connection on which part of a request has been forwarded.
#[derive(Clone, Copy)]
enum StreamEnd {
    Orderly,
    Reset,
    /// By sending what is cut.
    Cut(&'static [u8]),
}

/// Some servers take the end of the stream for the end of the line and of the header: they may see only a reset.
#[track_caller]
fn no_end_completes_a_request(server: &Daemon, service: SocketAddr) {
    let forged = "\u{1}\u{2} /x HTTP/1.1\r\nX-Forwarded-Client-Cert: admin\r\n";
    let proxy = Proxy::start(format!("[inbound]\nforward_to = \"{service}\"\n"));
    for (parts, ends) in [
        (&["\u{1}\u{2} /x HTTP/1.1"][..], StreamEnd::Orderly),
        (&["\u{1}\u{2}", " /x HTTP/1.1"], StreamEnd::Orderly),
        (&["GET x HTTP/1.1"], StreamEnd::Orderly),
        (&["\u{1}\u{2} /x HTTP/1.1"], StreamEnd::Reset),
        (&["\u{1}\u{2} /x HTTP/1.1"], StreamEnd::Cut(b"\r\n\r\n")),
        (&["\u{1}\u{2}", &forged[2..]], StreamEnd::Orderly),
        (&["\u{1}\u{2}", &forged[2..]], StreamEnd::Reset),
    ] {
        let mut stream = plain(proxy.inbound());
        for part in parts {
            stream.write_all(part.as_bytes()).expect("write");
            thread::sleep(Duration::from_millis(150));
        }
        match ends {
            StreamEnd::Orderly => stream.shutdown(std::net::Shutdown::Write).expect("shutdown"),
            StreamEnd::Reset => {
                socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("linger")
            }
            StreamEnd::Cut(bytes) => stream.write_all(bytes).expect("write"),
        }
        if !matches!(ends, StreamEnd::Reset) {
            let response = send(stream, b"");
            assert!(!response.contains("caller="), "{parts:?}: {response}");
        }
    }
    // The server accepts one connection after the other.
    assert!(
        send(plain(service), b"GET /last HTTP/1.0\r\nX-Forwarded-Client-Cert: last\r\n\r\n")
            .contains("caller=last")
    );
    let output = server.wait_for_output("request last");
    let requests = output.lines().filter(|line| line.starts_with("request ")).count();
    assert_eq!(requests, 1, "{output}");
}

#[test]
fn closing_a_byte_stream_completes_no_request_for_python() {
    let Some(python) = python_with("wsgiref") else { return };
    let script = peer_script("caller_echo.py").display().to_string();
    let start = || printing(&python.display().to_string(), &[&script]);
    // Otherwise the test would prove nothing.
    let (_python, address) = start();
    let mut stream = plain(address);
    stream.write_all(b"\x01\x02 /x HTTP/1.1\r\nX-Forwarded-Client-Cert: admin").expect("write");
    stream.shutdown(std::net::Shutdown::Write).expect("shutdown");
    assert!(send(stream, b"").contains("caller=admin"), "the end of the stream ends a header");
    let (python, address) = start();
    no_end_completes_a_request(&python, address);
}

#[test]
fn closing_a_byte_stream_completes_no_request_for_a_jdk_server() {
    if has_tool(&["java"]) {
        let script = peer_script("CallerEcho.java").display().to_string();
        let (java, address) = printing("java", &[&script]);
        no_end_completes_a_request(&java, address);
    }
}

#[test]
fn no_request_is_hidden_from_nginx() {
    if has_tool(&["nginx"]) {
        let (_nginx, address) = nginx();
        no_opener_reaches(address);
    }
}

#[test]
fn no_request_is_hidden_from_node() {
    if has_tool(&["node"]) {
        let script = peer_script("caller_echo.js").display().to_string();
        let (_node, address) = printing("node", &[&script]);
        no_opener_reaches(address);
    }
}

#[test]
fn no_request_is_hidden_from_go() {
    if !has_tool(&["go"]) {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let binary = directory.path().join("caller-echo");
    let built = Command::new(tool("go").expect("checked before"))
        .args(["build", "-o"])
        .arg(&binary)
        .arg(peer_script("caller_echo.go"))
        .status();
    assert!(built.is_ok_and(|status| status.success()), "go build");
    let (_go, address) = printing(&binary.display().to_string(), &[]);
    no_opener_reaches(address);
}

#[test]
fn no_request_is_hidden_from_python() {
    let Some(python) = python_with("wsgiref") else { return };
    let script = peer_script("caller_echo.py").display().to_string();
    let (_python, address) = printing(&python.display().to_string(), &[&script]);
    no_opener_reaches(address);
}

#[test]
fn no_request_is_hidden_from_a_jdk_server() {
    if has_tool(&["java"]) {
        let script = peer_script("CallerEcho.java").display().to_string();
        let (_java, address) = printing("java", &[&script]);
        no_opener_reaches(address);
    }
}

type Seen = Arc<Mutex<Vec<u8>>>;

/// A server that sends `greeting` at once, echoes what it receives, and records it.
fn echo(greeting: &'static [u8]) -> (RawServer, Seen) {
    let seen = Seen::default();
    let log = seen.clone();
    let server = RawServer::start(move |mut stream| {
        let _ = stream.write_all(greeting);
        let mut chunk = [0; 1000];
        while let Ok(count @ 1..) = stream.read(&mut chunk) {
            log.lock().expect("no panic").extend_from_slice(&chunk[..count]);
            let _ = stream.write_all(&chunk[..count]);
        }
    });
    (server, seen)
}

const REFUSED: &str = "outrigger_rejected_total{upstream=\"inbound\",reason=\"malformed\"}";
const REDIS: &[u8] = b"*1\r\n$4\r\nPING\r\n";

#[track_caller]
fn is_echoed(mut stream: impl Read + Write) {
    stream.write_all(REDIS).expect("write");
    let mut echoed = [0; REDIS.len()];
    stream.read_exact(&mut echoed).expect("the bytes come back");
    assert_eq!(echoed, REDIS);
}

/// 400, a problem that says what to configure, and a close.
#[track_caller]
fn is_refused(mut stream: impl Read + Write, says: &str) {
    stream.write_all(REDIS).expect("write");
    let mut response = Vec::new();
    let _ = stream.read_to_end(&mut response);
    let response = String::from_utf8_lossy(&response);
    assert!(response.starts_with("HTTP/1.1 400 "), "{response:?}");
    for needed in
        ["connection: close", "application/problem+json", "#malformed", "protocol = \\\"tcp\\\"", says]
    {
        assert!(response.contains(needed), "{needed} is not in {response}");
    }
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).expect("connect");
    stream.set_read_timeout(Some(WAIT_LIMIT)).expect("a timeout");
    stream
}

/// Where a peer identity is required, a byte stream is declared or negotiated by two sidecars; it is never detected.
#[test]
fn sidecars_negotiate_byte_streams_by_alpn() {
    let (server, _) = echo(b"");
    let pki = Pki::new();
    let port = server.address().port();
    let auto = server_sidecar(&pki, server.address(), "");
    let mine = pki.issue("checkout", |_| {});
    let stranger = TlsClient::new(Some(&mine), &[]);
    is_refused(stranger.connect(auto.inbound()), &format!("port = {port}"));
    eventually("the log", || {
        auto.stderr().contains("bytes that are not HTTP came from an authenticated peer")
    });
    assert_eq!(metric(&auto, REFUSED), 1.0);
    for protocol in ["auto", "tcp"] {
        let more = format!("protocol = \"{protocol}\"\nlisten = \"127.0.0.1:0\"\n");
        let here = client_sidecar(&pki, auto.inbound(), &more);
        is_echoed(connect(here.upstream("payments")));
    }
    let declared = server_sidecar(
        &pki,
        server.address(),
        &format!("[[inbound.port]]\nport = {port}\nprotocol = \"tcp\"\n"),
    );
    is_echoed(stranger.connect(declared.inbound()));
    let here = client_sidecar(&pki, declared.inbound(), "protocol = \"tcp\"\nlisten = \"127.0.0.1:0\"\n");
    is_echoed(connect(here.upstream("payments")));
}

/// A request in a negotiated byte stream is rejected: otherwise any peer could claim another identity.
#[test]
fn no_request_passes_in_a_negotiated_byte_stream() {
    let (server, seen) = echo(b"");
    let pki = Pki::new();
    let auto = server_sidecar(&pki, server.address(), "");
    let mine = pki.issue("checkout", |_| {});
    let sidecar = TlsClient::new(Some(&mine), &["outrigger-tcp"]);
    is_echoed(sidecar.connect(auto.inbound()));
    seen.lock().expect("no panic").clear();
    for opener in openers() {
        let response = send(sidecar.connect(auto.inbound()), &opener);
        let reached = seen.lock().expect("no panic").clone();
        assert!(!reached.ends_with(b"\r\n\r\n"), "{} reached the service: {response}", opener.escape_ascii());
        seen.lock().expect("no panic").clear();
    }
}

/// A sidecar with request policies refuses byte streams in the handshake; a tunnel to it still carries requests.
#[test]
fn byte_streams_to_a_service_with_request_policies_are_refused_in_the_handshake() {
    let service = Upstream::http1(|_| async { text("hello") });
    let pki = Pki::new();
    let checked = server_sidecar(
        &pki,
        service.address(),
        "[[inbound.allow]]\nidentity = [\"spiffe://shop.example/ns/shop/sa/*\"]\n",
    );
    let here = client_sidecar(&pki, checked.inbound(), "protocol = \"tcp\"\nlisten = \"127.0.0.1:0\"\n");
    let mut client = RawClient::connect(here.upstream("payments"));
    client.send(REDIS);
    assert!(client.read_to_close().1);
    eventually("the log", || {
        checked.stderr().contains("it opened a byte stream, and this port accepts HTTP only")
    });
    let refused = "outrigger_tls_handshakes_total{direction=\"inbound\",outcome=\"no_protocol\"}";
    assert_eq!(metric(&checked, refused), 1.0);
    let here = client_sidecar(&pki, checked.inbound(), "");
    let mut client = RawClient::connect(here.outbound());
    client.send("CONNECT payments:80 HTTP/1.1\r\nHost: payments:80\r\n\r\n");
    assert!(client.read_until(b"\r\n\r\n").starts_with(b"HTTP/1.1 200 "));
    assert_eq!(client.ask("GET / HTTP/1.1\r\nHost: payments\r\n\r\n").text(), "hello");
}

/// Policies that inspect requests cannot be bypassed in either direction; policies that do not are no reason to reject
/// a byte stream.
#[test]
fn byte_streams_pass_only_without_request_policies() {
    let (server, _) = echo(b"");
    let address = server.address();
    let inbound = |more: &str| Proxy::start(format!("[inbound]\nforward_to = \"{address}\"\n{more}\n"));
    for (policy, says) in [
        ("rate_limit = { rate = 100 }", "rate_limit"),
        ("limits = { max_requests = 10 }", "limits"),
        ("fault = { delay = \"1ms\", delay_ratio = 0.1 }", "fault"),
        ("forwarded = \"append\"", "forwarded"),
        ("[[inbound.allow]]\nidentity = [\"spiffe://shop.example/ns/shop/sa/*\"]", "allow"),
    ] {
        let proxy = inbound(policy);
        is_refused(connect(proxy.inbound()), says);
        assert_eq!(metric(&proxy, REFUSED), 1.0);
    }
    let port = address.port();
    for harmless in [
        String::new(),
        "timeout = \"1s\"\nretry = { max = 1 }\nbreaker = { consecutive_failures = 3 }".to_owned(),
        "limits = { max_connections = 10 }".to_owned(),
        format!("rate_limit = {{ rate = 100 }}\n[[inbound.port]]\nport = {port}\nprotocol = \"tcp\""),
    ] {
        is_echoed(connect(inbound(&harmless).inbound()));
    }
    is_echoed(connect(
        inbound("rate_limit = { rate = 100 }\n[runtime]\nobserve = [\"rate_limit\"]").inbound(),
    ));
    is_refused(
        connect(inbound(&format!("[[inbound.port]]\nport = {port}\nprotocol = \"http1\"")).inbound()),
        "declared",
    );
    let upstream = |more: &str| {
        Proxy::start(format!(
            "[[upstream]]\nname = \"up\"\nlisten = \"127.0.0.1:0\"\nendpoints = [\"{address}\"]\n{more}\n"
        ))
    };
    for (policy, says) in [
        ("rate_limit = { rate = 100 }", "rate_limit"),
        ("[[upstream.route]]\nrequest_headers = { set = { x-a = \"1\" } }", "request_headers"),
    ] {
        is_refused(connect(upstream(policy).upstream("up")), says);
    }
    for harmless in
        ["", "timeout = \"1s\"\nretry = { max = 1 }", "protocol = \"tcp\"\nrate_limit = { rate = 100 }"]
    {
        is_echoed(connect(upstream(harmless).upstream("up")));
    }
}

/// Neither the greeting of an HTTP/2 server nor a response to a timeout turns its connection into a byte stream.
#[test]
fn an_http_server_that_sends_first_gets_only_parsed_requests() {
    for greeting in [&b"\0\0\x06\x04\0\0\0\0\0\0\x03\0\0\0\x64"[..], b"HTTP/1.1 408 Request Timeout\r\n\r\n"]
    {
        let (server, seen) = echo(greeting);
        let proxy = Proxy::start(format!("[inbound]\nforward_to = \"{}\"\n", server.address()));
        let mut client = RawClient::connect(proxy.inbound());
        eventually("the server to be asked", || server.connections() > 0);
        // Otherwise the greeting may still be in flight.
        thread::sleep(Duration::from_millis(200));
        client.send(REDIS);
        let (response, closed) = client.read_to_close();
        assert!(closed && response.starts_with(b"HTTP/1.1 400 "), "{}", response.escape_ascii());
        assert!(seen.lock().expect("no panic").is_empty());
    }
}

/// A message that begins as another protocol and continues as a request is stopped before a server could process it.
#[test]
fn a_request_hidden_behind_other_bytes_is_cut_off() {
    let silent = Seen::default();
    let log = silent.clone();
    let server = RawServer::start(move |mut stream| {
        let mut chunk = [0; 1000];
        while let Ok(count @ 1..) = stream.read(&mut chunk) {
            log.lock().expect("no panic").extend_from_slice(&chunk[..count]);
        }
    });
    let proxy = Proxy::start(format!("[inbound]\nforward_to = \"{}\"\n", server.address()));
    let mut client = RawClient::connect(proxy.inbound());
    client.send(b"\x01\x02\x03");
    eventually("the first bytes", || silent.lock().expect("no panic").len() == 3);
    client.send(b" /x 1\r\nx-admin: 1\r\n\r\n");
    assert!(client.read_to_close().1);
    assert_eq!(silent.lock().expect("no panic").len(), 3);
    eventually("the log", || proxy.stderr().contains("could read these bytes as an HTTP request"));
}

/// The client's own TLS passes through CONNECT, whatever the upstream's policy: it requested only a tunnel.
#[test]
fn the_clients_own_tls_passes_through_a_tunnel() {
    let pki = Pki::new();
    let server = TlsServer::start(&pki.issue("secure", |_| {}), None, &[]);
    let proxy = Proxy::start(format!(
        "[[upstream]]\nname = \"up\"\nendpoints = [\"{}\"]\nrate_limit = {{ rate = 100 }}\n",
        server.address()
    ));
    let mut client = RawClient::connect(proxy.outbound());
    client.send("CONNECT up:443 HTTP/1.1\r\nHost: up:443\r\n\r\n");
    client.read_until(b"\r\n\r\n");
    let tls = TlsClient::new(None, &[]).connect_over(client.stream);
    let said = TlsClient::send_and_read_on(tls, "GET / HTTP/1.1\r\n\r\n");
    assert!(said.as_ref().is_ok_and(|said| said.ends_with("hello")), "{said:?}");
}

/// Some servers read the PROXY protocol and then HTTP. Split after five bytes, its signature passed as opaque.
#[test]
fn a_split_proxy_protocol_signature_is_rejected() {
    let (server, seen) = echo(b"");
    let proxy = Proxy::start(format!("[inbound]\nforward_to = \"{}\"\n", server.address()));
    let request = b"GET /x HTTP/1.1\r\nHost: a\r\nX-Forwarded-Client-Cert: admin\r\n\r\n";
    let v2 =
        [&b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x7f\0\0\x01\x7f\0\0\x01\0\x01\0\x02"[..], request].concat();
    for at in [1, 4, 5, 9, 11, 12, 30] {
        let parts = [v2[..at].to_vec(), v2[at..].to_vec()];
        let response = send_parts(plain(proxy.inbound()), &parts);
        assert!(response.starts_with("HTTP/1.1 400 "), "split at {at}: {response}");
        assert!(seen.lock().expect("no panic").is_empty(), "split at {at}");
    }
}

/// The same in a CONNECT tunnel: it was kept without limit, also beyond the drain, and forwarded what is not HTTP.
#[test]
fn a_tunnel_to_an_http_server_that_sends_first_carries_only_parsed_requests() {
    let (server, seen) = echo(b"\0\0\x06\x04\0\0\0\0\0\0\x03\0\0\0\x64");
    let mut proxy = Proxy::start(format!(
        "[runtime]\ndrain_timeout = \"10m\"\n[[upstream]]\nname = \"up\"\nendpoints = [\"{}\"]\n",
        server.address()
    ));
    let tunnel = || {
        let mut client = RawClient::connect(proxy.outbound());
        client.send("CONNECT up:80 HTTP/1.1\r\nHost: up:80\r\n\r\n");
        client.read_until(b"\r\n\r\n");
        // No observable condition shows that the proxy has read the server's first bytes.
        thread::sleep(Duration::from_millis(200));
        client
    };
    let mut client = tunnel();
    client.send(REDIS);
    let (response, closed) = client.read_to_close();
    assert!(closed && response.starts_with(b"HTTP/1.1 400 "), "{}", response.escape_ascii());
    assert!(seen.lock().expect("no panic").is_empty());
    let mut silent = tunnel();
    proxy.signal("TERM");
    assert!(silent.read_to_close().1, "it ends with the drain");
    assert_eq!(proxy.wait().code(), Some(0));
}
