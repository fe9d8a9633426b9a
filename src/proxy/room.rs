//! Room for the futures of calls, left by each to the next one on its thread: they are larger than what an allocator hands
//! out at once, and as many as calls.

use std::{
    any::Any,
    cell::RefCell,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

/// Rooms that are kept, for each kind of future. More than these are given back.
const MOST: usize = 128;

type Place<F> = Pin<Box<Option<F>>>;

thread_local! {
    /// A list of places for each kind.
    static EMPTY: RefCell<Vec<Box<dyn Any>>> = const { RefCell::new(Vec::new()) };
}

/// A future in room that others have had before it. As small as a pointer.
#[derive(Debug)]
pub struct Room<F: Future + 'static>(Option<Place<F>>);

impl<F: Future + 'static> Room<F> {
    pub fn new(future: F) -> Self {
        match with_empty(Vec::<Place<F>>::pop) {
            Some(mut place) => {
                place.set(Some(future));
                Self(Some(place))
            }
            None => Self(Some(Box::pin(Some(future)))),
        }
    }
}

impl<F: Future + 'static> Future for Room<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let place = self.get_mut().0.as_mut().and_then(|place| place.as_mut().as_pin_mut());
        place.map_or(Poll::Pending, |future| future.poll(cx))
    }
}

impl<F: Future + 'static> Drop for Room<F> {
    fn drop(&mut self) {
        if let Some(mut place) = self.0.take() {
            place.set(None);
            with_empty(|places| (places.len() < MOST).then(|| places.push(place)));
        }
    }
}

/// What is done with the empty places of a kind; nothing at the end of the thread.
fn with_empty<F: Future + 'static, T>(what: impl FnOnce(&mut Vec<Place<F>>) -> Option<T>) -> Option<T> {
    EMPTY
        .try_with(|kinds| {
            let mut kinds = kinds.borrow_mut();
            let is_it = |kind: &Box<dyn Any>| kind.is::<Vec<Place<F>>>();
            let at = kinds.iter().position(is_it).unwrap_or_else(|| {
                kinds.push(Box::new(Vec::<Place<F>>::new()));
                kinds.len() - 1
            });
            what(kinds.get_mut(at)?.downcast_mut()?)
        })
        .ok()?
}

#[cfg(test)]
mod tests {
    use std::{future::pending, rc::Rc};

    use super::*;

    #[tokio::test]
    async fn a_room_is_left_to_the_next_of_its_kind() {
        let call = |answer: Rc<u32>| async move {
            tokio::task::yield_now().await;
            *answer
        };
        let place =
            |room: &Room<_>| room.0.as_ref().map(|place| std::ptr::from_ref(place.as_ref().get_ref()));
        let answer = Rc::new(7);
        let mut first = Room::new(call(Rc::clone(&answer)));
        let at = place(&first);
        let beside = Room::new(call(Rc::clone(&answer)));
        assert_ne!(place(&beside), at);
        assert_eq!((&mut first).await, 7);
        drop(first);
        // Of another kind: it does not fit.
        drop(Room::new(pending::<()>()));
        let next = Room::new(call(Rc::clone(&answer)));
        assert_eq!(place(&next), at);
        // What is given up on its way is gone at once.
        drop((next, beside));
        assert_eq!(Rc::strong_count(&answer), 1);
    }

    #[test]
    fn only_so_many_are_kept() {
        let rooms: Vec<_> = (0..2 * MOST).map(|_| Room::new(pending::<u8>())).collect();
        drop(rooms);
        let kept = with_empty(|places: &mut Vec<Place<std::future::Pending<u8>>>| Some(places.len()));
        assert_eq!(kept, Some(MOST));
    }
}
