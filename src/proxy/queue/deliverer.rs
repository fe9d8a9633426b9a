//! The task that delivers: one in the process, on the first worker. It performs what [`Scheduler`] decides: has deliveries
//! attempted, and writes what the attempts mean.

use std::{
    collections::{BTreeMap, HashMap},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    task::{Id, JoinError, JoinSet},
    time::{Instant, interval, sleep, sleep_until},
};

use super::{
    Claim, Pause, QueueState, Queues,
    attempt::{self, Report},
};
use crate::{
    config::Config,
    proxy::worker::{Phase, Worker},
    queue::{
        DeliveryId,
        store::{Outcome, StoreError, Sweep},
    },
    resilience::queue::{
        DeadReason, DueDelivery, Verdict,
        keys::{DeliveryOrder, QueueSettings},
        policy::{AmbiguousPolicy, DeliveryOutcome},
        scheduler::{Scheduler, Step},
    },
};

/// How often deliveries expire and what has ended is deleted.
const SWEEP: Duration = Duration::from_secs(1);
/// How long after a failure of the store it is used again.
const STORE_RETRY: Duration = Duration::from_secs(1);

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
        store_fails: false,
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
    store_fails: bool,
}

/// How a task ended.
enum TaskEnd {
    /// Boxed: a report holds the whole response.
    Attempted(Box<Report>),
    /// It was cancelled or has ended meanwhile, or is being cancelled: nothing was sent, and nothing is to be written.
    Skipped,
    /// The verdict is stored. `next`: the next of the same order.
    Settled {
        next: Option<DueDelivery>,
    },
    NotSettled,
}

impl Deliverer {
    /// Starts what may begin now. Returns when to look again, if nothing happens before.
    async fn step(&mut self) -> Option<Instant> {
        self.adopt();
        if *self.worker.shared.phase.borrow() > Phase::Running {
            return None;
        }
        loop {
            let now = self.queues.store.now();
            match self.scheduler.next(now) {
                Step::Deliver { queue, due, .. } => self.attempt(queue, due),
                Step::Expire { queue, id } => {
                    self.settle(queue, id, Verdict::Dead(DeadReason::Expired), None)
                }
                Step::Load { queue, limit } => {
                    let read = self.queues.store.due(queue.to_string(), limit).await;
                    let failed = read.as_ref().err().map(ToString::to_string);
                    self.scheduler.loaded(&queue, read.ok(), limit);
                    let fails_again = std::mem::replace(&mut self.store_fails, failed.is_some());
                    if let Some(error) = failed {
                        if !fails_again {
                            tracing::error!(error, "deliveries cannot be read from the store; trying again");
                        }
                        return Some(Instant::now() + STORE_RETRY);
                    }
                }
                Step::Wait(until) => {
                    self.publish();
                    return until.map(|until| Instant::now() + until.since(now));
                }
            }
        }
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
            starts: settings.ambiguous == AmbiguousPolicy::Dead,
            result_limit: settings.result_limit.0,
            due,
        };
        let id = attempt.due.id;
        let task = self.tasks.spawn_local(attempt.run());
        self.subjects.insert(task.id(), (queue, id));
    }

    /// Writes what an attempt means.
    fn settle(&mut self, queue: Arc<str>, id: DeliveryId, verdict: Verdict, outcome: Option<Outcome>) {
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
        let task = self.tasks.spawn_local(async move { write(&queues, id, verdict, outcome).await });
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
            TaskEnd::Settled { next } => {
                self.scheduler.settled(&queue, delivery, next);
                self.queues.release(delivery);
            }
            TaskEnd::NotSettled => {
                self.scheduler.settle_failed(&queue, delivery);
                self.queues.release(delivery);
            }
        }
    }

    fn attempted(&mut self, queue: Arc<str>, id: DeliveryId, report: Report) {
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
        self.settle(queue, id, verdict, Some(report.outcome));
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
            let pause = self.pauses.get(&queue.name).copied();
            let oldest = self.oldest.get(&queue.name).copied();
            (queue.name.to_string(), QueueState { in_flight: queue.in_flight, pause, oldest })
        };
        self.queues.lock().states = self.scheduler.states().map(state).collect::<BTreeMap<_, _>>();
    }
}

/// Writes a verdict. While the store fails it is tried again for some time: else the delivery would be repeated.
async fn write(queues: &Queues, id: DeliveryId, verdict: Verdict, outcome: Option<Outcome>) -> TaskEnd {
    let begin = Instant::now();
    let mut is_reported = false;
    loop {
        match queues.store.settle(id, verdict, outcome.clone()).await {
            Ok(next) => {
                if matches!(verdict, Verdict::Done | Verdict::Dead(_)) {
                    queues.notify_end(id);
                }
                return TaskEnd::Settled { next };
            }
            // Cancelled or dropped meanwhile.
            Err(StoreError::NotFound | StoreError::WrongState(_)) => return TaskEnd::Settled { next: None },
            Err(StoreError::Closed) => return TaskEnd::NotSettled,
            Err(error) => {
                if !std::mem::replace(&mut is_reported, true) {
                    tracing::error!(delivery = %id, %error, "the outcome of a delivery cannot be stored; trying again");
                }
                if begin.elapsed() > LONGEST_WRITE {
                    return TaskEnd::NotSettled;
                }
                sleep(STORE_RETRY).await;
            }
        }
    }
}

/// A verdict that could not be stored for this long is given up: the delivery is repeated.
const LONGEST_WRITE: Duration = Duration::from_secs(300);

struct Attempt {
    worker: Rc<Worker>,
    queues: Arc<Queues>,
    /// Whether to note in the store that it begins.
    starts: bool,
    result_limit: u64,
    due: DueDelivery,
}

impl Attempt {
    async fn run(self) -> TaskEnd {
        let Self { queues, due, .. } = &self;
        while !queues.claim(due.id, Claim::Attempt) {
            // It is being cancelled. If that fails, the store still has it.
            queues.wait_unclaimed(due.id).await;
        }
        match self.send().await {
            Ok(end) => end,
            Err(error) => {
                tracing::debug!(delivery = %due.id, %error, "a delivery cannot be read");
                let end = DeliveryOutcome::NotSent { retry_after: Some(STORE_RETRY) };
                TaskEnd::Attempted(Box::new(Report::failed(end, "store_failed")))
            }
        }
    }

    async fn send(&self) -> Result<TaskEnd, StoreError> {
        let Self { worker, queues, due, .. } = self;
        let found = match queues.store.find(due.id).await {
            Err(StoreError::NotFound) => return Ok(TaskEnd::Skipped),
            found => found?,
        };
        if !found.state.is_pending() {
            return Ok(TaskEnd::Skipped);
        }
        let (stored, body) = match queues.store.content(due.id).await {
            Err(StoreError::Unreadable(reason)) => {
                tracing::error!(delivery = %due.id, reason, "a stored request cannot be read");
                let report = Report::failed(DeliveryOutcome::Unreadable, "unreadable");
                return Ok(TaskEnd::Attempted(Box::new(report)));
            }
            content => content?,
        };
        if self.starts {
            queues.store.start(due.id).await?;
        }
        let report = attempt::perform(worker, due, stored, Bytes::from(body), self.result_limit).await;
        let mut report = report;
        if report.is_stale && !self.starts {
            // A pooled connection that the service had most likely closed before: another one is used at once.
            report.end = DeliveryOutcome::Interrupted { sent: false };
        }
        Ok(TaskEnd::Attempted(Box::new(report)))
    }
}
