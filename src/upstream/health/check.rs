//! One health check of one endpoint, on a connection of its own.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Response,
    body::Incoming,
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::{
    config::{HealthCheck, Protocol},
    descriptors,
    identity::handshake::{self, TlsFailure},
    net::alpn::ApplicationProtocol,
    upstream::{Endpoint, health::CheckSettings},
};

/// Why a check failed.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    #[error("no response within {0:?}")]
    Timeout(Duration),
    #[error("connect: {0}")]
    Connect(io::Error),
    #[error("TLS: {0}")]
    Tls(#[from] TlsFailure),
    #[error("{0}")]
    Http(#[from] hyper::Error),
    #[error("{0}")]
    Request(#[from] http::Error),
    #[error("response status {0}")]
    Status(StatusCode),
    #[error("grpc-status {code}: {message}")]
    Grpc { code: String, message: String },
    #[error("service reports {0}")]
    NotServing(&'static str),
    #[error("response is not a valid gRPC HealthCheckResponse")]
    Malformed,
}

impl CheckError {
    /// Whether the check could not be made because this machine lacked a resource.
    pub fn is_local_resource(&self) -> bool {
        matches!(self, Self::Connect(error) if descriptors::is_local_resource(error))
    }
}

/// A gRPC health response is two bytes; more than this is something else.
const MAX_RESPONSE: usize = 16 * 1024;
const USER_AGENT: &str = concat!("outrigger/", env!("CARGO_PKG_VERSION"), " (health check)");

pub(super) async fn run(
    CheckSettings { health, protocol, tls }: CheckSettings,
    endpoint: Arc<Endpoint>,
) -> Result<(), CheckError> {
    let limit = *health.timeout;
    let check = async {
        let stream = descriptors::connect(endpoint.address).await.map_err(CheckError::Connect)?;
        let Some(target) = tls else {
            return check_protocol(stream, &health, protocol, &endpoint, limit).await;
        };
        let speaks = match (&health.path, &health.grpc, protocol) {
            (None, None, _) => ApplicationProtocol::Opaque,
            (Some(_), _, Protocol::Auto | Protocol::Http1 | Protocol::Tcp) => ApplicationProtocol::Http1,
            _ => ApplicationProtocol::H2,
        };
        let (stream, _) = handshake::connect(&target.client, &target.name, speaks, stream).await?;
        check_protocol(stream, &health, protocol, &endpoint, limit).await
    };
    tokio::time::timeout(limit, check).await.unwrap_or(Err(CheckError::Timeout(limit)))
}

async fn check_protocol<S: CheckStream>(
    stream: S,
    health: &HealthCheck,
    protocol: Protocol,
    endpoint: &Endpoint,
    limit: Duration,
) -> Result<(), CheckError> {
    let authority = authority(endpoint.host.as_deref(), endpoint.address);
    match (&health.path, &health.grpc) {
        (Some(path), _) => http(stream, protocol, &authority, path).await,
        (None, Some(service)) => check_grpc_health(stream, &authority, service, limit).await,
        (None, None) => Ok(()),
    }
}

/// TCP, or TLS over TCP.
pub trait CheckStream: AsyncRead + AsyncWrite + Unpin + Send + 'static {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> CheckStream for S {}

fn authority(host: Option<&str>, address: SocketAddr) -> String {
    host.map_or_else(|| address.to_string(), |host| format!("{host}:{}", address.port()))
}

async fn http(
    stream: impl CheckStream,
    protocol: Protocol,
    authority: &str,
    path: &str,
) -> Result<(), CheckError> {
    let request = Request::get(path).header(header::USER_AGENT, USER_AGENT);
    let status = if protocol == Protocol::H2 {
        let request = request.uri(format!("http://{authority}{path}")).body(Full::<Bytes>::default())?;
        send_h2(stream, request, async |response| Ok(response.status())).await?
    } else {
        let request = request
            .header(header::HOST, authority)
            .header(header::CONNECTION, "close")
            .body(Full::<Bytes>::default())?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        run_on_connection(connection, async { sender.send_request(request).await }).await?.status()
    };
    if status.is_success() { Ok(()) } else { Err(CheckError::Status(status)) }
}

/// `grpc.health.v1.Health/Check`.
///
/// # Errors
///
/// Unless the response says that the service is serving.
pub async fn check_grpc_health(
    stream: impl CheckStream,
    authority: &str,
    service: &str,
    limit: Duration,
) -> Result<(), CheckError> {
    let request = Request::post(format!("http://{authority}/grpc.health.v1.Health/Check"))
        .header(header::CONTENT_TYPE, "application/grpc")
        .header(header::TE, "trailers")
        .header(header::USER_AGENT, USER_AGENT)
        .header("grpc-timeout", format!("{}m", limit.as_millis().clamp(1, 99_999_999)))
        .body(Full::new(health_request(service)))?;
    send_h2(stream, request, async |response| {
        if response.status() != StatusCode::OK {
            return Err(CheckError::Status(response.status()));
        }
        grpc_status(response.headers())?;
        let body = Limited::new(response.into_body(), MAX_RESPONSE).collect().await;
        let body = body.map_err(|_| CheckError::Malformed)?;
        grpc_status(body.trailers().unwrap_or(&HeaderMap::new()))?;
        match serving_status(&body.to_bytes()).ok_or(CheckError::Malformed)? {
            1 => Ok(()),
            2 => Err(CheckError::NotServing("NOT_SERVING")),
            3 => Err(CheckError::NotServing("SERVICE_UNKNOWN")),
            _ => Err(CheckError::NotServing("UNKNOWN")),
        }
    })
    .await
}

/// An error if `fields` contain a `grpc-status` other than 0. It may be in the headers or in the trailers.
fn grpc_status(fields: &HeaderMap) -> Result<(), CheckError> {
    let text = |name| fields.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    match text("grpc-status") {
        None => Ok(()),
        Some(code) if code == "0" => Ok(()),
        Some(code) => Err(CheckError::Grpc { code, message: text("grpc-message").unwrap_or_default() }),
    }
}

async fn send_h2<T>(
    stream: impl CheckStream,
    request: Request<Full<Bytes>>,
    read: impl AsyncFnOnce(Response<Incoming>) -> Result<T, CheckError>,
) -> Result<T, CheckError> {
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
    run_on_connection(connection, async { read(sender.send_request(request).await?).await }).await
}

/// Drives a connection until the exchange on it is complete. How the connection itself ends does not matter: the
/// exchange reports errors.
pub async fn run_on_connection<T>(connection: impl Future, exchange: impl Future<Output = T>) -> T {
    let connection = async {
        connection.await;
        std::future::pending::<std::convert::Infallible>().await
    };
    tokio::select! {
        biased;
        result = exchange => result,
        never = connection => match never {},
    }
}

/// A `HealthCheckRequest { string service = 1 }` in a gRPC frame.
fn health_request(service: &str) -> Bytes {
    let mut message = BytesMut::new();
    if !service.is_empty() {
        message.put_u8(1 << 3 | 2);
        let mut length = service.len();
        while length > 0x7f {
            message.put_u8(length as u8 | 0x80);
            length >>= 7;
        }
        message.put_u8(length as u8);
        message.put_slice(service.as_bytes());
    }
    let mut frame = BytesMut::with_capacity(5 + message.len());
    frame.put_u8(0); // not compressed
    frame.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    frame.put(message);
    frame.freeze()
}

/// The `status = 1` of a `HealthCheckResponse` in a gRPC frame; 0 (UNKNOWN) if absent.
fn serving_status(frame: &[u8]) -> Option<u64> {
    let (head, mut message) = frame.split_first_chunk::<5>()?;
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
    if head[0] != 0 || usize::try_from(length).ok()? != message.len() {
        return None;
    }
    let mut status = 0;
    while !message.is_empty() {
        match varint(&mut message)? {
            tag if tag == 1 << 3 => status = varint(&mut message)?,
            // Fields of a later version are skipped by their wire type.
            tag => match tag & 7 {
                0 => drop(varint(&mut message)?),
                1 => message = message.get(8..)?,
                2 => {
                    let length = usize::try_from(varint(&mut message)?).ok()?;
                    message = message.get(length..)?;
                }
                5 => message = message.get(4..)?,
                _ => return None,
            },
        }
    }
    Some(status)
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn requests_are_encoded_as_protobuf() {
        assert_eq!(&health_request("")[..], [0, 0, 0, 0, 0]);
        assert_eq!(&health_request("ab")[..], [0, 0, 0, 0, 4, 0x0a, 2, b'a', b'b']);
        let long = health_request(&"x".repeat(300));
        assert_eq!(&long[..8], [0, 0, 0, 1, 47, 0x0a, 0xac, 0x02]);
    }

    #[test]
    fn responses_with_fields_of_later_versions_are_parsed() {
        for (message, status) in [
            (&[][..], Some(0)),
            (&[0x08, 1], Some(1)),
            (&[0x08, 2], Some(2)),
            (
                &[0x12, 2, 9, 9, 0x08, 1, 0x18, 0xff, 0x01, 0x25, 0, 0, 0, 0, 0x29, 0, 0, 0, 0, 0, 0, 0, 0],
                Some(1),
            ),
            (&[0x08], None),
            (&[0x12, 200, 1], None),
            (&[0x0b], None),
        ] {
            let mut frame = vec![0, 0, 0, 0, message.len() as u8];
            frame.extend_from_slice(message);
            assert_eq!(serving_status(&frame), status, "{message:?}");
        }
        assert_eq!(serving_status(&[0, 0, 0, 0, 3, 8, 1]), None, "shorter than its length field");
        assert_eq!(serving_status(&[1, 0, 0, 0, 2, 8, 1]), None, "compressed, which was not offered");
    }

    proptest! {
        #[test]
        fn no_response_panics_the_parser(frame in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = serving_status(&frame);
        }
    }
}
