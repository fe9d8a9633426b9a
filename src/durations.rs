//! Request durations: histograms by method, status and error, as the semantic conventions define them.
//!
//! Each worker counts in cells of its own, which it looks up with the route; `/metrics` adds them up. A cell holds a
//! bounded number of series: further ones (made-up methods and statuses, say) are counted as `_OTHER`.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use http::Method;

use crate::trace_context::{SpanId, TraceId};

/// Series of one upstream in one worker, beside the overflow series.
pub const MAX_SERIES: usize = 64;

/// The upper bounds of the buckets, in seconds.
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

/// Index of all other methods.
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
/// Label of all other methods, and of the overflow series.
pub const OTHER: &str = "_OTHER";

/// The series that a request is counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SeriesKey {
    /// Index in [`METHODS`], or [`OTHER_METHOD`].
    method: u8,
    /// 0: no response.
    status: u16,
    /// Empty: no error, or the status is the error.
    error: &'static str,
}

impl SeriesKey {
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

    /// The `error_type` label: a cause, or a status that is an error: 5xx inbound, 4xx and 5xx outbound.
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
pub struct DurationCell {
    /// Filled in order.
    series: [OnceLock<Box<Series>>; MAX_SERIES],
    overflow: OnceLock<Box<Series>>,
}

#[derive(Debug)]
struct Series {
    key: SeriesKey,
    /// By bucket; the last one counts durations above all bounds.
    counts: [AtomicU64; BOUNDS.len() + 1],
    sum_ns: AtomicU64,
    /// The last one of each bucket. Written only for requests whose trace is exported.
    exemplars: Mutex<BTreeMap<usize, Exemplar>>,
}

/// A request that represents its bucket.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Exemplar {
    pub trace: TraceId,
    pub span: SpanId,
    pub seconds: f64,
    pub at: SystemTime,
}

impl Default for DurationCell {
    fn default() -> Self {
        Self { series: std::array::from_fn(|_| OnceLock::new()), overflow: OnceLock::new() }
    }
}

impl DurationCell {
    /// Counts a request. `traced`: its IDs, where its trace is exported.
    pub fn observe(&self, key: SeriesKey, took: Duration, traced: Option<(TraceId, SpanId)>) {
        let series = self.series(key);
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let bucket = BOUNDS_NS.iter().position(|bound| ns <= *bound).unwrap_or(BOUNDS.len());
        series.counts[bucket].fetch_add(1, Ordering::Relaxed);
        series.sum_ns.fetch_add(ns, Ordering::Relaxed);
        if let Some((trace, span)) = traced
            // Only a scrape of `/metrics` can hold the lock; then this exemplar is skipped.
            && let Ok(mut exemplars) = series.exemplars.try_lock()
        {
            let exemplar = Exemplar { trace, span, seconds: took.as_secs_f64(), at: SystemTime::now() };
            exemplars.insert(bucket, exemplar);
        }
    }

    fn series(&self, key: SeriesKey) -> &Series {
        let known = self.series.iter().map(|slot| slot.get_or_init(|| Box::new(Series::new(key))));
        known
            .map(Box::as_ref)
            .find(|series| series.key == key)
            .unwrap_or_else(|| self.overflow.get_or_init(|| Box::new(Series::new(SeriesKey::OVERFLOW))))
    }
}

impl Series {
    fn new(key: SeriesKey) -> Self {
        Self { key, counts: Default::default(), sum_ns: AtomicU64::new(0), exemplars: Mutex::default() }
    }
}

/// The cells of all workers.
#[derive(Debug, Default)]
pub struct Durations(Mutex<Vec<Arc<DurationCell>>>);

/// The sums of one series over all workers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Histogram {
    pub counts: [u64; BOUNDS.len() + 1],
    pub sum_seconds: f64,
    pub exemplars: BTreeMap<usize, Exemplar>,
}

/// Histograms by series, sorted.
pub type Histograms = BTreeMap<SeriesKey, Histogram>;

impl Durations {
    /// A cell for one worker. Reuses one that no worker holds any more, with its counts, if there is one.
    pub fn cell(&self) -> Arc<DurationCell> {
        let mut cells = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(free) = cells.iter().find(|cell| Arc::strong_count(cell) == 1) {
            return Arc::clone(free);
        }
        let cell = Arc::new(DurationCell::default());
        cells.push(Arc::clone(&cell));
        cell
    }

    /// Adds the counts of all cells to `sums`.
    pub fn add_to(&self, sums: &mut Histograms) {
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

    fn key(method: u8, status: u16) -> SeriesKey {
        SeriesKey { method, status, error: "" }
    }

    fn read(durations: &Durations) -> Histograms {
        let mut sums = Histograms::new();
        durations.add_to(&mut sums);
        sums
    }

    #[test]
    fn counts_of_all_workers_are_added_up() {
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

    /// Workers forget upstreams and meet them again: counts are not lost, and cells do not pile up.
    #[test]
    fn a_cell_that_no_worker_holds_is_reused() {
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
        assert_eq!(sums.len(), MAX_SERIES + 1);
        assert_eq!(sums.values().map(Histogram::count).sum::<u64>(), 9000);
        let other = &sums[&SeriesKey::OVERFLOW];
        assert_eq!(other.count(), 9000 - MAX_SERIES as u64);
        assert_eq!(
            (SeriesKey::OVERFLOW.method(), SeriesKey::OVERFLOW.error(true).as_deref()),
            (OTHER, Some(OTHER))
        );
    }

    #[test]
    fn an_exemplar_stays_with_its_bucket() {
        let durations = Durations::default();
        let cell = durations.cell();
        let ids = |id: u64| TraceId::new(u128::from(id)).zip(SpanId::new(id));
        cell.observe(key(0, 200), Duration::from_millis(1), ids(1));
        cell.observe(key(0, 200), Duration::from_millis(2), None);
        cell.observe(key(0, 200), Duration::from_millis(30), ids(3));
        let sums = read(&durations);
        let exemplars = &sums[&key(0, 200)].exemplars;
        let traces: Vec<_> = exemplars.iter().map(|(bucket, e)| (*bucket, e.trace.get())).collect();
        assert_eq!(traces, [(0, 1), (3, 3)]);
    }

    #[test]
    fn the_error_label_follows_the_conventions() {
        let error = |status, inbound| SeriesKey { method: 0, status, error: "" }.error(inbound);
        assert_eq!((error(404, true), error(404, false).as_deref()), (None, Some("404")));
        assert_eq!((error(200, false), error(503, true).as_deref()), (None, Some("503")));
        let refused = SeriesKey { method: 0, status: 503, error: "breaker_open" };
        assert_eq!(refused.error(false).as_deref(), Some("breaker_open"));
    }
}
