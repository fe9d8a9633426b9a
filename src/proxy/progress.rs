//! The progress of one exchange: when bytes last moved, when it has to end, and its telemetry record.

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
    telemetry::record::{RequestEnd, RequestRecord},
};

/// The progress of one exchange. Written by its bodies, read by the task that serves it.
#[derive(Debug)]
pub struct Progress {
    started: Instant,
    moved: Cell<Instant>,
    idle_limit: Cell<Option<Duration>>,
    /// When the whole exchange has to end (`max_duration`).
    must_end_at: Cell<Option<Instant>>,
    /// When the request's body was sent completely.
    request_sent: Cell<Option<Instant>>,
    /// The response has begun: from then on `idle_timeout` applies.
    response_begun: Cell<bool>,
    /// The exchange has ended.
    done: Cell<bool>,
    /// Whether the request's body can be sent again.
    repeatable: Cell<bool>,
    /// The request's nearest deadline: when it has to be polled even if nothing happens.
    wake_at: Cell<Option<Instant>>,
    timer_fired: Cell<bool>,
    /// The telemetry record of the request, until it has ended.
    record: RefCell<Option<(Rc<Worker>, RequestRecord)>>,
}

impl Progress {
    pub fn new(now: Instant) -> Self {
        Self {
            started: now,
            moved: Cell::new(now),
            idle_limit: Cell::new(None),
            must_end_at: Cell::new(None),
            request_sent: Cell::new(None),
            response_begun: Cell::new(false),
            done: Cell::new(false),
            repeatable: Cell::new(true),
            wake_at: Cell::new(None),
            timer_fired: Cell::new(false),
            record: RefCell::new(None),
        }
    }

    /// Opens the telemetry record.
    pub fn open_record(&self, worker: &Rc<Worker>, record: RequestRecord) {
        *self.record.borrow_mut() = Some((Rc::clone(worker), record));
    }

    /// Updates the telemetry record; `None` if the request has ended.
    pub fn with_record<T>(&self, note: impl FnOnce(&mut RequestRecord) -> T) -> Option<T> {
        self.record.borrow_mut().as_mut().map(|(_, record)| note(record))
    }

    pub fn started(&self) -> Instant {
        self.started
    }

    pub fn set_limits(&self, idle: Option<Duration>, whole: Option<Duration>) {
        self.idle_limit.set(idle);
        self.must_end_at.set(whole.map(|whole| self.started + whole));
    }

    pub fn must_end_at(&self) -> Option<Instant> {
        self.must_end_at.get()
    }

    /// Notes that bytes of a body moved, in either direction. Returns the time.
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

    /// Notes that the body is larger than what is buffered: there is no other attempt once it is sent.
    pub fn mark_unrepeatable(&self) {
        self.repeatable.set(false);
    }

    pub fn is_repeatable(&self) -> bool {
        self.repeatable.get()
    }

    pub fn request_sent_at(&self) -> Option<Instant> {
        self.request_sent.get()
    }

    /// Notes that the response head was received.
    pub fn response_received(&self, now: Instant) {
        self.moved.set(now);
    }

    /// Notes that the response begins. From here on `idle_timeout` applies.
    pub fn response_begins(&self) {
        self.response_begun.set(true);
    }

    /// Ends the exchange and reports its record. Only the first call counts.
    pub fn done(&self, end: RequestEnd, now: Instant) {
        self.moved.set(now);
        self.done.set(true);
        let mut open = self.record.borrow_mut();
        let Some((worker, record)) = &mut *open else { return };
        record.end = end;
        record.ended_at = Some(now);
        let wanted = finish::record_request(worker, record);
        if wanted.is_empty() {
            // The usual case. A record is large, so drop it in place.
            *open = None;
        } else if let Some((worker, record)) = open.take() {
            drop(open);
            finish::report_request(&worker, wanted, record);
        }
    }

    /// How an exchange ends that is dropped before its response is complete.
    pub fn end_when_dropped(&self, now: Instant) -> RequestEnd {
        let cut = self.cut_at().is_some_and(|at| now >= at);
        if cut { RequestEnd::Cut } else { RequestEnd::ClientGone }
    }

    pub fn is_done(&self) -> bool {
        self.done.get()
    }

    pub fn last_moved(&self) -> Instant {
        self.moved.get()
    }

    /// When the upload counts as stalled, while it is in progress.
    pub fn upload_stalls_at(&self) -> Option<Instant> {
        match self.request_sent.get() {
            Some(_) => None,
            None => self.idle_limit.get().map(|limit| self.moved.get() + limit),
        }
    }

    /// Asks the task that serves the exchange to poll it again at this time.
    pub fn wake_at(&self, at: Option<Instant>) {
        self.wake_at.set(at);
    }

    /// Whether that time has come; true once.
    pub fn take_timer_fired(&self) -> bool {
        self.timer_fired.take()
    }

    /// When the exchange is cut unless bytes move. `None` before the response begins: until then its deadlines apply.
    pub fn cut_at(&self) -> Option<Instant> {
        if !self.response_begun.get() {
            return None;
        }
        let idle = self.idle_limit.get().map(|limit| self.moved.get() + limit);
        match (idle, self.must_end_at.get()) {
            (Some(idle), Some(over)) => Some(idle.min(over)),
            (due, None) | (None, due) => due,
        }
    }
}

/// Polls `task` with a watchdog. `look` returns the exchange in progress and when the task is to be cut. Ready with
/// `None` where it was cut.
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
            exchange.timer_fired.set(true);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, pin::pin};

    use tokio::task::coop::has_budget_remaining;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_stall_is_measured_from_the_last_byte() {
        let progress = Progress::new(Instant::now());
        progress.set_limits(Some(Duration::from_secs(10)), None);
        assert_eq!(progress.cut_at(), None, "before the response begins the exchange's deadlines apply");
        progress.response_begins();
        let begun = Instant::now();
        let mut watchdog = Watchdog::default();
        // Progress after the timer was set moves the end without touching the timer.
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
    async fn max_duration_bounds_the_whole_exchange() {
        let progress = Progress::new(Instant::now());
        progress.set_limits(Some(Duration::from_secs(10)), Some(Duration::from_secs(3)));
        progress.response_begins();
        let mut watchdog = Watchdog::default();
        poll_fn(|cx| watchdog.poll_due(cx, progress.cut_at())).await;
        assert_eq!(progress.started().elapsed().as_secs(), 3);
    }

    /// A timer that is polled without cooperative budget does not register the waker.
    #[tokio::test(start_paused = true)]
    async fn a_timer_set_without_budget_still_fires() {
        let task = tokio::spawn(async {
            let (begun, mut budget_consumed) = (Instant::now(), false);
            let mut watchdog = Watchdog::default();
            poll_fn(|cx| {
                while !budget_consumed && has_budget_remaining() {
                    let _ = pin!(tokio::task::coop::consume_budget()).poll(cx);
                }
                budget_consumed = true;
                watchdog.poll_due(cx, Some(begun + Duration::from_secs(10)))
            })
            .await;
            begun.elapsed().as_secs()
        });
        let fired = tokio::time::timeout(Duration::from_secs(60), task).await;
        assert_eq!(fired.expect("it fires").expect("it does not panic"), 10);
    }
}
