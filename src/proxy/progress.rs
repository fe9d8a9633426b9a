//! The clock of an exchange once it streams: when bytes last moved, and when it has to be over.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::time::Instant;

use super::finish;
use crate::{
    net::watchdog::Watchdog,
    proxy::worker::Worker,
    telemetry::record::{End, Record},
};

/// What is known of an exchange's movement. Written by its bodies, read by the task that runs it.
#[derive(Debug)]
pub struct Progress {
    started: Instant,
    moved: Cell<Instant>,
    idle_limit: Cell<Option<Duration>>,
    /// When the whole exchange has to be over.
    over_at: Cell<Option<Instant>>,
    /// When the request's body was sent to its end.
    request_sent: Cell<Option<Instant>>,
    /// Whether response headers are out: from then on a standstill ends the exchange.
    answering: Cell<bool>,
    /// The response is out, to its last byte, or never will be.
    done: Cell<bool>,
    /// Whether the request could be sent once more, as far as its body goes.
    repeatable: Cell<bool>,
    /// When the call wants to be polled though nothing moved: its nearest deadline.
    wake_at: Cell<Option<Instant>>,
    woken: Cell<bool>,
    /// What is noted of the call, until it is over.
    record: RefCell<Option<(Rc<Worker>, Record)>>,
}

impl Progress {
    pub fn new(now: Instant) -> Self {
        Self {
            started: now,
            moved: Cell::new(now),
            idle_limit: Cell::new(None),
            over_at: Cell::new(None),
            request_sent: Cell::new(None),
            answering: Cell::new(false),
            done: Cell::new(false),
            repeatable: Cell::new(true),
            wake_at: Cell::new(None),
            woken: Cell::new(false),
            record: RefCell::new(None),
        }
    }

    /// From here on is noted what the call does.
    pub fn open(&self, worker: &Rc<Worker>, record: Record) {
        *self.record.borrow_mut() = Some((Rc::clone(worker), record));
    }

    /// Notes something of the call; `None` where it is over.
    pub fn note<T>(&self, note: impl FnOnce(&mut Record) -> T) -> Option<T> {
        self.record.borrow_mut().as_mut().map(|(_, record)| note(record))
    }

    pub fn started(&self) -> Instant {
        self.started
    }

    pub fn set_limits(&self, idle: Option<Duration>, whole: Option<Duration>) {
        self.idle_limit.set(idle);
        self.over_at.set(whole.map(|whole| self.started + whole));
    }

    pub fn over_at(&self) -> Option<Instant> {
        self.over_at.get()
    }

    /// Bytes of a body moved, either way. Returns when: now.
    pub fn moved(&self) -> Instant {
        let now = Instant::now();
        self.moved.set(now);
        now
    }

    pub fn request_sent(&self, now: Instant) {
        if self.request_sent.get().is_none() {
            self.moved.set(now);
            self.request_sent.set(Some(now));
        }
    }

    /// The body is larger than what is kept: there will be no other try once it is sent.
    pub fn unrepeatable(&self) {
        self.repeatable.set(false);
    }

    pub fn is_repeatable(&self) -> bool {
        self.repeatable.get()
    }

    pub fn request_sent_at(&self) -> Option<Instant> {
        self.request_sent.get()
    }

    /// Response headers came.
    pub fn heard(&self, now: Instant) {
        self.moved.set(now);
    }

    /// They go out. From here on a standstill ends the exchange.
    pub fn answering(&self) {
        self.answering.set(true);
    }

    /// The exchange is over. What comes first counts.
    pub fn done(&self, end: End, now: Instant) {
        self.moved.set(now);
        self.done.set(true);
        let mut open = self.record.borrow_mut();
        let Some((worker, record)) = &mut *open else { return };
        record.end = end;
        record.ended = Some(now);
        let wanted = finish::finished(worker, record);
        if wanted.is_nothing() {
            // As most are: a record is large, so it ends where it lies.
            *open = None;
        } else if let Some((worker, record)) = open.take() {
            drop(open);
            finish::tell(&worker, wanted, record);
        }
    }

    /// How an exchange ended of which no more is wanted.
    pub fn left(&self, now: Instant) -> End {
        let cut = self.cut_at().is_some_and(|at| now >= at);
        if cut { End::Cut } else { End::CallerGone }
    }

    pub fn is_done(&self) -> bool {
        self.done.get()
    }

    pub fn last_moved(&self) -> Instant {
        self.moved.get()
    }

    /// When the request's body counts as stuck, while it is being sent.
    pub fn upload_stalls_at(&self) -> Option<Instant> {
        match self.request_sent.get() {
            Some(_) => None,
            None => self.idle_limit.get().map(|limit| self.moved.get() + limit),
        }
    }

    /// Asks the task that runs this to poll it again at a moment.
    pub fn wake_at(&self, at: Option<Instant>) {
        self.wake_at.set(at);
    }

    /// Whether that moment has come, told once.
    pub fn take_woken(&self) -> bool {
        self.woken.take()
    }

    /// When the exchange is cut unless something moves. Before response headers its own deadlines hold instead.
    pub fn cut_at(&self) -> Option<Instant> {
        if !self.answering.get() {
            return None;
        }
        let idle = self.idle_limit.get().map(|limit| self.moved.get() + limit);
        match (idle, self.over_at.get()) {
            (Some(idle), Some(over)) => Some(idle.min(over)),
            (due, None) | (None, due) => due,
        }
    }
}

/// Polls `task` under the watch of what `look` says of it: the exchange under way, and when the task is to be cut.
/// Ready with `None` where it was cut.
pub fn poll_watched<T>(
    cx: &mut Context<'_>,
    watchdog: &mut Watchdog,
    mut task: impl FnMut(&mut Context<'_>) -> Poll<T>,
    look: impl Fn() -> (Option<Rc<Progress>>, Option<Instant>),
) -> Poll<Option<T>> {
    loop {
        if let Poll::Ready(output) = task(cx) {
            return Poll::Ready(Some(output));
        }
        let (exchange, cut_at) = look();
        let wake_at = exchange.as_ref().and_then(|exchange| exchange.wake_at.get());
        let due = match (cut_at, wake_at) {
            (Some(cut), Some(wake)) => Some(cut.min(wake)),
            (one, None) | (None, one) => one,
        };
        std::task::ready!(watchdog.poll_due(cx, due));
        if due == cut_at {
            return Poll::Ready(None);
        }
        if let Some(exchange) = exchange {
            exchange.wake_at.set(None);
            exchange.woken.set(true);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, pin::pin};

    use tokio::task::coop::has_budget_remaining;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_standstill_is_noticed_only_after_the_last_movement() {
        let progress = Progress::new(Instant::now());
        progress.set_limits(Some(Duration::from_secs(10)), None);
        assert_eq!(progress.cut_at(), None, "before response headers the exchange's own deadlines hold");
        progress.answering();
        let begun = Instant::now();
        let mut watchdog = Watchdog::default();
        // A movement after the timer was armed sets the end forward, without arming anything.
        let mut moved = false;
        poll_fn(|cx| {
            if !moved && begun.elapsed() >= Duration::from_secs(10) {
                unreachable!("cut although something moved");
            }
            let due = watchdog.poll_due(cx, progress.cut_at());
            if !moved {
                moved = true;
                progress.moved.set(begun + Duration::from_secs(7));
            }
            due
        })
        .await;
        assert_eq!(begun.elapsed().as_secs(), 17);
    }

    #[tokio::test(start_paused = true)]
    async fn the_whole_exchange_can_be_bounded() {
        let progress = Progress::new(Instant::now());
        progress.set_limits(Some(Duration::from_secs(10)), Some(Duration::from_secs(3)));
        progress.answering();
        let mut watchdog = Watchdog::default();
        poll_fn(|cx| watchdog.poll_due(cx, progress.cut_at())).await;
        assert_eq!(progress.started().elapsed().as_secs(), 3);
    }

    /// A timer that is asked by a task that has had its turn does not note whom to wake.
    #[tokio::test(start_paused = true)]
    async fn a_timer_set_at_the_end_of_a_tasks_turn_still_fires() {
        let task = tokio::spawn(async {
            let (begun, mut spent) = (Instant::now(), false);
            let mut watchdog = Watchdog::default();
            poll_fn(|cx| {
                while !spent && has_budget_remaining() {
                    let _ = pin!(tokio::task::coop::consume_budget()).poll(cx);
                }
                spent = true;
                watchdog.poll_due(cx, Some(begun + Duration::from_secs(10)))
            })
            .await;
            begun.elapsed().as_secs()
        });
        let fired = tokio::time::timeout(Duration::from_secs(60), task).await;
        assert_eq!(fired.expect("it fires").expect("it does not panic"), 10);
    }
}
