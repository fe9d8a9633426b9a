//! Keys of `[inbound.jwt]`, `[identity]`, `oauth2` and TLS of upstreams, changed one by one while the proxy runs.

use std::{fs, net::SocketAddr, sync::Arc};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};

use crate::support::{
    Proxy, RawClient, Upstream, eventually,
    issuer::{ISSUER, Issuer, good_claims},
    pki::{Pki, id},
    text,
    tls::{TlsClient, TlsServer, server_config, tls12_config},
    tokens::{Signer, jwks},
};

const GET: &str = "GET / HTTP/1.1\r\nHost: payments\r\nConnection: close\r\n\r\n";

/// A service that responds with the head that it received.
fn echo() -> Upstream {
    Upstream::http1(|request| {
        let mut seen = String::new();
        for (name, value) in request.headers() {
            seen.push_str(&format!("{name}: {}\n", String::from_utf8_lossy(value.as_bytes())));
        }
        async move { text(seen) }
    })
}

/// An HTTPS server at `localhost` with a certificate of this CA.
fn https(pki: &Pki, body: String) -> TlsServer {
    let config = server_config(&pki.issue("provider", |_| {}), None, &["http/1.1"]);
    TlsServer::start_answering(([127, 0, 0, 1], 0).into(), config, body)
}

/// `[inbound.jwt]`, key by key.
#[derive(Clone)]
struct Jwt {
    issuer: &'static str,
    audiences: &'static str,
    jwks: String,
    more: String,
}

impl Jwt {
    fn config(&self, service: SocketAddr) -> String {
        let Self { issuer, audiences, jwks, more } = self;
        format!(
            "[inbound]\nforward_to = \"{service}\"\n[inbound.jwt]\nissuer = \"{issuer}\"\naudiences = [\"{audiences}\"]\n\
             jwks = \"{jwks}\"\n{more}\n"
        )
    }
}

fn ask(proxy: &Proxy, path: &str, token: Option<&str>) -> (u16, String) {
    let field = token.map(|token| format!("Authorization: Bearer {token}\r\n")).unwrap_or_default();
    let response = RawClient::connect(proxy.inbound())
        .ask(format!("GET {path} HTTP/1.1\r\nHost: checkout\r\nConnection: close\r\n{field}\r\n"));
    (response.status(), response.text())
}

#[test]
fn every_key_of_jwt_applies_after_a_reload() {
    let (issuer, service) = (Issuer::start(), echo());
    let (signer, another) = (Signer::ed("one"), Signer::ed("another"));
    issuer.publish(&[&signer]);
    let start = Jwt { issuer: ISSUER, audiences: "checkout", jwks: issuer.keys_url(), more: String::new() };
    let with = |name: &str, value: Value| {
        let mut claims = good_claims();
        claims[name] = value;
        signer.token(&claims)
    };
    let good = signer.token(&good_claims());
    let file = tempfile::NamedTempFile::new().expect("a file");
    fs::write(file.path(), jwks(&[&another])).expect("write");
    let status = |proxy: &Proxy, token: &str| ask(proxy, "/", Some(token)).0;
    // The change; a token that is valid before, and one that is valid after.
    let changes = [
        (
            Jwt { issuer: "https://other.example", ..start.clone() },
            with("iss", json!("https://other.example")),
        ),
        (Jwt { audiences: "billing", ..start.clone() }, with("aud", json!("billing"))),
        (Jwt { jwks: file.path().display().to_string(), ..start.clone() }, another.token(&good_claims())),
    ];
    for (change, after) in &changes {
        let proxy = Proxy::start(start.config(service.address()));
        assert_eq!((status(&proxy, &good), status(&proxy, after)), (200, 401));
        proxy.reconfigure(&change.config(service.address()));
        eventually("the change to act", || status(&proxy, after) == 200);
        assert_eq!(status(&proxy, &good), 401, "{}", change.config(service.address()));
    }

    let proxy = Proxy::start(format!("[inbound]\nforward_to = \"{}\"\n", service.address()));
    assert_eq!(ask(&proxy, "/free", None).0, 200);
    proxy.reconfigure(&start.config(service.address()));
    eventually("the table to act", || ask(&proxy, "/free", None).0 == 401);
    let except = "except = [\"/free\"]\n".to_owned();
    proxy.reconfigure(&Jwt { more: except, ..start.clone() }.config(service.address()));
    eventually("`except` to act", || ask(&proxy, "/free", None).0 == 200);
    assert_eq!(ask(&proxy, "/", None).0, 401);
    assert!(!ask(&proxy, "/", Some(&good)).1.contains("x-user-id"));
    let claim = "claim_headers = { x-user-id = \"sub\" }".to_owned();
    proxy.reconfigure(&Jwt { more: claim, ..start.clone() }.config(service.address()));
    eventually("`claim_headers` to act", || ask(&proxy, "/", Some(&good)).1.contains("x-user-id: ann\n"));

    // The keys over HTTPS, from a server whose CA does not match at first.
    let (server_pki, other_pki) = (Pki::new(), Pki::new());
    let server = https(&server_pki, jwks(&[&signer]));
    let keys = format!("https://localhost:{}/jwks", server.address().port());
    let by =
        |pki: &Pki| Jwt { jwks: keys.clone(), more: format!("ca = {:?}", pki.write_ca()), ..start.clone() };
    let proxy = Proxy::start(by(&other_pki).config(service.address()));
    assert_eq!(status(&proxy, &good), 503);
    proxy.reconfigure(&by(&server_pki).config(service.address()));
    eventually("`ca` to act", || status(&proxy, &good) == 200);
}

/// `[identity]` of a sidecar that accepts mutual TLS only.
fn strict(files: [&std::path::Path; 3], service: SocketAddr, more: &str) -> String {
    let [cert, key, ca] = files;
    format!(
        "[identity]\ncert = {cert:?}\nkey = {key:?}\nca = {ca:?}\n{more}\n[inbound]\nforward_to = \"{service}\"\n"
    )
}

fn is_served(client: &TlsClient, proxy: &Proxy) -> bool {
    client.send_and_read(proxy.inbound(), GET).is_ok_and(|response| response.starts_with("HTTP/1.1 200"))
}

#[test]
fn every_key_of_identity_applies_after_a_reload() {
    let (pki, others, service) = (Pki::new(), Pki::new(), echo());
    let address = service.address();
    let (ca, other_ca) = (pki.write_ca(), others.write_ca());
    for name in ["payments", "orders"] {
        pki.write_leaf(name, |_| {});
    }
    let of = |name: &str| (pki.path(&format!("{name}.crt")), pki.path(&format!("{name}.key")));
    let (cert, key) = of("payments");
    let first = strict([&cert, &key, &ca], address, "");
    let certificate = pki.issue("checkout", |params| params.serial_number = Some(77_u64.into()));
    let (mine, stranger) = (
        TlsClient::new(Some(&certificate), &["http/1.1"]),
        TlsClient::new(Some(&others.issue("checkout", |_| {})), &["http/1.1"]),
    );
    let shown = |proxy: &Proxy| {
        let mut socket = mine.connect(proxy.inbound());
        while socket.conn.is_handshaking() {
            socket.conn.complete_io(&mut socket.sock).expect("a handshake");
        }
        socket.conn.peer_certificates().expect("a certificate")[0].to_vec()
    };

    let proxy = Proxy::start(first.clone());
    let before = shown(&proxy);
    let (cert, key) = of("orders");
    proxy.reconfigure(&strict([&cert, &key, &ca], address, ""));
    eventually("`cert` and `key` to act", || shown(&proxy) != before);

    let proxy = Proxy::start(first.clone());
    assert_eq!((is_served(&mine, &proxy), is_served(&stranger, &proxy)), (true, false));
    let both = pki.write("both.crt", &format!("{}{}", pki.ca_pem(), others.ca_pem()));
    let (cert, key) = of("payments");
    proxy.reconfigure(&strict([&cert, &key, &both], address, ""));
    eventually("`ca` to act", || is_served(&stranger, &proxy));
    let by_domain = format!("{{ \"shop.example\" = {ca:?}, \"else.example\" = {other_ca:?} }}");
    let table = first.replace(&format!("ca = {ca:?}"), &format!("ca = {by_domain}"));
    proxy.reconfigure(&table);
    eventually("`ca` by trust domain to act", || !is_served(&stranger, &proxy));
    assert!(is_served(&mine, &proxy));

    let proxy = Proxy::start(first.clone());
    let old = TlsClient::with_tls12(Some(&certificate), &["http/1.1"]);
    assert!(!is_served(&old, &proxy), "1.3 is the least");
    proxy.reconfigure(&strict([&cert, &key, &ca], address, "min_tls = \"1.2\""));
    eventually("`min_tls` to act", || is_served(&old, &proxy));
    proxy.reconfigure(&first);
    eventually("`min_tls` to act again", || !is_served(&old, &proxy));

    let crl = pki.revoke(&[77]);
    assert!(is_served(&mine, &proxy));
    proxy.reconfigure(&strict([&cert, &key, &ca], address, &format!("crl = {crl:?}")));
    eventually("`crl` to act", || !is_served(&mine, &proxy));
    let well = TlsClient::new(Some(&pki.issue("checkout", |_| {})), &["http/1.1"]);
    assert!(is_served(&well, &proxy), "another of the same service");
}

/// `oauth2` of an upstream, key by key.
#[derive(Clone)]
struct Oauth2 {
    token_url: String,
    client_id: &'static str,
    secret: std::path::PathBuf,
    more: String,
}

impl Oauth2 {
    fn config(&self, service: SocketAddr) -> String {
        let Self { token_url, client_id, secret, more } = self;
        format!(
            "[[upstream]]\nname = \"up\"\nendpoints = [\"{service}\"]\noauth2 = {{ token_url = \"{token_url}\", \
             client_id = \"{client_id}\", client_secret_file = {secret:?}{more} }}\n"
        )
    }
}

#[test]
fn every_key_of_oauth2_applies_after_a_reload() {
    let (first, second, service) = (Issuer::start(), Issuer::start(), Arc::new(echo()));
    let address = service.address();
    let folder = tempfile::tempdir().expect("a folder");
    let secret = |name: &str| {
        let path = folder.path().join(name);
        fs::write(&path, name).expect("write");
        path
    };
    let start = Oauth2 {
        token_url: first.token_url(),
        client_id: "checkout",
        secret: secret("one"),
        more: String::new(),
    };
    let proxy = Proxy::start(format!("[[upstream]]\nname = \"up\"\nendpoints = [\"{address}\"]\n"));
    let seen = || {
        RawClient::connect(proxy.outbound())
            .ask("GET / HTTP/1.1\r\nHost: up\r\nConnection: close\r\n\r\n")
            .text()
    };
    assert!(!seen().contains("authorization"));
    let bearer = |user: &str, secret: &str| format!("Basic {}", STANDARD.encode(format!("{user}:{secret}")));
    let mut now = start.clone();
    let mut becomes = |what: &str, change: Oauth2, issuer: &Issuer, (field, body): (String, &str)| {
        now = change;
        proxy.reconfigure(&now.config(address));
        eventually(&format!("`{what}` to act"), || {
            let token = seen();
            let (was_field, was_body) = issuer.last_request();
            token.contains("authorization: Bearer granted-") && was_field == field && was_body.contains(body)
        });
    };
    let grant = "grant_type=client_credentials";
    becomes("oauth2", start.clone(), &first, (bearer("checkout", "one"), grant));
    let other = Oauth2 { client_id: "shop", ..start.clone() };
    becomes("client_id", other, &first, (bearer("shop", "one"), grant));
    let other = Oauth2 { secret: secret("two"), ..start.clone() };
    becomes("client_secret_file", other, &first, (bearer("checkout", "two"), grant));
    let other = Oauth2 { more: ", scopes = [\"pay\"]".to_owned(), ..start.clone() };
    becomes("scopes", other, &first, (bearer("checkout", "one"), "scope=pay"));
    let other = Oauth2 { token_url: second.token_url(), ..start.clone() };
    becomes("token_url", other, &second, (bearer("checkout", "one"), grant));

    // Over HTTPS, from a server whose CA does not match at first.
    let (server_pki, other_pki) = (Pki::new(), Pki::new());
    let grant = json!({ "access_token": "by-https", "token_type": "Bearer", "expires_in": 3600 });
    let server = https(&server_pki, grant.to_string());
    let url = format!("https://localhost:{}/token", server.address().port());
    let by = |pki: &Pki| Oauth2 {
        token_url: url.clone(),
        more: format!(", ca = {:?}", pki.write_ca()),
        ..start.clone()
    };
    proxy.reconfigure(&by(&other_pki).config(address));
    eventually("a CA that does not know it", || seen().contains("auth_unavailable"));
    proxy.reconfigure(&by(&server_pki).config(address));
    eventually("`ca` to act", || seen().contains("authorization: Bearer by-https\n"));
}

#[test]
fn min_tls_of_an_upstream_applies_after_a_reload() {
    let pki = Pki::new();
    let ca = pki.write_ca();
    let config = tls12_config(&pki.issue("payments", |_| {}));
    let server = TlsServer::start_with(([127, 0, 0, 1], 0).into(), config);
    let file = |more: &str| {
        format!(
            "[[upstream]]\nname = \"payments\"\nendpoints = [\"{}\"]\ntls = \"simple\"\nca = {ca:?}\nretry = false\n\
             breaker = false\n{more}",
            server.address()
        )
    };
    let proxy = Proxy::start(file(""));
    let status = || RawClient::connect(proxy.outbound()).ask(GET).status();
    assert_eq!(status(), 502);
    proxy.reconfigure(&file("min_tls = \"1.2\"\n"));
    eventually("1.2 to be spoken", || status() == 200);
    proxy.reconfigure(&file("min_tls = \"1.3\"\n"));
    eventually("1.2 to be refused", || status() == 502);
}

/// Both directions have an expected identity; that of an upstream is checked after a reload, too.
#[test]
fn the_expected_identity_of_an_upstream_applies_after_a_reload() {
    let pki = Pki::new();
    let identity = pki.identity("checkout");
    let server = TlsServer::start(&pki.issue("payments", |_| {}), Some(&pki.ca_pem()), &["http/1.1"]);
    let file = |name: &str| {
        format!(
            "{identity}[[upstream]]\nname = \"payments\"\nendpoints = [\"{}\"]\nidentity = [\"{}\"]\nretry = false\n\
             breaker = false\n",
            server.address(),
            id(name)
        )
    };
    let proxy = Proxy::start(file("payments"));
    let status = || RawClient::connect(proxy.outbound()).ask(GET).status();
    assert_eq!(status(), 200);
    proxy.reconfigure(&file("orders"));
    eventually("another to be expected", || status() == 502);
}
