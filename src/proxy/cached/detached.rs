//! A fetch that goes on without the client that began it.

use std::{
    future::{Future, poll_fn},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
};

use tokio::task::spawn_local;

use crate::{
    cache::flight::Followers,
    net::watchdog::Watchdog,
    proxy::progress::{Progress, poll_watched},
};

/// Polled by the client's own task. If that is dropped while others wait, it moves to a task of its own.
pub struct Detachable<T: 'static> {
    future: Option<Pin<Box<dyn Future<Output = T>>>>,
    progress: Rc<Progress>,
    followers: Option<Followers>,
}

impl<T> Detachable<T> {
    pub fn new(
        future: impl Future<Output = T> + 'static,
        progress: Rc<Progress>,
        followers: Option<Followers>,
    ) -> Self {
        Self { future: Some(Box::pin(future)), progress, followers }
    }
}

impl<T> Future for Detachable<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        let Some(future) = &mut self.future else { return Poll::Pending };
        let polled = future.as_mut().poll(cx);
        if polled.is_ready() {
            self.future = None;
        }
        polled
    }
}

impl<T> Drop for Detachable<T> {
    fn drop(&mut self) {
        let waited_for = self.followers.as_ref().is_some_and(Followers::are_waiting);
        if let Some(future) = self.future.take().filter(|_| waited_for) {
            spawn_local(watch(future, Rc::clone(&self.progress)));
        }
    }
}

/// Runs a future to its end, polled at its deadlines; cut where its body stands still.
pub async fn watch<T>(mut future: Pin<Box<dyn Future<Output = T>>>, progress: Rc<Progress>) -> Option<T> {
    let mut watchdog = Watchdog::default();
    let look = || (Some(Rc::clone(&progress)), progress.cut_at());
    poll_fn(|cx| poll_watched(cx, &mut watchdog, |cx| future.as_mut().poll(cx), look)).await
}
