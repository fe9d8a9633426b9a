//! The circuit breaker of an upstream: closed, open, half open.
//!
//! While it is closed, an attempt costs one atomic load and its success one or two atomic additions. Everything else
//! steps the [`Machine`] under a short lock. Only failures that the upstream caused are counted ([`Health`]).

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

use self::machine::{Machine, MachineAdmission, WindowCounts};
pub use super::growing_duration::GrowingDuration;
use super::{
    classify::Health,
    window::{SLICES, SlidingCount},
};
use crate::units::{HumanDuration, Ratio};

/// `[defaults.breaker]`, per upstream; counts attempts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BreakerSettings {
    /// Consecutive failures that open it. 0 = off.
    pub consecutive_failures: u32,
    /// Share of failed attempts in the last `window` that opens it, once there are `min_requests`. 0 = off.
    pub failure_rate: Ratio,
    /// The period over which the failure rate is measured.
    pub window: HumanDuration,
    /// With fewer attempts in the window the failure rate is ignored.
    pub min_requests: u32,
    /// How long it stays open; doubles, with jitter, each time a trial fails.
    #[serde(deserialize_with = "open_for")]
    pub open_for: GrowingDuration,
    /// Attempts admitted while half open; all must succeed.
    pub trial_requests: u32,
}

fn open_for<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<GrowingDuration, D::Error> {
    GrowingDuration::read(BreakerSettings::default().open_for, deserializer)
}

impl Default for BreakerSettings {
    fn default() -> Self {
        Self {
            consecutive_failures: 10,
            failure_rate: Ratio::constant(0.5),
            window: HumanDuration::from_secs(10),
            min_requests: 20,
            open_for: GrowingDuration {
                base: HumanDuration::from_secs(5),
                max: HumanDuration::from_secs(60),
            },
            trial_requests: 3,
        }
    }
}

/// The state of a breaker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BreakerState {
    Closed,
    HalfOpen,
    Open,
}

/// Whether the breaker works automatically or is forced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakerMode {
    Auto,
    /// Forced: admits nothing.
    Open,
    /// Forced: admits everything.
    Closed,
}

/// Why the breaker entered its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransitionReason {
    Start,
    ConsecutiveFailures(u32),
    FailureRate {
        failures: u64,
        requests: u64,
    },
    OpenTimeElapsed,
    /// A request to a previously absent endpoint has succeeded.
    Reachable,
    TrialFailed,
    TrialsSucceeded,
    Manual,
    ManualExpired,
    /// A forced state was set back to auto before it expired.
    ManualReset,
}

/// A change of state, for log, metrics and traces. `from` equals `to` if only the mode changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BreakerTransition {
    pub from: BreakerState,
    pub to: BreakerState,
    pub reason: TransitionReason,
    /// When it changes again by itself.
    pub until: Option<Instant>,
}

/// The state shown in `/status`.
#[derive(Clone, Copy, Debug)]
pub struct BreakerReport {
    pub state: BreakerState,
    pub mode: BreakerMode,
    pub since: Instant,
    pub reason: TransitionReason,
    pub until: Option<Instant>,
}

/// The result of [`Breaker::admit`].
#[derive(Debug)]
pub struct BreakerAdmission {
    pub permit: Result<BreakerPermit, BreakerRefusal>,
    pub transition: Option<BreakerTransition>,
}

/// The breaker does not admit the attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BreakerRefusal {
    pub retry_after: Duration,
}

/// The permit for one attempt, returned with the outcome to [`Breaker::report`]. Dropped instead, it is not counted,
/// and a trial's slot is free again.
///
/// A trial holds its slot until it is reported. Report as soon as the service has shown that it works (response
/// headers; for gRPC the status or the first message), not at the end of a stream that may last for hours.
#[derive(Debug)]
pub struct BreakerPermit {
    generation: u64,
    /// `Some` for a trial.
    trial: Option<Arc<Breaker>>,
}

/// The breaker of an upstream, shared by all workers. Its state survives a reload.
#[derive(Debug)]
pub struct Breaker {
    machine: Mutex<Machine>,
    /// The machine's generation × 2, plus 1 if attempts need the machine's admission.
    gate: AtomicU64,
    consecutive_failures: AtomicU32,
    successes: SlidingCount,
    failures: SlidingCount,
    /// Length of a window slice in nanoseconds; 0 = the failure rate is off.
    slice: AtomicU64,
    epoch: Instant,
}

impl Breaker {
    pub fn new(settings: BreakerSettings, now: Instant) -> Arc<Self> {
        Arc::new(Self {
            machine: Mutex::new(Machine::new(settings, now)),
            gate: AtomicU64::new(0),
            consecutive_failures: AtomicU32::new(0),
            successes: SlidingCount::default(),
            failures: SlidingCount::default(),
            slice: AtomicU64::new(slice_of(&settings)),
            epoch: now,
        })
    }

    /// Requests a permit for one attempt.
    pub fn admit(self: &Arc<Self>, now: Instant) -> BreakerAdmission {
        let gate = self.gate.load(Ordering::Acquire);
        if gate & 1 == 0 {
            return BreakerAdmission {
                permit: Ok(BreakerPermit { generation: gate >> 1, trial: None }),
                transition: None,
            };
        }
        let mut machine = self.lock();
        let transition = machine.apply_time(now);
        let admitted = machine.admit(now);
        self.publish(&machine, transition);
        let generation = machine.generation;
        let permit = match admitted {
            MachineAdmission::Normal => Ok(BreakerPermit { generation, trial: None }),
            MachineAdmission::Trial => Ok(BreakerPermit { generation, trial: Some(Arc::clone(self)) }),
            MachineAdmission::Refused(retry_after) => Err(BreakerRefusal { retry_after }),
        };
        BreakerAdmission { permit, transition }
    }

    /// Reports the outcome of an attempt. Attempts admitted before the last transition are ignored. `random` from 0 to
    /// 1.
    pub fn report(
        &self,
        mut permit: BreakerPermit,
        health: Health,
        now: Instant,
        random: f64,
    ) -> Option<BreakerTransition> {
        if health == Health::Neutral {
            return None; // Dropping the permit frees its slot.
        }
        if permit.trial.take().is_some() {
            let mut machine = self.lock();
            if machine.generation != permit.generation {
                return None;
            }
            let transition = machine.record_trial(health == Health::Success, now, random);
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

    /// Forces a state, or returns to automatic (`BreakerMode::Auto`). `until`: when it returns to auto by itself.
    pub fn force(
        &self,
        mode: BreakerMode,
        until: Option<Instant>,
        now: Instant,
    ) -> Option<BreakerTransition> {
        let mut machine = self.lock();
        let transition = machine.force(mode, until, now, TransitionReason::Manual);
        self.publish(&machine, transition);
        transition
    }

    /// Allows one trial before an open breaker's time has elapsed, since an absent endpoint may be back. If the trial
    /// fails, nothing changes. Returns whether the trial is newly allowed.
    pub fn allow_early_trial(&self) -> bool {
        self.lock().allow_early_trial()
    }

    /// Applies transitions that are due by time, so that a forced state expires, and is reported, without traffic.
    pub fn tick(&self, now: Instant) -> Option<BreakerTransition> {
        let mut machine = self.lock();
        let transition = machine.apply_time(now);
        self.publish(&machine, transition);
        transition
    }

    /// Applies the settings of a reload; keeps the state.
    pub fn configure(&self, settings: BreakerSettings) {
        let mut machine = self.lock();
        machine.settings = settings;
        if self.slice.swap(slice_of(&settings), Ordering::Relaxed) != slice_of(&settings) {
            self.successes.clear();
            self.failures.clear();
        }
    }

    pub fn state_report(&self) -> BreakerReport {
        let machine = self.lock();
        BreakerReport {
            state: machine.state(),
            mode: machine.mode(),
            since: machine.since,
            reason: machine.reason,
            until: machine.until(),
        }
    }

    /// Failures and attempts of the window that ends now; both 0 if the failure rate is off.
    pub fn window_counts(&self, now: Instant) -> (u32, u32) {
        let Some(slice) = self.slice_at(now) else { return (0, 0) };
        let (failures, successes) = (self.failures.sum(slice), self.successes.sum(slice));
        (failures as u32, (failures + successes) as u32)
    }

    /// Whether attempts are admitted without trial: hedges are sent only then. One atomic load.
    pub fn is_closed(&self) -> bool {
        self.gate.load(Ordering::Relaxed) & 1 == 0
    }

    fn count_success(&self, now: Instant) {
        if self.consecutive_failures.load(Ordering::Relaxed) != 0 {
            self.consecutive_failures.store(0, Ordering::Relaxed);
        }
        if let Some(slice) = self.slice_at(now) {
            self.successes.add(slice);
        }
    }

    fn count_failure(&self, generation: u64, now: Instant, random: f64) -> Option<BreakerTransition> {
        let mut machine = self.lock();
        // A forced `closed` expires here, since admission through the gate does not check the clock.
        let settled = machine.apply_time(now);
        if settled.is_some() || machine.generation != generation {
            self.publish(&machine, settled);
            return settled;
        }
        let consecutive = self.consecutive_failures.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        let (mut failures, mut successes) = (0, 0);
        if let Some(slice) = self.slice_at(now) {
            self.failures.add(slice);
            (failures, successes) = (self.failures.sum(slice), self.successes.sum(slice));
        }
        let transition =
            machine.record_failure(WindowCounts { consecutive, failures, successes }, now, random);
        self.publish(&machine, transition);
        transition
    }

    /// `None` if the failure rate is off.
    fn slice_at(&self, now: Instant) -> Option<u32> {
        let passed = u64::try_from(now.saturating_duration_since(self.epoch).as_nanos()).unwrap_or(u64::MAX);
        // Only equality and distance of slices matter, so the number may wrap.
        passed.checked_div(self.slice.load(Ordering::Relaxed)).map(|slice| slice as u32)
    }

    /// Call it after every step of the machine, while the machine is locked.
    fn publish(&self, machine: &Machine, transition: Option<BreakerTransition>) {
        if transition.is_some() {
            self.consecutive_failures.store(0, Ordering::Relaxed);
            self.successes.clear();
            self.failures.clear();
            let ask = u64::from(machine.state() != BreakerState::Closed);
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

impl BreakerPermit {
    pub fn is_trial(&self) -> bool {
        self.trial.is_some()
    }
}

impl Drop for BreakerPermit {
    fn drop(&mut self) {
        if let Some(breaker) = self.trial.take() {
            let mut machine = breaker.lock();
            if machine.generation == self.generation {
                machine.release_trial();
            }
        }
    }
}

impl BreakerState {
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

impl std::fmt::Display for TransitionReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Start => f.write_str("start"),
            Self::ConsecutiveFailures(count) => write!(f, "{count} failures in a row"),
            Self::FailureRate { failures, requests } => write!(f, "{failures} of {requests} attempts failed"),
            Self::OpenTimeElapsed => f.write_str("time to try again"),
            Self::Reachable => f.write_str("an endpoint that was absent serves again"),
            Self::TrialFailed => f.write_str("a trial failed"),
            Self::TrialsSucceeded => f.write_str("all trials succeeded"),
            Self::Manual => f.write_str("set by hand"),
            Self::ManualReset => f.write_str("set back to auto"),
            Self::ManualExpired => f.write_str("what was set by hand has expired"),
        }
    }
}
