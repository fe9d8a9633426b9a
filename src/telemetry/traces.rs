//! Sampling, and the decision which requests are exported as spans.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;

use super::{
    export::{Batching, Collector, Export},
    record::RequestRecord,
};
use crate::{
    config::{Config, Telemetry, process_env},
    rng::{Rng, mix},
    trace_context::{IncomingContext, Sampler, SpanId, SpanLink, TraceContext, TraceId},
};

/// Sampling and export. Without a collector nothing is sampled here, and the client's trace context passes unchanged: a
/// sampling decision of the proxy would keep an instrumented service from making its own.
#[derive(Debug)]
pub struct Traces {
    sampler: Sampler,
    export: Option<Export>,
    /// Inbound requests in flight, by worker.
    inbound: ArcSwap<Vec<Arc<RequestsInFlight>>>,
}

impl Traces {
    /// Starts the export where a collector is configured. `instance` distinguishes this process from others of the
    /// same service.
    pub fn start(config: &Config, instance: &str) -> Self {
        let export = Collector::from_config(&config.telemetry).and_then(|destination| {
            let batching = Batching::from_env(process_env);
            let started = Export::start(destination, batching, &config.service.name, instance);
            started.inspect_err(|error| tracing::error!(%error, "spans are not exported")).ok()
        });
        Self { sampler: Sampler::new(Instant::now()), export, inbound: ArcSwap::default() }
    }

    /// Whether spans are exported.
    pub const fn is_enabled(&self) -> bool {
        self.export.is_some()
    }

    pub const fn export(&self) -> Option<&Export> {
        self.export.as_ref()
    }

    /// Adds a worker; returns its register of inbound requests in flight.
    pub fn register_worker(&self) -> Arc<RequestsInFlight> {
        let own = Arc::<RequestsInFlight>::default();
        self.inbound.rcu(|known| known.iter().chain([&own]).cloned().collect::<Vec<_>>());
        own
    }

    /// The trace context of a request.
    pub fn context(
        &self,
        incoming: &IncomingContext,
        inbound: bool,
        telemetry: &Telemetry,
        rng: &mut Rng,
        now: Instant,
    ) -> TraceContext {
        if !self.is_enabled() {
            return TraceContext::new(incoming, rng, |_| false);
        }
        // The service forwarded no trace context. A guess becomes a link, never a parent.
        let link =
            if inbound || incoming.parent.is_some() { None } else { only_in_flight(&self.inbound.load()) };
        let decide = |trace| {
            // A link to a sampled trace is only useful if this trace is sampled too.
            link.is_some_and(|link| link.sampled) || self.sampler.should_sample(trace, *telemetry.sample, now)
        };
        TraceContext { link, ..TraceContext::new(incoming, rng, decide) }
    }

    /// Whether to export the spans of a request. `sample_errors`: also where its trace was not sampled but it failed
    /// or was retried.
    pub fn should_export(&self, record: &RequestRecord, sample_errors: impl FnOnce() -> bool) -> bool {
        self.is_enabled() && (record.context.sampled || (record.is_notable() && sample_errors()))
    }

    /// Queues a record for export.
    pub fn send(&self, record: Arc<RequestRecord>) {
        if let Some(export) = &self.export {
            export.send(record);
        }
    }

    /// Exports what is queued, at the end of the process.
    pub async fn flush(&self, limit: Duration) {
        if let Some(export) = &self.export
            && !export.flush(limit).await
        {
            let (waiting, _) = export.queued();
            tracing::warn!(destination = %export.destination, waiting, "not all spans were exported before the end");
        }
    }
}

/// The inbound requests that one worker has in flight: their number, and the IDs of the request if it is only one.
///
/// Written by its worker only, read by all. IDs are combined by exclusive or, so when all requests but one have ended,
/// the IDs of that one remain. The checksum detects a read in the middle of a change.
#[derive(Debug, Default)]
pub struct RequestsInFlight {
    count: AtomicU32,
    sampled: AtomicU32,
    trace_high: AtomicU64,
    trace_low: AtomicU64,
    span: AtomicU64,
    check: AtomicU64,
}

impl RequestsInFlight {
    pub fn add(&self, context: &TraceContext) {
        self.change(context, |count| count.wrapping_add(1));
    }

    pub fn remove(&self, context: &TraceContext) {
        self.change(context, |count| count.wrapping_sub(1));
    }

    fn change(&self, context: &TraceContext, step: impl Fn(u32) -> u32) {
        let (trace, span) = (context.trace.get(), context.span.get());
        let (high, low) = ((trace >> 64) as u64, trace as u64);
        // Only this worker writes, so a load and a store are enough.
        let flip =
            |word: &AtomicU64, by: u64| word.store(word.load(Ordering::Relaxed) ^ by, Ordering::Relaxed);
        let count = |word: &AtomicU32| word.store(step(word.load(Ordering::Relaxed)), Ordering::Relaxed);
        count(&self.count);
        if context.sampled {
            count(&self.sampled);
        }
        flip(&self.trace_high, high);
        flip(&self.trace_low, low);
        flip(&self.span, span);
        flip(&self.check, checksum(high, low, span));
    }
}

fn checksum(high: u64, low: u64, span: u64) -> u64 {
    mix(high ^ mix(low ^ mix(span)))
}

/// The only inbound request in flight, where there is exactly one.
fn only_in_flight(workers: &[Arc<RequestsInFlight>]) -> Option<SpanLink> {
    let count = |of: fn(&RequestsInFlight) -> &AtomicU32| {
        workers.iter().fold(0u32, |sum, one| sum.wrapping_add(of(one).load(Ordering::Relaxed)))
    };
    if count(|one| &one.count) != 1 {
        return None;
    }
    let word = |of: fn(&RequestsInFlight) -> &AtomicU64| {
        workers.iter().fold(0u64, |all, one| all ^ of(one).load(Ordering::Relaxed))
    };
    let (high, low, span) = (word(|one| &one.trace_high), word(|one| &one.trace_low), word(|one| &one.span));
    if word(|one| &one.check) != checksum(high, low, span) {
        return None;
    }
    Some(SpanLink {
        trace: TraceId::new((u128::from(high) << 64) | u128::from(low))?,
        span: SpanId::new(span)?,
        sampled: count(|one| &one.sampled) == 1,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_single_request_in_flight_is_linked() {
        let mut rng = Rng::from_seed(5);
        let mut context = |sampled| TraceContext::new(&IncomingContext::default(), &mut rng, |_| sampled);
        let workers = [Arc::<RequestsInFlight>::default(), Arc::default()];
        assert_eq!(only_in_flight(&workers), None);
        let (a, b) = (context(true), context(false));
        workers[0].add(&a);
        assert_eq!(only_in_flight(&workers), Some(SpanLink { trace: a.trace, span: a.span, sampled: true }));
        workers[1].add(&b);
        assert_eq!(only_in_flight(&workers), None, "ambiguous");
        workers[0].remove(&a);
        assert_eq!(only_in_flight(&workers), Some(SpanLink { trace: b.trace, span: b.span, sampled: false }));
        workers[1].remove(&b);
        assert_eq!(only_in_flight(&workers), None);
        // A read in the middle of a change.
        workers[0].count.store(1, Ordering::Relaxed);
        workers[0].trace_low.store(7, Ordering::Relaxed);
        assert_eq!(only_in_flight(&workers), None);
    }
}
