//! Room for bodies that are on their way in. What counts is what has come, not what was announced: who sends slowly holds
//! little, and who holds much for long gives way as soon as somebody else needs the room. So memory is bounded, and no sender,
//! slow or silent, keeps others waiting for more than a moment.

use std::{
    collections::BTreeMap,
    fmt::Display,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Buf;
use http_body::Body;
use http_body_util::BodyExt;
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

/// How long a body may take before it gives way. An API server's are there in milliseconds.
const GRACE: Duration = Duration::from_secs(1);

/// Why a body did not arrive.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error("{0}")]
    Broken(String),
    #[error("the body has taken longer than {} s, and others need the room", GRACE.as_secs())]
    GaveWay,
}

/// Bodies of one kind.
#[derive(Debug)]
pub struct Arrivals {
    room: Mutex<Room>,
    freed: Notify,
}

impl Arrivals {
    /// `limit`: so many bytes are held at a time; no body may be longer.
    pub fn new(limit: usize) -> Self {
        Self { room: Mutex::new(Room::new(limit)), freed: Notify::new() }
    }

    /// Reads a body to its end; its room is held until what is returned is dropped.
    pub async fn read<B: Body<Error: Display>>(&self, body: B) -> Result<Arrived<'_>, Failure> {
        let (number, give_way) = self.room().enter(Instant::now());
        let mut arrived = Arrived { bytes: Vec::new(), place: Place { arrivals: self, number } };
        let mut body = pin!(body);
        loop {
            let frame = tokio::select! {
                frame = body.frame() => frame,
                () = give_way.notified() => return Err(Failure::GaveWay),
            };
            let Some(frame) = frame else { return Ok(arrived) };
            let Ok(data) = frame.map_err(|error| Failure::Broken(error.to_string()))?.into_data() else {
                continue;
            };
            self.grow(number, data.remaining()).await?;
            put(&mut arrived.bytes, data);
        }
    }

    async fn grow(&self, number: u64, more: usize) -> Result<(), Failure> {
        loop {
            let freed = self.freed.notified();
            let grown = self.room().grow(number, more, Instant::now());
            match grown {
                Grown::Fits => return Ok(()),
                Grown::GaveWay => return Err(Failure::GaveWay),
                Grown::Wait(until) => tokio::select! {
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

fn put(bytes: &mut Vec<u8>, mut data: impl Buf) {
    while data.has_remaining() {
        let chunk = data.chunk();
        bytes.extend_from_slice(chunk);
        let length = chunk.len();
        data.advance(length);
    }
}

/// A body that is whole, and its room.
#[derive(Debug)]
pub struct Arrived<'a> {
    pub bytes: Vec<u8>,
    #[expect(dead_code, reason = "held")]
    place: Place<'a>,
}

#[derive(Debug)]
struct Place<'a> {
    arrivals: &'a Arrivals,
    number: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.arrivals.room().leave(self.number);
        self.arrivals.freed.notify_waiters();
    }
}

/// Who holds how much, in the order in which they began.
#[derive(Debug)]
struct Room {
    limit: usize,
    held: usize,
    bodies: BTreeMap<u64, Held>,
    next: u64,
}

#[derive(Debug)]
struct Held {
    bytes: usize,
    began: Instant,
    give_way: Arc<Notify>,
}

#[derive(Debug, PartialEq, Eq)]
enum Grown {
    Fits,
    /// Until there is room, or somebody may be asked to give way.
    Wait(Instant),
    GaveWay,
}

impl Room {
    fn new(limit: usize) -> Self {
        Self { limit, held: 0, bodies: BTreeMap::new(), next: 0 }
    }

    fn enter(&mut self, now: Instant) -> (u64, Arc<Notify>) {
        let (number, give_way) = (self.next, Arc::new(Notify::new()));
        self.next += 1;
        self.bodies.insert(number, Held { bytes: 0, began: now, give_way: Arc::clone(&give_way) });
        (number, give_way)
    }

    /// Has who began first give way, where there is no room and they have had their time.
    fn grow(&mut self, number: u64, more: usize, now: Instant) -> Grown {
        while self.held + more > self.limit && self.bodies.contains_key(&number) {
            match self.bodies.first_key_value() {
                Some((_, first)) if now < first.began + GRACE => return Grown::Wait(first.began + GRACE),
                Some((&first, _)) => self.leave(first),
                None => break,
            }
        }
        match self.bodies.get_mut(&number) {
            Some(held) => {
                held.bytes += more;
                self.held += more;
                Grown::Fits
            }
            None => Grown::GaveWay,
        }
    }

    fn leave(&mut self, number: u64) {
        if let Some(held) = self.bodies.remove(&number) {
            self.held -= held.bytes;
            held.give_way.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Waker};

    use super::*;

    #[test]
    fn who_holds_much_for_long_gives_way_and_nobody_else() {
        let mut room = Room::new(100);
        let start = Instant::now();
        let (slow, slow_gives_way) = room.enter(start);
        assert_eq!(room.grow(slow, 90, start), Grown::Fits);
        let (quick, _) = room.enter(start + GRACE / 2);
        assert_eq!(room.grow(quick, 20, start + GRACE / 2), Grown::Wait(start + GRACE));
        assert_eq!(room.grow(quick, 20, start + GRACE), Grown::Fits);
        assert_eq!(room.grow(slow, 1, start + GRACE), Grown::GaveWay);
        assert_eq!((room.held, room.bodies.len()), (20, 1));
        let mut context = Context::from_waker(Waker::noop());
        assert!(pin!(slow_gives_way.notified()).poll(&mut context).is_ready());
        // Nobody is older: it is its own turn to go.
        assert_eq!(room.grow(quick, 81, start + GRACE * 2), Grown::GaveWay);
        assert_eq!((room.held, room.bodies.len()), (0, 0));
    }

    #[test]
    fn there_is_room_again_when_one_is_done() {
        let mut room = Room::new(100);
        let now = Instant::now();
        let (one, _) = room.enter(now);
        let (two, _) = room.enter(now);
        assert_eq!(room.grow(one, 60, now), Grown::Fits);
        assert_eq!(room.grow(two, 60, now), Grown::Wait(now + GRACE));
        room.leave(one);
        assert_eq!(room.grow(two, 60, now), Grown::Fits);
    }
}
