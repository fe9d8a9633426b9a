//! A real identity provider (Authlib, over TLS with a private CA): its keys, its tokens, and an API that verifies
//! them.

use std::net::SocketAddr;

use super::Echo;
use crate::{
    identity::admin,
    support::{
        Daemon, Proxy, RawClient, eventually, peer_script, pki::Pki, python_with, strict::Message,
        tls::TlsClient,
    },
};

struct Provider {
    pki: Pki,
    address: SocketAddr,
    _daemon: Daemon,
}

impl Provider {
    /// None if Authlib is missing; that has been reported then.
    fn start() -> Option<Self> {
        let python = python_with("authlib.integrations.flask_oauth2")?.display().to_string();
        let pki = Pki::new();
        pki.write_ca();
        pki.write_leaf("id", |_| {});
        pki.write("secret", "s3cr3t:&\n");
        let file = |name: &str| pki.path(name).display().to_string();
        let script = peer_script("identity_provider.py").display().to_string();
        let arguments = [&script, &file("id.crt"), &file("id.key"), "check out", "s3cr3t:&"];
        let daemon = Daemon::start(&python, &arguments, &[]);
        let said = daemon.wait_for_output("port ");
        let port = said.split("port ").nth(1).and_then(|rest| rest.lines().next());
        let port: u16 = port.and_then(|port| port.trim().parse().ok()).expect("a port");
        Some(Self { pki, address: SocketAddr::from(([127, 0, 0, 1], port)), _daemon: daemon })
    }

    fn url(&self, path: &str) -> String {
        format!("https://localhost:{}{path}", self.address.port())
    }

    /// The provider's response to a request of the test.
    fn post(&self, path: &str) -> String {
        let request = format!(
            "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
        let response = TlsClient::new(None, &[]).send_and_read(self.address, &request).expect("a response");
        assert!(response.starts_with("HTTP/1.1 200"), "{response}");
        response.split("\r\n\r\n").nth(1).expect("a body").to_owned()
    }

    fn token(&self, algorithm: &str) -> String {
        self.post(&format!("/sign?alg={algorithm}"))
    }
}

fn ask_with(proxy: &Proxy, token: &str) -> Message {
    let head = format!("GET / HTTP/1.1\r\nHost: checkout\r\nAuthorization: Bearer {token}\r\n\r\n");
    RawClient::connect(proxy.inbound()).ask(head)
}

#[test]
fn tokens_are_verified_across_key_rotation() {
    let Some(provider) = Provider::start() else { return };
    let echo = Echo::start();
    let (service, keys, ca) = (echo.server.address(), provider.url("/jwks"), provider.pki.path("ca.crt"));
    let config = format!(
        "[inbound]\nforward_to = \"{service}\"\n[inbound.jwt]\nissuer = \"https://id.example\"\naudiences = [\"checkout\"]\njwks = \"{keys}\"\nca = {ca:?}\n"
    );
    let proxy = Proxy::start(config.clone());
    let mut old = Vec::new();
    for algorithm in ["RS256", "ES256", "EdDSA"] {
        let token = provider.token(algorithm);
        let response = ask_with(&proxy, &token);
        assert_eq!(response.status(), 200, "{algorithm}: {}", response.text());
        old.push(token);
    }
    let status = admin(&proxy, "/status").1;
    let status: serde_json::Value = serde_json::from_str(&status).expect("JSON");
    assert_eq!((&status["jwt"]["known"], &status["jwt"]["source"]), (&3.into(), &keys.into()), "{status}");
    assert_eq!(status["jwt"]["fetched"], 1);

    provider.post("/rotate");
    let new = provider.token("ES256");
    // Not before the provider may be queried again.
    eventually("the new key", || ask_with(&proxy, &new).status() == 200);
    assert!(
        old.iter().all(|token| ask_with(&proxy, token).status() == 200),
        "the old ones are still published"
    );
    // A key that is no longer published is no longer accepted.
    provider.post("/rotate");
    provider.post("/forget");
    let newest = provider.token("RS256");
    eventually("the newest key", || ask_with(&proxy, &newest).status() == 200);
    assert!(old.iter().all(|token| ask_with(&proxy, token).status() == 401));

    // A provider with an untrusted certificate is rejected.
    let doubting = Proxy::start(config.replace(&format!("ca = {ca:?}\n"), ""));
    assert_eq!(ask_with(&doubting, &newest).status(), 503);
    eventually("the reason", || admin(&doubting, "/status").1.contains("UnknownIssuer"));
}

#[test]
fn tokens_are_fetched_and_renewed_when_the_api_rejects_them() {
    let Some(provider) = Provider::start() else { return };
    let (at, token, ca) = (provider.address, provider.url("/token"), provider.pki.path("ca.crt"));
    let secret = provider.pki.path("secret");
    let proxy = Proxy::start(format!(
        "[[upstream]]\nname = \"up\"\nendpoints = [\"{at}\"]\ntls = \"simple\"\nserver_name = \"localhost\"\nca = {ca:?}\n\
         oauth2 = {{ token_url = \"{token}\", client_id = \"check out\", client_secret_file = {secret:?}, scopes = [\"pay\"], ca = {ca:?} }}\n"
    ));
    let pay = || RawClient::connect(proxy.outbound()).ask("GET /api HTTP/1.1\r\nHost: up\r\n\r\n");
    let response = pay();
    assert_eq!((response.status(), response.text().trim()), (200, "{\"paid\":true}"));
    let shown = || {
        let status: serde_json::Value = serde_json::from_str(&admin(&proxy, "/status").1).expect("JSON");
        status["upstreams"][0]["token"].clone()
    };
    assert_eq!(shown()["fetched"], 1);
    assert!(shown()["good_for_seconds"].as_u64().is_some_and(|left| left > 500), "{}", shown());
    // The client gets the rejection, since nothing is sent twice for it; the next requests have a new token.
    assert_eq!(provider.post("/revoke"), "1");
    assert_eq!(pay().status(), 401);
    eventually("a new token", || pay().status() == 200);
    assert_eq!(shown()["fetched"], 2);
    // The client secret is no longer valid.
    provider.pki.write("secret", "wrong");
    provider.post("/revoke");
    eventually("the reason", || {
        pay();
        shown()["error"].as_str().is_some_and(|error| error.contains("invalid_client"))
    });
}
