//! The retry budget: what keeps retries from becoming the outage.
//!
//! The promise is about *any* stretch of time as long as the window, wherever it begins: retries in it are at most
//! `ratio` × the requests in it + `min_per_second` × its seconds. So nothing can be saved up beforehand: a quiet
//! stretch may begin right after the requests that would have paid. The budget therefore lends instead. A retry takes
//! one of `min_per_second × window` places; the place is free again after a whole window, or as soon as `1 / ratio`
//! later requests have paid for it. In any window, then, the retries that still hold a place are no more than there are
//! places, and the others were paid by requests after them, in that same window.

use std::{
    collections::VecDeque,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Instant,
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::units::{HumanDuration, Ratio};

/// `retry.budget`: retries in any `window` ≤ `ratio` × requests in it + `min_per_second` × its seconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BudgetSettings {
    /// Retries for each request.
    pub ratio: Ratio,
    /// Retries a second that are always allowed.
    pub min_per_second: u32,
    /// The time over which requests and retries are counted.
    pub window: HumanDuration,
}

impl Default for BudgetSettings {
    fn default() -> Self {
        Self { ratio: Ratio::constant(0.2), min_per_second: 1, window: HumanDuration::from_secs(10) }
    }
}

/// Keeps the list of places small whatever the configuration says; fewer places only lend less.
const MOST_PLACES: usize = 1 << 16;

/// Five fifths are one.
const FLOAT_NOISE: f64 = 1e-9;

/// The pure machine: places and who holds them.
#[derive(Debug)]
struct Loans {
    settings: BudgetSettings,
    /// Oldest first, at most [`Self::places`].
    open: VecDeque<Loan>,
}

#[derive(Clone, Copy, Debug)]
struct Loan {
    taken: Instant,
    /// How much of it later requests have paid; 1 = all.
    paid: f64,
}

impl Loans {
    fn places(&self) -> usize {
        let reserve = f64::from(self.settings.min_per_second) * self.settings.window.as_secs_f64();
        // With a ratio alone there must be one place, or the first retry could never be lent.
        let least = if *self.settings.ratio > 0.0 { 1 } else { 0 };
        (reserve as usize).clamp(least, MOST_PLACES)
    }

    /// Takes in `requests` that all came after the last loan was taken.
    fn settle(&mut self, now: Instant, requests: u64) {
        let window = self.settings.window.0;
        // Strictly later: a window is closed at both ends.
        while self.open.front().is_some_and(|loan| now.saturating_duration_since(loan.taken) > window) {
            self.open.pop_front();
        }
        let mut payment = *self.settings.ratio * requests as f64;
        while payment > 0.0
            // The newest first: the oldest are the next to come back by themselves.
            && let Some(newest) = self.open.back_mut()
        {
            let part = payment.min(1.0 - newest.paid);
            newest.paid += part;
            payment -= part;
            if newest.paid >= 1.0 - FLOAT_NOISE {
                self.open.pop_back();
            }
        }
    }

    fn take(&mut self, now: Instant) -> bool {
        let free = self.open.len() < self.places();
        if free {
            self.open.push_back(Loan { taken: now, paid: 0.0 });
        }
        free
    }

    /// Takes back a loan that was not used. What was paid for it in the meantime is not handed on; where all of it was
    /// paid, or a window has passed, there is nothing to take back.
    fn cancel(&mut self, taken: Instant) {
        if let Some(index) = self.open.iter().rposition(|loan| loan.taken == taken) {
            self.open.remove(index);
        }
    }
}

/// The budget of an upstream, shared by all workers, by retries and hedges. Outlives a reload.
#[derive(Debug)]
pub struct RetryBudget {
    loans: Mutex<Loans>,
    /// Whether any loan is open. While nothing fails, a request costs one load of this and writes nothing.
    lent: AtomicBool,
    /// Requests since the loans were last settled.
    requests: AtomicU64,
}

/// A retry that was granted and waits for its turn. Dropped before it is [sent](Self::sent), it goes back: its caller
/// left, its time ran out, or the breaker opened meanwhile.
#[derive(Debug)]
pub struct Unsent<'a> {
    budget: &'a RetryBudget,
    taken: Option<Instant>,
}

impl Unsent<'_> {
    pub fn sent(mut self) {
        self.taken = None;
    }
}

impl Drop for Unsent<'_> {
    fn drop(&mut self) {
        if let Some(taken) = self.taken {
            self.budget.settled(taken, |loans| loans.cancel(taken));
        }
    }
}

impl RetryBudget {
    pub fn new(settings: BudgetSettings) -> Self {
        Self {
            loans: Mutex::new(Loans { settings, open: VecDeque::new() }),
            lent: AtomicBool::new(false),
            requests: AtomicU64::new(0),
        }
    }

    /// Counts a request of a caller (not its retries). Takes no lock.
    pub fn deposit(&self) {
        if self.lent.load(Ordering::Relaxed) {
            self.requests.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Asks for one retry or hedge; what is granted is spent. Ask last, when nothing else stands against the try.
    pub fn withdraw(&self, now: Instant) -> bool {
        self.settled(now, |loans| loans.take(now))
    }

    /// Holds what was granted at `taken` until it is sent.
    pub fn hold(&self, taken: Instant) -> Unsent<'_> {
        Unsent { budget: self, taken: Some(taken) }
    }

    /// How many retries would be granted now.
    pub fn available(&self, now: Instant) -> usize {
        self.settled(now, |loans| loans.places().saturating_sub(loans.open.len()))
    }

    /// Takes new settings over from a reload; what is lent stays lent.
    pub fn configure(&self, settings: BudgetSettings, now: Instant) {
        self.settled(now, |loans| loans.settings = settings);
    }

    fn settled<T>(&self, now: Instant, then: impl FnOnce(&mut Loans) -> T) -> T {
        let mut loans = self.loans.lock().unwrap_or_else(PoisonError::into_inner);
        loans.settle(now, self.requests.swap(0, Ordering::Relaxed));
        let result = then(&mut loans);
        self.lent.store(!loans.open.is_empty(), Ordering::Relaxed);
        result
    }
}

impl BudgetSettings {
    /// The most retries that a stretch of `window` with so many requests may see.
    pub fn bound(&self, requests: u64) -> f64 {
        let reserve = f64::from(self.min_per_second) * self.window.as_secs_f64();
        let least = if *self.ratio > 0.0 { 1.0 } else { 0.0 };
        *self.ratio * requests as f64 + reserve.max(least)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn settings(ratio: f64, min_per_second: u32, window_ms: u64) -> BudgetSettings {
        BudgetSettings {
            ratio: Ratio::constant(ratio),
            min_per_second,
            window: HumanDuration::from_millis(window_ms),
        }
    }

    #[test]
    fn nothing_failing_writes_nothing() {
        let budget = RetryBudget::new(BudgetSettings::default());
        (0..1000).for_each(|_| budget.deposit());
        assert_eq!(budget.requests.load(Ordering::Relaxed), 0);
        assert_eq!(budget.available(Instant::now()), 10);
    }

    #[test]
    fn a_place_comes_back_after_a_window_or_when_requests_have_paid() {
        let start = Instant::now();
        let budget = RetryBudget::new(BudgetSettings::default());
        assert_eq!((0..100).filter(|_| budget.withdraw(start)).count(), 10);
        (0..4).for_each(|_| budget.deposit());
        assert!(!budget.withdraw(start + MS));
        budget.deposit();
        assert!(budget.withdraw(start + MS), "five requests at a ratio of 0.2 pay for one retry");
        assert!(!budget.withdraw(start + MS * 10_000));
        assert_eq!(budget.available(start + MS * 10_001), 9, "all but the later one are a window old");
    }

    #[test]
    fn in_a_steady_outage_a_fifth_of_the_requests_is_retried() {
        let start = Instant::now();
        let budget = RetryBudget::new(BudgetSettings::default());
        let mut retries = 0;
        for n in 0..10_000u32 {
            budget.deposit();
            retries += u32::from(budget.withdraw(start + MS * n * 10));
        }
        // 100 s: a fifth of 10,000, and one a second.
        assert!((2060..=2110).contains(&retries), "{retries}");
    }

    #[test]
    fn what_is_not_sent_goes_back() {
        let (budget, now) = (RetryBudget::new(BudgetSettings::default()), Instant::now());
        assert!(budget.withdraw(now) && budget.withdraw(now + MS));
        drop(budget.hold(now + MS));
        assert_eq!(budget.available(now + MS), 9);
        budget.hold(now).sent();
        assert_eq!(budget.available(now + MS), 9);
        // Paid by requests meanwhile: there is nothing to give back twice.
        (0..5).for_each(|_| budget.deposit());
        drop(budget.hold(now));
        assert_eq!(budget.available(now + MS), 10);
    }

    #[test]
    fn zero_is_zero() {
        let budget = RetryBudget::new(settings(0.0, 0, 10_000));
        budget.deposit();
        assert!(!budget.withdraw(Instant::now()));
        let ratio_only = RetryBudget::new(settings(0.5, 0, 10_000));
        assert!(ratio_only.withdraw(Instant::now()));
    }

    #[test]
    fn a_reload_keeps_what_is_lent() {
        let now = Instant::now();
        let budget = RetryBudget::new(BudgetSettings::default());
        assert_eq!((0..8).filter(|_| budget.withdraw(now)).count(), 8);
        budget.configure(settings(0.2, 1, 5_000), now);
        assert!(!budget.withdraw(now));
    }

    #[test]
    fn workers_share_it_without_losing_a_count() {
        let budget = RetryBudget::new(settings(0.5, 1, 1_000_000));
        let now = Instant::now();
        let granted: usize = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        (0..10_000)
                            .filter(|_| {
                                budget.deposit();
                                budget.withdraw(now)
                            })
                            .count()
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap_or(0)).sum()
        });
        assert!(granted as f64 <= budget.loans.lock().unwrap().settings.bound(40_000));
        assert!(granted >= 20_000 - 2, "{granted}");
    }

    #[derive(Clone, Copy, Debug)]
    enum Event {
        Requests(u8),
        Retries(u8),
        /// The latest retry was not sent after all.
        NotSent,
        Pass(u16),
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            3 => (1u8..20).prop_map(Event::Requests),
            3 => (1u8..20).prop_map(Event::Retries),
            1 => Just(Event::NotSent),
            2 => (0u16..50).prop_map(Event::Pass),
            1 => (0u16..1500).prop_map(Event::Pass),
        ]
    }

    proptest! {
        /// Any window that could be worst begins at a retry, so all of those are looked at.
        #[test]
        fn no_window_holds_more_retries_than_promised(
            events in prop::collection::vec(event(), 1..150),
            ratio in 0.0f64..1.0, min in 0u32..8, window_ms in 1u64..2000,
        ) {
            let settings = settings(ratio, min, window_ms);
            let budget = RetryBudget::new(settings);
            let start = Instant::now();
            let mut now = 0u64;
            let mut log: Vec<(u64, bool)> = Vec::new(); // true = retry
            for event in events {
                match event {
                    Event::Pass(ms) => now += u64::from(ms),
                    Event::Requests(count) => for _ in 0..count {
                        budget.deposit();
                        log.push((now, false));
                    },
                    Event::NotSent => if let Some(index) = log.iter().rposition(|(_, retry)| *retry) {
                        let (at, _) = log.remove(index);
                        drop(budget.hold(start + Duration::from_millis(at)));
                    },
                    Event::Retries(count) => for _ in 0..count {
                        if budget.withdraw(start + Duration::from_millis(now)) {
                            log.push((now, true));
                        }
                    },
                }
            }
            for (first, (from, retry)) in log.iter().enumerate() {
                if !retry { continue; }
                let (mut requests, mut retries) = (0u64, 0u64);
                for (at, retry) in &log[first..] {
                    if *at > from + window_ms { break; }
                    if *retry { retries += 1 } else { requests += 1 }
                    prop_assert!(retries as f64 <= settings.bound(requests) + 1e-6);
                }
            }
        }
    }
}
