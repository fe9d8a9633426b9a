//! Who is the first to speak on a connection: as a rule the client, in some protocols the server.

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

/// A client that sends nothing for this long may be waiting for the server to speak first.
const SILENCE: Duration = Duration::from_millis(100);
/// Enough of what a server says first to see whether it is HTTP.
const FIRST_ANSWER: usize = 1024;

const SILENT: ConnectionError = ConnectionError::Cut("neither side has sent a byte in time");
pub(super) const NO_BYTE: ConnectionError = ConnectionError::Cut("the client sent no byte in time");

/// Who spoke first on a connection, and what.
pub(super) enum First {
    Client(Spoken),
    /// The client, and this connection waits for its bytes.
    ClientDialled(Spoken, Box<Server>),
    /// The server, something that is not HTTP.
    Server(Box<Server>),
    /// The server, HTTP: it expects requests.
    HttpServer,
    /// The process drains.
    Nobody,
}

/// A connection to a server, opened for bytes. Boxed where it is handed on: a connection holds as much as its largest
/// moment.
pub(super) struct Server {
    pub io: UpstreamIo,
    pub in_use: Dialled,
    /// What it has said already.
    pub said: Bytes,
}

/// Why nobody is waited for any more.
pub(super) enum Ended {
    Drains,
    TooLate,
    /// A request needs the connection slot.
    GivesWay,
}

impl Connection {
    /// Waits for the client's first bytes; where the server may be the one to speak first, for either's.
    pub(super) async fn first<S>(
        &self,
        detector: &mut Detector,
        stream: &mut S,
        Plain { behind, mtls, agreed }: Plain<'_>,
    ) -> Result<First, ConnectionError>
    where
        S: AsyncRead + Unpin,
    {
        let may_be_server = |behind: &&Rc<LocalCluster>| {
            mtls != Mtls::Strict && self.byte_rules(behind, agreed).may_be_server_first()
        };
        let mut leaving = pin!(self.draining());
        let Some(behind) = behind.filter(may_be_server) else {
            return tokio::select! {
                biased;
                spoken = detector.spoken(stream) => Ok(First::Client(spoken?)),
                () = leaving => Ok(First::Nobody),
                () = sleep(HEADER_TIMEOUT) => Err(NO_BYTE),
            };
        };
        let silence = match (agreed, self.redirected_to) {
            (true, _) => Duration::ZERO,
            (false, Some(_)) => redirected::SILENCE,
            (false, None) => SILENCE,
        };
        let idle = behind.cluster.settings.policy.tunnel_idle_timeout.limit();
        let limit = idle.map_or(HEADER_TIMEOUT, |idle| idle.min(HEADER_TIMEOUT));
        let mut too_late = pin!(sleep(limit));
        let dialled = tokio::select! {
            biased;
            spoken = detector.spoken(stream) => return Ok(First::Client(spoken?)),
            () = &mut leaving => return Ok(First::Nobody),
            dialled = async {
                sleep(silence).await;
                Box::pin(connect::dial(self, behind)).await
            } => dialled,
        };
        let (io, in_use) = match dialled {
            Ok(dialled) => dialled,
            // A caller that speaks HTTP, if a little late, is told in an answer.
            Err(error) => {
                return tokio::select! {
                    biased;
                    spoken = detector.spoken(stream) => match spoken {
                        Ok(spoken @ (Spoken::Http1 | Spoken::H2 | Spoken::Tls)) => Ok(First::Client(spoken)),
                        _ => Err(error.into()),
                    },
                    () = leaving => Ok(First::Nobody),
                    () = too_late => Err(error.into()),
                };
            }
        };
        let server = Server { io, in_use, said: Bytes::new() };
        let ended = async {
            tokio::select! {
                () = &mut leaving => Ended::Drains,
                () = &mut too_late => Ended::TooLate,
            }
        };
        first_of(detector, stream, server, ended).await
    }
}

impl Connection {
    /// Waits until the process has drained for a moment, in which a client that has just connected still sends something.
    /// Nothing else ends a connection on which nothing was sent: before the TLS handshake no client has an identity.
    pub(super) async fn draining(&self) {
        self.reached(drain_phase(&self.side)).await;
        sleep(LAST_CALL).await;
    }
}

/// Waits until the client or the server has spoken, or it `ended`. A server that is connected to in vain gives way
/// where a request needs its connection slot.
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
    let mut said = BytesMut::new();
    let outcome = loop {
        let read = async {
            said.reserve(FIRST_ANSWER);
            server.io.read_buf(&mut said).await
        };
        tokio::select! {
            biased;
            spoken = detector.spoken(stream) => {
                let spoken = spoken?;
                if spoken == Spoken::Nothing {
                    // It has left.
                    return Ok(First::Client(spoken));
                }
                server.said = said.freeze();
                return Ok(First::ClientDialled(spoken, Box::new(server)));
            }
            count = read => {
                let is_http = match count? {
                    0 => Some(false),
                    _ => server_speaks_http(&said),
                };
                match is_http {
                    Some(true) => return Ok(First::HttpServer),
                    Some(false) => {
                        server.said = said.freeze();
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
        Ended::TooLate => Err(SILENT),
        Ended::GivesWay => {
            drop(server);
            tokio::select! {
                spoken = detector.spoken(stream) => Ok(First::Client(spoken?)),
                ended = ended => match ended {
                    Ended::TooLate => Err(SILENT),
                    Ended::Drains | Ended::GivesWay => Ok(First::Nobody),
                },
            }
        }
    }
}
