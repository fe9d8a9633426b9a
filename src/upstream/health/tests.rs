use std::{
    convert::Infallible,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, server::conn, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use proptest::prelude::*;
use tokio::net::TcpListener;

use super::*;
use crate::{units::HumanDuration, upstream::DiscoveredEndpoint};

fn settings() -> HealthCheck {
    HealthCheck {
        interval: HumanDuration::from_millis(20),
        timeout: HumanDuration::from_millis(500),
        unhealthy_after: 2,
        healthy_after: 2,
        ..HealthCheck::default()
    }
}

/// A server with configurable responses that records its requests.
struct Server {
    address: SocketAddr,
    behavior: Arc<Mutex<ServerBehavior>>,
    task: JoinHandle<()>,
}

struct ServerBehavior {
    status: u16,
    grpc: Option<(u8, &'static str)>,
    silent: bool,
    requests: Vec<(String, HeaderMap, Bytes)>,
}

impl Server {
    async fn start(h2: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let behavior = Arc::new(Mutex::new(ServerBehavior {
            status: 200,
            grpc: None,
            silent: false,
            requests: Vec::new(),
        }));
        let shared = behavior.clone();
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let behavior = shared.clone();
                let service = service_fn(move |request| respond(behavior.clone(), request));
                let io = TokioIo::new(stream);
                connections.spawn(async move {
                    if h2 {
                        let _ = conn::http2::Builder::new(TokioExecutor::new())
                            .serve_connection(io, service)
                            .await;
                    } else {
                        let _ = conn::http1::Builder::new().serve_connection(io, service).await;
                    }
                });
            }
        });
        Self { address, behavior, task }
    }

    fn configure(&self, change: impl FnOnce(&mut ServerBehavior)) {
        change(&mut self.behavior.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn requests(&self) -> Vec<(String, HeaderMap, Bytes)> {
        self.behavior.lock().unwrap_or_else(PoisonError::into_inner).requests.clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

type Body = http_body_util::combinators::BoxBody<Bytes, Infallible>;

async fn respond(
    behavior: Arc<Mutex<ServerBehavior>>,
    request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    let (status, grpc, silent) = {
        let mut behavior = behavior.lock().unwrap_or_else(PoisonError::into_inner);
        behavior.requests.push((head.uri.to_string(), head.headers, body));
        (behavior.status, behavior.grpc, behavior.silent)
    };
    if silent {
        std::future::pending::<()>().await;
    }
    let response = Response::builder().status(status);
    Ok(match grpc {
        None => response.body(Full::default().boxed()).unwrap(),
        Some((serving, code)) => {
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", HeaderValue::from_static(code));
            let frame = Full::from(vec![0, 0, 0, 0, 2, 8, serving]);
            response.body(frame.with_trailers(async { Some(Ok(trailers)) }).boxed()).unwrap()
        }
    })
}

fn publish(upstream: &Upstream, addresses: &[SocketAddr]) {
    let discovered = |address: &SocketAddr| DiscoveredEndpoint {
        address: *address,
        host: Some("svc.test".into()),
        weight: 1,
    };
    upstream.publish(addresses.iter().map(discovered).collect());
}

fn healthy(upstream: &Upstream) -> Vec<bool> {
    upstream.endpoints().endpoints.iter().map(|endpoint| endpoint.is_healthy()).collect()
}

async fn until(condition: impl Fn() -> bool) {
    let reached = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), reached).await.unwrap();
}

fn start(
    settings: HealthCheck,
    protocol: Protocol,
    addresses: &[SocketAddr],
) -> (Arc<Upstream>, HealthChecks) {
    let upstream = Upstream::new("svc");
    publish(&upstream, addresses);
    let checks = spawn(plain(settings, protocol), upstream.clone(), &Handle::current());
    (upstream, checks)
}

#[tokio::test]
async fn http_checks_ask_for_the_path_and_follow_the_status() {
    for (protocol, h2) in [(Protocol::Auto, false), (Protocol::H2, true)] {
        let server = Server::start(h2).await;
        let settings = HealthCheck { path: Some("/healthz?full=1".to_owned()), ..settings() };
        let (upstream, _checks) = start(settings, protocol, &[server.address]);
        until(|| !server.requests().is_empty()).await;
        let (uri, headers, _) = server.requests().remove(0);
        let authority = format!("svc.test:{}", server.address.port());
        if h2 {
            assert_eq!(uri, format!("http://{authority}/healthz?full=1"));
        } else {
            assert_eq!((&*uri, headers["host"].as_bytes()), ("/healthz?full=1", authority.as_bytes()));
        }

        for (status, expected) in [(503, false), (204, true), (302, false), (299, true)] {
            server.configure(|behavior| behavior.status = status);
            until(|| healthy(&upstream) == [expected]).await;
        }
        server.configure(|behavior| behavior.silent = true);
        until(|| healthy(&upstream) == [false]).await;
    }
}

#[tokio::test]
async fn grpc_checks_speak_the_health_protocol() {
    let server = Server::start(true).await;
    server.configure(|behavior| behavior.grpc = Some((1, "0")));
    let settings = HealthCheck { grpc: Some("shop.Orders".to_owned()), ..settings() };
    let (upstream, _checks) = start(settings, Protocol::Auto, &[server.address]);
    until(|| server.requests().len() > 2).await;
    assert_eq!(healthy(&upstream), [true]);
    let (uri, headers, body) = server.requests().remove(0);
    assert!(uri.ends_with("/grpc.health.v1.Health/Check"), "{uri}");
    assert_eq!(
        (&headers["content-type"], &headers["te"]),
        (&HeaderValue::from_static("application/grpc"), &HeaderValue::from_static("trailers"))
    );
    assert_eq!(&body[..], b"\0\0\0\0\x0d\x0a\x0bshop.Orders");

    for (reply, status, expected) in [
        (Some((2, "0")), 200, false),
        (Some((1, "0")), 200, true),
        (Some((1, "14")), 200, false),
        (Some((1, "0")), 200, true),
        (Some((1, "0")), 503, false),
        (Some((1, "0")), 200, true),
        (None, 200, false),
    ] {
        server.configure(|behavior| (behavior.grpc, behavior.status) = (reply, status));
        until(|| healthy(&upstream) == [expected]).await;
    }
}

#[tokio::test]
async fn tcp_checks_follow_the_listener_and_the_set() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let settings = HealthCheck { tcp: Some(true), ..settings() };
    let (upstream, checks) = start(settings, Protocol::Tcp, &[address]);
    tokio::time::timeout(Duration::from_secs(10), listener.accept()).await.unwrap().unwrap();
    drop(listener);
    until(|| healthy(&upstream) == [false]).await;

    // A new endpoint is checked without waiting for anything, the old one stays as it is.
    let other = TcpListener::bind("127.0.0.1:0").await.unwrap();
    publish(&upstream, &[address, other.local_addr().unwrap()]);
    tokio::time::timeout(Duration::from_secs(10), other.accept()).await.unwrap().unwrap();
    assert_eq!(healthy(&upstream), [false, true]);

    drop(checks);
    assert_eq!(healthy(&upstream), [true, true], "nothing would detect its recovery");
}

#[tokio::test]
async fn new_settings_take_effect_at_once_and_keep_the_state() {
    let server = Server::start(false).await;
    server.configure(|behavior| behavior.status = 500);
    let first = HealthCheck { path: Some("/old".to_owned()), ..settings() };
    let (upstream, checks) = start(first, Protocol::Auto, &[server.address]);
    until(|| healthy(&upstream) == [false]).await;
    let hour = HumanDuration::from_secs(3600);
    checks.reconfigure(plain(
        HealthCheck { path: Some("/new".to_owned()), interval: hour, ..settings() },
        Protocol::Auto,
    ));
    until(|| server.requests().iter().any(|(uri, ..)| uri == "/new")).await;
    assert_eq!(healthy(&upstream), [false]);
}

#[tokio::test]
async fn replacing_checks_determine_the_final_state() {
    let server = Server::start(false).await;
    server.configure(|behavior| behavior.status = 500);
    let settings = HealthCheck { path: Some("/".to_owned()), ..settings() };
    let (upstream, first) = start(settings.clone(), Protocol::Auto, &[server.address]);
    until(|| healthy(&upstream) == [false]).await;
    let requests = server.requests().len();
    let _second = spawn(plain(settings, Protocol::Auto), upstream.clone(), &Handle::current());
    // The second has started, and set the endpoint unhealthy, before the first ends.
    until(|| server.requests().len() > requests + 4).await;
    drop(first);
    until(|| healthy(&upstream) == [false]).await;
}

fn plain(health: HealthCheck, protocol: Protocol) -> CheckSettings {
    CheckSettings { health, protocol, tls: None }
}

#[test]
fn results_in_a_row_change_the_state() {
    let settings = HealthCheck { unhealthy_after: 3, healthy_after: 2, ..HealthCheck::default() };
    let mut threshold = Threshold::new(true);
    let results = [false, false, true, false, false, false, false, true, false, true, true, true];
    let states: Vec<_> = results
        .iter()
        .map(|passed| {
            threshold.record(*passed, &settings);
            threshold.is_healthy()
        })
        .collect();
    let (t, f) = (true, false);
    assert_eq!(states, [t, t, t, t, t, f, f, f, f, f, t, t]);
}

proptest! {
    #[test]
    fn the_state_is_that_of_the_last_long_enough_run(
        results in prop::collection::vec(any::<bool>(), 0..200),
        unhealthy_after in 1u32..5,
        healthy_after in 1u32..5,
    ) {
        let settings = HealthCheck { unhealthy_after, healthy_after, ..HealthCheck::default() };
        let mut threshold = Threshold::new(true);
        let (mut run, mut last, mut expected) = (0, None, true);
        for passed in results {
            run = if last == Some(passed) { run + 1 } else { 1 };
            last = Some(passed);
            if run >= if passed { healthy_after } else { unhealthy_after } {
                expected = passed;
            }
            let before = threshold.is_healthy();
            let changed = threshold.record(passed, &settings);
            prop_assert_eq!(changed, before != threshold.is_healthy());
            prop_assert_eq!(threshold.is_healthy(), expected);
        }
    }
}
