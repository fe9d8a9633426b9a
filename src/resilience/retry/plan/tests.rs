//! Thousands of schedules in virtual time: the machine with the real breaker, budget, back-off and outlier detection. The
//! rules are written anew here, from the documentation and not from the code.

mod steps;
mod world;

use std::{
    collections::BTreeMap,
    hash::RandomState,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use http::{Method, StatusCode};
use proptest::{prelude::*, strategy::ValueTree, test_runner::TestRunner};

use super::{
    super::{
        super::{
            backoff::{BackoffSettings, RetryHint},
            breaker::{Breaker, BreakerPermit, BreakerSettings, GrowingDuration},
            budget::{BudgetSettings, RetryBudget},
            classify::{AttemptOutcome, ConnectFailure, Reset},
            hedge::{self, HedgeAfter, HedgeSettings},
            outlier::{EndpointHealth, EndpointOutcome, OutlierDetector, OutlierSettings},
            rate::{RateKey, RateLimit, RateSettings},
        },
        RetryMethods, RetrySettings,
        decide::Replayability,
    },
    *,
};
use crate::units::{HumanDuration, Ratio};
use world::*;

/// An event must be followed by what it allows, and the machine must not give up where it need not.
fn check_answer(event: &Event, action: &Action) {
    let in_time = |time_left: &Option<Duration>| time_left.is_none_or(|left| left >= MS);
    match event {
        Event::Ready { time_left } if in_time(time_left) => assert_eq!(*action, Action::Admit),
        Event::Admitted => assert_eq!(*action, Action::Pick),
        Event::Picked { has_body: true } => assert!(matches!(action, Action::Send(_)), "{action:?}"),
        Event::Failed(failed) if failed.body == Replayability::NotKept => {
            // That one of two loopback addresses refuses a connection is found out before the body matters.
            let is_sibling = failed.has_sibling && matches!(failed.outcome.kind, OutcomeKind::Connect(_));
            assert!(is_sibling || matches!(action, Action::Finish(_)), "{action:?} without a body");
        }
        _ => {}
    }
}

impl Scripted {
    fn is_success(&self) -> bool {
        matches!(self.ending, OutcomeKind::Http(status) if status.is_success())
    }

    fn outcome(&self) -> AttemptOutcome {
        AttemptOutcome { kind: self.ending, advice: self.advice }
    }
}

fn http(code: u16) -> OutcomeKind {
    OutcomeKind::Http(StatusCode::from_u16(code).unwrap())
}

fn ending() -> impl Strategy<Value = OutcomeKind> {
    let reset = |(reused, request_sent, response_begun)| {
        OutcomeKind::Reset(Reset { reused, request_sent, response_started: response_begun })
    };
    prop_oneof![
        4 => Just(http(200)),
        4 => Just(http(503)),
        1 => Just(http(500)),
        3 => Just(OutcomeKind::Connect(ConnectFailure::Refused)),
        1 => Just(OutcomeKind::Connect(ConnectFailure::PeerIdentity)),
        2 => Just(OutcomeKind::RefusedStream),
        3 => (any::<bool>(), any::<bool>(), any::<bool>()).prop_map(reset),
        2 => Just(OutcomeKind::AttemptTimeout),
    ]
}

fn scripted() -> impl Strategy<Value = Scripted> {
    let advice = prop_oneof![6 => Just(RetryAdvice::None), 1 => Just(RetryAdvice::No), 2 => Just(RetryAdvice::Elsewhere)];
    let hint = prop_oneof![
        8 => Just(RetryHint::None),
        1 => (1u64..200).prop_map(|ms| RetryHint::After(Duration::from_millis(ms))),
        1 => (0u64..200).prop_map(|ms| RetryHint::Exactly(Duration::from_millis(ms))),
        1 => Just(RetryHint::Never),
    ];
    (0u64..60, ending(), advice, hint, prop::bool::weighted(0.05)).prop_map(
        |(took_ms, ending, advice, hint, loses_body)| {
            // Only a response can bring advice, and one that is no failure is not refused.
            let is_failure = matches!(ending, OutcomeKind::Http(status) if status.is_server_error());
            let advice = if is_failure { advice } else { RetryAdvice::None };
            Scripted { took_ms, ending, advice, hint, loses_body }
        },
    )
}

fn arrival() -> impl Strategy<Value = Arrival> {
    (
        0u64..30,
        0u8..4,
        prop::bool::weighted(0.2),
        prop::bool::weighted(0.1),
        prop::option::of(1u64..300),
        prop::option::weighted(0.1, 0u64..200),
    )
        .prop_map(|(after_ms, method, idempotency_key, is_grpc, deadline_ms, leaves_ms)| Arrival {
            after_ms,
            method,
            idempotency_key,
            is_grpc,
            deadline_ms,
            leaves_ms,
        })
}

fn retry() -> impl Strategy<Value = Option<RetrySettings>> {
    let methods = prop_oneof![
        4 => Just(RetryMethods::Idempotent),
        1 => Just(RetryMethods::All),
        1 => Just(RetryMethods::Listed(vec!["PATCH".to_owned(), "GET".to_owned()])),
    ];
    let budget = (prop_oneof![Just(0.0), Just(0.2), Just(1.0)], 0u32..40, 100u64..2000).prop_map(
        |(ratio, min_per_second, window)| BudgetSettings {
            ratio: Ratio::constant(ratio),
            min_per_second,
            window: HumanDuration::from_millis(window),
        },
    );
    let settings = (0u32..4, methods, budget, 0u64..40).prop_map(|(max, methods, budget, base)| {
        let backoff = BackoffSettings { base: HumanDuration::from_millis(base), ..Default::default() };
        RetrySettings { max, methods, budget, backoff, ..RetrySettings::default() }
    });
    prop::option::weighted(0.9, settings)
}

fn setup() -> impl Strategy<Value = Setup> {
    let breaker = (1u32..12, 1u32..4, 1u64..200).prop_map(|(failures, trial_requests, open_ms)| {
        let open_for =
            GrowingDuration { base: HumanDuration::from_millis(open_ms), max: HumanDuration::from_secs(60) };
        BreakerSettings { consecutive_failures: failures, trial_requests, open_for, ..Default::default() }
    });
    let endpoints = (1usize..4, any::<bool>(), prop::bool::weighted(0.2));
    (
        retry(),
        breaker,
        prop::option::of(0u64..40),
        prop::bool::weighted(0.1),
        endpoints,
        prop::collection::vec(scripted(), 1..30),
        prop::collection::vec(arrival(), 1..25),
        any::<u64>(),
    )
        .prop_map(|(retry, breaker, hedge_ms, observes_retries, endpoints, script, arrivals, seed)| {
            let (endpoints, last_is_unhealthy, are_siblings) = endpoints;
            Setup {
                retry,
                breaker,
                hedge_ms,
                observes_retries,
                endpoints,
                last_is_unhealthy,
                are_siblings,
                script,
                arrivals,
                seed,
            }
        })
}

/// Plays a schedule to its end. Returns how many retries, hedges, free attempts and moves there were.
fn play(setup: &Setup) -> [u32; 4] {
    let policy = RetryPolicy::new(setup.retry.clone());
    let start = Instant::now();
    let budget = RetryBudget::new(setup.retry.clone().unwrap_or_default().budget);
    let moves = RateSettings { rate: 1000, burst: 1000, per: RateKey::Upstream };
    let moves = RateLimit::new(&moves, start, RandomState::new());
    let limits = SharedLimits { budget: &budget, moves: &moves };
    let mut world = World::new(setup, &policy, limits, start);
    world.run();
    world.check_end();
    let sum = |what: fn(&Request<'_>) -> u32| world.requests.iter().map(what).sum();
    [
        sum(|request| request.counting.saturating_sub(1)),
        sum(|request| u32::from(request.was_hedged)),
        sum(|request| request.reconnects),
        sum(|request| request.elsewhere),
    ]
}

/// Schedules in which nothing happens would show nothing.
#[test]
fn the_schedules_have_everything_that_can_happen() {
    let mut runner = TestRunner::deterministic();
    let mut met = [0; 4];
    for _ in 0..100 {
        let setup = setup().new_tree(&mut runner).unwrap().current();
        met.iter_mut().zip(play(&setup)).for_each(|(all, one)| *all += one);
    }
    assert!(met.iter().all(|count| *count > 20), "{met:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Attempts within their number, budget, deadline; nothing after the response, nothing twice that must not be; every
    /// permit and grant returned; an end.
    #[test]
    fn no_schedule_breaks_a_rule_of_retries(setup in setup()) {
        play(&setup);
    }
}
