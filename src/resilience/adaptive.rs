//! The adaptive limit: how many requests in flight an upstream can take before they only wait for each other.
//!
//! While latency stays near what it is without congestion, the limit grows by its square root; when latency rises, the
//! limit shrinks in proportion (a gradient controller). What latency is without congestion is learned when the limit
//! holds nobody back. While it does hold callers back, only better news is believed: otherwise a lasting overload would
//! become the new normal, and the limit would drift up with it. So there is no need to stop traffic from time to
//! time for measuring. If the service has truly become slower, the limit falls to [`LEAST`], where our own load
//! can hardly be the reason, and the new latency is learned there.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use super::{classify::Health, limit::RequestLimit};

/// The limit never falls below this.
pub const LEAST: u32 = 8;
const FIRST: u32 = 32;
/// Latency may be this much above the uncongested one before the limit shrinks.
const TOLERANCE: f64 = 1.5;
/// How much of a new target is taken over at once.
const SMOOTHING: f64 = 0.2;
/// What one window changes about the uncongested latency.
const LEARNING: f64 = 0.1;
const ON_FAILURES: f64 = 0.9;
/// A window is at least so long,
const WINDOW: Duration = Duration::from_millis(100);
/// and holds at least so many answers.
const LEAST_SAMPLES: u32 = 10;

/// The pure controller.
#[derive(Debug)]
struct Gradient {
    limit: f64,
    /// In microseconds; 0 = not known yet.
    uncongested: f64,
    most: f64,
}

/// What came of the requests that ended within a window.
#[derive(Clone, Copy, Debug)]
struct Window {
    /// Microseconds.
    mean_latency: f64,
    /// In flight at its end.
    in_flight: u32,
    /// Others waited for a place.
    held_back: bool,
    /// More than a tenth failed.
    failing: bool,
}

impl Gradient {
    fn new(most: u32) -> Self {
        let most = f64::from(most.max(1));
        Self { limit: f64::from(FIRST).min(most), uncongested: 0.0, most }
    }

    fn step(&mut self, window: Window) -> u32 {
        if window.failing {
            // Failures may be quick: their latency says nothing.
            self.limit *= ON_FAILURES;
        } else {
            self.learn(window);
            let gradient = (TOLERANCE * self.uncongested / window.mean_latency.max(1.0)).clamp(0.5, 1.0);
            // A limit that is not used cannot be known to be too low.
            let used = window.held_back || f64::from(window.in_flight) * 2.0 >= self.limit;
            let room = if used { self.limit.sqrt() } else { 0.0 };
            self.limit += SMOOTHING * (self.limit * gradient + room - self.limit);
        }
        self.limit = self.limit.max(f64::from(LEAST)).min(self.most);
        self.limit as u32
    }

    fn learn(&mut self, window: Window) {
        let latency = window.mean_latency;
        let free = !window.held_back || self.limit <= f64::from(LEAST);
        if self.uncongested == 0.0 {
            self.uncongested = latency;
        } else if free || latency < self.uncongested {
            self.uncongested += LEARNING * (latency - self.uncongested);
        }
    }
}

/// The adaptive limit of an upstream, shared by all workers.
#[derive(Debug)]
pub struct Adaptive {
    /// Of the running window: microseconds, answers, failures.
    latency: AtomicU64,
    answers: AtomicU32,
    failures: AtomicU32,
    /// Milliseconds after the epoch.
    window_ends: AtomicU64,
    gradient: Mutex<Gradient>,
    epoch: Instant,
}

impl Adaptive {
    /// `max_requests` stays the upper bound.
    pub fn new(max_requests: u32, now: Instant) -> Self {
        Self {
            latency: AtomicU64::new(0),
            answers: AtomicU32::new(0),
            failures: AtomicU32::new(0),
            window_ends: AtomicU64::new(millis(WINDOW)),
            gradient: Mutex::new(Gradient::new(max_requests)),
            epoch: now,
        }
    }

    /// Takes in how long a try took, to its headers, and what came of it; at the end of a window it moves the limit.
    /// Mostly two atomic additions; whoever ends a window also takes a lock that nobody else then wants.
    pub fn record<B: super::limit::Bell>(
        &self,
        latency: Duration,
        health: Health,
        limit: &RequestLimit<B>,
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
        let answers = self.answers.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        let passed = millis(now.saturating_duration_since(self.epoch));
        let ends = self.window_ends.load(Ordering::Relaxed);
        let next = passed.saturating_add(millis(WINDOW));
        if answers < LEAST_SAMPLES
            || passed < ends
            || self.window_ends.compare_exchange(ends, next, Ordering::Relaxed, Ordering::Relaxed).is_err()
        {
            return;
        }
        let window = self.take_window(limit.in_flight(), limit.pending() > 0);
        let moved = self.gradient.lock().unwrap_or_else(PoisonError::into_inner).step(window);
        if moved != limit.limit() {
            limit.adapt(moved, now);
        }
    }

    /// Takes a new `max_requests` over from a reload. What was learned stays.
    pub fn configure(&self, max_requests: u32) {
        self.gradient.lock().unwrap_or_else(PoisonError::into_inner).most = f64::from(max_requests.max(1));
    }

    fn take_window(&self, in_flight: u32, held_back: bool) -> Window {
        let answers = self.answers.swap(0, Ordering::Relaxed);
        let failures = self.failures.swap(0, Ordering::Relaxed);
        let latency = self.latency.swap(0, Ordering::Relaxed);
        let successes = answers.saturating_sub(failures).max(1);
        Window {
            mean_latency: latency as f64 / f64::from(successes),
            in_flight,
            held_back,
            failing: failures.saturating_mul(10) > answers,
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

    /// A service that works on ten at a time, each for so long; callers that always want so many at once.
    fn run(gradient: &mut Gradient, windows: u32, demand: u32, service_micros: f64) -> u32 {
        for _ in 0..windows {
            let limit = gradient.limit as u32;
            let in_flight = demand.min(limit);
            let mean_latency = service_micros * (f64::from(in_flight) / 10.0).max(1.0);
            gradient.step(Window { mean_latency, in_flight, held_back: demand > limit, failing: false });
        }
        gradient.limit as u32
    }

    #[test]
    fn finds_what_the_service_can_take_and_does_not_drift() {
        let mut gradient = Gradient::new(1024);
        run(&mut gradient, 50, 5, 10_000.0);
        for windows in [100, 1000, 100_000] {
            let limit = run(&mut gradient, windows, 200, 10_000.0);
            assert!((10..=30).contains(&limit), "{limit} after {windows}");
        }
    }

    #[test]
    fn grows_where_there_is_room() {
        let mut gradient = Gradient::new(1024);
        for _ in 0..1000 {
            gradient.step(Window { mean_latency: 9_000.0, in_flight: 600, held_back: true, failing: false });
        }
        assert!(gradient.limit >= 600.0, "{}", gradient.limit);
        let mut unused = Gradient::new(1024);
        assert_eq!(run(&mut unused, 1000, 5, 10_000.0), FIRST, "what is not used does not grow");
    }

    #[test]
    fn learns_that_the_service_has_become_slower() {
        let mut gradient = Gradient::new(1024);
        run(&mut gradient, 100, 8, 10_000.0);
        let limit = run(&mut gradient, 1000, 200, 50_000.0);
        assert!((10..=30).contains(&limit), "{limit}");
    }

    #[test]
    fn gives_way_to_failures() {
        let mut gradient = Gradient::new(1024);
        let failing = Window { mean_latency: 10.0, in_flight: 32, held_back: true, failing: true };
        assert!(gradient.step(failing) < FIRST);
        for _ in 0..100 {
            gradient.step(failing);
        }
        assert_eq!(gradient.limit as u32, LEAST);
    }

    #[derive(Debug)]
    struct Silent;

    impl super::super::limit::Bell for Silent {
        fn ring(self) {}
    }

    #[test]
    fn moves_the_limit_once_a_window() {
        let start = Instant::now();
        let limit = RequestLimit::<Silent>::new(LimitSettings::default());
        let adaptive = Adaptive::new(1024, start);
        let ms = Duration::from_millis;
        for n in 0..40 {
            adaptive.record(ms(10), Health::Success, &limit, start + ms(n * 2));
        }
        assert_eq!(limit.limit(), 1024, "the first window is not over");
        adaptive.record(ms(10), Health::Success, &limit, start + ms(101));
        assert_eq!(limit.limit(), FIRST);
    }

    proptest! {
        #[test]
        fn stays_between_its_bounds(
            most in 0u32..3000,
            windows in prop::collection::vec((0f64..1e8, 0u32..3000, any::<bool>(), any::<bool>()), 0..200),
        ) {
            let mut gradient = Gradient::new(most);
            for (mean_latency, in_flight, held_back, failing) in windows {
                let limit = gradient.step(Window { mean_latency, in_flight, held_back, failing });
                prop_assert!(limit >= LEAST.min(most.max(1)) && limit <= most.max(1));
            }
        }
    }
}
