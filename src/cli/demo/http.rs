//! One request over a connection of its own, as simple services send it.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode, header::HOST};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, time::timeout};

use super::DemoError;

const TIMEOUT: Duration = Duration::from_secs(10);
const MAX_BODY: usize = 1 << 20;

#[derive(Clone, Debug)]
pub struct Reply {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

/// Sends a request with `target` (absolute for a proxy, else a path) to `to`.
pub async fn send(to: SocketAddr, method: Method, target: &str, host: &str) -> Result<Reply, DemoError> {
    send_within(&HeaderMap::new(), to, method, target, host).await
}

/// The same on behalf of another request, whose trace context is forwarded: all that a service has to do for tracing.
pub async fn send_within(
    cause: &HeaderMap,
    to: SocketAddr,
    method: Method,
    target: &str,
    host: &str,
) -> Result<Reply, DemoError> {
    let mut request =
        Request::builder().method(method).uri(target).header(HOST, host).body(Empty::<Bytes>::new())?;
    for name in ["traceparent", "tracestate", "baggage"] {
        if let Some(value) = cause.get(name) {
            request.headers_mut().insert(name, value.clone());
        }
    }
    let exchange = async {
        let stream = TcpStream::connect(to).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let response = sender.send_request(request).await?;
        let (parts, body) = response.into_parts();
        let body = Limited::new(body, MAX_BODY).collect().await.map_err(std::io::Error::other)?.to_bytes();
        drop(sender);
        connection.abort();
        Ok(Reply { status: parts.status, headers: parts.headers, body })
    };
    timeout(TIMEOUT, exchange).await.unwrap_or(Err(DemoError::NoResponse(TIMEOUT)))
}
