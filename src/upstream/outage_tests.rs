//! Partial and whole outages in virtual time: the real decisions (balancer, outlier detection, breaker, budget,
//! retries) with simulated replicas.

mod simulation;

use std::{
    collections::BTreeMap,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use http::{Method, StatusCode};
use proptest::prelude::*;

use super::{
    DiscoveredEndpoint, Upstream,
    balance::hash_key,
    local::{InFlight, LocalEndpoint, LocalUpstream, PickCriteria, Probe},
};
use crate::{
    config::{Balance, Policy},
    resilience::{
        backoff::RetryHint,
        breaker::{BreakerPermit, BreakerState},
        classify::{AttemptOutcome, ConnectFailure, Health, OutcomeKind, Reset, RetryAdvice},
        outlier::{AttemptTimes, DueProbe, EndpointOutcome},
        retry::{FailedAttempt, Replayability, RetryContext, RetryDecision, RetryPolicy, RetrySettings},
    },
    rng::Rng,
};
use simulation::{MS, Mode, Schedule, Simulation};

/// The same steps for each replica, one after the other, starting after one second.
fn in_turn(steps: &[(Mode, u64)]) -> Vec<Schedule> {
    let mut at = 1000;
    (0..3)
        .map(|_| {
            let mut schedule = Schedule::new();
            for (mode, time) in steps {
                schedule.push((at, *mode));
                at += time;
            }
            schedule
        })
        .collect()
}

fn partial_outages() -> Vec<(&'static str, Vec<Schedule>)> {
    use Mode::{Down, Failing, Healthy, NoService};
    vec![
        ("sidecar up before its service", in_turn(&[(NoService, 1500), (Healthy, 1000)])),
        (
            "service goes before its sidecar",
            in_turn(&[(NoService, 1000), (Down, 500), (NoService, 1000), (Healthy, 1000)]),
        ),
        ("kill -9", in_turn(&[(Down, 1500), (Healthy, 1000)])),
        ("one of three dies", vec![vec![(1000, Down), (9000, Healthy)], vec![], vec![]]),
        (
            "two of three die",
            vec![vec![(1000, Down), (9000, Healthy)], vec![(1000, Down), (8000, Healthy)], vec![]],
        ),
        ("one warming", vec![vec![(1000, Down), (1500, Failing), (4500, Healthy)], vec![], vec![]]),
        ("rolling, 503 for a second each", in_turn(&[(Failing, 1000), (Down, 1000), (Healthy, 1000)])),
        (
            "rolling, two away at a time",
            (0..3)
                .map(|n| {
                    vec![(1000 + n * 1000, Failing), (2000 + n * 1000, Down), (3000 + n * 1000, Healthy)]
                })
                .collect(),
        ),
        (
            "two of three fail",
            vec![vec![(1000, Failing), (9000, Healthy)], vec![(1000, Failing), (8000, Healthy)], vec![]],
        ),
    ]
}

#[test]
fn no_request_fails_that_some_replica_can_serve() {
    for (name, schedules) in partial_outages() {
        for balance in [Balance::P2c, Balance::LeastRequest] {
            for rate in [5, 50, 500] {
                let mut simulation = Simulation::new(schedules.clone(), &balance, rate);
                simulation.run(rate, 14);
                println!(
                    "{name}, {balance}, {rate}/s: {} of {} failed",
                    simulation.failed.len(),
                    simulation.sent
                );
                // With two away, the third may go some milliseconds before the first is known to be back.
                assert!(
                    simulation.failed.len() as u32 <= simulation.sent / 500,
                    "{name}, {balance}, {rate}/s: {:?}",
                    simulation.failed
                );
                assert_eq!(simulation.openings, 0, "{name}, {balance}, {rate}/s");
            }
        }
    }
}

/// Four of five accept connections and reset them from the same moment on. Each request that hits one keeps other
/// requests away from it, so few requests hit all four.
#[test]
fn the_last_of_five_serves_when_four_reset_at_the_same_moment() {
    const RUNS: u64 = 300;
    let schedules = [vec![vec![(1000, Mode::Resetting)]; 4], vec![vec![]]].concat();
    for balance in [Balance::P2c, Balance::LeastRequest] {
        for rate in [50, 100, 200] {
            let failed = |seed| Simulation::new(schedules.clone(), &balance, seed).run(rate, 3).failed.len();
            let failed: usize = (0..RUNS).map(failed).sum();
            println!("{balance}, {rate}/s: {failed} requests failed in {RUNS} runs");
            assert!(failed as u64 * 2 <= RUNS, "{balance}, {rate}/s: {failed} failed in {RUNS} runs");
        }
    }
}

/// The last endpoint begins to fail just before the first one is back: its probe is in flight when the breaker opens.
#[test]
fn a_probe_that_succeeds_after_the_breaker_opened_leads_to_a_trial() {
    use Mode::{Down, Failing, Healthy};
    for gap in (0..100).step_by(2) {
        for rate in [50, 500] {
            let back = 2000 + gap;
            let schedules = vec![
                vec![(1000, Down), (back, Healthy)],
                vec![(1000, Down), (9000, Healthy)],
                vec![(2000, Failing), (9000, Healthy)],
            ];
            let mut simulation = Simulation::new(schedules, &Balance::P2c, gap);
            simulation.run(rate, 9);
            let late = simulation.last_failure().saturating_sub(Duration::from_millis(back));
            assert!(late <= MS * 200, "back after {gap} ms at {rate}/s: failed for {late:?} more");
        }
    }
}

/// The latest time by which an upstream recovers after an outage of this length: `open_for.base` and 1.25 × the
/// outage.
fn recovery_bound(outage: Duration) -> Duration {
    Duration::from_secs(5) + outage.mul_f64(1.25) + MS * 100
}

/// Seconds for which requests continue after that, to see that it stays healthy.
const COOL_DOWN: u64 = 10;

/// Nothing is served during a complete outage. Afterwards it is: at most `open_for.base` and 1.25 × the outage after
/// its end; at once if no endpoint responded with an error.
#[test]
fn every_complete_outage_ends_in_time() {
    use Mode::{Down, Failing, Healthy, NoService, Untrusted};
    let all = |steps: &[(u64, Mode)]| vec![steps.to_vec(); 3];
    for length in [50, 500, 2000, 5000, 20_000, 60_000] {
        let end = 1000 + length;
        let outages = [
            ("refusing", true, all(&[(1000, Down), (end, Healthy)])),
            ("behind a live sidecar", true, all(&[(1000, NoService), (end, Healthy)])),
            ("untrusted", false, all(&[(1000, Untrusted), (end, Healthy)])),
            ("503", false, all(&[(1000, Failing), (end, Healthy)])),
            (
                "refusing, then warming",
                true,
                all(&[(1000, Down), (1000 + length / 2, Failing), (end, Healthy)]),
            ),
            (
                "one refusing, one warming, one behind a live sidecar",
                false,
                vec![
                    vec![(1000, Down), (end, Healthy)],
                    vec![(1000, Failing), (end, Healthy)],
                    vec![(1000, NoService), (end, Healthy)],
                ],
            ),
            ("a single one, behind a live sidecar", true, vec![vec![(1000, NoService), (end, Healthy)]]),
            (
                "a single one refusing, then warming",
                true,
                vec![vec![(1000, Down), (1000 + length / 2, Failing), (end, Healthy)]],
            ),
        ];
        // Long outages mean many requests; the effect of a high rate shows in short ones.
        let rates = if length <= 5000 { [50, 500] } else { [50, 100] };
        for (name, at_once, schedules) in outages {
            for rate in rates {
                let mut simulation = Simulation::new(schedules.clone(), &Balance::P2c, length);
                let bound = recovery_bound(Duration::from_millis(length));
                simulation.run(rate, end / 1000 + bound.as_secs() + COOL_DOWN);
                let (length, end) = (Duration::from_millis(length), Duration::from_millis(end));
                let late = simulation.last_failure().saturating_sub(end);
                println!("{name} for {length:?} at {rate}/s: healthy after {late:?}");
                assert!(late <= bound, "{name} for {length:?} at {rate}/s: {late:?}");
                if at_once && !name.contains("warming") {
                    assert!(
                        late <= Duration::from_millis(1200),
                        "{name} for {length:?} at {rate}/s: {late:?}"
                    );
                }
            }
        }
    }
}

/// Requests with the same hash stay together, even while an absent endpoint waits to be probed.
#[test]
fn a_request_balanced_by_hash_probes_no_other_endpoint() {
    let mut simulation = Simulation::new(vec![vec![]; 3], &Balance::HashHeader("x-user".to_owned()), 7);
    let pick = |simulation: &Simulation, user: u32| {
        let hash = Some(hash_key(&user.to_be_bytes()));
        let wanted = PickCriteria { tried: &[], hash, probe: Some(Probe::Repeatable) };
        simulation
            .local
            .pick(&simulation.endpoints, &wanted, simulation.at(), &mut Rng::from_seed(1))
            .unwrap()
    };
    let homes: Vec<usize> = (0..300).map(|user| pick(&simulation, user)).collect();
    let gone = Rc::clone(&simulation.endpoints[0]);
    gone.report(
        &simulation.upstream,
        EndpointOutcome::NoService,
        AttemptTimes { began: simulation.at(), ended: simulation.at() },
        || 0.5,
    );
    assert!(gone.is_absent());
    let mut probes = 0;
    for (user, home) in homes.into_iter().enumerate() {
        simulation.now += Duration::from_secs(20);
        let picked = pick(&simulation, user as u32);
        match home {
            0 => probes += u32::from(picked == 0),
            home => assert_eq!(picked, home, "user {user}"),
        }
    }
    assert!(probes > 50, "{probes} of about 100 requests whose endpoint it is");
}

fn any_schedule() -> impl Strategy<Value = Schedule> {
    use Mode::{Down, Failing, Healthy, NoService, Untrusted};
    let mode = prop_oneof![Just(Healthy), Just(Down), Just(NoService), Just(Failing), Just(Untrusted)];
    prop::collection::vec((mode, 20u64..4000), 0..6).prop_map(|steps| {
        let mut at = 1000;
        let mut schedule = Schedule::new();
        for (mode, time) in steps {
            schedule.push((at, mode));
            at += time;
        }
        schedule.push((at, Healthy));
        schedule
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn the_breaker_stays_closed_while_one_replica_is_healthy(
        one in any_schedule(), other in any_schedule(), seed in any::<u64>(),
    ) {
        let mut simulation = Simulation::new(vec![one, other, vec![]], &Balance::P2c, seed);
        simulation.run(100, 25);
        prop_assert_eq!(simulation.openings, 0);
        prop_assert!(simulation.failed.len() as u32 <= simulation.sent / 100, "{:?}", simulation.failed);
    }

    #[test]
    fn any_mix_recovers_in_time(schedules in prop::collection::vec(any_schedule(), 1..4), seed in any::<u64>()) {
        let end = schedules.iter().filter_map(|schedule| schedule.last()).map(|(at, _)| *at).max().unwrap_or(1000);
        let mut simulation = Simulation::new(schedules, &Balance::P2c, seed);
        let bound = recovery_bound(Duration::from_millis(end - 1000));
        simulation.run(100, end / 1000 + bound.as_secs() + COOL_DOWN);
        let end = Duration::from_millis(end);
        prop_assert!(simulation.last_failure().saturating_sub(end) <= bound, "{:?}", simulation.last_failure());
    }
}
