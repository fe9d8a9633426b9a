//! Whatever comes when, and however many tries there are: each gets the caller's bytes from the first one on.

use std::{pin::pin, task::Waker};

use proptest::prelude::*;
use tokio::{
    io::{AsyncWrite, DuplexStream, duplex},
    time::Instant,
};

use super::*;
use crate::{http1::framing::Framing, proxy::connection::Link};

/// What happens next.
#[derive(Clone, Copy, Debug)]
enum Event {
    /// The caller sends so many more bytes.
    Come(usize),
    /// The newest try reads so often.
    Read(usize),
    /// It has failed, and another one begins where it may.
    Retry,
    /// An older one, whose connection does not know yet, reads on.
    OldReads,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => (1usize..60).prop_map(Event::Come),
        3 => (1usize..5).prop_map(Event::Read),
        2 => Just(Event::Retry),
        1 => Just(Event::OldReads),
    ]
}

/// A caller's end of a connection.
struct Caller(DuplexStream);

impl Caller {
    fn send(&mut self, bytes: &[u8]) {
        let mut cx = Context::from_waker(Waker::noop());
        let sent = Pin::new(&mut self.0).poll_write(&mut cx, bytes);
        assert!(matches!(sent, Poll::Ready(Ok(count)) if count == bytes.len()), "the pipe is large enough");
    }
}

/// A connection that has got a request's head, and the body of that.
fn caller(framing: Framing) -> (Caller, CallerBody) {
    let (caller, end) = duplex(1 << 16);
    let body = Link::begin(&Link::new(Box::new(end), Bytes::new()), framing, false);
    (Caller(caller), CallerBody::Http1(body))
}

/// What a body costs is told by its bytes, not by how its client cuts it.
#[test]
fn a_body_in_one_byte_chunks_is_kept_in_little_more_than_its_bytes() {
    const LENGTH: usize = 64 * 1024;
    let keeps = |limit: u64, nothing: bool| {
        let (mut client, source) = caller(Framing::Chunked);
        let progress = Rc::new(Progress::new(Instant::now()));
        let replay = Replay::new(source, limit, None, &progress);
        let mut reader = Reader::new(replay.next_try(None));
        if nothing {
            replay.keep_nothing();
        }
        // Each chunk in a segment of its own is the worst there is.
        for _ in 0..LENGTH {
            client.send(b"1\r\nx\r\n");
            assert!(reader.read().unwrap());
        }
        assert_eq!(reader.got.len(), LENGTH);
        let held = replay.0.as_ref().unwrap().borrow().kept.held();
        (held, replay.replayable())
    };
    let (held, replayable) = keeps(LENGTH as u64, false);
    assert!(held <= 2 * LENGTH + 1024 && replayable == Replayable::Kept, "{held} bytes");
    assert_eq!(keeps(LENGTH as u64 - 1, false), (0, Replayable::Gone));
    assert_eq!(keeps(LENGTH as u64, true), (0, Replayable::Gone));
    assert_eq!(keeps(0, false), (0, Replayable::Gone));
}

/// What is malformed stays the cause, though no more can be read afterwards.
#[test]
fn a_malformed_body_is_told_from_a_client_that_left() {
    let progress = Rc::new(Progress::new(Instant::now()));
    let replay = |source| Replay::new(source, 100, None, &progress);
    let (mut client, source) = caller(Framing::Chunked);
    let malformed = replay(source);
    client.send(b"5\r\nhello\r\nzz\r\n");
    for _ in 0..2 {
        let mut reader = Reader::new(malformed.next_try(None));
        while reader.read().is_ok() {}
        assert_eq!(malformed.failure(), Some(SourceFailure::Malformed(FramingError::ChunkSize)));
    }
    let (client, source) = caller(Framing::Chunked);
    drop(client);
    let gone = replay(source);
    assert!(Reader::new(gone.next_try(None)).read().is_err());
    assert_eq!(gone.failure(), Some(SourceFailure::ClientGone));
}

/// A try, and what its service got of it.
struct Reader {
    body: RequestBody,
    got: Vec<u8>,
    trailers: Option<HeaderMap>,
    ended: bool,
}

impl Reader {
    fn new(body: RequestBody) -> Self {
        Self { body, got: Vec::new(), trailers: None, ended: false }
    }

    /// One read; false where there is nothing yet.
    fn read(&mut self) -> Result<bool, BodyError> {
        let mut cx = Context::from_waker(Waker::noop());
        match pin!(&mut self.body).poll_frame(&mut cx) {
            Poll::Pending => return Ok(false),
            Poll::Ready(None) => self.ended = true,
            Poll::Ready(Some(frame)) => match frame?.into_data() {
                Ok(data) => self.got.extend_from_slice(&data),
                Err(frame) => self.trailers = frame.into_trailers().ok(),
            },
        }
        Ok(true)
    }
}

/// What is known of one run, for the assertions at its end.
struct Run {
    caller_sent: Vec<u8>,
    tries: usize,
}

/// Plays `events` over a body, and then lets all of it come and be read.
fn play(body: &[u8], chunked: bool, limit: u64, events: &[Event]) -> Result<Run, TestCaseError> {
    let framing = if chunked { Framing::Chunked } else { Framing::Length(body.len() as u64) };
    let (mut caller, source) = caller(framing);
    let progress = Rc::new(Progress::new(Instant::now()));
    let replay = Replay::new(source, limit, None, &progress);
    let mut tries = vec![Reader::new(replay.next_try(None))];
    let mut come = 0;
    let mut send = |caller: &mut Caller, count: usize| {
        let piece = &body[come..body.len().min(come + count)];
        come += piece.len();
        match (piece.is_empty(), chunked) {
            (true, _) => {}
            (false, false) => caller.send(piece),
            (false, true) => {
                caller.send(&[format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat());
            }
        }
    };
    for event in events {
        match *event {
            Event::Come(count) => send(&mut caller, count),
            Event::Read(times) => {
                for _ in 0..times {
                    let newest = tries.last_mut().expect("there is one");
                    let moved = !newest.ended && newest.read().map_err(|error| fail(&error))?;
                    if !moved {
                        break;
                    }
                }
            }
            Event::Retry => {
                let gone = replay.replayable() == Replayable::Gone;
                prop_assert_eq!(replay.take_over(), !gone);
                if !gone {
                    tries.push(Reader::new(replay.next_try(None)));
                }
            }
            Event::OldReads => {
                let last = tries.len() - 1;
                for old in &mut tries[..last] {
                    let had = old.got.len();
                    // A body that there is not has nothing to take over.
                    prop_assert!(body.is_empty() || old.ended || old.read().is_err(), "it takes bytes away");
                    prop_assert_eq!(old.got.len(), had);
                }
            }
        }
        for one in &tries {
            prop_assert!(body.starts_with(&one.got), "a try got what is not the beginning");
        }
    }
    // No try begins after the body was given up, so the last one has all of it before it.
    send(&mut caller, body.len());
    if chunked {
        caller.send(b"0\r\nx-sum: 1\r\n\r\n");
    }
    let newest = tries.last_mut().expect("there is one");
    let sent = newest.body.sent();
    while !newest.ended {
        let moved = newest.read().map_err(|error| fail(&error))?;
        prop_assert!(moved || !newest.body.is_end_stream(), "it ends and says nothing of it");
    }
    prop_assert_eq!(&newest.got, body);
    prop_assert!(sent.is_whole() && newest.body.is_end_stream());
    let trailers = newest.trailers.as_ref().and_then(|trailers| trailers.get("x-sum"));
    prop_assert_eq!(trailers.is_some(), chunked, "trailers are sent as well");
    let kept = body.len() as u64 <= limit;
    prop_assert_eq!(replay.replayable() != Replayable::Gone, kept, "kept up to the limit, and no further");
    Ok(Run { caller_sent: newest.got.clone(), tries: tries.len() })
}

fn fail(error: &BodyError) -> TestCaseError {
    TestCaseError::fail(error.to_string())
}

proptest! {
    /// Every interleaving of what comes, what is read and what fails.
    #[test]
    fn each_try_gets_the_callers_bytes_from_the_first_one_on(
        body in prop::collection::vec(any::<u8>(), 0..400),
        chunked: bool,
        limit in 0u64..500,
        events in prop::collection::vec(event(), 0..60),
    ) {
        play(&body, chunked, limit, &events)?;
    }
}

/// The same, exhaustively: every order of a few events, with the limit below, at and above the body's size.
#[test]
fn every_short_story_ends_well() {
    let all = [Event::Come(2), Event::Read(1), Event::Retry, Event::OldReads];
    let mut tries = 0;
    for length in 0..=5u32 {
        for number in 0..4usize.pow(length) {
            let events: Vec<Event> = (0..length).map(|at| all[number / 4usize.pow(at) % 4]).collect();
            for (chunked, limit) in [(false, 3), (false, 4), (true, 0), (true, 4), (true, 9)] {
                let run = play(b"body", chunked, limit, &events);
                let run = run.unwrap_or_else(|error| panic!("{events:?}, kept {limit}: {error}"));
                assert_eq!(run.caller_sent, b"body");
                tries += run.tries;
            }
        }
    }
    assert!(tries > 5 * 1365, "some were sent more than once");
}

/// What is known of the length is the whole of it for every try, so that each is framed as the first was.
#[test]
fn a_later_try_is_as_long_as_the_first() {
    let (mut caller, source) = caller(Framing::Length(10));
    let progress = Rc::new(Progress::new(Instant::now()));
    let replay = Replay::new(source, 100, None, &progress);
    for come in [b"0123", b"4567"] {
        let mut reader = Reader::new(replay.next_try(None));
        assert_eq!(reader.body.size_hint().exact(), Some(10));
        caller.send(come);
        while reader.read().expect("no error") {
            assert_eq!(reader.body.size_hint().exact(), Some(10 - reader.got.len() as u64));
        }
    }
    assert_eq!(replay.next_try(None).size_hint().exact(), Some(10));
}
