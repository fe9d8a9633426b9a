//! Uploads: early responses, failures in the middle, upgrades.

use std::{
    future::Future,
    pin::{Pin, pin},
    task::ready,
};

use http::header::CONTENT_LENGTH;
use http_body::Body;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf, duplex},
    task::LocalSet,
};

use super::{
    tests::{LONG, body, connection, get, head, long, narrow_connection, narrow_tls, until},
    *,
};
use crate::upstream::BodyError;

/// A body of a known length, as its client sends it.
pub(super) struct Upload {
    pub client: DuplexStream,
    pub left: usize,
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
        ready!(Pin::new(&mut this.client).poll_read(cx, &mut buffer)).map_err(|_| BodyError::Superseded)?;
        this.left -= buffer.filled().len();
        Poll::Ready(Some(Ok(Frame::data(Bytes::copy_from_slice(buffer.filled())))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }
}

/// A service refuses an upload and closes while more of it is sent: its response is read before the reset counts.
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

async fn refuses_upload(mut connection: Http1Connection, mut peer: impl AsyncWrite + Unpin) {
    let (mut client, end) = duplex(100);
    let upload = RequestBody::new(Upload { client: end, left: 4 });
    let (target, fields) = (Uri::from_static("/"), HeaderMap::from_iter([(CONTENT_LENGTH, 4.into())]));
    client.write_all(b"bo").await.unwrap();
    let response = {
        let mut sending = pin!(connection.send(head(&target, &fields), upload, |_, _| ()));
        assert!(poll_fn(|cx| Poll::Ready(sending.as_mut().poll(cx))).await.is_pending());
        let refusal = b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 5\r\n\r\nlarge";
        peer.write_all(refusal).await.unwrap();
        peer.flush().await.unwrap();
        // With a part of the request unread, this sends a reset.
        drop(peer);
        client.write_all(b"dy").await.unwrap();
        // The runtime does not know of the response yet when the write fails.
        match poll_fn(|cx| Poll::Ready(sending.as_mut().poll(cx))).await {
            Poll::Ready(response) => response,
            Poll::Pending => sending.await,
        }
    };
    assert_eq!(response.unwrap().status, StatusCode::PAYLOAD_TOO_LARGE);
    assert_eq!(body(&mut connection).await.unwrap(), b"large");
    assert_eq!(connection.finish_exchange(false, Instant::now()), ReuseVerdict::Close);
}

#[tokio::test]
async fn a_body_delimited_by_close_is_complete() {
    let (mut connection, mut peer) = connection().await;
    peer.write_all(b"HTTP/1.1 200 OK\r\n\r\nall of it").await.unwrap();
    peer.shutdown().await.unwrap();
    get(&mut connection).await.0.unwrap();
    assert_eq!(connection.remaining_length(), None);
    assert_eq!(body(&mut connection).await.unwrap(), b"all of it");
    assert_eq!(connection.finish_exchange(false, Instant::now()), ReuseVerdict::Close);
}

#[tokio::test]
async fn bytes_after_an_upgrade_are_handed_over() {
    let (mut connection, mut peer) = connection().await;
    peer.write_all(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\nfirst bytes").await.unwrap();
    let (response, _) = get(&mut connection).await;
    assert_eq!(response.unwrap().status, StatusCode::SWITCHING_PROTOCOLS);
    let (_, unread) = connection.take_upgraded_stream().unwrap();
    assert_eq!(&unread[..], b"first bytes");
    assert!(connection.take_upgraded_stream().is_none() && connection.is_closed());
}

/// TLS buffers more than the kernel. Until the kernel has its last record, the request does not count as sent.
#[tokio::test]
async fn a_request_is_sent_when_its_last_tls_record_is() {
    let (connection, mut peer) = narrow_tls().await;
    let (target, fields, mut got) = (Uri::from_static("/"), long(), Vec::new());
    let inner = || connection.inner.connection.borrow_mut();
    inner().start_request(head(&target, &fields), RequestBody::empty()).unwrap();
    let first = poll_fn(|cx| Poll::Ready(inner().poll_request(cx))).await;
    assert!(inner().write_buffer.is_empty(), "the TLS session has buffered all of it");
    assert!(first.is_pending() && !inner().is_sent() && inner().has_sent_bytes, "the kernel has not");
    let reads = async {
        while !got.ends_with(b"\r\n\r\n") {
            assert_ne!(peer.read_buf(&mut got).await.unwrap(), 0, "cut after {} bytes", got.len());
        }
    };
    let (sent, ()) = tokio::join!(poll_fn(|cx| inner().poll_request(cx)), reads);
    sent.unwrap();
    assert!(inner().is_sent() && got.len() > LONG);
}

/// An early response does not stop it: the rest of the request is sent, whether or not the response is read.
#[tokio::test]
async fn tls_records_are_sent_after_an_early_response() {
    let exchange = async {
        let (mut connection, mut peer) = narrow_tls().await;
        peer.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await.unwrap();
        let (target, fields, mut got) = (Uri::from_static("/"), long(), Vec::new());
        let response = connection.send(head(&target, &fields), RequestBody::empty(), |_, _| ()).await;
        assert_eq!(response.unwrap().status, StatusCode::OK);
        assert_eq!(connection.finish_exchange(false, Instant::now()), ReuseVerdict::Close, "it is not clean");
        drop(connection);
        while !got.ends_with(b"\r\n\r\n") {
            assert_ne!(peer.read_buf(&mut got).await.unwrap_or(0), 0, "cut after {} bytes", got.len());
        }
    };
    LocalSet::new().run_until(exchange).await;
}

/// An endpoint that received a part of a request may act on it: the request counts as sent.
#[tokio::test]
async fn a_partially_sent_head_counts_as_sent() {
    for partially_sent in [true, false] {
        let (mut connection, peer) = narrow_connection().await;
        let (target, fields) = (Uri::from_static("/"), long());
        let mut peer = Some(peer);
        if !partially_sent {
            // With a reset: otherwise the kernel accepts bytes that are never delivered.
            peer.take().unwrap().set_zero_linger().unwrap();
            until(|| connection.check_idle() != IdleState::Quiet).await;
        }
        let failed = {
            let mut sending = pin!(connection.send(head(&target, &fields), RequestBody::empty(), |_, _| ()));
            let first = poll_fn(|cx| Poll::Ready(sending.as_mut().poll(cx))).await;
            assert!(!partially_sent || first.is_pending(), "the kernel accepts a part of it");
            drop(peer);
            match first {
                Poll::Ready(response) => response,
                Poll::Pending => sending.await,
            }
        };
        assert!(failed.is_err() && !connection.has_received_bytes(), "{failed:?}");
        assert_eq!(connection.has_sent_bytes(), partially_sent);
    }
}

/// The endpoint would take the rest of the request for the new protocol.
#[tokio::test]
async fn no_upgrade_before_the_request_is_sent() {
    let exchange = async {
        let (mut connection, mut peer) = connection().await;
        peer.write_all(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n").await.unwrap();
        let (mut client, end) = duplex(100);
        let upload = RequestBody::new(Upload { client: end, left: 4 });
        let (target, fields) = (Uri::from_static("/"), HeaderMap::from_iter([(CONTENT_LENGTH, 4.into())]));
        client.write_all(b"bo").await.unwrap();
        let response = connection.send(head(&target, &fields), upload, |_, _| ()).await;
        assert_eq!(response.unwrap().status, StatusCode::SWITCHING_PROTOCOLS);
        assert!(connection.take_upgraded_stream().is_none() && connection.is_closed());
        // The rest of the request is not sent either, now that another protocol is in use.
        drop(connection);
        // The body was dropped with its connection, so this may fail.
        let _ = client.write_all(b"dy").await;
        let mut seen = Vec::new();
        peer.read_to_end(&mut seen).await.unwrap();
        assert!(seen.ends_with(b"\r\n\r\nbo"), "{:?}", seen.escape_ascii().to_string());
    };
    LocalSet::new().run_until(exchange).await;
}
