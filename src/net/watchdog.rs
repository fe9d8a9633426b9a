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

/// One timer for a whole connection or stream. It is moved forward lazily: when it fires early, it is set again. So a
/// successful request sets no timer.
#[derive(Debug, Default)]
pub struct Watchdog {
    timer: Option<Pin<Box<Sleep>>>,
    /// The waker that is registered with the timer.
    registered_waker: Option<Waker>,
}

impl Watchdog {
    /// Ready once `due` has passed. Call it at every poll of the task, with the current `due`.
    pub fn poll_due(&mut self, cx: &mut Context<'_>, due: Option<Instant>) -> Poll<()> {
        let Some(due) = due else { return Poll::Pending };
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(due)));
        let is_registered = self.registered_waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker()));
        if timer.deadline() > due {
            timer.as_mut().reset(due);
        } else if is_registered && !timer.is_elapsed() {
            // The usual case: the timer is registered and not later than `due`.
            return Poll::Pending;
        }
        while timer.as_mut().poll(cx).is_ready() {
            if Instant::now() >= due {
                return Poll::Ready(());
            }
            timer.as_mut().reset(due);
        }
        // Without cooperative budget the timer registers no waker; tokio polls such a task again at once.
        self.registered_waker = has_budget_remaining().then(|| cx.waker().clone());
        Poll::Pending
    }
}
