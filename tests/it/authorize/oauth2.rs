//! OAuth 2 tokens that the sidecar adds to requests for its upstreams.

use std::{fs, net::SocketAddr, thread};

use super::Echo;
use crate::support::{Launch, Proxy, RawClient, RawServer, eventually, issuer::Issuer, strict::Message};

const SECRET: &str = "s3cr3t/with:specials";

/// An upstream `up` that requires tokens, and the client secret in a file.
struct Client {
    directory: tempfile::TempDir,
    issuer: Issuer,
    echo: Echo,
}

impl Client {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        fs::write(directory.path().join("secret"), format!("{SECRET}\n")).expect("write");
        Self { directory, issuer: Issuer::start(), echo: Echo::start() }
    }

    fn upstream(&self, name: &str, more: &str) -> String {
        format!(
            "[[upstream]]\nname = \"{name}\"\nendpoints = [\"{}\"]\noauth2 = {{ token_url = \"{}\", client_id = \
             \"check out\", client_secret_file = \"{}\", scopes = [\"pay\", \"read\"] }}\n{more}\n",
            self.echo.server.address(),
            self.issuer.token_url(),
            self.directory.path().join("secret").display(),
        )
    }

    fn start(&self) -> Proxy {
        Launch::new(self.upstream("up", "")).arg("--log").arg("trace").start()
    }
}

fn ask(proxy: SocketAddr, head: &str) -> Message {
    RawClient::connect(proxy).ask(format!("GET / HTTP/1.1\r\nHost: up\r\n{head}\r\n"))
}

fn seen(response: Message) -> String {
    assert_eq!(response.status(), 200, "{}", String::from_utf8_lossy(&response.body));
    String::from_utf8(response.body).expect("text")
}

#[test]
fn every_request_carries_the_upstream_token_instead_of_the_clients() {
    let client = Client::new();
    let proxy = client.start();
    for _ in 0..3 {
        let seen = seen(ask(proxy.outbound(), "Authorization: Basic bWU6bWU=\r\n"));
        assert_eq!(seen.matches("authorization:").count(), 1, "{seen}");
        assert!(seen.contains("authorization: Bearer granted-1\n"), "{seen}");
    }
    assert_eq!(client.issuer.token_requests(), 1);
    let (field, body) = client.issuer.last_request();
    // base64 of `check%20out:s3cr3t%2Fwith%3Aspecials` (RFC 6749 §2.3.1).
    assert_eq!(field, "Basic Y2hlY2slMjBvdXQ6czNjcjN0JTJGd2l0aCUzQXNwZWNpYWxz");
    assert_eq!(body, "grant_type=client_credentials&scope=pay%20read");
    for page in ["/config", "/status", "/metrics"] {
        let response =
            RawClient::connect(proxy.admin()).ask(format!("GET {page} HTTP/1.1\r\nHost: localhost\r\n\r\n"));
        assert_eq!(response.status(), 200);
        let text = String::from_utf8_lossy(&response.body).into_owned();
        assert!(!text.contains("granted-") && !text.contains("s3cr3t"), "{page}: {text}");
    }
    let log = proxy.stderr();
    assert!(!log.contains("granted-") && !log.contains("s3cr3t") && !log.contains("Y2hlY2s"), "{log}");
}

#[test]
fn requests_before_the_first_token_share_one_token_request() {
    let client = Client::new();
    client.issuer.set_delay(300);
    let proxy = client.start();
    thread::scope(|scope| {
        for _ in 0..20 {
            scope.spawn(|| assert!(seen(ask(proxy.outbound(), "")).contains("Bearer granted-1\n")));
        }
    });
    assert_eq!(client.issuer.token_requests(), 1);
    // No request waits past its deadline.
    client.issuer.set_delay(60_000);
    let slow = client.start();
    let response = ask(slow.outbound(), "X-Request-Timeout-Ms: 200\r\n");
    assert!([503, 504].contains(&response.status()), "{}", response.status());
}

#[test]
fn tokens_are_renewed_while_in_use_and_with_the_current_secret() {
    let client = Client::new();
    client.issuer.set_lifetime(3);
    let proxy = client.start();
    let mut used = Vec::new();
    eventually("a third token", || {
        let seen = seen(ask(proxy.outbound(), ""));
        let token =
            seen.split("Bearer ").nth(1).and_then(|rest| rest.lines().next()).expect("a token").to_owned();
        if used.last() != Some(&token) {
            used.push(token);
            fs::write(client.directory.path().join("secret"), format!("rotated-{}", used.len()))
                .expect("write");
        }
        used.len() == 3
    });
    let (field, _) = client.issuer.last_request();
    // base64 of `check%20out:rotated-2`
    assert_eq!(field, "Basic Y2hlY2slMjBvdXQ6cm90YXRlZC0y");
}

#[test]
fn a_token_is_used_until_it_expires_while_the_token_endpoint_is_down() {
    let client = Client::new();
    client.issuer.set_lifetime(4);
    let proxy = client.start();
    assert!(seen(ask(proxy.outbound(), "")).contains("granted-1"));
    client.issuer.set_away(true);
    let asked = client.issuer.token_requests();
    eventually("a renewal in vain", || {
        assert!(seen(ask(proxy.outbound(), "")).contains("granted-1"));
        client.issuer.token_requests() > asked
    });
    let mut refused = None;
    eventually("the token's end", || {
        let response = ask(proxy.outbound(), "");
        let over = response.status() != 200;
        refused = Some(response);
        over
    });
    let refused = refused.expect("a response");
    assert_eq!(refused.status(), 503);
    assert!(refused.field("retry-after").is_some());
    let text = String::from_utf8_lossy(&refused.body).into_owned();
    assert!(
        text.contains("auth_unavailable") && text.contains("token endpoint responded with 503"),
        "{text}"
    );
    client.issuer.set_away(false);
    eventually("a new token", || ask(proxy.outbound(), "").status() == 200);
}

#[test]
fn a_missing_client_secret_is_reported() {
    let client = Client::new();
    fs::remove_file(client.directory.path().join("secret")).expect("remove");
    let proxy = client.start();
    let response = ask(proxy.outbound(), "");
    assert_eq!(response.status(), 503);
    let text = String::from_utf8_lossy(&response.body).into_owned();
    assert!(text.contains("/secret: No such file"), "{text}");
    assert_eq!(client.echo.request_count(), 0, "nothing goes out without its token");
}

#[test]
fn the_token_is_sent_to_its_upstream_only() {
    let client = Client::new();
    let other = Echo::start();
    // No service on the primary upstream, so that the fallback upstream responds.
    let gone = RawServer::scripted(b"");
    let mut text = client.upstream("up", "retry = false\nfallback = { upstream = \"other\" }");
    text = text.replace(&client.echo.server.address().to_string(), &gone.address().to_string());
    text += &format!("[[upstream]]\nname = \"other\"\nendpoints = [\"{}\"]\n", other.server.address());
    let proxy = Proxy::start(text);
    let seen = seen(ask(proxy.outbound(), "Authorization: Basic bWU6bWU=\r\n"));
    assert!(seen.contains("authorization: Basic bWU6bWU=\n") && !seen.contains("granted"), "{seen}");
    assert_eq!(client.issuer.token_requests(), 1);
}
