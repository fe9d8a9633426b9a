//! SIGKILL of the proxy at random instants, under a hundred clients.

use std::collections::{BTreeMap, BTreeSet};

use outrigger::rng::Rng;

use super::*;
use crate::support::eventually;

const CLIENTS: usize = 100;
/// After so many the proxy is left alone until everything is delivered.
const ROUNDS_AT_A_TIME: usize = 5;

/// Kills the proxy so many times. Whatever got a 202 is delivered, and what is delivered twice has the same key.
fn kill_proxies(rounds: usize, seed: u64) {
    let (service, store) = (Service::start(), tempfile::tempdir().unwrap());
    let queue = format!("{QUEUE}concurrency = 50\n");
    let text = config(store.path(), service.address(), &queue, "");
    let mut rng = Rng::from_seed(seed);
    let mut accepted = BTreeSet::new();
    for round in 0..rounds {
        let mut proxy = Proxy::start(text.clone());
        let mut clients: Vec<RawClient> =
            (0..CLIENTS).map(|_| RawClient::connect(proxy.outbound())).collect();
        let (enough, delay) = (1 + rng.below(300), Duration::from_micros(rng.below(3000) as u64));
        let promised = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for (number, client) in clients.iter_mut().enumerate() {
                let promised = &promised;
                scope.spawn(move || send_orders(client, &format!("{round}-{number}"), promised));
            }
            eventually("enough 202s", || promised.lock().unwrap().len() >= enough);
            std::thread::sleep(delay);
            proxy.signal("KILL");
            proxy.wait();
        });
        accepted.extend(promised.into_inner().unwrap());
        if (round + 1) % ROUNDS_AT_A_TIME == 0 || round + 1 == rounds {
            let _proxy = Proxy::start(text.clone());
            eventually(&format!("all deliveries (round {round}, seed {seed})"), || {
                let received = service.received();
                let bodies: BTreeSet<&[u8]> = received.iter().map(|one| one.body.as_slice()).collect();
                accepted.iter().all(|body: &String| bodies.contains(body.as_bytes()))
            });
        }
    }
    assert!(accepted.len() > rounds, "only {} were accepted", accepted.len());
    let received = service.received();
    let mut keys: BTreeMap<&[u8], &str> = BTreeMap::new();
    for one in &received {
        let key = one.field("idempotency-key");
        assert_eq!(*keys.entry(&one.body).or_insert(key), key, "another key for the same request");
    }
    let repeated = received.len() - keys.len();
    println!("{} accepted, {} received, {repeated} of them again", accepted.len(), received.len());
}

/// One after another, until the proxy is gone.
fn send_orders(client: &mut RawClient, name: &str, promised: &Mutex<Vec<String>>) {
    for number in 0.. {
        let body = format!("{name}-{number}");
        let length = body.len();
        client.send(format!(
            "POST /orders HTTP/1.1\r\nHost: payments\r\n{ASYNC}content-length: {length}\r\n\r\n{body}"
        ));
        match client.response() {
            Ok(Some(response)) if response.status() == 202 => promised.lock().unwrap().push(body),
            Ok(Some(response)) => panic!("{}", response.text()),
            _ => return,
        }
    }
}

#[test]
fn whatever_got_a_202_is_delivered_after_sigkill() {
    kill_proxies(5, 1);
}

/// `cargo test --test it deliveries::kill::whatever_got_a_202_is_delivered_after_500_sigkills -- --ignored`
#[test]
#[ignore = "minutes"]
fn whatever_got_a_202_is_delivered_after_500_sigkills() {
    kill_proxies(500, 2);
}
