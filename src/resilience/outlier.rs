//! Taking an endpoint that keeps failing out of the balancer for a while.
//!
//! | endpoints | may be out at a time |
//! | --- | --- |
//! | 1 | none: the breaker is there for an upstream that fails as a whole |
//! | 2 or more | `max_ejected` of them, rounded down, but at least one and never the last |

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

use super::{breaker::Growing, classify::Health};
use crate::units::{HumanDuration, Ratio};

/// `[defaults.outlier]`, per endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct OutlierSettings {
    /// Failures in a row that eject the endpoint. 0 = off.
    pub consecutive_failures: u32,
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
        health: Health,
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
            Health::Failure => self.failed(address, endpoint, now, random),
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
        // Tries that were under way when it was taken out add nothing.
        if endpoint.is_ejected(now) {
            return None;
        }
        let failures_in_a_row = endpoint.in_a_row.fetch_add(1, Ordering::Relaxed).saturating_add(1);
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
        endpoint.in_a_row.store(0, Ordering::Relaxed);
        let until = now.saturating_duration_since(self.epoch).saturating_add(ejected_for);
        endpoint.out_until.store(millis(until).saturating_add(1), Ordering::Relaxed);
        Some(Ejection { address: *address, failures_in_a_row, until: now.checked_add(ejected_for)? })
    }

    fn lock(&self) -> MutexGuard<'_, Group> {
        self.group.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Member {
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

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::units::HumanDuration;

    const S: Duration = Duration::from_secs(1);

    struct Fleet {
        outliers: Outliers,
        addresses: Vec<SocketAddr>,
    }

    impl Fleet {
        fn new(count: u16, settings: OutlierSettings, now: Instant) -> Self {
            let addresses: Vec<_> = (1..=count).map(|port| SocketAddr::from(([10, 0, 0, 1], port))).collect();
            let outliers = Outliers::new(settings, now);
            outliers.update(&addresses, now);
            Self { outliers, addresses }
        }

        fn tell(&self, index: usize, health: Health, now: Instant) -> Option<Ejection> {
            let address = &self.addresses[index];
            let endpoint = self.outliers.endpoint(address)?;
            self.outliers.report(address, &endpoint, health, now, 0.0)
        }

        fn fail(&self, index: usize, times: u32, now: Instant) -> Option<Ejection> {
            (0..times).filter_map(|_| self.tell(index, Health::Failure, now)).last()
        }

        fn out(&self, now: Instant) -> usize {
            let out = |address| self.outliers.endpoint(address).is_some_and(|e| e.is_ejected(now));
            self.addresses.iter().filter(|address| out(address)).count()
        }
    }

    #[test]
    fn how_many_may_be_out_for_every_size() {
        let most = |ratio: f64, endpoints| {
            let settings = OutlierSettings { max_ejected: Ratio::constant(ratio), ..Default::default() };
            settings.most_ejected(endpoints)
        };
        assert_eq!((0..=6).map(|n| most(0.5, n)).collect::<Vec<_>>(), [0, 0, 1, 1, 2, 2, 3]);
        assert_eq!((0..=4).map(|n| most(1.0, n)).collect::<Vec<_>>(), [0, 0, 1, 2, 3]);
        assert_eq!((0..=4).map(|n| most(0.1, n)).collect::<Vec<_>>(), [0, 0, 1, 1, 1]);
        assert_eq!((most(0.3, 10), most(0.5, 1000), most(0.0, 10)), (3, 500, 0));
    }

    #[test]
    fn the_only_one_stays() {
        let now = Instant::now();
        let fleet = Fleet::new(1, OutlierSettings::default(), now);
        assert_eq!(fleet.fail(0, 1000, now), None);
        assert_eq!(fleet.out(now), 0);
    }

    #[test]
    fn of_two_and_of_three_one_may_go() {
        let now = Instant::now();
        for count in [2, 3] {
            let fleet = Fleet::new(count, OutlierSettings::default(), now);
            assert_eq!(fleet.fail(0, 4, now), None);
            assert_eq!(fleet.tell(0, Health::Success, now), None);
            assert_eq!(fleet.fail(0, 4, now), None, "a success ends the row");
            let ejection = fleet.fail(0, 1, now).unwrap();
            assert_eq!((ejection.failures_in_a_row, ejection.until), (5, now + S * 10));
            assert_eq!(fleet.fail(1, 100, now), None, "no room");
            assert_eq!(fleet.out(now + S * 9), 1);
            assert_eq!(fleet.out(now + S * 11), 0);
            assert!(fleet.fail(1, 1, now + S * 11).is_some(), "there is room now");
        }
    }

    #[test]
    fn what_was_under_way_when_it_was_taken_out_adds_nothing() {
        let now = Instant::now();
        let fleet = Fleet::new(6, OutlierSettings::default(), now);
        let until = fleet.fail(0, 5, now).unwrap().until;
        assert_eq!(fleet.fail(0, 100, now + S), None);
        assert_eq!(fleet.out(until + S), 0);
        assert_eq!(fleet.fail(0, 4, until + S), None, "the row begins anew");
    }

    #[test]
    fn a_relapse_doubles_and_a_good_while_forgives() {
        let mut now = Instant::now();
        let fleet = Fleet::new(3, OutlierSettings::default(), now);
        for expected in [10u32, 20, 40, 80, 160, 300, 300] {
            let ejection = fleet.fail(0, 5, now).unwrap();
            assert_eq!(ejection.until, now + S * expected);
            now = ejection.until + S;
        }
        now += S * 301;
        assert_eq!(fleet.fail(0, 5, now).unwrap().until, now + S * 10);
    }

    #[test]
    fn state_is_kept_by_address_over_updates() {
        let now = Instant::now();
        let fleet = Fleet::new(4, OutlierSettings::default(), now);
        fleet.fail(0, 5, now).unwrap();
        fleet.fail(1, 4, now);
        fleet.outliers.update(&fleet.addresses[1..], now);
        fleet.outliers.update(&fleet.addresses, now + S);
        assert_eq!(fleet.out(now + S), 1, "who left while out is still out when back");
        assert!(fleet.fail(1, 1, now + S).is_some(), "who stayed keeps the row");
        fleet.outliers.update(&fleet.addresses[2..], now + S * 60);
        assert!(fleet.outliers.endpoint(&fleet.addresses[0]).is_none(), "and who is gone is forgotten");
    }

    #[test]
    fn off_ejects_nobody() {
        let now = Instant::now();
        let off = OutlierSettings { consecutive_failures: 0, ..OutlierSettings::default() };
        assert_eq!(Fleet::new(5, off, now).fail(0, 1000, now), None);
    }

    proptest! {
        #[test]
        fn never_more_are_out_than_may_be(
            count in 1u16..12, ratio in 0.0f64..=1.0,
            events in prop::collection::vec((any::<prop::sample::Index>(), 0u8..4, 0u64..4000), 1..300),
        ) {
            let settings = OutlierSettings {
                max_ejected: Ratio::constant(ratio), consecutive_failures: 2,
                eject_for: Growing { base: HumanDuration::from_secs(5), max: HumanDuration::from_secs(60) },
            };
            let mut now = Instant::now();
            let fleet = Fleet::new(count, settings, now);
            for (index, kind, pass) in events {
                let health = if kind == 0 { Health::Success } else { Health::Failure };
                fleet.tell(index.index(fleet.addresses.len()), health, now);
                prop_assert!(fleet.out(now) <= settings.most_ejected(count.into()));
                prop_assert!(fleet.out(now) < usize::from(count));
                if kind == 3 { now += Duration::from_millis(pass); }
            }
            prop_assert_eq!(fleet.out(now + S * 61), 0, "nobody is out for ever");
        }
    }
}
