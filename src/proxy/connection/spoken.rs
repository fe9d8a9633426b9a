//! What a caller speaks decides how it is served: HTTP call by call, anything else as bytes.

use std::{future::pending, rc::Rc, time::Duration};

use bytes::Bytes;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, sleep, timeout},
};

use super::{CALLER_IDLE, Connection, ConnectionError, HEADER_TIMEOUT};
use crate::{
    config::{Mtls, Protocol},
    proxy::{
        accept::Side,
        authorize,
        connect::{self, Dialled},
        detect::{Detector, Spoken},
        io::{Io, Prefixed},
        redirected,
        tunnel::{self, relay},
    },
    runtime::LocalCluster,
    telemetry::metrics::{Detected, Way},
    upstream::stream::UpstreamIo,
};

/// A caller that says nothing for this long may be waiting for the other side to speak first.
const SILENCE: Duration = Duration::from_millis(100);

const SILENT: ConnectionError =
    ConnectionError::Cut("neither side has said anything for tunnel_idle_timeout");

/// Whoever might speak first has not done so for as long as a tunnel may stand still.
async fn silent_for_too_long(to: &LocalCluster) {
    match to.cluster.settings.policy.tunnel_idle_timeout.limit() {
        Some(limit) => sleep(limit).await,
        None => pending().await,
    }
}

impl Connection {
    /// Finds out what the caller speaks and serves it: HTTP call by call, anything else as bytes. TLS that is meant for
    /// us is given back, with what has been read of it.
    pub(super) async fn serve_plain<S>(
        self: &Rc<Self>,
        mut stream: S,
        behind: Option<&Rc<LocalCluster>>,
        mtls: Mtls,
    ) -> Result<Option<(S, Bytes)>, ConnectionError>
    where
        S: AsyncRead + AsyncWrite + Unpin + 'static,
    {
        let mut detector = Detector::default();
        // Boxed, since what comes after it needs no room for it.
        let mut leaving = Box::pin(self.closing());
        let spoken = match behind {
            Some(_) if mtls == Mtls::Strict => tokio::select! {
                spoken = detector.spoken(&mut stream) => spoken?,
                () = &mut leaving => return Ok(None),
                () = sleep(HEADER_TIMEOUT) => return Err(ConnectionError::Cut("the TLS handshake did not begin")),
            },
            None => tokio::select! {
                spoken = detector.spoken(&mut stream) => spoken?,
                () = &mut leaving => return Ok(None),
                () = sleep(CALLER_IDLE) => return Err(ConnectionError::Cut("idle")),
            },
            Some(behind) => {
                let silence = if self.redirected_to.is_some() { redirected::SILENCE } else { SILENCE };
                let protocol = behind.cluster.settings.protocol;
                let declared = matches!(protocol, Protocol::Http1 | Protocol::H2);
                tokio::select! {
                    spoken = detector.spoken(&mut stream) => spoken?,
                    // What is declared need not be found out.
                    () = sleep(CALLER_IDLE), if declared => return Err(ConnectionError::Cut("idle")),
                    () = sleep(silence), if !declared => {
                        // Perhaps the service is the one to speak first. Whichever does decides.
                        match Box::pin(connect::dial(self, behind)).await {
                            Ok((mut upstream, _in_use)) => {
                                let spoken = tokio::select! {
                                    biased;
                                    spoken = detector.spoken(&mut stream) => Some(spoken?),
                                    ready = upstream.readable() => { ready?; None }
                                    () = &mut leaving => return Ok(None),
                                    () = silent_for_too_long(behind) => return Err(SILENT),
                                };
                                match spoken {
                                    // Whom the greeting names may be another.
                                    Some(Spoken::Tls) if mtls != Mtls::Off || self.outward().is_some() => {
                                        Spoken::Tls
                                    }
                                    Some(Spoken::Http1 | Spoken::H2) => spoken.unwrap_or(Spoken::Nothing),
                                    Some(Spoken::Nothing) => return Ok(None),
                                    Some(Spoken::Other | Spoken::Tls) | None => {
                                        self.note_detected(match spoken {
                                            Some(Spoken::Tls) => Detected::Tls,
                                            Some(_) => Detected::Bytes,
                                            None => Detected::ServerFirst,
                                        });
                                        let stream = Prefixed::new(detector.into_bytes(), stream);
                                        let carried = Box::pin(self.carry(stream, upstream, behind)).await;
                                        return carried.map(|()| None);
                                    }
                                }
                            }
                            // A caller that speaks HTTP, if a little late, is told in an answer.
                            Err(error) => match timeout(HEADER_TIMEOUT, detector.spoken(&mut stream)).await {
                                Ok(Ok(spoken @ (Spoken::Http1 | Spoken::H2))) => spoken,
                                Ok(Ok(Spoken::Tls)) if mtls != Mtls::Off || self.outward().is_some() => Spoken::Tls,
                                _ => return Err(error.into()),
                            },
                        }
                    }
                }
            }
        };
        drop(leaving);
        if spoken == Spoken::Tls && mtls != Mtls::Off {
            return Ok(Some((stream, detector.into_bytes())));
        }
        self.note_spoken(spoken);
        let named = match self.outward() {
            Some(original) if spoken == Spoken::Tls => {
                Box::pin(self.by_server_name(&mut detector, &mut stream, original, behind)).await?
            }
            _ => None,
        };
        let begun = detector.into_bytes();
        let served = match (spoken, named.as_ref().or(behind)) {
            (Spoken::Nothing, _) => Ok(()),
            _ if mtls == Mtls::Strict => Box::pin(self.refuse_plaintext(spoken, stream, begun)).await,
            (Spoken::Http1, _) => self.serve_http1(Box::new(stream), begun).await,
            (Spoken::H2, _) => Box::pin(self.serve_http2(Prefixed::new(begun, stream))).await,
            (Spoken::Other | Spoken::Tls, Some(behind)) => {
                let bare = self.outward().is_some() && spoken == Spoken::Tls && redirected::is_simple(behind);
                let (upstream, _in_use) = match bare {
                    true => Box::pin(connect::dial_bare(self, behind)).await?,
                    false => Box::pin(connect::dial(self, behind)).await?,
                };
                Box::pin(self.carry(Prefixed::new(begun, stream), upstream, behind)).await
            }
            (Spoken::Other | Spoken::Tls, None) => Err(self.nowhere()),
        };
        served.map(|()| None)
    }

    pub(super) async fn carry<S>(
        &self,
        stream: S,
        upstream: UpstreamIo,
        to: &LocalCluster,
    ) -> Result<(), ConnectionError>
    where
        S: AsyncRead + AsyncWrite + Unpin + 'static,
    {
        if self.side == Side::Inbound {
            authorize::bytes(self, &self.worker.view(), to)?;
        }
        // What a CONNECT led to has been counted with it.
        let way = match &self.side {
            Side::Inbound => Some(Way::Inbound),
            Side::Upstream(_) => Some(Way::Listen),
            Side::Outbound => self.redirected_to.map(|_| Way::Redirect),
        };
        if let Some(way) = way {
            self.worker.shared.metrics.ways.note(way, Instant::now().into_std());
        }
        let policy = &to.cluster.settings.policy;
        let over_at = policy.max_duration.limit().map(|limit| Instant::now() + limit);
        let relayed = relay(stream, upstream, policy.tunnel_idle_timeout.limit(), over_at);
        let ended = tokio::select! {
            ended = relayed => ended,
            error = Box::pin(self.no_longer_allowed()) => return Err(error),
        };
        match ended {
            tunnel::End::Closed(result) => Ok(result.map(drop)?),
            tunnel::End::Idle => Err(ConnectionError::Cut("nothing moved for tunnel_idle_timeout")),
            tunnel::End::Over => Err(ConnectionError::Cut("max_duration is over")),
        }
    }

    /// Serves what came through a CONNECT tunnel; bytes go to `upstream`, which is connected already. Calls have
    /// connections of their own.
    pub async fn serve_tunnel(
        self: &Rc<Self>,
        mut stream: Box<dyn Io>,
        (mut upstream, in_use): (UpstreamIo, Dialled),
        to: &LocalCluster,
    ) -> Result<(), ConnectionError> {
        let mut detector = Detector::default();
        let spoken = tokio::select! {
            biased;
            spoken = detector.spoken(&mut stream) => spoken?,
            // The server speaks first: mail, databases.
            ready = upstream.readable() => { ready?; Spoken::Other }
            () = silent_for_too_long(to) => return Err(SILENT),
        };
        let begun = detector.into_bytes();
        match spoken {
            Spoken::Http1 => {
                drop((upstream, in_use));
                self.serve_http1(stream, begun).await
            }
            Spoken::H2 => {
                drop((upstream, in_use));
                Box::pin(self.serve_http2(Prefixed::new(begun, stream))).await
            }
            Spoken::Other | Spoken::Tls => {
                Box::pin(self.carry(Prefixed::new(begun, stream), upstream, to)).await
            }
            Spoken::Nothing => Ok(()),
        }
    }
}
