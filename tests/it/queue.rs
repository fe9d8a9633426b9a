//! The store of the queues under real failures: killed processes, power cuts, full and failing disks. And `outrigger queue`.
//!
//! The process that writes is this test binary again, with an ignored test as its main function: [`writer`].

mod disk;
mod kill;
mod offline;
mod power_cut;
mod rate;

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    io::Write,
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use http::{HeaderMap, Method, Uri};
use outrigger::{
    queue::{
        DeliveryId, StoredRequest,
        request::Direction,
        store::{DeliveryState, NewDelivery, Store, StoreError, StoreThread, settings::StoreSettings},
    },
    resilience::queue::{Verdict, settings::QueueLimits},
    rng::Rng,
    units::ByteSize,
    unix_time::SteadyClock,
};

/// Where the child process finds the store; its presence makes an ignored test a main function.
const STORE: &str = "OUTRIGGER_TEST_STORE";
/// How many callers the child has, and how many requests each of them sends; 0: without end.
const CALLERS: &str = "OUTRIGGER_TEST_CALLERS";
const REQUESTS: &str = "OUTRIGGER_TEST_REQUESTS";

fn settings(path: &Path) -> StoreSettings {
    StoreSettings { path: path.to_owned(), reserve: ByteSize(64 << 10), ..StoreSettings::default() }
}

fn open(path: &Path) -> (Store, StoreThread) {
    Store::open(&settings(path), SteadyClock::default()).expect("the store opens")
}

fn close((store, thread): (Store, StoreThread)) {
    drop(store);
    thread.join();
}

fn new_delivery(body: impl Into<Bytes>) -> NewDelivery {
    NewDelivery {
        queue: "orders".to_owned(),
        limits: QueueLimits { max_messages: u64::MAX, ..QueueLimits::default() },
        identity: String::new(),
        idempotency_key: None,
        order_key: None,
        request: StoredRequest {
            direction: Direction::Outbound,
            method: Method::POST,
            uri: Uri::from_static("http://payments/charge?user=1"),
            headers: HeaderMap::new(),
        },
        body: body.into(),
    }
}

/// A body that tells from its first eight bytes what the others are.
fn body(seed: u64) -> Vec<u8> {
    let mut rng = Rng::from_seed(seed);
    let length = if rng.chance(0.1) { rng.below(20_000) } else { rng.below(1200) };
    let mut body = seed.to_be_bytes().to_vec();
    body.extend((0..length).map(|_| rng.next_u64() as u8));
    body
}

fn is_intact(stored: &[u8]) -> bool {
    stored.first_chunk().is_some_and(|seed| stored == body(u64::from_be_bytes(*seed)))
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(future)
}

/// This binary, to run one of its ignored tests on a store. `tracer`: a program that starts it, with arguments.
fn child(test: &str, store: &Path, tracer: &[&str]) -> Command {
    let own = env::current_exe().expect("this binary");
    let mut command = match tracer {
        [] => Command::new(own),
        [program, arguments @ ..] => {
            let mut command = Command::new(program);
            command.args(arguments).arg(own);
            command
        }
    };
    command.args([test, "--exact", "--ignored", "--nocapture"]).env(STORE, store);
    command
}

fn number(name: &str, default: u64) -> u64 {
    env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Accepts without end, and ends some deliveries; prints a line when a caller would have its 202, or the outcome is
/// on the disk.
#[test]
#[ignore = "the main function of a child process"]
fn writer() {
    let Some(path) = env::var_os(STORE) else { return };
    block_on(async {
        let (store, _thread) = open(Path::new(&path));
        let (callers, requests) = (number(CALLERS, 16), number(REQUESTS, 0));
        let next = Arc::new(AtomicU64::new(u64::from(std::process::id()) << 32));
        let callers: Vec<_> = (0..callers)
            .map(|_| tokio::spawn(write_requests(store.clone(), next.clone(), requests)))
            .collect();
        for caller in callers {
            caller.await.expect("a caller ends");
        }
    });
}

async fn write_requests(store: Store, next: Arc<AtomicU64>, requests: u64) {
    let mut sent = 0;
    while requests == 0 || sent < requests {
        sent += 1;
        let seed = next.fetch_add(1, Ordering::Relaxed);
        let accepted = match store.accept(new_delivery(body(seed))).await {
            Ok(accepted) => accepted,
            Err(error) => {
                print_line(&format!("FAILED {seed:016x} {error}"));
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
                continue;
            }
        };
        print_line(&format!("ACCEPTED {} {seed:016x}", accepted.id));
        if seed.is_multiple_of(3) && store.settle(accepted.id, Verdict::Done, None).await.is_ok() {
            print_line(&format!("DONE {}", accepted.id));
        }
    }
}

/// One write, so that a killed process leaves no half of it in the middle.
fn print_line(line: &str) {
    let _ = std::io::stdout().lock().write_all(format!("\n{line}\n").as_bytes());
}

/// What a writer has promised.
#[derive(Clone, Default)]
struct Promises {
    accepted: BTreeMap<DeliveryId, u64>,
    done: BTreeSet<DeliveryId>,
    failed: Vec<u64>,
}

impl Promises {
    fn read(&mut self, line: &str) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let seed = |text: &str| u64::from_str_radix(text, 16).expect("a seed");
        match words.as_slice() {
            ["ACCEPTED", id, of] if of.len() == 16 => {
                self.accepted.insert(id.parse().expect("an ID"), seed(of));
            }
            ["DONE", id] if id.len() == 26 => {
                self.done.insert(id.parse().expect("an ID"));
            }
            ["FAILED", of, ..] => self.failed.push(seed(of)),
            _ => {}
        }
    }

    /// The first promise that the store does not keep.
    async fn broken(&self, store: &Store) -> Option<String> {
        for (id, seed) in &self.accepted {
            let found = match store.find(*id).await {
                Ok(found) => found,
                Err(error) => return Some(format!("{id}, accepted: {error}")),
            };
            if self.done.contains(id) && found.state != DeliveryState::Done {
                return Some(format!("{id}, done: it is {}", found.state.word()));
            }
            match store.content(*id).await {
                Ok((_, stored)) if stored == body(*seed) => {}
                other => return Some(format!("{id}: its body is another: {:?}", other.map(|_| ()))),
            }
        }
        None
    }
}

/// Every delivery of the store is whole, whether or not it was promised.
async fn check_contents(store: &Store) -> Result<usize, StoreError> {
    let all = store.list(Default::default(), 0, usize::MAX >> 1).await?;
    for delivery in &all {
        let (_, stored) = store.content(delivery.id).await?;
        assert!(is_intact(&stored), "{}", delivery.id);
    }
    Ok(all.len())
}
