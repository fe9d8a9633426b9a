//! The task that delivers: one in the process, on the first worker. It performs what [`Scheduler`] decides: has deliveries
//! attempted, and writes what the attempts mean.

use std::{
    collections::{BTreeMap, HashMap},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use tokio::{
    task::{Id, JoinError, JoinSet},
    time::{Instant, interval, sleep_until},
};

use super::{
    Claim, Pause, QueueState, Queues,
    attempt::Report,
    task::{self, Attempt, Settlement, TaskEnd},
};
use crate::{
    config::Config,
    proxy::worker::{Phase, Worker},
    queue::{
        DeliveryId,
        store::{StoreError, StoreFailure, Sweep},
    },
    resilience::queue::{
        DeadReason, DueDelivery, Verdict,
        keys::{DeliveryOrder, QueueSettings},
        policy::{AmbiguousPolicy, DeliveryOutcome},
        scheduler::{Scheduler, Step},
    },
    telemetry::access_log::DeliveryEnd,
    unix_time::UnixMillis,
};

/// How often deliveries expire and what has ended is deleted.
const SWEEP: Duration = Duration::from_secs(1);
/// How long after a failure of the store the next delivery begins.
const STORE_RETRY: Duration = Duration::from_secs(1);

/// The cause of a pause that an operator made.
const OPERATOR: &str = "operator";

/// Delivers until the process ends. Does nothing without a store.
pub async fn run(worker: Rc<Worker>) {
    let Some(queues) = worker.shared.queues.clone() else { return };
    let mut phase = worker.shared.phase.subscribe();
    let mut deliverer = Deliverer {
        worker,
        queues: Arc::clone(&queues),
        scheduler: Scheduler::default(),
        config: None,
        tasks: JoinSet::new(),
        subjects: HashMap::new(),
        pauses: HashMap::new(),
        oldest: HashMap::new(),
        holds: HashMap::new(),
        holds_known: false,
        store_retry: None,
    };
    let mut sweeps = interval(SWEEP);
    loop {
        let changed = queues.changed.notified();
        let wake = deliverer.step().await;
        let timer = async {
            match wake {
                Some(wake) => sleep_until(wake).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            ended = deliverer.tasks.join_next_with_id(), if !deliverer.tasks.is_empty() => {
                if let Some(ended) = ended {
                    deliverer.ended(ended);
                }
            }
            () = changed => {}
            () = timer => {}
            _ = sweeps.tick() => deliverer.sweep().await,
            _ = phase.changed() => {}
        }
    }
}

struct Deliverer {
    worker: Rc<Worker>,
    queues: Arc<Queues>,
    scheduler: Scheduler,
    /// The configuration that the scheduler has.
    config: Option<Arc<Config>>,
    /// Attempts, and verdicts on their way to the disk.
    tasks: JoinSet<TaskEnd>,
    /// What each task is about, for one that panics.
    subjects: HashMap<Id, (Arc<str>, DeliveryId)>,
    /// Since when each paused queue is, and why.
    pauses: HashMap<Arc<str>, Pause>,
    /// The age of the delivery that is due first, by queue.
    oldest: HashMap<Arc<str>, Duration>,
    /// The queues that an operator has stopped, and since when.
    holds: HashMap<String, UnixMillis>,
    /// Whether `holds` is what the store has.
    holds_known: bool,
    /// The store has failed: nothing begins before this time.
    store_retry: Option<Instant>,
}

impl Deliverer {
    /// Starts what may begin now. Returns when to look again, if nothing happens before.
    async fn step(&mut self) -> Option<Instant> {
        self.adopt();
        let wake = self.begin_due().await;
        self.publish();
        wake
    }

    async fn begin_due(&mut self) -> Option<Instant> {
        if *self.worker.shared.phase.borrow() > Phase::Running {
            return None;
        }
        if let Some(retry) = self.store_unusable_until() {
            return Some(retry);
        }
        if let Err(error) = self.read_holds().await {
            return Some(self.store_failed(&error));
        }
        loop {
            let now = self.queues.store.now();
            match self.scheduler.next(now) {
                Step::Deliver { queue, due, .. } => self.attempt(queue, due),
                Step::Expire { queue, id } => {
                    let verdict = Verdict::Dead(DeadReason::Expired);
                    self.settle(Settlement { id, queue, verdict, outcome: None, attempt: None });
                }
                Step::Load { queue, limit } => match self.queues.store.due(queue.to_string(), limit).await {
                    Ok(found) => self.scheduler.loaded(&queue, Some(found), limit),
                    Err(error) => {
                        self.scheduler.loaded(&queue, None, limit);
                        return Some(self.store_failed(&error));
                    }
                },
                Step::Wait(until) => return until.map(|until| Instant::now() + until.since(now)),
            }
        }
    }

    /// What an operator has changed.
    async fn read_holds(&mut self) -> Result<(), StoreError> {
        if !self.holds_known {
            // A change that comes meanwhile has it read again.
            self.holds_known = true;
            match self.queues.store.paused().await {
                Ok(paused) => self.holds = paused.into_iter().collect(),
                Err(error) => {
                    self.holds_known = false;
                    return Err(error);
                }
            }
        }
        self.scheduler.hold(|queue| self.holds.contains_key(queue));
        Ok(())
    }

    /// While the store fails nothing begins: what becomes of it could not be written. The sweeps have it opened again.
    fn store_unusable_until(&mut self) -> Option<Instant> {
        let now = Instant::now();
        if let Some(StoreFailure::Io(reason)) = &self.queues.store.status().failure {
            return Some(self.store_failed(&StoreError::Failed(reason.clone())));
        }
        let retry = self.store_retry?;
        if retry <= now {
            self.store_retry = None;
            return None;
        }
        Some(retry)
    }

    /// Returns when the store is used again.
    fn store_failed(&mut self, error: &StoreError) -> Instant {
        if self.store_retry.is_none() {
            tracing::error!(%error, "the store fails: no delivery begins until it can be used again");
        }
        *self.store_retry.insert(Instant::now() + STORE_RETRY)
    }

    /// Follows the configuration, and takes what was accepted meanwhile.
    fn adopt(&mut self) {
        let config = Arc::clone(&self.worker.view().snapshot.config);
        if !self.config.as_ref().is_some_and(|known| Arc::ptr_eq(known, &config)) {
            let policies = config.queues.iter().map(|queue| (queue.name.as_str().into(), queue.policy()));
            self.scheduler.configure(policies.collect());
            self.config = Some(config);
        }
        let (accepted, stale) = {
            let mut inner = self.queues.lock();
            self.holds_known &= !std::mem::take(&mut inner.holds_changed);
            (std::mem::take(&mut inner.accepted), std::mem::take(&mut inner.stale))
        };
        for (queue, due) in accepted {
            self.scheduler.offer(&queue, due);
        }
        for queue in stale {
            self.scheduler.reload(&queue);
        }
    }

    fn settings(&self, queue: &str) -> Option<&QueueSettings> {
        self.config.as_ref()?.queues.iter().find(|settings| settings.name == queue)
    }

    fn attempt(&mut self, queue: Arc<str>, due: DueDelivery) {
        let Some(settings) = self.settings(&queue) else { return };
        let attempt = Attempt {
            worker: Rc::clone(&self.worker),
            queues: Arc::clone(&self.queues),
            is_claimed: self.queues.claim(due.id, Claim::Attempt),
            starts: settings.ambiguous == AmbiguousPolicy::Dead,
            result_limit: settings.result_limit.0,
            due,
        };
        let id = attempt.due.id;
        let task = self.tasks.spawn_local(attempt.run());
        self.subjects.insert(task.id(), (queue, id));
    }

    /// Writes what an attempt means.
    fn settle(&mut self, settlement: Settlement) {
        let Settlement { id, verdict, outcome, .. } = &settlement;
        let queue = Arc::clone(&settlement.queue);
        let word = match verdict {
            Verdict::Done => "done",
            Verdict::Wait { .. } => "failed",
            Verdict::Release => "released",
            Verdict::Dead(reason) => {
                let status = outcome.as_ref().and_then(|outcome| outcome.status);
                let cause = outcome.as_ref().and_then(|outcome| outcome.cause.clone());
                let reason = reason.word();
                tracing::warn!(queue = &*queue, delivery = %id, reason, status, cause, "a delivery is a dead letter");
                reason
            }
        };
        self.queues.count_delivery(&queue, word);
        let queues = Arc::clone(&self.queues);
        let id = *id;
        let task = self.tasks.spawn_local(async move { task::write(&queues, settlement).await });
        self.subjects.insert(task.id(), (queue, id));
    }

    fn ended(&mut self, ended: Result<(Id, TaskEnd), JoinError>) {
        let (id, end) = match ended {
            Ok((id, end)) => (id, end),
            Err(error) => {
                tracing::error!(%error, "a bug in the proxy: the attempt of a delivery panicked");
                (
                    error.id(),
                    TaskEnd::Attempted(Box::new(Report::failed(DeliveryOutcome::NoResponse, "internal"))),
                )
            }
        };
        let Some((queue, delivery)) = self.subjects.remove(&id) else { return };
        match end {
            TaskEnd::Attempted(report) => self.attempted(queue, delivery, *report),
            TaskEnd::Skipped => {
                let (outcome, now) = (DeliveryOutcome::Interrupted { sent: false }, self.queues.store.now());
                self.scheduler.finished((&queue, delivery), outcome, now, 0.0);
                self.scheduler.reload(&queue);
                self.queues.release(delivery);
            }
            TaskEnd::StoreFailed(error) => {
                let (outcome, now) = (DeliveryOutcome::Interrupted { sent: false }, self.queues.store.now());
                self.scheduler.finished((&queue, delivery), outcome, now, 0.0);
                self.store_failed(&error);
                self.queues.release(delivery);
            }
            TaskEnd::Settled { next, end } => {
                if let Some(end) = end {
                    self.worker.shared.request_telemetry.access_log.send_delivery(end);
                }
                self.scheduler.settled(&queue, delivery, next);
                self.queues.release(delivery);
            }
            TaskEnd::NotSettled => {
                self.scheduler.settle_failed(&queue, delivery);
                self.queues.release(delivery);
            }
        }
    }

    fn attempted(&mut self, queue: Arc<str>, id: DeliveryId, mut report: Report) {
        if report.end == DeliveryOutcome::NoResponse && *self.worker.shared.phase.borrow() > Phase::Running {
            // The service shuts down too: that is no failure of this delivery.
            report.end = DeliveryOutcome::Interrupted { sent: true };
        }
        let now = self.queues.store.now();
        let random = self.worker.with_rng(|rng| rng.unit_f64());
        let verdict = self.scheduler.finished((&queue, id), report.end, now, random);
        let is_paused = self.scheduler.states().any(|state| state.name == queue && state.is_paused);
        if is_paused && !self.pauses.contains_key(&queue) {
            let cause = report.cause;
            tracing::warn!(
                queue = &*queue,
                cause,
                "the queue is paused: its deliveries cannot reach the service"
            );
            self.pauses.insert(Arc::clone(&queue), Pause { since: now, cause });
        } else if !is_paused && let Some(pause) = self.pauses.remove(&queue) {
            let paused = now.since(pause.since);
            tracing::info!(queue = &*queue, ?paused, "the service is back: the queue is no longer paused");
        }
        let Some(verdict) = verdict else { return self.queues.release(id) };
        tracing::debug!(
            queue = &*queue,
            delivery = %id,
            status = report.outcome.status,
            cause = report.cause,
            ?verdict,
            "a delivery was attempted"
        );
        let started = self.settings(&queue).is_some_and(|it| it.ambiguous == AmbiguousPolicy::Dead);
        if verdict == Verdict::Release && !started {
            // Nothing of it has changed.
            self.queues.count_delivery(&queue, "released");
            return self.queues.release(id);
        }
        let (outcome, attempt) = (Some(report.outcome), report.attempt);
        self.settle(Settlement { id, queue, verdict, outcome, attempt });
    }

    /// Expires and deletes.
    async fn sweep(&mut self) {
        let Some(config) = self.config.clone() else { return };
        self.oldest.clear();
        for settings in &config.queues {
            let sweep = Sweep {
                queue: settings.name.clone(),
                expires: settings.expires.limit(),
                retention: settings.retention(),
                in_flight: self.scheduler.in_flight(&settings.name),
            };
            let swept = match self.queues.store.sweep(sweep).await {
                Ok(swept) => swept,
                Err(error) => {
                    tracing::debug!(%error, "the store could not be swept");
                    continue;
                }
            };
            let first = self
                .queues
                .store
                .due(settings.name.clone(), 1)
                .await
                .ok()
                .and_then(|due| due.into_iter().next());
            if let Some(first) = first {
                let age = self.queues.store.now().since(first.since);
                self.oldest.insert(settings.name.as_str().into(), age);
            }
            if settings.order != DeliveryOrder::None && !swept.expired.is_empty() {
                self.scheduler.reload(&settings.name);
            }
            for id in swept.expired {
                self.scheduler.remove(&settings.name, id);
                let reason = DeadReason::Expired.word();
                tracing::warn!(queue = settings.name, delivery = %id, reason, "a delivery is a dead letter");
                self.queues.count_delivery(&settings.name, reason);
                self.queues.notify_end(id);
                let end = DeliveryEnd {
                    at: self.queues.store.now().into(),
                    id,
                    queue: settings.name.clone(),
                    dead: Some(reason),
                    attempts: None,
                    status: None,
                    cause: None,
                };
                self.worker.shared.request_telemetry.access_log.send_delivery(end);
            }
            if swept.dropped > 0 {
                let count = swept.dropped;
                tracing::warn!(
                    queue = settings.name,
                    count,
                    "dead letters were deleted: there were more than `dead.max`"
                );
            }
        }
    }

    fn publish(&self) {
        let state = |queue: crate::resilience::queue::scheduler::QueueState| {
            let held = self.holds.get(&*queue.name).map(|since| Pause { since: *since, cause: OPERATOR });
            let pause = held.or_else(|| self.pauses.get(&queue.name).copied());
            let oldest = self.oldest.get(&queue.name).copied();
            (queue.name.to_string(), QueueState { in_flight: queue.in_flight, pause, oldest })
        };
        self.queues.lock().states = self.scheduler.states().map(state).collect::<BTreeMap<_, _>>();
    }
}
