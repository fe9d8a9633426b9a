//! Which endpoints of an upstream the balancer may choose: outlier detection, and detection of absent endpoints.
//!
//! | state | begins | ends |
//! | --- | --- | --- |
//! | available | | |
//! | ejected | after `consecutive_failures` in a row, if `max_ejected` allows | when its time has elapsed |
//! | absent | with the first connection refused or not accepted in time, or the first `elsewhere` of its sidecar, regardless of `max_ejected` | when a request to it has succeeded |
//!
//! | endpoints | may be ejected at a time |
//! | --- | --- |
//! | 1 | none: the breaker handles an upstream that fails as a whole |
//! | 2 or more | `max_ejected` of them, rounded down, but at least one and never the last that is not absent |
//!
//! The control thread tries to connect to an absent endpoint (`src/upstream/reachability.rs`). Once it accepts a
//! connection, a single request probes it. An accepted connection is not enough: the port may be its sidecar's.

mod endpoint;
mod outcome;
mod probe_schedule;

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

use self::probe_schedule::ProbeSchedule;
pub use self::{
    endpoint::EndpointHealth,
    outcome::{AttemptTimes, DueProbe, Ejection, EndpointChange, EndpointOutcome},
};
use super::breaker::GrowingDuration;
use crate::units::{HumanDuration, Ratio};

/// `[defaults.outlier]`, per endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct OutlierSettings {
    /// Consecutive failures that eject the endpoint. 0 = off.
    pub consecutive_failures: u32,
    /// How long an ejected endpoint gets no requests; longer each time.
    #[serde(deserialize_with = "eject_for")]
    pub eject_for: GrowingDuration,
    /// Share of an upstream's endpoints that may be ejected at a time.
    pub max_ejected: Ratio,
}

fn eject_for<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<GrowingDuration, D::Error> {
    GrowingDuration::read(OutlierSettings::default().eject_for, deserializer)
}

impl Default for OutlierSettings {
    fn default() -> Self {
        Self {
            consecutive_failures: 5,
            eject_for: GrowingDuration {
                base: HumanDuration::from_secs(10),
                max: HumanDuration::from_secs(300),
            },
            max_ejected: Ratio::constant(0.5),
        }
    }
}

impl OutlierSettings {
    /// How many of `endpoints` may be ejected at a time.
    pub fn ejection_limit(&self, endpoints: usize) -> usize {
        if *self.max_ejected <= 0.0 {
            return 0;
        }
        // Ten times 0.3 must be three in spite of floating point.
        let share = (endpoints as f64 * *self.max_ejected + 1e-9) as usize;
        share.max(1).min(endpoints.saturating_sub(1))
    }
}

/// The outlier detector of an upstream, shared by all workers. Its state survives a reload.
#[derive(Debug)]
pub struct OutlierDetector {
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
    /// False for an endpoint that discovery removed while it was ejected: if it is added again, it is still ejected.
    present: bool,
    /// Consecutive ejections.
    ejections: u32,
    last: Option<(Instant, Duration)>,
    probes: Option<ProbeSchedule>,
}

impl OutlierDetector {
    pub fn new(settings: OutlierSettings, now: Instant) -> Self {
        Self {
            group: Mutex::new(Group { settings, members: HashMap::new() }),
            absent: AtomicUsize::new(0),
            epoch: now,
        }
    }

    /// Sets the endpoints of the upstream. An address that remains keeps its state.
    pub fn update(&self, addresses: &[SocketAddr], now: Instant) {
        let mut group = self.lock();
        for member in group.members.values_mut() {
            member.present = false;
        }
        for address in addresses {
            let new = || Member {
                health: Arc::new(EndpointHealth::new(self.epoch)),
                present: true,
                ejections: 0,
                last: None,
                probes: None,
            };
            group.members.entry(*address).or_insert_with(new).present = true;
        }
        group.members.retain(|_, member| member.present || member.health.is_ejected(now));
        self.count_absent(&group);
    }

    /// The shared state of an endpoint, to be kept with it; `None` if the address is unknown.
    pub fn endpoint(&self, address: &SocketAddr) -> Option<Arc<EndpointHealth>> {
        self.lock().members.get(address).map(|member| Arc::clone(&member.health))
    }

    /// Whether an endpoint is absent. One that accepts connections again does not count as absent: it may serve.
    pub fn is_absent(&self, address: &SocketAddr, now: Instant) -> bool {
        let group = self.lock();
        let member = group.members.get(address);
        member.is_some_and(|member| {
            let accepts = |absence: &ProbeSchedule| absence.by_connection && member.health.awaits_probe(now);
            member.probes.as_ref().is_some_and(|absence| !accepts(absence))
        })
    }

    /// Whether any endpoint is absent. One atomic load.
    pub fn any_absent(&self) -> bool {
        self.absent.load(Ordering::Relaxed) > 0
    }

    /// Whether a request may probe an absent endpoint.
    pub fn awaits_probe(&self, now: Instant) -> bool {
        self.any_absent()
            && self.lock().members.values().any(|member| member.present && member.health.awaits_probe(now))
    }

    /// Records the outcome of an attempt. It locks only if the attempt failed or its endpoint is
    /// absent. `random` from 0 to 1.
    pub fn report(
        &self,
        address: &SocketAddr,
        endpoint: &EndpointHealth,
        outcome: EndpointOutcome,
        times: AttemptTimes,
        random: f64,
    ) -> Option<EndpointChange> {
        let now = times.ended;
        match outcome {
            EndpointOutcome::Neutral => None,
            EndpointOutcome::Success => {
                endpoint.record_success();
                if endpoint.is_absent() { self.restore(address, times.began) } else { None }
            }
            EndpointOutcome::StaleConnection => {
                endpoint.mark_suspected(now);
                None
            }
            failure if failure.is_failure() => {
                if failure == EndpointOutcome::Reset {
                    endpoint.mark_suspected(now);
                }
                if endpoint.is_absent() {
                    return self.record_absence(address, EndpointOutcome::Failure, times);
                }
                self.record_failure(address, endpoint, now, random).map(EndpointChange::Ejected)
            }
            absence => self.record_absence(address, absence, times),
        }
    }

    /// Applies the settings of a reload.
    pub fn configure(&self, settings: OutlierSettings) {
        self.lock().settings = settings;
    }

    fn record_failure(
        &self,
        address: &SocketAddr,
        endpoint: &EndpointHealth,
        now: Instant,
        random: f64,
    ) -> Option<Ejection> {
        let mut group = self.lock();
        // Attempts that were in flight when it was ejected are not counted.
        if endpoint.is_ejected(now) {
            return None;
        }
        let failures_in_a_row = endpoint.record_failure(now);
        let settings = group.settings;
        if settings.consecutive_failures == 0 || failures_in_a_row < settings.consecutive_failures {
            return None;
        }
        let mut counts = StateCounts::default();
        group.members.values().for_each(|member| counts.add(member, now));
        // `max_ejected` is reached: it stays in the balancer, and its next failure checks again.
        if counts.ejected >= settings.ejection_limit(counts.all) || counts.available <= 1 {
            endpoint.set_failing();
            return None;
        }
        let member = group.members.get_mut(address).filter(|member| member.present)?;
        let ejected_for = member.next_ejection(&settings, now, random);
        let until = now.checked_add(ejected_for)?;
        endpoint.eject(until);
        Some(Ejection { address: *address, consecutive_failures: failures_in_a_row, until })
    }

    fn record_absence(
        &self,
        address: &SocketAddr,
        outcome: EndpointOutcome,
        times: AttemptTimes,
    ) -> Option<EndpointChange> {
        let AttemptTimes { began, ended: now } = times;
        let mut group = self.lock();
        let alone = !group
            .members
            .iter()
            .any(|(other, member)| other != address && member.present && member.health.is_serving(now));
        let member = group.members.get_mut(address).filter(|member| member.present)?;
        let change = if let Some(absence) = &mut member.probes {
            if !absence.still_absent(outcome, alone, began, now) {
                return None;
            }
            EndpointChange::StillAbsent
        } else if outcome == EndpointOutcome::Failure {
            // It was restored while this attempt was in flight.
            return None;
        } else {
            member.probes = Some(ProbeSchedule::new(outcome, alone, now));
            EndpointChange::Absent
        };
        if let Some(ProbeSchedule { by_connection, next, .. }) = member.probes {
            match next.filter(|_| !by_connection) {
                Some(next) => member.health.schedule_probe(next),
                None => member.health.set_unreachable(),
            }
        }
        self.count_absent(&group);
        Some(change)
    }

    /// A request to an absent endpoint has succeeded.
    fn restore(&self, address: &SocketAddr, began: Instant) -> Option<EndpointChange> {
        let mut group = self.lock();
        let member = group.members.get_mut(address)?;
        // An attempt that began before the endpoint became absent does not show that it is back.
        member.probes.take_if(|absence| began >= absence.since)?;
        member.health.set_present();
        self.count_absent(&group);
        Some(EndpointChange::Present)
    }

    /// When the next probe of an absent endpoint is due, if any.
    pub fn next_probe_at(&self) -> Option<Instant> {
        if !self.any_absent() {
            return None;
        }
        let group = self.lock();
        group.members.values().filter_map(Member::next_probe).min()
    }

    /// Takes the probes that are due, at most `most`. A probe is scheduled again only after its result.
    pub fn take_due_probes(&self, most: usize, now: Instant) -> Vec<DueProbe> {
        let mut due = Vec::new();
        for (address, member) in &mut self.lock().members {
            if due.len() >= most {
                break;
            }
            if member.next_probe().is_some_and(|at| at <= now)
                && let Some(absence) = &mut member.probes
            {
                absence.next = None;
                due.push(match absence.by_connection {
                    true => DueProbe::Connection(*address),
                    false => DueProbe::Request(*address),
                });
            }
        }
        due
    }

    /// Records the result of [`DueProbe::Connection`]. Returns whether a request may probe the endpoint now.
    pub fn record_connection_probe(&self, address: &SocketAddr, accepted: bool, now: Instant) -> bool {
        let mut group = self.lock();
        let alone = !group
            .members
            .iter()
            .any(|(other, member)| other != address && member.present && member.health.is_serving(now));
        let Some(member) = group.members.get_mut(address) else { return false };
        let Some(absence) = &mut member.probes else { return false };
        if accepted {
            absence.connection_accepted(now);
            member.health.schedule_probe(now);
        } else {
            absence.still_absent(EndpointOutcome::Refused, alone, now, now);
            member.health.set_unreachable();
        }
        accepted
    }

    fn count_absent(&self, group: &Group) {
        let absent =
            group.members.values().filter(|member| member.present && member.probes.is_some()).count();
        self.absent.store(absent, Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, Group> {
        self.group.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The number of endpoints in each state.
#[derive(Default)]
struct StateCounts {
    all: usize,
    ejected: usize,
    available: usize,
}

impl StateCounts {
    fn add(&mut self, member: &Member, now: Instant) {
        if member.present {
            self.all += 1;
            self.ejected += usize::from(member.health.is_ejected(now));
            self.available += usize::from(member.health.is_available(now));
        }
    }
}

impl Member {
    fn next_probe(&self) -> Option<Instant> {
        self.probes.filter(|_| self.present)?.next
    }

    /// Doubles, unless the endpoint has been back for longer than it was ejected.
    fn next_ejection(&mut self, settings: &OutlierSettings, now: Instant, random: f64) -> Duration {
        let relapse =
            self.last.is_some_and(|(until, duration)| now.saturating_duration_since(until) <= duration);
        self.ejections = if relapse { self.ejections.saturating_add(1) } else { 0 };
        let duration = settings.eject_for.nth(self.ejections, random);
        self.last = now.checked_add(duration).map(|until| (until, duration));
        duration
    }
}

#[cfg(test)]
mod tests;
