//! How long calls took: histograms by method, status and error, as the semantic conventions have them.
//!
//! Each worker counts in cells of its own, found when the route was; `/metrics` adds them up. A cell holds a bounded
//! number of series: what comes after that, made up methods and statuses say, is counted as `_OTHER`.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use http::Method;

use crate::trace_context::{Span, Trace};

/// Series of one upstream in one worker, beside the one for all others.
pub const MOST_SERIES: usize = 64;

/// The upper ends of the buckets, in seconds.
pub const BOUNDS: [f64; 14] =
    [0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];
/// The same in nanoseconds.
const BOUNDS_NS: [u64; BOUNDS.len()] = {
    let mut bounds = [0; BOUNDS.len()];
    let mut at = 0;
    while at < bounds.len() {
        bounds[at] = (BOUNDS[at] * 1e9 + 0.5) as u64;
        at += 1;
    }
    bounds
};

/// Stands for all other methods.
const OTHER_METHOD: u8 = 9;
/// The methods that have a series of their own, the usual ones first.
static METHODS: [Method; OTHER_METHOD as usize] = [
    Method::GET,
    Method::POST,
    Method::PUT,
    Method::DELETE,
    Method::PATCH,
    Method::HEAD,
    Method::OPTIONS,
    Method::CONNECT,
    Method::TRACE,
];
/// All other methods, and what found no room.
pub const OTHER: &str = "_OTHER";

/// What a call is counted under.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// Index in [`METHODS`], or [`OTHER_METHOD`].
    method: u8,
    /// 0: there was no answer.
    status: u16,
    /// Empty: none, or the status tells.
    error: &'static str,
}

impl Key {
    const OVERFLOW: Self = Self { method: OTHER_METHOD, status: 0, error: OTHER };

    /// `status`: 0 where there was no response. `error`: empty where there was none, or the status tells it.
    pub fn new(method: &Method, status: u16, error: &'static str) -> Self {
        let method = METHODS.iter().position(|known| known == method);
        Self { method: method.map_or(OTHER_METHOD, |index| index as u8), status, error }
    }

    pub fn method(&self) -> &'static str {
        METHODS.get(usize::from(self.method)).map_or(OTHER, Method::as_str)
    }

    pub fn status(&self) -> Option<String> {
        (self.status != 0).then(|| self.status.to_string())
    }

    /// The word of an error, or the status that is one: 5xx where the service is called, 4xx too where it calls.
    pub fn error(&self, inbound: bool) -> Option<String> {
        let least = if inbound { 500 } else { 400 };
        match self.error {
            "" if self.status >= least => self.status(),
            "" => None,
            word => Some(word.to_owned()),
        }
    }
}

/// The series of one upstream, as one worker counts them.
#[derive(Debug)]
pub struct Cell {
    /// Filled from the beginning.
    series: [OnceLock<Box<Series>>; MOST_SERIES],
    overflow: OnceLock<Box<Series>>,
}

#[derive(Debug)]
struct Series {
    key: Key,
    /// By bucket; the last one is for what took longer than all bounds.
    counts: [AtomicU64; BOUNDS.len() + 1],
    sum_ns: AtomicU64,
    /// The last one of each bucket. Written only for calls that somebody can look up.
    exemplars: Mutex<BTreeMap<usize, Exemplar>>,
}

/// A call that stands for its bucket.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Exemplar {
    pub trace: Trace,
    pub span: Span,
    pub seconds: f64,
    pub at: SystemTime,
}

impl Default for Cell {
    fn default() -> Self {
        Self { series: std::array::from_fn(|_| OnceLock::new()), overflow: OnceLock::new() }
    }
}

impl Cell {
    /// Counts a call. `traced`: its trace is kept somewhere.
    pub fn observe(&self, key: Key, took: Duration, traced: Option<(Trace, Span)>) {
        let series = self.series(key);
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let bucket = BOUNDS_NS.iter().position(|bound| ns <= *bound).unwrap_or(BOUNDS.len());
        series.counts[bucket].fetch_add(1, Ordering::Relaxed);
        series.sum_ns.fetch_add(ns, Ordering::Relaxed);
        if let Some((trace, span)) = traced
            // Only who reads `/metrics` could hold it; this one is not worth waiting.
            && let Ok(mut exemplars) = series.exemplars.try_lock()
        {
            let exemplar = Exemplar { trace, span, seconds: took.as_secs_f64(), at: SystemTime::now() };
            exemplars.insert(bucket, exemplar);
        }
    }

    fn series(&self, key: Key) -> &Series {
        let known = self.series.iter().map(|slot| slot.get_or_init(|| Box::new(Series::new(key))));
        known
            .map(Box::as_ref)
            .find(|series| series.key == key)
            .unwrap_or_else(|| self.overflow.get_or_init(|| Box::new(Series::new(Key::OVERFLOW))))
    }
}

impl Series {
    fn new(key: Key) -> Self {
        Self { key, counts: Default::default(), sum_ns: AtomicU64::new(0), exemplars: Mutex::default() }
    }
}

/// The cells of all workers.
#[derive(Debug, Default)]
pub struct Durations(Mutex<Vec<Arc<Cell>>>);

/// What was counted under one key.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Histogram {
    pub counts: [u64; BOUNDS.len() + 1],
    pub sum_seconds: f64,
    pub exemplars: BTreeMap<usize, Exemplar>,
}

/// By key, in its order.
pub type Read = BTreeMap<Key, Histogram>;

impl Durations {
    /// A cell for one worker to count in: one that nobody holds any more, if there is, with what it has counted.
    pub fn cell(&self) -> Arc<Cell> {
        let mut cells = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(free) = cells.iter().find(|cell| Arc::strong_count(cell) == 1) {
            return Arc::clone(free);
        }
        let cell = Arc::new(Cell::default());
        cells.push(Arc::clone(&cell));
        cell
    }

    /// Adds what was counted here.
    pub fn add_to(&self, sums: &mut Read) {
        let cells = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for cell in &cells {
            for series in cell.series.iter().chain([&cell.overflow]).filter_map(OnceLock::get) {
                sums.entry(series.key).or_default().add(series);
            }
        }
    }
}

impl Histogram {
    fn add(&mut self, series: &Series) {
        for (sum, count) in self.counts.iter_mut().zip(&series.counts) {
            *sum += count.load(Ordering::Relaxed);
        }
        self.sum_seconds += Duration::from_nanos(series.sum_ns.load(Ordering::Relaxed)).as_secs_f64();
        let exemplars = series.exemplars.lock().unwrap_or_else(PoisonError::into_inner);
        for (bucket, exemplar) in exemplars.iter() {
            let newest = self.exemplars.entry(*bucket).or_insert(*exemplar);
            if exemplar.at > newest.at {
                *newest = *exemplar;
            }
        }
    }

    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(method: u8, status: u16) -> Key {
        Key { method, status, error: "" }
    }

    fn read(durations: &Durations) -> Read {
        let mut sums = Read::new();
        durations.add_to(&mut sums);
        sums
    }

    #[test]
    fn what_the_workers_counted_is_added_up() {
        let durations = Durations::default();
        let cells = [durations.cell(), durations.cell()];
        for (cell, ms) in cells.iter().zip([5, 6]) {
            cell.observe(key(0, 200), Duration::from_millis(ms), None);
        }
        cells[0].observe(key(0, 200), Duration::from_secs(11), None);
        let sums = read(&durations);
        let histogram = &sums[&key(0, 200)];
        assert_eq!((sums.len(), histogram.count()), (1, 3));
        assert_eq!((histogram.counts[0], histogram.counts[1], histogram.counts[14]), (1, 1, 1));
        assert!((histogram.sum_seconds - 11.011).abs() < 1e-9);
    }

    /// Connections come and go to workers that forget upstreams: neither counts nor cells may be lost or pile up.
    #[test]
    fn a_cell_that_nobody_holds_is_counted_in_again() {
        let durations = Durations::default();
        for _ in 0..100 {
            durations.cell().observe(key(1, 503), Duration::from_millis(1), None);
        }
        assert_eq!(durations.0.lock().unwrap().len(), 1);
        assert_eq!(read(&durations)[&key(1, 503)].count(), 100);
    }

    #[test]
    fn the_number_of_series_is_bounded_and_nothing_goes_uncounted() {
        let durations = Durations::default();
        let cell = durations.cell();
        for status in 100..1000 {
            for method in 0..10 {
                cell.observe(key(method, status), Duration::ZERO, None);
            }
        }
        let sums = read(&durations);
        assert_eq!(sums.len(), MOST_SERIES + 1);
        assert_eq!(sums.values().map(Histogram::count).sum::<u64>(), 9000);
        let other = &sums[&Key::OVERFLOW];
        assert_eq!(other.count(), 9000 - MOST_SERIES as u64);
        assert_eq!((Key::OVERFLOW.method(), Key::OVERFLOW.error(true).as_deref()), (OTHER, Some(OTHER)));
    }

    #[test]
    fn an_exemplar_stays_with_its_bucket() {
        let durations = Durations::default();
        let cell = durations.cell();
        let ids = |id: u64| Trace::new(u128::from(id)).zip(Span::new(id));
        cell.observe(key(0, 200), Duration::from_millis(1), ids(1));
        cell.observe(key(0, 200), Duration::from_millis(2), None);
        cell.observe(key(0, 200), Duration::from_millis(30), ids(3));
        let sums = read(&durations);
        let exemplars = &sums[&key(0, 200)].exemplars;
        let traces: Vec<_> = exemplars.iter().map(|(bucket, e)| (*bucket, e.trace.get())).collect();
        assert_eq!(traces, [(0, 1), (3, 3)]);
    }

    #[test]
    fn errors_are_told_as_the_conventions_have_it() {
        let told = |status, inbound| Key { method: 0, status, error: "" }.error(inbound);
        assert_eq!((told(404, true), told(404, false).as_deref()), (None, Some("404")));
        assert_eq!((told(200, false), told(503, true).as_deref()), (None, Some("503")));
        let refused = Key { method: 0, status: 503, error: "breaker_open" };
        assert_eq!(refused.error(false).as_deref(), Some("breaker_open"));
    }
}
