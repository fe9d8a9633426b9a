//! The states of the diagram, driven from both ends.

use std::{future::Future, pin::pin};

use http::{HeaderMap, header::CONTENT_LENGTH};
use tokio::{
    io::{AsyncWriteExt, duplex},
    task::LocalSet,
};

use super::{
    client_connection::State,
    tests::{body, connection, head},
    upload_tests::Upload,
    *,
};

fn state(connection: &Http1Connection) -> State {
    connection.inner.connection.borrow().state()
}

#[tokio::test]
async fn a_request_is_sent_then_waits_then_its_response_is_read() {
    let (mut connection, mut peer) = connection().await;
    assert_eq!(state(&connection), State::Idle);
    let (mut client, end) = duplex(100);
    let upload = RequestBody::new(Upload { client: end, left: 4 });
    let (target, fields) = (Uri::from_static("/"), HeaderMap::from_iter([(CONTENT_LENGTH, 4.into())]));
    let inner = Rc::clone(&connection.inner);
    let state_now = || inner.connection.borrow().state();
    {
        let mut sending = pin!(connection.send(head(&target, &fields), upload, |_, _| ()));
        let mut poll = async || poll_fn(|cx| Poll::Ready(sending.as_mut().poll(cx))).await;
        assert!(poll().await.is_pending() && state_now() == State::Sending, "{:?}", state_now());
        client.write_all(b"body").await.unwrap();
        assert!(poll().await.is_pending() && state_now() == State::Waiting, "{:?}", state_now());
        peer.write_all(b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\no")
            .await
            .unwrap();
        sending.await.unwrap();
    }
    assert_eq!(state_now(), State::Reading);
    peer.write_all(b"k").await.unwrap();
    assert_eq!(body(&mut connection).await.unwrap(), b"ok");
    assert_eq!(state_now(), State::Idle);
    assert_eq!(connection.finish_exchange(false, Instant::now()), ReuseVerdict::Reusable);
}

#[tokio::test]
async fn an_upload_goes_on_after_an_early_response_and_outlives_it() {
    let exchange = async {
        let (mut connection, mut peer) = connection().await;
        peer.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n").await.unwrap();
        let (mut client, end) = duplex(100);
        let upload = RequestBody::new(Upload { client: end, left: 4 });
        let (target, fields) = (Uri::from_static("/"), HeaderMap::from_iter([(CONTENT_LENGTH, 4.into())]));
        connection.send(head(&target, &fields), upload, |_, _| ()).await.unwrap();
        assert_eq!(state(&connection), State::Uploading);
        peer.write_all(b"ok").await.unwrap();
        assert_eq!(body(&mut connection).await.unwrap(), b"ok");
        assert_eq!(state(&connection), State::UploadOnly);
        let inner = Rc::clone(&connection.inner);
        assert_eq!(connection.finish_exchange(false, Instant::now()), ReuseVerdict::Close);
        drop(connection);
        client.write_all(b"body").await.unwrap();
        while inner.connection.borrow().state() == State::UploadOnly {
            tokio::task::yield_now().await;
        }
        assert_eq!(inner.connection.borrow().state(), State::Idle, "all of it is sent");
    };
    LocalSet::new().run_until(exchange).await;
}

/// A connection on which a response is still to come is not used again, whatever ended the wait for it.
#[tokio::test]
async fn a_connection_whose_response_is_outstanding_is_not_usable() {
    let (mut connection, _peer) = connection().await;
    {
        let (target, fields) = (Uri::from_static("/"), HeaderMap::new());
        let mut sending = pin!(connection.send(head(&target, &fields), RequestBody::empty(), |_, _| ()));
        assert!(poll_fn(|cx| Poll::Ready(sending.as_mut().poll(cx))).await.is_pending());
    }
    assert_eq!(state(&connection), State::Waiting);
    assert!(!connection.inner.connection.borrow().is_usable());
    assert_eq!(connection.finish_exchange(false, Instant::now()), ReuseVerdict::Close);
    let inner = Rc::clone(&connection.inner);
    drop(connection);
    assert_eq!(inner.connection.borrow().state(), State::Gone);
}
