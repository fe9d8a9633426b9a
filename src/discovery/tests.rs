use std::{net::IpAddr, sync::Arc, time::Duration};

use hickory_resolver::proto::{
    op::ResponseCode,
    rr::{RData, RecordType},
};

use super::*;
use crate::{
    config::HostPort,
    dns::{
        AddressFamily, DnsError,
        test_dns::{Reply, TestDns, cname, record, srv},
    },
    upstream::{DiscoveryError, EndpointSet, Resolution},
};

const LIMIT: Duration = Duration::from_secs(5);

async fn resolver(dns: &TestDns) -> Arc<Resolver> {
    Arc::new(Resolver::with_name_server(dns.address, LIMIT).unwrap().with_routes(|_| true))
}

fn ips(list: &[&str]) -> Vec<IpAddr> {
    list.iter().map(|ip| ip.parse().unwrap()).collect()
}

/// `address` of each endpoint, with `*N` if it has a weight.
fn shown(set: &EndpointSet) -> Vec<String> {
    let show = |e: &Arc<crate::upstream::Endpoint>| match e.weight() {
        1 => e.address.to_string(),
        weight => format!("{}*{weight}", e.address),
    };
    set.endpoints.iter().map(show).collect()
}

/// Waits until the condition `wanted` holds for the upstream's endpoints.
async fn until(upstream: &Upstream, wanted: impl Fn(&EndpointSet) -> bool) {
    let mut changes = upstream.subscribe();
    let reached = changes.wait_for(|_| wanted(&upstream.endpoints()));
    let reached = tokio::time::timeout(Duration::from_secs(20), reached).await.is_ok();
    assert!(reached, "still {:?}", upstream.endpoints());
}

async fn until_shown(upstream: &Upstream, wanted: &[&str]) {
    until(upstream, |set| shown(set) == wanted && matches!(set.resolution, Resolution::Ready)).await;
}

async fn until_failed(upstream: &Upstream) -> Arc<DiscoveryError> {
    until(upstream, |set| matches!(set.resolution, Resolution::Failed(_))).await;
    match &upstream.endpoints().resolution {
        Resolution::Failed(error) => error.clone(),
        other => panic!("{other:?}"),
    }
}

fn dns_source(text: &str) -> Endpoints {
    Endpoints::Dns(text.parse().unwrap())
}

#[tokio::test]
async fn both_families_are_found_in_a_stable_order() {
    let dns = TestDns::start().await;
    dns.addresses("both.test", 60, &["10.0.0.2", "2001:db8::2", "10.0.0.1", "2001:db8::1"]);
    let answer = resolver(&dns).await.addresses("both.test").await.unwrap();
    assert_eq!(answer.addresses, ips(&["10.0.0.1", "10.0.0.2", "2001:db8::1", "2001:db8::2"]));
    assert_eq!((answer.valid_for, answer.failed_family), (Duration::from_secs(60), None));
}

#[tokio::test]
async fn the_lowest_ttl_of_the_chain_counts_within_bounds() {
    let dns = TestDns::start().await;
    let answers = vec![
        cname("alias.test", 20, "real.test"),
        record("real.test", 3600, "10.0.0.1".parse::<IpAddr>().unwrap().into()),
    ];
    dns.set("alias.test", RecordType::A, Reply::Records { answers, additionals: Vec::new() });
    // An alias whose target the server does not resolve, so that the chain takes two queries.
    let answers = vec![cname("bare.test", 30, "real.test")];
    for kind in [RecordType::A, RecordType::AAAA] {
        dns.set("bare.test", kind, Reply::Records { answers: answers.clone(), additionals: Vec::new() });
    }
    dns.addresses("real.test", 3600, &["10.0.0.1"]);
    dns.addresses("zero.test", 0, &["10.0.0.1"]);
    let resolver = resolver(&dns).await;
    for (name, seconds) in [("alias.test", 20), ("bare.test", 30), ("real.test", 300), ("zero.test", 1)] {
        let answer = resolver.addresses(name).await.unwrap();
        assert_eq!(answer.addresses, ips(&["10.0.0.1"]), "{name}");
        assert_eq!(answer.valid_for, Duration::from_secs(seconds), "{name}");
    }
}

#[tokio::test]
async fn a_response_too_long_for_udp_is_sent_over_tcp() {
    let dns = TestDns::start().await;
    let many: Vec<_> = (0..200).map(|i| format!("10.0.1.{i}")).collect();
    dns.addresses("many.test", 60, &many.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(resolver(&dns).await.addresses("many.test").await.unwrap().addresses.len(), 200);
}

#[tokio::test]
async fn a_server_that_never_answers_for_one_family_delays_by_a_second() {
    let dns = TestDns::start().await;
    dns.addresses("half.test", 60, &["10.0.0.1"]);
    dns.set("half.test", RecordType::AAAA, Reply::Silence);
    let answer = resolver(&dns).await.addresses("half.test").await.unwrap();
    assert_eq!((answer.addresses, answer.failed_family), (ips(&["10.0.0.1"]), Some(AddressFamily::V6)));
}

#[tokio::test]
async fn names_that_need_no_dns_are_not_queried() {
    let dns = TestDns::start().await;
    let plain = Resolver::with_name_server(dns.address, LIMIT).unwrap().with_routes(|_| true);
    let resolver = plain.with_search_list("10.1.1.1 payments payments.hosts\n", &["shop.test"], 1);
    for (name, addresses) in [
        ("10.0.0.1", &["10.0.0.1"][..]),
        ("2001:db8::1", &["2001:db8::1"]),
        ("localhost", &["127.0.0.1", "::1"]),
        ("deep.LocalHost.", &["127.0.0.1", "::1"]),
        ("payments", &["10.1.1.1"]),
    ] {
        assert_eq!(resolver.addresses(name).await.unwrap().addresses, ips(addresses), "{name}");
    }
    assert_eq!(dns.total_queries(), 0);
}

#[tokio::test]
async fn search_domains_are_tried_as_ndots_says() {
    let dns = TestDns::start().await;
    dns.addresses("api.shop.test", 60, &["10.0.0.1"]);
    dns.addresses("api.pay", 60, &["10.0.0.2"]);
    dns.addresses("api.pay.shop.test", 60, &["10.0.0.3"]);
    let ndots = |n| {
        let plain = Resolver::with_name_server(dns.address, LIMIT).unwrap();
        plain.with_search_list("", &["none.test", "shop.test"], n)
    };
    for (name, n, ip) in [
        ("api", 1, "10.0.0.1"),
        ("api.pay", 1, "10.0.0.2"),
        ("api.pay", 5, "10.0.0.3"),
        ("api.pay.", 5, "10.0.0.2"),
    ] {
        assert_eq!(ndots(n).addresses(name).await.unwrap().addresses, ips(&[ip]), "{name} with ndots:{n}");
    }
}

#[tokio::test]
async fn a_missing_name_a_failing_server_and_silence_are_different_errors() {
    let dns = TestDns::start().await;
    dns.fail("broken.test", &Reply::Code(ResponseCode::ServFail));
    dns.fail("refused.test", &Reply::Code(ResponseCode::Refused));
    dns.fail("silent.test", &Reply::Silence);
    dns.addresses("empty.test", 60, &[]);
    let limit = Duration::from_millis(600);
    let resolver = Resolver::with_name_server(dns.address, limit).unwrap();
    for name in ["broken.test", "refused.test"] {
        match resolver.addresses(name).await {
            Err(error @ DnsError::Server { .. }) => {
                assert!(!error.to_string().contains("no such name"), "{error}");
            }
            other => panic!("{name}: {other:?}"),
        }
    }
    for (name, part) in [("missing.test", "NXDOMAIN"), ("empty.test", "without such records"), ("..", "")] {
        match resolver.addresses(name).await {
            Err(DnsError::NotFound { reason, .. }) => assert!(reason.contains(part), "{name}: {reason}"),
            other => panic!("{name}: {other:?}"),
        }
    }
    match resolver.addresses("silent.test").await {
        Err(DnsError::Timeout { name, limit: reported }) => {
            assert_eq!((&*name, reported), ("silent.test", limit));
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_family_without_a_route_is_dropped_unless_it_is_the_only_one() {
    let dns = TestDns::start().await;
    dns.addresses("both.test", 60, &["10.0.0.1", "2001:db8::1"]);
    dns.addresses("six.test", 60, &["2001:db8::1"]);
    let resolver = Resolver::with_name_server(dns.address, LIMIT).unwrap().with_routes(|ip| ip.is_ipv4());
    assert_eq!(resolver.addresses("both.test").await.unwrap().addresses, ips(&["10.0.0.1"]));
    assert_eq!(resolver.addresses("six.test").await.unwrap().addresses, ips(&["2001:db8::1"]));
}

#[tokio::test]
async fn a_family_that_does_not_answer_keeps_its_addresses() {
    let dns = TestDns::start().await;
    dns.addresses("both.test", 1, &["10.0.0.1", "2001:db8::1"]);
    let resolver = resolver(&dns).await;
    let upstream = Upstream::new("both");
    let _discovery = spawn(&dns_source("both.test:80"), upstream.clone(), resolver.clone());
    until_shown(&upstream, &["10.0.0.1:80", "[2001:db8::1]:80"]).await;

    dns.set("both.test", RecordType::AAAA, Reply::Code(ResponseCode::ServFail));
    let answers = vec![record("both.test", 1, RData::A("10.0.0.2".parse().unwrap()))];
    dns.set("both.test", RecordType::A, Reply::Records { answers, additionals: Vec::new() });
    until_shown(&upstream, &["10.0.0.2:80", "[2001:db8::1]:80"]).await;
    assert_eq!(resolver.addresses("both.test").await.unwrap().failed_family, Some(AddressFamily::V6));
}

#[tokio::test]
async fn literal_addresses_are_published_at_once() {
    let dns = TestDns::start().await;
    let upstream = Upstream::new("fixed");
    let list = ["10.0.0.2:80", "[2001:db8::1]:81", "10.0.0.1:80"];
    let source = Endpoints::Fixed(list.iter().map(|text| text.parse().unwrap()).collect());
    let _discovery = spawn(&source, upstream.clone(), resolver(&dns).await);
    assert_eq!(shown(&upstream.endpoints()), list, "in the order of the file, and without waiting");
}

#[tokio::test]
async fn names_in_a_list_join_the_literal_addresses() {
    let dns = TestDns::start().await;
    dns.addresses("a.test", 60, &["10.0.0.9", "10.0.0.8"]);
    let upstream = Upstream::new("mixed");
    let source = Endpoints::Fixed(vec![HostPort::new("10.0.0.1", 80), HostPort::new("a.test", 81)]);
    let _discovery = spawn(&source, upstream.clone(), resolver(&dns).await);
    assert_eq!(shown(&upstream.endpoints()), ["10.0.0.1:80"]);
    until_shown(&upstream, &["10.0.0.1:80", "10.0.0.8:81", "10.0.0.9:81"]).await;
    let hosts: Vec<_> = upstream.endpoints().endpoints.iter().map(|e| e.host.clone()).collect();
    assert_eq!(hosts, [None, Some("a.test".into()), Some("a.test".into())]);
}

#[tokio::test]
async fn new_addresses_are_published_when_the_ttl_is_over() {
    let dns = TestDns::start().await;
    dns.addresses("moving.test", 1, &["10.0.0.1", "10.0.0.2"]);
    let upstream = Upstream::new("moving");
    let _discovery = spawn(&dns_source("moving.test:80"), upstream.clone(), resolver(&dns).await);
    until_shown(&upstream, &["10.0.0.1:80", "10.0.0.2:80"]).await;
    let stays = upstream.endpoints().endpoints[1].clone();
    stays.set_healthy(false);

    dns.addresses("moving.test", 1, &["10.0.0.2", "10.0.0.3"]);
    until_shown(&upstream, &["10.0.0.2:80", "10.0.0.3:80"]).await;
    let now = upstream.endpoints();
    assert!(Arc::ptr_eq(&now.endpoints[0], &stays) && !now.endpoints[0].is_healthy(), "its state is kept");
}

#[tokio::test]
async fn an_unchanged_result_is_not_published() {
    let dns = TestDns::start().await;
    dns.addresses("same.test", 1, &["10.0.0.1"]);
    let upstream = Upstream::new("same");
    let _discovery = spawn(&dns_source("same.test:80"), upstream.clone(), resolver(&dns).await);
    until_shown(&upstream, &["10.0.0.1:80"]).await;
    let before = dns.query_count("same.test");
    while dns.query_count("same.test") < before + 4 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(upstream.endpoints().generation, 1);
}

#[tokio::test]
async fn the_last_good_addresses_outlive_a_failing_server() {
    let dns = TestDns::start().await;
    dns.addresses("stale.test", 1, &["10.0.0.1"]);
    let upstream = Upstream::new("stale");
    let _discovery = spawn(&dns_source("stale.test:80"), upstream.clone(), resolver(&dns).await);
    until_shown(&upstream, &["10.0.0.1:80"]).await;

    dns.fail("stale.test", &Reply::Code(ResponseCode::NXDomain));
    assert!(
        matches!(&*until_failed(&upstream).await, DiscoveryError::Dns(DnsError::NotFound { name, .. }) if name == "stale.test")
    );
    assert_eq!(shown(&upstream.endpoints()), ["10.0.0.1:80"]);

    dns.addresses("stale.test", 60, &["10.0.0.2"]);
    until_shown(&upstream, &["10.0.0.2:80"]).await;
}

#[tokio::test]
async fn a_new_name_resolves_once_it_exists() {
    let dns = TestDns::start().await;
    let upstream = Upstream::new("late");
    let _discovery = spawn(&dns_source("late.test:80"), upstream.clone(), resolver(&dns).await);
    upstream.wait_until_resolved().await;
    until_failed(&upstream).await;
    assert!(upstream.endpoints().endpoints.is_empty());
    dns.addresses("late.test", 60, &["10.0.0.1"]);
    until_shown(&upstream, &["10.0.0.1:80"]).await;
}

#[tokio::test]
async fn a_refresh_does_not_wait_for_the_ttl() {
    let dns = TestDns::start().await;
    dns.addresses("moved.test", 300, &["10.0.0.1"]);
    let upstream = Upstream::new("moved");
    let _discovery = spawn(&dns_source("moved.test:80"), upstream.clone(), resolver(&dns).await);
    until_shown(&upstream, &["10.0.0.1:80"]).await;
    dns.addresses("moved.test", 300, &["10.0.0.2"]);
    for _ in 0..100 {
        upstream.refresh();
    }
    until_shown(&upstream, &["10.0.0.2:80"]).await;
    assert_eq!(dns.query_count("moved.test"), 4, "A and AAAA, twice: a hundred requests lead to one lookup");
}

#[tokio::test]
async fn srv_records_set_ports_weights_and_priorities() {
    let dns = TestDns::start().await;
    let service = |records| Reply::Records { answers: records, additionals: Vec::new() };
    let name = "_http._tcp.pay.test";
    let records = vec![
        srv(name, 20, 1, "spare.test", 9000),
        srv(name, 10, 5, "b.test", 8002),
        srv(name, 10, 0, "a.test", 8001),
    ];
    dns.set(name, RecordType::SRV, service(records));
    dns.addresses("a.test", 60, &["10.0.0.1"]);
    dns.addresses("b.test", 60, &["10.0.0.2", "2001:db8::2"]);
    dns.addresses("spare.test", 60, &["10.0.0.3"]);
    let upstream = Upstream::new("srv");
    let source = Endpoints::Srv(name.to_owned());
    let _discovery = spawn(&source, upstream.clone(), resolver(&dns).await);
    until_shown(&upstream, &["10.0.0.1:8001", "10.0.0.2:8002*5", "[2001:db8::2]:8002*5"]).await;

    // The response may contain the addresses; then they are not queried.
    let glue = vec![record("c.test", 60, RData::A("10.0.0.4".parse().unwrap()))];
    let records = vec![srv(name, 1, 2, "c.test", 8003)];
    dns.set(name, RecordType::SRV, Reply::Records { answers: records, additionals: glue });
    until_shown(&upstream, &["10.0.0.4:8003*2"]).await;
    assert_eq!(dns.query_count("c.test"), 0);

    // No name of the first priority exists: the second is used, and the reason is shown.
    let records = vec![srv(name, 1, 1, "gone.test", 8003), srv(name, 2, 1, "spare.test", 9000)];
    dns.set(name, RecordType::SRV, service(records));
    until(&upstream, |set| shown(set) == ["10.0.0.3:9000"]).await;
    until_failed(&upstream).await;

    // "." states that there is no such service: like any failure, it removes nothing.
    dns.set(name, RecordType::SRV, service(vec![srv(name, 0, 0, ".", 0)]));
    until(
        &upstream,
        |set| matches!(&set.resolution, Resolution::Failed(error) if error.to_string().contains("pay.test")),
    )
    .await;
    assert_eq!(shown(&upstream.endpoints()), ["10.0.0.3:9000"]);
}

#[tokio::test]
async fn a_file_is_watched_and_invalid_content_changes_nothing() {
    let dns = TestDns::start().await;
    dns.addresses("named.test", 60, &["10.0.0.7"]);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("endpoints.json");
    let upstream = Upstream::new("file");
    let _discovery = spawn(&Endpoints::File(path.clone()), upstream.clone(), resolver(&dns).await);
    assert!(until_failed(&upstream).await.to_string().contains("endpoints.json"), "there is no file yet");

    std::fs::write(&path, r#"["10.0.0.1:80", {"address": "named.test:81", "weight": 3}]"#).unwrap();
    until_shown(&upstream, &["10.0.0.1:80", "10.0.0.7:81*3"]).await;

    for (mistake, expected) in [
        ("[", "not a JSON list"),
        (r#"["10.0.0.1"]"#, "entry 0"),
        (r#"[{"address": "10.0.0.1:80", "wait": 1}]"#, "entry 0"),
        (r#"[{"address": "10.0.0.1:80", "weight": 0}]"#, "entry 0"),
    ] {
        std::fs::write(&path, mistake).unwrap();
        until(
            &upstream,
            |set| matches!(&set.resolution, Resolution::Failed(error) if error.to_string().contains(expected)),
        )
        .await;
        assert_eq!(upstream.endpoints().endpoints.len(), 2);
        std::fs::write(&path, r#"["10.0.0.1:80", "10.0.0.2:80"]"#).unwrap();
        until_shown(&upstream, &["10.0.0.1:80", "10.0.0.2:80"]).await;
    }

    // As a ConfigMap changes: another file takes the name.
    let next = directory.path().join("next");
    std::fs::write(&next, r#"["10.0.0.3:80"]"#).unwrap();
    std::fs::rename(&next, &path).unwrap();
    until_shown(&upstream, &["10.0.0.3:80"]).await;
    std::fs::write(&path, "[]").unwrap();
    until_shown(&upstream, &[]).await;
}

#[tokio::test]
async fn a_thread_without_a_runtime_may_start_it() {
    let dns = TestDns::start().await;
    dns.addresses("there.test", 60, &["10.0.0.1"]);
    let (upstream, resolver) = (Upstream::new("there"), resolver(&dns).await);
    let for_thread = upstream.clone();
    let start = move || spawn(&dns_source("there.test:80"), for_thread, resolver);
    let _discovery = std::thread::spawn(start).join().unwrap();
    until_shown(&upstream, &["10.0.0.1:80"]).await;
}

#[tokio::test]
async fn dropping_the_handle_ends_the_task() {
    let dns = TestDns::start().await;
    dns.addresses("gone.test", 1, &["10.0.0.1"]);
    let upstream = Upstream::new("gone");
    let discovery = spawn(&dns_source("gone.test:80"), upstream.clone(), resolver(&dns).await);
    until_shown(&upstream, &["10.0.0.1:80"]).await;
    drop(discovery);
    while Arc::strong_count(&upstream) > 1 {
        tokio::task::yield_now().await;
    }
}
