//! Export of spans to the collector.
//!
//! A worker puts the record of a request into a bounded queue; a thread of its own makes spans of it and sends them. A
//! slow or missing collector cannot delay the data path: when the queue is full, spans are dropped and counted.

mod client;
mod collector;
mod sender;

pub use collector::Collector;

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use opentelemetry::KeyValue;
use opentelemetry_sdk::Resource;
use tokio::sync::{mpsc, oneshot};

use super::record::RequestRecord;

/// How spans are batched, from OpenTelemetry's environment variables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batching {
    /// The most requests that wait for export.
    pub queue: usize,
    /// The most requests in one batch.
    pub batch: usize,
    /// How long the first request of a batch waits for others.
    pub delay: Duration,
    /// Limit for exporting a batch, retries included.
    pub timeout: Duration,
}

impl Batching {
    /// `env` reads a variable. Values that are not positive numbers are ignored.
    pub fn from_env(env: impl Fn(&str) -> Option<String>) -> Self {
        let number = |name: &str, default: u64, most: u64| {
            let set = env(name).and_then(|text| text.trim().parse::<u64>().ok()).filter(|number| *number > 0);
            set.unwrap_or(default).min(most)
        };
        let queue = number("OTEL_BSP_MAX_QUEUE_SIZE", 2048, 65_536) as usize;
        Self {
            queue,
            batch: (number("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512, 65_536) as usize).min(queue),
            // Shorter than OpenTelemetry's default of 5 s: people look for a trace right after its request.
            delay: Duration::from_millis(number("OTEL_BSP_SCHEDULE_DELAY", 1000, 600_000)),
            timeout: Duration::from_millis(number("OTEL_BSP_EXPORT_TIMEOUT", 30_000, 600_000)),
        }
    }
}

/// Counts of spans by outcome.
#[derive(Debug, Default)]
pub struct SpanCounts {
    pub exported: AtomicU64,
    /// The queue was full.
    pub dropped: AtomicU64,
    /// The collector rejected them or could not be reached.
    pub failed: AtomicU64,
}

impl SpanCounts {
    /// By word: `exported`, `queue_full`, `failed`.
    pub fn extract(&self) -> [(&'static str, u64); 3] {
        [("exported", &self.exported), ("queue_full", &self.dropped), ("failed", &self.failed)]
            .map(|(word, count)| (word, count.load(Ordering::Relaxed)))
    }
}

/// The workers' handle on the export thread.
#[derive(Debug)]
pub struct Export {
    queue: mpsc::Sender<Arc<RequestRecord>>,
    capacity: usize,
    pub destination: Collector,
    pub state: std::sync::Arc<ExportState>,
    shutdown: Mutex<Option<Shutdown>>,
}

/// The state of the export, for status and metrics.
#[derive(Debug, Default)]
pub struct ExportState {
    pub counts: SpanCounts,
    last_error: Mutex<Option<(String, Instant)>>,
}

impl ExportState {
    fn set_error(&self, error: Option<String>) {
        *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) =
            error.map(|error| (error, Instant::now()));
    }

    /// Why the last batch failed, and how long ago; none where it succeeded.
    pub fn last_error(&self) -> Option<(String, Duration)> {
        let last = self.last_error.lock().unwrap_or_else(PoisonError::into_inner);
        last.as_ref().map(|(error, at)| (error.clone(), at.elapsed()))
    }
}

#[derive(Debug)]
struct Shutdown {
    request: oneshot::Sender<()>,
    done: oneshot::Receiver<()>,
    _thread: JoinHandle<()>,
}

/// Why the export cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    #[error("cannot start the thread that exports spans: {0}")]
    Thread(#[from] io::Error),
}

impl Export {
    /// Starts the export thread. `instance` distinguishes this process from others of the same service.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(
        destination: Collector,
        batching: Batching,
        service: &str,
        instance: &str,
    ) -> Result<Self, ExportError> {
        let resource = resource(service, instance);
        let (queue, records) = mpsc::channel(batching.queue);
        let (request, shutdown) = oneshot::channel();
        let (finish, done) = oneshot::channel();
        let state = std::sync::Arc::<ExportState>::default();
        let exporter = sender::ExportThread {
            records,
            shutdown,
            batching,
            destination: destination.clone(),
            resource,
            state: std::sync::Arc::clone(&state),
        };
        let thread = std::thread::Builder::new().name("export".to_owned()).spawn(move || {
            sender::run(exporter);
            // The receiver may have been dropped.
            let _ = finish.send(());
        })?;
        let shutdown = Mutex::new(Some(Shutdown { request, done, _thread: thread }));
        Ok(Self { queue, capacity: batching.queue, destination, state, shutdown })
    }

    /// Queues a record; never blocks.
    pub fn send(&self, record: Arc<RequestRecord>) {
        if let Err(mpsc::error::TrySendError::Full(record) | mpsc::error::TrySendError::Closed(record)) =
            self.queue.try_send(record)
        {
            self.state.counts.dropped.fetch_add(record.span_count(), Ordering::Relaxed);
        }
    }

    /// Requests in the queue, and its capacity.
    pub fn queued(&self) -> (usize, usize) {
        (self.capacity.saturating_sub(self.queue.capacity()), self.capacity)
    }

    /// Exports what is queued and stops the thread. False where that took longer than `limit`.
    pub async fn flush(&self, limit: Duration) -> bool {
        let shutdown = self.shutdown.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(shutdown) = shutdown else { return true };
        // Fails only where the thread has already ended, with nothing left to send.
        let _ = shutdown.request.send(());
        tokio::time::timeout(limit, shutdown.done).await.is_ok()
    }
}

/// The OpenTelemetry resource. It includes `OTEL_RESOURCE_ATTRIBUTES`.
fn resource(service: &str, instance: &str) -> Resource {
    Resource::builder()
        .with_attributes([
            KeyValue::new("service.instance.id", instance.to_owned()),
            KeyValue::new("telemetry.distro.name", env!("CARGO_PKG_NAME")),
            KeyValue::new("telemetry.distro.version", env!("CARGO_PKG_VERSION")),
        ])
        .with_service_name(service.to_owned())
        .build()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batching_is_read_from_the_environment_within_bounds() {
        let env = |pairs: &'static [(&str, &str)]| {
            move |name: &str| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        };
        let default = Batching::from_env(env(&[]));
        assert_eq!((default.queue, default.batch, default.delay), (2048, 512, Duration::from_secs(1)));
        let small =
            Batching::from_env(env(&[("OTEL_BSP_MAX_QUEUE_SIZE", "10"), ("OTEL_BSP_SCHEDULE_DELAY", "x")]));
        assert_eq!((small.queue, small.batch, small.delay), (10, 10, default.delay));
        let huge = Batching::from_env(env(&[
            ("OTEL_BSP_MAX_QUEUE_SIZE", "99999999"),
            ("OTEL_BSP_EXPORT_TIMEOUT", "0"),
        ]));
        assert_eq!((huge.queue, huge.timeout), (65_536, default.timeout));
    }
}
