//! One call over a connection of its own, as simple services make them.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode, header::HOST};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, time::timeout};

use super::DemoError;

const PATIENCE: Duration = Duration::from_secs(10);
const BODY: usize = 1 << 20;

#[derive(Clone, Debug)]
pub struct Reply {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

/// Sends `target` (absolute for a proxy, else a path) to `to`.
pub async fn call(to: SocketAddr, method: Method, target: &str, host: &str) -> Result<Reply, DemoError> {
    call_for(&HeaderMap::new(), to, method, target, host).await
}

/// The same in the course of another call, whose trace is passed on: the only thing that a service has to do for one.
pub async fn call_for(
    served: &HeaderMap,
    to: SocketAddr,
    method: Method,
    target: &str,
    host: &str,
) -> Result<Reply, DemoError> {
    let mut request =
        Request::builder().method(method).uri(target).header(HOST, host).body(Empty::<Bytes>::new())?;
    for name in ["traceparent", "tracestate", "baggage"] {
        if let Some(value) = served.get(name) {
            request.headers_mut().insert(name, value.clone());
        }
    }
    let exchange = async {
        let stream = TcpStream::connect(to).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let answer = sender.send_request(request).await?;
        let (parts, body) = answer.into_parts();
        let body = Limited::new(body, BODY).collect().await.map_err(std::io::Error::other)?.to_bytes();
        drop(sender);
        connection.abort();
        Ok(Reply { status: parts.status, headers: parts.headers, body })
    };
    timeout(PATIENCE, exchange).await.unwrap_or(Err(DemoError::NoAnswer(PATIENCE)))
}
