//! Data that a peer does not read blocks no other stream.

use std::time::Duration;

use bytes::Bytes;
use h2::{RecvStream, client::SendRequest};
use tokio::time::timeout;

use super::proxy;
use crate::support::{
    Proxy, RawClient, Upstream, WAIT_LIMIT,
    h2_server::{H2Server, client, request, send_status},
    text,
};

const MEGABYTE: usize = 1_000_000;

/// Reads an upload to its end.
async fn read(body: &mut RecvStream) -> usize {
    let mut total = 0;
    while let Some(Ok(data)) = body.data().await {
        total += data.len();
        let _ = body.flow_control().release_capacity(data.len());
    }
    total
}

/// `/large` has 50 MB, `/small` one; `/stuck` reads nothing and never responds; every other path reads the body and
/// responds.
fn server() -> H2Server {
    let builder = h2::server::Builder::new();
    H2Server::start(builder, |mut request, mut respond| async move {
        let megabytes = match request.uri().path() {
            "/stuck" => {
                let _unread = request;
                return std::future::pending().await;
            }
            "/large" => 50,
            "/small" => 1,
            _ => {
                read(request.body_mut()).await;
                return send_status(&mut respond, 200);
            }
        };
        let Ok(mut body) = respond.send_response(http::Response::new(()), false) else { return };
        for _ in 0..megabytes * 100 {
            body.reserve_capacity(MEGABYTE / 100);
            while body.capacity() < MEGABYTE / 100 {
                if std::future::poll_fn(|cx| body.poll_capacity(cx)).await.is_none_or(|grown| grown.is_err())
                {
                    return;
                }
            }
            let _ = body.send_data(Bytes::from(vec![b'x'; MEGABYTE / 100]), false);
        }
        let _ = body.send_data(Bytes::new(), true);
    })
}

fn begin(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: up\r\nConnection: close\r\n\r\n")
}

#[track_caller]
fn assert_download(proxy: &Proxy) {
    let mut third = RawClient::connect(proxy.outbound());
    third.send(begin("/small"));
    let (bytes, closed) = third.read_to_close();
    assert!(closed && bytes.len() > MEGABYTE, "{} bytes came", bytes.len());
}

/// Two stuck readers once stopped all others: they held the window of the shared connection.
#[test]
fn slow_downloads_do_not_block_other_streams() {
    let server = server();
    let proxy = proxy(server.address(), "");
    let before = proxy.resident_kib();
    let mut slow = Vec::new();
    for _ in 0..60 {
        let mut client = RawClient::connect(proxy.outbound());
        client.send(begin("/large"));
        client.peek(1).expect("it has begun");
        slow.push(client);
    }
    for _ in 0..3 {
        assert_download(&proxy);
    }
    let grown = proxy.resident_kib().saturating_sub(before);
    assert!(grown < 60 * 1024, "resident memory has grown by {grown} KiB with 60 slow readers");
}

/// The same with HTTP/2 clients, each on its own connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_http2_clients_do_not_block_other_streams() {
    let server = server();
    let proxy = proxy(server.address(), "");
    let mut slow = Vec::new();
    for _ in 0..10 {
        let mut sender = client(proxy.outbound(), h2::client::Builder::new()).await;
        let (response, _) = sender.send_request(request("GET", "up", "/large"), true).expect("sent");
        slow.push((sender, response.await.expect("a response")));
    }
    tokio::task::spawn_blocking(move || assert_download(&proxy)).await.expect("downloaded");
}

/// An upload on a connection, and whether it got its response in time.
async fn upload(sender: &SendRequest<Bytes>, host: &str, path: &str, limit: Duration) -> Option<u16> {
    let mut sender = sender.clone().ready().await.expect("the connection lives");
    let (response, mut body) = sender.send_request(request("POST", host, path), false).expect("sent");
    let sending = tokio::spawn(async move {
        for _ in 0..100 {
            body.reserve_capacity(10_000);
            while body.capacity() < 10_000 {
                if std::future::poll_fn(|cx| body.poll_capacity(cx)).await.is_none_or(|grown| grown.is_err())
                {
                    return;
                }
            }
            let _ = body.send_data(Bytes::from(vec![b'x'; 10_000]), false);
        }
        let _ = body.send_data(Bytes::new(), true);
    });
    let status = timeout(limit, response).await.ok()?.ok().map(|response| response.status().as_u16());
    sending.abort();
    status
}

/// Unread uploads on one connection of one client, to upstreams of both kinds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stuck_uploads_do_not_block_other_streams() {
    let h2 = server();
    let h1 = Upstream::http1(|request| async move {
        if request.uri().path() == "/stuck" {
            return std::future::pending().await;
        }
        let _ = http_body_util::BodyExt::collect(request.into_body()).await;
        text("ok")
    });
    let proxy = Proxy::start(format!(
        "[[upstream]]\nname = \"up\"\nprotocol = \"h2\"\nendpoints = [\"{}\"]\n\
         [[upstream]]\nname = \"other\"\nprotocol = \"http1\"\nendpoints = [\"{}\"]\n",
        h2.address(),
        h1.address()
    ));
    let before = proxy.resident_kib();
    let sender = client(proxy.outbound(), h2::client::Builder::new()).await;
    let mut stuck = Vec::new();
    for number in 0..60 {
        let (sender, host) = (sender.clone(), if number % 2 == 0 { "up" } else { "other" });
        stuck.push(tokio::spawn(
            async move { upload(&sender, host, "/stuck", Duration::from_secs(60)).await },
        ));
    }
    let arrived = timeout(WAIT_LIMIT, async {
        while h2.requests() < 30 {
            tokio::task::yield_now().await;
        }
    });
    arrived.await.expect("the stuck ones are there");
    for host in ["other", "up"] {
        let mut answered = None;
        for _ in 0..10 {
            answered = upload(&sender, host, "/read", Duration::from_secs(2)).await;
            if answered.is_some() {
                break;
            }
        }
        assert_eq!(answered, Some(200), "an upload to {host}");
    }
    let grown = proxy.resident_kib().saturating_sub(before);
    assert!(grown < 60 * 1024, "resident memory has grown by {grown} KiB with 60 stuck uploads");
    for task in stuck {
        task.abort();
    }
}
