//! When an absent endpoint is probed again.
//!
//! | why it is absent | probed by | interval |
//! | --- | --- | --- |
//! | it refused a connection, or did not accept one in time | a connection, then one request | a hundredth of the time that it has been absent, at least 10 ms; at most 100 ms while no other endpoint serves, else 5 s |
//! | its sidecar advised `elsewhere` | one request | a sixteenth of that time, from 50 ms to 1 s |
//! | it was probed, and the request failed otherwise | one request | 50 ms, doubled each time, at most 1 min |
//!
//! The interval is proportional to the absence, so that probing does not much prolong a short one.

use std::time::{Duration, Instant};

use super::EndpointOutcome;

const CONNECTION_SHARE: u32 = 100;
const MIN_CONNECTION_INTERVAL: Duration = Duration::from_millis(10);
const MAX_CONNECTION_INTERVAL_ALONE: Duration = Duration::from_millis(100);
const MAX_CONNECTION_INTERVAL: Duration = Duration::from_secs(5);
const PROBE_SHARE: u32 = 16;
const MIN_PROBE_INTERVAL: Duration = Duration::from_millis(50);
const MAX_PROBE_INTERVAL: Duration = Duration::from_secs(1);
const MAX_DOUBLINGS: u32 = 10;
const MAX_FAILED_PROBE_INTERVAL: Duration = Duration::from_secs(60);

/// The probe schedule of an absent endpoint.
#[derive(Clone, Copy, Debug)]
pub(super) struct ProbeSchedule {
    pub since: Instant,
    /// The next probe is a connection, not a request.
    pub by_connection: bool,
    /// When to probe next; `None` while the result of a probe is awaited.
    pub next: Option<Instant>,
    /// Request probes that failed.
    failed_probes: u32,
    /// Attempts that began earlier are ignored.
    scheduled_at: Instant,
}

impl ProbeSchedule {
    pub fn new(outcome: EndpointOutcome, alone: bool, now: Instant) -> Self {
        let mut this =
            Self { since: now, by_connection: false, next: None, failed_probes: 0, scheduled_at: now };
        this.schedule(outcome, alone, now);
        this
    }

    /// An attempt that began at `began` found the endpoint still absent. `alone`: no other endpoint serves. Returns
    /// whether the schedule changed: of many attempts that fail at once, only the first one moves the next probe.
    pub fn still_absent(
        &mut self,
        outcome: EndpointOutcome,
        alone: bool,
        began: Instant,
        now: Instant,
    ) -> bool {
        let by_connection = outcome.is_unreachable();
        let is_already_scheduled =
            self.next.is_some_and(|next| now < next) && by_connection == self.by_connection;
        if began < self.scheduled_at || is_already_scheduled {
            return false;
        }
        self.schedule(outcome, alone, now);
        true
    }

    /// It accepted a connection: a request probes it next.
    pub fn connection_accepted(&mut self, now: Instant) {
        (self.next, self.scheduled_at) = (None, now);
    }

    fn schedule(&mut self, outcome: EndpointOutcome, alone: bool, now: Instant) {
        self.by_connection = outcome.is_unreachable();
        self.scheduled_at = now;
        let absent_for = now.saturating_duration_since(self.since);
        let pause = if self.by_connection {
            let longest = if alone { MAX_CONNECTION_INTERVAL_ALONE } else { MAX_CONNECTION_INTERVAL };
            (absent_for / CONNECTION_SHARE).clamp(MIN_CONNECTION_INTERVAL, longest)
        } else if outcome == EndpointOutcome::NoService {
            (absent_for / PROBE_SHARE).clamp(MIN_PROBE_INTERVAL, MAX_PROBE_INTERVAL)
        } else {
            let doubled = MIN_PROBE_INTERVAL.saturating_mul(1 << self.failed_probes.min(MAX_DOUBLINGS));
            self.failed_probes = self.failed_probes.saturating_add(1);
            doubled.min(MAX_FAILED_PROBE_INTERVAL)
        };
        self.next = Some(now + pause);
    }
}
