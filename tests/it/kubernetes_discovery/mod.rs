//! `k8s://NAMESPACE/SERVICE:PORT` against recorded responses of a real API server.

mod api;

use api::{Api, recorded};
use serde_json::{Value, json};

use crate::support::{Launch, Proxy, RawClient, Upstream, eventually, pki::Pki, text};

const CONFIG: &str = r#"
[[upstream]]
name = "payments"
endpoints = "k8s://shop/payments:http"
[[upstream]]
name = "payments-grpc"
endpoints = "k8s://shop/payments:9090"
"#;

fn start(config: &str, pki: &Pki, api: &Api, token: &str, zone: &str) -> Proxy {
    pki.write_ca();
    pki.write("token", token);
    Launch::new(config)
        .env("OUTRIGGER_KUBERNETES_API", &api.url())
        .env("OUTRIGGER_SERVICE_ACCOUNT", pki.path("").to_str().expect("a path"))
        .env("OUTRIGGER_ZONE", zone)
        .start()
}

/// As the endpoint slice controller writes them, including fields that only it uses.
fn metadata(name: &str, service: &str, version: &str) -> Value {
    json!({
        "name": name, "namespace": "shop", "resourceVersion": version, "generateName": format!("{service}-"),
        "uid": "7554f1c2-6cfb-4cbc-a8db-adc14234b3ba", "creationTimestamp": "2026-11-22T00:39:33Z",
        "labels": {
            "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
            "kubernetes.io/service-name": service,
        },
        "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": service, "controller": true}],
    })
}

/// The slices of a service with this many endpoints, a hundred in each.
fn slices(service: &str, number: usize, endpoints: usize) -> Vec<Value> {
    let endpoint = |index: usize| {
        json!({
            "addresses": [format!("10.{}.{}.{}", number % 250, index / 250, index % 250)],
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "targetRef": {
                "kind": "Pod", "namespace": "shop", "name": format!("{service}-5d9c7b6f4-{index:05}"),
                "uid": "00000000-0000-4000-8000-000000000000",
            },
            "nodeName": format!("node-{}", index % 50), "zone": "zone-a",
        })
    };
    let all: Vec<usize> = (0..endpoints).collect();
    let slice = |(at, part): (usize, &[usize])| {
        json!({
            "metadata": metadata(&format!("{service}-{at}"), service, "2"), "addressType": "IPv4",
            "endpoints": part.iter().map(|index| endpoint(*index)).collect::<Vec<_>>(),
            "ports": [{"name": "http", "protocol": "TCP", "port": 8080}],
        })
    };
    all.chunks(100).enumerate().map(slice).collect()
}

fn status(proxy: &Proxy, upstream: usize) -> Value {
    let response = RawClient::connect(proxy.admin()).ask("GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n");
    let status: Value = serde_json::from_slice(&response.body).expect("JSON");
    status["upstreams"][upstream].clone()
}

fn endpoints(proxy: &Proxy, upstream: usize) -> Vec<String> {
    let status = status(proxy, upstream);
    let listed = status["endpoints"].as_array().cloned().unwrap_or_default();
    let mut addresses: Vec<String> =
        listed.iter().filter_map(|endpoint| endpoint["address"].as_str().map(str::to_owned)).collect();
    addresses.sort();
    addresses
}

#[track_caller]
fn wait_for_endpoints(proxy: &Proxy, expected: &[&str]) {
    let mut now = Vec::new();
    let mut look = || {
        now = endpoints(proxy, 0);
        now == expected
    };
    let began = std::time::Instant::now();
    while !look() {
        assert!(
            began.elapsed() < crate::support::WAIT_LIMIT,
            "expected {expected:?}, have {:?}: {}",
            endpoints(proxy, 0),
            status(proxy, 0)
        );
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    drop(now);
}

const LISTED: [&str; 3] = ["10.244.0.11:8080", "10.244.1.12:8080", "[fd00:10:244::11]:8080"];

#[test]
fn endpoints_follow_the_api_server() {
    let pki = Pki::new();
    let api = Api::start(&pki, "good");
    let proxy = start(CONFIG, &pki, &api, "good", "");
    wait_for_endpoints(&proxy, &LISTED);
    assert_eq!(endpoints(&proxy, 1), LISTED.map(|address| address.replace("8080", "9090")));

    let events = recorded("watch")["events"].as_array().cloned().expect("events");
    let mut events = events.into_iter();
    let mut next = || api.send_event(events.next().expect("another event"));
    next();
    wait_for_endpoints(&proxy, &["10.244.0.11:8080", "10.244.0.13:8080", LISTED[1], LISTED[2]]);
    // All endpoints of one slice terminate: the ready ones of the other slice get the requests.
    next();
    wait_for_endpoints(&proxy, &[LISTED[2]]);
    next();
    wait_for_endpoints(&proxy, &["10.244.2.21:8080", LISTED[2]]);
    // The slice of the terminated ones is deleted, and a bookmark confirms the resource version.
    next();
    next();
    eventually("the bookmark to be read, and the watch resumed there", || {
        api.end_watches();
        std::thread::sleep(std::time::Duration::from_millis(50));
        api.requests().1.iter().filter(|line| line.contains("resourceVersion=251&")).count() >= 2
    });
    assert_eq!(endpoints(&proxy, 0), ["10.244.2.21:8080", LISTED[2]]);
    assert_eq!(api.requests().0.len(), 2, "each upstream listed once: {:?}", api.requests());
}

#[test]
fn an_expired_resource_version_is_listed_again() {
    let pki = Pki::new();
    let api = Api::start(&pki, "good");
    let proxy = start(CONFIG, &pki, &api, "good", "");
    wait_for_endpoints(&proxy, &LISTED);
    let mut list = recorded("list")["body"].clone();
    list["metadata"]["resourceVersion"] = json!("300");
    list["items"].as_array_mut().expect("items").truncate(1);
    api.list(list.clone());
    // An event in the stream, as recorded.
    api.send_event(recorded("gone")["events"][0].clone());
    wait_for_endpoints(&proxy, &LISTED[..2]);
    // The response to a watch: listing does not help while that lasts, and nothing is lost.
    api.set_history_expired(true);
    api.end_watches();
    eventually("it is said", || status(&proxy, 0).to_string().contains("too old to be watched"));
    assert_eq!(endpoints(&proxy, 0), LISTED[..2]);
    list["items"][0]["endpoints"].as_array_mut().expect("endpoints").truncate(1);
    api.list(list);
    api.set_history_expired(false);
    wait_for_endpoints(&proxy, &LISTED[..1]);
}

#[test]
fn the_last_good_endpoints_outlive_the_api_server() {
    let pki = Pki::new();
    let api = Api::start(&pki, "good");
    let proxy = start(CONFIG, &pki, &api, "good", "");
    wait_for_endpoints(&proxy, &LISTED);
    api.set_unreachable(true);
    eventually("it is said", || status(&proxy, 0)["discovery"].to_string().contains("failed"));
    assert_eq!(endpoints(&proxy, 0), LISTED);
    api.send_event(recorded("watch")["events"][0].clone());
    api.set_unreachable(false);
    wait_for_endpoints(&proxy, &["10.244.0.11:8080", "10.244.0.13:8080", LISTED[1], LISTED[2]]);
    eventually("it is well again", || status(&proxy, 0)["discovery"] == "ready");
    assert_eq!(api.requests().0.len(), 2, "resumed, not listed: {:?}", api.requests());
}

#[test]
fn a_renewed_token_is_read_again() {
    let pki = Pki::new();
    let api = Api::start(&pki, "new");
    let proxy = start(CONFIG, &pki, &api, "old", "");
    eventually("it is said", || {
        status(&proxy, 0)
            .to_string()
            .contains("responded with 401: Unauthorized; is the token of the service account")
    });
    assert!(endpoints(&proxy, 0).is_empty());
    pki.write("token", "new\n");
    wait_for_endpoints(&proxy, &LISTED);
    api.token("newest");
    pki.write("token", "newest\n");
    api.end_watches();
    api.send_event(recorded("watch")["events"][0].clone());
    wait_for_endpoints(&proxy, &["10.244.0.11:8080", "10.244.0.13:8080", LISTED[1], LISTED[2]]);
}

const TWO_SERVICES: &str = r#"
[[upstream]]
name = "service-0"
endpoints = "k8s://shop/service-0:http"
[[upstream]]
name = "service-1"
endpoints = "k8s://shop/service-1:http"
"#;

/// Memory of a sidecar with two services, KiB, in a namespace with this many services, after all of them have changed.
fn memory_used(services: usize, each: usize) -> u64 {
    let pki = Pki::new();
    let api = Api::start(&pki, "good");
    let all: Vec<Value> =
        (0..services).flat_map(|number| slices(&format!("service-{number}"), number, each)).collect();
    api.list(json!({"metadata": {"resourceVersion": "2"}, "items": all}));
    let proxy = start(TWO_SERVICES, &pki, &api, "good", "");
    let have = |count| (0..2).all(|upstream| endpoints(&proxy, upstream).len() == count);
    eventually("both to be known", || have(each));
    let slices_each = all.len() / services;
    // The other services change first, so that their events, if any, arrive before those of our own services.
    for mut slice in all.into_iter().rev() {
        slice["metadata"]["resourceVersion"] = json!("3");
        slice["endpoints"].as_array_mut().expect("endpoints").pop();
        api.send_event(json!({"type": "MODIFIED", "object": slice}));
    }
    eventually("the changes to be known", || have(each - slices_each));
    let (lists, watches) = api.requests();
    assert_eq!(lists.len(), 2, "{lists:?}");
    for asked in lists.iter().chain(&watches) {
        let ours =
            ["service-0", "service-1"].map(|service| format!("=kubernetes.io%2Fservice-name%3D{service}"));
        let ends = |ours: &String| asked.contains(&format!("{ours}&")) || asked.contains(&format!("{ours} "));
        assert!(ours.iter().any(ends), "{asked}");
    }
    proxy.resident_kib()
}

#[test]
fn unused_services_are_neither_requested_nor_held() {
    let (two, thousands) = (memory_used(2, 10), memory_used(2_000, 10));
    assert!(thousands < two + 2048, "{thousands} KiB with 2,000 services there, {two} KiB with 2");
}

#[test]
fn watches_of_removed_upstreams_end() {
    let pki = Pki::new();
    let api = Api::start(&pki, "good");
    let all: Vec<Value> =
        (0..2).flat_map(|number| slices(&format!("service-{number}"), number, 10)).collect();
    api.list(json!({"metadata": {"resourceVersion": "2"}, "items": all}));
    let proxy = start(TWO_SERVICES, &pki, &api, "good", "");
    let watches = |service: &str| {
        let of = format!("%3D{service}&");
        api.requests().1.iter().filter(|line| line.contains(&of)).count()
    };
    eventually("both to be watched", || watches("service-0") > 0 && watches("service-1") > 0);
    let (one, _) = TWO_SERVICES.rsplit_once("[[upstream]]").expect("two");
    proxy.reconfigure(one);
    eventually("one to be left", || status(&proxy, 1).is_null());
    let before = watches("service-1");
    for _ in 0..2 {
        let again = watches("service-0") + 1;
        api.end_watches();
        eventually("the other one to be watched again", || watches("service-0") >= again);
    }
    assert_eq!(watches("service-1"), before, "{:?}", api.requests());
}

/// `--nocapture` prints the figures of docs/kubernetes.md.
#[test]
fn thousands_of_endpoints_use_a_few_megabytes() {
    let (few, many) = (memory_used(2, 10), memory_used(2, 1_000));
    println!("2 services with 10 endpoints each: {few} KiB; with 1,000 each: {many} KiB");
    assert!(many < few + 8 * 1024, "{many} KiB with 2,000 endpoints, {few} KiB with 20");
}

/// Requests reach the endpoints, those of this zone first.
#[test]
fn requests_prefer_endpoints_of_this_zone() {
    let pki = Pki::new();
    let api = Api::start(&pki, "good");
    let near = Upstream::http1(|_| async { text("near") });
    let far = Upstream::http1(|_| async { text("far") });
    let slice = |name: &str, server: &Upstream, zone: &str| {
        json!({
            "metadata": metadata(name, "payments", "2"), "addressType": "IPv4",
            "endpoints": [{"addresses": ["127.0.0.1"], "hints": {"forZones": [{"name": zone}]}}],
            "ports": [{"name": "http", "protocol": "TCP", "port": server.address().port()}],
        })
    };
    api.list(json!({"metadata": {"resourceVersion": "2"}, "items": [slice("a", &near, "zone-a"), slice("b", &far, "zone-b")]}));
    let proxy = start(CONFIG, &pki, &api, "good", "zone-a");
    let mut client = RawClient::connect(proxy.outbound());
    let responses: Vec<String> =
        (0..200).map(|_| client.ask("GET / HTTP/1.1\r\nHost: payments\r\n\r\n").text()).collect();
    let near = responses.iter().filter(|response| *response == "near").count();
    assert!(near > 150, "{near} of 200");
    // No longer among the endpoints that get requests.
    let mut gone = slice("a", &far, "zone-a");
    gone["metadata"]["resourceVersion"] = json!("3");
    api.send_event(json!({"type": "DELETED", "object": gone}));
    eventually("the other one alone", || endpoints(&proxy, 0).len() == 1);
    assert_eq!(client.ask("GET / HTTP/1.1\r\nHost: payments\r\n\r\n").text(), "far");
}
