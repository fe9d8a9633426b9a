//! Replicas behind `dns://` that are added and removed under a TTL of 30 s, under constant load.

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use socket2::SockRef;

use super::request;
use crate::support::{Dns, Launch, RawClient, RawServer, Upstream, eventually, text};

const TTL: u32 = 30;
/// The TTL of records that will be replaced soon.
const SHORT_TTL: u32 = 1;
const CLIENTS: usize = 4;
/// The target: at most one in this many GETs fails.
const ONE_IN: usize = 10_000;
const NAME: &str = "up.test";

fn address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(127, 0, 0, number)
}

/// The state of the port of a removed replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RemovedPort {
    /// Nothing listens there.
    Refuses,
    /// Connections are accepted and reset, old ones as well, as in a network that still routes the address.
    Resets,
}

/// A server that responds with its number.
enum Replica {
    Refusing(Upstream),
    Resetting(RawServer, Arc<AtomicBool>),
}

impl Replica {
    fn start(number: u8, port: u16, gone: RemovedPort) -> Self {
        let at = SocketAddr::from((address(number), port));
        if gone == RemovedPort::Refuses {
            return Self::Refusing(Upstream::at(
                at,
                false,
                move |_, _| async move { text(number.to_string()) },
            ));
        }
        let is_gone = Arc::<AtomicBool>::default();
        let resets = is_gone.clone();
        let server = RawServer::start_at(at, move |mut stream| {
            let (mut seen, body) = ([0; 4096], number.to_string());
            let _ = stream.set_nodelay(true);
            loop {
                // A complete request: a small one, from this proxy.
                let read = stream.read(&mut seen).unwrap_or_default();
                if read == 0 || resets.load(Ordering::Relaxed) {
                    let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
                    return;
                }
                let length = body.len();
                let response = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{body}");
                if stream.write_all(response.as_bytes()).is_err() {
                    return;
                }
            }
        });
        Self::Resetting(server, is_gone)
    }

    fn address(&self) -> SocketAddr {
        match self {
            Self::Refusing(server) => server.address(),
            Self::Resetting(server, _) => server.address(),
        }
    }
}

/// Replicas on one port of several addresses, and the name that resolves to them.
struct Deployment {
    dns: Dns,
    port: u16,
    gone: RemovedPort,
    replicas: BTreeMap<u8, Replica>,
    /// The replicas that reset their connections.
    removed: Vec<Replica>,
}

impl Deployment {
    fn new(numbers: &[u8], gone: RemovedPort) -> Self {
        let first = Replica::start(numbers[0], 0, gone);
        let mut deployment = Self {
            dns: Dns::with_ttl(TTL),
            port: first.address().port(),
            gone,
            replicas: BTreeMap::from([(numbers[0], first)]),
            removed: Vec::new(),
        };
        deployment.add(&numbers[1..]);
        deployment
    }

    fn add(&mut self, numbers: &[u8]) {
        let (port, gone) = (self.port, self.gone);
        self.replicas.extend(numbers.iter().map(|number| (*number, Replica::start(*number, port, gone))));
    }

    /// Resolves the name to the current replicas, with this TTL in seconds.
    fn publish(&self, ttl: u32) {
        let addresses: Vec<Ipv4Addr> = self.replicas.keys().map(|number| address(*number)).collect();
        self.dns.addresses_for(ttl, NAME, &addresses);
    }

    /// Stops replicas that the name does not resolve to any more, all at once and without a drain.
    fn remove(&mut self, numbers: &[u8], ttl: u32) {
        let ended: Vec<Replica> = numbers.iter().filter_map(|number| self.replicas.remove(number)).collect();
        self.publish(ttl);
        for replica in ended {
            let place = replica.address();
            match replica {
                Replica::Refusing(server) => {
                    drop(server);
                    eventually("a replica to be gone", || TcpStream::connect(place).is_err());
                }
                Replica::Resetting(_, ref is_gone) => {
                    is_gone.store(true, Ordering::Relaxed);
                    self.removed.push(replica);
                }
            }
        }
    }
}

/// What clients have counted.
#[derive(Default)]
struct Seen {
    sent: AtomicUsize,
    failed: Mutex<Vec<String>>,
    /// Responses by replica.
    served: Mutex<BTreeMap<String, usize>>,
    over: AtomicBool,
}

impl Seen {
    fn sent(&self) -> usize {
        self.sent.load(Ordering::Relaxed)
    }

    fn count(&self, replica: u8) -> usize {
        self.served.lock().expect("no panic").get(&replica.to_string()).copied().unwrap_or_default()
    }

    /// Waits for this many more requests.
    fn more(&self, count: usize) {
        let before = self.sent();
        eventually("more requests", || self.sent() >= before + count);
    }

    /// Waits until each of these has served a request from now on.
    fn served_by(&self, replicas: &[u8]) {
        let before: Vec<usize> = replicas.iter().map(|replica| self.count(*replica)).collect();
        eventually("all replicas to be asked", || {
            replicas.iter().zip(&before).all(|(replica, before)| self.count(*replica) > *before)
        });
    }

    fn send(&self, proxy: SocketAddr) {
        let mut client = RawClient::connect(proxy);
        while !self.over.load(Ordering::Relaxed) {
            client.send(request("GET", ""));
            self.sent.fetch_add(1, Ordering::Relaxed);
            match client.response() {
                Ok(Some(response)) if response.status() == 200 => {
                    *self.served.lock().expect("no panic").entry(response.text()).or_default() += 1;
                }
                other => {
                    self.failed.lock().expect("no panic").push(format!("{other:?}"));
                    client = RawClient::connect(proxy);
                }
            }
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Sends GETs all through `steps`; at most one in 10,000 may fail.
fn under_load(what: &str, deployment: &mut Deployment, steps: impl FnOnce(&mut Deployment, &Seen)) {
    let config = format!("[[upstream]]\nname = \"up\"\nendpoints = \"dns://{NAME}:{}\"\n", deployment.port);
    let proxy = Launch::new(config).env("OUTRIGGER_DNS", &deployment.dns.address()).start();
    let (seen, began) = (Seen::default(), Instant::now());
    thread::scope(|scope| {
        // Also if a step fails.
        struct StopOnDrop<'a>(&'a AtomicBool);
        impl Drop for StopOnDrop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let _over = StopOnDrop(&seen.over);
        for _ in 0..CLIENTS {
            scope.spawn(|| seen.send(proxy.outbound()));
        }
        steps(deployment, &seen);
    });
    let (sent, failed) = (seen.sent(), seen.failed.into_inner().expect("no panic"));
    // A request has three attempts and a free one, and four of five endpoints begin to reset at the same moment: one
    // request may be the first at each of them.
    let unavoidable = usize::from(deployment.gone == RemovedPort::Resets);
    let rate = sent as f64 / began.elapsed().as_secs_f64();
    let _ = writeln!(
        std::io::stderr(),
        "{what}: {} of {sent} GETs failed, {rate:.0} requests a second",
        failed.len()
    );
    assert!(sent >= 5_000, "{what}: only {sent} requests");
    assert!(
        failed.len() <= unavoidable + sent / ONE_IN,
        "{what}: {} of {sent} failed: {:?}\n{}",
        failed.len(),
        failed.first(),
        super::page(&proxy, "/status")
    );
}

/// Issue 14, fault 20: 192 of 8,051 GETs were lost. One replica, five, one, three. A removed replica refuses
/// connections, as a deleted pod does; or, worse than in a cluster, its address accepts and resets them.
#[test]
fn scaling_under_a_long_ttl_loses_no_get() {
    for gone in [RemovedPort::Refuses, RemovedPort::Resets] {
        let mut deployment = Deployment::new(&[10], gone);
        deployment.publish(SHORT_TTL);
        under_load(
            &format!("scaling, the port of a removed replica {gone:?}"),
            &mut deployment,
            |all, seen| {
                seen.more(500);
                all.add(&[11, 12, 13, 14]);
                all.publish(TTL);
                seen.served_by(&[10, 11, 12, 13, 14]);
                seen.more(1_500);
                all.remove(&[11, 12, 13, 14], SHORT_TTL);
                seen.more(2_000);
                all.add(&[15, 16]);
                all.publish(TTL);
                seen.served_by(&[10, 15, 16]);
                seen.more(1_500);
            },
        );
    }
}

/// Three replicas, replaced one after the other, five times.
#[test]
fn five_rollouts_under_a_long_ttl_lose_no_get() {
    let mut deployment = Deployment::new(&[20, 21, 22], RemovedPort::Refuses);
    deployment.publish(TTL);
    under_load("five rollouts", &mut deployment, |all, seen| {
        seen.more(500);
        let mut next = 23;
        for _ in 0..5 {
            for _ in 0..3 {
                let old = *all.replicas.keys().next().expect("a replica");
                all.add(&[next]);
                all.remove(&[old], TTL);
                // The old one's refusal makes the proxy query DNS again.
                seen.served_by(&[next]);
                seen.more(300);
                next += 1;
            }
        }
    });
}
