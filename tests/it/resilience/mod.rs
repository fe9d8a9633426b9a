//! What each policy does, seen from outside: the real binary between real callers and real services.

mod advice;
mod around;
mod deadlines;
mod exhaustion;
mod guards;
mod http2;
mod limits;
mod outages;
mod replay;
mod retries;
mod scaling;
mod slow;
mod storm;
mod twice;

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::{HeaderMap, Request, body::Incoming};

use crate::support::{Answer, Proxy, RawClient, RawServer, Upstream, nobody, strict::Message, text};

/// A request as a service got it.
#[derive(Clone, Debug)]
struct Seen {
    path: String,
    headers: HeaderMap,
    body: Bytes,
}

impl Seen {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    fn number(&self, name: &str) -> Option<u64> {
        self.header(name).and_then(|value| value.parse().ok())
    }
}

/// What a service does with a request.
enum Reply {
    Now(Answer),
    /// Never answers; the call ends when the caller leaves.
    Never,
}

impl From<u16> for Reply {
    fn from(status: u16) -> Self {
        let mut answer = text(status.to_string());
        *answer.status_mut() = status.try_into().expect("a status");
        Self::Now(answer)
    }
}

impl From<(u16, &'static str, &'static str)> for Reply {
    /// With a header field.
    fn from((status, name, value): (u16, &'static str, &'static str)) -> Self {
        let Self::Now(mut answer) = Self::from(status) else { return Self::Never };
        answer.headers_mut().insert(name, value.parse().expect("a value"));
        Self::Now(answer)
    }
}

/// A service that answers by a rule, and remembers what it got.
struct Service {
    upstream: Upstream,
    seen: Arc<Mutex<Vec<Seen>>>,
    /// Calls whose caller left before the answer.
    left: Arc<AtomicUsize>,
}

struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl Service {
    /// The rule gets the request and its number, from 1.
    fn new<R: Into<Reply>>(rule: impl Fn(&Seen, usize) -> R + Send + Sync + 'static) -> Self {
        Self::start(rule, false)
    }

    /// HTTP/2 with prior knowledge.
    fn h2<R: Into<Reply>>(rule: impl Fn(&Seen, usize) -> R + Send + Sync + 'static) -> Self {
        Self::start(rule, true)
    }

    fn start<R: Into<Reply>>(rule: impl Fn(&Seen, usize) -> R + Send + Sync + 'static, h2: bool) -> Self {
        let (seen, left) = (Arc::<Mutex<Vec<Seen>>>::default(), Arc::<AtomicUsize>::default());
        let (log, leavers, rule) = (seen.clone(), left.clone(), Arc::new(rule));
        let handle = move |request: Request<Incoming>| {
            let (log, leavers, rule) = (log.clone(), leavers.clone(), rule.clone());
            async move {
                let (head, body) = request.into_parts();
                let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
                let path = head.uri.path().to_owned();
                let seen = Seen { path, headers: head.headers, body };
                let number = {
                    let mut log = log.lock().expect("no panic");
                    log.push(seen.clone());
                    log.len()
                };
                match rule(&seen, number).into() {
                    Reply::Now(answer) => answer,
                    Reply::Never => {
                        let _counts_the_end = Counted(leavers);
                        std::future::pending().await
                    }
                }
            }
        };
        let upstream = if h2 { Upstream::h2c(handle) } else { Upstream::http1(handle) };
        Self { upstream, seen, left }
    }

    fn address(&self) -> SocketAddr {
        self.upstream.address()
    }

    fn seen(&self) -> Vec<Seen> {
        self.seen.lock().expect("no panic").clone()
    }

    fn calls(&self) -> usize {
        self.seen.lock().expect("no panic").len()
    }

    fn left(&self) -> usize {
        self.left.load(Ordering::Relaxed)
    }
}

/// `[[upstream]]` with this name, these endpoints, and more keys.
fn upstream(name: &str, endpoints: &[SocketAddr], more: &str) -> String {
    let endpoints: Vec<String> = endpoints.iter().map(|address| format!("\"{address}\"")).collect();
    format!("[[upstream]]\nname = \"{name}\"\nendpoints = [{}]\n{more}\n", endpoints.join(", "))
}

/// A proxy with one upstream, `up`. Round robin, so that a test knows who is asked.
fn proxy(endpoints: &[SocketAddr], more: &str) -> Proxy {
    Proxy::start(upstream("up", endpoints, &format!("balance = \"round-robin\"\n{more}")))
}

/// A request without a body; `more`: header lines, each with its end.
fn request(method: &str, more: &str) -> String {
    format!("{method} / HTTP/1.1\r\nHost: up\r\n{more}\r\n")
}

fn post(more: &str, body: &str) -> String {
    format!("POST / HTTP/1.1\r\nHost: up\r\n{more}Content-Length: {}\r\n\r\n{body}", body.len())
}

/// One call over the outbound port.
#[track_caller]
fn ask(proxy: &Proxy, request: impl AsRef<[u8]>) -> Message {
    RawClient::connect(proxy.outbound()).ask(request)
}

#[track_caller]
fn get(proxy: &Proxy) -> Message {
    ask(proxy, request("GET", ""))
}

/// The word for the cause, in `Proxy-Status`.
#[track_caller]
fn assert_cause(answer: &Message, status: u16, word: &str) {
    let said = answer.field("proxy-status").unwrap_or_default();
    assert!(
        answer.status() == status && said.contains(&format!("details=\"{word}")),
        "{status} {word}: {answer:?}"
    );
}

/// A server at this address that answers every connection once, and so.
fn serve_at(address: SocketAddr, status: &'static str, body: &'static str) -> RawServer {
    RawServer::start_at(address, move |mut stream| {
        use std::io::{Read, Write};
        let mut seen = [0; 4096];
        if stream.read(&mut seen).is_ok_and(|count| count > 0) {
            let length = body.len();
            let _ = write!(
                stream,
                "HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
            );
        }
    })
}

/// A page of the admin server.
#[track_caller]
fn page(proxy: &Proxy, path: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    RawClient::connect(proxy.admin()).ask(request).text()
}

#[track_caller]
fn status(proxy: &Proxy) -> serde_json::Value {
    serde_json::from_str(&page(proxy, "/status")).expect("JSON")
}

/// The value of a series in `/metrics`; 0 where it is not there.
#[track_caller]
fn metric(proxy: &Proxy, series: &str) -> u64 {
    let page = page(proxy, "/metrics");
    let value = page.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    value.map_or(0, |value| value.parse().expect("a whole number"))
}

/// How often `outcome` followed a failed try.
#[track_caller]
fn retries(proxy: &Proxy, outcome: &str) -> u64 {
    metric(proxy, &format!("outrigger_retries_total{{upstream=\"up\",outcome=\"{outcome}\"}}"))
}

/// How often a call was, or would have been, refused for `reason`.
#[track_caller]
fn refused(proxy: &Proxy, reason: &str) -> u64 {
    metric(proxy, &format!("outrigger_rejected_total{{upstream=\"up\",reason=\"{reason}\"}}"))
}
