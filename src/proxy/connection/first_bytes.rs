//! Which side of a connection sends first: usually the client, in some protocols the server.

use std::{future::Future, pin::pin, rc::Rc, time::Duration};

use bytes::{Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    time::sleep,
};

use super::{CLOSE_GRACE, Connection, ConnectionError, HEADER_TIMEOUT, protocol::PlaintextOptions};
use crate::{
    config::Mtls,
    model::WorkerCluster,
    proxy::{
        detect::{DetectedProtocol, Detector, server_speaks_http},
        dial::{self, ByteStreamGuard},
        redirection,
        worker::drain_phase,
    },
    upstream::stream::UpstreamIo,
};

/// A client that sends nothing for this long may be waiting for the server to send first.
const SILENCE: Duration = Duration::from_millis(100);
/// Enough of a server's first bytes to see whether they are HTTP.
const FIRST_SERVER_BYTES: usize = 1024;

const NO_BYTE_FROM_EITHER: ConnectionError = ConnectionError::Cut("neither side sent a byte in time");
pub(super) const NO_BYTE: ConnectionError = ConnectionError::Cut("the client sent no byte in time");

/// Which side sent first, and what.
pub(super) enum FirstBytes {
    Client(DetectedProtocol),
    /// The client, after a connection to the server was opened.
    ClientAfterDial(DetectedProtocol, Box<DialledServer>),
    /// The server, something that is not HTTP.
    Server(Box<DialledServer>),
    /// The server, HTTP (SETTINGS or an early error response): it expects requests.
    HttpServer,
    /// Neither: the process drains.
    Draining,
}

/// A connection to a server, opened for a byte stream. Boxed where it is passed on: it is large.
pub(super) struct DialledServer {
    pub io: UpstreamIo,
    pub guard: ByteStreamGuard,
    /// The bytes that it has sent already.
    pub received: Bytes,
}

/// Why the wait for the first bytes ended.
pub(super) enum WaitOutcome {
    Draining,
    Timeout,
    /// A request needs the connection slot.
    SlotReclaimed,
}

impl Connection {
    /// Waits for the first bytes of the client, or of either side where the server may send first.
    pub(super) async fn wait_for_first_bytes<S>(
        &self,
        detector: &mut Detector,
        stream: &mut S,
        PlaintextOptions { destination, mtls, is_negotiated }: PlaintextOptions<'_>,
    ) -> Result<FirstBytes, ConnectionError>
    where
        S: AsyncRead + Unpin,
    {
        let may_be_server = |destination: &&Rc<WorkerCluster>| {
            mtls != Mtls::Strict && self.byte_stream_rules(destination, is_negotiated).allows_server_first()
        };
        let mut draining = pin!(self.wait_for_drain());
        let Some(destination) = destination.filter(may_be_server) else {
            return tokio::select! {
                biased;
                detected = detector.detect(stream) => Ok(FirstBytes::Client(detected?)),
                () = draining => Ok(FirstBytes::Draining),
                () = sleep(HEADER_TIMEOUT) => Err(NO_BYTE),
            };
        };
        let silence = match (is_negotiated, self.original_destination) {
            (true, _) => Duration::ZERO,
            (false, Some(_)) => redirection::REDIRECTED_SILENCE,
            (false, None) => SILENCE,
        };
        let idle = destination.cluster.settings.policy.tunnel_idle_timeout.limit();
        let limit = idle.map_or(HEADER_TIMEOUT, |idle| idle.min(HEADER_TIMEOUT));
        let mut too_late = pin!(sleep(limit));
        let dialled = tokio::select! {
            biased;
            detected = detector.detect(stream) => return Ok(FirstBytes::Client(detected?)),
            () = &mut draining => return Ok(FirstBytes::Draining),
            dialled = async {
                sleep(silence).await;
                Box::pin(dial::dial(self, destination)).await
            } => dialled,
        };
        let (io, in_use) = match dialled {
            Ok(dialled) => dialled,
            // A client that sends HTTP late still gets an error response.
            Err(error) => {
                return tokio::select! {
                    biased;
                    detected = detector.detect(stream) => match detected {
                        Ok(detected @ (DetectedProtocol::Http1 | DetectedProtocol::H2 | DetectedProtocol::Tls)) => Ok(FirstBytes::Client(detected)),
                        _ => Err(error.into()),
                    },
                    () = draining => Ok(FirstBytes::Draining),
                    () = too_late => Err(error.into()),
                };
            }
        };
        let server = DialledServer { io, guard: in_use, received: Bytes::new() };
        let ended = async {
            tokio::select! {
                () = &mut draining => WaitOutcome::Draining,
                () = &mut too_late => WaitOutcome::Timeout,
            }
        };
        wait_for_either_side(detector, stream, server, ended).await
    }
}

impl Connection {
    /// Waits until the process drains, and a moment longer, so that a client that has just connected can send its
    /// request. Nothing else closes a connection that has sent nothing: before the TLS handshake there is no identity
    /// to check.
    pub(super) async fn wait_for_drain(&self) {
        self.wait_for_phase(drain_phase(&self.side)).await;
        sleep(CLOSE_GRACE).await;
    }
}

/// Waits until the client or the server has sent something, or `ended` is ready. The connection to the server is closed
/// while neither has, if a request needs its connection slot.
pub(super) async fn wait_for_either_side<S>(
    detector: &mut Detector,
    stream: &mut S,
    mut server: DialledServer,
    ended: impl Future<Output = WaitOutcome>,
) -> Result<FirstBytes, ConnectionError>
where
    S: AsyncRead + Unpin,
{
    let mut ended = pin!(ended);
    let mut received = BytesMut::new();
    let outcome = loop {
        let read = async {
            received.reserve(FIRST_SERVER_BYTES);
            server.io.read_buf(&mut received).await
        };
        tokio::select! {
            biased;
            detected = detector.detect(stream) => {
                let detected = detected?;
                if detected == DetectedProtocol::Nothing {
                    // The client has closed.
                    return Ok(FirstBytes::Client(detected));
                }
                server.received = received.freeze();
                return Ok(FirstBytes::ClientAfterDial(detected, Box::new(server)));
            }
            count = read => {
                let is_http = match count? {
                    0 => Some(false),
                    _ => server_speaks_http(&received),
                };
                match is_http {
                    Some(true) => return Ok(FirstBytes::HttpServer),
                    Some(false) => {
                        server.received = received.freeze();
                        return Ok(FirstBytes::Server(Box::new(server)));
                    }
                    None => {}
                }
            }
            () = server.guard.wait_until_reclaimed() => break WaitOutcome::SlotReclaimed,
            ended = &mut ended => break ended,
        }
    };
    match outcome {
        WaitOutcome::Draining => Ok(FirstBytes::Draining),
        WaitOutcome::Timeout => Err(NO_BYTE_FROM_EITHER),
        WaitOutcome::SlotReclaimed => {
            drop(server);
            tokio::select! {
                detected = detector.detect(stream) => Ok(FirstBytes::Client(detected?)),
                ended = ended => match ended {
                    WaitOutcome::Timeout => Err(NO_BYTE_FROM_EITHER),
                    WaitOutcome::Draining | WaitOutcome::SlotReclaimed => Ok(FirstBytes::Draining),
                },
            }
        }
    }
}
