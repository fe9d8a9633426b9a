//! A route whose requests are divided among upstreams, changed while it runs.

use std::{
    process::{Command, Output},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
};

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode};
use http_body_util::BodyExt;
use serde_json::Value;

use crate::{
    config_changes::{admin, reload, status},
    support::{
        Proxy, RawClient, RawServer, Upstream, UpstreamResponse, binary, eventually, refusing_address,
        strict::Message, text,
    },
};

fn legacy() -> Upstream {
    Upstream::http1(|_| async { text("legacy") })
}

fn unavailable() -> UpstreamResponse {
    let mut response = text("not now");
    *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    response
}

fn next() -> Upstream {
    Upstream::http1(|_| async { text("next") })
}

/// The upstream `shop` with a route of the name `orders`, `orders`: its keys.
fn config(servers: [&Upstream; 2], orders: &str) -> String {
    let [legacy, next] = servers.map(Upstream::address);
    format!(
        "[[upstream]]\nname = \"shop\"\nendpoints = [\"{legacy}\"]\n\
         [[upstream.route]]\nname = \"orders\"\nmatch = {{ path = \"/orders*\" }}\n{orders}\n\
         [[upstream]]\nname = \"orders-v2\"\nendpoints = [\"{next}\"]\n"
    )
}

fn to(legacy: u32, next: u32) -> String {
    format!(
        "to = [{{ upstream = \"shop\", weight = {legacy} }}, {{ upstream = \"orders-v2\", weight = {next} }}]\n"
    )
}

fn get(client: &mut RawClient, path: &str, fields: &str) -> String {
    let response = client.ask(format!("GET {path} HTTP/1.1\r\nHost: shop\r\n{fields}\r\n"));
    assert_eq!(response.status(), 200, "{response:?}");
    response.text().trim().to_owned()
}

/// How many of `count` requests the next upstream serves.
fn served_by_next(proxy: &Proxy, count: usize) -> usize {
    let mut client = RawClient::connect(proxy.outbound());
    (0..count).filter(|_| get(&mut client, "/orders/1", "") == "next").count()
}

/// Which of the users the next upstream serves.
fn users_of_next(proxy: &Proxy, field: impl Fn(usize) -> String) -> Vec<usize> {
    let mut client = RawClient::connect(proxy.outbound());
    (0..200).filter(|user| get(&mut client, "/orders", &field(*user)) == "next").collect()
}

fn set(proxy: &Proxy, words: &[&str]) -> Output {
    let token = proxy.ready()["admin_token_file"].as_str().expect("a token file").to_owned();
    let admin = proxy.admin().to_string();
    let mut command = Command::new(binary());
    command.args(["set", "split"]).args(words).args(["--admin", &admin, "--token-file", &token]);
    command.output().expect("it runs")
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn user(user: usize) -> String {
    format!("x-user: {user}\r\n")
}

#[test]
fn requests_are_divided_by_the_weights_of_the_route() {
    let (legacy, next) = (legacy(), next());
    let proxy = Proxy::start(config([&legacy, &next], &to(90, 10)));
    // Four standard deviations of a share of 10 % among 2,000.
    let served = served_by_next(&proxy, 2000);
    assert!((146..=254).contains(&served), "{served} of 2000");
    let mut client = RawClient::connect(proxy.outbound());
    assert_eq!(get(&mut client, "/cart", ""), "legacy", "another path is not divided");

    let split = &status(&proxy)["upstreams"][0]["splits"][0];
    assert_eq!(split["route"], "orders");
    assert_eq!(split["to"][1]["requests"], served, "{split}");
    assert_eq!(split["to"][1]["percent"], 10.0, "{split}");
    let metrics = admin(&proxy, "/metrics");
    let line = format!(
        "outrigger_split_requests_total{{upstream=\"shop\",route=\"orders\",to=\"orders-v2\"}} {served}"
    );
    assert!(metrics.lines().any(|known| known == line), "{metrics}");
}

#[test]
fn a_target_without_weight_gets_nothing() {
    let (legacy, next) = (legacy(), next());
    let proxy = Proxy::start(config([&legacy, &next], &to(1, 0)));
    assert_eq!(served_by_next(&proxy, 300), 0);
}

#[test]
fn a_raised_share_keeps_every_client_that_was_moved() {
    let (legacy, next) = (legacy(), next());
    let sticky = [
        ("header:x-user", &user as &dyn Fn(usize) -> String),
        ("cookie:session", &|user| format!("cookie: a=b; session={user}\r\n")),
    ];
    for (key, field) in sticky {
        let proxy = Proxy::start(config([&legacy, &next], &format!("{}sticky = \"{key}\"", to(80, 20))));
        let before = users_of_next(&proxy, field);
        assert!((15..=70).contains(&before.len()), "{key}: {} of 200", before.len());
        assert_eq!(users_of_next(&proxy, field), before, "{key}: a client stays where it is");
        let output = set(&proxy, &["shop/orders", "60"]);
        assert!(output.status.success(), "{}", said(&output));
        assert_eq!(said(&output).trim(), "shop/orders: 40 % shop, 60 % orders-v2");
        let after = users_of_next(&proxy, field);
        assert!(after.len() > before.len() && before.iter().all(|user| after.contains(user)), "{key}");
    }
}

#[test]
fn a_share_that_was_set_lasts_until_the_file_changes_it() {
    let (legacy, next) = (legacy(), next());
    let original = config([&legacy, &next], &to(90, 10));
    let proxy = Proxy::start(original.clone());
    assert!(set(&proxy, &["shop/orders", "100"]).status.success());
    assert_eq!(served_by_next(&proxy, 50), 50);
    let percent = |proxy: &Proxy| status(proxy)["upstreams"][0]["splits"][0]["set_percent"].clone();
    assert_eq!(percent(&proxy), 100);
    // A reload that does not touch the weights.
    proxy.reconfigure(&format!("[defaults]\ntimeout = \"3s\"\n{original}"));
    assert!(reload(&proxy, &[]).status.success());
    assert!(admin(&proxy, "/config").contains("\"timeout\": \"3s\""), "the reload");
    assert_eq!(served_by_next(&proxy, 50), 50);
    proxy.reconfigure(&config([&legacy, &next], &to(100, 0)));
    eventually("the file's weights", || percent(&proxy) == Value::Null);
    assert_eq!(served_by_next(&proxy, 50), 0);

    assert!(set(&proxy, &["shop/orders", "100"]).status.success());
    assert!(set(&proxy, &["shop/orders", "auto"]).status.success());
    assert_eq!(served_by_next(&proxy, 50), 0, "the weights of the configuration again");
}

#[test]
fn no_request_is_lost_while_the_share_changes_under_load() {
    let (legacy, next) = (legacy(), next());
    let proxy = Proxy::start(config([&legacy, &next], &to(90, 10)));
    let (ended, sent) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        let clients: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let mut client = RawClient::connect(proxy.outbound());
                    while !ended.load(Ordering::Relaxed) {
                        // Asserts the status.
                        get(&mut client, "/orders", "");
                        sent.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        for change in 0..20 {
            let before = sent.load(Ordering::Relaxed);
            let percent = (change * 37 % 101).to_string();
            assert!(set(&proxy, &["shop/orders", &percent]).status.success());
            eventually("more requests", || {
                sent.load(Ordering::Relaxed) > before + 20
                    || clients.iter().any(|client| client.is_finished())
            });
        }
        ended.store(true, Ordering::Relaxed);
    });
    assert!(sent.load(Ordering::Relaxed) > 400);
}

#[test]
fn a_failed_attempt_is_retried_on_the_chosen_side() {
    let legacy = legacy();
    let failing = Upstream::http1(|_| async { unavailable() });
    let proxy = Proxy::start(config([&legacy, &failing], &to(0, 1)));
    let response = RawClient::connect(proxy.outbound()).ask("GET /orders HTTP/1.1\r\nHost: shop\r\n\r\n");
    assert_eq!(response.status(), 503, "a retry does not hide the new version's failure: {response:?}");
}

#[test]
fn an_invalid_change_is_answered_with_the_valid_ones() {
    let (legacy, next) = (legacy(), next());
    let config = format!("{}[[upstream.route]]\nname = \"plain\"\n", config([&legacy, &next], &to(90, 10)));
    let proxy = Proxy::start(config);
    for (words, remedy) in [
        (["shop", "10"], "UPSTREAM/ROUTE"),
        (["down/orders", "10"], "available: shop, orders-v2"),
        (["shop/cart", "10"], "routes with names: orders"),
        (["orders-v2/plain", "10"], "not a list of upstreams"),
        (["shop/orders", "101"], "0 to 100"),
    ] {
        let output = set(&proxy, &words);
        assert!(!output.status.success() && said(&output).contains(remedy), "{words:?}: {}", said(&output));
    }
    assert_eq!(status(&proxy)["upstreams"][0]["splits"][0]["set_percent"], Value::Null);
}

#[test]
fn explain_names_the_shares() {
    let (legacy, next) = (legacy(), next());
    let config = config([&legacy, &next], &format!("{}sticky = \"header:x-user\"", to(3, 1)));
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("outrigger.toml");
    std::fs::write(&file, config).expect("written");
    let output = Command::new(binary())
        .args(["explain", "-c"])
        .arg(&file)
        .args(["GET", "http://shop/orders/7"])
        .output()
        .expect("it runs");
    assert!(said(&output).contains("75 % shop, 25 % orders-v2, by header:x-user"), "{}", said(&output));
}

/// The upstream `shop` with version 1 by header, and the keys of its deprecation.
fn versions(service: &Upstream, deprecation: &str) -> String {
    format!(
        "[[upstream]]\nname = \"shop\"\nendpoints = [\"{}\"]\n\
         [[upstream.route]]\nname = \"v1\"\nmatch = {{ version = {{ header = \"accept-version\", is = \"1\" }} }}\n\
         deprecation = {{ {deprecation} }}\n",
        service.address()
    )
}

fn ask(proxy: &Proxy, fields: &str) -> Message {
    RawClient::connect(proxy.outbound()).ask(format!("GET / HTTP/1.1\r\nHost: shop\r\n{fields}\r\n"))
}

#[test]
fn responses_of_a_deprecated_version_announce_its_end() {
    let service = legacy();
    let keys = "since = 2026-12-01, sunset = 2099-06-01, link = \"https://example.com/v2\"";
    let proxy = Proxy::start(versions(&service, keys));
    let old = ask(&proxy, "accept-version: 1\r\n");
    assert_eq!(old.status(), 200);
    assert_eq!(old.field("deprecation"), Some("@1796083200"));
    assert_eq!(old.field("sunset"), Some("Mon, 01 Jun 2099 00:00:00 GMT"));
    assert_eq!(old.field("link"), Some("<https://example.com/v2>; rel=\"deprecation\""));
    let new = ask(&proxy, "accept-version: 2\r\n");
    assert_eq!((new.status(), new.field("deprecation")), (200, None));
    let counted =
        "outrigger_deprecated_requests_total{upstream=\"shop\",route=\"v1\",client=\"127.0.0.1\"} 1";
    let metrics = admin(&proxy, "/metrics");
    assert!(metrics.lines().any(|line| line == counted), "{metrics}");
}

#[test]
fn a_version_after_its_sunset_is_gone_or_served_as_the_route_says() {
    let service = legacy();
    let past = "since = 2020-01-01, sunset = 2021-01-01, link = \"https://example.com/v2\"";
    let proxy = Proxy::start(versions(&service, past));
    assert_eq!(ask(&proxy, "accept-version: 1\r\n").status(), 200, "served unless said otherwise");

    let proxy = Proxy::start(versions(&service, &format!("{past}, after = \"410\"")));
    let gone = ask(&proxy, "accept-version: 1\r\n");
    assert_eq!(gone.status(), 410);
    assert_eq!(gone.field("sunset"), Some("Fri, 01 Jan 2021 00:00:00 GMT"));
    assert_eq!(gone.field("content-type"), Some("application/problem+json"));
    for part in ["\"cause\":\"sunset\"", "until 2021-01-01", "https://example.com/v2"] {
        assert!(gone.text().contains(part), "{part} is not in {}", gone.text());
    }
    assert_eq!(ask(&proxy, "accept-version: 2\r\n").status(), 200);
    let refused = "outrigger_rejected_total{upstream=\"shop\",reason=\"sunset\"} 1";
    assert!(admin(&proxy, "/metrics").contains(refused));
}

#[test]
fn a_deprecation_is_announced_after_a_reload() {
    let service = legacy();
    let proxy = Proxy::start(versions(&service, "since = 2026-12-01"));
    let announced =
        |proxy: &Proxy| ask(proxy, "accept-version: 1\r\n").field("deprecation").map(str::to_owned);
    assert_eq!(announced(&proxy).as_deref(), Some("@1796083200"));
    proxy.reconfigure(&versions(&service, "since = 2026-12-02"));
    eventually("the new date", || announced(&proxy).as_deref() == Some("@1796169600"));
}

#[test]
fn the_service_of_an_old_version_announces_its_end_itself() {
    let service = legacy();
    let proxy = Proxy::start(format!(
        "[inbound]\nforward_to = \"{}\"\n[[inbound.route]]\nname = \"v1\"\nmatch = {{ version = {{ path = \"/v\", is = \"1\" }} }}\n\
         deprecation = {{ since = 2026-12-01 }}\n",
        service.address()
    ));
    let get = |path: &str| {
        let request = format!("GET {path} HTTP/1.1\r\nHost: shop\r\n\r\n");
        RawClient::connect(proxy.inbound()).ask(request).field("deprecation").map(str::to_owned)
    };
    assert_eq!(get("/v1/orders").as_deref(), Some("@1796083200"));
    assert_eq!(get("/v10/orders"), None);
}

/// A request as a service got it.
struct Received {
    headers: HeaderMap,
    method: Method,
    target: String,
    body: Bytes,
}

type Requests = Arc<Mutex<Vec<Received>>>;

/// A service that keeps the requests that it gets.
fn recorder(requests: &Requests) -> Upstream {
    let requests = Arc::clone(requests);
    Upstream::http1(move |request| {
        let requests = Arc::clone(&requests);
        async move {
            let (head, body) = request.into_parts();
            let body = body.collect().await.expect("a body").to_bytes();
            let target = head.uri.to_string();
            let received = Received { headers: head.headers, method: head.method, target, body };
            requests.lock().expect("unpoisoned").push(received);
            text("copied")
        }
    })
}

fn copies(proxy: &Proxy, outcome: &str) -> u64 {
    let series = format!(
        "outrigger_mirror_requests_total{{upstream=\"shop\",route=\"orders\",outcome=\"{outcome}\"}} "
    );
    let metrics = admin(proxy, "/metrics");
    let value = metrics.lines().find_map(|line| line.strip_prefix(&series));
    value.unwrap_or_else(|| panic!("no {series} in {metrics}")).parse().expect("a number")
}

#[test]
fn a_copy_is_complete_and_carries_no_credentials() {
    let requests = Requests::default();
    let (legacy, next) = (legacy(), recorder(&requests));
    let mirror = "mirror = { upstream = \"orders-v2\", methods = [\"GET\", \"POST\"], unsafe = true }";
    let proxy = Proxy::start(config([&legacy, &next], mirror));
    let mut client = RawClient::connect(proxy.outbound());
    let secrets = "authorization: Bearer a\r\ncookie: a=b\r\nx-api-key: k\r\n";
    let bodies = ["hello".to_owned(), "x".repeat(60_000)];
    for body in &bodies {
        let response = client.ask(format!(
            "POST /orders?a=b HTTP/1.1\r\nHost: shop\r\nx-user: 7\r\n{secrets}Content-Length: {}\r\n\r\n{body}",
            body.len()
        ));
        assert_eq!((response.status(), &*response.text()), (200, "legacy"), "{response:?}");
    }
    eventually("the copies", || copies(&proxy, "answered") == 2);
    let mut received = std::mem::take(&mut *requests.lock().expect("unpoisoned"));
    received.sort_by_key(|one| one.body.len());
    for (Received { headers, method, target, body }, sent) in received.iter().zip(&bodies) {
        assert_eq!((method, &**target, &body[..]), (&Method::POST, "/orders?a=b", sent.as_bytes()));
        for (name, value) in [("host", "shop"), ("x-user", "7"), ("x-outrigger-mirror", "1")] {
            assert_eq!(headers[name], value, "{name}");
        }
        for secret in ["authorization", "cookie", "x-api-key"] {
            assert!(!headers.contains_key(secret), "{secret}");
        }
    }
    // Larger than what is kept.
    let large = "x".repeat(70_000);
    let head = format!("POST /orders HTTP/1.1\r\nHost: shop\r\nContent-Length: {}\r\n\r\n", large.len());
    assert_eq!(client.ask(head + &large).status(), 200);
    eventually("the large one", || copies(&proxy, "too_large") == 1);
    assert!(requests.lock().expect("unpoisoned").is_empty());
}

#[test]
fn copies_carry_credentials_only_where_the_route_says_so() {
    let requests = Requests::default();
    let (legacy, next) = (legacy(), recorder(&requests));
    let mirror = "mirror = { upstream = \"orders-v2\", credentials = true }";
    let proxy = Proxy::start(config([&legacy, &next], mirror));
    get(&mut RawClient::connect(proxy.outbound()), "/orders", "authorization: Bearer a\r\n");
    eventually("the copy", || copies(&proxy, "answered") == 1);
    assert_eq!(requests.lock().expect("unpoisoned")[0].headers["authorization"], "Bearer a");
}

#[test]
fn copies_to_a_service_that_hangs_are_dropped_and_delay_nothing() {
    let hanging = RawServer::start(|_| std::thread::park());
    let service = legacy();
    let mirror = "mirror = { upstream = \"orders-v2\", max_in_flight = 3, timeout = \"1h\" }";
    let text = config([&service, &service], mirror);
    let text = text.replacen(
        &format!("name = \"orders-v2\"\nendpoints = [\"{}\"]", service.address()),
        &format!("name = \"orders-v2\"\nendpoints = [\"{}\"]", hanging.address()),
        1,
    );
    let proxy = Proxy::start(text);
    let mut client = RawClient::connect(proxy.outbound());
    for _ in 0..50 {
        assert_eq!(get(&mut client, "/orders", ""), "legacy");
    }
    assert_eq!(copies(&proxy, "dropped"), 47);
    assert_eq!(status(&proxy)["upstreams"][0]["mirrors"][0]["in_flight"], 3);
    let breaker = &status(&proxy)["upstreams"][0]["breaker"]["state"];
    assert_eq!(breaker, "closed", "nothing of it counts for the upstream that serves");
}

#[test]
fn failures_of_copies_count_for_the_other_upstream_alone() {
    let service = legacy();
    let mirror = "mirror = { upstream = \"orders-v2\" }\nrate_limit = { rate = 1000, burst = 40 }";
    let text = config([&service, &service], mirror).replacen(
        &format!("name = \"orders-v2\"\nendpoints = [\"{}\"]", service.address()),
        &format!("name = \"orders-v2\"\nendpoints = [\"{}\"]", refusing_address()),
        1,
    );
    let proxy = Proxy::start(text);
    let mut client = RawClient::connect(proxy.outbound());
    for _ in 0..30 {
        assert_eq!(get(&mut client, "/orders", ""), "legacy", "copies spend no rate");
    }
    eventually("the copies", || copies(&proxy, "failed") + copies(&proxy, "dropped") == 30);
    let status = status(&proxy);
    assert_eq!(status["upstreams"][0]["breaker"]["state"], "closed", "{status}");
    assert_eq!(status["upstreams"][0]["endpoints"][0]["state"], "healthy", "{status}");
}

#[test]
fn a_mirror_follows_a_reload() {
    let requests = Requests::default();
    let (legacy, next) = (legacy(), recorder(&requests));
    let with = |ratio: &str| {
        config([&legacy, &next], &format!("mirror = {{ upstream = \"orders-v2\", ratio = {ratio} }}"))
    };
    let proxy = Proxy::start(with("0"));
    let mut client = RawClient::connect(proxy.outbound());
    (0..20).for_each(|_| drop(get(&mut client, "/orders", "")));
    assert_eq!(copies(&proxy, "answered") + copies(&proxy, "dropped"), 0);
    // What the other upstream serves anyway is not sent to it twice.
    proxy.reconfigure(&(with("1").replacen("mirror =", &format!("{}mirror =", to(0, 1)), 1)));
    assert!(reload(&proxy, &[]).status.success());
    assert_eq!(get(&mut client, "/orders", ""), "copied");
    proxy.reconfigure(&with("1"));
    assert!(reload(&proxy, &[]).status.success());
    get(&mut client, "/orders", "");
    get(&mut client, "/cart", "");
    eventually("the copy", || copies(&proxy, "answered") == 1);
}
