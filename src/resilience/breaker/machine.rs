//! The breaker's state machine: one event at a time, not shared.

use std::time::{Duration, Instant};

use super::{BreakerSettings, Mode, State, Transition, Why};

/// See [`super::Breaker`] for the guarantees.
#[derive(Debug)]
pub struct Machine {
    pub settings: BreakerSettings,
    phase: Phase,
    mode: Mode,
    /// When [`BreakerMode::Open`] or [`BreakerMode::Closed`] returns to auto.
    mode_until: Option<Instant>,
    /// Incremented by every transition, to distinguish attempts admitted before it from those after it.
    pub generation: u64,
    pub since: Instant,
    pub why: Why,
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
pub enum Admitted {
    Normally,
    AsTrial,
    /// With the time after which another attempt may be admitted.
    Refused(Duration),
}

/// The counts at a failure, this failure included; failures and successes are those of the window.
#[derive(Clone, Copy, Debug)]
pub struct Counts {
    pub in_a_row: u32,
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
            mode: Mode::Auto,
            mode_until: None,
            generation: 0,
            since: now,
            why: Why::Start,
            openings: 0,
        }
    }

    pub fn state(&self) -> State {
        match (self.mode, self.phase) {
            (Mode::Open, _) => State::Open,
            (Mode::Closed, _) | (Mode::Auto, Phase::Closed) => State::Closed,
            (Mode::Auto, Phase::Open { .. }) => State::Open,
            (Mode::Auto, Phase::HalfOpen { .. }) => State::HalfOpen,
        }
    }

    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// When the state changes by itself, if it does.
    pub fn until(&self) -> Option<Instant> {
        match (self.mode, self.phase) {
            (Mode::Auto, Phase::Open { until, .. }) => Some(until),
            (Mode::Auto, _) => None,
            _ => self.mode_until,
        }
    }

    /// Applies transitions that are due by time: a forced state returns to auto, an open breaker becomes half open.
    pub fn settle(&mut self, now: Instant) -> Option<Transition> {
        if self.mode != Mode::Auto && self.mode_until.is_some_and(|until| until <= now) {
            return self.force(Mode::Auto, None, now, Why::ManualExpired);
        }
        match (self.mode, self.phase) {
            (Mode::Auto, Phase::Open { until, .. }) if until <= now => {
                let half_open = Phase::HalfOpen { in_flight: 0, succeeded: 0, resume: None };
                Some(self.enter(half_open, Why::OpenTimeOver, now))
            }
            // A reload requires fewer trials than have succeeded already.
            (Mode::Auto, Phase::HalfOpen { succeeded, .. }) if succeeded >= self.trials() => {
                Some(self.close(now))
            }
            _ => None,
        }
    }

    fn trials(&self) -> u32 {
        self.settings.trial_requests.max(1)
    }

    fn close(&mut self, now: Instant) -> Transition {
        self.openings = 0;
        self.enter(Phase::Closed, Why::TrialsSucceeded, now)
    }

    /// Allows one early trial, since an absent endpoint may be back. Returns whether it is newly allowed.
    pub fn offer_trial(&mut self) -> bool {
        match (self.mode, &mut self.phase) {
            (Mode::Auto, Phase::Open { early, .. }) if *early == EarlyTrial::None => {
                *early = EarlyTrial::Allowed;
                true
            }
            _ => false,
        }
    }

    /// Whether to admit an attempt now. Call [`Self::apply_time`] first.
    pub fn admit(&mut self, now: Instant) -> Admitted {
        let wait = |until: Instant| until.saturating_duration_since(now);
        match (self.mode, &mut self.phase) {
            (Mode::Closed, _) | (Mode::Auto, Phase::Closed) => Admitted::Normally,
            (Mode::Open, _) => Admitted::Refused(self.mode_until.map_or(WAIT_FOR_TRIALS, wait)),
            (Mode::Auto, Phase::Open { early: early @ EarlyTrial::Allowed, .. }) => {
                *early = EarlyTrial::InFlight;
                Admitted::AsTrial
            }
            (Mode::Auto, Phase::Open { until, .. }) => Admitted::Refused(wait(*until)),
            (Mode::Auto, Phase::HalfOpen { in_flight, succeeded, .. }) => {
                if in_flight.saturating_add(*succeeded) < self.settings.trial_requests.max(1) {
                    *in_flight += 1;
                    Admitted::AsTrial
                } else {
                    Admitted::Refused(WAIT_FOR_TRIALS)
                }
            }
        }
    }

    /// An attempt that was admitted while closed has failed.
    pub fn failed(&mut self, counts: Counts, now: Instant, random: f64) -> Option<Transition> {
        if self.mode != Mode::Auto || !matches!(self.phase, Phase::Closed) {
            return None;
        }
        let why = self.reason_to_open(counts)?;
        Some(self.open(why, now, random))
    }

    /// A trial has ended. An early trial that fails changes nothing: neither when the breaker becomes half open nor how
    /// long it will be open the next time.
    pub fn trial_ended(&mut self, success: bool, now: Instant, random: f64) -> Option<Transition> {
        if self.mode != Mode::Auto {
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
                Some(self.enter(half_open, Why::Reachable, now))
            }
            Phase::HalfOpen { resume: Some(until), .. } if !success && *until > now => {
                let open = Phase::Open { until: *until, early: EarlyTrial::None };
                Some(self.enter(open, Why::TrialFailed, now))
            }
            Phase::HalfOpen { .. } if !success => Some(self.open(Why::TrialFailed, now, random)),
            Phase::HalfOpen { in_flight, succeeded, .. } => {
                *in_flight = in_flight.saturating_sub(1);
                *succeeded += 1;
                (*succeeded >= trials).then(|| self.close(now))
            }
        }
    }

    /// A trial without a result: dropped, cancelled, or neutral. Another one may use its slot.
    pub fn trial_lost(&mut self) {
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
        mode: Mode,
        until: Option<Instant>,
        now: Instant,
        why: Why,
    ) -> Option<Transition> {
        if mode == Mode::Auto && self.mode == Mode::Auto {
            return None;
        }
        let why = if mode == Mode::Auto && why == Why::Manual { Why::ManualEnded } else { why };
        let from = self.state();
        self.mode = mode;
        self.mode_until = until.filter(|_| mode != Mode::Auto);
        self.openings = 0;
        let transition = self.enter(Phase::Closed, why, now);
        Some(Transition { from, ..transition })
    }

    fn reason_to_open(&self, counts: Counts) -> Option<Why> {
        let BreakerSettings { consecutive_failures, failure_rate, min_requests, .. } = self.settings;
        if consecutive_failures > 0 && counts.in_a_row >= consecutive_failures {
            return Some(Why::ConsecutiveFailures(counts.in_a_row));
        }
        let requests = counts.failures + counts.successes;
        let enough = requests >= u64::from(min_requests.max(1));
        if *failure_rate > 0.0 && enough && counts.failures as f64 >= *failure_rate * requests as f64 {
            return Some(Why::FailureRate { failures: counts.failures, requests });
        }
        None
    }

    fn open(&mut self, why: Why, now: Instant, random: f64) -> Transition {
        let open_for = self.settings.open_for.nth(self.openings, random);
        self.openings = self.openings.saturating_add(1);
        // A time that `Instant` cannot represent is replaced by a day.
        let until = now.checked_add(open_for).unwrap_or(now + Duration::from_secs(86_400));
        self.enter(Phase::Open { until, early: EarlyTrial::None }, why, now)
    }

    fn enter(&mut self, phase: Phase, why: Why, now: Instant) -> Transition {
        let from = self.state();
        self.phase = phase;
        self.generation += 1;
        self.since = now;
        self.why = why;
        Transition { from, to: self.state(), why, until: self.until() }
    }
}
