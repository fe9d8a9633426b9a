use proptest::prelude::*;

use super::*;

const S: Duration = Duration::from_secs(1);
const MS: Duration = Duration::from_millis(1);

fn fail(breaker: &Arc<Breaker>, now: Instant) -> Option<BreakerTransition> {
    try_once(breaker, Health::Failure, now)
}

fn fail_times(times: u32, breaker: &Arc<Breaker>, now: Instant) {
    for _ in 0..times {
        fail(breaker, now);
    }
}

fn try_once(breaker: &Arc<Breaker>, health: Health, now: Instant) -> Option<BreakerTransition> {
    let admission = breaker.admit(now);
    let transition = breaker.report(admission.permit.unwrap(), health, now, 0.5);
    transition.or(admission.transition)
}

fn refused(breaker: &Arc<Breaker>, now: Instant) -> Option<Duration> {
    breaker.admit(now).permit.err().map(|refused| refused.retry_after)
}

fn opened(now: Instant) -> Arc<Breaker> {
    let breaker = Breaker::new(BreakerSettings::default(), now);
    fail_times(10, &breaker, now);
    assert_eq!(breaker.state_report().state, BreakerState::Open);
    breaker
}

#[test]
fn opens_after_consecutive_failures_with_the_reason() {
    let now = Instant::now();
    let breaker = Breaker::new(BreakerSettings::default(), now);
    for _ in 0..9 {
        assert_eq!(fail(&breaker, now), None);
    }
    try_once(&breaker, Health::Success, now);
    for _ in 0..9 {
        assert_eq!(fail(&breaker, now), None);
        try_once(&breaker, Health::Neutral, now);
    }
    let transition = fail(&breaker, now).unwrap();
    assert_eq!((transition.from, transition.to), (BreakerState::Closed, BreakerState::Open));
    assert_eq!(transition.reason.to_string(), "10 failures in a row");
    assert_eq!(transition.until, Some(now + S * 5));
    assert_eq!(refused(&breaker, now + S), Some(S * 4));
    assert!(!breaker.is_closed());
}

#[test]
fn opens_at_the_failure_rate_once_there_are_enough_requests() {
    let now = Instant::now();
    let settings = BreakerSettings { consecutive_failures: 0, ..BreakerSettings::default() };
    let breaker = Breaker::new(settings, now);
    for n in 0..10u32 {
        try_once(&breaker, Health::Success, now + MS * n);
        if n < 9 {
            assert_eq!(fail(&breaker, now + MS * n), None);
        }
    }
    let why = fail(&breaker, now + S).unwrap().reason;
    assert_eq!(why, TransitionReason::FailureRate { failures: 10, requests: 20 });

    let forgetful = Breaker::new(settings, now);
    fail_times(19, &forgetful, now);
    assert_eq!(fail(&forgetful, now + S * 10), None, "failures older than the window do not count");

    let off = BreakerSettings { failure_rate: Ratio::constant(0.0), ..settings };
    let off = Breaker::new(off, now);
    assert!((0..1000).all(|_| fail(&off, now).is_none()));
}

#[test]
fn half_open_closes_only_when_all_trials_succeed() {
    let start = Instant::now();
    let breaker = opened(start);
    let now = start + S * 5;
    let first = breaker.admit(now);
    assert_eq!(first.transition.map(|t| (t.from, t.to)), Some((BreakerState::Open, BreakerState::HalfOpen)));
    let trials =
        [first.permit.unwrap(), breaker.admit(now).permit.unwrap(), breaker.admit(now).permit.unwrap()];
    assert!(trials.iter().all(BreakerPermit::is_trial));
    assert!(refused(&breaker, now).is_some());
    let transitions: Vec<_> =
        trials.into_iter().map(|trial| breaker.report(trial, Health::Success, now, 0.5)).collect();
    assert_eq!(transitions[..2], [None, None]);
    assert_eq!(
        transitions[2].map(|t| (t.to, t.reason)),
        Some((BreakerState::Closed, TransitionReason::TrialsSucceeded))
    );
    assert!(breaker.is_closed());
}

#[test]
fn a_failed_trial_doubles_the_open_time() {
    let start = Instant::now();
    let breaker = opened(start);
    let mut now = start + S * 5;
    for expected in [10u32, 20, 40, 60, 60] {
        let permit = breaker.admit(now).permit.unwrap();
        let transition = breaker.report(permit, Health::Failure, now, 0.0).unwrap();
        assert_eq!(transition.until, Some(now + S * expected));
        now += S * expected;
    }
    let growing = BreakerSettings::default().open_for;
    assert_eq!(growing.nth(0, 1.0), S * 5, "the first is exact");
    assert_eq!(growing.nth(1, 1.0), S * 8, "later ones are up to a fifth shorter");
    assert!(growing.nth(u32::MAX, 0.3) <= S * 60);
}

#[test]
fn a_dropped_trial_frees_its_slot() {
    let start = Instant::now();
    let breaker = opened(start);
    let now = start + S * 5;
    let mut trials: Vec<BreakerPermit> = (0..3).map(|_| breaker.admit(now).permit.unwrap()).collect();
    assert!(refused(&breaker, now).is_some());
    drop(trials.pop());
    let again = breaker.admit(now).permit.unwrap();
    assert!(refused(&breaker, now).is_some());
    assert_eq!(breaker.report(again, Health::Neutral, now, 0.5), None);
    assert!(breaker.admit(now).permit.is_ok());
}

#[test]
fn ignores_attempts_admitted_before_a_transition() {
    let start = Instant::now();
    let breaker = Breaker::new(BreakerSettings::default(), start);
    let mut old: Vec<BreakerPermit> = (0..30).map(|_| breaker.admit(start).permit.unwrap()).collect();
    fail_times(10, &breaker, start);
    let now = start + S * 5;
    let trial = breaker.admit(now).permit.unwrap();
    for permit in old.drain(..10) {
        assert_eq!(breaker.report(permit, Health::Success, now, 0.5), None);
    }
    for permit in old.drain(..10) {
        assert_eq!(breaker.report(permit, Health::Failure, now, 0.5), None);
    }
    assert_eq!(breaker.state_report().state, BreakerState::HalfOpen);
    breaker.report(trial, Health::Failure, now, 0.5);
    let since = breaker.state_report().since;
    for permit in old {
        assert_eq!(breaker.report(permit, Health::Failure, now + S, 0.5), None);
    }
    assert_eq!(breaker.state_report().since, since);
}

#[test]
fn a_success_from_before_a_transition_does_not_reset_consecutive_failures() {
    let start = Instant::now();
    let breaker = Breaker::new(BreakerSettings::default(), start);
    let old = breaker.admit(start).permit.unwrap();
    fail_times(10, &breaker, start);
    let now = start + S * 5;
    for _ in 0..3 {
        try_once(&breaker, Health::Success, now);
    }
    fail_times(9, &breaker, now);
    assert_eq!(breaker.report(old, Health::Success, now, 0.5), None);
    assert_eq!(fail(&breaker, now).map(|t| t.to), Some(BreakerState::Open));
}

#[test]
fn a_trial_of_an_earlier_generation_frees_no_slot() {
    let start = Instant::now();
    let breaker = opened(start);
    let now = start + S * 5;
    let late = breaker.admit(now).permit.unwrap();
    fail(&breaker, now);
    let now = now + S * 10;
    let _trials: Vec<BreakerPermit> = (0..3).map(|_| breaker.admit(now).permit.unwrap()).collect();
    drop(late);
    assert!(refused(&breaker, now).is_some());
}

#[test]
fn a_forced_state_expires() {
    let now = Instant::now();
    let breaker = Breaker::new(BreakerSettings::default(), now);
    let transition = breaker.force(BreakerMode::Open, Some(now + S * 60), now).unwrap();
    assert_eq!((transition.to, transition.reason), (BreakerState::Open, TransitionReason::Manual));
    assert_eq!(refused(&breaker, now + S * 59), Some(S));
    assert!(breaker.admit(now + S * 60).permit.is_ok());
    assert_eq!(breaker.state_report().reason, TransitionReason::ManualExpired);

    breaker.force(BreakerMode::Closed, Some(now + S * 120), now);
    assert!((0..100).all(|_| fail(&breaker, now + S * 61).is_none()), "forced closed stays closed");
    let expired = fail(&breaker, now + S * 120).unwrap();
    assert_eq!(expired.reason, TransitionReason::ManualExpired);
    fail_times(10, &breaker, now + S * 121);
    assert_eq!(breaker.state_report().state, BreakerState::Open);

    breaker.force(BreakerMode::Open, Some(now + S * 200), now + S * 122);
    let reset_to_auto = breaker.force(BreakerMode::Auto, None, now + S * 122).unwrap();
    assert_eq!(
        (reset_to_auto.to, reset_to_auto.reason),
        (BreakerState::Closed, TransitionReason::ManualReset)
    );
    assert!(!breaker.state_report().reason.to_string().contains("by hand"));

    breaker.force(BreakerMode::Closed, Some(now + S * 200), now + S * 122);
    assert_eq!(breaker.tick(now + S * 199), None);
    assert_eq!(breaker.tick(now + S * 200).map(|t| t.to), Some(BreakerState::Closed));
    assert_eq!(breaker.state_report().mode, BreakerMode::Auto);
    assert_eq!(breaker.force(BreakerMode::Auto, None, now), None, "it was auto already");
}

#[test]
fn a_reload_keeps_the_state() {
    let start = Instant::now();
    let breaker = opened(start);
    breaker.configure(BreakerSettings { trial_requests: 1, ..BreakerSettings::default() });
    assert!(refused(&breaker, start + S).is_some());
    let trial = breaker.admit(start + S * 5).permit.unwrap();
    assert!(refused(&breaker, start + S * 5).is_some());
    breaker.report(trial, Health::Success, start + S * 5, 0.5);
    assert!(breaker.is_closed());
}

#[test]
fn a_reload_with_fewer_trials_closes_a_half_open_breaker() {
    let start = Instant::now();
    let breaker = opened(start);
    for _ in 0..2 {
        try_once(&breaker, Health::Success, start + S * 5);
    }
    assert_eq!(breaker.state_report().state, BreakerState::HalfOpen);
    breaker.configure(BreakerSettings { trial_requests: 1, ..BreakerSettings::default() });
    assert!(breaker.admit(start + S * 6).permit.is_ok(), "two have succeeded, one is required");
    assert!(breaker.is_closed());
}

#[test]
fn workers_share_one_state() {
    let now = Instant::now();
    let breaker = Breaker::new(BreakerSettings { consecutive_failures: 1000, ..Default::default() }, now);
    let opened: usize = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    (0..400)
                        .filter_map(|_| breaker.admit(now).permit.ok())
                        .filter_map(|permit| breaker.report(permit, Health::Failure, now, 0.5))
                        .count()
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    assert_eq!(opened, 1, "it opens once, whichever worker reports");
    assert_eq!(breaker.state_report().state, BreakerState::Open);
}

#[derive(Clone, Debug)]
enum Event {
    Admit,
    Report(usize, Health),
    Lose(usize),
    Pass(u16),
    OfferTrial,
    Force(BreakerMode, Option<u16>),
}

fn event() -> impl Strategy<Value = Event> {
    let health = || prop_oneof![Just(Health::Success), Just(Health::Failure), Just(Health::Neutral)];
    let mode = prop_oneof![Just(BreakerMode::Auto), Just(BreakerMode::Open), Just(BreakerMode::Closed)];
    prop_oneof![
        8 => Just(Event::Admit),
        6 => (any::<usize>(), health()).prop_map(|(which, health)| Event::Report(which, health)),
        2 => any::<usize>().prop_map(Event::Lose),
        3 => (0u16..8000).prop_map(Event::Pass),
        2 => Just(Event::OfferTrial),
        1 => (mode, prop::option::of(0u16..8000)).prop_map(|(mode, after)| Event::Force(mode, after)),
    ]
}

proptest! {
    #[test]
    fn holds_its_invariants(
        events in prop::collection::vec(event(), 1..250),
        trial_requests in 1u32..5, consecutive_failures in 0u32..4, random in 0.0f64..1.0,
    ) {
        let settings = BreakerSettings {
            trial_requests, consecutive_failures, min_requests: 4, window: HumanDuration::from_secs(2),
            open_for: GrowingDuration { base: HumanDuration::from_secs(1), max: HumanDuration::from_secs(4) },
            ..BreakerSettings::default()
        };
        let mut now = Instant::now();
        let breaker = Breaker::new(settings, now);
        let mut out: Vec<BreakerPermit> = Vec::new();
        let mut state = BreakerState::Closed;
        let mut offered = false;
        for event in events {
            let transition = match event {
                Event::Pass(ms) => { now += MS * u32::from(ms); None }
                Event::OfferTrial => { offered |= breaker.allow_early_trial(); None }
                Event::Lose(which) => { if !out.is_empty() { out.swap_remove(which % out.len()); } None }
                Event::Force(mode, after) => breaker.force(mode, after.map(|ms| now + MS * u32::from(ms)), now),
                Event::Admit => {
                    let admission = breaker.admit(now);
                    if let Some(transition) = admission.transition { state = transition.to; }
                    match admission.permit {
                        Ok(permit) => {
                            prop_assert_eq!(permit.is_trial(), state != BreakerState::Closed);
                            prop_assert!(state != BreakerState::Open || offered);
                            out.push(permit);
                        }
                        Err(_) => prop_assert!(state != BreakerState::Closed),
                    }
                    None
                }
                Event::Report(which, health) if !out.is_empty() => {
                    let permit = out.swap_remove(which % out.len());
                    breaker.report(permit, health, now, random)
                }
                Event::Report(..) => None,
            };
            if let Some(transition) = transition {
                prop_assert_eq!(transition.from, state);
                state = transition.to;
            }
            let report = breaker.state_report();
            prop_assert_eq!(report.state, state, "every change is reported");
            prop_assert_eq!(breaker.is_closed(), state == BreakerState::Closed);
            let live = report_generation(&breaker);
            let trials = out.iter().filter(|permit| permit.is_trial() && permit.generation == live).count();
            prop_assert!(trials <= trial_requests as usize);
            // Open always ends by itself, unless it is forced.
            prop_assert!(state != BreakerState::Open || report.until.is_some() || report.mode == BreakerMode::Open);
        }
        // Once the upstream succeeds again, it closes.
        drop(out);
        breaker.force(BreakerMode::Auto, None, now);
        for _ in 0..20 {
            now += S * 4;
            if let Ok(permit) = breaker.admit(now).permit {
                breaker.report(permit, Health::Success, now, random);
            }
        }
        prop_assert_eq!(breaker.state_report().state, BreakerState::Closed);
    }
}

fn report_generation(breaker: &Breaker) -> u64 {
    breaker.lock().generation
}

#[test]
fn an_early_trial_that_succeeds_half_opens_the_breaker() {
    let now = Instant::now();
    let breaker = Breaker::new(BreakerSettings::default(), now);
    assert!(!breaker.allow_early_trial(), "closed: nothing to do");
    let breaker = opened(now);
    assert!(breaker.allow_early_trial());
    assert!(!breaker.allow_early_trial(), "one at a time");
    let trial = breaker.admit(now).permit.unwrap();
    assert!(trial.is_trial() && refused(&breaker, now).is_some());
    assert_eq!(breaker.state_report().state, BreakerState::Open, "nothing has succeeded yet");
    let transition = breaker.report(trial, Health::Success, now, 0.5).unwrap();
    assert_eq!((transition.to, transition.reason), (BreakerState::HalfOpen, TransitionReason::Reachable));
    assert_eq!(try_once(&breaker, Health::Success, now), None);
    assert_eq!(try_once(&breaker, Health::Success, now).map(|t| t.to), Some(BreakerState::Closed));
    breaker.force(BreakerMode::Open, None, now);
    assert!(!breaker.allow_early_trial(), "a forced state admits no trial");
}

#[test]
fn an_early_trial_that_fails_changes_nothing() {
    let start = Instant::now();
    let breaker = opened(start);
    for n in 1..200u32 {
        let now = start + MS * 10 * n;
        assert!(breaker.allow_early_trial(), "after every failed one");
        assert_eq!(try_once(&breaker, Health::Failure, now), None);
        assert_eq!(breaker.state_report().until, Some(start + S * 5));
    }
    // Nor does one that fails after another one has succeeded.
    breaker.allow_early_trial();
    try_once(&breaker, Health::Success, start + S * 3).unwrap();
    let transition = try_once(&breaker, Health::Failure, start + S * 3).unwrap();
    assert_eq!((transition.to, transition.until), (BreakerState::Open, Some(start + S * 5)));
    // A trial after the open time does.
    let permit = breaker.admit(start + S * 5).permit.unwrap();
    let transition = breaker.report(permit, Health::Failure, start + S * 5, 0.0).unwrap();
    assert_eq!(transition.until, Some(start + S * 15));
}

#[test]
fn a_dropped_early_trial_can_be_repeated() {
    let now = Instant::now();
    let breaker = opened(now);
    breaker.allow_early_trial();
    drop(breaker.admit(now).permit.unwrap());
    assert!(breaker.admit(now).permit.unwrap().is_trial());
}
