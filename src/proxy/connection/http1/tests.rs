//! A whole connection against callers of every kind, in virtual time. Calls are answered by faults: some at once, some
//! after a while.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use http::{HeaderMap, HeaderValue, StatusCode, Uri};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufWriter, DuplexStream, duplex};

use super::{super::HEADER_TIMEOUT, *};
use crate::{
    config::{Source, Sources, load_sources},
    http1::head::Wish,
    model::Side,
    proxy::worker::{Phase, Worker},
    runtime::{self, Proxy},
};

const SLOW: Duration = Duration::from_secs(5);
const CONFIG: &str = r#"
    inbound.listen = "127.0.0.1:0"
    outbound.listen = "127.0.0.1:0"
    [[upstream]]
    name = "fast"
    endpoints = ["127.0.0.1:1"]
    fault = { abort = 503, abort_ratio = 1.0 }
    [[upstream]]
    name = "slow"
    endpoints = ["127.0.0.1:1"]
    fault = { delay = "5s", delay_ratio = 1.0, abort = 503, abort_ratio = 1.0 }
"#;

/// Serves one connection while `caller` is one; how it ended.
async fn serve<F: Future>(
    room: usize,
    caller: impl FnOnce(Caller, Arc<crate::proxy::worker::Shared>) -> F,
) -> (Result<(), ConnectionError>, F::Output) {
    let source = Source { path: PathBuf::from("test.toml"), text: CONFIG.to_owned() };
    let loaded = load_sources(Sources(vec![source]), &|_| None).unwrap();
    let proxy: Proxy = runtime::start(loaded.config, Arc::default(), 1).unwrap();
    let worker = Worker::new(Arc::clone(&proxy.shared), 0);
    let address: SocketAddr = "192.0.2.1:1000".parse().unwrap();
    let connection = Connection::new(&worker, Side::Outbound, address, None);
    let (near, far) = duplex(room);
    // Dropped when it is served, as a socket is.
    let served = async { connection.serve_http1(Box::new(far), Bytes::new()).await };
    let outcome = tokio::join!(served, caller(Caller(near, Vec::new()), Arc::clone(&proxy.shared)));
    proxy.stop();
    outcome
}

struct Caller(DuplexStream, Vec<u8>);

impl Caller {
    async fn send(&mut self, bytes: &str) {
        self.0.write_all(bytes.as_bytes()).await.unwrap();
    }

    /// The head of the next answer, which has no body.
    async fn head(&mut self) -> String {
        let end = loop {
            if let Some(at) = self.1.windows(4).position(|four| four == b"\r\n\r\n") {
                break at + 4;
            }
            assert_ne!(self.0.read_buf(&mut self.1).await.unwrap(), 0, "hung up after {:?}", self.1);
        };
        String::from_utf8(self.1.drain(..end).collect()).unwrap()
    }

    /// The head of the next answer.
    async fn answer(&mut self) -> String {
        let head = self.head().await;
        let length = head.split("content-length: ").nth(1).and_then(|rest| rest.split('\r').next());
        let length: usize = length.map_or(0, |length| length.parse().unwrap());
        while self.1.len() < length {
            assert_ne!(self.0.read_buf(&mut self.1).await.unwrap(), 0, "hung up within a body");
        }
        self.1.drain(..length);
        head
    }

    async fn is_closed(&mut self) -> bool {
        self.1.is_empty() && matches!(self.0.read(&mut [0]).await, Ok(0) | Err(_))
    }
}

const GET: &str = "GET / HTTP/1.1\r\nhost: fast\r\n\r\n";
const GET_SLOW: &str = "GET / HTTP/1.1\r\nhost: slow\r\n\r\n";

fn is_cut(ended: &Result<(), ConnectionError>, why: &str) -> bool {
    matches!(ended, Err(ConnectionError::Cut(said)) if said.contains(why))
}

#[tokio::test(start_paused = true)]
async fn requests_are_answered_in_order_however_they_come() {
    let (ended, ()) = serve(1 << 16, |mut caller, _| async move {
        caller.send(&format!("{GET_SLOW}{GET}\r\n{}", &GET[..9])).await;
        let begun = Instant::now();
        assert!(caller.answer().await.starts_with("HTTP/1.1 503 "));
        assert_eq!(begun.elapsed(), SLOW);
        assert!(caller.answer().await.starts_with("HTTP/1.1 503 "));
        for byte in GET[9..].chars() {
            caller.send(&byte.to_string()).await;
        }
        let answer = caller.answer().await;
        assert!(answer.contains("\r\ndate: ") && !answer.contains("connection:"), "{answer}");
        caller.send("GET / HTTP/1.1\r\nhost: fast\r\nconnection: close\r\n\r\n").await;
        assert!(caller.answer().await.contains("connection: close"));
        assert!(caller.is_closed().await);
    })
    .await;
    ended.unwrap();
}

/// Wherever what is sent is cut in two, it is the same to us.
#[tokio::test(start_paused = true)]
async fn what_comes_in_pieces_is_what_was_sent() {
    const STORY: &str = concat!(
        "\r\nGET / HTTP/1.1\r\nhost: slow\r\n\r\n",
        "POST / HTTP/1.1\r\nhost: slow\r\ncontent-length: 4\r\n\r\nbody",
        "POST / HTTP/1.1\r\nhost: slow\r\ntransfer-encoding: chunked\r\n\r\n",
        "3;x=y\r\nabc\r\n1\r\nd\r\n0\r\nx-sum: 1\r\n\r\n",
        "HEAD / HTTP/1.0\r\nhost: slow\r\nconnection: keep-alive\r\n\r\n",
    );
    let (ended, ()) = serve(1 << 16, |mut caller, _| async move {
        for at in 1..STORY.len() {
            caller.send(&STORY[..at]).await;
            tokio::time::sleep(Duration::from_millis(1)).await;
            caller.send(&STORY[at..]).await;
            for kept in ["HTTP/1.1 503 ", "HTTP/1.1 503 ", "HTTP/1.1 503 "] {
                let answer = caller.answer().await;
                assert!(answer.starts_with(kept) && !answer.contains("connection:"), "cut at {at}: {answer}");
            }
            let last = caller.head().await;
            assert!(last.starts_with("HTTP/1.0 503 ") && last.contains("connection: keep-alive"), "{last}");
        }
    })
    .await;
    ended.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_head_that_does_not_end_is_not_waited_for() {
    let begun = Instant::now();
    let (ended, ()) = serve(1 << 16, |mut caller, _| async move {
        caller.send(GET).await;
        caller.answer().await;
        caller.send("GET / HT").await;
        assert!(caller.is_closed().await);
    })
    .await;
    assert!(is_cut(&ended, "head took too long"), "{ended:?}");
    assert_eq!(begun.elapsed(), HEADER_TIMEOUT);
}

/// Some clients send an empty line behind a body, as RFC 9112 §2.2 has it.
#[tokio::test(start_paused = true)]
async fn an_empty_line_behind_a_body_begins_no_head() {
    for blank in ["\r\n", "\r", "\r\n\r\n"] {
        let (ended, ()) = serve(1 << 16, |mut caller, _| async move {
            caller
                .send(&format!("POST / HTTP/1.1\r\nhost: fast\r\ncontent-length: 4\r\n\r\nbody{blank}"))
                .await;
            caller.answer().await;
            tokio::time::sleep(2 * HEADER_TIMEOUT).await;
            caller.send(if blank == "\r" { "\n" } else { "" }).await;
            caller.send(GET).await;
            assert!(caller.answer().await.starts_with("HTTP/1.1 503 "), "{blank:?}");
        })
        .await;
        ended.unwrap();
    }
    // Nor does it hide that its client has left.
    let begun = Instant::now();
    let slow = format!("{GET_SLOW}\r\n");
    let (ended, ()) = serve(1 << 16, |mut caller, _| async move { caller.send(&slow).await }).await;
    assert!(ended.is_err());
    assert_eq!(begun.elapsed(), Duration::ZERO);
}

/// What follows a CONNECT is meant for its tunnel, whether or not there is one.
#[tokio::test(start_paused = true)]
async fn a_connection_ends_after_a_refused_connect() {
    for host in ["nobody", "nobody:80", "/path", "127.0.0.1:1"] {
        let (ended, ()) = serve(1 << 16, |mut caller, _| async move {
            caller.send(&format!("CONNECT {host} HTTP/1.1\r\nhost: fast\r\n\r\n{GET}")).await;
            let answer = caller.answer().await;
            assert!(answer.contains("connection: close"), "{host}: {answer}");
            caller.0.shutdown().await.unwrap();
            assert!(caller.is_closed().await, "{host}: {:?}", caller.1);
        })
        .await;
        ended.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_ends_after_an_hour() {
    let begun = Instant::now();
    let (ended, ()) = serve(1 << 16, |mut caller, _| async move {
        caller.send(GET).await;
        caller.answer().await;
        assert!(caller.is_closed().await);
    })
    .await;
    assert!(is_cut(&ended, "idle"), "{ended:?}");
    assert_eq!(begun.elapsed(), super::super::CALLER_IDLE);
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_leaves_is_not_worked_for() {
    for (asks, ends_well) in [(GET_SLOW, false), ("", true), ("GET / HT", true)] {
        let begun = Instant::now();
        let (ended, ()) = serve(1 << 16, |mut caller, _| async move { caller.send(asks).await }).await;
        assert_eq!(ended.is_ok(), ends_well, "{asks:?}: {ended:?}");
        assert_eq!(begun.elapsed(), Duration::ZERO, "{asks:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_body_that_nobody_wants_is_read_where_it_is_there_already() {
    let (ended, ()) = serve(1 << 16, |mut caller, _| async move {
        for framing in
            ["content-length: 4\r\n\r\nbody", "transfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"]
        {
            caller.send(&format!("POST / HTTP/1.1\r\nhost: fast\r\n{framing}")).await;
            assert!(!caller.answer().await.contains("connection:"), "{framing}");
        }
        caller.send(GET).await;
        caller.answer().await;
    })
    .await;
    ended.unwrap();
}

/// What else it sends is let go for a while, so that the answer is not lost with it.
#[tokio::test(start_paused = true)]
async fn a_body_that_nobody_waits_for_ends_the_connection_after_its_answer() {
    let begun = Instant::now();
    let (ended, _caller) = serve(4096, |mut caller, _| async move {
        caller.send("POST / HTTP/1.1\r\nhost: fast\r\ncontent-length: 1000000\r\n\r\n").await;
        for _ in 0..50 {
            caller.send(&"x".repeat(10_000)).await;
        }
        assert!(caller.answer().await.contains("connection: close"));
        assert!(caller.is_closed().await);
        caller
    })
    .await;
    assert!(is_cut(&ended, "does not hang up"), "{ended:?}");
    assert_eq!(begun.elapsed(), Duration::from_secs(2));
}

#[tokio::test(start_paused = true)]
async fn nobody_is_asked_for_a_body_that_is_not_wanted() {
    let (ended, ()) = serve(4096, |mut caller, _| async move {
        caller
            .send("POST / HTTP/1.1\r\nhost: fast\r\ncontent-length: 5\r\nexpect: 100-continue\r\n\r\n")
            .await;
        let answer = caller.answer().await;
        assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("connection: close"), "{answer}");
    })
    .await;
    ended.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_takes_nothing_is_cut() {
    let begun = Instant::now();
    let (ended, _caller) = serve(64, |mut caller, _| async move {
        caller.send(GET).await;
        caller
    })
    .await;
    assert!(is_cut(&ended, "takes nothing"), "{ended:?}");
    assert_eq!(begun.elapsed(), super::super::WRITE_STALL);
}

#[tokio::test(start_paused = true)]
async fn what_is_no_request_is_refused() {
    for (bytes, status) in [
        ("GET / HTTP/1.1\r\nhost: fast\r\na b: 1\r\n\r\n", 400),
        ("GET / HTTP/3.0\r\n\r\n", 400),
        ("GET /a#b HTTP/1.1\r\nhost: fast\r\n\r\n", 400),
        ("GET /a b HTTP/1.1\r\nhost: fast\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nhost: [::1%zone]\r\n\r\n", 400),
        ("GET http://[::1%25zone]/ HTTP/1.1\r\nhost: a\r\n\r\n", 400),
        ("POST / HTTP/1.1\r\nhost: fast\r\ncontent-length: 1x\r\n\r\n", 400),
        ("POST / HTTP/1.1\r\nhost: fast\r\ncontent-length: 1, 1\r\n\r\n", 400),
        ("POST / HTTP/1.1\r\nhost: fast\r\ntransfer-encoding: gzip\r\n\r\n", 400),
        (&format!("GET / HTTP/1.1\r\n{}\r\n", "a: 1\r\n".repeat(101)), 431),
        (&format!("GET / HTTP/1.1\r\na: {}", "x".repeat(70_000)), 431),
    ] {
        let (ended, answer) = serve(1 << 18, |mut caller, _| async move {
            caller.send(bytes).await;
            let answer = caller.answer().await;
            caller.0.shutdown().await.unwrap();
            assert!(caller.is_closed().await);
            answer
        })
        .await;
        ended.unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{bytes:.40?}: {answer}");
        assert!(answer.contains("connection: close"), "{answer}");
        assert!(answer.contains("application/problem+json") && answer.contains("malformed"), "{answer}");
    }
}

#[tokio::test(start_paused = true)]
async fn http_1_0_is_kept_where_it_asks_for_that() {
    let (ended, ()) = serve(1 << 16, |mut caller, _| async move {
        caller.send("GET / HTTP/1.0\r\nhost: fast\r\nconnection: keep-alive\r\n\r\n").await;
        let answer = caller.answer().await;
        assert!(answer.starts_with("HTTP/1.0 ") && answer.contains("connection: keep-alive"), "{answer}");
        caller.send("GET / HTTP/1.0\r\nhost: fast\r\n\r\n").await;
        assert!(!caller.answer().await.contains("keep-alive"));
        assert!(caller.is_closed().await);
    })
    .await;
    ended.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_is_asked_to_leave_hears_the_last_request() {
    let begun = Instant::now();
    let (ended, _stays) = serve(1 << 16, |mut caller, shared| async move {
        caller.send(GET).await;
        caller.answer().await;
        shared.phase.send_replace(Phase::DrainingAll);
        assert!(caller.is_closed().await, "idle");
        caller
    })
    .await;
    ended.unwrap();
    assert_eq!(begun.elapsed(), super::super::LAST_CALL);
    let (ended, ()) = serve(1 << 16, |mut caller, shared| async move {
        caller.send(GET_SLOW).await;
        tokio::time::sleep(SLOW / 2).await;
        shared.phase.send_replace(Phase::DrainingAll);
        assert!(caller.answer().await.contains("connection: close"));
        assert!(caller.is_closed().await, "after what was under way");
    })
    .await;
    ended.unwrap();
}

/// Who reads a body may be another task than the one that serves the connection.
#[tokio::test(start_paused = true)]
async fn a_body_breaks_off_when_its_connection_is_cut() {
    let (mut near, far) = duplex(1 << 16);
    let served = Served(Link::new(Box::new(far), Bytes::new()));
    let mut body = Link::begin(&served.0, Framing::Length(10), false);
    near.write_all(b"half").await.unwrap();
    let reads = async {
        let first = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await;
        assert_eq!(first.unwrap().unwrap().into_data().unwrap(), "half");
        poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await
    };
    let cut = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        drop(served);
    };
    let (second, ()) = tokio::join!(reads, cut);
    assert!(matches!(second, Some(Err(Error::CutOff))), "{second:?}");
    assert!(!body.is_end_stream(), "half a body is none that has ended");
    assert_eq!(near.read(&mut [0]).await.unwrap(), 0, "the stream is closed, whoever still holds the body");
}

/// TLS takes more than the system does: all is written when its last record is with the system.
#[tokio::test(start_paused = true)]
async fn an_answer_is_out_when_its_last_record_is() {
    let (mut near, far) = duplex(64);
    // As TLS does, it takes what it is given, and hands it on when it is flushed.
    let link = Link::new(Box::new(BufWriter::new(far)), Bytes::new());
    link.borrow_mut().outlet.head().extend_from_slice(&[b'x'; 1000]);
    let first = poll_fn(|cx| Poll::Ready(link.borrow_mut().poll_flush(cx))).await;
    assert!(first.is_pending() && link.borrow().outlet.is_empty());
    let is_blocked = || link.borrow().due(None).1.contains("takes nothing");
    assert!(is_blocked());
    let mut got = Vec::new();
    let reads = async {
        while got.len() < 1000 {
            assert_ne!(near.read_buf(&mut got).await.unwrap(), 0, "cut after {} bytes", got.len());
        }
    };
    let flushes = async {
        poll_fn(|cx| link.borrow_mut().poll_flush(cx)).await.unwrap();
        // What is not with the system by now is lost.
        link.borrow_mut().end();
    };
    tokio::join!(flushes, reads);
    assert!(!is_blocked());
}

fn asked(method: Method, version: Version, fields: HeaderMap) -> Asked {
    let present = Present::of(&fields);
    let (target, connection) = (Uri::from_static("/"), Wish::default());
    let (raw_target, spelling) = (None, None);
    Asked::of(&RequestHead { method, target, raw_target, version, fields, present, connection, spelling })
}

/// A head as it is written, and how the body goes out behind it.
fn written(status: u16, length: Option<&'static str>, body: ResponseBody, asked: &Asked) -> (String, Plan) {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    if let Some(length) = length {
        response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from_static(length));
    }
    let mut out = Vec::new();
    let plan = write_head(&mut out, &mut response, asked, true);
    (String::from_utf8(out).unwrap(), plan)
}

#[test]
fn a_length_is_said_where_it_is_known_and_means_something() {
    let (get, head) = (Method::GET, Method::HEAD);
    let body = || ResponseBody::whole("four");
    for (method, status, said, body, length, bodiless) in [
        (&get, 200, None, body(), Some("4"), false),
        (&get, 200, Some("4"), body(), Some("4"), false),
        (&get, 200, Some("7"), ResponseBody::Empty, Some("0"), false),
        (&get, 200, None, ResponseBody::Empty, Some("0"), false),
        (&get, 204, Some("0"), ResponseBody::Empty, None, true),
        (&get, 304, Some("9"), ResponseBody::Empty, Some("9"), true),
        (&head, 200, Some("9"), ResponseBody::Empty, Some("9"), true),
        (&head, 200, Some("5 GET /x"), ResponseBody::Empty, None, true),
        (&head, 200, Some("5, 5"), ResponseBody::Empty, None, true),
        (&get, 304, Some("+5"), ResponseBody::Empty, None, true),
        (&head, 200, None, body(), Some("4"), true),
        (&Method::CONNECT, 200, None, ResponseBody::Empty, None, true),
        (&get, 101, None, ResponseBody::Empty, None, true),
    ] {
        let asked = asked(method.clone(), Version::HTTP_11, HeaderMap::new());
        let (text, plan) = written(status, said, body, &asked);
        let found: Vec<_> = text.split("content-length: ").skip(1).map(|rest| &rest[..1]).collect();
        assert_eq!(
            (found, plan.bodiless),
            (length.into_iter().collect(), bodiless),
            "{method} {status}: {text}"
        );
        assert!(!text.contains("transfer-encoding"), "{text}");
    }
}
