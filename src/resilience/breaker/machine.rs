//! The breaker as a plain machine: one event at a time, no sharing.

use std::time::{Duration, Instant};

use super::{BreakerSettings, Mode, State, Transition, Why};

/// See [`super::Breaker`] for what it promises.
#[derive(Debug)]
pub struct Machine {
    pub settings: BreakerSettings,
    phase: Phase,
    mode: Mode,
    /// When [`Mode::Open`] or [`Mode::Closed`] falls back to auto.
    mode_until: Option<Instant>,
    /// Grows with every transition, so that what began before one can be told from what began after.
    pub generation: u64,
    pub since: Instant,
    pub why: Why,
    /// How often it opened without closing between.
    openings: u32,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    Closed,
    Open {
        until: Instant,
        early: EarlyTrial,
    },
    /// Trials under way, and those that went well. `resume`: it began by an early trial, and if another one fails the
    /// breaker is open until then as if none had been made.
    HalfOpen {
        out: u32,
        succeeded: u32,
        resume: Option<Instant>,
    },
}

/// A trial before an open breaker's time is over, where an endpoint that was absent may be back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum EarlyTrial {
    None,
    Offered,
    UnderWay,
}

/// What [`Machine::admit`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admitted {
    Normally,
    AsTrial,
    /// With how long it is worth waiting.
    Refused(Duration),
}

/// What is known of the window when a failure comes, this failure included.
#[derive(Clone, Copy, Debug)]
pub struct Counts {
    pub in_a_row: u32,
    pub failures: u64,
    pub successes: u64,
}

/// While trials are out there is no telling how long it takes.
const TRIALS_OUT: Duration = Duration::from_secs(1);

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

    /// What time alone changes: a forced state falls back, an open breaker becomes half open.
    pub fn settle(&mut self, now: Instant) -> Option<Transition> {
        if self.mode != Mode::Auto && self.mode_until.is_some_and(|until| until <= now) {
            return self.force(Mode::Auto, None, now, Why::ManualExpired);
        }
        match (self.mode, self.phase) {
            (Mode::Auto, Phase::Open { until, .. }) if until <= now => {
                let half_open = Phase::HalfOpen { out: 0, succeeded: 0, resume: None };
                Some(self.enter(half_open, Why::OpenTimeOver, now))
            }
            // A reload asks for fewer trials than have succeeded already.
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

    /// An endpoint that was absent may be back: one trial may go before the time is over. Returns whether that is news.
    pub fn offer_trial(&mut self) -> bool {
        match (self.mode, &mut self.phase) {
            (Mode::Auto, Phase::Open { early, .. }) if *early == EarlyTrial::None => {
                *early = EarlyTrial::Offered;
                true
            }
            _ => false,
        }
    }

    /// Whether a try may go now. Call [`Self::settle`] first.
    pub fn admit(&mut self, now: Instant) -> Admitted {
        let wait = |until: Instant| until.saturating_duration_since(now);
        match (self.mode, &mut self.phase) {
            (Mode::Closed, _) | (Mode::Auto, Phase::Closed) => Admitted::Normally,
            (Mode::Open, _) => Admitted::Refused(self.mode_until.map_or(TRIALS_OUT, wait)),
            (Mode::Auto, Phase::Open { early: early @ EarlyTrial::Offered, .. }) => {
                *early = EarlyTrial::UnderWay;
                Admitted::AsTrial
            }
            (Mode::Auto, Phase::Open { until, .. }) => Admitted::Refused(wait(*until)),
            (Mode::Auto, Phase::HalfOpen { out, succeeded, .. }) => {
                if out.saturating_add(*succeeded) < self.settings.trial_requests.max(1) {
                    *out += 1;
                    Admitted::AsTrial
                } else {
                    Admitted::Refused(TRIALS_OUT)
                }
            }
        }
    }

    /// A try that was let through while closed has failed.
    pub fn failed(&mut self, counts: Counts, now: Instant, random: f64) -> Option<Transition> {
        if self.mode != Mode::Auto || !matches!(self.phase, Phase::Closed) {
            return None;
        }
        let why = self.reason_to_open(counts)?;
        Some(self.open(why, now, random))
    }

    /// A trial has come back: well, or not. An early one that fails changes nothing: neither when the breaker is half
    /// open nor for how long it is open the next time.
    pub fn trial_ended(&mut self, well: bool, now: Instant, random: f64) -> Option<Transition> {
        if self.mode != Mode::Auto {
            return None;
        }
        let trials = self.trials();
        match &mut self.phase {
            Phase::Closed => None,
            Phase::Open { early, .. } if !well => {
                *early = EarlyTrial::None;
                None
            }
            Phase::Open { .. } if trials <= 1 => Some(self.close(now)),
            Phase::Open { until, .. } => {
                let half_open = Phase::HalfOpen { out: 0, succeeded: 1, resume: Some(*until) };
                Some(self.enter(half_open, Why::Reachable, now))
            }
            Phase::HalfOpen { resume: Some(until), .. } if !well && *until > now => {
                let open = Phase::Open { until: *until, early: EarlyTrial::None };
                Some(self.enter(open, Why::TrialFailed, now))
            }
            Phase::HalfOpen { .. } if !well => Some(self.open(Why::TrialFailed, now, random)),
            Phase::HalfOpen { out, succeeded, .. } => {
                *out = out.saturating_sub(1);
                *succeeded += 1;
                (*succeeded >= trials).then(|| self.close(now))
            }
        }
    }

    /// A trial that says nothing: lost, cancelled, or its answer counts for neither. Another may take its place.
    pub fn trial_lost(&mut self) {
        match &mut self.phase {
            Phase::Closed => {}
            Phase::Open { early, .. } if *early == EarlyTrial::UnderWay => *early = EarlyTrial::Offered,
            Phase::Open { .. } => {}
            Phase::HalfOpen { out, .. } => *out = out.saturating_sub(1),
        }
    }

    /// Takes the decision away from the machine, or gives it back. What happened before is forgotten.
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
        // Beyond what the clock can hold there is no such time; a day is as good as ever.
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
