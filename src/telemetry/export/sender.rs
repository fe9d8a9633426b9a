//! The thread that makes spans of records and sends them.

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
    Batching, Destination, State,
    client::{Client, Failure},
};
use crate::{
    config::OtlpProtocol,
    dns::Resolver,
    fetch::Fetcher,
    telemetry::{
        record::Record,
        spans::{self, WallClock},
    },
};

/// For one request to the collector; `OTEL_EXPORTER_OTLP_TIMEOUT` says otherwise.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the thread works with.
pub struct Sending {
    pub records: mpsc::Receiver<Arc<Record>>,
    /// Asked to send what there is and end.
    pub asked: oneshot::Receiver<()>,
    pub batching: Batching,
    pub destination: Destination,
    pub resource: Resource,
    pub state: Arc<State>,
}

/// What became of a batch.
struct Sent {
    spans: u64,
    /// Why it was not taken.
    failed: Option<String>,
}

pub fn run(sending: Sending) {
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(sending.run()),
        Err(error) => tracing::error!(%error, "spans are not exported: no runtime for it"),
    }
}

impl Sending {
    async fn run(mut self) {
        let failure = Failure::default();
        let mut exporter = match exporter(&self.destination, &failure) {
            Ok(exporter) => exporter,
            Err(error) => {
                tracing::error!(destination = %self.destination, error, "spans are not exported");
                self.state.note(Some(error));
                return self.refuse().await;
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
                    spans::add(&record, &wall, &scope, &mut batch);
                }
                let mut sent = self.send(&exporter, batch).await;
                sent.failed = sent.failed.map(|error| failure.take().unwrap_or(error));
                failing = self.tell(sent, failing);
            } else if !more {
                return;
            }
        }
    }

    /// Gathers a batch. False: nothing more will come.
    async fn gather(&mut self, records: &mut Vec<Arc<Record>>) -> bool {
        let most = self.batching.batch;
        let Self { records: queue, asked, .. } = self;
        // Already asked to end: what waits is sent without waiting for more.
        if queue.is_closed() {
            return queue.recv_many(records, most).await > 0;
        }
        let fill = async {
            if queue.recv_many(records, most).await > 0 {
                let until = Instant::now() + self.batching.delay;
                while records.len() < most {
                    let room = most - records.len();
                    match timeout_at(until, queue.recv_many(records, room)).await {
                        Ok(1..) => {}
                        Ok(0) | Err(_) => break,
                    }
                }
            }
        };
        tokio::select! {
            () = fill => {}
            _ = asked => queue.close(),
        }
        true
    }

    /// Sends a batch; returns how many spans, and what became of them.
    async fn send(&self, exporter: &SpanExporter, batch: Vec<SpanData>) -> Sent {
        let (spans, limit) = (batch.len() as u64, self.batching.timeout);
        let failed = match timeout(limit, exporter.export(batch)).await {
            Ok(result) => result.err().map(|error| error.to_string()),
            Err(_) => Some(format!("no answer within {limit:?}")),
        };
        Sent { spans, failed }
    }

    /// Counts, and says so where it has changed. Returns whether it has failed.
    fn tell(&self, Sent { spans, failed }: Sent, was_failing: bool) -> bool {
        let destination = &self.destination;
        let failing = failed.is_some();
        let count = if failing { &self.state.counts.failed } else { &self.state.counts.exported };
        match &failed {
            None if was_failing => tracing::info!(%destination, "spans are exported again"),
            Some(error) if !was_failing => {
                tracing::warn!(%destination, spans, error, "spans could not be exported; calls go on");
            }
            _ => {}
        }
        self.state.note(failed);
        // Last: whoever sees the count finds the reason, too.
        count.fetch_add(spans, Ordering::Relaxed);
        failing
    }

    /// Counts what comes, until asked to end.
    async fn refuse(mut self) {
        loop {
            tokio::select! {
                record = self.records.recv() => match record {
                    Some(record) => self.state.counts.failed.fetch_add(record.spans(), Ordering::Relaxed),
                    None => return,
                },
                _ = &mut self.asked => return,
            };
        }
    }
}

/// Headers, compression and the limit of time are read from `OTEL_EXPORTER_OTLP_…` by the exporter itself.
fn exporter(to: &Destination, failure: &Failure) -> Result<SpanExporter, String> {
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
                fetcher = fetcher.trusting(path).map_err(|error| error.to_string())?;
            }
            let credentials = to.credentials.as_ref().and_then(|field| field.to_str().ok());
            let headers = credentials.map(|field| ("authorization".to_owned(), field.to_owned()));
            SpanExporter::builder()
                .with_http()
                .with_headers(headers.into_iter().collect())
                .with_protocol(Protocol::HttpBinary)
                .with_endpoint(&to.url)
                .with_http_client(Client { fetcher, patience: patience(), failure: failure.clone() })
                .build()
        }
    };
    built.map_err(|error| error.to_string())
}

fn variable(of_traces: &str, of_all: &str) -> Option<String> {
    let set = |name: &str| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
    set(of_traces).or_else(|| set(of_all))
}

/// Whose certificates are trusted in place of the system's.
fn certificate() -> Option<PathBuf> {
    variable("OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE", "OTEL_EXPORTER_OTLP_CERTIFICATE").map(PathBuf::from)
}

fn patience() -> Duration {
    let set = variable("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT");
    let millis = set.and_then(|text| text.trim().parse().ok()).filter(|millis| *millis > 0);
    millis.map_or(PATIENCE, Duration::from_millis)
}
