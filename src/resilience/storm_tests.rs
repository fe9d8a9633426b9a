//! A chain of three services, each with its sidecar, in virtual time: the load on the last one while it fails.

use std::time::{Duration, Instant};

use http::{Method, StatusCode};

use super::{
    backoff::RetryHint,
    breaker::{Breaker, BreakerSettings},
    budget::RetryBudget,
    classify::{AttemptOutcome, Health, OutcomeKind, RetryAdvice},
    retry::{FailedAttempt, Replayability, RetryContext, RetryDecision, RetryPolicy, RetrySettings},
};

/// The outbound side of a sidecar, from one service to the next.
struct Hop {
    retry: RetryPolicy,
    budget: RetryBudget,
    breaker: std::sync::Arc<Breaker>,
}

struct Chain {
    hops: Vec<Hop>,
    use_breaker: bool,
    pass_advice: bool,
    /// The control experiment: earlier breakers count failures of later hops.
    count_later_hops: bool,
    /// Requests that reached the last service.
    load: u32,
}

/// The number of services on a request's path: all three, or the first two.
const ALL: usize = 3;
const BUT_THE_LAST: usize = 2;

impl Chain {
    fn new(use_breaker: bool, pass_advice: bool, start: Instant) -> Self {
        let settings = RetrySettings::default();
        let hop = || Hop {
            retry: RetryPolicy::new(Some(settings.clone())),
            budget: RetryBudget::new(settings.budget),
            breaker: Breaker::new(BreakerSettings::default(), start),
        };
        Self {
            hops: (0..ALL).map(|_| hop()).collect(),
            use_breaker,
            pass_advice,
            count_later_hops: false,
            load: 0,
        }
    }

    /// A request at the `index`-th hop; `healthy`: whether the last service succeeds. Returns the client's outcome.
    fn request(&mut self, index: usize, now: Instant, healthy: bool, needs: usize) -> AttemptOutcome {
        if index == needs {
            self.load += u32::from(needs == ALL);
            let served = healthy || needs < ALL;
            let status = if served { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
            return AttemptOutcome::new(OutcomeKind::Http(status));
        }
        self.hops[index].budget.deposit();
        let unavailable = AttemptOutcome {
            kind: OutcomeKind::Http(StatusCode::SERVICE_UNAVAILABLE),
            advice: if self.pass_advice { RetryAdvice::No } else { RetryAdvice::None },
        };
        let mut attempts = 0;
        loop {
            attempts += 1;
            let permit = match self.hops[index].breaker.admit(now).permit {
                Ok(permit) => permit,
                Err(_) if self.use_breaker => return unavailable,
                Err(_) => return self.request(index + 1, now, healthy, needs),
            };
            let outcome = self.request(index + 1, now, healthy, needs);
            let hop = &self.hops[index];
            if self.use_breaker {
                let control = self.count_later_hops && outcome.is_failure();
                let health = if control { Health::Failure } else { outcome.health() };
                hop.breaker.report(permit, health, now, index as f64 / 3.0);
            }
            let attempt = FailedAttempt {
                is_repeatable: hop.retry.is_repeatable(&Method::GET, false),
                is_grpc: false,
                attempts,
                free_retry_used: false,
                resends: 0,
                body: Replayability::Unread,
                is_committed: false,
            };
            let context = RetryContext {
                now,
                time_left: None,
                hint: RetryHint::None,
                random: 0.5,
                budget: &hop.budget,
            };
            match hop.retry.decide(&attempt, &outcome, &context) {
                RetryDecision::Retry(_) => {}
                RetryDecision::Stop(_) if outcome.kind == OutcomeKind::Http(StatusCode::OK) => {
                    return outcome;
                }
                RetryDecision::Stop(_) => return unavailable,
            }
        }
    }

    /// A hundred requests per second; returns how many succeeded.
    fn run(&mut self, start: Instant, from: u32, seconds: u32, healthy: impl Fn(u32) -> bool) -> u32 {
        let at = |n: u32| start + Duration::from_millis(10) * n;
        let requests = from * 100..(from + seconds) * 100;
        requests
            .filter(|n| self.request(0, at(*n), healthy(*n), ALL).kind == OutcomeKind::Http(StatusCode::OK))
            .count() as u32
    }

    /// Every fourth request needs only the first two services. Returns the share of those served while the last service
    /// fails for `seconds`, and how long after its recovery the last request fails.
    fn outage(&mut self, start: Instant, seconds: u32, healthy: impl Fn(u32) -> bool) -> (f64, Duration) {
        let at = |n: u32| start + Duration::from_millis(10) * n;
        let mut served = 0;
        for n in 0..seconds * 100 {
            let needs = if n % 4 == 0 { BUT_THE_LAST } else { ALL };
            let outcome = self.request(0, at(n), healthy(n), needs);
            served += u32::from(needs == BUT_THE_LAST && !outcome.is_failure());
        }
        let healed = seconds * 100;
        let failed = |n: &u32| self.request(0, at(*n), true, ALL).is_failure();
        let last = (healed..healed + 20_000).filter(failed).last().unwrap_or(healed);
        (f64::from(served) / f64::from(seconds * 25), at(last) - at(healed))
    }
}

#[test]
fn only_the_sidecar_next_to_the_failure_retries() {
    let start = Instant::now();
    let mut chain = Chain::new(false, true, start);
    chain.run(start, 0, 60, |_| false);
    assert!(chain.load <= 6000 * 13 / 10, "{} requests for a demand of 6000", chain.load);
    // The control: each hop keeps its own budget, and still the attempts multiply.
    let mut multiplied = Chain::new(false, false, start);
    multiplied.run(start, 0, 60, |_| false);
    assert!(multiplied.load > 6000 * 16 / 10, "{}", multiplied.load);
}

#[test]
fn the_breaker_protects_a_failing_service_and_closes_after_recovery() {
    let start = Instant::now();
    let mut chain = Chain::new(true, true, start);
    assert_eq!(chain.run(start, 0, 10, |_| true), 1000);
    chain.load = 0;
    assert_eq!(chain.run(start, 10, 60, |_| false), 0);
    assert!(chain.load < 300, "the breaker protects it: {} of 6000", chain.load);
    chain.load = 0;
    chain.run(start, 70, 60, |_| true);
    let healthy = chain.run(start, 130, 10, |_| true);
    assert_eq!(healthy, 1000, "no trace of the outage is left");
}

#[test]
fn half_failing_stays_within_its_bound() {
    let start = Instant::now();
    let mut chain = Chain::new(false, true, start);
    let healthy = chain.run(start, 0, 60, |n| n % 2 == 0);
    assert!(chain.load <= 6000 * 13 / 10, "{}", chain.load);
    assert!(healthy >= 3000);
}

/// Why a failure of a later hop opens no breaker before it: such a breaker would refuse requests that do not need the
/// failing service at all.
#[test]
fn only_the_breaker_next_to_the_failure_opens() {
    for (what, of_ten) in [("all", 10), ("half", 5)] {
        let outages = |count_later_hops| -> (f64, Duration) {
            let each = (60..70).map(|seconds| {
                let start = Instant::now();
                let mut chain = Chain { count_later_hops, ..Chain::new(true, true, start) };
                let outage = chain.outage(start, seconds, |n| n * 7 % 10 >= of_ten);
                assert!(chain.load <= (seconds + 200) * 100 * 13 / 10);
                outage
            });
            let (shares, times): (Vec<_>, Vec<_>) = each.unzip();
            println!("{what} fail, counted by earlier hops: {count_later_hops}: {shares:.2?} {times:?}");
            (shares.into_iter().fold(1.0, f64::min), times.into_iter().max().unwrap_or_default())
        };
        let ((served, healed), (cut_off, _)) = (outages(false), outages(true));
        assert!(served > 0.999 && cut_off < 0.5, "{what}: {served} beside {cut_off}");
        // No longer than the breaker next to the failure may be open.
        assert!(healed <= Duration::from_secs(60), "{what}: {healed:?}");
    }
}

/// How long requests go on failing once the service is healthy: the breaker next to it stays open for its time, which
/// has grown with the outage. The table in docs/resilience.md is what this prints.
#[test]
fn recovery_is_bounded_by_the_length_of_the_outage() {
    for (what, of_ten) in [("all", 10), ("half", 5)] {
        for seconds in [2, 5, 10, 30, 60, 120, 300] {
            let each = (0..10).map(|more| {
                let start = Instant::now();
                Chain::new(true, true, start).outage(start, seconds + more, |n| n * 7 % 10 >= of_ten).1
            });
            let mut each: Vec<_> = each.collect();
            each.sort_unstable();
            println!("{what} fail for {seconds} s and up to 9 s more: {:.1?} to {:.1?}", each[0], each[9]);
            // The open times of an outage double from 5 s, a fifth shorter at most: the last one is no longer than
            // `open_for.base` and all earlier ones together. A second for the trials.
            let bound = (5.0 + 1.25 * f64::from(seconds + 9)).min(60.0) + 1.0;
            assert!(each[9].as_secs_f64() <= bound, "{what} for {seconds} s: {each:?}");
        }
    }
}
