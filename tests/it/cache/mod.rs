//! Routes with a cache, through the real binary.

mod basics;
mod coalescing;
mod http2;
mod memory;
mod safety;
mod stale;
mod suite;
mod unkeyed;

use std::{
    future::Future,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, StatusCode};
use hyper::{Request, body::Incoming};

use crate::support::{Proxy, RawClient, Upstream, UpstreamResponse, eventually, text};

/// A proxy with one upstream `up` and these keys of `cache`.
fn proxy(upstream: SocketAddr, cache: &str) -> Proxy {
    proxy_with(upstream, cache, "")
}

/// The same with more keys of the upstream.
fn proxy_with(upstream: SocketAddr, cache: &str, more: &str) -> Proxy {
    Proxy::start(format!(
        "[telemetry]\naccess_log = \"all\"\n[[upstream]]\nname = \"up\"\nendpoints = [\"{upstream}\"]\ncache = {{ {cache} }}\n{more}\n"
    ))
}

/// A request on a connection of its own: status, body, `Cache-Status`.
fn get(proxy: &Proxy, path: &str, fields: &str) -> (u16, String, String) {
    ask(proxy.outbound(), &format!("GET {path} HTTP/1.1\r\nHost: up\r\n{fields}\r\n"))
}

fn ask(address: SocketAddr, request: &str) -> (u16, String, String) {
    let response = RawClient::connect(address).ask(request);
    (response.status(), response.text(), response.field("cache-status").unwrap_or_default().to_owned())
}

/// Requests that wait for the fetch of another one.
fn waiting(proxy: &Proxy) -> u64 {
    let status = ask(proxy.admin(), "GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n").1;
    serde_json::from_str::<serde_json::Value>(&status).unwrap()["cache"]["waiting"].as_u64().unwrap_or(0)
}

/// A metric's value; -1 if it is absent.
fn metric(proxy: &Proxy, name: &str) -> f64 {
    let metrics = ask(proxy.admin(), "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").1;
    let line = metrics.lines().find(|line| line.starts_with(name)).unwrap_or_default();
    line.rsplit(' ').next().and_then(|number| number.parse().ok()).unwrap_or(-1.0)
}

/// Requests with this result.
fn count(proxy: &Proxy, result: &str) -> f64 {
    metric(proxy, &format!("outrigger_cache_requests_total{{upstream=\"up\",result=\"{result}\"}}"))
}

/// A service that counts its requests.
pub struct Service {
    upstream: Option<Upstream>,
    address: SocketAddr,
    requests: Arc<AtomicUsize>,
}

impl Service {
    /// `respond` gets the number of the request, from 1, and the request.
    fn start<F, R>(respond: F) -> Self
    where
        F: Fn(usize, Request<Incoming>) -> R + Send + 'static,
        R: Future<Output = UpstreamResponse> + 'static,
    {
        let requests = Arc::<AtomicUsize>::default();
        let counted = Arc::clone(&requests);
        let upstream =
            Upstream::http1(move |request| respond(counted.fetch_add(1, Ordering::SeqCst) + 1, request));
        Self { address: upstream.address(), upstream: Some(upstream), requests }
    }

    /// Each request gets its number as the body, with these fields.
    fn numbered(fields: &'static [(&'static str, &'static str)]) -> Self {
        Self::start(move |number, _| async move { response(200, fields, number.to_string()) })
    }

    fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }

    /// It refuses connections from now on.
    fn stop(&mut self) {
        self.upstream = None;
        let address = self.address;
        eventually("the service has stopped", || std::net::TcpStream::connect(address).is_err());
    }
}

fn response(status: u16, fields: &[(&str, &str)], body: impl Into<Bytes>) -> UpstreamResponse {
    let mut response = text(body);
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    for (name, value) in fields {
        response
            .headers_mut()
            .append(HeaderName::try_from(*name).unwrap(), HeaderValue::try_from(*value).unwrap());
    }
    response
}
