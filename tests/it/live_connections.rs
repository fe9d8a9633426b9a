//! A stricter configuration applies to live connections, too.

use std::{
    io::{Read, Write},
    net::SocketAddr,
    time::{Duration, Instant},
};

use crate::config_changes::{
    GET, UPGRADE, admin, echo_server, is_rejected, plaintext, reload, service, status, strict,
};
use crate::support::{
    Proxy, RawClient, RawServer, Upstream, WAIT_LIMIT, eventually,
    h2::GOAWAY,
    pki::Pki,
    text,
    tls::{TlsClient, TlsSocket},
};

/// A server whose response begins and does not end.
fn endless_server() -> RawServer {
    RawServer::start(|mut stream| {
        let mut seen = [0; 4096];
        let _ = stream.read(&mut seen);
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf");
        while let Ok(1..) = stream.read(&mut seen) {}
    })
}

/// Reads until these bytes have arrived.
fn read_until(stream: &mut impl Read, needle: &[u8]) -> Vec<u8> {
    let (mut got, mut chunk) = (Vec::new(), [0; 4096]);
    while !got.windows(needle.len()).any(|window| window == needle) {
        match stream.read(&mut chunk) {
            Ok(count @ 1..) => got.extend_from_slice(&chunk[..count]),
            end => panic!("{end:?} after {}", got.escape_ascii()),
        }
    }
    got
}

fn read_to_end(stream: &mut impl Read) -> Vec<u8> {
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
    rest
}

fn handshakes(client: &TlsClient, address: SocketAddr) -> bool {
    let said = client.send_and_read(address, "GET / HTTP/1.1\r\nHost: payments\r\nConnection: close\r\n\r\n");
    said.is_ok_and(|text| text.starts_with("HTTP/1.1 "))
}

/// The connection is drained, as one whose certificate is no longer trusted: served once more, with `Connection:
/// close`.
#[test]
fn raising_min_tls_drains_live_tls_1_2_connections() {
    let (pki, service) = (Pki::new(), service());
    let old = strict(&pki, service.address()).replace("[inbound]", "min_tls = \"1.2\"\n[inbound]");
    let proxy = Proxy::start(old.clone());
    let certificate = pki.issue("checkout", |_| {});
    let client = |alpn: &str| TlsClient::with_tls12(Some(&certificate), &[alpn]);
    let http1 = || -> TlsSocket {
        let mut stream = client("http/1.1").connect(proxy.inbound());
        stream.write_all(GET.as_bytes()).expect("write");
        read_until(&mut stream, b"reached the service");
        stream
    };
    let (mut busy, mut idle) = (http1(), http1());
    let mut two = client("h2").connect(proxy.inbound());
    two.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").expect("write");
    let mut newer = TlsClient::new(Some(&certificate), &["http/1.1"]).connect(proxy.inbound());
    newer.write_all(GET.as_bytes()).expect("write");
    read_until(&mut newer, b"reached the service");

    proxy.reconfigure(&old.replace("min_tls = \"1.2\"", "min_tls = \"1.3\""));
    eventually("a client of TLS 1.2 to be refused", || !handshakes(&client("http/1.1"), proxy.inbound()));
    busy.write_all(GET.as_bytes()).expect("write");
    let response = String::from_utf8_lossy(&read_to_end(&mut busy)).to_ascii_lowercase();
    assert!(response.is_empty() || response.contains("connection: close"), "{response}");
    assert!(read_to_end(&mut idle).is_empty());
    let frames = read_to_end(&mut two);
    let mut kinds = Vec::new();
    let mut at = 0;
    while let Some(&[a, b, c, kind, ..]) = frames.get(at..at + 9) {
        kinds.push(kind);
        at += 9 + u32::from_be_bytes([0, a, b, c]) as usize;
    }
    assert!(kinds.contains(&GOAWAY), "{kinds:?}");
    newer.write_all(GET.as_bytes()).expect("write");
    read_until(&mut newer, b"reached the service");
}

/// A response that continues after that is cut when `drain_timeout` has elapsed, and not before.
#[test]
fn an_endless_response_is_cut_after_drain_timeout() {
    const LIMIT: Duration = Duration::from_millis(1500);
    let (pki, server) = (Pki::new(), endless_server());
    let strict = strict(&pki, server.address());
    let old = strict.replace("[inbound]", "min_tls = \"1.2\"\n[inbound]")
        + "[runtime]\ndrain_timeout = \"1500ms\"\n";
    let certificate = pki.issue("checkout", |_| {});
    // TLS 1.2 where 1.3 is required; plaintext where a certificate is required.
    let proxy = Proxy::start(old.clone());
    let mut tls = TlsClient::with_tls12(Some(&certificate), &["http/1.1"]).connect(proxy.inbound());
    tls.write_all(GET.as_bytes()).expect("write");
    read_until(&mut tls, b"half");
    let began = Instant::now();
    proxy.reconfigure(&old.replace("min_tls = \"1.2\"", "min_tls = \"1.3\""));
    assert!(read_to_end(&mut tls).is_empty());
    assert!((LIMIT..WAIT_LIMIT).contains(&began.elapsed()), "{:?}", began.elapsed());

    let proxy = Proxy::start(old.replace("mtls = \"strict\"", "mtls = \"permissive\""));
    let mut plain = RawClient::connect(proxy.inbound());
    plain.send(GET);
    plain.read_until(b"half");
    plain.buffer.clear();
    let began = Instant::now();
    proxy.reconfigure(&old);
    assert!(plain.read_to_close().0.is_empty());
    assert!((LIMIT..WAIT_LIMIT).contains(&began.elapsed()), "{:?}", began.elapsed());
    assert_eq!(plaintext(proxy.inbound()), 403);
}

/// A tunnel and an upgraded connection are cut when `allow` no longer admits their peer.
#[test]
fn tightening_allow_cuts_live_tunnels_and_upgrades() {
    let (pki, echo) = (Pki::new(), echo_server());
    let port = echo.address().port();
    let certificate = pki.issue("checkout", |_| {});
    let entry =
        |name: &str| format!("[[inbound.allow]]\nidentity = [\"spiffe://shop.example/ns/shop/sa/{name}\"]\n");
    for (protocol, opening, response) in [("tcp", "bytes", &b"bytes"[..]), ("http1", UPGRADE, b"\r\n\r\n")] {
        let rest = format!("[[inbound.port]]\nport = {port}\nprotocol = \"{protocol}\"\n");
        let config = |names: &[&str]| {
            let entries: String = names.iter().map(|name| entry(name)).collect();
            strict(&pki, echo.address()).replace("[outbound]", &format!("{entries}[outbound]")) + &rest
        };
        let proxy = Proxy::start(config(&["checkout", "other"]));
        let mut client = TlsClient::new(Some(&certificate), &["http/1.1"]).connect(proxy.inbound());
        client.write_all(opening.as_bytes()).expect("write");
        read_until(&mut client, response);
        // A reload that still admits it does not touch it.
        proxy.reconfigure(&format!("[service]\nname = \"renamed\"\n{}", config(&["checkout", "other"])));
        eventually("the reload", || admin(&proxy, "/config").contains("renamed"));
        client.write_all(b"ping").expect("write");
        read_until(&mut client, b"ping");
        proxy.reconfigure(&config(&["other"]));
        let rest = read_to_end(&mut client);
        assert!(rest.is_empty(), "{protocol}: {}", rest.escape_ascii());
    }
}

/// Byte streams pass only where no request policy applies: this holds also for a tunnel that began before the policy
/// was added.
#[test]
fn adding_a_request_policy_cuts_live_tunnels() {
    let echo = echo_server();
    let address = echo.address();
    let inbound = format!("[inbound]\nforward_to = \"{address}\"\n");
    let listen =
        format!("[[upstream]]\nname = \"up\"\nlisten = \"127.0.0.1:0\"\nendpoints = [\"{address}\"]\n");
    let jwt = "[inbound.jwt]\nissuer = \"i\"\naudiences = [\"a\"]\njwks = \"jwks.json\"\n";
    for (upstream, before, policy) in [
        (false, &inbound, "rate_limit = { rate = 100 }\n"),
        (false, &inbound, "limits = { max_requests = 10 }\n"),
        (false, &inbound, "forwarded = \"append\"\n"),
        (false, &inbound, jwt),
        (true, &listen, "rate_limit = { rate = 100 }\n"),
        (true, &listen, "[[upstream.route]]\nrequest_headers = { set = { x-a = \"1\" } }\n"),
    ] {
        let proxy = Proxy::start(before.clone());
        let policy = policy.replace("jwks.json", &proxy.directory().join("jwks.json").display().to_string());
        std::fs::write(proxy.directory().join("jwks.json"), "{\"keys\":[]}").expect("write");
        let mut client = RawClient::connect(if upstream { proxy.upstream("up") } else { proxy.inbound() });
        client.send("*1\r\n$4\r\nPING\r\n");
        client.read_until(b"PING\r\n");
        // A policy that does not inspect requests is no reason to end it.
        proxy.reconfigure(&format!("{before}timeout = \"7s\"\n"));
        eventually("the reload", || admin(&proxy, "/config").contains("7s"));
        client.send("ping");
        client.read_until(b"ping");
        client.buffer.clear();
        proxy.reconfigure(&format!("{before}{policy}"));
        let (rest, _) = client.read_to_close();
        assert!(rest.is_empty(), "{policy}: {}", rest.escape_ascii());
    }
}

#[test]
fn an_allow_list_switched_to_observe_is_held_back() {
    let upstream = Upstream::http1(|_| async { text("reached the service") });
    let config = format!(
        "[inbound]\nforward_to = \"{}\"\n[[inbound.allow]]\nidentity = [\"spiffe://td/a\"]\n",
        upstream.address()
    );
    let proxy = Proxy::start(config.clone());
    assert_eq!(plaintext(proxy.inbound()), 403);
    proxy.reconfigure(&format!("{config}[runtime]\nobserve = [\"allow\"]\n"));
    eventually("the change to be held back", || is_rejected(&proxy));
    assert_eq!(plaintext(proxy.inbound()), 403);
    let rejected = status(&proxy)["config"]["rejected"].as_str().unwrap_or_default().to_owned();
    assert!(rejected.contains("inbound.allow is only observed by [runtime] observe"), "{rejected}");
    let accepted = reload(&proxy, &["--accept-less-security"]);
    assert!(accepted.status.success(), "{accepted:?}");
    assert_eq!(plaintext(proxy.inbound()), 200);
}
