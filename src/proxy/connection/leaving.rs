//! When a connection is asked to leave: the drain, or a configuration that does not take it any more.

use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    task::{Context, Poll},
};

use tokio::{
    sync::watch,
    task::coop::unconstrained,
    time::{Sleep, sleep},
};

use super::{Connection, ConnectionError, OUTDATED};
use crate::proxy::worker::Phase;

/// Waits until `look` finds what it looks for: at every poll, and again after each change of phase or configuration.
///
/// A change is there a moment before the channel wakes those that wait for it. [`Leaving`], which may have seen it by
/// then, polls once for each: so what is polled must not rely on having been woken.
pub(super) async fn looked_at<T>(changes: &watch::Sender<Phase>, mut look: impl FnMut() -> Option<T>) -> T {
    let mut changes = changes.subscribe();
    let mut wakes = pin!(async move {
        // The sender lives as long as the worker.
        while changes.changed().await.is_ok() {}
        std::future::pending::<()>().await
    });
    poll_fn(|cx| {
        // Before the look: what changes behind it wakes the task.
        let _: Poll<()> = wakes.as_mut().poll(cx);
        look().map_or(Poll::Pending, Poll::Ready)
    })
    .await
}

/// Watches for a connection's being asked to leave. It is asked whenever the connection is polled, which takes a lock
/// that others take too; so it is only asked again where there may be something new.
#[derive(Debug)]
pub(super) struct Leaving {
    phase: watch::Receiver<Phase>,
    /// Nothing but a change of phase or configuration can make it leave, and wakes the task then.
    settled: bool,
    can_settle: bool,
    left: bool,
    /// Cuts what is still under way on a connection that the configuration does not take any more.
    cut: Option<Pin<Box<Sleep>>>,
}

impl Leaving {
    pub(super) fn new(connection: &Connection) -> Self {
        let phase = connection.worker.shared.phase.subscribe();
        let can_settle = connection.presented.is_none() && !connection.refused_plaintext.get();
        Self { phase, settled: false, can_settle, left: false, cut: None }
    }

    /// True once, when it has to leave. `closing` is always polled by the same task.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        connection: &Connection,
        closing: Pin<&mut impl Future<Output = ()>>,
    ) -> bool {
        if self.left || (self.settled && !self.phase.has_changed().unwrap_or(true)) {
            return false;
        }
        self.phase.mark_unchanged();
        // Not within the task's budget of the runtime: a `closing` that waits for budget looks as if there were nothing new.
        self.left = pin!(unconstrained(closing)).poll(cx).is_ready();
        // What it still waits for once it is asked is no change of phase.
        let is_asked = connection.leaving.get();
        self.settled = self.can_settle && !is_asked && !self.phase.has_changed().unwrap_or(true);
        if self.left && connection.refusal_by_now().is_some() {
            let limit = connection.worker.view().snapshot.config.runtime.drain_timeout;
            self.cut = Some(Box::pin(sleep(*limit)));
        }
        self.left
    }

    /// Ready when what is still under way has had its time.
    pub(super) fn poll_cut(&mut self, cx: &mut Context<'_>) -> Poll<ConnectionError> {
        match &mut self.cut {
            Some(cut) => cut.as_mut().poll(cx).map(|()| OUTDATED),
            None => Poll::Pending,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, task::Waker};

    use super::*;

    #[test]
    fn a_change_is_seen_before_the_channel_wakes_those_that_wait() {
        let (phase, found) = (watch::Sender::new(Phase::Running), Cell::new(None));
        let mut waiting = pin!(looked_at(&phase, || found.get()));
        let mut cx = Context::from_waker(Waker::noop());
        assert!(waiting.as_mut().poll(&mut cx).is_pending());
        found.set(Some(1));
        assert_eq!(waiting.as_mut().poll(&mut cx), Poll::Ready(1));
    }
}
