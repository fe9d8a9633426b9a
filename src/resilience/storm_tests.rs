//! Three services in a row, each with its sidecar, in virtual time: what the last one gets when it fails.

use std::time::{Duration, Instant};

use http::{Method, StatusCode};

use super::{
    backoff::Hint,
    breaker::{Breaker, BreakerSettings},
    budget::RetryBudget,
    classify::{Advice, Ending, Health, Outcome},
    retry::{Body, Decision, FailedAttempt, Moment, RetryPolicy, RetrySettings},
};

/// The way from one service to the next: the outbound side of a sidecar.
struct Hop {
    retry: RetryPolicy,
    budget: RetryBudget,
    breaker: std::sync::Arc<Breaker>,
}

struct Row {
    hops: Vec<Hop>,
    use_breaker: bool,
    pass_advice: bool,
    /// The control: breakers further up count what comes from further behind.
    count_no: bool,
    /// Calls that reached the last service.
    load: u32,
}

/// Services that a call goes through: all three, or the first two.
const ALL: usize = 3;
const BUT_THE_LAST: usize = 2;

impl Row {
    fn new(use_breaker: bool, pass_advice: bool, start: Instant) -> Self {
        let settings = RetrySettings::default();
        let hop = || Hop {
            retry: RetryPolicy::new(Some(settings.clone())),
            budget: RetryBudget::new(settings.budget),
            breaker: Breaker::new(BreakerSettings::default(), start),
        };
        Self { hops: (0..ALL).map(|_| hop()).collect(), use_breaker, pass_advice, count_no: false, load: 0 }
    }

    /// A call made at the `index`-th hop; `well`: whether the last service answers well. What the caller sees.
    fn call(&mut self, index: usize, now: Instant, well: bool, needs: usize) -> Outcome {
        if index == needs {
            self.load += u32::from(needs == ALL);
            let served = well || needs < ALL;
            let status = if served { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
            return Outcome::new(Ending::Http(status));
        }
        self.hops[index].budget.deposit();
        let unavailable = Outcome {
            ending: Ending::Http(StatusCode::SERVICE_UNAVAILABLE),
            advice: if self.pass_advice { Advice::No } else { Advice::None },
        };
        let mut tries = 0;
        loop {
            tries += 1;
            let permit = match self.hops[index].breaker.admit(now).permit {
                Ok(permit) => permit,
                Err(_) if self.use_breaker => return unavailable,
                Err(_) => return self.call(index + 1, now, well, needs),
            };
            let outcome = self.call(index + 1, now, well, needs);
            let hop = &self.hops[index];
            if self.use_breaker {
                let control = self.count_no && outcome.is_failure();
                let health = if control { Health::Failure } else { outcome.health() };
                hop.breaker.report(permit, health, now, index as f64 / 3.0);
            }
            let attempt = FailedAttempt {
                is_repeatable: hop.retry.is_repeatable(&Method::GET, false),
                is_grpc: false,
                attempts: tries,
                free_used: false,
                resent: 0,
                body: Body::Untouched,
                is_committed: false,
            };
            let moment = Moment { now, time_left: None, hint: Hint::None, random: 0.5, budget: &hop.budget };
            match hop.retry.decide(&attempt, &outcome, &moment) {
                Decision::Retry(_) => {}
                Decision::Stop(_) if outcome.ending == Ending::Http(StatusCode::OK) => return outcome,
                Decision::Stop(_) => return unavailable,
            }
        }
    }

    /// A hundred calls a second; how many went well.
    fn run(&mut self, start: Instant, from: u32, seconds: u32, well: impl Fn(u32) -> bool) -> u32 {
        let at = |n: u32| start + Duration::from_millis(10) * n;
        let calls = from * 100..(from + seconds) * 100;
        calls.filter(|n| self.call(0, at(*n), well(*n), ALL).ending == Ending::Http(StatusCode::OK)).count()
            as u32
    }

    /// Every fourth call needs the first two services only. What share of those is served while the last one fails
    /// for `seconds`, and how long after it is well the last call fails.
    fn outage(&mut self, start: Instant, seconds: u32, well: impl Fn(u32) -> bool) -> (f64, Duration) {
        let at = |n: u32| start + Duration::from_millis(10) * n;
        let mut served = 0;
        for n in 0..seconds * 100 {
            let needs = if n % 4 == 0 { BUT_THE_LAST } else { ALL };
            let outcome = self.call(0, at(n), well(n), needs);
            served += u32::from(needs == BUT_THE_LAST && !outcome.is_failure());
        }
        let healed = seconds * 100;
        let failed = |n: &u32| self.call(0, at(*n), true, ALL).is_failure();
        let last = (healed..healed + 20_000).filter(failed).last().unwrap_or(healed);
        (f64::from(served) / f64::from(seconds * 25), at(last) - at(healed))
    }
}

#[test]
fn only_the_sidecar_next_to_the_failure_retries() {
    let start = Instant::now();
    let mut row = Row::new(false, true, start);
    row.run(start, 0, 60, |_| false);
    assert!(row.load <= 6000 * 13 / 10, "{} calls for a demand of 6000", row.load);
    // The control: each hop keeps its own budget, and still they multiply.
    let mut multiplied = Row::new(false, false, start);
    multiplied.run(start, 0, 60, |_| false);
    assert!(multiplied.load > 6000 * 16 / 10, "{}", multiplied.load);
}

#[test]
fn a_service_that_is_down_is_left_alone_and_found_again_when_well() {
    let start = Instant::now();
    let mut row = Row::new(true, true, start);
    assert_eq!(row.run(start, 0, 10, |_| true), 1000);
    row.load = 0;
    assert_eq!(row.run(start, 10, 60, |_| false), 0);
    assert!(row.load < 300, "the breaker spares it: {} of 6000", row.load);
    row.load = 0;
    row.run(start, 70, 60, |_| true);
    let well = row.run(start, 130, 10, |_| true);
    assert_eq!(well, 1000, "all is forgotten");
}

#[test]
fn half_failing_stays_within_its_bound() {
    let start = Instant::now();
    let mut row = Row::new(false, true, start);
    let well = row.run(start, 0, 60, |n| n % 2 == 0);
    assert!(row.load <= 6000 * 13 / 10, "{}", row.load);
    assert!(well >= 3000);
}

/// Why a failure from further behind opens no breaker on the way: one there would cut off what does not need the failing
/// service at all.
#[test]
fn only_the_breaker_next_to_the_failure_opens() {
    for (what, of_ten) in [("all", 10), ("half", 5)] {
        let outages = |count_no| -> (f64, Duration) {
            let each = (60..70).map(|seconds| {
                let start = Instant::now();
                let mut row = Row { count_no, ..Row::new(true, true, start) };
                let outage = row.outage(start, seconds, |n| n * 7 % 10 >= of_ten);
                assert!(row.load <= (seconds + 200) * 100 * 13 / 10);
                outage
            });
            let (shares, times): (Vec<_>, Vec<_>) = each.unzip();
            println!("{what} fail, counted further up: {count_no}: {shares:.2?} {times:?}");
            (shares.into_iter().fold(1.0, f64::min), times.into_iter().max().unwrap_or_default())
        };
        let ((served, healed), (cut_off, _)) = (outages(false), outages(true));
        assert!(served > 0.999 && cut_off < 0.5, "{what}: {served} beside {cut_off}");
        // No longer than the nearest one may be open.
        assert!(healed <= Duration::from_secs(60), "{what}: {healed:?}");
    }
}

/// How long callers go on failing once the service is well: the breaker next to it waits out its time, which has grown
/// with the outage. The table in docs/resilience.md is what this prints.
#[test]
fn recovery_is_bounded_by_the_length_of_the_outage() {
    for (what, of_ten) in [("all", 10), ("half", 5)] {
        for seconds in [2, 5, 10, 30, 60, 120, 300] {
            let each = (0..10).map(|more| {
                let start = Instant::now();
                Row::new(true, true, start).outage(start, seconds + more, |n| n * 7 % 10 >= of_ten).1
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
