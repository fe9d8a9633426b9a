//! The retry storm: a client and three services in a row, each with its sidecar, and the last one fails. How many
//! requests reach it?
//!
//! `just storm` runs the same longer, with budgets and advice on and off, and plots it for docs/resilience.md.

use std::{
    fmt::Write as _,
    net::SocketAddr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{Service, upstream};
use crate::support::{Proxy, RawClient, Upstream, UpstreamResponse, text};

/// Requests a second.
const DEMAND: u32 = 100;
const CLIENTS: u32 = 8;

/// One GET through a sidecar's outbound port; the status, or 0 if the sidecar does not respond.
pub async fn get_status(outbound: SocketAddr, host: &str, more: &str) -> u16 {
    let head = format!("GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{more}\r\n");
    let exchange = async {
        let mut stream = TcpStream::connect(outbound).await?;
        stream.write_all(head.as_bytes()).await?;
        let mut response = Vec::new();
        stream.read_to_end(&mut response).await?;
        std::io::Result::Ok(response)
    };
    let response = exchange.await.unwrap_or_default();
    response.get(9..12).and_then(|code| std::str::from_utf8(code).ok()?.parse().ok()).unwrap_or(0)
}

/// A service that responds with the status of its own request through its sidecar. `forward`: it forwards the trace
/// context.
pub fn forwarding_service(outbound: Arc<OnceLock<SocketAddr>>, forward: bool) -> Upstream {
    Upstream::http1(move |request| {
        let outbound = outbound.clone();
        async move {
            let trace = request.headers().get("traceparent").filter(|_| forward).cloned();
            let trace = trace.map_or(String::new(), |trace| {
                format!("traceparent: {}\r\n", trace.to_str().unwrap_or_default())
            });
            let status = match outbound.get() {
                Some(address) => get_status(*address, "up", &trace).await,
                None => 500,
            };
            let mut response: UpstreamResponse = text("between");
            *response.status_mut() = status.try_into().unwrap_or(hyper::StatusCode::BAD_GATEWAY);
            response
        }
    })
}

/// client ─▶ sidecar ─▶ (sidecar ─ service ─ sidecar) ─▶ (…) ─▶ sidecar ─ the last service
struct Chain {
    last: Service,
    /// Percentage of the last service's requests that fail.
    failing: Arc<AtomicUsize>,
    client: Proxy,
    _between: Vec<(Upstream, Proxy)>,
}

impl Chain {
    /// `keys`: policies of every outbound side. `forward`: services forward the trace context.
    fn start(keys: &str, forward: bool) -> (Self, Proxy) {
        let failing = Arc::new(AtomicUsize::new(0));
        let share = failing.clone();
        // Spread evenly: 37 and 100 have no common divisor.
        let last = Service::new(
            move |_, number| if number * 37 % 100 < share.load(Ordering::Relaxed) { 503 } else { 200 },
        );
        let last_sidecar = Proxy::start(format!("[inbound]\nforward_to = \"{}\"\n", last.address()));
        let mut next = last_sidecar.inbound();
        let mut row = Vec::new();
        for _ in 0..2 {
            let outbound = Arc::<OnceLock<SocketAddr>>::default();
            let service = forwarding_service(outbound.clone(), forward);
            let inbound = format!("[inbound]\nforward_to = \"{}\"\n", service.address());
            let sidecar = Proxy::start(inbound + &upstream("up", &[next], keys));
            outbound.set(sidecar.outbound()).expect("once");
            next = sidecar.inbound();
            row.push((service, sidecar));
        }
        let client = Proxy::start(upstream("up", &[next], keys));
        (Self { last, failing, client, _between: row }, last_sidecar)
    }

    /// Sends the demand for this long, whatever the responses. `traced`: clients start a trace. `each` gets the
    /// moment, status and duration of a request.
    fn load(&self, length: Duration, traced: bool, each: impl Fn(Duration, u16, Duration) + Sync) {
        let (number, begin) = (AtomicUsize::new(0), Instant::now());
        let outbound = self.client.outbound();
        thread::scope(|scope| {
            for _ in 0..CLIENTS {
                scope.spawn(|| {
                    let mut client = RawClient::connect(outbound);
                    loop {
                        let turn = number.fetch_add(1, Ordering::Relaxed);
                        let due = begin + Duration::from_secs(1) / DEMAND * u32::try_from(turn).expect("few");
                        if due - begin >= length {
                            return;
                        }
                        thread::sleep(due.saturating_duration_since(Instant::now()));
                        let id = (begin.elapsed().as_nanos() << 20) | turn as u128;
                        let trace = match traced {
                            true => format!("traceparent: 00-{id:032x}-00000000000000ab-01\r\n"),
                            false => String::new(),
                        };
                        let sent = Instant::now();
                        let response = client.ask(super::request("GET", &trace));
                        each(due - begin, response.status(), sent.elapsed());
                    }
                });
            }
        });
    }
}

/// The result of one phase.
struct Phase {
    requests: usize,
    failed: usize,
    /// Requests that reached the last service.
    reached: usize,
    slowest: Duration,
}

fn phase(chain: &Chain, failing: usize, length: Duration) -> Phase {
    phase_of(chain, failing, length, true)
}

fn phase_of(chain: &Chain, failing: usize, length: Duration, traced: bool) -> Phase {
    chain.failing.store(failing, Ordering::Relaxed);
    let before = chain.last.request_count();
    let (requests, failed, slowest) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    chain.load(length, traced, |_, status, took| {
        requests.fetch_add(1, Ordering::Relaxed);
        failed.fetch_add(usize::from(status != 200), Ordering::Relaxed);
        slowest.fetch_max(usize::try_from(took.as_millis()).unwrap_or(usize::MAX), Ordering::Relaxed);
    });
    Phase {
        requests: requests.into_inner(),
        failed: failed.into_inner(),
        reached: chain.last.request_count() - before,
        slowest: Duration::from_millis(slowest.into_inner() as u64),
    }
}

/// Short open intervals, so that the test need not last long.
const BREAKER: &str = "breaker = { open_for = { base = \"500ms\", max = \"2s\" } }";

#[test]
fn a_retry_storm_is_not_amplified() {
    let (chain, _last) = Chain::start(BREAKER, true);
    let well = phase(&chain, 0, Duration::from_secs(2));
    assert_eq!((well.failed, well.reached), (0, well.requests));
    // At most 1.3 × the demand at the last service, while all of its requests fail and while half of them do.
    for failing in [100, 50] {
        let bad = phase(&chain, failing, Duration::from_secs(6));
        let most = bad.requests * 13 / 10;
        assert!(
            bad.reached <= most,
            "{} of {} requests reached it, failing {failing} %",
            bad.reached,
            bad.requests
        );
        assert!(
            bad.slowest < Duration::from_secs(5),
            "clients get a response soon, not after {:?}",
            bad.slowest
        );
    }
    // After recovery: within a bounded time all is as before.
    let healed = Instant::now();
    loop {
        let again = phase(&chain, 0, Duration::from_secs(1));
        if again.failed == 0 {
            break;
        }
        assert!(
            healed.elapsed() < Duration::from_secs(15),
            "{} of {} still fail",
            again.failed,
            again.requests
        );
    }
    let after = phase(&chain, 0, Duration::from_secs(2));
    assert!(after.failed * 100 < after.requests, "{} of {} failed", after.failed, after.requests);
}

/// No client starts a trace, no sidecar has a collector, and services forward only `traceparent`.
#[test]
fn a_retry_storm_is_not_amplified_without_traces() {
    let (chain, _last) = Chain::start(NO_BREAKER, true);
    let bad = phase_of(&chain, 50, Duration::from_secs(8), false);
    let most = bad.requests * 13 / 10;
    assert!(bad.reached <= most, "{} of {} requests reached it", bad.reached, bad.requests);
}

/// Without these policies the same chain multiplies requests: three hops of three attempts each.
const NO_GUARDS: &str = "breaker = false\noutlier = false\n\
    retry = { budget = { ratio = 1.0, min_per_second = 1000 }, backoff = { base = \"5ms\", max = \"20ms\" } }";
const NO_BREAKER: &str = "breaker = false\noutlier = false\n\
    retry = { backoff = { base = \"5ms\", max = \"20ms\" } }";

/// Writes a table, and to `target/storm.csv` what reached the last service each second.
#[test]
#[ignore = "an experiment of two minutes: just storm"]
fn experiment() {
    let sets = [
        ("no budgets, no advice, no breakers", NO_GUARDS, false),
        ("advice only", NO_GUARDS, true),
        ("budgets only", NO_BREAKER, false),
        ("budgets and advice", NO_BREAKER, true),
        ("all, as by default", BREAKER, true),
    ];
    let phases = [(0, 3), (100, 8), (50, 8), (0, 6)];
    let seconds: u64 = phases.iter().map(|(_, length)| length).sum();
    let mut table = String::from(
        "| retry budgets, advice, breakers | load while all fails | while half fails | success rate while half fails | slowest caller | well again: < 1 % errors after |\n\
         | --- | --- | --- | --- | --- | --- |\n",
    );
    let mut csv = String::from("set,second,demand,reached,failed\n");
    for (name, keys, forward) in sets {
        let (chain, _last) = Chain::start(keys, forward);
        let cells = || (0..seconds).map(|_| AtomicUsize::new(0)).collect::<Vec<_>>();
        let (failed, reached) = (cells(), cells());
        let (mut results, mut at) = (Vec::new(), 0);
        for (failing, length) in phases {
            chain.failing.store(failing, Ordering::Relaxed);
            let (offset, before) = (at, chain.last.request_count());
            let slowest = AtomicUsize::new(0);
            let bad = AtomicUsize::new(0);
            thread::scope(|scope| {
                scope.spawn(|| {
                    let (begin, mut seen) = (Instant::now(), before);
                    for second in 0..length {
                        let next = begin + Duration::from_secs(second + 1);
                        thread::sleep(next.saturating_duration_since(Instant::now()));
                        let now = chain.last.request_count();
                        reached[(offset + second) as usize].store(now - seen, Ordering::Relaxed);
                        seen = now;
                    }
                });
                chain.load(Duration::from_secs(length), true, |due, status, took| {
                    slowest.fetch_max(took.as_millis() as usize, Ordering::Relaxed);
                    if status != 200 {
                        bad.fetch_add(1, Ordering::Relaxed);
                        failed[(offset + due.as_secs()) as usize].fetch_add(1, Ordering::Relaxed);
                    }
                });
            });
            at += length;
            let demand = length * u64::from(DEMAND);
            let load = (chain.last.request_count() - before) as f64 / demand as f64;
            let success = 100.0 - bad.load(Ordering::Relaxed) as f64 * 100.0 / demand as f64;
            results.push((load, success, slowest.into_inner()));
        }
        let healed = (seconds - phases[3].1) as usize;
        let again =
            (healed..seconds as usize).rev().find(|second| failed[*second].load(Ordering::Relaxed) > 0);
        let again = again.map_or("at once".to_owned(), |second| format!("{} s", second + 1 - healed));
        let slowest = results.iter().map(|(_, _, slowest)| *slowest).max().unwrap_or(0);
        let _ = writeln!(
            table,
            "| {name} | {:.2} × | {:.2} × | {:.0} % | {slowest} ms | {again} |",
            results[1].0, results[2].0, results[2].1
        );
        for second in 0..seconds as usize {
            let _ = writeln!(
                csv,
                "\"{name}\",{second},{DEMAND},{},{}",
                reached[second].load(Ordering::Relaxed),
                failed[second].load(Ordering::Relaxed)
            );
        }
    }
    println!("{table}");
    std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/target/storm.csv"), csv)
        .expect("target/ is writable");
}
