//! One slow endpoint of five: its share of the requests, and which requests wait for it.
//! tests/experiments/slow_endpoint.py measures the same; here are the bounds that must hold on any machine.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use super::{request, upstream};
use crate::support::{Proxy, RawClient, Upstream, text};

const REQUESTS: usize = 300;
const CLIENTS: usize = 10;
const SLOW: Duration = Duration::from_millis(600);

fn service(answers_after: Duration) -> (Upstream, Arc<AtomicUsize>) {
    let requests = Arc::<AtomicUsize>::default();
    let count = requests.clone();
    let service = Upstream::http1(move |_| {
        count.fetch_add(1, Ordering::Relaxed);
        async move {
            tokio::time::sleep(answers_after).await;
            text("done")
        }
    });
    (service, requests)
}

/// The result of the requests.
#[derive(Debug)]
struct Results {
    /// Requests and hedges that the slow endpoint got.
    slow_got: usize,
    /// All requests that the endpoints got.
    sent: usize,
    /// Clients that waited for the slow endpoint.
    waited: usize,
    well: usize,
}

fn measure(keys: &str) -> Results {
    let services: Vec<_> =
        (0..5).map(|at| service(if at == 2 { SLOW } else { Duration::from_millis(2) })).collect();
    let endpoints: Vec<_> = services.iter().map(|(service, _)| service.address()).collect();
    let proxy = Proxy::start(upstream("up", &endpoints, &format!("breaker = false\n{keys}")));
    let (begun, waited, well) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                let mut client = RawClient::connect(proxy.outbound());
                while begun.fetch_add(1, Ordering::Relaxed) < REQUESTS {
                    let began = Instant::now();
                    let response = client.ask(request("GET", ""));
                    waited.fetch_add(usize::from(began.elapsed() >= SLOW), Ordering::Relaxed);
                    well.fetch_add(usize::from(response.status() == 200), Ordering::Relaxed);
                }
            });
        }
    });
    let got: Vec<usize> = services.iter().map(|(_, requests)| requests.load(Ordering::Relaxed)).collect();
    Results { slow_got: got[2], sent: got.iter().sum(), waited: waited.into_inner(), well: well.into_inner() }
}

/// The control: with round robin a fifth of all requests goes there and waits. The default balancer uses latency and
/// load.
#[test]
fn the_default_balancer_avoids_a_slow_endpoint() {
    let in_turn = measure("balance = \"round-robin\"");
    assert!(in_turn.slow_got * 7 > REQUESTS && in_turn.waited * 7 > REQUESTS, "a fifth: {in_turn:?}");
    let by_default = measure("");
    assert!(by_default.slow_got * 10 < REQUESTS, "less than half of its share: {by_default:?}");
    assert_eq!((by_default.well, by_default.sent), (REQUESTS, REQUESTS), "{by_default:?}");
}

/// Slowness alone is no failure; with a timeout it is, and then the endpoint is ejected.
#[test]
fn timeouts_eject_a_slow_endpoint() {
    let keys = "balance = \"round-robin\"\nattempt_timeout = \"300ms\"\n";
    let ejected = measure(&format!("{keys}outlier = {{ eject_for = {{ base = \"60s\", max = \"60s\" }} }}"));
    // At most one request of each client is in flight when the fifth fails.
    assert!(ejected.slow_got <= 5 + CLIENTS, "{ejected:?}");
    assert!(ejected.well * 100 >= REQUESTS * 97, "{ejected:?}");
    let not = measure(&format!("{keys}outlier = false"));
    assert!(not.slow_got * 7 > REQUESTS, "the control: {not:?}");
}

/// A hedge elsewhere: clients do not wait for the slow endpoint, for as much extra load as the budget allows.
#[test]
fn hedging_hides_the_slow_endpoint_from_clients() {
    let hedge = "balance = \"round-robin\"\noutlier = false\nhedge = { after = \"100ms\" }\n\
        retry = { budget = { ratio = 0.5 } }";
    let hedged = measure(hedge);
    assert!(hedged.slow_got * 7 > REQUESTS, "it still gets its share: {hedged:?}");
    assert!(hedged.waited * 10 < REQUESTS, "but fewer than half wait for it: {hedged:?}");
    assert!(
        hedged.sent > REQUESTS && hedged.sent <= REQUESTS * 3 / 2 + 10,
        "the budget bounds it: {hedged:?}"
    );
    assert_eq!(hedged.well, REQUESTS, "{hedged:?}");
}
