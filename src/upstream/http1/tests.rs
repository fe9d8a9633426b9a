use std::{future::Future, pin::pin};

use http::{
    HeaderValue,
    header::{CONTENT_LENGTH, COOKIE},
};
use rustls::{ClientConfig, RootCertStore, ServerConfig, crypto::aws_lc_rs};
use rustls_pki_types::{PrivateKeyDer, ServerName};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, duplex},
    net::{TcpSocket, TcpStream},
    task::LocalSet,
};
use tokio_rustls::{TlsAcceptor, TlsConnector, server::TlsStream};

use super::*;
use crate::{
    http1::framing::Framing,
    proxy::{
        body::{CallerBody, Replay},
        connection::Link,
        progress::Progress,
    },
    upstream::guards::Guards,
};

/// More than the system takes of a narrow connection, and less than TLS keeps for it.
const LONG: usize = 40_000;

/// A connection, and its other end.
async fn connection() -> (Http1, TcpStream) {
    let (ours, theirs) = streams(None).await;
    (opened(UpstreamIo::Plain(ours.clone()), ours).await, theirs)
}

/// One of which the system takes little before it is read.
async fn narrow_connection() -> (Http1, TcpStream) {
    let (ours, theirs) = streams(Some(4096)).await;
    (opened(UpstreamIo::Plain(ours.clone()), ours).await, theirs)
}

/// The same with TLS.
async fn narrow_tls() -> (Http1, TlsStream<TcpStream>) {
    let (ours, theirs) = streams(Some(4096)).await;
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let (certificate, key) = (made.cert.der().clone(), made.signing_key.serialize_der());
    let key = PrivateKeyDer::try_from(key).unwrap();
    let provider = Arc::new(aws_lc_rs::default_provider());
    let server = ServerConfig::builder_with_provider(Arc::clone(&provider));
    let server = server.with_safe_default_protocol_versions().unwrap().with_no_client_auth();
    let server = server.with_single_cert(vec![certificate.clone()], key).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(certificate).unwrap();
    let client = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let client = client.unwrap().with_root_certificates(roots).with_no_client_auth();
    let (connector, acceptor) = (TlsConnector::from(Arc::new(client)), TlsAcceptor::from(Arc::new(server)));
    let name = ServerName::try_from("localhost").unwrap();
    let handshakes = tokio::join!(connector.connect(name, ours.clone()), acceptor.accept(theirs));
    (opened(UpstreamIo::Tls(Box::new(handshakes.0.unwrap())), ours).await, handshakes.1.unwrap())
}

/// Both ends. `room`: how much the system takes from the one before the other reads, roughly.
async fn streams(room: Option<u32>) -> (SharedTcp, TcpStream) {
    let (near, far) = (TcpSocket::new_v4().unwrap(), TcpSocket::new_v4().unwrap());
    if let Some(room) = room {
        near.set_send_buffer_size(room).unwrap();
        far.set_recv_buffer_size(room).unwrap();
    }
    far.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = far.listen(1).unwrap();
    let ours = near.connect(listener.local_addr().unwrap()).await.unwrap();
    (SharedTcp::new(ours), listener.accept().await.unwrap().0)
}

async fn opened(io: UpstreamIo, tcp: SharedTcp) -> Http1 {
    let slot = ConnectionSlot::take(&Guards::new(std::time::Instant::now())).await.unwrap();
    let opened = Opened {
        line: RefCell::new(Line::new(io)),
        tcp,
        keep_spelling: false,
        retire_at: None,
        proof: None,
        slot: slot.opened(crate::telemetry::metrics::Tls::None),
    };
    Http1 { opened: Rc::new(opened), idle_since: Instant::now(), told: None }
}

/// Sends `GET /`; returns the answer's head, and which interim ones came before it.
async fn get(connection: &mut Http1) -> (Result<ResponseHead, Error>, Vec<u16>) {
    let mut interim = Vec::new();
    let (target, fields) = (Uri::from_static("/"), HeaderMap::new());
    let told = |status: StatusCode, _| interim.push(status.as_u16());
    let answered = connection.send(head(&target, &fields), RequestBody::empty(), told).await;
    (answered, interim)
}

fn head<'a>(target: &'a Uri, fields: &'a HeaderMap) -> Head<'a> {
    Head { method: &Method::GET, target, raw_target: None, fields, spelling: None, told: Told::default() }
}

/// Fields that make a head as long as is said there.
fn long() -> HeaderMap {
    HeaderMap::from_iter([(COOKIE, HeaderValue::from_str(&"x".repeat(LONG)).unwrap())])
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

/// TLS takes more than the system does. Until its last record is with the system, nothing counts as sent.
#[tokio::test]
async fn a_request_is_sent_when_its_last_record_is() {
    let (connection, mut peer) = narrow_tls().await;
    let (target, fields, mut got) = (Uri::from_static("/"), long(), Vec::new());
    let line = || connection.opened.line.borrow_mut();
    line().begin(head(&target, &fields), RequestBody::empty()).unwrap();
    let first = poll_fn(|cx| Poll::Ready(line().poll_request(cx))).await;
    assert!(line().outlet.is_empty(), "TLS has taken all of it");
    assert!(first.is_pending() && !line().is_sent() && line().sent, "the system has not");
    let reads = async {
        while !got.ends_with(b"\r\n\r\n") {
            assert_ne!(peer.read_buf(&mut got).await.unwrap(), 0, "cut after {} bytes", got.len());
        }
    };
    let (sent, ()) = tokio::join!(poll_fn(|cx| line().poll_request(cx)), reads);
    sent.unwrap();
    assert!(line().is_sent() && got.len() > LONG);
}

/// An answer that came meanwhile does not end it: the rest goes out behind it, whoever reads what.
#[tokio::test]
async fn records_go_out_behind_an_early_answer() {
    let exchange = async {
        let (mut connection, mut peer) = narrow_tls().await;
        peer.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await.unwrap();
        let (target, fields, mut got) = (Uri::from_static("/"), long(), Vec::new());
        let answered = connection.send(head(&target, &fields), RequestBody::empty(), |_, _| ()).await;
        assert_eq!(answered.unwrap().status, StatusCode::OK);
        assert!(!connection.rest(Instant::now()), "it is not clean");
        drop(connection);
        while !got.ends_with(b"\r\n\r\n") {
            assert_ne!(peer.read_buf(&mut got).await.unwrap_or(0), 0, "cut after {} bytes", got.len());
        }
    };
    LocalSet::new().run_until(exchange).await;
}

/// Who got a part of a request may act on it: it was sent, though not to its end.
#[tokio::test]
async fn a_head_that_breaks_off_counts_as_sent() {
    for begun in [true, false] {
        let (mut connection, peer) = narrow_connection().await;
        let (target, fields) = (Uri::from_static("/"), long());
        let mut peer = Some(peer);
        if !begun {
            // With a reset: otherwise the system takes what goes nowhere.
            peer.take().unwrap().set_zero_linger().unwrap();
            until(|| !connection.is_quiet()).await;
        }
        let failed = {
            let mut sending = pin!(connection.send(head(&target, &fields), RequestBody::empty(), |_, _| ()));
            let first = poll_fn(|cx| Poll::Ready(sending.as_mut().poll(cx))).await;
            assert_eq!(first.is_pending(), begun, "the system takes a part of it");
            drop(peer);
            match first {
                Poll::Ready(answered) => answered,
                Poll::Pending => sending.await,
            }
        };
        assert!(failed.is_err() && !connection.heard_anything(), "{failed:?}");
        assert_eq!(connection.sent_anything(), begun);
    }
}

/// What is left of the request would be taken for the new protocol.
#[tokio::test]
async fn there_is_no_upgrade_before_its_request_is_sent() {
    let exchange = async {
        let (mut connection, mut peer) = connection().await;
        peer.write_all(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n").await.unwrap();
        let (mut caller, end) = duplex(100);
        let comes = Link::begin(&Link::new(Box::new(end), Bytes::new()), Framing::Length(4), false);
        let progress = Rc::new(Progress::new(Instant::now()));
        let replay = Replay::new(CallerBody::Http1(comes), 0, None, &progress);
        let (target, fields) = (Uri::from_static("/"), HeaderMap::from_iter([(CONTENT_LENGTH, 4.into())]));
        caller.write_all(b"bo").await.unwrap();
        let answered = connection.send(head(&target, &fields), replay.next_try(None), |_, _| ()).await;
        assert_eq!(answered.unwrap().status, StatusCode::SWITCHING_PROTOCOLS);
        assert!(connection.take_stream().is_none() && connection.is_closed());
        // Nor does the rest of it go where another protocol is spoken now.
        drop(connection);
        caller.write_all(b"dy").await.unwrap();
        let mut seen = Vec::new();
        peer.read_to_end(&mut seen).await.unwrap();
        assert!(seen.ends_with(b"\r\n\r\nbo"), "{:?}", seen.escape_ascii().to_string());
    };
    LocalSet::new().run_until(exchange).await;
}
