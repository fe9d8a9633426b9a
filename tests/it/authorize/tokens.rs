//! `[inbound.jwt]` through the real binary.

use std::{
    fs,
    io::{Read, Write},
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::Echo;
use crate::support::{
    Launch, Proxy, RawClient, RawServer, eventually,
    issuer::{ISSUER, Issuer, good_claims, in_seconds},
    strict::Message,
    tokens::{Signer, encode, jwks},
};

fn config(jwks: &str, forward_to: SocketAddr, more: &str) -> String {
    format!(
        "[inbound]\nforward_to = \"{forward_to}\"\n[inbound.jwt]\nissuer = \"{ISSUER}\"\naudiences = [\"checkout\", \
         \"shop\"]\njwks = \"{jwks}\"\n{more}\n"
    )
}

fn ask(address: SocketAddr, head: &str) -> Message {
    RawClient::connect(address).ask(format!("GET /v1/orders HTTP/1.1\r\nHost: checkout\r\n{head}\r\n"))
}

fn ask_with(address: SocketAddr, token: &str) -> Message {
    ask(address, &format!("Authorization: Bearer {token}\r\n"))
}

fn problem(response: &Message) -> Value {
    serde_json::from_slice(&response.body).expect("a problem document")
}

fn metric(proxy: &Proxy, series: &str) -> u64 {
    let page = RawClient::connect(proxy.admin()).ask("GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n");
    let page = String::from_utf8(page.body).expect("text");
    let line =
        page.lines().find_map(|line| line.strip_prefix(series)).unwrap_or_else(|| panic!("no {series}"));
    line.trim().parse().expect("a number")
}

#[test]
fn only_requests_with_a_valid_token_reach_the_service() {
    let (issuer, echo) = (Issuer::start(), Echo::start());
    let signers = [Signer::rsa("rsa"), Signer::ec("ec"), Signer::ed("ed")];
    issuer.publish(&signers.each_ref());
    let proxy = Proxy::start(config(&issuer.keys_url(), echo.server.address(), ""));
    for signer in &signers {
        let token = signer.token(&good_claims());
        let response = ask_with(proxy.inbound(), &token);
        assert_eq!(response.status(), 200, "{}", String::from_utf8_lossy(&response.body));
        let seen = String::from_utf8(response.body).expect("text");
        assert!(
            seen.contains(&format!("authorization: Bearer {token}")),
            "the service gets it as it came: {seen}"
        );
    }
    let passed = echo.request_count();

    let with = |name: &str, value: Value| {
        let mut claims = good_claims();
        claims[name] = value;
        claims
    };
    let [rsa, ec, _] = &signers;
    let none = format!("{}.{}.", encode(r#"{"alg":"none"}"#), encode(good_claims().to_string()));
    let stranger = Signer::ec("ec");
    let brought = Signer::ec("mine");
    for (token, reason) in [
        (rsa.confused(&good_claims()), "signed with `HS256`"),
        (none, "signed with `none`"),
        (rsa.token_with(&json!({ "alg": "ES256" }), &good_claims()), "the token's key is for RS256"),
        (stranger.token(&good_claims()), "signature is invalid"),
        (brought.token_with(&json!({ "jwk": brought.jwk() }), &good_claims()), "has no key `mine`"),
        (ec.token_with(&json!({ "crit": ["x"], "x": 1 }), &good_claims()), "has `crit`"),
        (ec.token(&with("aud", json!("billing"))), "audience is not `checkout`, `shop`"),
        (ec.token(&with("iss", json!("https://evil.example"))), "issuer is not `https"),
        (ec.token(&with("exp", json!(in_seconds(-120)))), "expired 12"),
        (ec.token(&with("nbf", json!(in_seconds(120)))), "becomes valid in 1"),
        ("a.b".to_owned(), "not a JWT"),
        ("x".repeat(9000), "longer than 8192 bytes"),
    ] {
        let response = ask_with(proxy.inbound(), &token);
        assert_eq!(response.status(), 401, "{reason}");
        let challenge = response.field("www-authenticate").unwrap_or_default().to_owned();
        assert!(challenge.starts_with("Bearer realm=\"outrigger/"), "{challenge}");
        assert!(challenge.ends_with("error=\"invalid_token\""), "{challenge}");
        let problem = problem(&response);
        assert_eq!(problem["cause"], "jwt_invalid");
        assert!(
            problem["detail"].as_str().is_some_and(|detail| detail.contains(reason)),
            "{problem} for {reason}"
        );
    }
    let missing = ask(proxy.inbound(), "");
    assert_eq!(missing.status(), 401);
    assert!(!missing.field("www-authenticate").unwrap_or_default().contains("error"), "RFC 6750 §3");
    let token = ec.token(&good_claims());
    let twice = format!("Authorization: Bearer {token}\r\nAuthorization: Bearer {token}\r\n");
    assert_eq!(ask(proxy.inbound(), &twice).status(), 401);
    assert_eq!(ask(proxy.inbound(), "Authorization: Basic YTpi\r\n").status(), 401);
    // An upgrade is a request like any other.
    let upgrade = "Connection: upgrade\r\nUpgrade: websocket\r\n";
    assert_eq!(ask(proxy.inbound(), upgrade).status(), 401);
    assert_eq!(echo.request_count(), passed, "the service has seen nothing of all that");
    assert_eq!(metric(&proxy, "outrigger_rejected_total{upstream=\"inbound\",reason=\"jwt_invalid\"}"), 16);
}

#[test]
fn byte_streams_are_rejected_where_tokens_are_required() {
    let issuer = Issuer::start();
    issuer.publish(&[&Signer::ed("ed")]);
    let received = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&received);
    let service = RawServer::start(move |mut stream| {
        let _ = stream.write_all(b"welcome\r\n");
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        seen.lock().expect("a lock").extend(bytes);
    });
    let plain = "\x01\x02\x03 hello";
    // An unknown method is still a request, to a lenient service and to this proxy.
    let disguised = format!("{} / HTTP/1.1\r\nHost: a\r\n\r\n", "X".repeat(30));
    let refusing = Proxy::start(config(&issuer.keys_url(), service.address(), ""));
    for (bytes, status) in [(plain, "HTTP/1.1 400 "), (&disguised, "HTTP/1.1 401 ")] {
        let mut client = RawClient::connect(refusing.inbound());
        client.send(bytes);
        let read = client.read_until(b"\r\n\r\n");
        assert!(read.starts_with(status.as_bytes()), "{:?}", String::from_utf8_lossy(&read));
    }
    assert!(received.lock().expect("a lock").is_empty(), "the service has seen none of it");
    let port = service.address().port();
    let declared = format!("[[inbound.port]]\nport = {port}\nprotocol = \"tcp\"");
    let passing = Proxy::start(config(&issuer.keys_url(), service.address(), &declared));
    RawClient::connect(passing.inbound()).read_until(b"welcome");
}

#[test]
fn exempt_paths_need_no_token_but_ambiguous_spellings_do() {
    let (issuer, echo) = (Issuer::start(), Echo::start());
    issuer.publish(&[&Signer::ed("ed")]);
    let more = "except = [\"/healthz\", \"/public/*\"]";
    let proxy = Proxy::start(config(&issuer.keys_url(), echo.server.address(), more));
    let get = |path: &str| {
        let request = format!("GET {path} HTTP/1.1\r\nHost: checkout\r\n\r\n");
        RawClient::connect(proxy.inbound()).ask(request).status()
    };
    for (path, status) in [
        ("/healthz", 200),
        ("/public/a?x=/../admin", 200),
        ("/public/%61", 200),
        ("/v1/orders", 401),
        ("/healthz/", 401),
        ("/public", 401),
        ("/public/../v1/orders", 400),
        ("/public/..%2fv1", 400),
        ("/public/%2e%2e/v1", 400),
        ("/public/..;/v1", 400),
        ("/public\\..\\v1", 400),
        ("//healthz", 400),
    ] {
        assert_eq!(get(path), status, "{path}");
    }
    let moved = "X-Original-URL: /v1/orders\r\n";
    let response = RawClient::connect(proxy.inbound())
        .ask(format!("GET /public/a HTTP/1.1\r\nHost: checkout\r\n{moved}\r\n"));
    assert_eq!(response.status(), 400);
    assert_eq!(echo.request_count(), 3);
}

#[test]
fn only_the_sidecar_sets_claim_headers() {
    let (issuer, echo, signer) = (Issuer::start(), Echo::start(), Signer::ec("ec"));
    issuer.publish(&[&signer]);
    let more = "except = [\"/free\"]\nclaim_headers = { x-user-id = \"sub\", x-groups = \"groups\", x-none = \"none\" }";
    let proxy = Proxy::start(config(&issuer.keys_url(), echo.server.address(), more));
    let mut claims = good_claims();
    claims["groups"] = json!(["a", "b"]);
    let spoofed =
        "X-User-Id: root\r\nx_user_id: root\r\nX-User_Id: root\r\nX-Groups: admin\r\nX-None: root\r\n";
    let token = signer.token(&claims);
    for (path, head) in
        [("/v1/orders", format!("Authorization: Bearer {token}\r\n{spoofed}")), ("/free", spoofed.to_owned())]
    {
        let request = format!("GET {path} HTTP/1.1\r\nHost: checkout\r\n{head}\r\n");
        let response = RawClient::connect(proxy.inbound()).ask(request);
        assert_eq!(response.status(), 200);
        let seen = String::from_utf8(response.body).expect("text");
        assert!(!seen.contains("root") && !seen.contains("admin"), "{seen}");
        let has_claims = path != "/free";
        assert_eq!(
            seen.contains("x-user-id: ann\n") && seen.contains("x-groups: a,b\n"),
            has_claims,
            "{seen}"
        );
    }
}

#[test]
fn trailers_cannot_forge_claim_headers() {
    let (issuer, signer) = (Issuer::start(), Signer::ec("ec"));
    issuer.publish(&[&signer]);
    let service = RawServer::scripted(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    let more = "claim_headers = { x-user-id = \"sub\" }";
    let proxy = Proxy::start(config(&issuer.keys_url(), service.address(), more));
    let token = signer.token(&good_claims());
    let head = format!(
        "Authorization: Bearer {token}\r\nTrailer: x-sum, x-user-id\r\nTE: trailers\r\nTransfer-Encoding: chunked\r\n"
    );
    let trailers = "x-sum: 1\r\nx-user-id: root\r\nx_user_id: root\r\n";
    let response = RawClient::connect(proxy.inbound())
        .ask(format!("POST / HTTP/1.1\r\nHost: a\r\n{head}\r\n1\r\na\r\n0\r\n{trailers}\r\n"));
    assert_eq!(response.status(), 200);
    eventually("the trailers", || String::from_utf8_lossy(&service.received()).contains("x-sum: 1"));
    let received = String::from_utf8_lossy(&service.received()).into_owned();
    assert!(received.contains("x-user-id: ann") && !received.contains("root"), "{received}");
}

#[test]
fn no_request_waits_for_keys_past_its_deadline() {
    let echo = Echo::start();
    // Accepts connections and never responds.
    let silent =
        RawServer::start(|mut stream| while stream.read(&mut [0; 100]).is_ok_and(|read| read > 0) {});
    let keys = format!("http://{}/jwks", silent.address());
    let proxy = Proxy::start(config(&keys, echo.server.address(), ""));
    let token = Signer::ed("ed").token(&good_claims());
    let begin = Instant::now();
    let response =
        ask(proxy.inbound(), &format!("Authorization: Bearer {token}\r\nX-Request-Timeout-Ms: 300\r\n"));
    assert_eq!(response.status(), 504);
    assert_eq!(problem(&response)["cause"], "deadline");
    assert!(begin.elapsed() < Duration::from_secs(4), "not as long as the fetch takes");
    assert_eq!(echo.request_count(), 0);
}

#[test]
fn a_storm_of_unknown_keys_costs_few_fetches() {
    let (issuer, echo, signer) = (Issuer::start(), Echo::start(), Signer::ed("ed"));
    issuer.publish(&[&signer]);
    let proxy = Proxy::start(config(&issuer.keys_url(), echo.server.address(), ""));
    assert_eq!(ask_with(proxy.inbound(), &signer.token(&good_claims())).status(), 200);
    let begin = Instant::now();
    thread::scope(|scope| {
        for worker in 0..4 {
            let (signer, proxy) = (&signer, &proxy);
            scope.spawn(move || {
                let mut client = RawClient::connect(proxy.inbound());
                for number in 0..100 {
                    let kid = json!({ "kid": format!("storm-{worker}-{number}") });
                    let token = signer.token_with(&kid, &good_claims());
                    let head = format!("GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\n\r\n");
                    assert_eq!(client.ask(head).status(), 401);
                }
            });
        }
    });
    let most = 2 + begin.elapsed().as_secs() as usize / 5;
    assert!(issuer.key_fetches() <= most, "{} fetches, at most {most}", issuer.key_fetches());
    assert_eq!(ask_with(proxy.inbound(), &signer.token(&good_claims())).status(), 200);
}

#[test]
fn known_keys_survive_an_outage_of_the_issuer() {
    let (issuer, echo, signer) = (Issuer::start(), Echo::start(), Signer::ed("ed"));
    issuer.publish(&[&signer]);
    issuer.set_away(true);
    let proxy = Proxy::start(config(&issuer.keys_url(), echo.server.address(), ""));
    let response = ask_with(proxy.inbound(), &signer.token(&good_claims()));
    assert_eq!(response.status(), 503, "no fault of the token");
    assert!(response.field("retry-after").is_some());
    assert_eq!(response.field("x-outrigger-retry"), Some("elsewhere"));
    let problem = problem(&response);
    assert_eq!(problem["cause"], "auth_unavailable");
    assert!(problem["detail"].as_str().is_some_and(|detail| detail.contains("503")), "{problem}");
    issuer.set_away(false);
    eventually("the keys", || ask_with(proxy.inbound(), &signer.token(&good_claims())).status() == 200);
    issuer.set_away(true);
    let fetches = issuer.key_fetches();
    // An unknown key makes the sidecar fetch the keys, in vain; the known keys stay.
    eventually("a fetch in vain", || {
        let unknown = signer.token_with(&json!({ "kid": "new" }), &good_claims());
        assert_eq!(ask_with(proxy.inbound(), &unknown).status(), 401);
        assert_eq!(ask_with(proxy.inbound(), &signer.token(&good_claims())).status(), 200);
        issuer.key_fetches() > fetches
    });
    assert_eq!(ask_with(proxy.inbound(), &signer.token(&good_claims())).status(), 200);
}

/// The issuer signs with a new key the moment it publishes it, without the usual overlap.
#[test]
fn key_rotation_under_load_fails_no_request() {
    let (issuer, echo) = (Issuer::start(), Echo::start());
    let (old, new) = (Signer::ec("old"), Signer::ec("new"));
    issuer.publish(&[&old]);
    let proxy = Proxy::start(config(&issuer.keys_url(), echo.server.address(), ""));
    let (rotated, done, requests) = (AtomicBool::new(false), AtomicBool::new(false), AtomicUsize::new(0));
    let begin = Instant::now();
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let mut client = RawClient::connect(proxy.inbound());
                while !done.load(Ordering::SeqCst) {
                    let signer = if rotated.load(Ordering::SeqCst) { &new } else { &old };
                    let token = signer.token(&good_claims());
                    let head = format!("GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\n\r\n");
                    let response = client.ask(head);
                    assert_eq!(response.status(), 200, "{}", String::from_utf8_lossy(&response.body));
                    requests.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        // Not before the issuer may be queried again.
        eventually("time to pass", || begin.elapsed() > Duration::from_secs(6));
        issuer.publish(&[&old, &new]);
        let before = requests.load(Ordering::SeqCst);
        rotated.store(true, Ordering::SeqCst);
        eventually("requests with the new key", || requests.load(Ordering::SeqCst) > before + 50);
        done.store(true, Ordering::SeqCst);
    });
    assert_eq!(issuer.key_fetches(), 2);
}

#[test]
fn key_files_are_watched() {
    let (echo, old, new) = (Echo::start(), Signer::ed("old"), Signer::ed("new"));
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("jwks.json");
    fs::write(&path, jwks(&[&old])).expect("write");
    let proxy = Proxy::start(config(&path.display().to_string(), echo.server.address(), ""));
    assert_eq!(ask_with(proxy.inbound(), &old.token(&good_claims())).status(), 200);
    assert_eq!(ask_with(proxy.inbound(), &new.token(&good_claims())).status(), 401);
    // An unreadable key set changes nothing.
    fs::write(&path, "{").expect("write");
    eventually("the complaint", || proxy.stderr().contains("keys of the token issuer cannot be read"));
    assert_eq!(ask_with(proxy.inbound(), &old.token(&good_claims())).status(), 200);
    fs::write(directory.path().join("next"), jwks(&[&new])).expect("write");
    fs::rename(directory.path().join("next"), &path).expect("rename");
    eventually("the new keys", || ask_with(proxy.inbound(), &new.token(&good_claims())).status() == 200);
    // A worker's cache of tokens that were valid under the old key is cleared with it.
    assert_eq!(ask_with(proxy.inbound(), &old.token(&good_claims())).status(), 401);
}

#[test]
fn observed_invalid_tokens_are_counted_logged_and_forwarded() {
    let (issuer, echo) = (Issuer::start(), Echo::start());
    issuer.publish(&[&Signer::ed("ed")]);
    let text =
        format!("[runtime]\nobserve = [\"jwt\"]\n{}", config(&issuer.keys_url(), echo.server.address(), ""));
    let proxy = Launch::new(text).start();
    assert_eq!(ask(proxy.inbound(), "").status(), 200);
    assert_eq!(ask_with(proxy.inbound(), "a.b.c").status(), 200);
    assert_eq!(metric(&proxy, "outrigger_rejected_total{upstream=\"inbound\",reason=\"jwt_invalid\"}"), 2);
    eventually("the log", || proxy.stderr().contains("would be refused (observed only)"));
    assert_eq!(echo.request_count(), 2);
}

#[test]
fn a_stricter_reload_applies_at_once() {
    let (issuer, echo, signer) = (Issuer::start(), Echo::start(), Signer::ed("ed"));
    issuer.publish(&[&signer]);
    let first = config(&issuer.keys_url(), echo.server.address(), "");
    let proxy = Proxy::start(first.clone());
    let token = signer.token(&good_claims());
    assert_eq!(ask_with(proxy.inbound(), &token).status(), 200);
    proxy.reconfigure(&first.replace("\"checkout\", \"shop\"", "\"elsewhere\""));
    eventually("the new audience", || ask_with(proxy.inbound(), &token).status() == 401);
    assert_eq!(issuer.key_fetches(), 1, "the keys are the same issuer's");
}
