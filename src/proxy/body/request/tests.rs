//! In any order of arrival, reads and retries, each attempt gets the client's bytes from the first one on.

use std::{pin::pin, task::Waker};

use proptest::prelude::*;
use tokio::{
    io::{AsyncWrite, DuplexStream, duplex},
    time::Instant,
};

use super::*;
use crate::{http1::framing::Framing, proxy::connection::ServerConnection};

/// The next event.
#[derive(Clone, Copy, Debug)]
enum Event {
    /// The client sends so many more bytes.
    Arrive(usize),
    /// The newest attempt reads so often.
    Read(usize),
    /// It has failed, and another one begins if it may.
    Retry,
    /// An older attempt, whose connection has not been stopped yet, reads on.
    OldAttemptReads,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => (1usize..60).prop_map(Event::Arrive),
        3 => (1usize..5).prop_map(Event::Read),
        2 => Just(Event::Retry),
        1 => Just(Event::OldAttemptReads),
    ]
}

/// The client's end of a connection.
struct ClientEnd(DuplexStream);

impl ClientEnd {
    fn send(&mut self, bytes: &[u8]) {
        let mut cx = Context::from_waker(Waker::noop());
        let sent = Pin::new(&mut self.0).poll_write(&mut cx, bytes);
        assert!(matches!(sent, Poll::Ready(Ok(count)) if count == bytes.len()), "the pipe is large enough");
    }
}

/// A connection that has received a request's head, and the body of that request.
fn connection_with_body(framing: Framing) -> (ClientEnd, ClientBody) {
    let (client, end) = duplex(1 << 16);
    let body =
        ServerConnection::begin_request(&ServerConnection::new(Box::new(end), Bytes::new()), framing, false);
    (ClientEnd(client), ClientBody::Http1(body))
}

/// The memory for a body depends on its size, not on the pieces in which the client sends it.
#[test]
fn a_body_in_one_byte_chunks_is_buffered_in_little_more_than_its_size() {
    const LENGTH: usize = 64 * 1024;
    let buffer_with = |limit: u64, nothing: bool| {
        let (mut client, source) = connection_with_body(Framing::Chunked);
        let progress = Rc::new(Progress::new(Instant::now()));
        let replay = Replay::new(source, limit, None, &progress);
        let mut reader = Reader::new(replay.next_attempt(None));
        if nothing {
            replay.stop_buffering();
        }
        // The worst case: each chunk in a segment of its own.
        for _ in 0..LENGTH {
            client.send(b"1\r\nx\r\n");
            assert!(reader.read().unwrap());
        }
        assert_eq!(reader.got.len(), LENGTH);
        let held = replay.0.as_ref().unwrap().borrow().buffer.allocated();
        (held, replay.replayability())
    };
    let (held, replayable) = buffer_with(LENGTH as u64, false);
    assert!(held <= 2 * LENGTH + 1024 && replayable == Replayability::Buffered, "{held} bytes");
    assert_eq!(buffer_with(LENGTH as u64 - 1, false), (0, Replayability::NotKept));
    assert_eq!(buffer_with(LENGTH as u64, true), (0, Replayability::NotKept));
    assert_eq!(buffer_with(0, false), (0, Replayability::NotKept));
}

/// The first error stays the cause, although later reads fail as well.
#[test]
fn a_malformed_body_is_not_reported_as_a_closed_client() {
    let progress = Rc::new(Progress::new(Instant::now()));
    let replay = |source| Replay::new(source, 100, None, &progress);
    let (mut client, source) = connection_with_body(Framing::Chunked);
    let malformed = replay(source);
    client.send(b"5\r\nhello\r\nzz\r\n");
    for _ in 0..2 {
        let mut reader = Reader::new(malformed.next_attempt(None));
        while reader.read().is_ok() {}
        assert_eq!(malformed.failure(), Some(SourceFailure::Malformed(FramingError::ChunkSize)));
    }
    let (client, source) = connection_with_body(Framing::Chunked);
    drop(client);
    let gone = replay(source);
    assert!(Reader::new(gone.next_attempt(None)).read().is_err());
    assert_eq!(gone.failure(), Some(SourceFailure::ClientGone));
}

/// An attempt, and what its endpoint received.
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

    /// Reads once; false if nothing is available yet.
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

/// The result of one run.
struct Run {
    received: Vec<u8>,
    attempts: usize,
}

/// Applies `events` to a body, then sends and reads the rest.
fn play(body: &[u8], chunked: bool, limit: u64, events: &[Event]) -> Result<Run, TestCaseError> {
    let framing = if chunked { Framing::Chunked } else { Framing::Length(body.len() as u64) };
    let (mut client, source) = connection_with_body(framing);
    let progress = Rc::new(Progress::new(Instant::now()));
    let replay = Replay::new(source, limit, None, &progress);
    let mut attempts = vec![Reader::new(replay.next_attempt(None))];
    let mut sent_count = 0;
    let mut send = |client: &mut ClientEnd, count: usize| {
        let chunk = &body[sent_count..body.len().min(sent_count + count)];
        sent_count += chunk.len();
        match (chunk.is_empty(), chunked) {
            (true, _) => {}
            (false, false) => client.send(chunk),
            (false, true) => {
                client.send(&[format!("{:x}\r\n", chunk.len()).as_bytes(), chunk, b"\r\n"].concat());
            }
        }
    };
    for event in events {
        match *event {
            Event::Arrive(count) => send(&mut client, count),
            Event::Read(times) => {
                for _ in 0..times {
                    let newest = attempts.last_mut().expect("there is one");
                    let moved = !newest.ended && newest.read().map_err(|error| fail(&error))?;
                    if !moved {
                        break;
                    }
                }
            }
            Event::Retry => {
                let gone = replay.replayability() == Replayability::NotKept;
                prop_assert_eq!(replay.take_over(), !gone);
                if !gone {
                    attempts.push(Reader::new(replay.next_attempt(None)));
                }
            }
            Event::OldAttemptReads => {
                let last = attempts.len() - 1;
                for old in &mut attempts[..last] {
                    let had = old.got.len();
                    // An empty body cannot be taken over.
                    prop_assert!(
                        body.is_empty() || old.ended || old.read().is_err(),
                        "an old attempt takes bytes away"
                    );
                    prop_assert_eq!(old.got.len(), had);
                }
            }
        }
        for one in &attempts {
            prop_assert!(body.starts_with(&one.got), "an attempt received bytes that are not the beginning");
        }
    }
    // No attempt begins after the buffer was dropped, so the last attempt can still read the whole body.
    send(&mut client, body.len());
    if chunked {
        client.send(b"0\r\nx-sum: 1\r\n\r\n");
    }
    let newest = attempts.last_mut().expect("there is one");
    let sent = newest.body.upload_status();
    while !newest.ended {
        let moved = newest.read().map_err(|error| fail(&error))?;
        prop_assert!(moved || !newest.body.is_end_stream(), "it ends without reporting its end");
    }
    prop_assert_eq!(&newest.got, body);
    prop_assert!(sent.is_complete() && newest.body.is_end_stream());
    let trailers = newest.trailers.as_ref().and_then(|trailers| trailers.get("x-sum"));
    prop_assert_eq!(trailers.is_some(), chunked, "trailers are sent as well");
    let kept = body.len() as u64 <= limit;
    prop_assert_eq!(
        replay.replayability() != Replayability::NotKept,
        kept,
        "buffered up to the limit and no further"
    );
    Ok(Run { received: newest.got.clone(), attempts: attempts.len() })
}

fn fail(error: &BodyError) -> TestCaseError {
    TestCaseError::fail(error.to_string())
}

proptest! {
    /// Random interleavings of arrival, reads and failures.
    #[test]
    fn each_attempt_gets_the_bytes_from_the_first_one_on(
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
fn every_short_sequence_of_events() {
    let all = [Event::Arrive(2), Event::Read(1), Event::Retry, Event::OldAttemptReads];
    let mut attempts = 0;
    for length in 0..=5u32 {
        for number in 0..4usize.pow(length) {
            let events: Vec<Event> = (0..length).map(|at| all[number / 4usize.pow(at) % 4]).collect();
            for (chunked, limit) in [(false, 3), (false, 4), (true, 0), (true, 4), (true, 9)] {
                let run = play(b"body", chunked, limit, &events);
                let run = run.unwrap_or_else(|error| panic!("{events:?}, limit {limit}: {error}"));
                assert_eq!(run.received, b"body");
                attempts += run.attempts;
            }
        }
    }
    assert!(attempts > 5 * 1365, "some bodies were sent more than once");
}

/// Every attempt sees the length of the whole body, so that each is framed like the first.
#[test]
fn a_later_attempt_is_as_long_as_the_first() {
    let (mut client, source) = connection_with_body(Framing::Length(10));
    let progress = Rc::new(Progress::new(Instant::now()));
    let replay = Replay::new(source, 100, None, &progress);
    for chunk in [b"0123", b"4567"] {
        let mut reader = Reader::new(replay.next_attempt(None));
        assert_eq!(reader.body.size_hint().exact(), Some(10));
        client.send(chunk);
        while reader.read().expect("no error") {
            assert_eq!(reader.body.size_hint().exact(), Some(10 - reader.got.len() as u64));
        }
    }
    assert_eq!(replay.next_attempt(None).size_hint().exact(), Some(10));
}
