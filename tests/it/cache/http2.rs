//! HTTP/2 clients and upstreams: one store for both protocols.

use std::io::{Read as _, Write as _};

use bytes::BytesMut;
use h2::client::SendRequest;
use http::{HeaderMap, Request as HttpRequest};
use tokio::{sync::Semaphore, task::JoinSet};

use super::*;
use crate::support::{
    RawServer,
    h2_server::{H2Server, client, request},
};

type Answer = (u16, HeaderMap, Bytes);

async fn ask2(sender: &SendRequest<Bytes>, request: HttpRequest<()>) -> Answer {
    let mut ready = sender.clone().ready().await.unwrap();
    let (response, _) = ready.send_request(request, true).unwrap();
    let (head, mut body) = response.await.unwrap().into_parts();
    let mut whole = BytesMut::new();
    while let Some(part) = body.data().await {
        let part = part.unwrap();
        let _ = body.flow_control().release_capacity(part.len());
        whole.extend_from_slice(&part);
    }
    (head.status.as_u16(), head.headers, whole.freeze())
}

fn with(mut request: HttpRequest<()>, name: &'static str, value: &'static str) -> HttpRequest<()> {
    request.headers_mut().insert(name, HeaderValue::from_static(value));
    request
}

/// Counts requests; its responses are fresh for a minute, and have 200,000 bytes in many frames.
fn service(requests: &Arc<AtomicUsize>) -> Upstream {
    let requests = Arc::clone(requests);
    Upstream::h2c(move |request| {
        assert_eq!(request.version(), http::Version::HTTP_2);
        requests.fetch_add(1, Ordering::SeqCst);
        async { response(200, &[("cache-control", "max-age=60"), ("etag", "\"v1\"")], large()) }
    })
}

fn large() -> Vec<u8> {
    (0..200_000_u32).map(|number| (number % 251) as u8).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn responses_are_shared_by_clients_of_both_protocols() {
    let requests = Arc::<AtomicUsize>::default();
    let upstream = service(&requests);
    let proxy = proxy_with(upstream.address(), "", "protocol = \"h2\"\n");
    let sender = client(proxy.outbound(), ::h2::client::Builder::new()).await;
    for expected in ["; fwd=uri-miss; stored; ttl=", "; hit; ttl="] {
        let (status, headers, body) = ask2(&sender, request("GET", "up", "/a")).await;
        assert_eq!((status, &body[..]), (200, &large()[..]));
        let cache = headers["cache-status"].to_str().unwrap();
        assert!(cache.contains(expected), "{cache}");
    }
    let (status, headers, body) = ask2(&sender, request("HEAD", "up", "/a")).await;
    assert_eq!((status, headers["content-length"].to_str().unwrap(), body.len()), (200, "200000", 0));
    let condition = with(request("GET", "up", "/a"), "if-none-match", "\"v1\"");
    let (status, _, body) = ask2(&sender, condition).await;
    assert_eq!((status, body.len()), (304, 0));
    let (status, headers, body) = ask2(&sender, with(request("GET", "up", "/a"), "range", "bytes=5-9")).await;
    assert_eq!((status, &body[..]), (206, &large()[5..10]));
    assert_eq!(headers["content-range"], "bytes 5-9/200000");
    let old = RawClient::connect(proxy.outbound()).ask("GET /a HTTP/1.1\r\nHost: up\r\n\r\n");
    assert_eq!((old.status(), &old.body[..]), (200, &large()[..]));
    assert!(old.field("cache-status").unwrap().contains("; hit; ttl="));
    assert!(old.field("connection").is_none() && old.field("transfer-encoding").is_none());
    assert_eq!(requests.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_of_many_connections_wait_for_one_fetch() {
    let (requests, gate) = (Arc::<AtomicUsize>::default(), Arc::new(Semaphore::new(0)));
    let (counted, permits) = (Arc::clone(&requests), Arc::clone(&gate));
    let upstream = Upstream::h2c(move |_| {
        let (number, permits) = (counted.fetch_add(1, Ordering::SeqCst), Arc::clone(&permits));
        async move {
            match number {
                0 => response(200, &[("cache-control", "max-age=1")], "old"),
                _ => {
                    permits.acquire().await.unwrap().forget();
                    response(200, &[("cache-control", "max-age=600")], "new")
                }
            }
        }
    });
    let proxy =
        proxy_with(upstream.address(), "coalesce = \"60s\"", "protocol = \"h2\"\ntimeout = \"60s\"\n");
    get(&proxy, "/", "");
    eventually("it has expired", || get(&proxy, "/", "Cache-Control: only-if-cached\r\n").0 == 504);
    let mut clients = JoinSet::new();
    for _ in 0..CONNECTIONS {
        let sender = client(proxy.outbound(), ::h2::client::Builder::new()).await;
        for _ in 0..STREAMS {
            let sender = sender.clone();
            clients.spawn(async move { ask2(&sender, request("GET", "up", "/")).await });
        }
    }
    let all = (CONNECTIONS * STREAMS) as u64;
    let others = tokio::task::spawn_blocking(move || {
        eventually("all but one wait", || waiting(&proxy) == all - 1);
        proxy
    });
    let _proxy = others.await.unwrap();
    gate.add_permits(usize::try_from(all).unwrap());
    while let Some(answer) = clients.join_next().await {
        let (status, _, body) = answer.unwrap();
        assert_eq!((status, &body[..]), (200, &b"new"[..]));
    }
    assert_eq!(requests.load(Ordering::SeqCst), 2, "the first one, and one for all");
}

const CONNECTIONS: usize = 100;
const STREAMS: usize = 100;

/// The upstream resets the stream after its head: what has arrived is not stored.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_response_that_breaks_off_is_not_stored() {
    let server = H2Server::start(h2::server::Builder::new(), |_, mut respond| async move {
        let head =
            http::Response::builder().header("cache-control", "max-age=60").header("content-length", "10");
        let mut body = respond.send_response(head.body(()).unwrap(), false).unwrap();
        let _ = body.send_data(Bytes::from_static(b"part"), false);
        tokio::task::yield_now().await;
        body.send_reset(h2::Reason::INTERNAL_ERROR);
    });
    let proxy = proxy_with(
        server.address(),
        "",
        "protocol = \"h2\"\nretry = false\nbreaker = false\noutlier = false\n",
    );
    for number in 1..=3 {
        let sender = client(proxy.outbound(), ::h2::client::Builder::new()).await;
        let mut ready = sender.ready().await.unwrap();
        let (response, _) = ready.send_request(request("GET", "up", "/"), true).unwrap();
        // The reset may reach the client before the head, or after it.
        if let Ok(response) = response.await {
            let mut body = response.into_body();
            while let Some(Ok(part)) = body.data().await {
                assert!(part.len() <= 4);
            }
            assert!(!body.is_end_stream(), "a whole response");
        }
        assert_eq!(server.requests(), number, "not from the store");
    }
    assert_eq!(waiting(&proxy), 0);
}

/// Clients that open no window get bodies one after the other, each larger than what may be on its way beside another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_that_clients_do_not_read_take_no_more_than_the_store() {
    const SIZE: usize = 4 << 20;
    const STREAMS: u32 = 16;
    for framing in ["Content-Length: 4194304\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n400000\r\n"] {
        let service = RawServer::start(move |mut stream| {
            let _ = stream.read(&mut [0; 4096]);
            let head = format!("HTTP/1.1 200 OK\r\nCache-Control: max-age=60\r\n{framing}");
            let _ = stream.write_all(&[head.as_bytes(), &vec![b'x'; SIZE], b"\r\n0\r\n\r\n"].concat());
            // Until the proxy closes.
            let _ = stream.read(&mut [0; 1]);
        });
        let proxy = proxy(service.address(), "max_bytes = \"8MiB\", object_limit = \"5MiB\"");
        let mut builder = ::h2::client::Builder::new();
        builder.initial_window_size(0);
        let sender = client(proxy.outbound(), builder).await;
        let before = proxy.resident_kib();
        let mut unread = Vec::new();
        for number in 0..STREAMS {
            let mut ready = sender.clone().ready().await.unwrap();
            let (response, _) =
                ready.send_request(request("GET", "up", &format!("/{number}")), true).unwrap();
            unread.push(response.await.unwrap());
            tokio::task::block_in_place(|| until_settled(&proxy));
        }
        let more = proxy.resident_kib().saturating_sub(before);
        assert!(more < 36 << 10, "{more} KiB more for {STREAMS} bodies of 4 MiB");
    }
}

/// Waits until the proxy's memory has not changed for a while.
fn until_settled(proxy: &Proxy) {
    let (mut last, mut same) = (0, 0);
    eventually("its memory is settled", || {
        let now = proxy.resident_kib();
        same = if now == last { same + 1 } else { 0 };
        last = now;
        same >= 20
    });
}
