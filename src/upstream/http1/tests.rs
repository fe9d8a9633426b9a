use std::{cell::Cell, future::Future, pin::pin};

use http::{
    HeaderValue,
    header::{CONTENT_LENGTH, COOKIE},
};
use rustls::{ClientConfig, RootCertStore, ServerConfig, crypto::aws_lc_rs};
use rustls_pki_types::{PrivateKeyDer, ServerName};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    task::coop::{consume_budget, has_budget_remaining},
};
use tokio_rustls::{TlsAcceptor, TlsConnector, server::TlsStream};

use super::*;
use crate::{
    config::PoolIdleTimeout,
    upstream::{
        connect::TcpTimeouts, http2::PingSettings, idle_connections::IdleConnections,
        policy_state::PolicyState,
    },
};

/// More than the kernel buffers on a narrow connection, and less than the TLS session buffers.
pub(super) const LONG: usize = 40_000;

/// A connection and its peer.
pub(super) async fn connection() -> (Http1Connection, TcpStream) {
    let (socket, peer) = streams(None).await;
    (opened(UpstreamIo::Plain(socket.clone()), socket).await, peer)
}

/// A connection of which the kernel buffers little before the peer reads.
pub(super) async fn narrow_connection() -> (Http1Connection, TcpStream) {
    let (socket, peer) = streams(Some(4096)).await;
    (opened(UpstreamIo::Plain(socket.clone()), socket).await, peer)
}

/// The same with TLS.
pub(super) async fn narrow_tls() -> (Http1Connection, TlsStream<TcpStream>) {
    let (socket, peer) = streams(Some(4096)).await;
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
    let handshakes = tokio::join!(connector.connect(name, socket.clone()), acceptor.accept(peer));
    (opened(UpstreamIo::Tls(Box::new(handshakes.0.unwrap())), socket).await, handshakes.1.unwrap())
}

/// Both ends. `buffer_size`: roughly how much the kernel buffers from the first end before the second reads.
async fn streams(buffer_size: Option<u32>) -> (SharedTcp, TcpStream) {
    let (near, far) = (TcpSocket::new_v4().unwrap(), TcpSocket::new_v4().unwrap());
    if let Some(buffer_size) = buffer_size {
        near.set_send_buffer_size(buffer_size).unwrap();
        far.set_recv_buffer_size(buffer_size).unwrap();
    }
    far.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = far.listen(1).unwrap();
    let socket = near.connect(listener.local_addr().unwrap()).await.unwrap();
    (SharedTcp::new(socket), listener.accept().await.unwrap().0)
}

async fn opened(io: UpstreamIo, tcp: SharedTcp) -> Http1Connection {
    let slot = ConnectionSlot::acquire(&PolicyState::new(std::time::Instant::now())).await.unwrap();
    let opened = ConnectionInner {
        connection: RefCell::new(ClientConnection::new(io)),
        tcp,
        keep_spelling: false,
        retire_at: None,
        clear_user_timeout_on_upgrade: true,
        verification: None,
        slot: slot.mark_open(crate::net::alpn::ConnectionTls::None),
    };
    let now = Instant::now();
    Http1Connection {
        inner: Rc::new(opened),
        idle_since: now,
        reusable_from: now,
        announced_idle_timeout: None,
    }
}

/// Sends `GET /`; returns the response head, and the interim responses before it.
pub(super) async fn get(connection: &mut Http1Connection) -> (Result<ResponseHead, Error>, Vec<u16>) {
    let mut interim = Vec::new();
    let (target, fields) = (Uri::from_static("/"), HeaderMap::new());
    let on_interim = |status: StatusCode, _| interim.push(status.as_u16());
    let response = connection.send(head(&target, &fields), RequestBody::empty(), on_interim).await;
    (response, interim)
}

pub(super) fn head<'a>(target: &'a Uri, fields: &'a HeaderMap) -> OutgoingHead<'a> {
    OutgoingHead {
        method: &Method::GET,
        target,
        raw_target: None,
        fields,
        spelling: None,
        attempt_fields: AttemptFields::default(),
    }
}

/// Fields that make a head of about [`LONG`] bytes.
pub(super) fn long() -> HeaderMap {
    HeaderMap::from_iter([(COOKIE, HeaderValue::from_str(&"x".repeat(LONG)).unwrap())])
}

pub(super) async fn body(connection: &mut Http1Connection) -> Result<Vec<u8>, Error> {
    let mut body = Vec::new();
    while let Some(frame) = poll_fn(|cx| connection.poll_frame(cx)).await {
        body.extend_from_slice(&frame?.into_data().unwrap_or_default());
    }
    Ok(body)
}

pub(super) async fn until(mut condition: impl FnMut() -> bool) {
    while !condition() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_connection_carries_one_request_after_the_other() {
    let (mut connection, mut peer) = connection().await;
    for _ in 0..3 {
        let responses = async {
            let mut request = [0; 18];
            peer.read_exact(&mut request).await.unwrap();
            assert_eq!(&request, b"GET / HTTP/1.1\r\n\r\n");
            peer.write_all(b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\nHTTP/1.1 200 OK\r\n").await.unwrap();
            peer.write_all(b"Content-Length: 5\r\n\r\nhello").await.unwrap();
        };
        let ((response, interim), ()) = tokio::join!(get(&mut connection), responses);
        assert_eq!((response.unwrap().status, interim), (StatusCode::OK, vec![103]));
        assert_eq!(body(&mut connection).await.unwrap(), b"hello");
        assert_eq!(connection.finish_exchange(false, Instant::now()), ReuseVerdict::Reusable);
    }
}

#[tokio::test]
async fn a_connection_that_is_not_clean_is_not_used_again() {
    for (answer, why) in [
        ("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\n\r\n", "unsolicited bytes"),
        ("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", "Connection: close"),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
            "two framing fields",
        ),
        ("HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", "HTTP/1.0"),
    ] {
        let (mut connection, mut peer) = connection().await;
        peer.write_all(answer.as_bytes()).await.unwrap();
        get(&mut connection).await.0.unwrap();
        assert_eq!(body(&mut connection).await.unwrap(), b"ok");
        assert_ne!(connection.finish_exchange(false, Instant::now()), ReuseVerdict::Reusable, "{why}");
    }
}

#[tokio::test]
async fn a_close_before_the_response_differs_from_one_in_its_middle() {
    let (mut connection, peer) = connection().await;
    drop(peer);
    let (response, _) = get(&mut connection).await;
    assert!(response.is_err() && !connection.has_received_bytes());

    for partial in ["H", "HTTP/1.1 103 Early Hints\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n"] {
        let (mut connection, mut peer) = self::connection().await;
        peer.write_all(partial.as_bytes()).await.unwrap();
        peer.shutdown().await.unwrap();
        let (response, _) = get(&mut connection).await;
        assert!(response.is_err() && connection.has_received_bytes(), "{partial}");
    }

    let (mut connection, mut peer) = self::connection().await;
    peer.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel").await.unwrap();
    peer.shutdown().await.unwrap();
    get(&mut connection).await.0.unwrap();
    assert!(matches!(body(&mut connection).await, Err(Error::UnexpectedEnd)));
    assert!(connection.is_closed());
}

/// The endpoint is not to blame, and receives nothing of it.
#[tokio::test]
async fn a_request_without_valid_framing_is_not_sent() {
    for (values, expected) in [
        (&[""][..], "no valid framing"),
        (&["1", "2"], "no valid framing"),
        (&["x"], "no valid framing"),
        (&["5"], "does not match"),
    ] {
        let (mut connection, _peer) = connection().await;
        let (target, mut fields) = (Uri::from_static("/"), HeaderMap::new());
        for value in values {
            fields.append(CONTENT_LENGTH, HeaderValue::from_static(value));
        }
        let sent = connection.send(head(&target, &fields), RequestBody::empty(), |_, _| ()).await;
        let error = sent.unwrap_err();
        assert!(error.is_sender_fault() && error.to_string().contains(expected), "{values:?}: {error}");
        assert!(!connection.has_sent_bytes());
    }
}

#[tokio::test]
async fn unsolicited_bytes_close_an_idle_connection() {
    let stray = &b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"[..];
    let timeout = &b"HTTP/1.1 408 Request Timeout\r\n\r\n"[..];
    for (unsolicited, idle) in
        [(stray, IdleState::Unsolicited), (timeout, IdleState::Closed), (b"", IdleState::Closed)]
    {
        let (mut connection, mut peer) = connection().await;
        assert_eq!([connection.check_idle_readiness(), connection.check_idle()], [IdleState::Quiet; 2]);
        peer.write_all(unsolicited).await.unwrap();
        peer.shutdown().await.unwrap();
        until(|| connection.check_idle_readiness() != IdleState::Quiet).await;
        assert_eq!((connection.check_idle_readiness(), connection.is_closed()), (idle, true));
    }
}

/// A worker that has not polled epoll since the bytes arrived does not know of them. The kernel does.
#[tokio::test]
async fn the_check_before_reuse_sees_what_the_runtime_does_not_know_yet() {
    for (unsolicited, idle) in [(&b"stray bytes"[..], IdleState::Unsolicited), (b"", IdleState::Closed)] {
        let (mut connection, peer) = connection().await;
        assert_eq!(connection.check_idle_readiness(), IdleState::Quiet);
        // The runtime does not run in between.
        peer.try_write(unsolicited).unwrap();
        if unsolicited.is_empty() {
            drop(peer);
        }
        assert_eq!(connection.check_idle_readiness(), IdleState::Quiet, "the runtime does not know yet");
        assert_eq!((connection.check_idle(), connection.is_closed()), (idle, true));
    }
}

/// TLS also delivers records without application data: session tickets are not unsolicited bytes.
#[tokio::test]
async fn the_check_before_reuse_processes_tls_records() {
    let (mut connection, mut peer) = narrow_tls().await;
    // The session tickets after the handshake.
    assert_eq!(connection.check_idle(), IdleState::Quiet);
    peer.write_all(b"stray bytes").await.unwrap();
    until(|| connection.check_idle() == IdleState::Unsolicited).await;
    assert!(connection.is_closed());

    let (mut connection, mut peer) = narrow_tls().await;
    peer.shutdown().await.unwrap();
    until(|| connection.check_idle() == IdleState::Closed).await;
}

/// The pool's check no longer holds when the request is written in a later poll.
#[tokio::test]
async fn a_write_that_had_to_wait_is_preceded_by_another_check() {
    let (mut connection, mut peer) = connection().await;
    peer.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await.unwrap();
    get(&mut connection).await.0.unwrap();
    assert_eq!(connection.finish_exchange(false, Instant::now()), ReuseVerdict::Reusable);
    let (target, fields) = (Uri::from_static("/"), HeaderMap::new());
    let failed = {
        let mut sending = pin!(connection.send(head(&target, &fields), RequestBody::empty(), |_, _| ()));
        let first = poll_fn(|cx| {
            // A task whose cooperative budget is used up may not write.
            while has_budget_remaining() {
                let _ = pin!(consume_budget()).poll(cx);
            }
            Poll::Ready(sending.as_mut().poll(cx))
        });
        assert!(first.await.is_pending());
        peer.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nstray").await.unwrap();
        sending.await
    };
    assert!(matches!(failed, Err(Error::Closed)), "{failed:?}");
    assert!(
        !connection.has_sent_bytes() && !connection.has_received_bytes(),
        "it can be sent to another endpoint"
    );
}

/// A connection that has carried one request, and its peer.
async fn connection_after(method: Method, status: &str) -> (Http1Connection, TcpStream) {
    let (mut connection, mut peer) = connection().await;
    peer.write_all(format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n").as_bytes()).await.unwrap();
    let (target, fields) = (Uri::from_static("/"), HeaderMap::new());
    let head = OutgoingHead { method: &method, ..head(&target, &fields) };
    connection.send(head, RequestBody::empty(), |_, _| ()).await.unwrap();
    (connection, peer)
}

/// The body that some services send with a response to HEAD follows right behind it.
#[tokio::test]
async fn a_connection_settles_after_a_bodiless_response() {
    for (method, status, settles) in [
        (Method::HEAD, "200 OK", true),
        (Method::GET, "204 No Content", true),
        (Method::GET, "304 Not Modified", true),
        (Method::GET, "200 OK", false),
    ] {
        let (idle, now) = (IdleConnections::default(), Instant::now());
        let (connection, _peer) = connection_after(method.clone(), status).await;
        idle.put_back(connection, now);
        assert_eq!(idle.pop(&plain(), now).is_none(), settles, "{method} {status}");
        assert_eq!(idle.pop(&plain(), now + SETTLE).is_some(), settles, "{method} {status}");
    }
}

/// Otherwise a client that sends only HEAD would need a new connection for each request.
#[tokio::test]
async fn connections_of_a_compliant_endpoint_are_reused_at_once() {
    let (idle, now) = (IdleConnections::default(), Instant::now());
    let (mut settled, mut peers) = (0, Vec::new());
    loop {
        let (connection, peer) = connection_after(Method::HEAD, "200 OK").await;
        peers.push(peer);
        idle.put_back(connection, now);
        if idle.pop(&plain(), now).is_some() {
            break;
        }
        settled += 1;
        assert!(idle.pop(&plain(), now + SETTLE).is_some() && settled < 100);
    }
    assert_eq!(settled, 8);
    let (connection, _peer) = connection_after(Method::GET, "204 No Content").await;
    idle.put_back(connection, now);
    assert!(idle.pop(&plain(), now).is_none(), "its 204 responses are counted separately");
    // A single unexpected body ends that.
    let (connection, peer) = connection_after(Method::HEAD, "200 OK").await;
    idle.put_back(connection, now);
    peer.try_write(b"stray").unwrap();
    assert!(idle.pop(&plain(), now).is_none());
    let later = now + Duration::from_secs(3600);
    let (connection, _peer) = connection_after(Method::HEAD, "200 OK").await;
    idle.put_back(connection, later);
    assert!(idle.pop(&plain(), later).is_none());
}

fn plain() -> ConnectionSettings {
    ConnectionSettings {
        tcp: TcpTimeouts::default(),
        clear_user_timeout_on_upgrade: true,
        pool_idle: PoolIdleTimeout::Auto,
        header_case: HeaderCase::default(),
        max_age: None,
        tls: None,
        ping: PingSettings { interval: None, timeout: Duration::ZERO },
        stream_wait: Duration::ZERO,
        queued: Cell::default(),
    }
}

/// Each connection has its own limit, from what its endpoint announced and from the name it was opened for.
#[tokio::test]
async fn an_expired_connection_expires_no_other() {
    let (idle, start) = (IdleConnections::default(), Instant::now());
    let (mut lasting, _peer) = connection().await;
    lasting.announced_idle_timeout = Some(Duration::from_secs(60));
    idle.put_back(lasting, start);
    let (short, _peer) = connection().await;
    idle.put_back(short, start + Duration::from_secs(1));
    let popped = idle.pop(&plain(), start + Duration::from_secs(10)).unwrap();
    assert_eq!((popped.announced_idle_timeout, idle.len()), (Some(Duration::from_secs(60)), 0));
}

#[tokio::test]
async fn connections_of_an_endpoint_that_sends_stray_bytes_settle() {
    let (idle, now) = (IdleConnections::default(), Instant::now());
    let (first, peer) = connection().await;
    idle.put_back(first, now);
    peer.try_write(b"stray").unwrap();
    assert!(idle.pop(&plain(), now).is_none(), "it was checked");
    let (second, _peer) = connection().await;
    idle.put_back(second, now);
    assert!(idle.pop(&plain(), now).is_none() && idle.len() == 1, "it settles");
    assert!(idle.pop(&plain(), now + SETTLE).is_some());
    let later = now + Duration::from_secs(3600);
    let (third, _peer) = connection().await;
    idle.put_back(third, later);
    assert!(idle.pop(&plain(), later).is_some(), "the settle period is over");
}

/// The kernel ends a connection whose peer acknowledges nothing after TCP_USER_TIMEOUT.
#[tokio::test]
async fn a_peer_that_acknowledges_nothing_times_out() {
    let far = TcpSocket::new_v4().unwrap();
    far.set_recv_buffer_size(4096).unwrap();
    far.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = far.listen(1).unwrap();
    let limits = TcpTimeouts { connect: None, user_timeout: Some(Duration::from_secs(1)) };
    let connecting = connect(listener.local_addr().unwrap(), limits, None, ApplicationProtocol::Http1);
    let (connected, accepted) = tokio::join!(connecting, listener.accept());
    let (mut io, _silent) = (connected.unwrap().io, accepted.unwrap());
    let endless = async { while io.write_all(&[0; 64 * 1024]).await.is_ok() {} };
    assert!(timeout(Duration::from_secs(20), endless).await.is_ok());
}

/// A service that times out waiting for a request says so just as one is sent to it.
#[tokio::test]
async fn a_408_on_a_reused_connection_is_not_a_response() {
    for (method, reused, delivered) in
        [(Method::GET, true, false), (Method::GET, false, true), (Method::POST, true, true)]
    {
        let (mut connection, mut peer) = connection().await;
        if reused {
            peer.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await.unwrap();
            get(&mut connection).await.0.unwrap();
            assert_eq!(connection.finish_exchange(false, Instant::now()), ReuseVerdict::Reusable);
        }
        let (target, fields) = (Uri::from_static("/"), HeaderMap::new());
        let head = OutgoingHead { method: &method, ..head(&target, &fields) };
        let response = {
            let mut sending = pin!(connection.send(head, RequestBody::empty(), |_, _| ()));
            assert!(poll_fn(|cx| Poll::Ready(sending.as_mut().poll(cx))).await.is_pending());
            let timeout = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
            peer.write_all(timeout).await.unwrap();
            sending.await
        };
        assert_eq!(response.is_ok(), delivered, "{method}, reused: {reused}");
        assert!(delivered || connection.has_sent_bytes() && !connection.has_received_bytes());
    }
}
