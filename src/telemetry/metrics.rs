//! Counters that the data path holds by handle and `/metrics` reads.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicI64, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{runtime::RuntimeMetrics, sync::Notify};

use crate::net::alpn::Tls;

/// Everything that is counted.
#[derive(Debug, Default)]
pub struct Metrics {
    pub inbound: Arc<Connections>,
    pub outbound: Arc<Connections>,
    pub ways: Ways,
    /// In the order of their threads.
    pub workers: Vec<WorkerLoad>,
    /// What redirected connections were found to speak.
    pub detections: Detections,
}

impl Metrics {
    pub fn new(workers: u16) -> Self {
        let workers = (0..workers).map(|_| WorkerLoad::default()).collect();
        Self { workers, ..Self::default() }
    }
}

/// How much a worker has to do.
#[derive(Debug)]
pub struct WorkerLoad {
    /// Callers' connections that it serves.
    pub connections: AtomicUsize,
    /// Busy nanoseconds of the last samples, averaged. Sampled only where there are several workers.
    pub recent: AtomicU64,
    /// Set when its thread has started.
    pub runtime: OnceLock<RuntimeMetrics>,
    created: Instant,
    /// When its thread last ran, in milliseconds since `created`.
    beat: AtomicU64,
}

impl Default for WorkerLoad {
    fn default() -> Self {
        Self {
            connections: AtomicUsize::default(),
            recent: AtomicU64::default(),
            runtime: OnceLock::default(),
            created: Instant::now(),
            beat: AtomicU64::default(),
        }
    }
}

impl WorkerLoad {
    /// Its thread runs. To be told every second.
    pub fn beat(&self) {
        let now = u64::try_from(self.created.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.beat.store(now, Ordering::Relaxed);
    }

    /// How long ago its thread last ran.
    pub fn still_for(&self) -> Duration {
        let last = Duration::from_millis(self.beat.load(Ordering::Relaxed));
        self.created.elapsed().saturating_sub(last)
    }

    /// How long it has been busy since the start.
    pub fn busy(&self) -> Duration {
        self.runtime.get().map_or(Duration::ZERO, |runtime| runtime.worker_total_busy_duration(0))
    }
}

/// How a call, or a connection of bytes, came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From a caller, for the service.
    Inbound,
    /// From the service, as to a forward proxy: absolute-form, CONNECT and what came through it.
    Proxy,
    /// From the service, with the upstream's name in `Host` or `:authority`.
    Host,
    /// From the service, led here by the kernel.
    Redirect,
    /// From the service, by an upstream's own `listen`.
    Listen,
}

impl Way {
    pub const ALL: [Self; 5] = [Self::Inbound, Self::Proxy, Self::Host, Self::Redirect, Self::Listen];

    pub const fn word(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Proxy => "proxy",
            Self::Host => "host",
            Self::Redirect => "redirect",
            Self::Listen => "listen",
        }
    }
}

/// What a redirected connection was found to speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detected {
    Http1,
    Http2,
    /// TLS that is not the proxy's to end.
    Tls,
    /// The caller spoke first, something else.
    Bytes,
    /// The server did.
    ServerFirst,
    /// Nobody looked: the configuration says that it is bytes.
    Declared,
}

impl Detected {
    pub const ALL: [Self; 6] =
        [Self::Http1, Self::Http2, Self::Tls, Self::Bytes, Self::ServerFirst, Self::Declared];

    pub const fn word(self) -> &'static str {
        match self {
            Self::Http1 => "http1",
            Self::Http2 => "http2",
            Self::Tls => "tls",
            Self::Bytes => "bytes",
            Self::ServerFirst => "server_first",
            Self::Declared => "declared",
        }
    }
}

/// What redirected connections were found to speak, by direction and port. Of the ports that come first; callers choose
/// ports, so there is an end to them.
#[derive(Debug)]
pub struct Detections([Ported; MAX_PORTS]);

const MAX_PORTS: usize = 64;

#[derive(Debug, Default)]
struct Ported {
    /// 0: free; else the port, and the direction above it. The last one stands for all other ports.
    key: AtomicU32,
    counts: [AtomicU64; Detected::ALL.len()],
}

impl Default for Detections {
    fn default() -> Self {
        Self(std::array::from_fn(|_| Ported::default()))
    }
}

const TAKEN: u32 = 1 << 17;
const INBOUND: u32 = 1 << 16;

impl Detections {
    /// Counts one; whether it was the first of its kind on that port.
    pub fn note(&self, inbound: bool, port: u16, what: Detected) -> bool {
        let key = TAKEN | if inbound { INBOUND } else { 0 } | u32::from(port);
        let (others, ports) = match self.0.split_last() {
            Some(split) => split,
            None => return false,
        };
        let take =
            |slot: &&Ported| match slot.key.compare_exchange(0, key, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => true,
                Err(known) => known == key,
            };
        let slot = ports.iter().find(take);
        let before = slot.unwrap_or(others).counts[what as usize].fetch_add(1, Ordering::Relaxed);
        slot.is_some() && before == 0
    }

    /// Direction, port (none: all others), what, and how often.
    pub fn read(&self) -> impl Iterator<Item = (&'static str, Option<u16>, Detected, u64)> {
        self.0
            .iter()
            .flat_map(|slot| {
                let key = slot.key.load(Ordering::Relaxed);
                let direction = match key {
                    0 => "other",
                    key if key & INBOUND != 0 => "inbound",
                    _ => "outbound",
                };
                let port = u16::try_from(key & 0xffff).ok().filter(|_| key != 0);
                let counts = Detected::ALL.into_iter().zip(&slot.counts);
                counts.map(move |(what, count)| (direction, port, what, count.load(Ordering::Relaxed)))
            })
            .filter(|(.., count)| *count > 0)
    }
}

/// What went through by which way, and when last.
#[derive(Debug)]
pub struct Ways {
    epoch: Instant,
    passed: [Passed; Way::ALL.len()],
}

#[derive(Debug, Default)]
struct Passed {
    count: AtomicU64,
    /// Whole seconds since the epoch; means something where something was counted.
    last: AtomicU64,
}

impl Default for Ways {
    fn default() -> Self {
        Self { epoch: Instant::now(), passed: Default::default() }
    }
}

impl Ways {
    /// Counts one that came in at `now`. Two relaxed atomic steps.
    pub fn note(&self, way: Way, now: Instant) {
        let passed = &self.passed[way as usize];
        passed.count.fetch_add(1, Ordering::Relaxed);
        passed.last.store(now.saturating_duration_since(self.epoch).as_secs(), Ordering::Relaxed);
    }

    /// How many came so, and how long ago the last one did.
    pub fn read(&self, way: Way, now: Instant) -> (u64, Option<Duration>) {
        let passed = &self.passed[way as usize];
        let count = passed.count.load(Ordering::Relaxed);
        let last = Duration::from_secs(passed.last.load(Ordering::Relaxed));
        let ago = now.saturating_duration_since(self.epoch).saturating_sub(last);
        (count, (count > 0).then_some(ago))
    }
}

/// The callers' connections of one direction.
#[derive(Debug, Default)]
pub struct Connections {
    pub open: AtomicI64,
    pub total: AtomicU64,
    /// Of those open, how many are protected how; the rest is not.
    protected: [AtomicI64; Tls::ALL.len()],
    /// Accepted, and on their way to who serves them.
    coming: AtomicI64,
    /// Listeners that may still accept some.
    listening: AtomicI64,
    all_closed: Notify,
}

/// Counts what may become open connections, until it is dropped: one that was accepted, or a listener.
#[derive(Debug)]
pub struct Awaited<const LISTENER: bool = false>(Arc<Connections>);

impl<const LISTENER: bool> Awaited<LISTENER> {
    fn new(of: &Arc<Connections>) -> Self {
        let this = Self(Arc::clone(of));
        this.count().fetch_add(1, Ordering::AcqRel);
        this
    }

    fn count(&self) -> &AtomicI64 {
        if LISTENER { &self.0.listening } else { &self.0.coming }
    }
}

impl<const LISTENER: bool> Drop for Awaited<LISTENER> {
    fn drop(&mut self) {
        if self.count().fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.all_closed.notify_waiters();
        }
    }
}

/// Counts one connection as open until it is dropped.
#[derive(Debug)]
pub struct OpenConnection<'a>(&'a Connections);

/// Counts one connection as protected until it is dropped.
#[derive(Debug)]
pub struct Protected<'a>(&'a AtomicI64);

impl Drop for Protected<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Connections {
    pub fn opened(&self) -> OpenConnection<'_> {
        self.open.fetch_add(1, Ordering::Relaxed);
        self.total.fetch_add(1, Ordering::Relaxed);
        OpenConnection(self)
    }

    /// An open connection turned out to be protected.
    pub fn protected(&self, by: Tls) -> Protected<'_> {
        let count = &self.protected[by as usize];
        count.fetch_add(1, Ordering::Relaxed);
        Protected(count)
    }

    /// How many are open now, by what protects them.
    pub fn open_by(&self) -> [(Tls, i64); Tls::ALL.len()] {
        let [_, server, mutual] = self.protected.each_ref().map(|count| count.load(Ordering::Relaxed));
        let none = (self.open.load(Ordering::Relaxed) - server - mutual).max(0);
        [(Tls::None, none), (Tls::Server, server), (Tls::Mutual, mutual)]
    }

    /// A connection was accepted, and is not open yet.
    pub fn coming(self: &Arc<Self>) -> Awaited {
        Awaited::new(self)
    }

    /// A listener accepts.
    pub fn listening(self: &Arc<Self>) -> Awaited<true> {
        Awaited::new(self)
    }

    /// Waits until none is open, or will be unless another is accepted.
    pub async fn quiet(&self) {
        // In this order: a connection that comes is open before it is no longer counted as coming.
        self.until(|| self.coming.load(Ordering::Acquire) <= 0 && self.open.load(Ordering::Acquire) <= 0)
            .await;
    }

    /// Waits until none is open, and nobody listens.
    pub async fn closed(&self) {
        self.until(|| self.listening.load(Ordering::Acquire) <= 0).await;
        self.quiet().await;
    }

    async fn until(&self, reached: impl Fn() -> bool) {
        loop {
            let changed = self.all_closed.notified();
            if reached() {
                return;
            }
            changed.await;
        }
    }
}

impl Drop for OpenConnection<'_> {
    fn drop(&mut self) {
        if self.0.open.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.all_closed.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_counted_up_to_a_number_of_them() {
        let detections = Detections::default();
        assert!(detections.note(false, 6379, Detected::ServerFirst), "the first is told of");
        assert!(!detections.note(false, 6379, Detected::ServerFirst));
        assert!(detections.note(true, 6379, Detected::ServerFirst), "the other direction is another");
        for port in 1..200 {
            detections.note(true, port, Detected::Http1);
        }
        let read: Vec<_> = detections.read().collect();
        assert_eq!(read[0], ("outbound", Some(6379), Detected::ServerFirst, 2));
        assert_eq!(read.len(), MAX_PORTS);
        assert_eq!(read[MAX_PORTS - 1], ("other", None, Detected::Http1, 199 - 61));
    }

    #[test]
    fn each_way_has_its_own_count_and_time() {
        let ways = Ways::default();
        let at = |seconds| ways.epoch + Duration::from_secs(seconds);
        ways.note(Way::Host, at(3));
        ways.note(Way::Host, at(5));
        assert_eq!(ways.read(Way::Host, at(9)), (2, Some(Duration::from_secs(4))));
        assert_eq!(ways.read(Way::Proxy, at(9)), (0, None));
    }
}
