//! Partial outages: the healthy endpoints of an upstream serve it, and it recovers soon after the others do.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use super::{
    Service, ask, assert_cause, get, metric, page, post, proxy, refusing_address, request, retries, serve_at,
    status,
};
use crate::support::{
    Dns, Launch, Proxy, RawClient, RawServer, Upstream, eventually,
    pki::{Pki, id},
    text,
    tls::TlsServer,
};

const NO_BUDGET: &str = "retry = { budget = { ratio = 0.0, min_per_second = 0 } }\n";

fn transitions(proxy: &Proxy, to: &str) -> u64 {
    metric(proxy, &format!("outrigger_breaker_transitions_total{{upstream=\"up\",to=\"{to}\"}}"))
}

/// Two of three endpoints are down: neither GET nor POST fails, and no retry budget is spent.
#[test]
fn a_refused_connection_is_retried_elsewhere_without_budget() {
    let well = Service::new(|_, _| 200);
    let endpoints = [refusing_address(), refusing_address(), well.address()];
    for more in ["", "balance = \"least-request\"\n", "balance = \"round-robin\"\n"] {
        let config = super::upstream("up", &endpoints, &format!("{more}{NO_BUDGET}"));
        let proxy = Proxy::start(config);
        let mut client = RawClient::connect(proxy.outbound());
        for number in 0..60 {
            let response = client.ask(if number % 2 == 0 { request("GET", "") } else { post("", "pay") });
            assert_eq!(response.status(), 200, "{more} {number}: {response:?}");
        }
        assert!(retries(&proxy, "next_endpoint") >= 1);
        assert_eq!(retries(&proxy, "sent"), 0);
        assert_eq!(transitions(&proxy, "open"), 0, "{more}");
    }
}

/// Slow responses and many requests in flight elsewhere do not make failing endpoints look better.
#[test]
fn dead_endpoints_attract_no_requests() {
    let slow = Upstream::http1(|_| async {
        tokio::time::sleep(Duration::from_millis(120)).await;
        text("ok")
    });
    let endpoints = [refusing_address(), refusing_address(), slow.address()];
    let proxy = Proxy::start(super::upstream("up", &endpoints, NO_BUDGET));
    let failed = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..24 {
            scope.spawn(|| {
                let mut client = RawClient::connect(proxy.outbound());
                for _ in 0..10 {
                    let well = client.ask(request("GET", "")).status() == 200;
                    failed.fetch_add(usize::from(!well), Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(failed.load(Ordering::Relaxed), 0, "of 240");
    assert_eq!(transitions(&proxy, "open"), 0);
}

/// Two of three endpoints respond with 503 to everything, more than `max_ejected` allows to eject: the third serves.
/// The breaker is for the upstream as a whole.
#[test]
fn the_breaker_stays_closed_while_one_endpoint_serves() {
    let bad: Vec<Service> = (0..2).map(|_| Service::new(|_, _| 503)).collect();
    let well = Service::new(|_, _| 200);
    let endpoints = [bad[0].address(), bad[1].address(), well.address()];
    for balance in ["p2c", "least-request"] {
        let proxy = Proxy::start(super::upstream("up", &endpoints, &format!("balance = \"{balance}\"\n")));
        for number in 0..200 {
            assert_eq!(get(&proxy).status(), 200, "{balance}: {number}");
        }
        assert_eq!(transitions(&proxy, "open"), 0, "{balance}");
    }
    // With round robin, half of the requests reach the failing endpoint that stays: some fail, the breaker does not
    // add to them.
    let proxy = proxy(&endpoints, "retry = false");
    let served = (0..200).filter(|_| get(&proxy).status() == 200).count();
    assert!(served >= 90, "{served} of 200");
    assert_eq!(transitions(&proxy, "open"), 0);
}

/// All endpoints fail: the breaker opens.
#[test]
fn the_breaker_opens_when_all_endpoints_fail() {
    let bad = Service::new(|_, _| 503);
    let proxy = proxy(&[refusing_address(), bad.address(), refusing_address()], "retry = false");
    eventually("the breaker to open", || {
        let _ = get(&proxy);
        transitions(&proxy, "open") == 1
    });
    assert_cause(&get(&proxy), 503, "breaker_open");
}

/// The port of a sidecar accepts connections whether or not its service runs.
#[test]
fn an_endpoint_without_a_service_behind_its_sidecar_is_ejected_until_it_serves() {
    let place = refusing_address();
    let (down, good) =
        (Proxy::start(format!("[inbound]\nforward_to = \"{place}\"\n")), Service::new(|_, _| 200));
    let well = Proxy::start(format!("[inbound]\nforward_to = \"{}\"\n", good.address()));
    let client = proxy(&[down.inbound(), well.inbound()], "");
    for number in 0..60 {
        let response = ask(&client, post("", "pay"));
        assert_eq!(response.status(), 200, "{number}: {response:?}");
    }
    assert_eq!(status(&client)["upstreams"][0]["endpoints"][0]["state"], "absent");
    assert!(retries(&client, "sent") <= 2, "only the first cost budget");
    assert_eq!(transitions(&client, "open"), 0);
}

/// An outage behind a live sidecar: requests are probed early, which changes nothing as long as they fail, and the
/// upstream recovers soon after the service, whatever `open_for`.
#[test]
fn the_breaker_closes_soon_after_a_service_behind_a_live_sidecar_recovers() {
    let place = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = place.local_addr().expect("bound");
    drop(place);
    let sidecar = Proxy::start(format!("[inbound]\nforward_to = \"{address}\"\n"));
    let keys =
        "breaker = { consecutive_failures = 2, open_for = { base = \"10m\", max = \"10m\" } }\nretry = false";
    let client = proxy(&[sidecar.inbound()], keys);
    let mut fives = 0;
    // Two open it, the others are early trials.
    eventually("early trials", || {
        fives += u32::from(get(&client).status() == 502);
        fives == 6
    });
    assert_eq!((transitions(&client, "open"), transitions(&client, "half_open")), (1, 0));
    let until = status(&client)["upstreams"][0]["breaker"]["until_in_seconds"].as_u64().expect("open");
    assert!(until <= 600, "{until}");
    let _back = serve_at(address, "200 OK", "ok");
    eventually("the upstream to be back", || get(&client).status() == 200);
    eventually("the breaker to close", || {
        let _ = get(&client);
        transitions(&client, "closed") == 1
    });
}

/// An endpoint that accepts connections again and sends errors has not recovered.
#[test]
fn an_open_port_closes_the_breaker_only_after_a_successful_request() {
    let place = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = place.local_addr().expect("bound");
    drop(place);
    let keys =
        "breaker = { consecutive_failures = 2, open_for = { base = \"10m\", max = \"10m\" } }\nretry = false";
    let proxy = proxy(&[address], keys);
    for _ in 0..2 {
        assert_cause(&get(&proxy), 502, "connect_refused");
    }
    assert_cause(&get(&proxy), 503, "breaker_open");
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    let _back = RawServer::start_at(address, move |mut stream| {
        use std::io::{Read, Write};
        let mut seen = [0; 4096];
        if stream.read(&mut seen).is_ok_and(|read| read > 0) {
            let status = if count.fetch_add(1, Ordering::Relaxed) < 4 { "503 Busy" } else { "200 OK" };
            let _ = write!(stream, "HTTP/1.1 {status}\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok");
        }
    });
    eventually("a trial to fail", || get(&proxy).text() == "ok");
    assert_eq!(transitions(&proxy, "half_open"), 0);
    eventually("it to be well", || get(&proxy).status() == 200);
    assert_eq!((transitions(&proxy, "open"), transitions(&proxy, "half_open")), (1, 1));
    assert!(asked.load(Ordering::Relaxed) >= 5);
}

/// Wrong identity, expired certificate, no TLS: reported as such everywhere; the open port makes no early trial.
#[test]
fn tls_failures_are_reported_and_probed_only_after_open_for() {
    let pki = Pki::new();
    let plain = Upstream::http1(|_| async { text("no TLS") });
    let expired = pki.issue("payments", |p| p.not_after = rcgen::date_time_ymd(2020, 1, 1));
    let servers = [
        (
            "peer_identity",
            TlsServer::start(&pki.issue("orders", |_| {}), Some(&pki.ca_pem()), &["http/1.1"]).address(),
        ),
        ("peer_identity", TlsServer::start(&expired, Some(&pki.ca_pem()), &["http/1.1"]).address()),
        ("tls_failure", plain.address()),
    ];
    for (cause, address) in servers {
        let config = format!(
            "{}[telemetry]\naccess_log = \"all\"\n[[upstream]]\nname = \"up\"\nendpoints = [\"{address}\"]\nidentity = [\"{}\"]\nretry = false\n\
             breaker = {{ consecutive_failures = 3, open_for = {{ base = \"30s\", max = \"60s\" }} }}\n",
            pki.identity("checkout"),
            id("payments"),
        );
        let proxy = Proxy::start(config);
        for _ in 0..3 {
            assert_cause(&get(&proxy), 502, cause);
        }
        for _ in 0..50 {
            assert_cause(&get(&proxy), 503, "breaker_open");
        }
        assert_eq!((transitions(&proxy, "open"), transitions(&proxy, "half_open")), (1, 0), "{cause}");
        assert_eq!(status(&proxy)["upstreams"][0]["endpoints"][0]["state"], "healthy", "{cause}: not absent");
        let requests = page(&proxy, "/requests");
        assert!(requests.contains(&format!("\"outcome\": \"{cause}\"")), "{cause}: {requests}");
        assert!(!requests.contains("connect_refused"), "{cause}: {requests}");
        eventually("the access log", || proxy.stdout().contains(&format!("\"reason\":\"{cause}\"")));
        assert!(!proxy.stdout().contains("connect_refused"), "{cause}");
    }
}

/// Replicas that are replaced under a TTL of 30 s: a refused connection triggers a DNS query, and no request is lost
/// meanwhile.
#[test]
fn rollouts_under_a_long_ttl_lose_no_request() {
    let dns = Dns::with_ttl(30);
    let first = Upstream::at(SocketAddr::from(([127, 0, 0, 10], 0)), false, |_, _| async { text("10") });
    let port = first.address().port();
    let replica = |number: u8| {
        let response = number.to_string();
        Upstream::at(SocketAddr::from(([127, 0, 0, number], port)), false, move |_, _| {
            let response = response.clone();
            async move { text(response) }
        })
    };
    let at = |numbers: &[u8]| -> Vec<Ipv4Addr> {
        numbers.iter().map(|number| Ipv4Addr::new(127, 0, 0, *number)).collect()
    };
    dns.addresses("up.test", &at(&[10, 11]));
    let mut replicas = vec![first, replica(11)];
    let config = format!("[[upstream]]\nname = \"up\"\nendpoints = \"dns://up.test:{port}\"\n{NO_BUDGET}");
    let proxy = Launch::new(config).env("OUTRIGGER_DNS", &dns.address()).start();
    let mut client = RawClient::connect(proxy.outbound());
    let mut ask = |what: &str| {
        let response = client.ask(request("GET", ""));
        assert_eq!(response.status(), 200, "{what}: {response:?}");
        response.text()
    };
    for round in 0..3_u8 {
        for _ in 0..10 {
            ask("all is well");
        }
        // The new ones start before the old ones stop, as in a rolling update.
        let new = [20 + 2 * round, 21 + 2 * round];
        let next: Vec<Upstream> = new.iter().map(|number| replica(*number)).collect();
        dns.addresses("up.test", &at(&new));
        drop(replicas.pop());
        eventually("a new replica to be called", || {
            new.iter().any(|number| ask("one is gone") == number.to_string())
        });
        replicas = next;
    }
}

/// A name that did not exist for a while resolves soon after it exists, when requests need it.
#[test]
fn a_missing_name_is_resolved_again_while_requests_arrive() {
    let dns = Dns::start();
    let service = Service::new(|_, _| 200);
    let config =
        format!("[[upstream]]\nname = \"up\"\nendpoints = \"dns://up.test:{}\"\n", service.address().port());
    let proxy = Launch::new(config).env("OUTRIGGER_DNS", &dns.address()).start();
    let began = Instant::now();
    eventually("five look-ups", || {
        assert_cause(&get(&proxy), 502, "dns_failure");
        dns.queries() >= 10
    });
    // At most one query a second, however many requests arrive.
    assert!(began.elapsed() >= Duration::from_secs(3), "{:?}", began.elapsed());
    dns.addresses("up.test", &[Ipv4Addr::LOCALHOST]);
    let added = Instant::now();
    eventually("the name to be found", || get(&proxy).status() == 200);
    assert!(added.elapsed() < Duration::from_secs(5), "{:?}", added.elapsed());
}
