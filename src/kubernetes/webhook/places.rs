//! Places for connections. Where none is free, the connection gives way that has asked nothing for the longest time, unless that
//! is but a moment; so nobody keeps others out by holding connections open, and an API server, which opens one for
//! each call that it makes at a time, is not turned away.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

/// So long a connection may take to ask something before it gives way.
const GRACE: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub struct Places {
    room: Mutex<Room>,
    freed: Notify,
}

impl Places {
    pub fn new(limit: usize) -> Self {
        Self { room: Mutex::new(Room { limit, taken: HashMap::new(), next: 0 }), freed: Notify::new() }
    }

    /// Waits for a place.
    pub async fn enter(self: &Arc<Self>) -> Place {
        loop {
            let freed = self.freed.notified();
            let entered = self.room().enter(Instant::now());
            match entered {
                Ok((number, give_way)) => return Place { places: Arc::clone(self), number, give_way },
                Err(until) => tokio::select! {
                    () = freed => {}
                    () = sleep_until(until) => {}
                },
            }
        }
    }

    fn room(&self) -> MutexGuard<'_, Room> {
        self.room.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Free again when dropped.
#[derive(Debug)]
pub struct Place {
    places: Arc<Places>,
    number: u64,
    give_way: Arc<Notify>,
}

impl Place {
    /// Something was asked, and has come whole.
    pub fn used(&self) {
        if let Some(taken) = self.places.room().taken.get_mut(&self.number) {
            taken.since = Instant::now();
        }
    }

    /// Waits until somebody else is given it.
    pub async fn lost(&self) {
        self.give_way.notified().await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.room().taken.remove(&self.number);
        self.places.freed.notify_waiters();
    }
}

#[derive(Debug)]
struct Room {
    limit: usize,
    taken: HashMap<u64, Taken>,
    next: u64,
}

#[derive(Debug)]
struct Taken {
    since: Instant,
    give_way: Arc<Notify>,
}

impl Room {
    /// A place; or when there may be one.
    fn enter(&mut self, now: Instant) -> Result<(u64, Arc<Notify>), Instant> {
        if self.taken.len() >= self.limit {
            let idlest = self.taken.iter().map(|(number, taken)| (taken.since, *number)).min();
            let Some((since, idlest)) = idlest else { return Err(now + GRACE) };
            if now < since + GRACE {
                return Err(since + GRACE);
            }
            if let Some(taken) = self.taken.remove(&idlest) {
                taken.give_way.notify_one();
            }
        }
        let (number, give_way) = (self.next, Arc::new(Notify::new()));
        self.next += 1;
        self.taken.insert(number, Taken { since: now, give_way: Arc::clone(&give_way) });
        Ok((number, give_way))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_has_asked_nothing_for_longest_gives_way_and_not_at_once() {
        let places = Arc::new(Places::new(2));
        let began = Instant::now();
        let (silent, busy) = (places.enter().await, places.enter().await);
        tokio::time::advance(GRACE / 2).await;
        busy.used();
        let next = places.enter().await;
        assert_eq!(began.elapsed(), GRACE);
        silent.lost().await;
        drop(silent);
        assert_eq!(places.room().taken.len(), 2, "given away once, and not given back a second time");
        let last = places.enter().await;
        assert_eq!(began.elapsed(), GRACE * 3 / 2);
        busy.lost().await;
        drop((busy, next, last));
        assert!(places.room().taken.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_place_that_is_given_back_is_there_at_once() {
        let places = Arc::new(Places::new(1));
        let began = Instant::now();
        let one = places.enter().await;
        let (_two, ()) = tokio::join!(places.enter(), async { drop(one) });
        assert_eq!(began.elapsed(), Duration::ZERO);
    }
}
