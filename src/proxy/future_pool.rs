//! A free list of boxes for the futures of requests, one list per thread and kind of future: the futures are larger
//! than what an allocator serves from its fast path, and there is one per request.

use std::{
    any::Any,
    cell::RefCell,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

/// The most boxes that are kept free, for each kind of future. More are deallocated.
const MAX_FREE: usize = 128;

type FutureBox<F> = Pin<Box<Option<F>>>;

thread_local! {
    /// A free list for each kind of future.
    static FREE: RefCell<Vec<Box<dyn Any>>> = const { RefCell::new(Vec::new()) };
}

/// A future in a recycled box. As small as a pointer.
#[derive(Debug)]
pub struct PooledFuture<F: Future + 'static>(Option<FutureBox<F>>);

impl<F: Future + 'static> PooledFuture<F> {
    pub fn new(future: F) -> Self {
        match with_free_list(Vec::<FutureBox<F>>::pop) {
            Some(mut place) => {
                place.set(Some(future));
                Self(Some(place))
            }
            None => Self(Some(Box::pin(Some(future)))),
        }
    }
}

impl<F: Future + 'static> Future for PooledFuture<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let future = self.get_mut().0.as_mut().and_then(|place| place.as_mut().as_pin_mut());
        future.map_or(Poll::Pending, |future| future.poll(cx))
    }
}

impl<F: Future + 'static> Drop for PooledFuture<F> {
    fn drop(&mut self) {
        if let Some(mut place) = self.0.take() {
            place.set(None);
            with_free_list(|free| (free.len() < MAX_FREE).then(|| free.push(place)));
        }
    }
}

/// Calls `f` with the free list of a kind of future; does nothing while the thread's storage is torn down.
fn with_free_list<F: Future + 'static, T>(f: impl FnOnce(&mut Vec<FutureBox<F>>) -> Option<T>) -> Option<T> {
    FREE.try_with(|kinds| {
        let mut kinds = kinds.borrow_mut();
        let is_kind = |kind: &Box<dyn Any>| kind.is::<Vec<FutureBox<F>>>();
        let at = kinds.iter().position(is_kind).unwrap_or_else(|| {
            kinds.push(Box::new(Vec::<FutureBox<F>>::new()));
            kinds.len() - 1
        });
        f(kinds.get_mut(at)?.downcast_mut()?)
    })
    .ok()?
}

#[cfg(test)]
mod tests {
    use std::{future::pending, rc::Rc};

    use super::*;

    #[tokio::test]
    async fn a_box_is_reused_by_the_next_future_of_its_kind() {
        let request = |response: Rc<u32>| async move {
            tokio::task::yield_now().await;
            *response
        };
        let address = |future: &PooledFuture<_>| {
            future.0.as_ref().map(|place| std::ptr::from_ref(place.as_ref().get_ref()))
        };
        let response = Rc::new(7);
        let mut first = PooledFuture::new(request(Rc::clone(&response)));
        let at = address(&first);
        let beside = PooledFuture::new(request(Rc::clone(&response)));
        assert_ne!(address(&beside), at);
        assert_eq!((&mut first).await, 7);
        drop(first);
        // A future of another kind does not fit.
        drop(PooledFuture::new(pending::<()>()));
        let next = PooledFuture::new(request(Rc::clone(&response)));
        assert_eq!(address(&next), at);
        // A cancelled future is dropped at once.
        drop((next, beside));
        assert_eq!(Rc::strong_count(&response), 1);
    }

    #[test]
    fn the_free_list_is_bounded() {
        let futures: Vec<_> = (0..2 * MAX_FREE).map(|_| PooledFuture::new(pending::<u8>())).collect();
        drop(futures);
        let free_count =
            with_free_list(|free: &mut Vec<FutureBox<std::future::Pending<u8>>>| Some(free.len()));
        assert_eq!(free_count, Some(MAX_FREE));
    }
}
