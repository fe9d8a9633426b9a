//! Responses that arrive before their request has been sent.

use bytes::Bytes;

use super::proxy;
use crate::support::{
    RawClient,
    h2_server::{H2Server, client, request},
};

/// Responds before it reads; dropping the rest of the request resets the stream with NO_ERROR.
fn refusing() -> H2Server {
    let mut builder = h2::server::Builder::new();
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
    let mut sender = client(proxy.outbound(), h2::client::Builder::new()).await;
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
