//! The circuit breaker of an upstream: closed, open, half open.
//!
//! Closed, a try costs one load, and its success one or two atomic additions; everything else steps the [`Machine`]
//! under a short lock. Only what the upstream caused is told to it ([`Health`]).

mod machine;
#[cfg(test)]
mod tests;

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::machine::{Admitted, Counts, Machine};
pub use super::growing::Growing;
use super::{
    classify::Health,
    window::{SLICES, SlidingCount},
};
use crate::units::{HumanDuration, Ratio};

/// `[defaults.breaker]`, per upstream; counts tries.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BreakerSettings {
    /// Failures in a row that open it. 0 = off.
    pub consecutive_failures: u32,
    /// Share of failures in the last `window`, from `min_requests` up, that opens it. 0 = off.
    pub failure_rate: Ratio,
    /// The time over which the failure rate is measured.
    pub window: HumanDuration,
    /// Below so many attempts in the window the failure rate is not looked at.
    pub min_requests: u32,
    /// How long it stays open; doubles, with jitter, each time the trial fails.
    #[serde(deserialize_with = "open_for")]
    pub open_for: Growing,
    /// Tries let through when half open; all must succeed.
    pub trial_requests: u32,
}

fn open_for<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Growing, D::Error> {
    Growing::read(BreakerSettings::default().open_for, deserializer)
}

impl Default for BreakerSettings {
    fn default() -> Self {
        Self {
            consecutive_failures: 10,
            failure_rate: Ratio::constant(0.5),
            window: HumanDuration::from_secs(10),
            min_requests: 20,
            open_for: Growing { base: HumanDuration::from_secs(5), max: HumanDuration::from_secs(60) },
            trial_requests: 3,
        }
    }
}

/// What the breaker lets through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    Closed,
    HalfOpen,
    Open,
}

/// Who decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Auto,
    /// Forced: nothing goes through.
    Open,
    /// Forced: everything goes through.
    Closed,
}

/// Why it is in the state that it is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    Start,
    ConsecutiveFailures(u32),
    FailureRate {
        failures: u64,
        requests: u64,
    },
    OpenTimeOver,
    /// A request to an endpoint that was absent has succeeded.
    Reachable,
    TrialFailed,
    TrialsSucceeded,
    Manual,
    ManualExpired,
    /// What was forced was given back before its time.
    ManualEnded,
}

/// A change of state, for the log, metrics and traces. `from` may equal `to` where only the mode changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transition {
    pub from: State,
    pub to: State,
    pub why: Why,
    /// When it changes again by itself.
    pub until: Option<Instant>,
}

/// What `/status` shows.
#[derive(Clone, Copy, Debug)]
pub struct Report {
    pub state: State,
    pub mode: Mode,
    pub since: Instant,
    pub why: Why,
    pub until: Option<Instant>,
}

/// The answer to [`Breaker::admit`].
#[derive(Debug)]
pub struct Admission {
    pub permit: Result<Permit, Refused>,
    pub transition: Option<Transition>,
}

/// Not now; worth another look after this long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    pub retry_after: Duration,
}

/// The right to one try, to be given back with what came of it ([`Breaker::report`]). Dropped instead, it counts
/// for nothing, and a trial's place is free again.
///
/// A trial holds its place until it is reported: report as soon as the service has shown that it serves (response
/// headers; for gRPC the status or the first message), not at the end of a stream that may live for hours.
#[derive(Debug)]
pub struct Permit {
    generation: u64,
    /// `Some` for a trial.
    trial: Option<Arc<Breaker>>,
}

/// The breaker of an upstream, shared by all workers. Outlives a reload.
#[derive(Debug)]
pub struct Breaker {
    machine: Mutex<Machine>,
    /// The machine's generation × 2, plus 1 where a try must ask the machine.
    gate: AtomicU64,
    in_a_row: AtomicU32,
    successes: SlidingCount,
    failures: SlidingCount,
    /// In nanoseconds; 0 = the failure rate is off, nothing to count.
    slice: AtomicU64,
    epoch: Instant,
}

impl Breaker {
    pub fn new(settings: BreakerSettings, now: Instant) -> Arc<Self> {
        Arc::new(Self {
            machine: Mutex::new(Machine::new(settings, now)),
            gate: AtomicU64::new(0),
            in_a_row: AtomicU32::new(0),
            successes: SlidingCount::default(),
            failures: SlidingCount::default(),
            slice: AtomicU64::new(slice_of(&settings)),
            epoch: now,
        })
    }

    /// Asks for the right to one try.
    pub fn admit(self: &Arc<Self>, now: Instant) -> Admission {
        let gate = self.gate.load(Ordering::Acquire);
        if gate & 1 == 0 {
            return Admission { permit: Ok(Permit { generation: gate >> 1, trial: None }), transition: None };
        }
        let mut machine = self.lock();
        let transition = machine.settle(now);
        let admitted = machine.admit(now);
        self.publish(&machine, transition);
        let generation = machine.generation;
        let permit = match admitted {
            Admitted::Normally => Ok(Permit { generation, trial: None }),
            Admitted::AsTrial => Ok(Permit { generation, trial: Some(Arc::clone(self)) }),
            Admitted::Refused(retry_after) => Err(Refused { retry_after }),
        };
        Admission { permit, transition }
    }

    /// Tells what came of a try. What began before the last transition says nothing about the state after it.
    /// `random` from 0 to 1.
    pub fn report(
        &self,
        mut permit: Permit,
        health: Health,
        now: Instant,
        random: f64,
    ) -> Option<Transition> {
        if health == Health::Neutral {
            return None; // Dropping the permit frees its place.
        }
        if permit.trial.take().is_some() {
            let mut machine = self.lock();
            if machine.generation != permit.generation {
                return None;
            }
            let transition = machine.trial_ended(health == Health::Success, now, random);
            self.publish(&machine, transition);
            return transition;
        }
        if self.gate.load(Ordering::Acquire) >> 1 != permit.generation {
            return None;
        }
        match health {
            Health::Success => self.count_success(now),
            _ => return self.count_failure(permit.generation, now, random),
        }
        None
    }

    /// Forces a state, or gives the decision back (`Mode::Auto`). `until`: when it falls back by itself.
    pub fn force(&self, mode: Mode, until: Option<Instant>, now: Instant) -> Option<Transition> {
        let mut machine = self.lock();
        let transition = machine.force(mode, until, now, Why::Manual);
        self.publish(&machine, transition);
        transition
    }

    /// Lets one trial go before the time of an open breaker is over, since an endpoint that was absent may be back.
    /// If it fails, nothing has changed. Returns whether there was none yet.
    pub fn offer_trial(&self) -> bool {
        self.lock().offer_trial()
    }

    /// Lets time pass where no try does: so that a forced state falls back, and is seen to, in a quiet hour.
    pub fn tick(&self, now: Instant) -> Option<Transition> {
        let mut machine = self.lock();
        let transition = machine.settle(now);
        self.publish(&machine, transition);
        transition
    }

    /// Takes new settings over from a reload. The state stays.
    pub fn configure(&self, settings: BreakerSettings) {
        let mut machine = self.lock();
        machine.settings = settings;
        if self.slice.swap(slice_of(&settings), Ordering::Relaxed) != slice_of(&settings) {
            self.successes.clear();
            self.failures.clear();
        }
    }

    pub fn report_state(&self) -> Report {
        let machine = self.lock();
        Report {
            state: machine.state(),
            mode: machine.mode(),
            since: machine.since,
            why: machine.why,
            until: machine.until(),
        }
    }

    /// Failures and tries of the window that ends now; both 0 where the failure rate is off.
    pub fn in_window(&self, now: Instant) -> (u32, u32) {
        let Some(slice) = self.slice_at(now) else { return (0, 0) };
        let (failures, successes) = (self.failures.sum(slice), self.successes.sum(slice));
        (failures as u32, (failures + successes) as u32)
    }

    /// Whether tries need no trial: hedges are sent only then. One load.
    pub fn is_closed(&self) -> bool {
        self.gate.load(Ordering::Relaxed) & 1 == 0
    }

    fn count_success(&self, now: Instant) {
        if self.in_a_row.load(Ordering::Relaxed) != 0 {
            self.in_a_row.store(0, Ordering::Relaxed);
        }
        if let Some(slice) = self.slice_at(now) {
            self.successes.add(slice);
        }
    }

    fn count_failure(&self, generation: u64, now: Instant, random: f64) -> Option<Transition> {
        let mut machine = self.lock();
        // A forced `closed` is left here, since the way of a try past the gate does not look at the clock.
        let settled = machine.settle(now);
        if settled.is_some() || machine.generation != generation {
            self.publish(&machine, settled);
            return settled;
        }
        let in_a_row = self.in_a_row.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        let (mut failures, mut successes) = (0, 0);
        if let Some(slice) = self.slice_at(now) {
            self.failures.add(slice);
            (failures, successes) = (self.failures.sum(slice), self.successes.sum(slice));
        }
        let transition = machine.failed(Counts { in_a_row, failures, successes }, now, random);
        self.publish(&machine, transition);
        transition
    }

    /// `None` where the failure rate is off.
    fn slice_at(&self, now: Instant) -> Option<u32> {
        let passed = u64::try_from(now.saturating_duration_since(self.epoch).as_nanos()).unwrap_or(u64::MAX);
        // Only equality and nearness of slices matter, so wrapping round is fine.
        passed.checked_div(self.slice.load(Ordering::Relaxed)).map(|slice| slice as u32)
    }

    /// After every step of the machine, while it is still locked.
    fn publish(&self, machine: &Machine, transition: Option<Transition>) {
        if transition.is_some() {
            self.in_a_row.store(0, Ordering::Relaxed);
            self.successes.clear();
            self.failures.clear();
            let ask = u64::from(machine.state() != State::Closed);
            self.gate.store(machine.generation << 1 | ask, Ordering::Release);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn slice_of(settings: &BreakerSettings) -> u64 {
    if *settings.failure_rate <= 0.0 {
        return 0;
    }
    let slice = u64::try_from(settings.window.0.as_nanos() / SLICES as u128).unwrap_or(u64::MAX);
    slice.max(1_000_000)
}

impl Permit {
    pub fn is_trial(&self) -> bool {
        self.trial.is_some()
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(breaker) = self.trial.take() {
            let mut machine = breaker.lock();
            if machine.generation == self.generation {
                machine.trial_lost();
            }
        }
    }
}

impl State {
    pub const fn word(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::HalfOpen => "half_open",
            Self::Open => "open",
        }
    }

    /// The value of `outrigger_breaker_state`.
    pub const fn gauge(self) -> i64 {
        match self {
            Self::Closed => 0,
            Self::HalfOpen => 1,
            Self::Open => 2,
        }
    }
}

impl std::fmt::Display for Why {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Start => f.write_str("start"),
            Self::ConsecutiveFailures(count) => write!(f, "{count} failures in a row"),
            Self::FailureRate { failures, requests } => write!(f, "{failures} of {requests} tries failed"),
            Self::OpenTimeOver => f.write_str("time to try again"),
            Self::Reachable => f.write_str("an endpoint that was absent serves again"),
            Self::TrialFailed => f.write_str("a trial failed"),
            Self::TrialsSucceeded => f.write_str("all trials succeeded"),
            Self::Manual => f.write_str("set by hand"),
            Self::ManualEnded => f.write_str("set back to auto"),
            Self::ManualExpired => f.write_str("what was set by hand has expired"),
        }
    }
}
