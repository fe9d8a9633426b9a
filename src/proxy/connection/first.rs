//! Which side of a connection sends first: usually the client, in some protocols the server.

use std::{future::Future, pin::pin, rc::Rc, time::Duration};

use bytes::{Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    time::sleep,
};

use super::{Connection, ConnectionError, HEADER_TIMEOUT, LAST_CALL, spoken::Plain};
use crate::{
    config::Mtls,
    model::LocalCluster,
    proxy::{
        connect::{self, Dialled},
        detect::{Detector, Spoken, server_speaks_http},
        redirected,
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
pub(super) enum First {
    Client(Spoken),
    /// The client, after a connection to the server was opened.
    ClientDialled(Spoken, Box<Server>),
    /// The server, something that is not HTTP.
    Server(Box<Server>),
    /// The server, HTTP (SETTINGS or an early error response): it expects requests.
    HttpServer,
    /// Neither: the process drains.
    Nobody,
}

/// A connection to a server, opened for a byte stream. Boxed where it is passed on: it is large.
pub(super) struct Server {
    pub io: UpstreamIo,
    pub in_use: Dialled,
    /// The bytes that it has sent already.
    pub said: Bytes,
}

/// Why the wait for the first bytes ended.
pub(super) enum Ended {
    Drains,
    TooLate,
    /// A request needs the connection slot.
    GivesWay,
}

impl Connection {
    /// Waits for the first bytes of the client, or of either side where the server may send first.
    pub(super) async fn first<S>(
        &self,
        detector: &mut Detector,
        stream: &mut S,
        Plain { destination, mtls, is_negotiated }: Plain<'_>,
    ) -> Result<First, ConnectionError>
    where
        S: AsyncRead + Unpin,
    {
        let may_be_server = |destination: &&Rc<LocalCluster>| {
            mtls != Mtls::Strict && self.byte_rules(destination, is_negotiated).may_be_server_first()
        };
        let mut draining = pin!(self.draining());
        let Some(destination) = destination.filter(may_be_server) else {
            return tokio::select! {
                biased;
                detected = detector.spoken(stream) => Ok(First::Client(detected?)),
                () = draining => Ok(First::Nobody),
                () = sleep(HEADER_TIMEOUT) => Err(NO_BYTE),
            };
        };
        let silence = match (is_negotiated, self.redirected_to) {
            (true, _) => Duration::ZERO,
            (false, Some(_)) => redirected::SILENCE,
            (false, None) => SILENCE,
        };
        let idle = destination.cluster.settings.policy.tunnel_idle_timeout.limit();
        let limit = idle.map_or(HEADER_TIMEOUT, |idle| idle.min(HEADER_TIMEOUT));
        let mut too_late = pin!(sleep(limit));
        let dialled = tokio::select! {
            biased;
            detected = detector.spoken(stream) => return Ok(First::Client(detected?)),
            () = &mut draining => return Ok(First::Nobody),
            dialled = async {
                sleep(silence).await;
                Box::pin(connect::dial(self, destination)).await
            } => dialled,
        };
        let (io, in_use) = match dialled {
            Ok(dialled) => dialled,
            // A client that sends HTTP late still gets an error response.
            Err(error) => {
                return tokio::select! {
                    biased;
                    detected = detector.spoken(stream) => match detected {
                        Ok(detected @ (Spoken::Http1 | Spoken::H2 | Spoken::Tls)) => Ok(First::Client(detected)),
                        _ => Err(error.into()),
                    },
                    () = draining => Ok(First::Nobody),
                    () = too_late => Err(error.into()),
                };
            }
        };
        let server = Server { io, in_use, said: Bytes::new() };
        let ended = async {
            tokio::select! {
                () = &mut draining => Ended::Drains,
                () = &mut too_late => Ended::TooLate,
            }
        };
        first_of(detector, stream, server, ended).await
    }
}

impl Connection {
    /// Waits until the process drains, and a moment longer, so that a client that has just connected can send its
    /// request. Nothing else closes a connection that has sent nothing: before the TLS handshake there is no identity
    /// to check.
    pub(super) async fn draining(&self) {
        self.reached(drain_phase(&self.side)).await;
        sleep(LAST_CALL).await;
    }
}

/// Waits until the client or the server has sent something, or `ended` is ready. The connection to the server is closed
/// while neither has, if a request needs its connection slot.
pub(super) async fn first_of<S>(
    detector: &mut Detector,
    stream: &mut S,
    mut server: Server,
    ended: impl Future<Output = Ended>,
) -> Result<First, ConnectionError>
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
            detected = detector.spoken(stream) => {
                let detected = detected?;
                if detected == Spoken::Nothing {
                    // The client has closed.
                    return Ok(First::Client(detected));
                }
                server.said = received.freeze();
                return Ok(First::ClientDialled(detected, Box::new(server)));
            }
            count = read => {
                let is_http = match count? {
                    0 => Some(false),
                    _ => server_speaks_http(&received),
                };
                match is_http {
                    Some(true) => return Ok(First::HttpServer),
                    Some(false) => {
                        server.said = received.freeze();
                        return Ok(First::Server(Box::new(server)));
                    }
                    None => {}
                }
            }
            () = server.in_use.is_wanted() => break Ended::GivesWay,
            ended = &mut ended => break ended,
        }
    };
    match outcome {
        Ended::Drains => Ok(First::Nobody),
        Ended::TooLate => Err(NO_BYTE_FROM_EITHER),
        Ended::GivesWay => {
            drop(server);
            tokio::select! {
                detected = detector.spoken(stream) => Ok(First::Client(detected?)),
                ended = ended => match ended {
                    Ended::TooLate => Err(NO_BYTE_FROM_EITHER),
                    Ended::Drains | Ended::GivesWay => Ok(First::Nobody),
                },
            }
        }
    }
}
