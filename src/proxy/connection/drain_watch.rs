//! Watches for the moment when a connection has to close: the drain, or a configuration that no longer allows it.

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

/// Waits until `look` returns something. Calls it at every poll, and so after each change of phase or configuration.
///
/// A change is visible a moment before the channel notifies its waiters. [`DrainWatch`] may see it then and polls once
/// for each change, so a future that it polls must not rely on the notification.
pub(super) async fn wait_until_some<T>(
    changes: &watch::Sender<Phase>,
    mut look: impl FnMut() -> Option<T>,
) -> T {
    let mut changes = changes.subscribe();
    let mut notified = pin!(async move {
        // The sender lives as long as the worker.
        while changes.changed().await.is_ok() {}
        std::future::pending::<()>().await
    });
    poll_fn(|cx| {
        // Polled before `look`, so that a later change notifies the task.
        let _: Poll<()> = notified.as_mut().poll(cx);
        look().map_or(Poll::Pending, Poll::Ready)
    })
    .await
}

/// Watches whether a connection has to close. Polled whenever the connection is; as looking at the phase takes a shared
/// lock, it looks again only where something may have changed.
#[derive(Debug)]
pub(super) struct DrainWatch {
    phase: watch::Receiver<Phase>,
    /// Only a change of phase or configuration can close the connection, and notifies the task.
    settled: bool,
    can_settle: bool,
    is_closing: bool,
    /// Cuts the requests in progress on a connection that the configuration no longer allows.
    cut: Option<Pin<Box<Sleep>>>,
}

impl DrainWatch {
    pub(super) fn new(connection: &Connection) -> Self {
        let phase = connection.worker.shared.phase.subscribe();
        let can_settle = connection.presented_chain.is_none() && !connection.refused_plaintext.get();
        Self { phase, settled: false, can_settle, is_closing: false, cut: None }
    }

    /// True once, when the connection has to close. `closing` is always polled by the same task.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        connection: &Connection,
        closing: Pin<&mut impl Future<Output = ()>>,
    ) -> bool {
        if self.is_closing || (self.settled && !self.phase.has_changed().unwrap_or(true)) {
            return false;
        }
        self.phase.mark_unchanged();
        // Outside tokio's cooperative budget: a `closing` that waits for budget looks as if nothing had changed.
        self.is_closing = pin!(unconstrained(closing)).poll(cx).is_ready();
        // After the close was requested, `closing` waits for time, not for a change of phase.
        let close_requested = connection.close_requested.get();
        self.settled = self.can_settle && !close_requested && !self.phase.has_changed().unwrap_or(true);
        if self.is_closing && connection.refusal_by_current_config().is_some() {
            let limit = connection.worker.view().snapshot.config.runtime.drain_timeout;
            self.cut = Some(Box::pin(sleep(*limit)));
        }
        self.is_closing
    }

    /// Ready when the time for the requests in progress has elapsed.
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
    fn a_change_is_seen_before_the_channel_notifies_its_waiters() {
        let (phase, found) = (watch::Sender::new(Phase::Running), Cell::new(None));
        let mut waiting = pin!(wait_until_some(&phase, || found.get()));
        let mut cx = Context::from_waker(Waker::noop());
        assert!(waiting.as_mut().poll(&mut cx).is_pending());
        found.set(Some(1));
        assert_eq!(waiting.as_mut().poll(&mut cx), Poll::Ready(1));
    }
}
