use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use super::*;
use crate::upstream::guards::Guards;

/// A connection, and its other end.
async fn connection() -> (Http1, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let ours = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (theirs, _) = listener.accept().await.unwrap();
    let tcp = SharedTcp::new(ours);
    let slot = ConnectionSlot::take(&Guards::new(std::time::Instant::now())).await.unwrap();
    let opened = Opened {
        line: RefCell::new(Line::new(UpstreamIo::Plain(tcp.clone()))),
        tcp,
        keep_spelling: false,
        retire_at: None,
        proof: None,
        slot: slot.opened(crate::telemetry::metrics::Tls::None),
    };
    (Http1 { opened: Rc::new(opened), idle_since: Instant::now(), told: None }, theirs)
}

/// Sends `GET /`; returns the answer's head, and which interim ones came before it.
async fn get(connection: &mut Http1) -> (Result<ResponseHead, Error>, Vec<u16>) {
    let (target, fields) = (Uri::from_static("/"), HeaderMap::new());
    let head = Head { method: &Method::GET, target: &target, fields: &fields, spelling: None };
    let mut interim = Vec::new();
    let answered =
        connection.send(head, RequestBody::empty(), |status, _| interim.push(status.as_u16())).await;
    (answered, interim)
}

async fn body(connection: &mut Http1) -> Result<Vec<u8>, Error> {
    let mut body = Vec::new();
    while let Some(frame) = poll_fn(|cx| connection.poll_frame(cx)).await {
        body.extend_from_slice(&frame?.into_data().unwrap_or_default());
    }
    Ok(body)
}

async fn until(mut condition: impl FnMut() -> bool) {
    while !condition() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_connection_carries_one_exchange_after_the_other() {
    let (mut connection, mut peer) = connection().await;
    for _ in 0..3 {
        let answers = async {
            let mut request = [0; 18];
            peer.read_exact(&mut request).await.unwrap();
            assert_eq!(&request, b"GET / HTTP/1.1\r\n\r\n");
            peer.write_all(b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\nHTTP/1.1 200 OK\r\n").await.unwrap();
            peer.write_all(b"Content-Length: 5\r\n\r\nhello").await.unwrap();
        };
        let ((answered, interim), ()) = tokio::join!(get(&mut connection), answers);
        assert_eq!((answered.unwrap().status, interim), (StatusCode::OK, vec![103]));
        assert_eq!(body(&mut connection).await.unwrap(), b"hello");
        assert!(connection.rest(Instant::now()) && !connection.is_closed());
    }
}

#[tokio::test]
async fn a_connection_that_is_not_clean_is_not_used_again() {
    for (answer, why) in [
        ("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\n\r\n", "more than was asked for"),
        ("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", "it says so"),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
            "its end is told twice",
        ),
        ("HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", "its version says so"),
    ] {
        let (mut connection, mut peer) = connection().await;
        peer.write_all(answer.as_bytes()).await.unwrap();
        get(&mut connection).await.0.unwrap();
        assert_eq!(body(&mut connection).await.unwrap(), b"ok");
        assert!(!connection.rest(Instant::now()), "{why}");
    }
}

#[tokio::test]
async fn an_end_without_an_answer_is_told_from_one_in_its_middle() {
    let (mut connection, peer) = connection().await;
    drop(peer);
    let (answered, _) = get(&mut connection).await;
    assert!(answered.is_err() && !connection.heard_anything());

    for begun in ["H", "HTTP/1.1 103 Early Hints\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n"] {
        let (mut connection, mut peer) = self::connection().await;
        peer.write_all(begun.as_bytes()).await.unwrap();
        peer.shutdown().await.unwrap();
        let (answered, _) = get(&mut connection).await;
        assert!(answered.is_err() && connection.heard_anything(), "{begun}");
    }

    let (mut connection, mut peer) = self::connection().await;
    peer.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel").await.unwrap();
    peer.shutdown().await.unwrap();
    get(&mut connection).await.0.unwrap();
    assert!(matches!(body(&mut connection).await, Err(Error::CutOff)));
    assert!(connection.is_closed());
}

#[tokio::test]
async fn what_comes_unasked_closes_an_idle_connection() {
    for unasked in [&b"HTTP/1.1 408 Request Timeout\r\n\r\n"[..], b""] {
        let (mut connection, mut peer) = connection().await;
        assert!(connection.is_quiet());
        connection.listen();
        assert!(!connection.is_closed());
        peer.write_all(unasked).await.unwrap();
        peer.shutdown().await.unwrap();
        until(|| !connection.is_quiet()).await;
        until(|| {
            connection.listen();
            connection.is_closed()
        })
        .await;
    }
}

#[tokio::test]
async fn a_body_that_ends_with_its_connection_is_whole() {
    let (mut connection, mut peer) = connection().await;
    peer.write_all(b"HTTP/1.1 200 OK\r\n\r\nall of it").await.unwrap();
    peer.shutdown().await.unwrap();
    get(&mut connection).await.0.unwrap();
    assert_eq!(connection.length(), None);
    assert_eq!(body(&mut connection).await.unwrap(), b"all of it");
    assert!(!connection.rest(Instant::now()));
}

#[tokio::test]
async fn what_comes_behind_an_upgrade_is_handed_over() {
    let (mut connection, mut peer) = connection().await;
    peer.write_all(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\nfirst bytes").await.unwrap();
    let (answered, _) = get(&mut connection).await;
    assert_eq!(answered.unwrap().status, StatusCode::SWITCHING_PROTOCOLS);
    let (_, unread) = connection.take_stream().unwrap();
    assert_eq!(&unread[..], b"first bytes");
    assert!(connection.take_stream().is_none() && connection.is_closed());
}
