//! One slow endpoint of five: what share of the calls it still gets, and who waits for it. tests/experiments/slow_endpoint.py
//! measures the same; here are the bounds that must hold on any machine.

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

const CALLS: usize = 300;
const CALLERS: usize = 10;
const SLOW: Duration = Duration::from_millis(600);

fn service(answers_after: Duration) -> (Upstream, Arc<AtomicUsize>) {
    let calls = Arc::<AtomicUsize>::default();
    let count = calls.clone();
    let service = Upstream::http1(move |_| {
        count.fetch_add(1, Ordering::Relaxed);
        async move {
            tokio::time::sleep(answers_after).await;
            text("done")
        }
    });
    (service, calls)
}

/// What came of the calls.
#[derive(Debug)]
struct Felt {
    /// Calls and copies that the slow endpoint got.
    slow_got: usize,
    /// All that the endpoints got.
    sent: usize,
    /// Callers who waited as long as it takes.
    waited: usize,
    well: usize,
}

fn measure(keys: &str) -> Felt {
    let services: Vec<_> =
        (0..5).map(|at| service(if at == 2 { SLOW } else { Duration::from_millis(2) })).collect();
    let endpoints: Vec<_> = services.iter().map(|(service, _)| service.address()).collect();
    let proxy = Proxy::start(upstream("up", &endpoints, &format!("breaker = false\n{keys}")));
    let (begun, waited, well) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    thread::scope(|scope| {
        for _ in 0..CALLERS {
            scope.spawn(|| {
                let mut client = RawClient::connect(proxy.outbound());
                while begun.fetch_add(1, Ordering::Relaxed) < CALLS {
                    let began = Instant::now();
                    let answer = client.ask(request("GET", ""));
                    waited.fetch_add(usize::from(began.elapsed() >= SLOW), Ordering::Relaxed);
                    well.fetch_add(usize::from(answer.status() == 200), Ordering::Relaxed);
                }
            });
        }
    });
    let got: Vec<usize> = services.iter().map(|(_, calls)| calls.load(Ordering::Relaxed)).collect();
    Felt { slow_got: got[2], sent: got.iter().sum(), waited: waited.into_inner(), well: well.into_inner() }
}

/// The control: in turn, a fifth of all calls goes there, and waits. The default looks at latency and load instead.
#[test]
fn the_default_balancer_avoids_a_slow_endpoint() {
    let in_turn = measure("balance = \"round-robin\"");
    assert!(in_turn.slow_got * 7 > CALLS && in_turn.waited * 7 > CALLS, "a fifth: {in_turn:?}");
    let by_default = measure("");
    assert!(by_default.slow_got * 10 < CALLS, "less than half of its share: {by_default:?}");
    assert_eq!((by_default.well, by_default.sent), (CALLS, CALLS), "{by_default:?}");
}

/// Slowness alone is no failure; by way of a time-out it is, and then the endpoint is out.
#[test]
fn a_slow_endpoint_is_ejected_where_slow_means_failing() {
    let keys = "balance = \"round-robin\"\nattempt_timeout = \"300ms\"\n";
    let ejected = measure(&format!("{keys}outlier = {{ eject_for = {{ base = \"60s\", max = \"60s\" }} }}"));
    // Those that are under way when the fifth fails are the callers' number at most.
    assert!(ejected.slow_got <= 5 + CALLERS, "{ejected:?}");
    assert!(ejected.well * 100 >= CALLS * 97, "{ejected:?}");
    let not = measure(&format!("{keys}outlier = false"));
    assert!(not.slow_got * 7 > CALLS, "the control: {not:?}");
}

/// A second copy elsewhere: who would have waited does not, for as much more load as the budget allows.
#[test]
fn a_hedge_spares_callers_the_slow_endpoint() {
    let hedge = "balance = \"round-robin\"\noutlier = false\nhedge = { after = \"100ms\" }\n\
        retry = { budget = { ratio = 0.5 } }";
    let hedged = measure(hedge);
    assert!(hedged.slow_got * 7 > CALLS, "it is asked as before: {hedged:?}");
    assert!(hedged.waited * 10 < CALLS, "but fewer than half wait for it: {hedged:?}");
    assert!(hedged.sent > CALLS && hedged.sent <= CALLS * 3 / 2 + 10, "the budget bounds it: {hedged:?}");
    assert_eq!(hedged.well, CALLS, "{hedged:?}");
}
