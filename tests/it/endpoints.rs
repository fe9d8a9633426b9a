//! Which endpoint gets a request: SRV records with priorities and weights, and hash balancing.

use std::{
    collections::{BTreeMap, HashSet},
    net::Ipv4Addr,
};

use crate::support::{Dns, Launch, Proxy, RawClient, Upstream, eventually, text};

/// Servers that respond with their number.
fn servers(count: usize) -> Vec<Upstream> {
    let server = |number: usize| Upstream::http1(move |_| async move { text(number.to_string()) });
    (0..count).map(server).collect()
}

fn start(dns: &Dns, name: &str, more: &str) -> Proxy {
    let config = format!("[[upstream]]\nname = \"up\"\nendpoints = \"dns+srv://{name}\"\n{more}\n");
    Launch::new(config).env("OUTRIGGER_DNS", &dns.address()).start()
}

/// The server that responds to a request with these header fields.
#[track_caller]
fn serving(client: &mut RawClient, fields: &str) -> usize {
    let response = client.ask(format!("GET / HTTP/1.1\r\nHost: up\r\n{fields}\r\n"));
    assert_eq!(response.status(), 200, "{response:?}");
    response.text().parse().expect("a number")
}

/// How many of this many requests each server gets.
#[track_caller]
fn shares(proxy: &Proxy, requests: usize, servers: usize) -> Vec<usize> {
    let mut client = RawClient::connect(proxy.outbound());
    let mut shares = vec![0; servers];
    (0..requests).for_each(|_| shares[serving(&mut client, "")] += 1);
    shares
}

/// Waits until requests are distributed so. At first the targets are those whose names are resolved already, even if
/// they have the last priority.
#[track_caller]
fn eventually_shares(what: &str, proxy: &Proxy, expected: &[usize]) {
    let mut last = Vec::new();
    let divided = || {
        let mut client = RawClient::connect(proxy.outbound());
        last = vec![0; expected.len()];
        for _ in 0..expected.iter().sum() {
            let response = client.ask("GET / HTTP/1.1\r\nHost: up\r\n\r\n");
            if response.status() != 200 {
                return false;
            }
            last[response.text().parse::<usize>().expect("a number")] += 1;
        }
        last == expected
    };
    eventually(what, divided);
}

#[test]
fn srv_weights_share_load_and_priorities_are_standby() {
    let (dns, servers) = (Dns::start(), servers(3));
    let port = |number: usize| servers[number].address().port();
    for name in ["a.test", "b.test", "c.test"] {
        dns.addresses(name, &[Ipv4Addr::LOCALHOST]);
    }
    let last = (1, 1, port(2), "c.test");
    dns.services("_http._tcp.up.test", &[(0, 3, port(0), "a.test"), (0, 1, port(1), "b.test"), last]);
    let proxy = start(&dns, "_http._tcp.up.test", "balance = \"round-robin\"");
    eventually_shares("three to one", &proxy, &[30, 10, 0]);

    dns.services("_http._tcp.up.test", &[last]);
    eventually_shares("the next priority to be used", &proxy, &[0, 0, 10]);

    // A target of the first priority without an address does not count.
    dns.addresses("gone.test", &[]);
    dns.services("_http._tcp.other.test", &[(0, 1, port(0), "gone.test"), last]);
    let proxy = start(&dns, "_http._tcp.other.test", "");
    eventually_shares("the next priority to be used at once", &proxy, &[0, 0, 5]);
}

const KEYS: usize = 100;

/// The server of each key.
fn owners(proxy: &Proxy, field: impl Fn(usize) -> String) -> BTreeMap<usize, usize> {
    let mut client = RawClient::connect(proxy.outbound());
    (0..KEYS).map(|key| (key, serving(&mut client, &field(key)))).collect()
}

#[test]
fn hash_balancing_keeps_each_key_on_its_endpoint() {
    const SERVERS: usize = 5;
    let (dns, servers) = (Dns::start(), servers(SERVERS));
    dns.addresses("a.test", &[Ipv4Addr::LOCALHOST]);
    let records: Vec<_> = servers.iter().map(|server| (0, 1, server.address().port(), "a.test")).collect();
    dns.services("_http._tcp.up.test", &records);

    let by_header = |key: usize| format!("x-user: user-{key}\r\n");
    let by_cookie = |key: usize| format!("cookie: theme=dark; session=user-{key}\r\n");
    let one = start(&dns, "_http._tcp.up.test", "balance = \"hash:header:x-user\"");
    let other = start(&dns, "_http._tcp.up.test", "balance = \"hash:cookie:session\"");
    let before = owners(&one, by_header);
    assert_eq!(owners(&one, by_header), before, "the same key, the same endpoint");
    assert_eq!(owners(&other, by_cookie), before, "from every sidecar, header or cookie");
    assert_eq!(before.values().collect::<HashSet<_>>().len(), SERVERS, "each has some: {before:?}");
    assert!(shares(&one, 40, SERVERS).iter().filter(|share| **share > 0).count() > 1, "calls without a key");

    let removed = 2;
    let mut rest = records.clone();
    rest.remove(removed);
    dns.services("_http._tcp.up.test", &rest);
    for (proxy, field) in [(&one, &by_header as &dyn Fn(usize) -> String), (&other, &by_cookie)] {
        let mut after = BTreeMap::new();
        eventually("the endpoint to be gone", || {
            after = owners(proxy, field);
            after.values().all(|owner| *owner != removed)
        });
        let moved: Vec<_> = before.iter().filter(|(key, owner)| after[*key] != **owner).collect();
        assert!(moved.iter().all(|(_, owner)| **owner == removed), "only its own keys move: {moved:?}");
        let heirs: HashSet<_> = moved.iter().map(|(key, _)| after[*key]).collect();
        assert!(heirs.len() > 1, "and are shared out: {heirs:?}");
    }
}
