//! Traces as collectors receive them.

mod alone;
mod collector;
mod envoy;
mod grpc;
mod interop;
mod jaeger;
mod load;
mod otlp;
mod tls;
mod traces;

use std::{
    net::SocketAddr,
    sync::{Arc, OnceLock},
};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::{Request, body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;

use crate::support::{Launch, Proxy, RawClient, Upstream, UpstreamResponse, text};

/// Two services with a sidecar each: a client sends to the first, which responds with the response of the second.
pub struct Pair {
    pub first: Proxy,
    pub second: Proxy,
    _services: [Upstream; 2],
}

/// The fields by which a service propagates its trace context.
pub const W3C: &[&str] = &["traceparent", "tracestate"];
pub const B3: &[&str] =
    &["b3", "x-b3-traceid", "x-b3-spanid", "x-b3-parentspanid", "x-b3-sampled", "x-b3-flags"];
/// A service that does not know of traces.
pub const NONE: &[&str] = &[];

impl Pair {
    /// `telemetry`: that table of both configurations. `forwards`: the fields that the first service forwards.
    /// `serve`: the second service.
    pub fn start<F, R>(telemetry: &str, forwards: &'static [&'static str], serve: F) -> Self
    where
        F: Fn(Request<Incoming>) -> R + Send + 'static,
        R: Future<Output = UpstreamResponse> + 'static,
    {
        Self::start_around(telemetry, forwards, serve, |second| second)
    }

    /// The same with a proxy `between` the two: it gets the address of the second and returns the address to send to.
    pub fn start_around<F, R>(
        telemetry: &str,
        forwards: &'static [&'static str],
        serve: F,
        between: impl FnOnce(SocketAddr) -> SocketAddr,
    ) -> Self
    where
        F: Fn(Request<Incoming>) -> R + Send + 'static,
        R: Future<Output = UpstreamResponse> + 'static,
    {
        let back = Upstream::http1(serve);
        let second = Proxy::start(format!(
            "[service]\nname = \"second\"\n[inbound]\nforward_to = \"{}\"\n[telemetry]\n{telemetry}",
            back.address()
        ));
        let outbound = Arc::<OnceLock<SocketAddr>>::default();
        let out = Arc::clone(&outbound);
        let front = Upstream::http1(move |request| {
            let to = *out.get().expect("the sidecar is up");
            async move {
                let mut call = Request::get(request.uri().path()).header("host", "second");
                for name in forwards {
                    if let Some(value) = request.headers().get(*name) {
                        call = call.header(*name, value);
                    }
                }
                call_out(to, call.body(Empty::new()).expect("a request")).await
            }
        });
        let first = Proxy::start(format!(
            "[service]\nname = \"first\"\n[inbound]\nforward_to = \"{}\"\n[telemetry]\n{telemetry}\n\
             [[upstream]]\nname = \"second\"\nendpoints = [\"{}\"]\n",
            front.address(),
            between(second.inbound())
        ));
        outbound.set(first.outbound()).expect("set once");
        Self { first, second, _services: [back, front] }
    }

    /// Sends a request with these fields to the first service; returns the status.
    pub fn call(&self, path: &str, fields: &[(&str, &str)]) -> u16 {
        get(self.first.inbound(), path, fields)
    }
}

async fn call_out(to: SocketAddr, request: Request<Empty<Bytes>>) -> UpstreamResponse {
    let stream = tokio::net::TcpStream::connect(to).await.expect("the sidecar accepts");
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.expect("a connection");
    tokio::task::spawn_local(async move { drop(connection.await) });
    let response = sender.send_request(request).await.expect("a response");
    let status = response.status();
    let body = response.into_body().collect().await.expect("a body").to_bytes();
    let mut response = text(body);
    *response.status_mut() = status;
    response
}

/// GET; the status of the response.
pub fn get(to: SocketAddr, path: &str, fields: &[(&str, &str)]) -> u16 {
    let fields: String = fields.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let mut client = RawClient::connect(to);
    client.ask(format!("GET {path} HTTP/1.1\r\nHost: second\r\nConnection: close\r\n{fields}\r\n")).status()
}

/// A sidecar of `service`, with an upstream `up` at the same address.
pub fn sidecar(service: SocketAddr, telemetry: &str) -> Launch {
    Launch::new(format!(
        "[service]\nname = \"lone\"\n[inbound]\nforward_to = \"{service}\"\n[telemetry]\n{telemetry}\n\
         [[upstream]]\nname = \"up\"\nhosts = [\"up\", \"second\"]\nendpoints = [\"{service}\"]\n"
    ))
}
