//! Two sidecars with mutual TLS between them, for every protocol that their services speak.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{client_sidecar, metric, send_get, server_sidecar};
use crate::support::{
    Daemon, Proxy, RawClient, RawServer, Upstream, eventually, has_tool, peer_script,
    pki::{Pki, dns, id},
    python_with, text,
    tls::{TlsClient, TlsServer, server_config},
    tool,
};

fn service() -> Upstream {
    Upstream::http1(|_| async { text("hello") })
}

#[test]
fn http1_requests_reuse_mutual_tls_connections() {
    let (pki, service) = (Pki::new(), service());
    let server = server_sidecar(&pki, service.address(), "");
    let caller = client_sidecar(&pki, server.inbound(), "");
    let mut client = RawClient::connect(caller.outbound());
    for _ in 0..50 {
        let response = client.ask("GET / HTTP/1.1\r\nHost: payments\r\n\r\n");
        assert_eq!((response.status(), response.text().as_str()), (200, "hello"), "{}", server.stderr());
    }
    let handshakes =
        metric(&server, "outrigger_tls_handshakes_total{direction=\"inbound\",outcome=\"full\"}");
    assert_eq!(handshakes, 1.0);
    let open = "outrigger_connections{direction=\"inbound\",tls=\"mutual\",state=\"open\"}";
    assert_eq!(metric(&server, open), 1.0);
    assert_eq!(metric(&caller, &open.replace("inbound", "outbound")), 1.0);
    assert_eq!(
        metric(&caller, "outrigger_connections{direction=\"outbound\",tls=\"none\",state=\"open\"}"),
        0.0
    );
    assert!(metric(&server, "outrigger_certificate_expiry_timestamp_seconds{kind=\"leaf\"}") > 1e9);
}

#[test]
fn http2_carries_large_bodies_over_mutual_tls() {
    if !has_tool(&["curl"]) {
        return;
    }
    let pki = Pki::new();
    let service = Upstream::h2c(|request| async {
        use http_body_util::BodyExt;
        let body = request.into_body().collect().await.expect("a body").to_bytes();
        text(body)
    });
    let server = server_sidecar(&pki, service.address(), "");
    let client = client_sidecar(&pki, server.inbound(), "protocol = \"h2\"\n");
    let file = pki.write("large", &"0123456789abcdef".repeat(256 * 1024));
    let output = Command::new(tool("curl").expect("checked before"))
        .args(["-s", "--http2-prior-knowledge", "-H", "Host: payments", "--data-binary"])
        .arg(format!("@{}", file.display()))
        .arg(format!("http://{}/", client.outbound()))
        .output()
        .expect("curl runs");
    assert_eq!(output.stdout.len(), 4 << 20, "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn all_grpc_method_kinds_work_over_mutual_tls() {
    let Some(python) = python_with("grpc") else { return };
    let script = peer_script("grpc_server.py").display().to_string();
    let server = Daemon::start(&python.display().to_string(), &[&script], &[]);
    let output = server.wait_for_output("port ");
    let port: u16 = output.split("port ").nth(1).and_then(|rest| rest.trim().parse().ok()).expect("a port");
    let pki = Pki::new();
    let callee = server_sidecar(&pki, SocketAddr::from(([127, 0, 0, 1], port)), "");
    let client = client_sidecar(&pki, callee.inbound(), "");
    let output = Command::new(python)
        .arg(peer_script("grpc_client.py"))
        .args([&client.outbound().to_string(), "payments"])
        .output()
        .expect("Python runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn upgraded_connections_work_over_mutual_tls() {
    let server = RawServer::start(|mut stream| {
        let mut seen = [0; 4096];
        let _ = stream.read(&mut seen);
        let _ = stream
            .write_all(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n");
        while let Ok(count @ 1..) = stream.read(&mut seen) {
            let _ = stream.write_all(&seen[..count]);
        }
    });
    let pki = Pki::new();
    let callee = server_sidecar(&pki, server.address(), "");
    let caller = client_sidecar(&pki, callee.inbound(), "");
    let mut client = RawClient::connect(caller.outbound());
    client.send("GET / HTTP/1.1\r\nHost: payments\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n");
    let head = client.read_until(b"\r\n\r\n");
    assert!(head.starts_with(b"HTTP/1.1 101 "));
    for word in ["one", "two"] {
        client.send(word);
        client.read_until(word.as_bytes());
    }
}

/// A server-first protocol on ports declared `tcp`: the sidecars do not wait for bytes of the client.
#[test]
fn server_first_protocols_work_over_mutual_tls() {
    let server = RawServer::start(|mut stream| {
        let _ = stream.write_all(b"220 ready\r\n");
        let mut seen = [0; 64];
        while let Ok(count @ 1..) = stream.read(&mut seen) {
            let _ = stream.write_all(&seen[..count]);
        }
    });
    let pki = Pki::new();
    let port = server.address().port();
    let tcp = format!("[[inbound.port]]\nport = {port}\nprotocol = \"tcp\"\n");
    let strict = server_sidecar(&pki, server.address(), &tcp);
    let caller = client_sidecar(&pki, strict.inbound(), "protocol = \"tcp\"\nlisten = \"127.0.0.1:0\"\n");
    let greets = |address| {
        let mut client = RawClient::connect(address);
        client.read_until(b"220 ready\r\n");
        client.send("back");
        client.read_until(b"back");
    };
    greets(caller.upstream("payments"));
    // Permissive cannot detect the protocol here, so it forwards bytes.
    let permissive = server_sidecar(&pki, server.address(), &format!("mtls = \"permissive\"\n{tcp}"));
    greets(permissive.inbound());
    // An undeclared port is delayed by protocol detection but works, with TLS too.
    let undeclared = server_sidecar(&pki, server.address(), "");
    let mine = pki.issue("checkout", |_| {});
    let mut stream = TlsClient::new(Some(&mine), &[]).connect(undeclared.inbound());
    let mut greeting = [0; 11];
    stream.read_exact(&mut greeting).expect("a greeting");
    assert_eq!(&greeting, b"220 ready\r\n");
}

/// A port declared `tcp` adds no delay: far less than the wait for protocol detection on an undeclared one.
#[test]
fn ports_declared_tcp_skip_protocol_detection() {
    let server = RawServer::start(|mut stream| drop(stream.write_all(b"220 ready\r\n")));
    let pki = Pki::new();
    let port = server.address().port();
    let tcp = format!("mtls = \"permissive\"\n[[inbound.port]]\nport = {port}\nprotocol = \"tcp\"\n");
    let callee = server_sidecar(&pki, server.address(), &tcp);
    let fastest = (0..10).map(|_| {
        let begun = Instant::now();
        RawClient::connect(callee.inbound()).read_until(b"220");
        begun.elapsed()
    });
    let fastest = fastest.min().unwrap_or_default();
    assert!(fastest < Duration::from_millis(90), "{fastest:?}");
}

#[test]
fn permissive_accepts_tls_and_plaintext_and_off_accepts_plaintext() {
    let (pki, service) = (Pki::new(), service());
    let permissive = server_sidecar(&pki, service.address(), "mtls = \"permissive\"\n");
    let plain = |proxy: &Proxy| {
        RawClient::connect(proxy.inbound())
            .ask("GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            .status()
    };
    assert_eq!(plain(&permissive), 200);
    assert_eq!(send_get(&client_sidecar(&pki, permissive.inbound(), "")).0, 200);
    // TLS without a client certificate has the same rights as plaintext.
    let anonymous = TlsClient::new(None, &["http/1.1"]).send_and_read(permissive.inbound(), super::GET);
    assert!(anonymous.expect("a response").contains("hello"));
    let off = server_sidecar(&pki, service.address(), "mtls = \"off\"\n");
    assert_eq!(plain(&off), 200);
    let port = service.address().port();
    let one_port = format!("[[inbound.port]]\nport = {port}\nmtls = \"off\"\n");
    assert_eq!(plain(&server_sidecar(&pki, service.address(), &one_port)), 200);
}

#[test]
fn health_checks_use_tls() {
    let (pki, service) = (Pki::new(), service());
    let server = server_sidecar(&pki, service.address(), "");
    let health = "health = { path = \"/\", interval = \"50ms\", unhealthy_after = 1 }\n";
    let good = client_sidecar(&pki, server.inbound(), health);
    let checks = "outrigger_tls_handshakes_total{direction=\"outbound\",outcome=\"full\"}";
    let resumed = "outrigger_tls_handshakes_total{direction=\"outbound\",outcome=\"resumed\"}";
    eventually("some checks", || metric(&good, checks) + metric(&good, resumed) >= 3.0);
    assert_eq!(send_get(&good).0, 200);
    // With another expected identity the endpoint is unhealthy, and the log says why.
    let stranger = id("stranger");
    let identity = pki.identity("checkout");
    let address = server.inbound();
    let wrong = Proxy::start(format!(
        "{identity}[[upstream]]\nname = \"payments\"\nendpoints = [\"{address}\"]\nidentity = [\"{stranger}\"]\n{health}"
    ));
    eventually("a failed check", || {
        wrong.stderr().contains("expected spiffe://shop.example/ns/shop/sa/stranger")
    });
}

#[test]
fn tls_sessions_are_resumed() {
    let (pki, service) = (Pki::new(), service());
    let server = server_sidecar(&pki, service.address(), "");
    let mine = pki.issue("checkout", |_| {});
    let client = TlsClient::new(Some(&mine), &["http/1.1"]);
    for _ in 0..5 {
        assert!(client.send_and_read(server.inbound(), super::GET).expect("a response").contains("hello"));
    }
    let resumed =
        metric(&server, "outrigger_tls_handshakes_total{direction=\"inbound\",outcome=\"resumed\"}");
    assert_eq!(resumed, 4.0);
}

/// Twenty clients connect and never start the handshake.
#[test]
fn silent_clients_before_the_handshake_do_not_block_others() {
    let (pki, service) = (Pki::new(), service());
    let server = server_sidecar(&pki, service.address(), "");
    let _idle: Vec<_> = (0..20).map(|_| TcpStream::connect(server.inbound()).expect("connects")).collect();
    assert_eq!(send_get(&client_sidecar(&pki, server.inbound(), "")).0, 200);
}

/// The requested host determines the expected server name, in a tunnel too.
#[test]
fn a_tunnel_verifies_the_name_of_the_requested_host() {
    let pki = Pki::new();
    let named =
        |name: &str| pki.issue(name, |p| p.subject_alt_names = vec![dns(&format!("{name}.shop.example"))]);
    let server = TlsServer::start(&named("a"), None, &[]);
    let (address, ca) = (server.address(), pki.write_ca());
    let proxy = Proxy::start(format!(
        "[[upstream]]\nname = \"shop\"\nhosts = [\"*.shop.example\"]\nendpoints = [\"{address}\"]\ntls = \"simple\"\nca = {ca:?}\n"
    ));
    let connect = |host: &str| {
        let mut client = RawClient::connect(proxy.outbound());
        client.send(format!("CONNECT {host}:25 HTTP/1.1\r\nHost: {host}:25\r\n\r\n"));
        let head = client.read_until(b"\r\n\r\n");
        (client, String::from_utf8_lossy(&head).into_owned())
    };
    let (mut client, head) = connect("a.shop.example");
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    // Bytes that are not HTTP.
    client.send("\x01\x02\x03");
    client.read_until(b"hello");
    let (_, head) = connect("b.shop.example");
    assert!(head.starts_with("HTTP/1.1 502") && head.contains("peer_identity"), "{head}");
}

#[test]
fn websocket_libraries_work_over_mutual_tls() {
    let Some(python) = python_with("websockets.asyncio.server") else { return };
    let python = python.display().to_string();
    let script = |name: &str| peer_script(name).display().to_string();
    let server = Daemon::start(&python, &[&script("websocket_echo.py")], &[]);
    let output = server.wait_for_output("port ");
    let port: u16 = output.split("port ").nth(1).and_then(|rest| rest.trim().parse().ok()).expect("a port");
    let pki = Pki::new();
    let callee = server_sidecar(&pki, ([127, 0, 0, 1], port).into(), "");
    let local = crate::support::free_port();
    let client = client_sidecar(&pki, callee.inbound(), &format!("listen = \"127.0.0.1:{local}\"\n"));
    for _ in 0..3 {
        let url = format!("ws://127.0.0.1:{local}/chat");
        let ran =
            Command::new(&python).args([&script("websocket_client.py"), &url]).output().expect("it runs");
        let said =
            format!("{}{}", String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
        assert_eq!(said.trim(), "closed with 1000", "{}", client.stderr());
    }
    assert_eq!(
        metric(&callee, "outrigger_tls_handshakes_total{direction=\"inbound\",outcome=\"no_certificate\"}"),
        0.0
    );
    let resumed =
        metric(&callee, "outrigger_tls_handshakes_total{direction=\"inbound\",outcome=\"resumed\"}");
    assert_eq!(resumed, 2.0, "each connection after the first one resumes a session");
}

/// Issue 14, fault 26: a request for one name closed the idle connections of all other names.
#[test]
fn idle_connections_of_several_tls_names_are_pooled_separately() {
    let pki = Pki::new();
    let ca = pki.write_ca();
    let certificate =
        pki.issue("payments", |params| params.subject_alt_names = vec![dns("a.test"), dns("b.test")]);
    let config = Arc::new(server_config(&certificate, None, &["http/1.1"]));
    let server = RawServer::start(move |stream| {
        let connection = rustls::ServerConnection::new(config.clone()).expect("a connection");
        let mut stream = rustls::StreamOwned::new(connection, stream);
        let mut seen = [0; 4096];
        while stream.read(&mut seen).is_ok_and(|count| count > 0) {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
            let _ = stream.flush();
        }
    });
    let proxy = Proxy::start(format!(
        "[[upstream]]\nname = \"payments\"\nhosts = [\"a.test\", \"b.test\"]\nendpoints = [\"{}\"]\ntls = \"simple\"\n\
         ca = {ca:?}\n",
        server.address()
    ));
    let mut client = RawClient::connect(proxy.outbound());
    for number in 0..10 {
        let host = ["a.test", "b.test"][number % 2];
        let response = client.ask(format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n"));
        assert_eq!(response.status(), 200, "{response:?}");
    }
    assert_eq!(server.connections(), 2, "one for each name");
}
