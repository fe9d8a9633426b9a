//! Every key whose state outlives a reload, changed while that state is in use. `tests/it/reload.rs` refers to these
//! tests by key.

use std::{net::SocketAddr, time::Duration};

use super::*;
use crate::{
    resilience::{
        limit::LimitRefusal,
        outlier::{AttemptTimes, EndpointChange, EndpointOutcome},
        retry::RetrySettings,
    },
    units::Toggle,
};

const S: Duration = Duration::from_secs(1);

/// Reloads with a policy of these tables, in TOML.
fn reload(policy_state: &PolicyState, tables: &str, now: Instant) {
    #[derive(Default, serde::Deserialize)]
    #[serde(default)]
    struct Tables {
        breaker: BreakerSettings,
        outlier: OutlierSettings,
        retry: RetrySettings,
        limits: LimitSettings,
    }
    let tables: Tables = toml::from_str(tables).expect("valid tables");
    let policy = Policy {
        breaker: Toggle::on(tables.breaker),
        outlier: Toggle::on(tables.outlier),
        retry: Toggle::on(tables.retry),
        limits: Toggle::on(tables.limits),
        ..Policy::default()
    };
    policy_state.configure(&policy, now);
}

/// Fails this often. Returns whether the breaker is open then, and until when.
fn fail(policy_state: &PolicyState, times: u32, now: Instant) -> (bool, Option<Instant>) {
    for _ in 0..times {
        if let Ok(permit) = policy_state.breaker.admit(now).permit {
            policy_state.breaker.report(permit, Health::Failure, now, 0.0);
        }
    }
    let report = policy_state.breaker.state_report();
    (report.state == BreakerState::Open, report.until)
}

#[test]
fn breaker_consecutive_failures() {
    let now = Instant::now();
    let policy_state = PolicyState::new(now);
    reload(&policy_state, "breaker = { consecutive_failures = 2, failure_rate = 0.0 }", now);
    assert!(!fail(&policy_state, 1, now).0);
    reload(&policy_state, "breaker = { consecutive_failures = 4, failure_rate = 0.0 }", now);
    assert!(!fail(&policy_state, 2, now).0, "three in a row");
    assert!(fail(&policy_state, 1, now).0, "four");
}

#[test]
fn breaker_failure_rate_and_min_requests() {
    let now = Instant::now();
    for (before, after) in [
        ("failure_rate = 0.0, min_requests = 4", "failure_rate = 0.5, min_requests = 4"),
        ("failure_rate = 0.5, min_requests = 100", "failure_rate = 0.5, min_requests = 4"),
    ] {
        let policy_state = PolicyState::new(now);
        reload(&policy_state, &format!("breaker = {{ consecutive_failures = 0, {before} }}"), now);
        assert!(!fail(&policy_state, 10, now).0, "{before}");
        reload(&policy_state, &format!("breaker = {{ consecutive_failures = 0, {after} }}"), now);
        assert!(fail(&policy_state, 4, now).0, "{after}");
    }
}

#[test]
fn breaker_window() {
    let start = Instant::now();
    let policy_state = PolicyState::new(start);
    let table =
        |window| format!("breaker = {{ consecutive_failures = 0, min_requests = 4, window = \"{window}\" }}");
    reload(&policy_state, &table("1s"), start);
    fail(&policy_state, 2, start);
    assert!(!fail(&policy_state, 2, start + S * 5).0, "the first two are out of the window");
    reload(&policy_state, &table("60s"), start + S * 6);
    fail(&policy_state, 2, start + S * 7);
    assert!(fail(&policy_state, 2, start + S * 12).0, "all four are in the window");
}

#[test]
fn breaker_open_for_and_trial_requests() {
    let now = Instant::now();
    let policy_state = PolicyState::new(now);
    let table = |open_for: &str, trials: u32| {
        format!(
            "breaker = {{ consecutive_failures = 1, open_for = {{ {open_for} }}, trial_requests = {trials} }}"
        )
    };
    reload(&policy_state, &table("base = \"5s\", max = \"5s\"", 3), now);
    reload(&policy_state, &table("base = \"30s\", max = \"30s\"", 3), now);
    assert_eq!(fail(&policy_state, 1, now).1, Some(now + S * 30), "base");
    reload(&policy_state, &table("base = \"30s\", max = \"300s\"", 3), now);
    // A trial fails: the time doubles, up to the new limit.
    let half_open = now + S * 30;
    let (_, until) = fail(&policy_state, 1, half_open);
    assert!(until > Some(half_open + S * 40), "max: {until:?}");
    reload(&policy_state, &table("base = \"30s\", max = \"300s\"", 1), now);
    let half_open = half_open + S * 300;
    let permit = policy_state.breaker.admit(half_open).permit.expect("a trial");
    policy_state.breaker.report(permit, Health::Success, half_open, 0.0);
    assert_eq!(policy_state.breaker.state_report().state, BreakerState::Closed, "one trial is enough");
}

fn addresses(count: u16) -> Vec<SocketAddr> {
    (1..=count).map(|port| SocketAddr::from(([127, 0, 0, 1], port))).collect()
}

/// One failure at an endpoint. Returns until when it is ejected then.
fn fail_at(policy_state: &PolicyState, address: SocketAddr, now: Instant) -> Option<Instant> {
    let health = policy_state.outliers.endpoint(&address).expect("it is there");
    match policy_state.outliers.report(
        &address,
        &health,
        EndpointOutcome::Failure,
        AttemptTimes { began: now, ended: now },
        0.0,
    )? {
        EndpointChange::Ejected(ejection) => Some(ejection.until),
        _ => None,
    }
}

#[test]
fn outlier_keys() {
    let now = Instant::now();
    let policy_state = PolicyState::new(now);
    let all = addresses(4);
    policy_state.outliers.update(&all, now);
    reload(&policy_state, "outlier = { consecutive_failures = 5 }", now);
    assert_eq!(fail_at(&policy_state, all[0], now), None);
    let table = |keys: &str| format!("outlier = {{ consecutive_failures = 1, {keys} }}");
    reload(&policy_state, &table("eject_for = { base = \"30s\", max = \"30s\" }, max_ejected = 0.25"), now);
    assert_eq!(
        fail_at(&policy_state, all[0], now),
        Some(now + S * 30),
        "consecutive_failures and eject_for.base"
    );
    assert_eq!(fail_at(&policy_state, all[1], now), None, "at most one of four");
    reload(&policy_state, &table("eject_for = { base = \"30s\", max = \"600s\" }, max_ejected = 0.5"), now);
    assert!(fail_at(&policy_state, all[1], now).is_some(), "max_ejected");
    // A relapse: the time doubles, up to the new limit.
    let later = now + S * 31;
    assert!(fail_at(&policy_state, all[0], later) > Some(later + S * 35), "eject_for.max");
}

#[test]
fn retry_budget_keys() {
    let now = Instant::now();
    let policy_state = PolicyState::new(now);
    let budget = |ratio: f64, min: u32, window: &str| {
        let table = format!(
            "retry = {{ budget = {{ ratio = {ratio:?}, min_per_second = {min}, window = \"{window}\" }} }}"
        );
        reload(&policy_state, &table, now);
        policy_state.budget.available(now)
    };
    assert_eq!(budget(0.2, 1, "10s"), 10);
    assert_eq!(budget(0.2, 3, "10s"), 30, "min_per_second");
    assert_eq!(budget(0.2, 3, "20s"), 60, "window");
    assert!((0..60).all(|_| policy_state.budget.withdraw(now)));
    // What ten requests pay back.
    let paid_back = |ratio| {
        let before = budget(ratio, 3, "20s");
        for _ in 0..10 {
            policy_state.budget.deposit();
        }
        policy_state.budget.available(now) - before
    };
    assert!(paid_back(0.2) <= 3);
    assert!(paid_back(1.0) >= 9, "ratio");
}

#[test]
fn limits_keys() {
    let now = Instant::now();
    let policy_state = PolicyState::new(now);
    let waits = || policy_state.requests.enqueue(now, None, QueuedWaker(Waker::noop().clone()));
    reload(&policy_state, "limits = { max_requests = 1, max_pending = 0, max_connections = 1 }", now);
    assert!(policy_state.requests.try_acquire() && !policy_state.requests.try_acquire());
    assert!(policy_state.connections.try_acquire() && !policy_state.connections.try_acquire());
    assert!(matches!(waits(), Err(LimitRefusal::Limit | LimitRefusal::Queue)));
    reload(&policy_state, "limits = { max_requests = 2, max_pending = 0, max_connections = 2 }", now);
    assert!(policy_state.requests.try_acquire() && !policy_state.requests.try_acquire(), "max_requests");
    assert!(
        policy_state.connections.try_acquire() && !policy_state.connections.try_acquire(),
        "max_connections"
    );
    reload(&policy_state, "limits = { max_requests = 2, max_pending = 2, pending_timeout = \"3s\" }", now);
    let first = waits().expect("max_pending");
    reload(&policy_state, "limits = { max_requests = 2, max_pending = 2, pending_timeout = \"7s\" }", now);
    let second = waits().expect("max_pending");
    assert_eq!((first.expires_at, second.expires_at), (now + S * 3, now + S * 7), "pending_timeout");
    assert!(!policy_state.requests.finish_wait(first) && !policy_state.requests.finish_wait(second));
    reload(&policy_state, "limits = { adaptive = true }", now);
    assert_eq!(policy_state.requests.limit(), ADAPTIVE_START, "adaptive");
}

/// Nothing recorded before counts against the new settings of another table.
#[test]
fn a_reload_keeps_the_state() {
    let now = Instant::now();
    let policy_state = PolicyState::new(now);
    reload(&policy_state, "breaker = { consecutive_failures = 2 }", now);
    assert!(fail(&policy_state, 2, now).0);
    reload(&policy_state, "breaker = { consecutive_failures = 50 }\nlimits = { max_requests = 3 }", now);
    assert!(policy_state.breaker.state_report().state == BreakerState::Open);
}
