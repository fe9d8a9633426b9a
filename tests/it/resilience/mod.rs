//! What each policy does, end to end: the real binary between real clients and real services.

mod advice;
mod around;
mod deadlines;
mod exhaustion;
mod http2;
mod limits;
mod outages;
mod policy_state;
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

use crate::support::{
    Proxy, RawClient, RawServer, Upstream, UpstreamResponse, refusing_address, strict::Message, text,
};

/// A request as a service received it.
#[derive(Clone, Debug)]
struct ReceivedRequest {
    path: String,
    headers: HeaderMap,
    body: Bytes,
}

impl ReceivedRequest {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    fn number(&self, name: &str) -> Option<u64> {
        self.header(name).and_then(|value| value.parse().ok())
    }
}

/// The response of a service to a request.
enum Reply {
    Now(UpstreamResponse),
    /// Never responds; the request ends when the client disconnects.
    Never,
}

impl From<u16> for Reply {
    fn from(status: u16) -> Self {
        let mut response = text(status.to_string());
        *response.status_mut() = status.try_into().expect("a status");
        Self::Now(response)
    }
}

impl From<(u16, &'static str, &'static str)> for Reply {
    /// With a header field.
    fn from((status, name, value): (u16, &'static str, &'static str)) -> Self {
        let Self::Now(mut response) = Self::from(status) else { return Self::Never };
        response.headers_mut().insert(name, value.parse().expect("a value"));
        Self::Now(response)
    }
}

/// A service that responds by a rule and records what it received.
struct Service {
    upstream: Upstream,
    seen: Arc<Mutex<Vec<ReceivedRequest>>>,
    /// Requests whose client disconnected before the response.
    left: Arc<AtomicUsize>,
}

struct CountOnDrop(Arc<AtomicUsize>);

impl Drop for CountOnDrop {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl Service {
    /// The rule gets the request and its number, from 1.
    fn new<R: Into<Reply>>(rule: impl Fn(&ReceivedRequest, usize) -> R + Send + Sync + 'static) -> Self {
        Self::start(rule, false)
    }

    /// HTTP/2 with prior knowledge.
    fn h2<R: Into<Reply>>(rule: impl Fn(&ReceivedRequest, usize) -> R + Send + Sync + 'static) -> Self {
        Self::start(rule, true)
    }

    fn start<R: Into<Reply>>(
        rule: impl Fn(&ReceivedRequest, usize) -> R + Send + Sync + 'static,
        h2: bool,
    ) -> Self {
        let (seen, left) = (Arc::<Mutex<Vec<ReceivedRequest>>>::default(), Arc::<AtomicUsize>::default());
        let (log, cancelled, rule) = (seen.clone(), left.clone(), Arc::new(rule));
        let handle = move |request: Request<Incoming>| {
            let (log, cancelled, rule) = (log.clone(), cancelled.clone(), rule.clone());
            async move {
                let (head, body) = request.into_parts();
                let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
                let path = head.uri.path().to_owned();
                let seen = ReceivedRequest { path, headers: head.headers, body };
                let number = {
                    let mut log = log.lock().expect("no panic");
                    log.push(seen.clone());
                    log.len()
                };
                match rule(&seen, number).into() {
                    Reply::Now(response) => response,
                    Reply::Never => {
                        let _count_on_drop = CountOnDrop(cancelled);
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

    fn seen(&self) -> Vec<ReceivedRequest> {
        self.seen.lock().expect("no panic").clone()
    }

    fn request_count(&self) -> usize {
        self.seen.lock().expect("no panic").len()
    }

    fn cancelled_count(&self) -> usize {
        self.left.load(Ordering::Relaxed)
    }
}

/// `[[upstream]]` with this name, these endpoints, and more keys.
fn upstream(name: &str, endpoints: &[SocketAddr], more: &str) -> String {
    let endpoints: Vec<String> = endpoints.iter().map(|address| format!("\"{address}\"")).collect();
    format!("[[upstream]]\nname = \"{name}\"\nendpoints = [{}]\n{more}\n", endpoints.join(", "))
}

/// A proxy with one upstream, `up`, and round robin, so that a test knows which endpoint gets a request.
fn proxy(endpoints: &[SocketAddr], more: &str) -> Proxy {
    Proxy::start(upstream("up", endpoints, &format!("balance = \"round-robin\"\n{more}")))
}

/// A request without a body; `more`: header lines, each with its line end.
fn request(method: &str, more: &str) -> String {
    format!("{method} / HTTP/1.1\r\nHost: up\r\n{more}\r\n")
}

fn post(more: &str, body: &str) -> String {
    format!("POST / HTTP/1.1\r\nHost: up\r\n{more}Content-Length: {}\r\n\r\n{body}", body.len())
}

/// Sends one request through the outbound port.
#[track_caller]
fn ask(proxy: &Proxy, request: impl AsRef<[u8]>) -> Message {
    RawClient::connect(proxy.outbound()).ask(request)
}

#[track_caller]
fn get(proxy: &Proxy) -> Message {
    ask(proxy, request("GET", ""))
}

/// The cause in `Proxy-Status`.
#[track_caller]
fn assert_cause(response: &Message, status: u16, word: &str) {
    let said = response.field("proxy-status").unwrap_or_default();
    assert!(
        response.status() == status && said.contains(&format!("details=\"{word}")),
        "{status} {word}: {response:?}"
    );
}

/// A server at this address that gives every connection this one response.
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

/// The value of a series in `/metrics`; 0 if it does not exist.
#[track_caller]
fn metric(proxy: &Proxy, series: &str) -> u64 {
    let page = page(proxy, "/metrics");
    let value = page.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    value.map_or(0, |value| value.parse().expect("a whole number"))
}

/// How often `outcome` followed a failed attempt.
#[track_caller]
fn retries(proxy: &Proxy, outcome: &str) -> u64 {
    metric(proxy, &format!("outrigger_retries_total{{upstream=\"up\",outcome=\"{outcome}\"}}"))
}

/// How many requests were, or with observe would have been, rejected for `reason`.
#[track_caller]
fn refused(proxy: &Proxy, reason: &str) -> u64 {
    metric(proxy, &format!("outrigger_rejected_total{{upstream=\"up\",reason=\"{reason}\"}}"))
}
