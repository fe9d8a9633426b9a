use super::*;
use crate::units::Toggle;

/// The ceiling follows `max_requests`, up as well as down.
#[test]
fn a_reload_moves_the_ceiling_of_the_adaptive_limit() {
    use crate::resilience::classify::Health;
    let (guards, start) = (Guards::new(Instant::now()), Instant::now());
    let limits = LimitSettings { adaptive: true, max_requests: 40, ..LimitSettings::default() };
    let configure = |max_requests| {
        let limits = LimitSettings { max_requests, ..limits };
        guards.configure(&Policy { limits: Toggle::on(limits), ..Policy::default() }, start);
    };
    let mut now = start;
    // Constant latency, all permits in use: the limit grows as far as it may.
    let mut grow = || {
        while guards.requests.try_acquire() {}
        for _ in 0..500 {
            now += std::time::Duration::from_millis(20);
            let adaptive = guards.adaptive.load_full().expect("it is on");
            adaptive.record(std::time::Duration::from_millis(5), Health::Success, &guards.requests, now);
            while guards.requests.try_acquire() {}
        }
        guards.requests.limit()
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
    let guards = Guards::new(now);
    guards.configure(&Policy::default(), now);
    while let Ok(permit) = guards.breaker.admit(now).permit {
        let _ = guards.report("up", permit, (Health::Failure, true), now, 0.5);
    }
    let mut changed = std::pin::pin!(guards.reachability.changed());
    let mut cx = Context::from_waker(Waker::noop());
    assert!(changed.as_mut().poll(&mut cx).is_pending());
    guards.offer_trial();
    assert!(changed.as_mut().poll(&mut cx).is_ready());
    assert!(guards.breaker.admit(now).permit.is_ok(), "the trial");
}

#[test]
fn every_worker_gets_the_same_quantile() {
    let (guards, now) = (Guards::new(Instant::now()), Instant::now());
    let quantiles: Vec<_> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..8).map(|_| scope.spawn(|| guards.quantile(95, now))).collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    assert!(quantiles.iter().all(|live| Arc::ptr_eq(live, &guards.quantile(95, now))));
    assert!(!Arc::ptr_eq(&quantiles[0], &guards.quantile(50, now)));
}

#[test]
fn a_reload_keeps_what_the_adaptive_limit_has_learned() {
    let (guards, now) = (Guards::new(Instant::now()), Instant::now());
    let limits = LimitSettings { adaptive: true, ..LimitSettings::default() };
    let policy = Policy { limits: Toggle::on(limits), ..Policy::default() };
    guards.configure(&policy, now);
    assert_eq!(guards.requests.limit(), ADAPTIVE_START);
    guards.requests.set_adaptive_limit(77, now);
    guards.configure(&policy, now);
    assert_eq!(guards.requests.limit(), 77);
    let smaller = LimitSettings { max_requests: 50, ..limits };
    guards.configure(&Policy { limits: Toggle::on(smaller), ..Policy::default() }, now);
    assert_eq!(guards.requests.limit(), 50, "never above what is configured");
    guards.configure(&Policy::default(), now);
    assert_eq!(guards.requests.limit(), LimitSettings::default().max_requests, "switched off");
}

/// A flood of requests to absent endpoints must not become a flood of connections.
#[test]
fn requests_that_switch_endpoints_are_limited_per_second() {
    let now = Instant::now();
    let guards = Guards::new(now);
    let switched = |at| (0..5000).filter(|_| guards.attempt_limits().moves.admit(&[], at).is_ok()).count();
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
        let guards = Guards::new(now);
        guards.configure(&Policy::default(), now);
        let address = ([127, 0, 0, 1], 1).into();
        guards.outliers.update(&[address], now);
        let health = guards.outliers.endpoint(&address).expect("a known endpoint");
        guards.outliers.report(&address, &health, EndpointOutcome::Refused, (now, now), 0.5);
        guards.outliers.record_connection_probe(&address, awaits_probe, now);
        let later = now + std::time::Duration::from_millis(10);
        while let Ok(permit) = guards.breaker.admit(later).permit {
            if guards.report("up", permit, (Health::Failure, true), later, 0.5).is_some() {
                break;
            }
        }
        assert_eq!(guards.breaker.admit(later).permit.is_ok(), awaits_probe);
    }
}
