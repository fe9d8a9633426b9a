//! The queues in `GET /status` and `/metrics`.

use std::{collections::BTreeMap, fmt, sync::Arc};

use prometheus_client::{
    encoding::DescriptorEncoder,
    metrics::{counter::ConstCounter, gauge::ConstGauge},
    registry::Unit,
};
use serde::{Deserialize, Serialize};

use super::exposition::{family, single};
use crate::{
    proxy::{queue::QueueState, worker::Shared},
    queue::store::{DeliveryState, QueueCounts, StoreFailure, StoreStatus},
};

/// A queue of the configuration, or one that the store has deliveries of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QueueStatus {
    pub name: String,
    /// Deliveries by state.
    pub messages: BTreeMap<String, u64>,
    /// Of the requests that wait.
    pub bytes: u64,
    /// Deliveries under way.
    pub in_flight: usize,
    /// The age of the delivery that is due first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oldest_seconds: Option<u64>,
    /// Why it is paused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused: Option<String>,
}

/// The store of the queues.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StoreReport {
    pub used_bytes: u64,
    /// Why nothing can be stored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
    /// Corrupt files that were renamed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub set_aside: Vec<std::path::PathBuf>,
}

/// One reading of everything.
struct Reading {
    store: Arc<StoreStatus>,
    max_bytes: u64,
    states: BTreeMap<String, QueueState>,
    /// All queues, by name.
    queues: BTreeMap<String, QueueCounts>,
}

impl Reading {
    fn of(shared: &Shared) -> Option<Self> {
        let queues = shared.queues.as_ref()?;
        let (store, states) = (queues.store.status(), queues.states());
        let config = &shared.snapshot.load().config;
        let mut all = store.counts.0.clone();
        for queue in &config.queues {
            all.entry(queue.name.clone()).or_default();
        }
        let max_bytes = config.store.as_ref().map_or(0, |store| store.max_bytes.0);
        Some(Self { store, max_bytes, states, queues: all })
    }

    fn state(&self, queue: &str) -> QueueState {
        self.states.get(queue).cloned().unwrap_or_default()
    }
}

/// Deliveries by state, those under way counted as such.
fn by_state(counts: &QueueCounts, in_flight: usize) -> [(&'static str, u64); DeliveryState::ALL.len() + 1] {
    let delivering = (in_flight as u64).min(counts.pending());
    let mut left = delivering;
    let mut states = [("delivering", delivering); DeliveryState::ALL.len() + 1];
    for (row, state) in states.iter_mut().zip(DeliveryState::ALL) {
        let stored = counts.messages(state);
        let under_way = if state.is_pending() { left.min(stored) } else { 0 };
        left -= under_way;
        *row = (state.word(), stored - under_way);
    }
    states
}

fn failure(store: &StoreStatus) -> Option<String> {
    match &store.failure {
        Some(StoreFailure::DiskFull) => Some("the disk is full: nothing is accepted".to_owned()),
        Some(StoreFailure::Io(reason)) => Some(reason.clone()),
        None => None,
    }
}

/// What `/status` says of queues and store; none without a store.
pub fn status(shared: &Shared) -> (Vec<QueueStatus>, Option<StoreReport>) {
    let Some(reading) = Reading::of(shared) else { return (Vec::new(), None) };
    let queues = reading.queues.iter().map(|(name, counts)| {
        let state = reading.state(name);
        let messages = by_state(counts, state.in_flight);
        QueueStatus {
            name: name.clone(),
            messages: messages.into_iter().map(|(word, count)| (word.to_owned(), count)).collect(),
            bytes: counts.pending_bytes,
            in_flight: state.in_flight,
            oldest_seconds: state.oldest.map(|age| age.as_secs()),
            paused: state.pause.map(|pause| pause.cause.to_owned()),
        }
    });
    let store = StoreReport {
        used_bytes: reading.store.used_bytes,
        failure: failure(&reading.store),
        set_aside: reading.store.set_aside.clone(),
    };
    (queues.collect(), Some(store))
}

/// Writes the metrics of queues and store; none without a store.
pub(super) fn encode(encoder: &mut DescriptorEncoder<'_>, shared: &Shared) -> fmt::Result {
    let (Some(reading), Some(queues)) = (Reading::of(shared), &shared.queues) else { return Ok(()) };
    let label = |name: &String| ("queue", name.clone());
    let messages = reading.queues.iter().flat_map(|(name, counts)| {
        let states = by_state(counts, reading.state(name).in_flight);
        states.map(|(state, count)| ([label(name), ("state", state.to_owned())], ConstGauge::new(count)))
    });
    family(encoder, "outrigger_queue_messages", "Deliveries by state", None, messages)?;
    let rows = reading.queues.iter();
    let bytes = rows.clone().map(|(name, counts)| ([label(name)], ConstGauge::new(counts.pending_bytes)));
    family(encoder, "outrigger_queue_bytes", "Bytes of requests that wait for delivery", None, bytes)?;
    let oldest = rows.clone().map(|(name, _)| {
        let age = reading.state(name).oldest.unwrap_or_default();
        ([label(name)], ConstGauge::new(age.as_secs_f64()))
    });
    let help = "Age of the delivery that is due first";
    family(encoder, "outrigger_queue_oldest_seconds", help, None, oldest)?;
    let counters = queues.counters();
    let outcomes = |counts: BTreeMap<(String, &'static str), u64>| {
        counts.into_iter().map(|((queue, outcome), count)| {
            ([("queue", queue), ("outcome", outcome.to_owned())], ConstCounter::new(count))
        })
    };
    let help = "Requests that were to be queued, by outcome";
    family(encoder, "outrigger_queue_accepted", help, None, outcomes(counters.accepted))?;
    let help = "Attempts of deliveries, and their ends, by outcome";
    family(encoder, "outrigger_queue_deliveries", help, None, outcomes(counters.deliveries))?;
    let paused = rows.map(|(name, _)| {
        let pause = reading.state(name).pause;
        let cause = pause.map_or("", |pause| pause.cause).to_owned();
        ([label(name), ("cause", cause)], ConstGauge::new(i64::from(pause.is_some())))
    });
    let help = "Whether the service cannot be reached, so that the queue waits";
    family(encoder, "outrigger_queue_paused", help, None, paused)?;
    let store = &reading.store;
    let time = ConstCounter::new(store.commit_time.as_secs_f64());
    single(encoder, "outrigger_store_commit", "Time that commits took", Some(&Unit::Seconds), &time)?;
    single(encoder, "outrigger_store_commits", "Commits", None, &ConstCounter::new(store.commits))?;
    let free = reading.max_bytes.saturating_sub(store.used_bytes);
    let help = "Bytes that the store may still take";
    single(encoder, "outrigger_store_free_bytes", help, None, &ConstGauge::new(free))?;
    let failed = i64::from(!store.is_healthy());
    let help = "Whether the store cannot be used, or a corrupt file was renamed";
    single(encoder, "outrigger_store_failed", help, None, &ConstGauge::new(failed))
}
