//! The retry budget: it keeps retries from amplifying an outage.
//!
//! The guarantee holds for *every* period as long as the window, wherever it begins: retries in it are at most
//! `ratio` × the requests in it + `min_per_second` × its seconds. Requests therefore cannot save up for later retries:
//! a period may begin right after them. Instead, the budget allows a small burst that later requests pay back. A retry
//! takes one of `min_per_second × window` slots. The slot is free again after a whole window, or as soon as
//! `1 / ratio` later requests have paid for it. In any window, the retries that still hold a slot are at most as many
//! as there are slots, and the others were paid for by later requests in that same window.

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
    /// Retries per request.
    pub ratio: Ratio,
    /// Retries per second that are always allowed.
    pub min_per_second: u32,
    /// The period over which requests and retries are counted.
    pub window: HumanDuration,
}

impl Default for BudgetSettings {
    fn default() -> Self {
        Self { ratio: Ratio::constant(0.2), min_per_second: 1, window: HumanDuration::from_secs(10) }
    }
}

/// Bounds the list of slots whatever the configuration; fewer slots only allow fewer retries.
const MAX_SLOTS: usize = 1 << 16;

/// Five times a fifth must pay one retry in spite of floating point.
const FLOAT_TOLERANCE: f64 = 1e-9;

/// The state machine: slots and the retries that occupy them.
#[derive(Debug)]
struct Slots {
    settings: BudgetSettings,
    /// Oldest first, at most [`Self::capacity`].
    occupied: VecDeque<Slot>,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    granted_at: Instant,
    /// How much of it later requests have paid; 1 = all.
    paid: f64,
}

impl Slots {
    fn capacity(&self) -> usize {
        let reserve = f64::from(self.settings.min_per_second) * self.settings.window.as_secs_f64();
        // With a ratio alone there must be one slot, or there could never be a first retry.
        let least = if *self.settings.ratio > 0.0 { 1 } else { 0 };
        (reserve as usize).clamp(least, MAX_SLOTS)
    }

    /// Frees the slots that are a window old or paid for by `requests`, which all arrived after the last grant.
    fn update(&mut self, now: Instant, requests: u64) {
        let window = self.settings.window.0;
        // Strictly later: a window includes both ends.
        while self
            .occupied
            .front()
            .is_some_and(|slot| now.saturating_duration_since(slot.granted_at) > window)
        {
            self.occupied.pop_front();
        }
        let mut payment = *self.settings.ratio * requests as f64;
        while payment > 0.0
            // The newest first: the oldest are the next to become free by time.
            && let Some(newest) = self.occupied.back_mut()
        {
            let part = payment.min(1.0 - newest.paid);
            newest.paid += part;
            payment -= part;
            if newest.paid >= 1.0 - FLOAT_TOLERANCE {
                self.occupied.pop_back();
            }
        }
    }

    fn take(&mut self, now: Instant) -> bool {
        let free = self.occupied.len() < self.capacity();
        if free {
            self.occupied.push_back(Slot { granted_at: now, paid: 0.0 });
        }
        free
    }

    /// Frees the slot of a retry that was not sent. Partial payments for it are lost. If it was paid completely, or a
    /// window has passed, there is nothing to free.
    fn cancel(&mut self, granted_at: Instant) {
        if let Some(index) = self.occupied.iter().rposition(|slot| slot.granted_at == granted_at) {
            self.occupied.remove(index);
        }
    }
}

/// The budget of an upstream, shared by all workers, for retries and hedges. Its state survives a reload.
#[derive(Debug)]
pub struct RetryBudget {
    slots: Mutex<Slots>,
    /// Whether any slot is occupied. While nothing fails, a request costs one load of this and writes nothing.
    has_occupied: AtomicBool,
    /// Requests since the slots were last updated.
    requests: AtomicU64,
}

/// A granted retry that has not been sent yet. Dropped before it is [sent](Self::mark_sent), it frees its slot: the
/// client disconnected, the deadline expired, or the breaker opened meanwhile.
#[derive(Debug)]
pub struct RetryGrant<'a> {
    budget: &'a RetryBudget,
    granted_at: Option<Instant>,
}

impl RetryGrant<'_> {
    pub fn mark_sent(mut self) {
        self.granted_at = None;
    }
}

impl Drop for RetryGrant<'_> {
    fn drop(&mut self) {
        if let Some(granted_at) = self.granted_at {
            self.budget.with_slots(granted_at, |slots| slots.cancel(granted_at));
        }
    }
}

impl RetryBudget {
    pub fn new(settings: BudgetSettings) -> Self {
        Self {
            slots: Mutex::new(Slots { settings, occupied: VecDeque::new() }),
            has_occupied: AtomicBool::new(false),
            requests: AtomicU64::new(0),
        }
    }

    /// Counts a client's request, not its retries. Takes no lock.
    pub fn deposit(&self) {
        if self.has_occupied.load(Ordering::Relaxed) {
            self.requests.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Grants one retry or hedge and charges for it. Call it last, when nothing else prevents the attempt.
    pub fn withdraw(&self, now: Instant) -> bool {
        self.with_slots(now, |slots| slots.take(now))
    }

    /// A guard that frees the slot granted at `granted_at` unless the retry is sent.
    pub fn guard_grant(&self, granted_at: Instant) -> RetryGrant<'_> {
        RetryGrant { budget: self, granted_at: Some(granted_at) }
    }

    /// How many retries would be granted now.
    pub fn available(&self, now: Instant) -> usize {
        self.with_slots(now, |slots| slots.capacity().saturating_sub(slots.occupied.len()))
    }

    /// Applies the settings of a reload; occupied slots stay occupied.
    pub fn configure(&self, settings: BudgetSettings, now: Instant) {
        self.with_slots(now, |slots| slots.settings = settings);
    }

    fn with_slots<T>(&self, now: Instant, then: impl FnOnce(&mut Slots) -> T) -> T {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.update(now, self.requests.swap(0, Ordering::Relaxed));
        let result = then(&mut slots);
        self.has_occupied.store(!slots.occupied.is_empty(), Ordering::Relaxed);
        result
    }
}

impl BudgetSettings {
    /// The most retries in a period of length `window` with this many requests.
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
    fn writes_nothing_without_failures() {
        let budget = RetryBudget::new(BudgetSettings::default());
        (0..1000).for_each(|_| budget.deposit());
        assert_eq!(budget.requests.load(Ordering::Relaxed), 0);
        assert_eq!(budget.available(Instant::now()), 10);
    }

    #[test]
    fn a_slot_is_freed_after_a_window_or_by_requests() {
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
    fn retries_a_fifth_of_the_requests_in_a_steady_outage() {
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
    fn an_unsent_retry_frees_its_slot() {
        let (budget, now) = (RetryBudget::new(BudgetSettings::default()), Instant::now());
        assert!(budget.withdraw(now) && budget.withdraw(now + MS));
        drop(budget.guard_grant(now + MS));
        assert_eq!(budget.available(now + MS), 9);
        budget.guard_grant(now).mark_sent();
        assert_eq!(budget.available(now + MS), 9);
        // Paid for by requests meanwhile: it is not freed twice.
        (0..5).for_each(|_| budget.deposit());
        drop(budget.guard_grant(now));
        assert_eq!(budget.available(now + MS), 10);
    }

    #[test]
    fn zero_allows_no_retry() {
        let budget = RetryBudget::new(settings(0.0, 0, 10_000));
        budget.deposit();
        assert!(!budget.withdraw(Instant::now()));
        let ratio_only = RetryBudget::new(settings(0.5, 0, 10_000));
        assert!(ratio_only.withdraw(Instant::now()));
    }

    #[test]
    fn a_reload_keeps_occupied_slots() {
        let now = Instant::now();
        let budget = RetryBudget::new(BudgetSettings::default());
        assert_eq!((0..8).filter(|_| budget.withdraw(now)).count(), 8);
        budget.configure(settings(0.2, 1, 5_000), now);
        assert!(!budget.withdraw(now));
    }

    #[test]
    fn workers_share_one_budget() {
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
        assert!(granted as f64 <= budget.slots.lock().unwrap().settings.bound(40_000));
        assert!(granted >= 20_000 - 2, "{granted}");
    }

    #[derive(Clone, Copy, Debug)]
    enum Event {
        Requests(u8),
        Retries(u8),
        /// The latest retry was not sent.
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
        /// The worst window begins at a retry, so every window that does is checked.
        #[test]
        fn no_window_exceeds_the_bound(
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
                        drop(budget.guard_grant(start + Duration::from_millis(at)));
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
