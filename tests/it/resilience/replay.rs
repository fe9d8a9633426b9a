//! A retried request has exactly the bytes that the client sent, whatever happened to earlier attempts.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use super::{post, proxy};
use crate::support::{
    RawClient, RawServer, eventually,
    strict::{self, Message, Progress},
};

/// How the first attempt ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failure {
    /// A TCP reset.
    Reset,
    /// A FIN.
    Close,
    /// 503 and a FIN, with the body not yet read.
    EarlyAnswer,
    /// 503 with the connection left open.
    Answer,
}

const FAILURES: [Failure; 4] = [Failure::Reset, Failure::Close, Failure::EarlyAnswer, Failure::Answer];

/// What the service received in all: of the failed attempt, and the request that got 200.
#[derive(Default)]
struct Got {
    failed: Option<Vec<u8>>,
    whole: Vec<Message>,
}

/// Fails the first request after `after` bytes of its body, responds to the next.
fn server(failure: Failure, after: usize, got: &Arc<Mutex<Got>>) -> RawServer {
    let got = got.clone();
    RawServer::start(move |mut stream| {
        let (mut bytes, mut chunk) = (Vec::new(), [0; 777]);
        loop {
            if let Progress::Complete(message, used) = strict::request(&bytes) {
                bytes.drain(..used);
                if got.lock().expect("no panic").failed.is_some() {
                    got.lock().expect("no panic").whole.push(message);
                    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
                    continue;
                }
                fail(&mut stream, failure, message.body, &got);
                if failure == Failure::Answer {
                    continue;
                }
                return;
            }
            let body = bytes.windows(4).position(|four| four == b"\r\n\r\n").map(|at| bytes.len() - at - 4);
            // In the middle of its body: only how much has arrived matters, not its framing.
            if body.is_some_and(|count| count >= after)
                && failure != Failure::Answer
                && got.lock().expect("no panic").failed.is_none()
            {
                fail(&mut stream, failure, Vec::new(), &got);
                return;
            }
            match stream.read(&mut chunk) {
                Ok(0) | Err(_) => return,
                Ok(count) => bytes.extend_from_slice(&chunk[..count]),
            }
        }
    })
}

fn fail(stream: &mut TcpStream, failure: Failure, body: Vec<u8>, got: &Mutex<Got>) {
    got.lock().expect("no panic").failed = Some(body);
    match failure {
        // A close with unread bytes makes the kernel reset the connection; `Close` reads none either, but sends FIN
        // first.
        Failure::Reset => {}
        Failure::Close => {
            let _ = stream.shutdown(Shutdown::Write);
        }
        Failure::EarlyAnswer | Failure::Answer => {
            let _ = stream.write_all(b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy");
        }
    }
}

/// A reproducible pseudo-random generator.
struct PseudoRandom(u64);

impl PseudoRandom {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).expect("31 bits") % end.max(1)
    }
}

/// One request whose first attempt fails.
struct Case {
    failure: Failure,
    /// Of the request's body, in bytes.
    size: usize,
    /// The failure comes after so many bytes of the body, while the rest is being sent.
    after: usize,
    chunked: bool,
    /// `retry.body_limit`, in bytes.
    limit: usize,
}

fn run_case(random: &mut PseudoRandom, Case { failure, size, after, chunked, limit }: Case) {
    let what = format!("{failure:?} after {after} of {size} bytes, chunked: {chunked}, kept up to {limit}");
    let body: Vec<u8> = (0..size).map(|_| u8::try_from(random.below(256)).expect("a byte")).collect();
    let got = Arc::<Mutex<Got>>::default();
    let server = server(failure, after, &got);
    let proxy = proxy(&[server.address()], &format!("retry = {{ body_limit = \"{limit}B\" }}"));
    let mut client = RawClient::connect(proxy.outbound());
    let framing =
        if chunked { "Transfer-Encoding: chunked".to_owned() } else { format!("Content-Length: {size}") };
    client.send(format!("PUT / HTTP/1.1\r\nHost: up\r\n{framing}\r\n\r\n"));
    let mut sent = 0;
    let mut send = |client: &mut RawClient, random: &mut PseudoRandom, until: usize| {
        while sent < until {
            let piece = &body[sent..until.min(sent + 1 + random.below(9000))];
            sent += piece.len();
            if chunked {
                client.send([format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat());
            } else {
                client.send(piece);
            }
        }
    };
    if failure != Failure::Answer {
        // The rest follows only after the first attempt has failed: the new attempt first sends the buffered copy,
        // then the live bytes.
        send(&mut client, random, after);
        eventually(&what, || got.lock().expect("no panic").failed.is_some());
    }
    send(&mut client, random, size);
    if chunked {
        client.send("0\r\n\r\n");
    }
    let response = client.response().expect("well-formed").unwrap_or_else(|| panic!("no answer: {what}"));
    let got = got.lock().expect("no panic");
    if size <= limit {
        assert_eq!(response.status(), 200, "{what}: {response:?}");
        assert_eq!(got.whole.len(), 1, "{what}");
        assert!(got.whole[0].body == body, "{what}: {} bytes came", got.whole[0].body.len());
    } else if response.status() == 200 {
        // It failed before more than the buffer's limit was read, so nothing was lost.
        assert!(
            got.whole.len() == 1 && got.whole[0].body == body,
            "{what}: {} bytes",
            got.whole[0].body.len()
        );
    } else {
        assert!(got.whole.is_empty() && matches!(response.status(), 502 | 503), "{what}: {response:?}");
    }
}

#[test]
fn a_retried_body_is_byte_for_byte_the_clients() {
    let mut random = PseudoRandom(2026);
    for failure in FAILURES {
        for chunked in [false, true] {
            for size in [1, 2, 4096, 30_000] {
                for after in [0, 1, size / 2, size] {
                    run_case(
                        &mut random,
                        Case { failure, size, after: after.min(size), chunked, limit: 64 * 1024 },
                    );
                }
            }
            run_case(
                &mut random,
                Case { failure, size: 64 * 1024, after: 20_000, chunked, limit: 64 * 1024 },
            );
        }
    }
}

/// Larger than the replay buffer: not retried once bytes are gone, never sent with a gap.
#[test]
fn a_body_beyond_the_replay_buffer_is_not_retried() {
    let mut random = PseudoRandom(7);
    for failure in FAILURES {
        for chunked in [false, true] {
            for after in [0, 500, 1000, 1001, 5000, 20_000] {
                run_case(&mut random, Case { failure, size: 20_000, after, chunked, limit: 1000 });
            }
        }
    }
}

/// Each attempt decides whether its own connection may be reused. Here the first attempt sends the whole body and the
/// second gets its response while it is still sending: its connection is in the middle of a request.
#[test]
fn a_connection_with_an_unfinished_request_is_not_reused() {
    const SIZE: usize = 24 << 20;
    let server = RawServer::start({
        let connections = AtomicUsize::new(0);
        move |mut stream| {
            let number = connections.fetch_add(1, Ordering::Relaxed);
            let (mut got, mut chunk) = (Vec::new(), vec![0; 64 * 1024]);
            let head = loop {
                match stream.read(&mut chunk) {
                    Ok(0) | Err(_) => return,
                    Ok(count) => got.extend_from_slice(&chunk[..count]),
                }
                if let Some(at) = got.windows(4).position(|four| four == b"\r\n\r\n") {
                    break at + 4;
                }
            };
            match number {
                0 => {
                    let mut body = got.len() - head;
                    while body < SIZE {
                        match stream.read(&mut chunk) {
                            Ok(0) | Err(_) => return,
                            Ok(count) => body += count,
                        }
                    }
                    let _ = stream.write_all(
                        b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\nConnection: close\r\n\r\nbusy",
                    );
                }
                _ => {
                    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
                    // Reads no more and stays open until the proxy gives up or the test ends.
                    let _ = stream.set_read_timeout(Some(crate::support::WAIT_LIMIT));
                    std::thread::park_timeout(crate::support::WAIT_LIMIT);
                }
            }
        }
    });
    let proxy = proxy(&[server.address()], "retry = { body_limit = \"32MiB\" }\nidle_timeout = \"5s\"");
    let mut client = RawClient::connect(proxy.outbound());
    client.send(format!("PUT / HTTP/1.1\r\nHost: up\r\nContent-Length: {SIZE}\r\n\r\n"));
    client.send(vec![b'x'; SIZE]);
    let response = client.response().expect("well-formed").expect("a response");
    assert_eq!(response.status(), 200, "{response:?}");
    assert_eq!(server.connections(), 2);
    // A method that is not retried, so it would fail behind that request.
    let response = RawClient::connect(proxy.outbound()).ask(post("", "pay"));
    assert_eq!((response.status(), server.connections()), (200, 3), "{response:?}");
}
