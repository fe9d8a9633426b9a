use super::*;
use crate::{resilience::outlier::AttemptTimes, units::Toggle};

/// The ceiling follows `max_requests`, up as well as down.
#[test]
fn a_reload_moves_the_ceiling_of_the_adaptive_limit() {
    use crate::resilience::classify::Health;
    let (policy_state, start) = (PolicyState::new(Instant::now()), Instant::now());
    let limits = LimitSettings { adaptive: true, max_requests: 40, ..LimitSettings::default() };
    let configure = |max_requests| {
        let limits = LimitSettings { max_requests, ..limits };
        policy_state.configure(&Policy { limits: Toggle::on(limits), ..Policy::default() }, start);
    };
    let mut now = start;
    // Constant latency, all permits in use: the limit grows as far as it may.
    let mut grow = || {
        while policy_state.requests.try_acquire() {}
        for _ in 0..500 {
            now += std::time::Duration::from_millis(20);
            let adaptive = policy_state.adaptive.load_full().expect("it is on");
            adaptive.record(
                std::time::Duration::from_millis(5),
                Health::Success,
                &policy_state.requests,
                now,
            );
            while policy_state.requests.try_acquire() {}
        }
        policy_state.requests.limit()
    };
    configure(40);
    assert_eq!(grow(), 40);
    configure(60);
    assert_eq!(grow(), 60, "raised");
    configure(20);
    assert_eq!(grow(), 20, "lowered");
}

/// They may have checked between the transition to "open", which notifies them, and the offer.
#[test]
fn an_offered_trial_notifies_waiting_requests() {
    use std::{
        future::Future,
        task::{Context, Waker},
    };

    use crate::resilience::classify::Health;
    let now = Instant::now();
    let policy_state = PolicyState::new(now);
    policy_state.configure(&Policy::default(), now);
    while let Ok(permit) = policy_state.breaker.admit(now).permit {
        let _ = policy_state.report(
            "up",
            permit,
            BreakerOutcome { health: Health::Failure, is_absence: true },
            now,
            0.5,
        );
    }
    let mut changed = std::pin::pin!(policy_state.reachability.changed());
    let mut cx = Context::from_waker(Waker::noop());
    assert!(changed.as_mut().poll(&mut cx).is_pending());
    policy_state.offer_trial();
    assert!(changed.as_mut().poll(&mut cx).is_ready());
    assert!(policy_state.breaker.admit(now).permit.is_ok(), "the trial");
}

#[test]
fn every_worker_gets_the_same_quantile() {
    let (policy_state, now) = (PolicyState::new(Instant::now()), Instant::now());
    let quantiles: Vec<_> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..8).map(|_| scope.spawn(|| policy_state.quantile(95, now))).collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    assert!(quantiles.iter().all(|live| Arc::ptr_eq(live, &policy_state.quantile(95, now))));
    assert!(!Arc::ptr_eq(&quantiles[0], &policy_state.quantile(50, now)));
}

#[test]
fn a_reload_keeps_what_the_adaptive_limit_has_learned() {
    let (policy_state, now) = (PolicyState::new(Instant::now()), Instant::now());
    let limits = LimitSettings { adaptive: true, ..LimitSettings::default() };
    let policy = Policy { limits: Toggle::on(limits), ..Policy::default() };
    policy_state.configure(&policy, now);
    assert_eq!(policy_state.requests.limit(), ADAPTIVE_START);
    policy_state.requests.set_adaptive_limit(77, now);
    policy_state.configure(&policy, now);
    assert_eq!(policy_state.requests.limit(), 77);
    let smaller = LimitSettings { max_requests: 50, ..limits };
    policy_state.configure(&Policy { limits: Toggle::on(smaller), ..Policy::default() }, now);
    assert_eq!(policy_state.requests.limit(), 50, "never above what is configured");
    policy_state.configure(&Policy::default(), now);
    assert_eq!(policy_state.requests.limit(), LimitSettings::default().max_requests, "switched off");
}

/// A flood of requests to absent endpoints must not become a flood of connections.
#[test]
fn requests_that_switch_endpoints_are_limited_per_second() {
    let now = Instant::now();
    let policy_state = PolicyState::new(now);
    let switched =
        |at| (0..5000).filter(|_| policy_state.attempt_limits().moves.admit(&[], at).is_ok()).count();
    assert_eq!(switched(now), 1000);
    let half = switched(now + std::time::Duration::from_millis(500));
    assert!((499..=500).contains(&half), "{half}");
}

/// If an endpoint accepted a connection again while the breaker was still closed, the breaker admits a trial as soon as it
/// opens: nothing else would offer one before `open_for` has elapsed.
#[test]
fn a_breaker_that_opens_while_an_endpoint_awaits_its_probe_admits_a_trial() {
    use crate::resilience::{classify::Health, outlier::EndpointOutcome};
    let now = Instant::now();
    for awaits_probe in [false, true] {
        let policy_state = PolicyState::new(now);
        policy_state.configure(&Policy::default(), now);
        let address = ([127, 0, 0, 1], 1).into();
        policy_state.outliers.update(&[address], now);
        let health = policy_state.outliers.endpoint(&address).expect("a known endpoint");
        policy_state.outliers.report(
            &address,
            &health,
            EndpointOutcome::Refused,
            AttemptTimes { began: now, ended: now },
            0.5,
        );
        policy_state.outliers.record_connection_probe(&address, awaits_probe, now);
        let later = now + std::time::Duration::from_millis(10);
        while let Ok(permit) = policy_state.breaker.admit(later).permit {
            if policy_state
                .report(
                    "up",
                    permit,
                    BreakerOutcome { health: Health::Failure, is_absence: true },
                    later,
                    0.5,
                )
                .is_some()
            {
                break;
            }
        }
        assert_eq!(policy_state.breaker.admit(later).permit.is_ok(), awaits_probe);
    }
}
