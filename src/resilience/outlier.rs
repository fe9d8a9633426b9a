//! Taking an endpoint that keeps failing out of the balancer for a while.
//!
//! | endpoints | may be out at a time |
//! | --- | --- |
//! | 1 | none: the breaker is there for an upstream that fails as a whole |
//! | 2 or more | `max_ejected` of them, rounded down, but at least one and never the last |
//!
//! One that is out because nobody was there to connect to, as while it restarts, is asked whether it accepts connections
//! again, and comes back as soon as it does. When to ask is decided here; who asks is `src/upstream/comeback.rs`. One that
//! gave bad answers stays out for its time, as accepting connections says nothing about those.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    breaker::Growing,
    classify::{Ending, Health},
};
use crate::units::{HumanDuration, Ratio};

/// How soon one that nobody could connect to is asked again: in proportion to how long it has been out, so that a short
/// absence is not made a long one; twice as long after each time it accepted connections and still no call went well.
const SHARE: u32 = 100;
const SHORTEST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);
const MOST_DOUBLINGS: u32 = 10;

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
    /// How many of so many endpoints may be out at a time.
    pub fn most_ejected(&self, endpoints: usize) -> usize {
        if *self.max_ejected <= 0.0 {
            return 0;
        }
        // Ten times 0.3 must be three, whatever floating point makes of it.
        let share = (endpoints as f64 * *self.max_ejected + 1e-9) as usize;
        share.max(1).min(endpoints.saturating_sub(1))
    }
}

/// What all workers share about one endpoint.
#[derive(Debug)]
pub struct EndpointHealth {
    in_a_row: AtomicU32,
    /// Milliseconds since the detector's epoch, rounded up; 0 = not out.
    out_until: AtomicU64,
    epoch: Instant,
}

impl EndpointHealth {
    fn new(epoch: Instant) -> Self {
        Self { in_a_row: AtomicU32::new(0), out_until: AtomicU64::new(0), epoch }
    }

    /// One load, and a comparison for an endpoint that was ever out.
    pub fn is_ejected(&self, now: Instant) -> bool {
        let until = self.out_until.load(Ordering::Relaxed);
        until != 0 && millis(now.saturating_duration_since(self.epoch)) < until
    }

    /// When it comes back, if it is out.
    pub fn ejected_until(&self, now: Instant) -> Option<Instant> {
        self.is_ejected(now)
            .then(|| Duration::from_millis(self.out_until.load(Ordering::Relaxed)))
            .and_then(|until| self.epoch.checked_add(until))
    }
}

/// An endpoint was taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ejection {
    pub address: SocketAddr,
    pub failures_in_a_row: u32,
    pub until: Instant,
    /// Nobody was there to connect to: it is to be asked, and may come back before `until`.
    pub found_nobody: bool,
}

/// The outlier detector of an upstream, shared by all workers. Outlives a reload.
#[derive(Debug)]
pub struct Outliers {
    group: Mutex<Group>,
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
    /// False for one that has left while it was out: should it come back, it is still out.
    present: bool,
    /// Ejections in a row.
    times: u32,
    last: Option<(Instant, Duration)>,
    /// Something in the present row of failures was an answer.
    answered: bool,
    /// It came back as it accepts connections, and no call has gone well since.
    unproven: bool,
    asking: Option<Asking>,
}

/// It is out, and asked whether it accepts connections.
#[derive(Clone, Copy, Debug)]
struct Asking {
    since: Instant,
    next: Instant,
}

impl Outliers {
    pub fn new(settings: OutlierSettings, now: Instant) -> Self {
        Self { group: Mutex::new(Group { settings, members: HashMap::new() }), epoch: now }
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
                answered: false,
                unproven: false,
                asking: None,
            };
            group.members.entry(*address).or_insert_with(new).present = true;
        }
        group.members.retain(|_, member| member.present || member.health.is_ejected(now));
    }

    /// The shared state of an endpoint, to be kept beside it; `None` for one that is not there.
    pub fn endpoint(&self, address: &SocketAddr) -> Option<Arc<EndpointHealth>> {
        self.lock().members.get(address).map(|member| Arc::clone(&member.health))
    }

    /// Tells what came of a try at an endpoint. No lock unless it failed. `random` from 0 to 1.
    pub fn report(
        &self,
        address: &SocketAddr,
        endpoint: &EndpointHealth,
        (ending, health): (Ending, Health),
        now: Instant,
        random: f64,
    ) -> Option<Ejection> {
        match health {
            Health::Neutral => None,
            Health::Success => {
                if endpoint.in_a_row.load(Ordering::Relaxed) != 0 {
                    endpoint.in_a_row.store(0, Ordering::Relaxed);
                }
                None
            }
            Health::Failure => self.failed(address, endpoint, ending, now, random),
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
        ending: Ending,
        now: Instant,
        random: f64,
    ) -> Option<Ejection> {
        let mut group = self.lock();
        // Tries that were under way when it was taken out add nothing.
        if endpoint.is_ejected(now) {
            return None;
        }
        let failures_in_a_row = endpoint.in_a_row.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        if let Some(member) = group.members.get_mut(address) {
            if failures_in_a_row == 1 {
                (member.answered, member.unproven) = (false, false);
            }
            member.answered |= ending.is_answer();
        }
        let settings = group.settings;
        if settings.consecutive_failures == 0 || failures_in_a_row < settings.consecutive_failures {
            return None;
        }
        let (present, out) =
            group.members.values().filter(|member| member.present).fold((0, 0), |(all, out), member| {
                (all + 1, out + usize::from(member.health.is_ejected(now)))
            });
        // No room: it stays, and its next failure asks again.
        if out >= settings.most_ejected(present) {
            return None;
        }
        let member = group.members.get_mut(address).filter(|member| member.present)?;
        let ejected_for = member.next_ejection(&settings, now, random);
        let found_nobody = ending.found_nobody() && !member.answered;
        member.asking = found_nobody.then(|| Asking { since: now, next: now + member.pause(Duration::ZERO) });
        endpoint.in_a_row.store(0, Ordering::Relaxed);
        let until = now.saturating_duration_since(self.epoch).saturating_add(ejected_for);
        endpoint.out_until.store(millis(until).saturating_add(1), Ordering::Relaxed);
        Some(Ejection {
            address: *address,
            failures_in_a_row,
            until: now.checked_add(ejected_for)?,
            found_nobody,
        })
    }

    /// When an endpoint is to be asked next whether it accepts connections; `None` where none is.
    pub fn next_question(&self, now: Instant) -> Option<Instant> {
        let group = self.lock();
        group.members.values().filter_map(|member| member.to_ask(now)).map(|asking| asking.next).min()
    }

    /// Those to be asked now, at most so many. Each is asked again after a pause.
    pub fn questions(&self, most: usize, now: Instant) -> Vec<SocketAddr> {
        let mut due = Vec::new();
        for (address, member) in &mut self.lock().members {
            if due.len() < most
                && let Some(asking) = member.to_ask(now).filter(|asking| asking.next <= now)
            {
                let next = now + member.pause(now.saturating_duration_since(asking.since));
                member.asking = Some(Asking { next, ..asking });
                due.push(*address);
            }
        }
        due
    }

    /// An endpoint accepts connections. True if it was out for want of that: then it is back.
    pub fn recall(&self, address: &SocketAddr, now: Instant) -> bool {
        let mut group = self.lock();
        let Some(member) = group.members.get_mut(address).filter(|member| member.to_ask(now).is_some())
        else {
            return false;
        };
        (member.asking, member.last) = (None, None);
        (member.answered, member.unproven) = (false, true);
        // Stands until a call goes well: that is how the next failure knows whether one has.
        member.health.in_a_row.store(1, Ordering::Relaxed);
        member.health.out_until.store(0, Ordering::Relaxed);
        true
    }

    fn lock(&self) -> MutexGuard<'_, Group> {
        self.group.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Member {
    fn to_ask(&self, now: Instant) -> Option<Asking> {
        self.asking.filter(|_| self.present && self.health.is_ejected(now))
    }

    fn pause(&self, out_for: Duration) -> Duration {
        let pause = (out_for / SHARE).clamp(SHORTEST_PAUSE, LONGEST_PAUSE);
        pause.saturating_mul(1 << self.times.min(MOST_DOUBLINGS))
    }

    /// Doubles, unless it has been back for longer than it was out, or was called back and calls went well.
    fn next_ejection(&mut self, settings: &OutlierSettings, now: Instant, random: f64) -> Duration {
        let relapse = match self.last {
            Some((until, duration)) => now.saturating_duration_since(until) <= duration,
            None => self.unproven,
        };
        self.times = if relapse { self.times.saturating_add(1) } else { 0 };
        let duration = settings.eject_for.nth(self.times, random);
        self.last = now.checked_add(duration).map(|until| (until, duration));
        duration
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
