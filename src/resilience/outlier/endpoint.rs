//! The state of one endpoint that the data path reads: atomics, no lock.

use std::{
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    time::{Duration, Instant},
};

/// How long the balancer avoids an endpoint after a connection to it broke or after its second consecutive failure;
/// after two or more failures in a row it doubles with each further one.
const FIRST_AVOIDANCE: Duration = Duration::from_millis(200);
/// For how long retries go elsewhere after a connection to an endpoint broke.
const SUSPICION: Duration = Duration::from_secs(2);
const LONGEST_AVOIDANCE: Duration = Duration::from_secs(5);
/// After this time without a result, another request may probe an absent endpoint.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long an endpoint must accept connections before a request that cannot be retried may probe it.
const PROBE_BY_ANY_REQUEST: Duration = Duration::from_secs(1);

/// `probe_at` of an endpoint that is not absent.
const PRESENT: u64 = 0;
/// `probe_at` of an endpoint that is absent until it accepts a connection.
const UNREACHABLE: u64 = u64::MAX;

/// The state of one endpoint, shared by all workers. Times are milliseconds since the detector's epoch, rounded up;
/// 0 = unset.
#[derive(Debug)]
pub struct EndpointHealth {
    consecutive_failures: AtomicU32,
    ejected_until: AtomicU64,
    /// [`PRESENT`], [`UNREACHABLE`], or the time from which one request may probe an absent endpoint.
    probe_at: AtomicU64,
    /// Until then the balancer prefers others; afterwards it sends one request at a time, until one succeeds.
    avoided_until: AtomicU64,
    /// A connection broke: until then the balancer prefers others. It passes by itself.
    suspected_until: AtomicU64,
    /// It failed often enough to be ejected, but `max_ejected` is reached.
    failing: AtomicBool,
    epoch: Instant,
}

impl EndpointHealth {
    pub(super) fn new(epoch: Instant) -> Self {
        Self {
            consecutive_failures: AtomicU32::new(0),
            ejected_until: AtomicU64::new(0),
            probe_at: AtomicU64::new(PRESENT),
            avoided_until: AtomicU64::new(0),
            suspected_until: AtomicU64::new(0),
            failing: AtomicBool::new(false),
            epoch,
        }
    }

    /// Whether the balancer may choose it: neither ejected nor absent.
    pub fn is_available(&self, now: Instant) -> bool {
        !self.is_absent() && !self.is_ejected(now)
    }

    /// Whether it refused a connection, or its sidecar has no service behind it, and no request has succeeded since
    /// then.
    pub fn is_absent(&self) -> bool {
        self.probe_at.load(Ordering::Relaxed) != PRESENT
    }

    /// Whether it is absent and may be probed: it accepted a connection, or enough time has passed.
    pub fn awaits_probe(&self, now: Instant) -> bool {
        let at = self.probe_at.load(Ordering::Relaxed);
        at != PRESENT && at <= self.millis(now)
    }

    /// Acquires the right to send the one request that probes an absent endpoint. `repeatable`: the request may be sent
    /// again if the probe fails.
    pub fn claim_probe(&self, repeatable: bool, now: Instant) -> bool {
        let at = self.probe_at.load(Ordering::Relaxed);
        let grace = if repeatable { Duration::ZERO } else { PROBE_BY_ANY_REQUEST };
        if at == PRESENT || at.saturating_add(millis(grace)) > self.millis(now) {
            return false;
        }
        let next = self.millis(now + PROBE_TIMEOUT);
        self.probe_at.compare_exchange(at, next, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// One atomic load, plus a comparison if the endpoint was ever ejected.
    pub fn is_ejected(&self, now: Instant) -> bool {
        let until = self.ejected_until.load(Ordering::Relaxed);
        until != 0 && self.millis(now) < until
    }

    /// When an ejected endpoint is restored.
    pub fn ejected_until(&self, now: Instant) -> Option<Instant> {
        self.is_ejected(now)
            .then(|| Duration::from_millis(self.ejected_until.load(Ordering::Relaxed)))
            .and_then(|until| self.epoch.checked_add(until))
    }

    /// Whether the balancer prefers other endpoints, since requests to this one have just failed or a connection has just
    /// broken.
    pub fn is_avoided(&self, now: Instant) -> bool {
        let until =
            self.avoided_until.load(Ordering::Relaxed).max(self.suspected_until.load(Ordering::Relaxed));
        until != 0 && self.millis(now) < until
    }

    /// Whether a retry should go elsewhere: it failed twice in a row and no request has succeeded since, or a connection
    /// broke within the last [`SUSPICION`].
    pub fn is_suspected(&self, now: Instant) -> bool {
        let until = self.suspected_until.load(Ordering::Relaxed);
        self.avoided_until.load(Ordering::Relaxed) != 0
            || (until != 0 && self.millis(now) < until.saturating_add(millis(SUSPICION - FIRST_AVOIDANCE)))
    }

    /// The balancer chose it. If it was avoided, it gets its next request only after a pause or a success.
    pub fn record_chosen(&self, now: Instant) {
        if self.avoided_until.load(Ordering::Relaxed) != 0 {
            self.avoid(self.consecutive_failures(), now);
        }
    }

    /// Whether it is expected to serve requests: it is available, and not kept in only because of `max_ejected`.
    pub fn is_serving(&self, now: Instant) -> bool {
        self.is_available(now) && !self.failing.load(Ordering::Relaxed)
    }

    pub(super) fn consecutive_failures(&self) -> u32 {
        self.consecutive_failures.load(Ordering::Relaxed)
    }

    /// A request succeeded. Writes nothing unless a request has failed before.
    pub(super) fn record_success(&self) {
        if self.consecutive_failures() != 0
            || self.avoided_until.load(Ordering::Relaxed) != 0
            || self.suspected_until.load(Ordering::Relaxed) != 0
        {
            self.consecutive_failures.store(0, Ordering::Relaxed);
            self.avoided_until.store(0, Ordering::Relaxed);
            self.suspected_until.store(0, Ordering::Relaxed);
            self.failing.store(false, Ordering::Relaxed);
        }
    }

    /// A request failed. Returns the number of consecutive failures.
    pub(super) fn record_failure(&self, now: Instant) -> u32 {
        let failures = self.consecutive_failures.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        if failures > 1 {
            self.avoid(failures, now);
        }
        failures
    }

    /// A connection broke before any byte of a response. One is enough to avoid the endpoint: if several endpoints fail
    /// at the same moment, each broken connection keeps other requests away from its endpoint, so few requests hit a
    /// second one. It passes by itself: an endpoint whose requests report no success for long, such as gRPC streams that
    /// their clients cancel, must get its share again.
    pub(super) fn mark_suspected(&self, now: Instant) {
        self.suspected_until.store(self.millis(now + FIRST_AVOIDANCE).max(1), Ordering::Relaxed);
    }

    pub(super) fn set_failing(&self) {
        self.failing.store(true, Ordering::Relaxed);
    }

    pub(super) fn eject(&self, until: Instant) {
        self.consecutive_failures.store(0, Ordering::Relaxed);
        self.failing.store(false, Ordering::Relaxed);
        let until = self.millis(until).saturating_add(1);
        self.ejected_until.store(until, Ordering::Relaxed);
        // Once restored, it gets one request at a time until one succeeds.
        self.avoided_until.store(until, Ordering::Relaxed);
    }

    /// It is absent until it accepts a connection.
    pub(super) fn set_unreachable(&self) {
        self.probe_at.store(UNREACHABLE, Ordering::Relaxed);
    }

    /// It is absent, and a request may probe it from `at` on.
    pub(super) fn schedule_probe(&self, at: Instant) {
        self.probe_at.store(self.millis(at).max(1), Ordering::Relaxed);
    }

    pub(super) fn set_present(&self) {
        self.probe_at.store(PRESENT, Ordering::Relaxed);
    }

    fn avoid(&self, failures: u32, now: Instant) {
        let doublings = failures.saturating_sub(2).min(8);
        let pause = FIRST_AVOIDANCE.saturating_mul(1 << doublings).min(LONGEST_AVOIDANCE);
        self.avoided_until.store(self.millis(now + pause).max(1), Ordering::Relaxed);
    }

    fn millis(&self, at: Instant) -> u64 {
        millis(at.saturating_duration_since(self.epoch))
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX - 1)
}
