//! The breaker's state machine: one event at a time, not shared.

use std::time::{Duration, Instant};

use super::{BreakerMode, BreakerSettings, BreakerState, BreakerTransition, TransitionReason};

/// See [`super::Breaker`] for the guarantees.
#[derive(Debug)]
pub struct Machine {
    pub settings: BreakerSettings,
    phase: Phase,
    mode: BreakerMode,
    /// When [`BreakerMode::Open`] or [`BreakerMode::Closed`] returns to auto.
    mode_until: Option<Instant>,
    /// Incremented by every transition, to distinguish attempts admitted before it from those after it.
    pub generation: u64,
    pub since: Instant,
    pub reason: TransitionReason,
    /// How often it has opened since it was last closed.
    openings: u32,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    Closed,
    Open {
        until: Instant,
        early: EarlyTrial,
    },
    /// Trials in flight, and those that succeeded. `resume`: it began with an early trial; if another trial fails, the
    /// breaker is open until this time, as if there had been no early trial.
    HalfOpen {
        in_flight: u32,
        succeeded: u32,
        resume: Option<Instant>,
    },
}

/// A trial before an open breaker's time has elapsed, allowed because an absent endpoint may be back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum EarlyTrial {
    None,
    Allowed,
    InFlight,
}

/// The result of [`Machine::admit`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineAdmission {
    Normal,
    Trial,
    /// With the time after which another attempt may be admitted.
    Refused(Duration),
}

/// The counts at a failure, this failure included; failures and successes are those of the window.
#[derive(Clone, Copy, Debug)]
pub struct WindowCounts {
    pub consecutive: u32,
    pub failures: u64,
    pub successes: u64,
}

/// The advised wait while trials are in flight, whose duration is unknown.
const WAIT_FOR_TRIALS: Duration = Duration::from_secs(1);

impl Machine {
    pub fn new(settings: BreakerSettings, now: Instant) -> Self {
        Self {
            settings,
            phase: Phase::Closed,
            mode: BreakerMode::Auto,
            mode_until: None,
            generation: 0,
            since: now,
            reason: TransitionReason::Start,
            openings: 0,
        }
    }

    pub fn state(&self) -> BreakerState {
        match (self.mode, self.phase) {
            (BreakerMode::Open, _) => BreakerState::Open,
            (BreakerMode::Closed, _) | (BreakerMode::Auto, Phase::Closed) => BreakerState::Closed,
            (BreakerMode::Auto, Phase::Open { .. }) => BreakerState::Open,
            (BreakerMode::Auto, Phase::HalfOpen { .. }) => BreakerState::HalfOpen,
        }
    }

    pub fn mode(&self) -> BreakerMode {
        self.mode
    }

    /// When the state changes by itself, if it does.
    pub fn until(&self) -> Option<Instant> {
        match (self.mode, self.phase) {
            (BreakerMode::Auto, Phase::Open { until, .. }) => Some(until),
            (BreakerMode::Auto, _) => None,
            _ => self.mode_until,
        }
    }

    /// Applies transitions that are due by time: a forced state returns to auto, an open breaker becomes half open.
    pub fn apply_time(&mut self, now: Instant) -> Option<BreakerTransition> {
        if self.mode != BreakerMode::Auto && self.mode_until.is_some_and(|until| until <= now) {
            return self.force(BreakerMode::Auto, None, now, TransitionReason::ManualExpired);
        }
        match (self.mode, self.phase) {
            (BreakerMode::Auto, Phase::Open { until, .. }) if until <= now => {
                let half_open = Phase::HalfOpen { in_flight: 0, succeeded: 0, resume: None };
                Some(self.enter(half_open, TransitionReason::OpenTimeElapsed, now))
            }
            // A reload requires fewer trials than have succeeded already.
            (BreakerMode::Auto, Phase::HalfOpen { succeeded, .. }) if succeeded >= self.trials() => {
                Some(self.close(now))
            }
            _ => None,
        }
    }

    fn trials(&self) -> u32 {
        self.settings.trial_requests.max(1)
    }

    fn close(&mut self, now: Instant) -> BreakerTransition {
        self.openings = 0;
        self.enter(Phase::Closed, TransitionReason::TrialsSucceeded, now)
    }

    /// Allows one early trial, since an absent endpoint may be back. Returns whether it is newly allowed.
    pub fn allow_early_trial(&mut self) -> bool {
        match (self.mode, &mut self.phase) {
            (BreakerMode::Auto, Phase::Open { early, .. }) if *early == EarlyTrial::None => {
                *early = EarlyTrial::Allowed;
                true
            }
            _ => false,
        }
    }

    /// Whether to admit an attempt now. Call [`Self::apply_time`] first.
    pub fn admit(&mut self, now: Instant) -> MachineAdmission {
        let wait = |until: Instant| until.saturating_duration_since(now);
        match (self.mode, &mut self.phase) {
            (BreakerMode::Closed, _) | (BreakerMode::Auto, Phase::Closed) => MachineAdmission::Normal,
            (BreakerMode::Open, _) => {
                MachineAdmission::Refused(self.mode_until.map_or(WAIT_FOR_TRIALS, wait))
            }
            (BreakerMode::Auto, Phase::Open { early: early @ EarlyTrial::Allowed, .. }) => {
                *early = EarlyTrial::InFlight;
                MachineAdmission::Trial
            }
            (BreakerMode::Auto, Phase::Open { until, .. }) => MachineAdmission::Refused(wait(*until)),
            (BreakerMode::Auto, Phase::HalfOpen { in_flight, succeeded, .. }) => {
                if in_flight.saturating_add(*succeeded) < self.settings.trial_requests.max(1) {
                    *in_flight += 1;
                    MachineAdmission::Trial
                } else {
                    MachineAdmission::Refused(WAIT_FOR_TRIALS)
                }
            }
        }
    }

    /// An attempt that was admitted while closed has failed.
    pub fn record_failure(
        &mut self,
        counts: WindowCounts,
        now: Instant,
        random: f64,
    ) -> Option<BreakerTransition> {
        if self.mode != BreakerMode::Auto || !matches!(self.phase, Phase::Closed) {
            return None;
        }
        let why = self.reason_to_open(counts)?;
        Some(self.open(why, now, random))
    }

    /// A trial has ended. An early trial that fails changes nothing: neither when the breaker becomes half open nor how
    /// long it will be open the next time.
    pub fn record_trial(&mut self, success: bool, now: Instant, random: f64) -> Option<BreakerTransition> {
        if self.mode != BreakerMode::Auto {
            return None;
        }
        let trials = self.trials();
        match &mut self.phase {
            Phase::Closed => None,
            Phase::Open { early, .. } if !success => {
                *early = EarlyTrial::None;
                None
            }
            Phase::Open { .. } if trials <= 1 => Some(self.close(now)),
            Phase::Open { until, .. } => {
                let half_open = Phase::HalfOpen { in_flight: 0, succeeded: 1, resume: Some(*until) };
                Some(self.enter(half_open, TransitionReason::Reachable, now))
            }
            Phase::HalfOpen { resume: Some(until), .. } if !success && *until > now => {
                let open = Phase::Open { until: *until, early: EarlyTrial::None };
                Some(self.enter(open, TransitionReason::TrialFailed, now))
            }
            Phase::HalfOpen { .. } if !success => Some(self.open(TransitionReason::TrialFailed, now, random)),
            Phase::HalfOpen { in_flight, succeeded, .. } => {
                *in_flight = in_flight.saturating_sub(1);
                *succeeded += 1;
                (*succeeded >= trials).then(|| self.close(now))
            }
        }
    }

    /// A trial without a result: dropped, cancelled, or neutral. Another one may use its slot.
    pub fn release_trial(&mut self) {
        match &mut self.phase {
            Phase::Closed => {}
            Phase::Open { early, .. } if *early == EarlyTrial::InFlight => *early = EarlyTrial::Allowed,
            Phase::Open { .. } => {}
            Phase::HalfOpen { in_flight, .. } => *in_flight = in_flight.saturating_sub(1),
        }
    }

    /// Forces a state, or returns to automatic. Discards the counts and the history.
    pub fn force(
        &mut self,
        mode: BreakerMode,
        until: Option<Instant>,
        now: Instant,
        why: TransitionReason,
    ) -> Option<BreakerTransition> {
        if mode == BreakerMode::Auto && self.mode == BreakerMode::Auto {
            return None;
        }
        let why = if mode == BreakerMode::Auto && why == TransitionReason::Manual {
            TransitionReason::ManualReset
        } else {
            why
        };
        let from = self.state();
        self.mode = mode;
        self.mode_until = until.filter(|_| mode != BreakerMode::Auto);
        self.openings = 0;
        let transition = self.enter(Phase::Closed, why, now);
        Some(BreakerTransition { from, ..transition })
    }

    fn reason_to_open(&self, counts: WindowCounts) -> Option<TransitionReason> {
        let BreakerSettings { consecutive_failures, failure_rate, min_requests, .. } = self.settings;
        if consecutive_failures > 0 && counts.consecutive >= consecutive_failures {
            return Some(TransitionReason::ConsecutiveFailures(counts.consecutive));
        }
        let requests = counts.failures + counts.successes;
        let enough = requests >= u64::from(min_requests.max(1));
        if *failure_rate > 0.0 && enough && counts.failures as f64 >= *failure_rate * requests as f64 {
            return Some(TransitionReason::FailureRate { failures: counts.failures, requests });
        }
        None
    }

    fn open(&mut self, why: TransitionReason, now: Instant, random: f64) -> BreakerTransition {
        let open_for = self.settings.open_for.nth(self.openings, random);
        self.openings = self.openings.saturating_add(1);
        // A time that `Instant` cannot represent is replaced by a day.
        let until = now.checked_add(open_for).unwrap_or(now + Duration::from_secs(86_400));
        self.enter(Phase::Open { until, early: EarlyTrial::None }, why, now)
    }

    fn enter(&mut self, phase: Phase, why: TransitionReason, now: Instant) -> BreakerTransition {
        let from = self.state();
        self.phase = phase;
        self.generation += 1;
        self.since = now;
        self.reason = why;
        BreakerTransition { from, to: self.state(), reason: why, until: self.until() }
    }
}
