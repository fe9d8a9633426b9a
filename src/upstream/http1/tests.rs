use std::{
    cell::Cell,
    future::Future,
    pin::{Pin, pin},
    task::ready,
};

use http::{
    HeaderValue,
    header::{CONTENT_LENGTH, COOKIE},
};
use http_body::{Body, Frame};
use rustls::{ClientConfig, RootCertStore, ServerConfig, crypto::aws_lc_rs};
use rustls_pki_types::{PrivateKeyDer, ServerName};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf, duplex},
    net::{TcpSocket, TcpStream},
    task::{
        LocalSet,
        coop::{consume_budget, has_budget_remaining},
    },
};
use tokio_rustls::{TlsAcceptor, TlsConnector, server::TlsStream};

use super::*;
use crate::{
    config::PoolIdle,
    upstream::{
        BodyError, connect::TcpLimits, guards::Guards, http2::PingSettings, idle_connections::IdleConnections,
    },
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
        lifts_user_timeout: true,
        proof: None,
        slot: slot.opened(crate::net::alpn::Tls::None),
    };
    let now = Instant::now();
    Http1 { opened: Rc::new(opened), idle_since: now, reusable_from: now, told: None }
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
        assert_eq!(connection.rest(false, Instant::now()), Rest::Reusable);
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
        assert_ne!(connection.rest(false, Instant::now()), Rest::Reusable, "{why}");
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

/// The endpoint has no part in that, and sees nothing of it.
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
        assert!(error.is_of_sender() && error.to_string().contains(expected), "{values:?}: {error}");
        assert!(!connection.sent_anything());
    }
}

#[tokio::test]
async fn what_comes_unasked_closes_an_idle_connection() {
    let stray = &b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"[..];
    let goodbye = &b"HTTP/1.1 408 Request Timeout\r\n\r\n"[..];
    for (unasked, idle) in [(stray, Idle::Unsolicited), (goodbye, Idle::Closed), (b"", Idle::Closed)] {
        let (mut connection, mut peer) = connection().await;
        assert_eq!([connection.listen(), connection.look()], [Idle::Quiet; 2]);
        peer.write_all(unasked).await.unwrap();
        peer.shutdown().await.unwrap();
        until(|| connection.listen() != Idle::Quiet).await;
        assert_eq!((connection.listen(), connection.is_closed()), (idle, true));
    }
}

/// A worker that has not polled epoll since bytes came does not know of them. The kernel does.
#[tokio::test]
async fn the_look_before_reuse_sees_what_the_worker_was_not_told() {
    for (unasked, idle) in [(&b"stray bytes"[..], Idle::Unsolicited), (b"", Idle::Closed)] {
        let (mut connection, peer) = connection().await;
        assert_eq!(connection.listen(), Idle::Quiet);
        // No turn of the runtime in between.
        peer.try_write(unasked).unwrap();
        if unasked.is_empty() {
            drop(peer);
        }
        assert_eq!(connection.listen(), Idle::Quiet, "it was not told");
        assert_eq!((connection.look(), connection.is_closed()), (idle, true));
    }
}

/// By TLS more comes than what is for us: tickets ask for nothing.
#[tokio::test]
async fn the_look_before_reuse_reads_tls() {
    let (mut connection, mut peer) = narrow_tls().await;
    // The tickets that followed the handshake.
    assert_eq!(connection.look(), Idle::Quiet);
    peer.write_all(b"stray bytes").await.unwrap();
    until(|| connection.look() == Idle::Unsolicited).await;
    assert!(connection.is_closed());

    let (mut connection, mut peer) = narrow_tls().await;
    peer.shutdown().await.unwrap();
    until(|| connection.look() == Idle::Closed).await;
}

/// The pool's look is worth nothing any more when the request is written in a later turn.
#[tokio::test]
async fn a_write_that_had_to_wait_is_preceded_by_another_look() {
    let (mut connection, mut peer) = connection().await;
    peer.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await.unwrap();
    get(&mut connection).await.0.unwrap();
    assert_eq!(connection.rest(false, Instant::now()), Rest::Reusable);
    let (target, fields) = (Uri::from_static("/"), HeaderMap::new());
    let failed = {
        let mut sending = pin!(connection.send(head(&target, &fields), RequestBody::empty(), |_, _| ()));
        let first = poll_fn(|cx| {
            // A task that has had its turn may not write.
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
    assert!(!connection.sent_anything() && !connection.heard_anything(), "it can be sent elsewhere");
}

/// A connection that has carried one exchange, and its peer.
async fn connection_after(method: Method, status: &str) -> (Http1, TcpStream) {
    let (mut connection, mut peer) = connection().await;
    peer.write_all(format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n").as_bytes()).await.unwrap();
    let (target, fields) = (Uri::from_static("/"), HeaderMap::new());
    let head = Head { method: &method, ..head(&target, &fields) };
    connection.send(head, RequestBody::empty(), |_, _| ()).await.unwrap();
    (connection, peer)
}

/// The body that some services send with a response to HEAD comes right behind it.
#[tokio::test]
async fn a_connection_settles_behind_a_response_without_a_body() {
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

/// Else a client that sends nothing but HEAD would have a connection made for each.
#[tokio::test]
async fn connections_of_an_endpoint_that_keeps_to_http_are_reused_at_once() {
    let (idle, now) = (IdleConnections::default(), Instant::now());
    let (mut rests, mut peers) = (0, Vec::new());
    loop {
        let (connection, peer) = connection_after(Method::HEAD, "200 OK").await;
        peers.push(peer);
        idle.put_back(connection, now);
        if idle.pop(&plain(), now).is_some() {
            break;
        }
        rests += 1;
        assert!(idle.pop(&plain(), now + SETTLE).is_some() && rests < 100);
    }
    assert_eq!(rests, 8);
    let (connection, _peer) = connection_after(Method::GET, "204 No Content").await;
    idle.put_back(connection, now);
    assert!(idle.pop(&plain(), now).is_none(), "nothing is known of its responses with a 204");
    // One body where there should be none, and that is over.
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
        tcp: TcpLimits::default(),
        lifts_user_timeout: true,
        pool_idle: PoolIdle::Auto,
        header_case: HeaderCase::default(),
        max_age: None,
        tls: None,
        ping: PingSettings { interval: None, timeout: Duration::ZERO },
        stream_wait: Duration::ZERO,
        queued: Cell::default(),
    }
}

/// Each connection has a limit of its own, by what its endpoint said and by the name that it was made for.
#[tokio::test]
async fn an_expired_connection_takes_no_other_with_it() {
    let (idle, begun) = (IdleConnections::default(), Instant::now());
    let (mut lasting, _peer) = connection().await;
    lasting.told = Some(Duration::from_secs(60));
    idle.put_back(lasting, begun);
    let (short, _peer) = connection().await;
    idle.put_back(short, begun + Duration::from_secs(1));
    let popped = idle.pop(&plain(), begun + Duration::from_secs(10)).unwrap();
    assert_eq!((popped.told, idle.len()), (Some(Duration::from_secs(60)), 0));
}

#[tokio::test]
async fn connections_of_an_endpoint_that_sends_stray_bytes_settle() {
    let (idle, now) = (IdleConnections::default(), Instant::now());
    let (first, peer) = connection().await;
    idle.put_back(first, now);
    peer.try_write(b"stray").unwrap();
    assert!(idle.pop(&plain(), now).is_none(), "it was looked at");
    let (second, _peer) = connection().await;
    idle.put_back(second, now);
    assert!(idle.pop(&plain(), now).is_none() && idle.len() == 1, "it rests");
    assert!(idle.pop(&plain(), now + SETTLE).is_some());
    let later = now + Duration::from_secs(3600);
    let (third, _peer) = connection().await;
    idle.put_back(third, later);
    assert!(idle.pop(&plain(), later).is_some(), "that is forgotten");
}

/// The kernel ends a connection whose peer takes nothing, by the limit that was set.
#[tokio::test]
async fn a_peer_that_acknowledges_nothing_is_given_up() {
    let far = TcpSocket::new_v4().unwrap();
    far.set_recv_buffer_size(4096).unwrap();
    far.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = far.listen(1).unwrap();
    let limits = TcpLimits { connect: None, user: Some(Duration::from_secs(1)) };
    let connecting = connect(listener.local_addr().unwrap(), limits, None, Speaks::Http1);
    let (connected, accepted) = tokio::join!(connecting, listener.accept());
    let (mut io, _silent) = (connected.unwrap().io, accepted.unwrap());
    let endless = async { while io.write_all(&[0; 64 * 1024]).await.is_ok() {} };
    assert!(timeout(Duration::from_secs(20), endless).await.is_ok());
}

/// A service that gives up waiting for a request says so just as one is sent to it.
#[tokio::test]
async fn a_408_on_a_reused_connection_is_no_response() {
    for (method, reused, delivered) in
        [(Method::GET, true, false), (Method::GET, false, true), (Method::POST, true, true)]
    {
        let (mut connection, mut peer) = connection().await;
        if reused {
            peer.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await.unwrap();
            get(&mut connection).await.0.unwrap();
            assert_eq!(connection.rest(false, Instant::now()), Rest::Reusable);
        }
        let (target, fields) = (Uri::from_static("/"), HeaderMap::new());
        let head = Head { method: &method, ..head(&target, &fields) };
        let answered = {
            let mut sending = pin!(connection.send(head, RequestBody::empty(), |_, _| ()));
            assert!(poll_fn(|cx| Poll::Ready(sending.as_mut().poll(cx))).await.is_pending());
            let timeout = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
            peer.write_all(timeout).await.unwrap();
            sending.await
        };
        assert_eq!(answered.is_ok(), delivered, "{method}, reused: {reused}");
        assert!(delivered || connection.sent_anything() && !connection.heard_anything());
    }
}

/// A body of a known length, as its client sends it.
struct Upload {
    client: DuplexStream,
    left: usize,
}

impl Body for Upload {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        if this.left == 0 {
            return Poll::Ready(None);
        }
        let mut space = [0; 100];
        let mut buffer = ReadBuf::new(&mut space);
        ready!(Pin::new(&mut this.client).poll_read(cx, &mut buffer)).map_err(|_| BodyError::TakenOver)?;
        this.left -= buffer.filled().len();
        Poll::Ready(Some(Ok(Frame::data(Bytes::copy_from_slice(buffer.filled())))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }
}

/// A service that refuses an upload and closes, though more of it comes: what it said arrives before the reset.
#[tokio::test]
async fn a_response_is_read_although_the_upload_fails() {
    let exchanges = async {
        let (connection, peer) = connection().await;
        refuses_upload(connection, peer).await;
        let (connection, peer) = narrow_tls().await;
        refuses_upload(connection, peer).await;
    };
    LocalSet::new().run_until(exchanges).await;
}

async fn refuses_upload(mut connection: Http1, mut peer: impl AsyncWrite + Unpin) {
    let (mut client, end) = duplex(100);
    let upload = RequestBody::new(Upload { client: end, left: 4 });
    let (target, fields) = (Uri::from_static("/"), HeaderMap::from_iter([(CONTENT_LENGTH, 4.into())]));
    client.write_all(b"bo").await.unwrap();
    let answered = {
        let mut sending = pin!(connection.send(head(&target, &fields), upload, |_, _| ()));
        assert!(poll_fn(|cx| Poll::Ready(sending.as_mut().poll(cx))).await.is_pending());
        let refusal = b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 5\r\n\r\nlarge";
        peer.write_all(refusal).await.unwrap();
        peer.flush().await.unwrap();
        // With a part of the request unread, this is a reset.
        drop(peer);
        client.write_all(b"dy").await.unwrap();
        // The worker has not been told of the response when the write fails.
        match poll_fn(|cx| Poll::Ready(sending.as_mut().poll(cx))).await {
            Poll::Ready(answered) => answered,
            Poll::Pending => sending.await,
        }
    };
    assert_eq!(answered.unwrap().status, StatusCode::PAYLOAD_TOO_LARGE);
    assert_eq!(body(&mut connection).await.unwrap(), b"large");
    assert_eq!(connection.rest(false, Instant::now()), Rest::Ends);
}

#[tokio::test]
async fn a_body_that_ends_with_its_connection_is_whole() {
    let (mut connection, mut peer) = connection().await;
    peer.write_all(b"HTTP/1.1 200 OK\r\n\r\nall of it").await.unwrap();
    peer.shutdown().await.unwrap();
    get(&mut connection).await.0.unwrap();
    assert_eq!(connection.length(), None);
    assert_eq!(body(&mut connection).await.unwrap(), b"all of it");
    assert_eq!(connection.rest(false, Instant::now()), Rest::Ends);
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
        assert_eq!(connection.rest(false, Instant::now()), Rest::Ends, "it is not clean");
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
            until(|| connection.look() != Idle::Quiet).await;
        }
        let failed = {
            let mut sending = pin!(connection.send(head(&target, &fields), RequestBody::empty(), |_, _| ()));
            let first = poll_fn(|cx| Poll::Ready(sending.as_mut().poll(cx))).await;
            assert!(!begun || first.is_pending(), "the system takes a part of it");
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
        let upload = RequestBody::new(Upload { client: end, left: 4 });
        let (target, fields) = (Uri::from_static("/"), HeaderMap::from_iter([(CONTENT_LENGTH, 4.into())]));
        caller.write_all(b"bo").await.unwrap();
        let answered = connection.send(head(&target, &fields), upload, |_, _| ()).await;
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
