//! Spans on their way to the collector.
//!
//! A worker puts the record of a call into a bounded queue and goes on; a thread of its own makes spans of it and sends
//! them. Whatever the collector does, all that can happen to the data path is that the queue is full: then spans are
//! dropped and counted.

mod client;
mod destination;
mod sender;

pub use destination::Destination;

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

use super::record::Record;

/// How spans are gathered and sent. From the environment, by OpenTelemetry's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batching {
    /// Calls that wait to be sent, at most.
    pub queue: usize,
    /// Calls that are sent together, at most.
    pub batch: usize,
    /// How long the first one waits for others.
    pub delay: Duration,
    /// What sending a batch may take, all tries together.
    pub timeout: Duration,
}

impl Batching {
    /// `env`: reads a variable. What is no positive number is passed over.
    pub fn from_env(env: impl Fn(&str) -> Option<String>) -> Self {
        let number = |name: &str, default: u64, most: u64| {
            let set = env(name).and_then(|text| text.trim().parse::<u64>().ok()).filter(|number| *number > 0);
            set.unwrap_or(default).min(most)
        };
        let queue = number("OTEL_BSP_MAX_QUEUE_SIZE", 2048, 65_536) as usize;
        Self {
            queue,
            batch: (number("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512, 65_536) as usize).min(queue),
            // Sooner than the prescribed 5 s: whoever looks for a trace looks now.
            delay: Duration::from_millis(number("OTEL_BSP_SCHEDULE_DELAY", 1000, 600_000)),
            timeout: Duration::from_millis(number("OTEL_BSP_EXPORT_TIMEOUT", 30_000, 600_000)),
        }
    }
}

/// What has become of spans.
#[derive(Debug, Default)]
pub struct Counts {
    pub exported: AtomicU64,
    /// The queue was full.
    pub dropped: AtomicU64,
    /// The collector did not take them.
    pub failed: AtomicU64,
}

impl Counts {
    /// By word: `exported`, `queue_full`, `failed`.
    pub fn read(&self) -> [(&'static str, u64); 3] {
        [("exported", &self.exported), ("queue_full", &self.dropped), ("failed", &self.failed)]
            .map(|(word, count)| (word, count.load(Ordering::Relaxed)))
    }
}

/// The worker's end of the way to the collector.
#[derive(Debug)]
pub struct Export {
    queue: mpsc::Sender<Arc<Record>>,
    most: usize,
    pub destination: Destination,
    pub state: std::sync::Arc<State>,
    ending: Mutex<Option<Ending>>,
}

/// How sending goes.
#[derive(Debug, Default)]
pub struct State {
    pub counts: Counts,
    last_error: Mutex<Option<(String, Instant)>>,
}

impl State {
    fn note(&self, error: Option<String>) {
        *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) =
            error.map(|error| (error, Instant::now()));
    }

    /// Why the last batch was not taken, and how long ago; none where the last one was taken.
    pub fn last_error(&self) -> Option<(String, Duration)> {
        let last = self.last_error.lock().unwrap_or_else(PoisonError::into_inner);
        last.as_ref().map(|(error, at)| (error.clone(), at.elapsed()))
    }
}

#[derive(Debug)]
struct Ending {
    ask: oneshot::Sender<()>,
    done: oneshot::Receiver<()>,
    _thread: JoinHandle<()>,
}

/// Why nothing is exported.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    #[error("cannot start the thread that exports spans: {0}")]
    Thread(#[from] io::Error),
}

impl Export {
    /// Starts the thread. `instance` tells this process from others of the same service.
    ///
    /// # Errors
    /// The system has no thread to give.
    pub fn start(
        destination: Destination,
        batching: Batching,
        service: &str,
        instance: &str,
    ) -> Result<Self, ExportError> {
        let resource = resource(service, instance);
        let (queue, records) = mpsc::channel(batching.queue);
        let (ask, asked) = oneshot::channel();
        let (tell, done) = oneshot::channel();
        let state = std::sync::Arc::<State>::default();
        let sending = sender::Sending {
            records,
            asked,
            batching,
            destination: destination.clone(),
            resource,
            state: std::sync::Arc::clone(&state),
        };
        let thread = std::thread::Builder::new().name("export".to_owned()).spawn(move || {
            sender::run(sending);
            // Whoever waited for it may be gone.
            let _ = tell.send(());
        })?;
        let ending = Mutex::new(Some(Ending { ask, done, _thread: thread }));
        Ok(Self { queue, most: batching.queue, destination, state, ending })
    }

    /// Hands a record over; never waits.
    pub fn send(&self, record: Arc<Record>) {
        if let Err(mpsc::error::TrySendError::Full(record) | mpsc::error::TrySendError::Closed(record)) =
            self.queue.try_send(record)
        {
            self.state.counts.dropped.fetch_add(record.spans(), Ordering::Relaxed);
        }
    }

    /// Calls that wait, and how many may.
    pub fn waiting(&self) -> (usize, usize) {
        (self.most.saturating_sub(self.queue.capacity()), self.most)
    }

    /// Sends what waits, within `limit`; nothing is taken from then on. False where time ran out.
    pub async fn flush(&self, limit: Duration) -> bool {
        let ending = self.ending.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(ending) = ending else { return true };
        // A thread that is gone has nothing to send.
        let _ = ending.ask.send(());
        tokio::time::timeout(limit, ending.done).await.is_ok()
    }
}

/// Who speaks. `OTEL_RESOURCE_ATTRIBUTES` is in it.
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
