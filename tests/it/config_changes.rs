//! Files that change under a running sidecar: half written, emptied, less secure, and more secure.

use std::{
    fs::{self, File},
    io::{Read, Write},
    net::SocketAddr,
    path::Path,
    process::{Command, Output},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::support::{
    Proxy, RawClient, RawServer, Upstream, binary, eventually,
    h2::{End, H2Client, get},
    issuer::good_claims,
    pki::{Pki, id},
    text,
    tls::TlsClient,
    tokens::{Signer, jwks},
};

pub const GET: &str = "GET / HTTP/1.1\r\nHost: payments\r\n\r\n";
pub const UPGRADE: &str = "GET / HTTP/1.1\r\nHost: payments\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n";

pub fn service() -> Upstream {
    Upstream::http1(|_| async { text("reached the service") })
}

pub fn admin(proxy: &Proxy, path: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    RawClient::connect(proxy.admin()).ask(request).text()
}

pub fn status(proxy: &Proxy) -> Value {
    serde_json::from_str(&admin(proxy, "/status")).expect("JSON")
}

pub fn is_rejected(proxy: &Proxy) -> bool {
    admin(proxy, "/metrics").lines().any(|line| line == "outrigger_config_rejected 1")
}

pub fn plaintext(address: SocketAddr) -> u16 {
    RawClient::connect(address).ask(GET).status()
}

/// `outrigger reload`
pub fn reload(proxy: &Proxy, arguments: &[&str]) -> Output {
    let token = proxy.ready()["admin_token_file"].as_str().expect("a token file").to_owned();
    let admin = proxy.admin().to_string();
    let common = ["reload", "--admin", &admin, "--token-file", &token];
    Command::new(binary()).args(common).args(arguments).output().expect("it runs")
}

pub fn strict(pki: &Pki, service: SocketAddr) -> String {
    let identity = pki.identity("payments");
    format!(
        "{identity}[inbound]\nforward_to = \"{service}\"\nmtls = \"strict\"\n[outbound]\nunknown = \"deny\"\n"
    )
}

fn file(proxy: &Proxy) -> std::path::PathBuf {
    proxy.directory().join("outrigger.toml")
}

/// Sends requests for as long as nothing else may happen.
fn holds_for(time: Duration, condition: impl Fn() -> bool) {
    let begin = Instant::now();
    while begin.elapsed() < time {
        assert!(condition(), "after {:?}", begin.elapsed());
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn an_emptied_configuration_is_held_back_until_it_is_confirmed() {
    let (pki, service) = (Pki::new(), service());
    let config = strict(&pki, service.address());
    let confirm: [&dyn Fn(&Proxy); 2] = [
        &|proxy| {
            let accepted = reload(proxy, &["--accept-less-security"]);
            assert!(accepted.status.success(), "{accepted:?}");
        },
        &|proxy| proxy.signal("HUP"),
    ];
    for confirm in confirm {
        let proxy = Proxy::start(config.clone());
        assert_eq!(plaintext(proxy.inbound()), 403);
        assert!(!is_rejected(&proxy));
        // In place, as a full disk leaves it.
        drop(File::create(file(&proxy)).expect("truncate"));
        eventually("the change to be held back", || is_rejected(&proxy));
        assert_eq!(plaintext(proxy.inbound()), 403, "what protects the service still does");
        let reason = status(&proxy)["config"]["rejected"].as_str().unwrap_or_default().to_owned();
        for part in
            ["outrigger.toml is empty now", "[identity] is gone", "outrigger reload --accept-less-security"]
        {
            assert!(reason.contains(part), "{part} is not in {reason}");
            assert!(proxy.stderr().contains(part), "{}", proxy.stderr());
        }
        let refused = reload(&proxy, &[]);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(1), "{refused:?}");
        assert!(said.contains("held back") && said.contains("[identity] is gone"), "{said}");
        // Another valid change that still lacks the protection changes nothing.
        proxy.reconfigure("[service]\nname = \"other\"\n");
        eventually("the next change", || {
            status(&proxy)["config"]["rejected"]
                .as_str()
                .is_some_and(|reason| !reason.contains("is empty now"))
        });
        assert_eq!(plaintext(proxy.inbound()), 403);
        drop(File::create(file(&proxy)).expect("truncate"));
        confirm(&proxy);
        eventually("the confirmed change", || !is_rejected(&proxy));
        // Back to the default forward_to, where nothing listens: whatever the status, it is not 403.
        assert_ne!(plaintext(proxy.inbound()), 403);
    }
}

#[test]
fn a_valid_file_after_one_that_was_held_back_is_applied() {
    let (pki, service) = (Pki::new(), service());
    let config = strict(&pki, service.address());
    let proxy = Proxy::start(config.clone());
    proxy.reconfigure(&config.replace("mtls = \"strict\"", "mtls = \"permissive\""));
    eventually("the change to be held back", || is_rejected(&proxy));
    assert_eq!(plaintext(proxy.inbound()), 403);
    proxy.reconfigure(&format!("{config}[service]\nname = \"renamed\"\n"));
    eventually("the repaired file", || !is_rejected(&proxy));
    assert_eq!(plaintext(proxy.inbound()), 403);
    // The other files are unchanged, so this reads the same again.
    let again = reload(&proxy, &[]);
    assert!(again.status.success(), "{again:?}");
    assert!(String::from_utf8_lossy(&again.stdout).contains("nothing changed"), "{again:?}");
}

/// Writes a file up to and including the first `end`, as a full disk or a crashed editor leaves it.
fn truncate_after(proxy: &Proxy, config: &str, end: &str) {
    let length = config.find(end).expect("it is there") + end.len();
    let whole = fs::read_to_string(file(proxy)).expect("read");
    let before = whole.find(config).expect("it is in the file");
    fs::write(file(proxy), &whole[..before + length]).expect("write");
    eventually("the change to be held back", || is_rejected(proxy));
}

fn rejected(proxy: &Proxy) -> String {
    status(proxy)["config"]["rejected"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn a_truncated_allow_entry_admits_no_client() {
    let (pki, service) = (Pki::new(), service());
    let entry = format!("[[inbound.allow]]\nidentity = [\"{}\"]\npaths = [\"/public*\"]\n", id("checkout"));
    let config = format!("{}{entry}", strict(&pki, service.address()));
    let proxy = Proxy::start(config.clone());
    let checkout = pki.issue("checkout", |_| {});
    let is_let_in = |path: &str| {
        let request = format!("GET {path} HTTP/1.1\r\nHost: payments\r\nConnection: close\r\n\r\n");
        let said = TlsClient::new(Some(&checkout), &["http/1.1"]).send_and_read(proxy.inbound(), &request);
        said.is_ok_and(|text| text.contains("reached"))
    };
    assert!(is_let_in("/public") && !is_let_in("/admin"));
    truncate_after(&proxy, &entry, "\"]\n");
    assert!(rejected(&proxy).contains("inbound.allow entry 1 has no paths any more"), "{}", rejected(&proxy));
    assert!(is_let_in("/public") && !is_let_in("/admin"));
    proxy.signal("HUP");
    eventually("the confirmed change", || is_let_in("/admin"));
    assert!(!is_rejected(&proxy));
}

#[test]
fn a_truncated_upstream_is_not_reached_in_plaintext() {
    let (pki, plaintext) = (Pki::new(), service());
    let upstream = format!(
        "[[upstream]]\nname = \"payments\"\nendpoints = [\"{}\"]\ntls = \"mutual\"\nidentity = [\"{}\"]\n",
        plaintext.address(),
        id("payments")
    );
    let proxy = Proxy::start(format!("{}{upstream}", pki.identity("checkout")));
    let call = || RawClient::connect(proxy.outbound()).ask(GET).status();
    assert_eq!(call(), 502, "the endpoint speaks no TLS");
    truncate_after(&proxy, &upstream, "\"]\n");
    let reason = rejected(&proxy);
    for part in ["upstream payments no longer uses tls = \"mutual\"", "identity of upstream payments is gone"]
    {
        assert!(reason.contains(part), "{reason}");
    }
    assert_ne!(call(), 200, "nothing is sent in plaintext");
}

#[test]
fn one_emptied_file_of_several_is_held_back() {
    let proxy = Proxy::start("[outbound]\nunknown = \"deny\"\n");
    drop(File::create(proxy.directory().join("base.toml")).expect("truncate"));
    eventually("the change to be held back", || is_rejected(&proxy));
    let reason = status(&proxy)["config"]["rejected"].as_str().unwrap_or_default().to_owned();
    assert!(reason.contains("base.toml is empty now"), "{reason}");
}

#[test]
fn a_file_is_read_after_its_writer_closes_it() {
    let (pki, service) = (Pki::new(), service());
    let config = strict(&pki, service.address());
    let proxy = Proxy::start(config.clone());
    let mut writer = File::create(file(&proxy)).expect("truncate");
    let whole = format!("[service]\nname = \"renamed\"\n{config}");
    let (first, second) = whole.split_at("[service]\nname = \"renamed\"\n".len());
    writer.write_all(first.as_bytes()).expect("write");
    // Far longer than the writer's next step takes: nothing may be read from it, not even to be rejected.
    holds_for(Duration::from_millis(600), || plaintext(proxy.inbound()) == 403 && !is_rejected(&proxy));
    writer.write_all(second.as_bytes()).expect("write");
    drop(writer);
    eventually("the whole file", || admin(&proxy, "/config").contains("renamed"));
    assert!(!is_rejected(&proxy));
    assert_eq!(plaintext(proxy.inbound()), 403);
}

/// Writes the first half of a file, checks for a while, then writes the rest; then empties it.
fn half_written_then_empty(path: &Path, text: &str, holds: impl Fn() -> bool) {
    let mut writer = File::create(path).expect("truncate");
    writer.write_all(&text.as_bytes()[..text.len() / 2]).expect("write");
    holds_for(Duration::from_millis(400), &holds);
    writer.write_all(&text.as_bytes()[text.len() / 2..]).expect("write");
    drop(writer);
    holds_for(Duration::from_millis(200), &holds);
    drop(File::create(path).expect("truncate"));
    holds_for(Duration::from_millis(400), &holds);
}

#[test]
fn endpoints_survive_a_slow_writer_and_an_emptied_file() {
    let (service, folder) = (service(), tempfile::tempdir().expect("a folder"));
    let list = folder.path().join("endpoints.json");
    let written = format!("[\"{}\"]", service.address());
    fs::write(&list, &written).expect("write");
    let proxy = Proxy::start(format!(
        "[[upstream]]\nname = \"payments\"\nendpoints = \"file://{}\"\n",
        list.display()
    ));
    let works = || RawClient::connect(proxy.outbound()).ask(GET).status() == 200;
    eventually("its endpoints", works);
    half_written_then_empty(&list, &written, works);
    eventually("the reason", || {
        proxy.stderr().contains("the file is empty; a list without endpoints is `[]`")
    });
    assert_eq!(proxy.stderr().matches("endpoints could not be looked up").count(), 1, "{}", proxy.stderr());
}

#[test]
fn keys_survive_a_slow_writer_and_an_emptied_file() {
    let (service, folder) = (service(), tempfile::tempdir().expect("a folder"));
    let (signer, path) = (Signer::ed("one"), folder.path().join("jwks.json"));
    let written = jwks(&[&signer]);
    fs::write(&path, &written).expect("write");
    let issuer = good_claims()["iss"].as_str().expect("an issuer").to_owned();
    let proxy = Proxy::start(format!(
        "[inbound]\nforward_to = \"{}\"\n[inbound.jwt]\nissuer = \"{issuer}\"\naudiences = [\"checkout\", \"shop\"]\njwks = {path:?}\n",
        service.address()
    ));
    let token = signer.token(&good_claims());
    let request = format!("GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\n\r\n");
    let works = || RawClient::connect(proxy.inbound()).ask(&request).status() == 200;
    assert!(works());
    half_written_then_empty(&path, &written, works);
    eventually("the reason", || proxy.stderr().contains("the keys of the token issuer cannot be read"));
}

#[test]
fn certificates_roots_and_revocations_survive_a_slow_writer_and_an_emptied_file() {
    let (pki, service) = (Pki::new(), service());
    let crl = pki.revoke(&[4711]);
    let identity = pki.identity("payments");
    let server =
        Proxy::start(format!("{identity}crl = {crl:?}\n[inbound]\nforward_to = \"{}\"\n", service.address()));
    let good = pki.issue("checkout", |_| {});
    let revoked = pki.issue("checkout", |p| p.serial_number = Some(4711_u64.into()));
    let gets = "GET / HTTP/1.1\r\nHost: payments\r\nConnection: close\r\n\r\n";
    let reaches = |certificate| {
        let said = TlsClient::new(Some(certificate), &["http/1.1"]).send_and_read(server.inbound(), gets);
        said.is_ok_and(|text| text.contains("reached"))
    };
    let holds = || reaches(&good) && !reaches(&revoked);
    for name in ["crl.pem", "ca.crt", "payments.crt", "payments.key"] {
        let path = pki.path(name);
        let written = fs::read_to_string(&path).expect("read");
        half_written_then_empty(&path, &written, holds);
        eventually("the reason", || server.stderr().contains(&format!("{name} ")));
        pki.write(name, &written);
    }
}

pub fn echo_server() -> RawServer {
    RawServer::start(|mut stream| {
        let mut seen = [0; 4096];
        while let Ok(count @ 1..) = stream.read(&mut seen) {
            let response: &[u8] = match &seen[..count] {
                request if request.starts_with(b"GET") => {
                    b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n"
                }
                bytes => bytes,
            };
            if stream.write_all(response).is_err() {
                break;
            }
        }
    })
}

/// Connections accepted in plaintext or without a certificate are not served any more once `mtls` is "strict".
#[test]
fn switching_to_strict_drains_live_plaintext_connections() {
    let (pki, service) = (Pki::new(), service());
    let config = strict(&pki, service.address());
    let proxy = Proxy::start(config.replace("mtls = \"strict\"", "mtls = \"permissive\""));
    let mut busy = RawClient::connect(proxy.inbound());
    assert_eq!(busy.ask(GET).status(), 200);
    let mut idle = RawClient::connect(proxy.inbound());
    assert_eq!(idle.ask(GET).status(), 200);
    let mut tls = TlsClient::new(None, &["http/1.1"]).connect(proxy.inbound());
    tls.write_all(GET.as_bytes()).expect("write");
    let mut seen = [0; 4096];
    let count = tls.read(&mut seen).expect("a response");
    assert!(String::from_utf8_lossy(&seen[..count]).starts_with("HTTP/1.1 200"));

    proxy.reconfigure(&config);
    eventually("strict", || plaintext(proxy.inbound()) == 403);
    if let Some(Ok(Some(response))) = busy.send(GET).then(|| busy.response()) {
        assert_eq!(response.status(), 403, "{}", response.text());
        assert_eq!(response.field("connection"), Some("close"));
        assert!(response.text().contains("mutual TLS"), "{}", response.text());
    }
    let (rest, _) = busy.read_to_close();
    assert!(rest.is_empty(), "nothing comes behind it");
    let (rest, _) = idle.read_to_close();
    assert!(!String::from_utf8_lossy(&rest).contains("200 OK"), "{rest:?}");
    let _ = tls.write_all(GET.as_bytes());
    let mut rest = Vec::new();
    let _ = tls.read_to_end(&mut rest);
    assert!(!String::from_utf8_lossy(&rest).contains("HTTP/1.1 200"), "{}", String::from_utf8_lossy(&rest));
}

#[test]
fn switching_to_strict_drains_live_plaintext_http2() {
    let pki = Pki::new();
    let service = Upstream::h2c(|_| async { text("reached the service") });
    let config = strict(&pki, service.address());
    let proxy = Proxy::start(config.replace("mtls = \"strict\"", "mtls = \"permissive\""));
    let mut client = H2Client::connect(proxy.inbound());
    client.must_get(1, "/");
    proxy.reconfigure(&config);
    eventually("strict", || plaintext(proxy.inbound()) == 403);
    client.headers(3, &get("/"), true);
    let end = client.end_of(3);
    assert!(!matches!(end, End::Response(Some(200)) | End::Silent), "it is still served: {end:?}");
}

#[test]
fn switching_to_strict_cuts_live_tunnels_and_upgrades() {
    let (pki, echo) = (Pki::new(), echo_server());
    let port = echo.address().port();
    let config = strict(&pki, echo.address());
    let declared = |protocol: &str| format!("[[inbound.port]]\nport = {port}\nprotocol = \"{protocol}\"\n");
    for (protocol, opening) in [("tcp", "bytes"), ("auto", UPGRADE)] {
        let config = format!("{config}{}", declared(protocol));
        let proxy = Proxy::start(config.replace("mtls = \"strict\"", "mtls = \"permissive\""));
        let mut client = RawClient::connect(proxy.inbound());
        assert!(client.send(opening));
        let response: &[u8] = if protocol == "tcp" { b"bytes" } else { b"\r\n\r\n" };
        client.read_until(response);
        assert!(client.send("ping"));
        client.read_until(b"ping");
        proxy.reconfigure(&config);
        let (rest, _) = client.read_to_close();
        assert!(rest.is_empty(), "{protocol}: {}", String::from_utf8_lossy(&rest));
    }
}

/// A byte stream cannot be drained: it is cut when its peer is revoked; a peer that is still trusted keeps its stream,
/// even when its certificate has expired since.
#[test]
fn revoking_a_peer_cuts_its_byte_streams() {
    let (pki, echo) = (Pki::new(), echo_server());
    let revoked = pki.issue("checkout", |p| p.serial_number = Some(4711_u64.into()));
    let trusted = pki.issue("checkout", |_| {});
    let port = echo.address().port();
    for (protocol, alpn, opening, response) in
        [("tcp", &[][..], "bytes", &b"bytes"[..]), ("auto", &["http/1.1"], UPGRADE, b"\r\n\r\n")]
    {
        let crl = pki.revoke(&[1]);
        let proxy = Proxy::start(format!(
            "{}crl = {crl:?}\n[inbound]\nforward_to = \"{}\"\n[[inbound.port]]\nport = {port}\nprotocol = \"{protocol}\"\n",
            pki.identity("payments"),
            echo.address()
        ));
        let expires = std::time::SystemTime::now() + Duration::from_secs(5);
        let expiring = pki.issue("checkout", |p| p.not_after = expires.into());
        let open = |certificate| {
            let mut stream = TlsClient::new(Some(certificate), alpn).connect(proxy.inbound());
            stream.write_all(opening.as_bytes()).expect("write");
            let mut seen = Vec::new();
            while !seen.ends_with(response) {
                let mut byte = [0];
                stream.read_exact(&mut byte).expect("a response");
                seen.push(byte[0]);
            }
            stream
        };
        let (mut cut, mut kept, mut expired) = (open(&revoked), open(&trusted), open(&expiring));
        pki.revoke(&[1, 4711]);
        let mut rest = Vec::new();
        let _ = cut.read_to_end(&mut rest);
        assert!(rest.is_empty(), "{protocol}: {}", String::from_utf8_lossy(&rest));
        eventually("the log", || proxy.stderr().contains("its peer's certificate was revoked"));
        eventually("its expiry", || std::time::SystemTime::now() > expires + Duration::from_secs(1));
        for stream in [&mut kept, &mut expired] {
            stream.write_all(b"ping").expect("write");
            let mut pong = [0; 4];
            stream.read_exact(&mut pong).expect("its stream lives on");
        }
    }
}

/// A reload does not touch a connection that it still allows.
#[test]
fn allowed_connections_survive_reloads() {
    let (pki, service) = (Pki::new(), service());
    let config = strict(&pki, service.address()).replace("mtls = \"strict\"", "mtls = \"permissive\"");
    let proxy = Proxy::start(config.clone());
    let mut plain = RawClient::connect(proxy.inbound());
    assert_eq!(plain.ask(GET).status(), 200);
    for number in 0..3 {
        proxy.reconfigure(&format!("[service]\nname = \"s{number}\"\n{config}"));
        eventually("the reload", || admin(&proxy, "/config").contains(&format!("\"s{number}\"")));
        assert_eq!(plain.ask(GET).status(), 200);
    }
}
