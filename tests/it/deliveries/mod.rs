//! Queues as their clients see them: a request is accepted with 202, kept, and delivered when the service is there.

mod accepting;
mod delivering;
mod drain;
mod failing_store;
mod inbound;
mod kill;
mod operating;
mod reload;
mod resources;

use std::{
    net::SocketAddr,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use serde_json::Value;

use crate::support::{Proxy, RawClient, Upstream, UpstreamResponse, free_port, strict::Message};

/// Short, so that tests are.
const QUEUE: &str = "[[queue]]\nname = \"orders\"\nbackoff = { base = \"20ms\", max = \"100ms\" }\n";

/// What a service received.
#[derive(Clone)]
struct Received {
    method: String,
    path: String,
    headers: HeaderMap,
    body: Vec<u8>,
}

impl Received {
    fn field(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }
}

/// A service that records what it receives. It responds 200, 422 to a body that begins with `poison`, 503 to one that begins
/// with `busy` and is new to it.
struct Service {
    server: Upstream,
    received: Arc<Mutex<Vec<Received>>>,
    most_at_once: Arc<AtomicUsize>,
}

impl Service {
    fn start() -> Self {
        Self::start_at(([127, 0, 0, 1], 0).into(), Duration::ZERO)
    }

    /// `work`: how long it takes for each request.
    fn start_at(address: SocketAddr, work: Duration) -> Self {
        let received: Arc<Mutex<Vec<Received>>> = Arc::default();
        let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (list, most_at_once) = (Arc::clone(&received), Arc::clone(&most));
        let server = Upstream::at(address, false, move |_, request| {
            let (list, now, most) = (Arc::clone(&list), Arc::clone(&now), Arc::clone(&most));
            async move {
                most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                let response = respond(request, &list, work).await;
                now.fetch_sub(1, Ordering::SeqCst);
                response
            }
        });
        Self { server, received, most_at_once }
    }

    fn address(&self) -> SocketAddr {
        self.server.address()
    }

    fn received(&self) -> Vec<Received> {
        self.received.lock().unwrap().clone()
    }

    fn bodies(&self) -> Vec<String> {
        let mut bodies: Vec<String> =
            self.received().iter().map(|one| String::from_utf8_lossy(&one.body).into_owned()).collect();
        bodies.sort();
        bodies
    }
}

async fn respond(
    request: Request<Incoming>,
    list: &Mutex<Vec<Received>>,
    work: Duration,
) -> UpstreamResponse {
    let (head, body) = request.into_parts();
    let body = body.collect().await.map(|body| body.to_bytes().to_vec()).unwrap_or_default();
    if !work.is_zero() {
        tokio::time::sleep(work).await;
    }
    let is_new = !list.lock().unwrap().iter().any(|earlier| earlier.body == body);
    let status = match body.as_slice() {
        [b'p', b'o', b'i', b's', b'o', b'n', ..] => StatusCode::UNPROCESSABLE_ENTITY,
        [b'b', b'u', b's', b'y', ..] if is_new => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::OK,
    };
    let text = format!("seen {}", String::from_utf8_lossy(&body));
    list.lock().unwrap().push(Received {
        method: head.method.to_string(),
        path: head.uri.to_string(),
        headers: head.headers,
        body,
    });
    let mut response = Response::new(Full::new(text.into()).boxed_unsync());
    *response.status_mut() = status;
    response.headers_mut().insert("x-service", "1".parse().unwrap());
    response
}

/// An address at which a service will be.
fn later_address() -> SocketAddr {
    ([127, 0, 0, 1], free_port()).into()
}

/// `queue`: lines of `[[queue]]`; `route`: keys of the route's `queue`.
fn config(store: &Path, upstream: SocketAddr, queue: &str, route: &str) -> String {
    format!(
        "[store]\npath = \"{}\"\nreserve = \"64KiB\"\n{queue}\n[[upstream]]\nname = \"payments\"\nendpoints = [\"{upstream}\"]\n\
         [[upstream.route]]\nmatch = {{ path = \"/orders*\" }}\nqueue = {{ name = \"orders\"{route} }}\n",
        store.display()
    )
}

/// A request to `payments` through the outbound port.
fn ask(proxy: &Proxy, line: &str, fields: &str, body: &str) -> Message {
    ask_at(proxy.outbound(), line, fields, body)
}

fn ask_at(address: SocketAddr, line: &str, fields: &str, body: &str) -> Message {
    let length = body.len();
    RawClient::connect(address)
        .ask(format!("{line} HTTP/1.1\r\nHost: payments\r\n{fields}content-length: {length}\r\n\r\n{body}"))
}

const ASYNC: &str = "Prefer: respond-async\r\n";

/// Queues an order; returns where its state is.
fn order(proxy: &Proxy, body: &str) -> String {
    let response = ask(proxy, "POST /orders", ASYNC, body);
    assert_eq!(response.status(), 202, "{}", response.text());
    response.field("location").expect("a location").to_owned()
}

fn json(response: &Message) -> Value {
    serde_json::from_str(&response.text()).unwrap_or_else(|_| panic!("no JSON: {}", response.text()))
}

fn state(proxy: &Proxy, location: &str) -> Value {
    let response = ask(proxy, &format!("GET {location}"), "", "");
    assert_eq!(response.status(), 200, "{}", response.text());
    json(&response)
}

fn is_in_state(proxy: &Proxy, location: &str, expected: &str) -> bool {
    state(proxy, location)["state"] == expected
}
