//! When an absent endpoint is asked again.
//!
//! | why it is absent | asked by | how often |
//! | --- | --- | --- |
//! | it refused a connection, or did not accept one in time | a connection, then one request | every hundredth of the time that it has been absent, at least 10 ms; at most 100 ms while no other endpoint serves, else 5 s |
//! | its sidecar said `elsewhere` | one request | every sixteenth of that time, from 50 ms to 1 s |
//! | it was probed, and the request failed otherwise | one request | after 50 ms, then after twice as long each time, at most 1 min |
//!
//! In proportion, so that a short absence is not made a long one.

use std::time::{Duration, Instant};

use super::Evidence;

const CONNECTION_SHARE: u32 = 100;
const SHORTEST_LOOK: Duration = Duration::from_millis(10);
const LONGEST_LOOK_ALONE: Duration = Duration::from_millis(100);
const LONGEST_LOOK: Duration = Duration::from_secs(5);
const PROBE_SHARE: u32 = 16;
const SHORTEST_PROBE: Duration = Duration::from_millis(50);
const LONGEST_PROBE: Duration = Duration::from_secs(1);
const MOST_DOUBLINGS: u32 = 10;
const LONGEST_FAILING_PROBE: Duration = Duration::from_secs(60);

/// An endpoint that is absent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Absence {
    pub since: Instant,
    /// Ask for a connection, and not at once for a request.
    pub by_connection: bool,
    /// When to ask next; `None` while it waits for the request that proves it.
    pub next: Option<Instant>,
    /// Probes that reached it and failed.
    failed_probes: u32,
    /// What began earlier says nothing about it as it is now.
    asked_at: Instant,
}

impl Absence {
    pub fn new(evidence: Evidence, alone: bool, now: Instant) -> Self {
        let mut absence =
            Self { since: now, by_connection: false, next: None, failed_probes: 0, asked_at: now };
        absence.schedule(evidence, alone, now);
        absence
    }

    /// An attempt that began at `began` found it absent still. `alone`: no other endpoint serves. Returns whether that
    /// was news: many attempts may fail at once, and none but the first of them moves the next question.
    pub fn again(&mut self, evidence: Evidence, alone: bool, began: Instant, now: Instant) -> bool {
        let by_connection = evidence.is_unreachable();
        let asked_already = self.next.is_some_and(|next| now < next) && by_connection == self.by_connection;
        if began < self.asked_at || asked_already {
            return false;
        }
        self.schedule(evidence, alone, now);
        true
    }

    /// It accepted a connection: a request is to prove it.
    pub fn accepted(&mut self, now: Instant) {
        (self.next, self.asked_at) = (None, now);
    }

    fn schedule(&mut self, evidence: Evidence, alone: bool, now: Instant) {
        self.by_connection = evidence.is_unreachable();
        self.asked_at = now;
        let absent_for = now.saturating_duration_since(self.since);
        let pause = if self.by_connection {
            let longest = if alone { LONGEST_LOOK_ALONE } else { LONGEST_LOOK };
            (absent_for / CONNECTION_SHARE).clamp(SHORTEST_LOOK, longest)
        } else if evidence == Evidence::NoService {
            (absent_for / PROBE_SHARE).clamp(SHORTEST_PROBE, LONGEST_PROBE)
        } else {
            let doubled = SHORTEST_PROBE.saturating_mul(1 << self.failed_probes.min(MOST_DOUBLINGS));
            self.failed_probes = self.failed_probes.saturating_add(1);
            doubled.min(LONGEST_FAILING_PROBE)
        };
        self.next = Some(now + pause);
    }
}
