//! Responses that arrive before their request has been sent.

use bytes::Bytes;

use super::proxy;
use crate::support::{
    RawClient, RawServer,
    h2::{self, H2Client},
    h2_server::{H2Server, client, request},
};

/// Responds before it reads; dropping the rest of the request resets the stream with NO_ERROR.
fn refusing() -> H2Server {
    let mut builder = ::h2::server::Builder::new();
    builder.initial_window_size(20_000).initial_connection_window_size(1 << 20);
    H2Server::start(builder, |request, mut respond| async move {
        let mut response = http::Response::new(());
        *response.status_mut() = http::StatusCode::PAYLOAD_TOO_LARGE;
        if let Ok(mut body) = respond.send_response(response, false) {
            let _ = body.send_data(Bytes::from_static(b"too large"), true);
        }
        drop(request);
    })
}

/// Some servers refuse an upload without END_STREAM and reset its stream. With NO_ERROR the response is complete; with
/// another code it is if its Content-Length is reached.
#[test]
fn a_refusal_that_ends_by_a_reset_is_complete_by_no_error_or_content_length() {
    const NO_ERROR: u32 = 0;
    const CANCEL: u32 = 8;
    for (length, code, is_complete) in [
        (Some("9"), NO_ERROR, true),
        (Some("9"), CANCEL, true),
        (Some("10"), NO_ERROR, false),
        (None, NO_ERROR, true),
        (None, CANCEL, false),
    ] {
        let server = RawServer::start(move |stream| {
            let Some(mut peer) = H2Client::accept(stream) else { return };
            while let Ok(frame) = peer.next() {
                if frame.kind == h2::HEADERS {
                    let mut fields = vec![(":status", "413")];
                    fields.extend(length.map(|length| ("content-length", length)));
                    peer.headers(frame.stream, &h2::block(&fields), false);
                    peer.send(h2::frame(h2::DATA, 0, frame.stream, b"too large"));
                    peer.send(h2::frame(h2::RST_STREAM, 0, frame.stream, &code.to_be_bytes()));
                }
            }
        });
        let proxy = proxy(server.address(), "retry = false");
        let mut client = RawClient::connect(proxy.outbound());
        client.send("POST / HTTP/1.1\r\nHost: up\r\nContent-Length: 1000000\r\n\r\nsome of it");
        let response = client.response();
        let complete =
            response.iter().flatten().any(|got| (got.status(), &*got.text()) == (413, "too large"));
        assert_eq!(complete, is_complete, "{length:?}, code {code}: {response:?}");
    }
}

#[test]
fn an_early_response_reaches_an_http1_client() {
    let server = refusing();
    let proxy = proxy(server.address(), "");
    for round in 0..100 {
        let mut client = RawClient::connect(proxy.outbound());
        client.send("POST / HTTP/1.1\r\nHost: up\r\nContent-Length: 1000000\r\n\r\n");
        let part = vec![b'x'; 10_000];
        // Stops when it gets the response, which may close the connection.
        let _ = (0..100).take_while(|_| client.send(&part)).count();
        let response = client.response().expect("well-formed").expect("a response");
        assert_eq!((response.status(), response.text().as_str()), (413, "too large"), "round {round}");
    }
}

#[tokio::test]
async fn an_early_response_reaches_an_http2_client() {
    let server = refusing();
    let proxy = proxy(server.address(), "");
    let mut sender = client(proxy.outbound(), ::h2::client::Builder::new()).await;
    for round in 0..200 {
        sender = sender.ready().await.expect("the connection lives");
        let (response, mut body) = sender.send_request(request("POST", "up", "/"), false).expect("sent");
        tokio::spawn(async move {
            for _ in 0..100 {
                if body.send_data(Bytes::from(vec![b'x'; 10_000]), false).is_err() {
                    return;
                }
                tokio::task::yield_now().await;
            }
        });
        let mut response = response.await.unwrap_or_else(|error| panic!("round {round}: {error}"));
        assert_eq!(response.status(), 413, "round {round}");
        let data = response.body_mut().data().await.expect("a body").expect("whole");
        assert_eq!(data, "too large");
    }
}
