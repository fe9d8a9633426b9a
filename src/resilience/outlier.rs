//! Which endpoints of an upstream the balancer may choose: outlier detection, and endpoints that are absent.
//!
//! | state | begins | ends |
//! | --- | --- | --- |
//! | available | | |
//! | ejected | with `consecutive_failures` in a row, if `max_ejected` allows | when its time is over |
//! | absent | with the first connection refused (or not accepted in time), or the first `elsewhere` of its sidecar, whatever `max_ejected` | when a request to it has succeeded |
//!
//! | endpoints | may be ejected at a time |
//! | --- | --- |
//! | 1 | none: the breaker is there for an upstream that fails as a whole |
//! | 2 or more | `max_ejected` of them, rounded down, but at least one and never the last that is not absent |
//!
//! An absent endpoint is asked for a connection by the control thread (`src/upstream/comeback.rs`); once it accepts one,
//! a single request is sent to it. That it accepts connections proves nothing: its port may be its sidecar's.

mod absence;
mod endpoint;

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::absence::Absence;
pub use self::endpoint::EndpointHealth;
use super::{
    breaker::Growing,
    classify::{Advice, ConnectFailure, Ending, Health, Outcome},
};
use crate::units::{HumanDuration, Ratio};

/// `[defaults.outlier]`, per endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct OutlierSettings {
    /// Failures in a row that eject the endpoint. 0 = off.
    pub consecutive_failures: u32,
    /// How long an ejected endpoint gets no requests; longer each time.
    #[serde(deserialize_with = "eject_for")]
    pub eject_for: Growing,
    /// Share of an upstream's endpoints that may be out at a time.
    pub max_ejected: Ratio,
}

fn eject_for<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Growing, D::Error> {
    Growing::read(OutlierSettings::default().eject_for, deserializer)
}

impl Default for OutlierSettings {
    fn default() -> Self {
        Self {
            consecutive_failures: 5,
            eject_for: Growing { base: HumanDuration::from_secs(10), max: HumanDuration::from_secs(300) },
            max_ejected: Ratio::constant(0.5),
        }
    }
}

impl OutlierSettings {
    /// How many of so many endpoints may be ejected at a time.
    pub fn most_ejected(&self, endpoints: usize) -> usize {
        if *self.max_ejected <= 0.0 {
            return 0;
        }
        // Ten times 0.3 must be three, whatever floating point makes of it.
        let share = (endpoints as f64 * *self.max_ejected + 1e-9) as usize;
        share.max(1).min(endpoints.saturating_sub(1))
    }
}

/// What an attempt says about its endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Evidence {
    Success,
    Failure,
    Neutral,
    /// A failure: it accepted a connection, which broke before any byte of the response.
    Reset,
    /// The same of a pooled connection. Most likely the endpoint closed it just as it was used, which is no failure.
    StaleConnection,
    /// It refused the connection.
    Refused,
    /// It did not accept a connection in time.
    ConnectTimeout,
    /// Its sidecar has no service behind it, and advised to go elsewhere.
    NoService,
}

impl Evidence {
    /// `health`: what the outcome counts for, which is nothing where a lost connection has been counted already.
    /// `full`: it refused because it had too many requests, which is no absence.
    pub fn new(outcome: &Outcome, health: Health, full: bool) -> Self {
        match (health, outcome.ending) {
            (Health::Success, _) => Self::Success,
            (Health::Neutral, Ending::Reset(reset)) if reset.is_stale() => Self::StaleConnection,
            (Health::Neutral, _) => Self::Neutral,
            (Health::Failure, Ending::Reset(reset)) if !reset.response_begun => Self::Reset,
            (_, Ending::Connect(ConnectFailure::Refused)) => Self::Refused,
            (_, Ending::Connect(ConnectFailure::Timeout)) => Self::ConnectTimeout,
            _ if outcome.advice() == Advice::Elsewhere && !full => Self::NoService,
            _ => Self::Failure,
        }
    }

    /// No connection: asking for one again tells whether that has changed.
    pub const fn is_unreachable(self) -> bool {
        matches!(self, Self::Refused | Self::ConnectTimeout)
    }

    /// Whether it counts towards an ejection.
    pub const fn is_failure(self) -> bool {
        matches!(self, Self::Failure | Self::Reset)
    }

    /// Whether it makes its endpoint absent.
    pub const fn is_absence(self) -> bool {
        matches!(self, Self::Refused | Self::ConnectTimeout | Self::NoService)
    }
}

/// What changed by an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Ejected(Ejection),
    /// It is absent from now on.
    Absent,
    /// It was absent, and serves again.
    Present,
    /// It was absent before, and is to be asked again at another time.
    StillAbsent,
}

/// An endpoint was ejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ejection {
    pub address: SocketAddr,
    pub failures_in_a_row: u32,
    pub until: Instant,
}

/// A question to an absent endpoint that is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question {
    /// Whether it accepts a connection.
    Connection(SocketAddr),
    /// Whether a request succeeds.
    Request(SocketAddr),
}

/// The outlier detector of an upstream, shared by all workers. Outlives a reload.
#[derive(Debug)]
pub struct Outliers {
    group: Mutex<Group>,
    /// How many endpoints are absent.
    absent: AtomicUsize,
    epoch: Instant,
}

#[derive(Debug)]
struct Group {
    settings: OutlierSettings,
    members: HashMap<SocketAddr, Member>,
}

#[derive(Debug)]
struct Member {
    health: Arc<EndpointHealth>,
    /// False for one that has left while it was ejected: should it come back, it still is.
    present: bool,
    /// Ejections in a row.
    times: u32,
    last: Option<(Instant, Duration)>,
    absence: Option<Absence>,
}

impl Outliers {
    pub fn new(settings: OutlierSettings, now: Instant) -> Self {
        Self {
            group: Mutex::new(Group { settings, members: HashMap::new() }),
            absent: AtomicUsize::new(0),
            epoch: now,
        }
    }

    /// Says which endpoints there are now. One that stays, by address, keeps its state.
    pub fn update(&self, addresses: &[SocketAddr], now: Instant) {
        let mut group = self.lock();
        for member in group.members.values_mut() {
            member.present = false;
        }
        for address in addresses {
            let new = || Member {
                health: Arc::new(EndpointHealth::new(self.epoch)),
                present: true,
                times: 0,
                last: None,
                absence: None,
            };
            group.members.entry(*address).or_insert_with(new).present = true;
        }
        group.members.retain(|_, member| member.present || member.health.is_ejected(now));
        self.count_absent(&group);
    }

    /// The shared state of an endpoint, to be kept beside it; `None` for one that is not there.
    pub fn endpoint(&self, address: &SocketAddr) -> Option<Arc<EndpointHealth>> {
        self.lock().members.get(address).map(|member| Arc::clone(&member.health))
    }

    /// Whether an endpoint is absent, as far as is known: one that accepts connections again may well serve.
    pub fn is_absent(&self, address: &SocketAddr, now: Instant) -> bool {
        let group = self.lock();
        let member = group.members.get(address);
        member.is_some_and(|member| {
            let accepts = |absence: &Absence| absence.by_connection && member.health.awaits_probe(now);
            member.absence.as_ref().is_some_and(|absence| !accepts(absence))
        })
    }

    /// Whether any endpoint is absent. One load.
    pub fn any_absent(&self) -> bool {
        self.absent.load(Ordering::Relaxed) > 0
    }

    /// Whether a request may probe an absent endpoint.
    pub fn awaits_probe(&self, now: Instant) -> bool {
        self.any_absent()
            && self.lock().members.values().any(|member| member.present && member.health.awaits_probe(now))
    }

    /// Takes in what came of an attempt that began at `began`. No lock unless it failed, or its endpoint is absent.
    /// `random` from 0 to 1.
    pub fn report(
        &self,
        address: &SocketAddr,
        endpoint: &EndpointHealth,
        evidence: Evidence,
        (began, now): (Instant, Instant),
        random: f64,
    ) -> Option<Change> {
        match evidence {
            Evidence::Neutral => None,
            Evidence::Success => {
                endpoint.succeeded();
                if endpoint.is_absent() { self.prove(address, began) } else { None }
            }
            Evidence::StaleConnection => {
                endpoint.suspect(now);
                None
            }
            failure if failure.is_failure() => {
                if failure == Evidence::Reset {
                    endpoint.suspect(now);
                }
                if endpoint.is_absent() {
                    return self.absent(address, Evidence::Failure, (began, now));
                }
                self.failed(address, endpoint, now, random).map(Change::Ejected)
            }
            absence => self.absent(address, absence, (began, now)),
        }
    }

    /// Takes new settings over from a reload.
    pub fn configure(&self, settings: OutlierSettings) {
        self.lock().settings = settings;
    }

    fn failed(
        &self,
        address: &SocketAddr,
        endpoint: &EndpointHealth,
        now: Instant,
        random: f64,
    ) -> Option<Ejection> {
        let mut group = self.lock();
        // Attempts that were under way when it was ejected add nothing.
        if endpoint.is_ejected(now) {
            return None;
        }
        let failures_in_a_row = endpoint.failed(now);
        let settings = group.settings;
        if settings.consecutive_failures == 0 || failures_in_a_row < settings.consecutive_failures {
            return None;
        }
        let mut members = Members::default();
        group.members.values().for_each(|member| members.add(member, now));
        // No room: it stays, and its next failure asks again.
        if members.ejected >= settings.most_ejected(members.all) || members.available <= 1 {
            endpoint.set_failing();
            return None;
        }
        let member = group.members.get_mut(address).filter(|member| member.present)?;
        let ejected_for = member.next_ejection(&settings, now, random);
        let until = now.checked_add(ejected_for)?;
        endpoint.eject(until);
        Some(Ejection { address: *address, failures_in_a_row, until })
    }

    fn absent(
        &self,
        address: &SocketAddr,
        evidence: Evidence,
        (began, now): (Instant, Instant),
    ) -> Option<Change> {
        let mut group = self.lock();
        let alone = !group
            .members
            .iter()
            .any(|(other, member)| other != address && member.present && member.health.is_serving(now));
        let member = group.members.get_mut(address).filter(|member| member.present)?;
        let change = if let Some(absence) = &mut member.absence {
            if !absence.again(evidence, alone, began, now) {
                return None;
            }
            Change::StillAbsent
        } else if evidence == Evidence::Failure {
            // It was proven while this was on its way.
            return None;
        } else {
            member.absence = Some(Absence::new(evidence, alone, now));
            Change::Absent
        };
        if let Some(Absence { by_connection, next, .. }) = member.absence {
            match next.filter(|_| !by_connection) {
                Some(next) => member.health.probe_from(next),
                None => member.health.set_unreachable(),
            }
        }
        self.count_absent(&group);
        Some(change)
    }

    /// A request to an absent endpoint has succeeded.
    fn prove(&self, address: &SocketAddr, began: Instant) -> Option<Change> {
        let mut group = self.lock();
        let member = group.members.get_mut(address)?;
        // One that was under way as it became absent proves nothing.
        member.absence.take_if(|absence| began >= absence.since)?;
        member.health.set_present();
        self.count_absent(&group);
        Some(Change::Present)
    }

    /// When a question to an absent endpoint is due; `None` where none is.
    pub fn next_question(&self) -> Option<Instant> {
        if !self.any_absent() {
            return None;
        }
        let group = self.lock();
        group.members.values().filter_map(Member::question_due).min()
    }

    /// The questions that are due, at most so many. A question for a request is put once; one for a connection until it
    /// was answered.
    pub fn questions(&self, most: usize, now: Instant) -> Vec<Question> {
        let mut due = Vec::new();
        for (address, member) in &mut self.lock().members {
            if due.len() >= most {
                break;
            }
            if member.question_due().is_some_and(|at| at <= now)
                && let Some(absence) = &mut member.absence
            {
                absence.next = None;
                due.push(match absence.by_connection {
                    true => Question::Connection(*address),
                    false => Question::Request(*address),
                });
            }
        }
        due
    }

    /// The answer to [`Question::Connection`]. Returns whether a request may probe it now.
    pub fn answered(&self, address: &SocketAddr, accepted: bool, now: Instant) -> bool {
        let mut group = self.lock();
        let alone = !group
            .members
            .iter()
            .any(|(other, member)| other != address && member.present && member.health.is_serving(now));
        let Some(member) = group.members.get_mut(address) else { return false };
        let Some(absence) = &mut member.absence else { return false };
        if accepted {
            absence.accepted(now);
            member.health.probe_from(now);
        } else {
            absence.again(Evidence::Refused, alone, now, now);
            member.health.set_unreachable();
        }
        accepted
    }

    fn count_absent(&self, group: &Group) {
        let absent =
            group.members.values().filter(|member| member.present && member.absence.is_some()).count();
        self.absent.store(absent, Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, Group> {
        self.group.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many endpoints there are in which state.
#[derive(Default)]
struct Members {
    all: usize,
    ejected: usize,
    available: usize,
}

impl Members {
    fn add(&mut self, member: &Member, now: Instant) {
        if member.present {
            self.all += 1;
            self.ejected += usize::from(member.health.is_ejected(now));
            self.available += usize::from(member.health.is_available(now));
        }
    }
}

impl Member {
    fn question_due(&self) -> Option<Instant> {
        self.absence.filter(|_| self.present)?.next
    }

    /// Doubles, unless it has been back for longer than it was out.
    fn next_ejection(&mut self, settings: &OutlierSettings, now: Instant, random: f64) -> Duration {
        let relapse =
            self.last.is_some_and(|(until, duration)| now.saturating_duration_since(until) <= duration);
        self.times = if relapse { self.times.saturating_add(1) } else { 0 };
        let duration = settings.eject_for.nth(self.times, random);
        self.last = now.checked_add(duration).map(|until| (until, duration));
        duration
    }
}

#[cfg(test)]
mod tests;
