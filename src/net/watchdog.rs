//! One timer for a whole connection or stream.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, Waker},
};

use tokio::{
    task::coop::has_budget_remaining,
    time::{Instant, Sleep, sleep_until},
};

/// One timer for a whole connection or stream. It is set forward lazily: when it fires early, it is set again; so a
/// call that goes well touches no timer.
#[derive(Debug, Default)]
pub struct Watchdog {
    timer: Option<Pin<Box<Sleep>>>,
    /// Whom the timer wakes.
    wakes: Option<Waker>,
}

impl Watchdog {
    /// Ready once `due` has passed. Call it whenever the task is polled, with what is due as of then.
    pub fn poll_due(&mut self, cx: &mut Context<'_>, due: Option<Instant>) -> Poll<()> {
        let Some(due) = due else { return Poll::Pending };
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(due)));
        let armed = self.wakes.as_ref().is_some_and(|waker| waker.will_wake(cx.waker()));
        if timer.deadline() > due {
            timer.as_mut().reset(due);
        } else if armed && !timer.is_elapsed() {
            // As most often: it has been asked before, and would say the same.
            return Poll::Pending;
        }
        while timer.as_mut().poll(cx).is_ready() {
            if Instant::now() >= due {
                return Poll::Ready(());
            }
            timer.as_mut().reset(due);
        }
        // A task that has had its turn is polled again at once; the timer has not noted it.
        self.wakes = has_budget_remaining().then(|| cx.waker().clone());
        Poll::Pending
    }
}
