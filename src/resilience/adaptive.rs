//! The adaptive limit: how many requests in flight an upstream can serve before they only queue behind each other.
//!
//! A gradient controller: while latency stays near the uncongested latency, the limit grows by its square root; when
//! latency rises, the limit shrinks in proportion. The uncongested latency is learned while no request waits for the
//! limit. While requests wait, it can only be lowered: otherwise a lasting overload would become the baseline, and the
//! limit would drift up with it. Traffic therefore never has to be paused for measuring. If the service has become
//! slower, the limit falls to [`MIN_LIMIT`], where this proxy's load can hardly be the cause, and the new latency is
//! learned there.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use super::{classify::Health, limit::RequestLimit};

/// The limit never falls below this.
pub const MIN_LIMIT: u32 = 8;
const INITIAL_LIMIT: u32 = 32;
/// Latency may be this much above the uncongested one before the limit shrinks.
const TOLERANCE: f64 = 1.5;
/// The share of the way to a new target taken per window.
const SMOOTHING: f64 = 0.2;
/// The weight of one window in the uncongested latency.
const LEARNING: f64 = 0.1;
const FAILURE_FACTOR: f64 = 0.9;
/// The least length of a window.
const WINDOW: Duration = Duration::from_millis(100);
/// The least number of responses in a window.
const MIN_SAMPLES: u32 = 10;

/// The controller.
#[derive(Debug)]
struct Gradient {
    limit: f64,
    /// In microseconds; 0 = not known yet.
    uncongested: f64,
    max: f64,
}

/// The requests that ended within a window.
#[derive(Clone, Copy, Debug)]
struct Window {
    /// Microseconds.
    mean_latency: f64,
    /// In flight at its end.
    in_flight: u32,
    /// Requests waited for a slot.
    has_waiters: bool,
    /// More than a tenth failed.
    failing: bool,
}

impl Gradient {
    fn new(max: u32) -> Self {
        let max = f64::from(max.max(1));
        Self { limit: f64::from(INITIAL_LIMIT).min(max), uncongested: 0.0, max }
    }

    fn step(&mut self, window: Window) -> u32 {
        if window.failing {
            // Failures may be fast: their latency is ignored.
            self.limit *= FAILURE_FACTOR;
        } else {
            self.learn(window);
            let gradient = (TOLERANCE * self.uncongested / window.mean_latency.max(1.0)).clamp(0.5, 1.0);
            // Only a limit that is reached may be too low.
            let used = window.has_waiters || f64::from(window.in_flight) * 2.0 >= self.limit;
            let growth = if used { self.limit.sqrt() } else { 0.0 };
            self.limit += SMOOTHING * (self.limit * gradient + growth - self.limit);
        }
        self.limit = self.limit.max(f64::from(MIN_LIMIT)).min(self.max);
        self.limit as u32
    }

    fn learn(&mut self, window: Window) {
        let latency = window.mean_latency;
        let uncongested_window = !window.has_waiters || self.limit <= f64::from(MIN_LIMIT);
        if self.uncongested == 0.0 {
            self.uncongested = latency;
        } else if uncongested_window || latency < self.uncongested {
            self.uncongested += LEARNING * (latency - self.uncongested);
        }
    }
}

/// The adaptive limit of an upstream, shared by all workers.
#[derive(Debug)]
pub struct AdaptiveLimit {
    /// Of the current window: microseconds, responses, failures.
    latency: AtomicU64,
    responses: AtomicU32,
    failures: AtomicU32,
    /// Milliseconds after the epoch.
    window_ends: AtomicU64,
    gradient: Mutex<Gradient>,
    epoch: Instant,
}

impl AdaptiveLimit {
    /// `max_requests` stays the upper bound.
    pub fn new(max_requests: u32, now: Instant) -> Self {
        Self {
            latency: AtomicU64::new(0),
            responses: AtomicU32::new(0),
            failures: AtomicU32::new(0),
            window_ends: AtomicU64::new(millis(WINDOW)),
            gradient: Mutex::new(Gradient::new(max_requests)),
            epoch: now,
        }
    }

    /// Records an attempt's time to response headers and its outcome; at the end of a window, adjusts the limit.
    /// Usually two atomic additions; the call that ends a window also takes an uncontended lock.
    pub fn record<N: super::limit::NotifyWaiter>(
        &self,
        latency: Duration,
        health: Health,
        limit: &RequestLimit<N>,
        now: Instant,
    ) {
        match health {
            Health::Neutral => return,
            Health::Failure => {
                self.failures.fetch_add(1, Ordering::Relaxed);
            }
            Health::Success => {
                let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX >> 32);
                self.latency.fetch_add(micros, Ordering::Relaxed);
            }
        }
        let responses = self.responses.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        let passed = millis(now.saturating_duration_since(self.epoch));
        let ends = self.window_ends.load(Ordering::Relaxed);
        let next = passed.saturating_add(millis(WINDOW));
        if responses < MIN_SAMPLES
            || passed < ends
            || self.window_ends.compare_exchange(ends, next, Ordering::Relaxed, Ordering::Relaxed).is_err()
        {
            return;
        }
        let window = self.take_window(limit.in_flight(), limit.pending() > 0);
        let moved = self.gradient.lock().unwrap_or_else(PoisonError::into_inner).step(window);
        if moved != limit.limit() {
            limit.set_adaptive_limit(moved, now);
        }
    }

    /// Applies the `max_requests` of a reload; keeps what was learned.
    pub fn configure(&self, max_requests: u32) {
        self.gradient.lock().unwrap_or_else(PoisonError::into_inner).max = f64::from(max_requests.max(1));
    }

    fn take_window(&self, in_flight: u32, has_waiters: bool) -> Window {
        let responses = self.responses.swap(0, Ordering::Relaxed);
        let failures = self.failures.swap(0, Ordering::Relaxed);
        let latency = self.latency.swap(0, Ordering::Relaxed);
        let successes = responses.saturating_sub(failures).max(1);
        Window {
            mean_latency: latency as f64 / f64::from(successes),
            in_flight,
            has_waiters,
            failing: failures.saturating_mul(10) > responses,
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::limit::LimitSettings, *};

    /// A service that processes ten requests at a time, each for `service_micros`; clients that always send `demand`.
    fn run(gradient: &mut Gradient, windows: u32, demand: u32, service_micros: f64) -> u32 {
        for _ in 0..windows {
            let limit = gradient.limit as u32;
            let in_flight = demand.min(limit);
            let mean_latency = service_micros * (f64::from(in_flight) / 10.0).max(1.0);
            gradient.step(Window { mean_latency, in_flight, has_waiters: demand > limit, failing: false });
        }
        gradient.limit as u32
    }

    #[test]
    fn finds_the_capacity_and_does_not_drift() {
        let mut gradient = Gradient::new(1024);
        run(&mut gradient, 50, 5, 10_000.0);
        for windows in [100, 1000, 100_000] {
            let limit = run(&mut gradient, windows, 200, 10_000.0);
            assert!((10..=30).contains(&limit), "{limit} after {windows}");
        }
    }

    #[test]
    fn grows_while_latency_is_low() {
        let mut gradient = Gradient::new(1024);
        for _ in 0..1000 {
            gradient.step(Window {
                mean_latency: 9_000.0,
                in_flight: 600,
                has_waiters: true,
                failing: false,
            });
        }
        assert!(gradient.limit >= 600.0, "{}", gradient.limit);
        let mut unused = Gradient::new(1024);
        assert_eq!(run(&mut unused, 1000, 5, 10_000.0), INITIAL_LIMIT, "an unused limit does not grow");
    }

    #[test]
    fn learns_the_latency_of_a_slower_service() {
        let mut gradient = Gradient::new(1024);
        run(&mut gradient, 100, 8, 10_000.0);
        let limit = run(&mut gradient, 1000, 200, 50_000.0);
        assert!((10..=30).contains(&limit), "{limit}");
    }

    #[test]
    fn shrinks_on_failures() {
        let mut gradient = Gradient::new(1024);
        let failing = Window { mean_latency: 10.0, in_flight: 32, has_waiters: true, failing: true };
        assert!(gradient.step(failing) < INITIAL_LIMIT);
        for _ in 0..100 {
            gradient.step(failing);
        }
        assert_eq!(gradient.limit as u32, MIN_LIMIT);
    }

    #[derive(Debug)]
    struct NoNotify;

    impl super::super::limit::NotifyWaiter for NoNotify {
        fn notify(self) {}
    }

    #[test]
    fn moves_the_limit_once_a_window() {
        let start = Instant::now();
        let limit = RequestLimit::<NoNotify>::new(LimitSettings::default());
        let adaptive = AdaptiveLimit::new(1024, start);
        let ms = Duration::from_millis;
        for n in 0..40 {
            adaptive.record(ms(10), Health::Success, &limit, start + ms(n * 2));
        }
        assert_eq!(limit.limit(), 1024, "the first window is not over");
        adaptive.record(ms(10), Health::Success, &limit, start + ms(101));
        assert_eq!(limit.limit(), INITIAL_LIMIT);
    }

    proptest! {
        #[test]
        fn stays_between_its_bounds(
            max in 0u32..3000,
            windows in prop::collection::vec((0f64..1e8, 0u32..3000, any::<bool>(), any::<bool>()), 0..200),
        ) {
            let mut gradient = Gradient::new(max);
            for (mean_latency, in_flight, has_waiters, failing) in windows {
                let limit = gradient.step(Window { mean_latency, in_flight, has_waiters, failing });
                prop_assert!(limit >= MIN_LIMIT.min(max.max(1)) && limit <= max.max(1));
            }
        }
    }
}
