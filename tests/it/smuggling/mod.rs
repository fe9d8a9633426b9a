//! No ambiguous message passes: hostile bytes from clients in HTTP/1 ([`requests`]) and HTTP/2 ([`http2`]), and from
//! upstreams ([`responses`]).

mod http2;
mod requests;
mod responses;

use std::{
    io::{Read, Write},
    net::TcpStream,
    sync::{Arc, Mutex},
    time::Duration,
};

use crate::support::{
    Proxy, RawClient, RawServer,
    strict::{self, Message, Progress},
};

/// What must happen to a request.
enum Expect {
    /// Nothing complete reaches the service; the client gets an error or a close, and the connection ends.
    Refused,
    /// As `Refused`, but the connection may be kept: the framing was clear.
    Denied,
    /// Exactly one request reaches the service, and the check holds for it.
    One(Check),
    /// The standards allow both `Refused` and `One`.
    RefusedOrOne(Check),
}

type Check = fn(&Message) -> bool;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Listener {
    Outbound,
    Inbound,
}

struct Case {
    name: &'static str,
    raw: Vec<u8>,
    expect: Expect,
    /// The connection must end, whatever happened to the request.
    closes: bool,
    only: Option<Listener>,
}

impl Case {
    fn closing(mut self) -> Self {
        self.closes = true;
        self
    }

    fn only(mut self, listener: Listener) -> Self {
        self.only = Some(listener);
        self
    }
}

fn case(name: &'static str, raw: impl Into<Vec<u8>>, expect: Expect) -> Case {
    let closes = matches!(expect, Expect::Refused);
    Case { name, raw: raw.into(), expect, closes, only: None }
}

fn refused(name: &'static str, raw: impl Into<Vec<u8>>) -> Case {
    case(name, raw, Expect::Refused)
}

fn denied(name: &'static str, raw: impl Into<Vec<u8>>) -> Case {
    case(name, raw, Expect::Denied)
}

fn one(name: &'static str, raw: impl Into<Vec<u8>>, check: Check) -> Case {
    case(name, raw, Expect::One(check))
}

fn refused_or_one(name: &'static str, raw: impl Into<Vec<u8>>, check: Check) -> Case {
    case(name, raw, Expect::RefusedOrOne(check))
}

/// A service that parses strictly and records what it received.
struct Recorder {
    server: RawServer,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Default)]
struct Seen {
    requests: Vec<Message>,
    /// Bytes that another parser could read differently.
    wrong: Vec<String>,
}

impl Recorder {
    fn start() -> Self {
        let seen = Arc::<Mutex<Seen>>::default();
        let notes = seen.clone();
        Self { server: RawServer::start(move |stream| record(stream, &notes)), seen }
    }

    fn take(&self) -> Seen {
        std::mem::take(&mut *self.seen.lock().expect("no panic under the lock"))
    }
}

fn record(mut stream: TcpStream, seen: &Mutex<Seen>) {
    let (mut buffer, mut chunk) = (Vec::new(), [0; 16 * 1024]);
    loop {
        match strict::request(&buffer) {
            Progress::Complete(message, used) => {
                buffer.drain(..used);
                let head = message.start.starts_with("HEAD ");
                seen.lock().expect("no panic under the lock").requests.push(message);
                let body = if head { "" } else { "ok" };
                if write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{body}").is_err() {
                    return;
                }
            }
            Progress::Wrong(why) => {
                let bytes = String::from_utf8_lossy(&buffer).into_owned();
                seen.lock().expect("no panic under the lock").wrong.push(format!("{why}: {bytes:.300?}"));
                return;
            }
            Progress::Partial => match stream.read(&mut chunk) {
                Ok(0) | Err(_) => return,
                Ok(count) => buffer.extend_from_slice(&chunk[..count]),
            },
        }
    }
}

#[test]
fn no_ambiguous_request_reaches_the_service() {
    let recorder = Recorder::start();
    let proxy = Proxy::start(format!(
        "[inbound]\nforward_to = \"{0}\"\n[[upstream]]\nname = \"up\"\nendpoints = [\"{0}\"]\n",
        recorder.server.address()
    ));
    let cases = requests::cases();
    assert!(cases.len() >= 60, "the corpus has shrunk to {}", cases.len());
    let mut failures = Vec::new();
    for case in &cases {
        for (listener, address) in
            [(Listener::Outbound, proxy.outbound()), (Listener::Inbound, proxy.inbound())]
        {
            if case.only.is_some_and(|only| only != listener) {
                continue;
            }
            if let Err(why) = run(case, RawClient::connect(address), &recorder) {
                failures.push(format!("{listener:?}, {}: {why}", case.name))
            }
            // An invalid connection never affects another.
            let well = RawClient::connect(address).ask("GET /sentinel HTTP/1.1\r\nHost: up\r\n\r\n");
            assert_eq!(well.status(), 200, "after {:?}, {}: {well:?}", listener, case.name);
            recorder.take();
        }
    }
    assert!(failures.is_empty(), "{} of {} cases:\n{}", failures.len(), cases.len(), failures.join("\n"));
}

fn run(case: &Case, client: RawClient, recorder: &Recorder) -> Result<(), String> {
    let mut client = client.with_read_timeout(Duration::from_secs(3));
    client.send(&case.raw);
    let response = client.response()?;
    let (rest, closed) =
        if case.closes || response.is_none() { client.read_to_close() } else { (Vec::new(), false) };
    let seen = recorder.take();
    if !seen.wrong.is_empty() {
        return Err(format!("the service got {}", seen.wrong.join("; ")));
    }
    if seen.requests.iter().any(|request| request.target().contains("smuggled")) {
        return Err(format!("smuggled: {:?}", seen.requests));
    }
    if case.closes && !closed {
        return Err(format!("the connection lives on after {response:?}"));
    }
    if !rest.is_empty() {
        return Err(format!("a second response: {:?}", String::from_utf8_lossy(&rest)));
    }
    let status = response.as_ref().map(Message::status);
    let refused = || match status {
        None if !closed => Err("neither a response nor a close".to_owned()),
        None | Some(400..) => Ok(()),
        Some(_) => Err(format!("not refused: {response:?}")),
    };
    let passed = |check: &Check, request: &Message| match status {
        Some(200) if check(request) => Ok(()),
        Some(200) => Err(format!("the service got {request:?}")),
        _ => Err(format!("the service got {request:?}, the client {response:?}")),
    };
    match (&case.expect, &seen.requests[..]) {
        (_, [_, _, ..]) => Err(format!("several requests: {:?}", seen.requests)),
        (Expect::Refused | Expect::Denied | Expect::RefusedOrOne(_), []) => refused(),
        (Expect::One(check) | Expect::RefusedOrOne(check), [request]) => passed(check, request),
        (Expect::One(_), []) => Err(format!("nothing reached the service; the client got {response:?}")),
        (Expect::Refused | Expect::Denied, [request]) => Err(format!("the service got {request:?}")),
    }
}

/// Bytes after an Upgrade request do not belong to the new protocol until the service has sent 101.
#[test]
fn no_bytes_are_forwarded_after_an_upgrade_before_its_response() {
    let (saw, seen) = std::sync::mpsc::channel();
    let server = RawServer::start(move |mut stream| {
        let (mut got, mut chunk) = (Vec::new(), [0; 4096]);
        while !got.windows(4).any(|window| window == b"\r\n\r\n") {
            match stream.read(&mut chunk) {
                Ok(0) | Err(_) => return,
                Ok(count) => got.extend_from_slice(&chunk[..count]),
            }
        }
        stream.set_read_timeout(Some(Duration::from_millis(300))).expect("a timeout");
        while let Ok(count @ 1..) = stream.read(&mut chunk) {
            got.extend_from_slice(&chunk[..count]);
        }
        let _ = saw.send(got);
        let _ = stream.write_all(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    });
    let proxy = Proxy::start(format!("[inbound]\nforward_to = \"{}\"\n", server.address()));
    let mut client = RawClient::connect(proxy.inbound());
    client.send(
        "GET /chat HTTP/1.1\r\nHost: up\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n\
         DELETE /smuggled HTTP/1.1\r\nHost: up\r\n\r\n",
    );
    let got = seen.recv_timeout(Duration::from_secs(10)).expect("the service got the request");
    match strict::request(&got) {
        Progress::Complete(message, used) => {
            assert_eq!((message.target(), used), ("/chat", got.len()), "more than the request came");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(client.response().expect("well-formed").expect("a response").status(), 403);
}

/// Pipelined requests are separate exchanges, in order.
#[test]
fn pipelined_requests_are_answered_in_order() {
    let recorder = Recorder::start();
    let proxy = Proxy::start(format!("[inbound]\nforward_to = \"{}\"\n", recorder.server.address()));
    let mut client = RawClient::connect(proxy.inbound());
    client.send(
        "POST /1 HTTP/1.1\r\nHost: up\r\nContent-Length: 3\r\n\r\nabc\
         GET /2 HTTP/1.1\r\nHost: up\r\n\r\n\
         POST /3 HTTP/1.1\r\nHost: up\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nz\r\n0\r\n\r\n",
    );
    for _ in 0..3 {
        assert_eq!(client.response().expect("well-formed").expect("a response").status(), 200);
    }
    let seen = recorder.take();
    assert!(seen.wrong.is_empty(), "{:?}", seen.wrong);
    let got: Vec<_> = seen.requests.iter().map(|request| (request.target(), request.text())).collect();
    assert_eq!(got, [("/1", "abc".to_owned()), ("/2", String::new()), ("/3", "z".to_owned())]);
}
