//! The export thread: makes spans of records and sends them.

use std::{
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use http::header::AUTHORIZATION;
use opentelemetry_otlp::{
    Protocol, SpanExporter, WithExportConfig, WithHttpConfig, WithTonicConfig,
    tonic_types::{
        metadata::MetadataMap,
        transport::{Certificate, ClientTlsConfig},
    },
};
use opentelemetry_sdk::{
    Resource,
    trace::{SpanData, SpanExporter as _},
};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, timeout, timeout_at},
};

use super::{
    Batching, Collector, ExportState,
    client::{Client, LastFailure},
};
use crate::{
    config::OtlpProtocol,
    dns::Resolver,
    fetch::Fetcher,
    telemetry::{
        record::RequestRecord,
        spans::{self, WallClock},
    },
};

/// Timeout of one request to the collector, unless `OTEL_EXPORTER_OTLP_TIMEOUT` is set.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// The state of the export thread.
pub struct ExportThread {
    pub records: mpsc::Receiver<Arc<RequestRecord>>,
    /// Receives the request to export what is queued and end.
    pub shutdown: oneshot::Receiver<()>,
    pub batching: Batching,
    pub destination: Collector,
    pub resource: Resource,
    pub state: Arc<ExportState>,
}

/// The outcome of one batch.
struct BatchResult {
    spans: u64,
    /// Why it was not accepted.
    failed: Option<String>,
}

pub fn run(thread: ExportThread) {
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(thread.run()),
        Err(error) => {
            tracing::error!(%error, "spans are not exported: cannot start the runtime of the export thread")
        }
    }
}

impl ExportThread {
    async fn run(mut self) {
        let failure = LastFailure::default();
        let mut exporter = match exporter(&self.destination, &failure) {
            Ok(exporter) => exporter,
            Err(error) => {
                tracing::error!(destination = %self.destination, error, "spans are not exported");
                self.state.set_error(Some(error));
                return self.discard().await;
            }
        };
        exporter.set_resource(&self.resource);
        let scope = spans::scope();
        let mut records = Vec::with_capacity(self.batching.batch);
        let mut failing = false;
        loop {
            let more = self.gather(&mut records).await;
            if !records.is_empty() {
                let wall = WallClock::now();
                let mut batch = Vec::with_capacity(2 * records.len());
                for record in records.drain(..) {
                    spans::append_spans(&record, &wall, &scope, &mut batch);
                }
                let mut result = self.send(&exporter, batch).await;
                result.failed = result.failed.map(|error| failure.take().unwrap_or(error));
                failing = self.report(result, failing);
            } else if !more {
                return;
            }
        }
    }

    /// Gathers a batch. False: the queue is closed and empty.
    async fn gather(&mut self, records: &mut Vec<Arc<RequestRecord>>) -> bool {
        let max = self.batching.batch;
        let Self { records: queue, shutdown, .. } = self;
        // Shutting down: send what is queued without waiting for more.
        if queue.is_closed() {
            return queue.recv_many(records, max).await > 0;
        }
        let fill = async {
            if queue.recv_many(records, max).await > 0 {
                let until = Instant::now() + self.batching.delay;
                while records.len() < max {
                    let missing = max - records.len();
                    match timeout_at(until, queue.recv_many(records, missing)).await {
                        Ok(1..) => {}
                        Ok(0) | Err(_) => break,
                    }
                }
            }
        };
        tokio::select! {
            () = fill => {}
            _ = shutdown => queue.close(),
        }
        true
    }

    /// Sends a batch.
    async fn send(&self, exporter: &SpanExporter, batch: Vec<SpanData>) -> BatchResult {
        let (spans, limit) = (batch.len() as u64, self.batching.timeout);
        let failed = match timeout(limit, exporter.export(batch)).await {
            Ok(result) => result.err().map(|error| error.to_string()),
            Err(_) => Some(format!("no response within {limit:?}")),
        };
        BatchResult { spans, failed }
    }

    /// Counts the batch, and logs when export starts or stops to fail. Returns whether it failed.
    fn report(&self, BatchResult { spans, failed }: BatchResult, was_failing: bool) -> bool {
        let destination = &self.destination;
        let failing = failed.is_some();
        let count = if failing { &self.state.counts.failed } else { &self.state.counts.exported };
        match &failed {
            None if was_failing => tracing::info!(%destination, "spans are exported again"),
            Some(error) if !was_failing => {
                tracing::warn!(%destination, spans, error, "spans could not be exported; requests are not affected");
            }
            _ => {}
        }
        self.state.set_error(failed);
        // Last, so that the error is visible before the count.
        count.fetch_add(spans, Ordering::Relaxed);
        failing
    }

    /// Counts records as failed, until the shutdown.
    async fn discard(mut self) {
        loop {
            tokio::select! {
                record = self.records.recv() => match record {
                    Some(record) => self.state.counts.failed.fetch_add(record.span_count(), Ordering::Relaxed),
                    None => return,
                },
                _ = &mut self.shutdown => return,
            };
        }
    }
}

/// Builds the exporter, which itself reads headers, compression and timeout from `OTEL_EXPORTER_OTLP_…`.
fn exporter(to: &Collector, failure: &LastFailure) -> Result<SpanExporter, String> {
    let roots = certificate();
    let built = match to.protocol {
        OtlpProtocol::Grpc => {
            let mut builder = SpanExporter::builder().with_tonic().with_endpoint(&to.url);
            if to.is_secure() {
                let tls = match &roots {
                    Some(path) => {
                        let pem =
                            std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
                        ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem))
                    }
                    None => ClientTlsConfig::new().with_native_roots(),
                };
                builder = builder.with_tls_config(tls);
            }
            if let Some(credentials) = &to.credentials {
                let fields = [(AUTHORIZATION, credentials.clone())];
                builder = builder.with_metadata(MetadataMap::from_headers(fields.into_iter().collect()));
            }
            builder.build()
        }
        OtlpProtocol::Http => {
            let resolver = Resolver::from_system().map_err(|error| error.to_string())?;
            let mut fetcher = Fetcher::new(Arc::new(resolver));
            if let Some(path) = &roots {
                fetcher = fetcher.with_roots_from(path).map_err(|error| error.to_string())?;
            }
            let credentials = to.credentials.as_ref().and_then(|field| field.to_str().ok());
            let headers = credentials.map(|field| ("authorization".to_owned(), field.to_owned()));
            SpanExporter::builder()
                .with_http()
                .with_headers(headers.into_iter().collect())
                .with_protocol(Protocol::HttpBinary)
                .with_endpoint(&to.url)
                .with_http_client(Client { fetcher, timeout: request_timeout(), failure: failure.clone() })
                .build()
        }
    };
    built.map_err(|error| error.to_string())
}

fn variable(of_traces: &str, of_all: &str) -> Option<String> {
    let set = |name: &str| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
    set(of_traces).or_else(|| set(of_all))
}

/// The file of the roots that are trusted in place of the system's.
fn certificate() -> Option<PathBuf> {
    variable("OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE", "OTEL_EXPORTER_OTLP_CERTIFICATE").map(PathBuf::from)
}

fn request_timeout() -> Duration {
    let set = variable("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT");
    let millis = set.and_then(|text| text.trim().parse().ok()).filter(|millis| *millis > 0);
    millis.map_or(REQUEST_TIMEOUT, Duration::from_millis)
}
