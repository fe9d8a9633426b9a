//! Exchanges that no client's connection has started, against a real server on loopback.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Method, StatusCode};
use http_body_util::BodyExt;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    task::LocalSet,
    time::Instant,
};

use super::*;
use crate::{
    config::{Source, Sources, load_sources},
    proxy::target,
    rng::Rng,
    runtime,
    telemetry::{
        metrics::EntryPoint,
        record::{RequestRecord, RequestStart},
    },
    trace_context::{IncomingContext, TraceContext},
    upstream::{BodyError, DiscoveredEndpoint},
};

/// Answers each request on any connection with the next of these, and then none.
async fn server(responses: &'static [&'static str]) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::task::spawn_local(async move {
        let mut responses = responses.iter();
        let mut open = Vec::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                assert_ne!(stream.read_buf(&mut request).await.unwrap(), 0);
            }
            if let Some(response) = responses.next() {
                stream.write_all(response.as_bytes()).await.unwrap();
            } else {
                open.push(stream);
            }
        }
    });
    address
}

/// What an exchange without a client gives: the status and the body.
async fn exchange(
    address: SocketAddr,
    deadline: Option<Duration>,
) -> Result<(StatusCode, Bytes), ProxyError> {
    let text = format!("[[upstream]]\nname = \"up\"\nendpoints = [\"{address}\"]\n");
    let text = format!("inbound.listen = \"127.0.0.1:0\"\noutbound.listen = \"127.0.0.1:0\"\n{text}");
    let source = Source { path: PathBuf::from("test.toml"), text };
    let loaded = load_sources(Sources(vec![source]), &|_| None).unwrap();
    let proxy = runtime::start(loaded.config, Arc::default(), 1).unwrap();
    let worker = Worker::new(Arc::clone(&proxy.shared), 0);
    let view = worker.view();
    let target = target::by_name(&view, "up").unwrap();
    target.serving.upstream.shared.publish(vec![DiscoveredEndpoint { address, host: None, weight: 1 }]);

    let now = Instant::now();
    let progress = Rc::new(Progress::new(now));
    let trace = TraceContext::new(&IncomingContext::default(), &mut Rng::from_seed(1), |_| false);
    progress.open_record(
        &worker,
        RequestRecord::new(RequestStart {
            entry_point: EntryPoint::Host,
            peer: address,
            method: Method::GET,
            version: Version::HTTP_11,
            context: trace,
            started_at: now,
        }),
    );
    let peer = HeaderValue::from_static("queue");
    let origin = Origin {
        worker: &worker,
        view: &view,
        progress: &progress,
        side: &Side::Outbound,
        peer: &peer,
        identity: None,
        is_tls: false,
        deadline: deadline.map(|deadline| now + deadline),
        client: None,
        stale: None,
        earlier_attempts: 0,
    };
    let mut request = Request::new(ClientBody::default());
    request.headers_mut().insert("x-order", HeaderValue::from_static("7"));
    let present = FieldSet::of(request.headers());
    let response = origin.watch(run(&origin, &target, &mut request, present)).await.expect("not cut")?;
    let (head, body) = response.into_parts();
    let body = origin.watch(body.collect()).await.expect("not cut");
    Ok((head.status, body.map_err(|error: BodyError| error.to_string()).unwrap().to_bytes()))
}

#[tokio::test]
async fn an_exchange_starts_from_an_origin_and_a_worker_alone() {
    let responses = &[
        "HTTP/1.1 503 Busy\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ndone",
    ];
    let tasks = LocalSet::new();
    let served = tasks.run_until(async { exchange(server(responses).await, None).await });
    assert_eq!(served.await.unwrap(), (StatusCode::OK, Bytes::from_static(b"done")), "with a retry");
}

/// The deadline of an origin ends its exchange without a connection's timer.
#[tokio::test]
async fn the_deadline_of_an_origin_holds() {
    let deadline = Some(Duration::from_millis(100));
    let tasks = LocalSet::new();
    let served = tasks.run_until(async { exchange(server(&[]).await, deadline).await });
    assert_eq!(served.await.unwrap_err().cause, Cause::Deadline);
}
