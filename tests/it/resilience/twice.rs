//! No request is sent twice unless it may be: every method, body, kind of connection and policy with every point at
//! which a service can fail, through the real binary. The expectation is derived here anew from the standards.

use std::{
    collections::HashMap,
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    sync::{Arc, Mutex},
};

use super::upstream;
use crate::support::{
    Proxy, RawClient, RawServer,
    strict::{self, Message, Progress},
};

/// Where the service fails the first attempt of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Point {
    /// After the head, before any of the body.
    Head,
    /// In the middle of the request body.
    Half,
    /// After the whole request, before a byte of the response.
    Whole,
    /// In the middle of the response head.
    PartOfAnswer,
    /// 503 after the head, and a close.
    EarlyAnswer,
    /// 503 after the whole request, connection kept.
    Answer,
    /// In the middle of the body of a good response: the client has its head.
    Committed,
}

const POINTS: [Point; 7] = [
    Point::Head,
    Point::Half,
    Point::Whole,
    Point::PartOfAnswer,
    Point::EarlyAnswer,
    Point::Answer,
    Point::Committed,
];

/// Method, and whether an Idempotency-Key allows a repetition.
const METHODS: [(&str, bool); 7] = [
    ("GET", false),
    ("OPTIONS", false),
    ("PUT", false),
    ("DELETE", false),
    ("POST", false),
    ("POST", true),
    ("PATCH", false),
];

/// No body, a buffered one, and one larger than the buffer of any policy here.
const BODIES: [usize; 3] = [0, 1000, 100_000];

/// One upstream for each policy, with its name.
const POLICIES: [(&str, &str); 4] = [
    (
        "default",
        "retry = { body_limit = \"4KiB\", backoff = BACKOFF, budget = { ratio = 1.0, min_per_second = 1000 } }",
    ),
    (
        "all",
        "retry = { methods = \"all\", backoff = BACKOFF, budget = { ratio = 1.0, min_per_second = 1000 } }",
    ),
    ("off", "retry = false"),
    ("once", "retry = { max = 0 }"),
];

/// A request as the service received it.
#[derive(Debug)]
struct Delivery {
    /// On a connection that had carried another request before.
    reused: bool,
    /// Where all of it arrived.
    body: Option<Vec<u8>>,
}

/// By the mark of the request.
type Log = Arc<Mutex<HashMap<String, Vec<Delivery>>>>;

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines()
        .find_map(|line| line.split_once(": ").filter(|(key, _)| *key == name))
        .map(|(_, value)| value)
}

/// Serves a connection as the fields `x-mark`, `x-point` and `x-close` of its requests say.
fn serve(mut stream: TcpStream, log: &Log) {
    let (mut bytes, mut chunk) = (Vec::new(), [0; 16 * 1024]);
    let mut served = 0;
    // Of the request being read: its mark, where to fail, and whether it is recorded.
    let mut reading: Option<(String, Option<Point>)> = None;
    loop {
        let head_end = bytes.windows(4).position(|four| four == b"\r\n\r\n").map(|at| at + 4);
        if let (None, Some(end)) = (&reading, head_end) {
            let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
            let mark = header(&head, "x-mark").unwrap_or_default().to_owned();
            let mut log = log.lock().expect("no panic");
            let deliveries = log.entry(mark.clone()).or_default();
            let asked = header(&head, "x-point").and_then(|word| word.parse::<usize>().ok());
            let point = asked.filter(|_| deliveries.is_empty()).map(|index| POINTS[index]);
            deliveries.push(Delivery { reused: served > 0, body: None });
            reading = Some((mark, point));
            match point {
                Some(Point::Head) => return,
                Some(Point::EarlyAnswer) => {
                    let _ = stream.write_all(
                        b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\nConnection: close\r\n\r\nbusy",
                    );
                    let _ = stream.shutdown(Shutdown::Write);
                    drop(log);
                    // A close with unread bytes makes the kernel reset the connection and lose the response.
                    while matches!(stream.read(&mut chunk), Ok(1..)) {}
                    return;
                }
                _ => {}
            }
        }
        if let (Some((_, Some(Point::Half))), Some(end)) = (&reading, head_end) {
            let length =
                header(&String::from_utf8_lossy(&bytes[..end]).to_ascii_lowercase(), "content-length")
                    .and_then(|length| length.parse::<usize>().ok());
            if bytes.len() - end >= length.unwrap_or(0) / 2 {
                return;
            }
        }
        if let (Some((mark, point)), Progress::Complete(message, used)) = (&reading, strict::request(&bytes))
        {
            bytes.drain(..used);
            let close = message.field("x-close").is_some();
            if let Some(last) = log.lock().expect("no panic").get_mut(mark).and_then(|all| all.last_mut()) {
                last.body = Some(message.body);
            }
            let response: &[u8] = match point {
                Some(Point::Whole) => return,
                Some(Point::PartOfAnswer) => b"HTTP/1.1 20",
                Some(Point::Answer) => b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n",
                Some(Point::Committed) => b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf",
                _ => b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n",
            };
            let cut = matches!(point, Some(Point::PartOfAnswer | Point::Committed));
            let rest = match (cut, close) {
                (true, _) => &b""[..],
                (false, true) => b"Connection: close\r\n\r\ndone",
                (false, false) => b"\r\ndone",
            };
            let _ = stream.write_all(&[response, rest].concat());
            if cut || close {
                return;
            }
            (reading, served) = (None, served + 1);
            continue;
        }
        match stream.read(&mut chunk) {
            Ok(0) | Err(_) => return,
            Ok(count) => bytes.extend_from_slice(&chunk[..count]),
        }
    }
}

/// One request and its conditions.
#[derive(Clone, Copy, Debug)]
struct Case {
    policy: &'static str,
    /// `[runtime] observe = ["retry"]`
    observed: bool,
    method: &'static str,
    key: bool,
    size: usize,
    point: Point,
    pooled: bool,
}

impl Case {
    /// How often the service may get it at most; the second attempt gets a good response.
    fn most(&self) -> usize {
        let idempotent = matches!(self.method, "GET" | "OPTIONS" | "PUT" | "DELETE") || self.key;
        // No byte of a response arrived, on a connection that the service may have closed just then.
        let stale = self.pooled && matches!(self.point, Point::Head | Point::Half | Point::Whole);
        let again = match self.policy {
            _ if self.point == Point::Committed => false,
            "once" => false,
            "off" => stale && idempotent,
            _ if self.observed => stale && (idempotent || self.policy == "all"),
            "all" => true,
            _ => idempotent,
        };
        1 + usize::from(again)
    }

    fn request(&self, mark: &str, point: Option<Point>, body: &[u8]) -> Vec<u8> {
        let mut head = format!("{} / HTTP/1.1\r\nHost: {}\r\nx-mark: {mark}\r\n", self.method, self.policy);
        if let Some(index) = point.and_then(|point| POINTS.iter().position(|one| *one == point)) {
            head += &format!("x-point: {index}\r\n");
        }
        if !self.pooled {
            head += "x-close: 1\r\n";
        }
        if self.key {
            head += "Idempotency-Key: 1\r\n";
        }
        if !body.is_empty() {
            head += &format!("Content-Length: {}\r\n", body.len());
        }
        [head.as_bytes(), b"\r\n", body].concat()
    }
}

/// Deterministic bytes without repetition.
fn body(size: usize, seed: usize) -> Vec<u8> {
    (0..size).map(|at| u8::try_from((at * 31 + at / 251 + seed) % 256).expect("a byte")).collect()
}

/// The response, if one arrived: a client that still sends may lose it to the close.
fn answer(proxy: &Proxy, request: &[u8]) -> Option<Message> {
    let mut client = RawClient::connect(proxy.outbound());
    client.send(request);
    client.response().ok().flatten()
}

fn check(case: Case, number: usize, proxy: &Proxy, log: &Log) -> bool {
    let (mark, sent) = (format!("{number}"), body(case.size, number));
    let warm = Case { size: 0, ..case }.request("warm", None, &[]);
    loop {
        assert_eq!(answer(proxy, &warm).map(|response| response.status()), Some(200), "{case:?}");
        // Now the pool holds one connection or, if each is closed, the last warm-up request found none to reuse.
        let log = log.lock().expect("no panic");
        if case.pooled || log["warm"].last().is_some_and(|last| !last.reused) {
            break;
        }
    }
    let response = answer(proxy, &case.request(&mark, Some(case.point), &sent));
    let log = log.lock().expect("no panic");
    let got = log.get(&mark).map_or(&[][..], Vec::as_slice);
    assert!((1..=case.most()).contains(&got.len()), "sent {} times: {case:?}, {response:?}", got.len());
    for delivery in got {
        assert!(delivery.body.as_ref().is_none_or(|body| *body == sent), "not what was sent: {case:?}");
    }
    if case.size <= 4096 {
        assert_eq!(got.len(), case.most(), "sent less than it may: {case:?}, {response:?}");
    }
    let whole = got.len() == 2 && got[1].body.is_some();
    if let Some(response) = response.filter(|_| case.point != Point::Committed) {
        assert_eq!(response.status() == 200, whole, "{case:?}: {response:?}");
        assert!(whole || matches!(response.status(), 502 | 503), "{case:?}: {response:?}");
    }
    got[0].reused
}

fn every_case(observed: bool, host: &str) {
    let log = Log::default();
    let server = RawServer::start({
        let log = log.clone();
        move |stream| serve(stream, &log)
    });
    let more = |keys: &str| {
        let keys = keys.replace("BACKOFF", "{ base = \"1ms\", max = \"1ms\" }");
        format!("breaker = false\noutlier = false\nbalance = \"round-robin\"\n{keys}")
    };
    let mut config = if observed { "[runtime]\nobserve = [\"retry\"]\n".to_owned() } else { String::new() };
    for (name, keys) in POLICIES {
        let one = upstream(name, &[server.address()], &more(keys));
        config += &one.replace("127.0.0.1", host);
    }
    let proxy = Proxy::start(config);
    let (mut number, mut reused) = (0, 0);
    for (policy, _) in POLICIES {
        for (method, key) in METHODS {
            // A body with these methods is allowed and has no meaning; it is forwarded all the same.
            for size in BODIES {
                for point in POINTS {
                    for pooled in [false, true] {
                        let case = Case { policy, observed, method, key, size, point, pooled };
                        number += 1;
                        reused += usize::from(check(case, number, &proxy, &log));
                    }
                }
            }
        }
    }
    // Every request that should use a pooled connection does.
    assert_eq!((number, reused), (4 * 7 * 3 * 7 * 2, number / 2));
}

#[test]
fn never_sent_twice_unless_it_may_be() {
    every_case(false, "127.0.0.1");
}

/// Observed policies send nothing again, except after a stale keep-alive race.
#[test]
fn observed_retries_send_nothing_twice() {
    every_case(true, "127.0.0.1");
}

/// `localhost` has two addresses and the service listens on one: the other one costs no attempt and sends nothing
/// twice.
#[test]
fn the_second_address_of_localhost_gets_nothing_twice() {
    every_case(false, "localhost");
}
