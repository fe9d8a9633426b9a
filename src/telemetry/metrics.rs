//! Counters that the data path increments through handles and `/metrics` reads.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicI64, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{runtime::RuntimeMetrics, sync::Notify};

use crate::net::alpn::ConnectionTls;

/// The counters of the process; those of upstreams are in their policy state.
#[derive(Debug, Default)]
pub struct Metrics {
    pub inbound: Arc<ConnectionCounters>,
    pub outbound: Arc<ConnectionCounters>,
    pub entry_points: EntryPoints,
    /// By worker index.
    pub workers: Vec<WorkerLoad>,
    /// Detected protocols of redirected connections.
    pub detections: Detections,
}

impl Metrics {
    pub fn new(workers: u16) -> Self {
        let workers = (0..workers).map(|_| WorkerLoad::default()).collect();
        Self { workers, ..Self::default() }
    }
}

/// The load of a worker.
#[derive(Debug)]
pub struct WorkerLoad {
    /// Client connections that it serves.
    pub connections: AtomicUsize,
    /// Moving average of busy nanoseconds a sample. Sampled only where there are several workers.
    pub recent_busy: AtomicU64,
    /// Set when its thread has started.
    pub runtime: OnceLock<RuntimeMetrics>,
    created: Instant,
    /// When its thread last ran, in milliseconds since `created`.
    last_beat: AtomicU64,
}

impl Default for WorkerLoad {
    fn default() -> Self {
        Self {
            connections: AtomicUsize::default(),
            recent_busy: AtomicU64::default(),
            runtime: OnceLock::default(),
            created: Instant::now(),
            last_beat: AtomicU64::default(),
        }
    }
}

impl WorkerLoad {
    /// Notes that its thread runs. Called every second.
    pub fn record_heartbeat(&self) {
        let now = u64::try_from(self.created.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_beat.store(now, Ordering::Relaxed);
    }

    /// How long ago its thread last ran.
    pub fn stalled_for(&self) -> Duration {
        let last = Duration::from_millis(self.last_beat.load(Ordering::Relaxed));
        self.created.elapsed().saturating_sub(last)
    }

    /// How long it has been busy since its start.
    pub fn busy(&self) -> Duration {
        self.runtime.get().map_or(Duration::ZERO, |runtime| runtime.worker_total_busy_duration(0))
    }
}

/// How a request, or a byte stream, entered the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryPoint {
    /// From a client, for the service.
    Inbound,
    /// From the service, as to a forward proxy: absolute-form, CONNECT, and requests inside a CONNECT tunnel.
    Proxy,
    /// From the service, with the upstream's name in `Host` or `:authority`.
    Host,
    /// From the service, redirected by kernel rules.
    Redirect,
    /// From the service, on an upstream's own `listen`.
    Listen,
}

impl EntryPoint {
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

/// The detected protocol of a redirected connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DetectionOutcome {
    Http1,
    Http2,
    /// TLS that the proxy does not terminate.
    Tls,
    /// The client sent first, and it is neither HTTP nor TLS.
    Bytes,
    /// The server sent first.
    ServerFirst,
    /// Not detected: the configuration declares the port a byte stream.
    Declared,
}

impl DetectionOutcome {
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

/// Counts of detected protocols by direction and port. Clients choose ports, so only the first [`MAX_PORTS`] get a slot
/// of their own.
#[derive(Debug)]
pub struct Detections([PortSlot; MAX_PORTS]);

const MAX_PORTS: usize = 64;

#[derive(Debug, Default)]
struct PortSlot {
    /// 0: free; else [`IN_USE`], direction and port. The last slot counts all other ports.
    key: AtomicU32,
    counts: [AtomicU64; DetectionOutcome::ALL.len()],
}

impl Default for Detections {
    fn default() -> Self {
        Self(std::array::from_fn(|_| PortSlot::default()))
    }
}

const IN_USE: u32 = 1 << 17;
const INBOUND: u32 = 1 << 16;

impl Detections {
    /// Counts one; returns whether it was the first of its protocol on that port.
    pub fn record(&self, inbound: bool, port: u16, what: DetectionOutcome) -> bool {
        let key = IN_USE | if inbound { INBOUND } else { 0 } | u32::from(port);
        let (others, ports) = match self.0.split_last() {
            Some(split) => split,
            None => return false,
        };
        let claim = |slot: &&PortSlot| match slot.key.compare_exchange(
            0,
            key,
            Ordering::Relaxed,
            Ordering::Relaxed,
        ) {
            Ok(_) => true,
            Err(known) => known == key,
        };
        let slot = ports.iter().find(claim);
        let before = slot.unwrap_or(others).counts[what as usize].fetch_add(1, Ordering::Relaxed);
        slot.is_some() && before == 0
    }

    /// Direction, port (none: all others), protocol and count.
    pub fn read(&self) -> impl Iterator<Item = (&'static str, Option<u16>, DetectionOutcome, u64)> {
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
                let counts = DetectionOutcome::ALL.into_iter().zip(&slot.counts);
                counts.map(move |(what, count)| (direction, port, what, count.load(Ordering::Relaxed)))
            })
            .filter(|(.., count)| *count > 0)
    }
}

/// Requests by entry point, and when the last one arrived.
#[derive(Debug)]
pub struct EntryPoints {
    epoch: Instant,
    points: [EntryPointCount; EntryPoint::ALL.len()],
}

#[derive(Debug, Default)]
struct EntryPointCount {
    count: AtomicU64,
    /// Whole seconds since the epoch; valid only where `count` is above 0.
    last: AtomicU64,
}

impl Default for EntryPoints {
    fn default() -> Self {
        Self { epoch: Instant::now(), points: Default::default() }
    }
}

impl EntryPoints {
    /// Counts one that arrived at `now`. Two relaxed atomic operations.
    pub fn record(&self, way: EntryPoint, now: Instant) {
        let point = &self.points[way as usize];
        point.count.fetch_add(1, Ordering::Relaxed);
        point.last.store(now.saturating_duration_since(self.epoch).as_secs(), Ordering::Relaxed);
    }

    /// How many arrived, and how long ago the last one did.
    pub fn read(&self, way: EntryPoint, now: Instant) -> (u64, Option<Duration>) {
        let point = &self.points[way as usize];
        let count = point.count.load(Ordering::Relaxed);
        let last = Duration::from_secs(point.last.load(Ordering::Relaxed));
        let ago = now.saturating_duration_since(self.epoch).saturating_sub(last);
        (count, (count > 0).then_some(ago))
    }
}

/// The client connections of one direction.
#[derive(Debug, Default)]
pub struct ConnectionCounters {
    pub open: AtomicI64,
    pub total: AtomicU64,
    /// Open connections by TLS; those in neither `Server` nor `Mutual` are plaintext.
    by_tls: [AtomicI64; ConnectionTls::ALL.len()],
    /// Accepted, and not yet taken over by a worker.
    pending: AtomicI64,
    /// Listeners that still accept.
    listeners: AtomicI64,
    drained: Notify,
}

/// Counts, until it is dropped, a source of open connections: an accepted connection, or a listener.
#[derive(Debug)]
pub struct PendingGuard<const LISTENER: bool = false>(Arc<ConnectionCounters>);

impl<const LISTENER: bool> PendingGuard<LISTENER> {
    fn new(of: &Arc<ConnectionCounters>) -> Self {
        let this = Self(Arc::clone(of));
        this.count().fetch_add(1, Ordering::AcqRel);
        this
    }

    fn count(&self) -> &AtomicI64 {
        if LISTENER { &self.0.listeners } else { &self.0.pending }
    }
}

impl<const LISTENER: bool> Drop for PendingGuard<LISTENER> {
    fn drop(&mut self) {
        if self.count().fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.drained.notify_waiters();
        }
    }
}

/// Counts one connection as open until it is dropped.
#[derive(Debug)]
pub struct OpenGuard<'a>(&'a ConnectionCounters);

/// Counts one connection as TLS until it is dropped.
#[derive(Debug)]
pub struct TlsGuard<'a>(&'a AtomicI64);

impl Drop for TlsGuard<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl ConnectionCounters {
    pub fn count_open(&self) -> OpenGuard<'_> {
        self.open.fetch_add(1, Ordering::Relaxed);
        self.total.fetch_add(1, Ordering::Relaxed);
        OpenGuard(self)
    }

    /// Counts an open connection as TLS, after its handshake.
    pub fn count_tls(&self, by: ConnectionTls) -> TlsGuard<'_> {
        let count = &self.by_tls[by as usize];
        count.fetch_add(1, Ordering::Relaxed);
        TlsGuard(count)
    }

    /// The open connections by TLS.
    pub fn open_by(&self) -> [(ConnectionTls, i64); ConnectionTls::ALL.len()] {
        let [_, server, mutual] = self.by_tls.each_ref().map(|count| count.load(Ordering::Relaxed));
        let none = (self.open.load(Ordering::Relaxed) - server - mutual).max(0);
        [(ConnectionTls::None, none), (ConnectionTls::Server, server), (ConnectionTls::Mutual, mutual)]
    }

    /// Counts an accepted connection that no worker serves yet.
    pub fn count_pending(self: &Arc<Self>) -> PendingGuard {
        PendingGuard::new(self)
    }

    /// Counts a listener that accepts.
    pub fn count_listener(self: &Arc<Self>) -> PendingGuard<true> {
        PendingGuard::new(self)
    }

    /// Waits until no connection is open or pending; listeners may still accept more.
    pub async fn wait_idle(&self) {
        // In this order: a pending connection counts as open before it stops counting as pending.
        self.until(|| self.pending.load(Ordering::Acquire) <= 0 && self.open.load(Ordering::Acquire) <= 0)
            .await;
    }

    /// Waits until no connection is open and no listener accepts.
    pub async fn wait_closed(&self) {
        self.until(|| self.listeners.load(Ordering::Acquire) <= 0).await;
        self.wait_idle().await;
    }

    async fn until(&self, reached: impl Fn() -> bool) {
        loop {
            let changed = self.drained.notified();
            if reached() {
                return;
            }
            changed.await;
        }
    }
}

impl Drop for OpenGuard<'_> {
    fn drop(&mut self) {
        if self.0.open.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.drained.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_bounded_number_of_ports_is_counted_apart() {
        let detections = Detections::default();
        assert!(detections.record(false, 6379, DetectionOutcome::ServerFirst), "the first is reported");
        assert!(!detections.record(false, 6379, DetectionOutcome::ServerFirst));
        assert!(detections.record(true, 6379, DetectionOutcome::ServerFirst), "directions are counted apart");
        for port in 1..200 {
            detections.record(true, port, DetectionOutcome::Http1);
        }
        let read: Vec<_> = detections.read().collect();
        assert_eq!(read[0], ("outbound", Some(6379), DetectionOutcome::ServerFirst, 2));
        assert_eq!(read.len(), MAX_PORTS);
        assert_eq!(read[MAX_PORTS - 1], ("other", None, DetectionOutcome::Http1, 199 - 61));
    }

    #[test]
    fn each_entry_point_has_its_own_count_and_time() {
        let ways = EntryPoints::default();
        let at = |seconds| ways.epoch + Duration::from_secs(seconds);
        ways.record(EntryPoint::Host, at(3));
        ways.record(EntryPoint::Host, at(5));
        assert_eq!(ways.read(EntryPoint::Host, at(9)), (2, Some(Duration::from_secs(4))));
        assert_eq!(ways.read(EntryPoint::Proxy, at(9)), (0, None));
    }
}
