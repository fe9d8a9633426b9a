//! What a caller speaks decides how it is served: HTTP call by call, anything else as bytes, where those may pass.

use std::{future::pending, rc::Rc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, header::CONNECTION};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::{Instant, sleep, timeout},
};

use super::{
    Connection, ConnectionError, DISTRUSTED, HEADER_TIMEOUT,
    first::{Ended, First, NO_BYTE, Server, first_of},
};
use crate::{
    config::{Mtls, Protocol},
    http1::head::{write_field, write_fields, write_status_line},
    model::{LocalCluster, Side},
    net::io::{Io, Prefixed},
    proxy::{
        authorize,
        body::ResponseBody,
        connect::{self, Dialled},
        detect::{Detector, RequestWatch, Spoken},
        error::{Context, ProxyError, respond},
        opaque::{ByteRules, Verdict, Why},
        redirected,
        tunnel::{self, relay},
    },
    telemetry::metrics::{Detected, Way},
    upstream::stream::UpstreamIo,
};

/// How long, and how much, is read on after a refusal, so that a reset does not take it away.
const LINGER: Duration = Duration::from_secs(1);
const MOST_LINGERING: usize = 256 * 1024;

/// How a connection is served whose TLS, if any, has ended here.
#[derive(Clone, Copy)]
pub(super) struct Plain<'a> {
    /// Where bytes go that are not HTTP; `None`: nowhere.
    pub behind: Option<&'a Rc<LocalCluster>>,
    pub mtls: Mtls,
    /// The client is a sidecar that opened a byte stream.
    pub agreed: bool,
}

/// How a tunnel of bytes began, for when the configuration changes under it.
#[derive(Clone, Copy, Debug)]
pub(super) struct BegunBytes {
    pub spoken: Spoken,
    /// The client is a sidecar that opened a byte stream.
    pub agreed: bool,
}

impl Default for BegunBytes {
    /// On a port that is declared `tcp` nobody looks at what is spoken.
    fn default() -> Self {
        Self { spoken: Spoken::Other, agreed: false }
    }
}

impl Connection {
    /// Finds out what the caller speaks and serves it: HTTP call by call, anything else as bytes. TLS that is meant for
    /// us is given back, with what has been read of it.
    pub(super) async fn serve_plain<S>(
        self: &Rc<Self>,
        mut stream: S,
        plain: Plain<'_>,
    ) -> Result<Option<(S, Bytes)>, ConnectionError>
    where
        S: AsyncRead + AsyncWrite + Unpin + 'static,
    {
        let Plain { behind, mtls, agreed } = plain;
        let mut detector = Detector::default();
        // Boxed, since what comes after it needs no room for it.
        let first = Box::pin(self.first(&mut detector, &mut stream, plain)).await?;
        let (spoken, server, http_only) = match first {
            // What has begun to come is still served.
            First::Nobody if detector.has_begun() => (detector.spoken(&mut stream).await?, None, false),
            First::Nobody => return Ok(None),
            First::Client(spoken) => (spoken, None, false),
            First::ClientDialled(spoken, server) => (spoken, Some(server), false),
            First::Server(server) => (Spoken::Nothing, Some(server), false),
            First::HttpServer => {
                match Box::pin(self.request_after_greeting(&mut detector, &mut stream)).await? {
                    Some(spoken) => (spoken, None, true),
                    None => return Ok(None),
                }
            }
        };
        if spoken == Spoken::Tls && mtls != Mtls::Off {
            return Ok(Some((stream, detector.into_bytes())));
        }
        match (&server, spoken) {
            (Some(_), Spoken::Nothing) => self.note_detected(Detected::ServerFirst),
            _ => self.note_spoken(spoken),
        }
        let named = match self.outward() {
            Some(original) if spoken == Spoken::Tls => {
                Box::pin(self.by_server_name(&mut detector, &mut stream, original, behind)).await?
            }
            _ => None,
        };
        let begun = detector.into_bytes();
        // Calls have connections of their own.
        let server = server.filter(|_| agreed || !matches!(spoken, Spoken::Http1 | Spoken::H2));
        let served = match (spoken, named.as_ref().or(behind)) {
            (Spoken::Nothing, _) if server.is_none() => Ok(()),
            _ if mtls == Mtls::Strict => Box::pin(self.refuse_plaintext(spoken, stream, begun)).await,
            (Spoken::Http1, _) if !agreed => self.serve_http1(Box::new(stream), begun).await,
            (Spoken::H2, _) if !agreed => Box::pin(self.serve_http2(Prefixed::new(begun, stream))).await,
            (_, Some(behind)) => {
                let rules = self.byte_rules(behind, agreed);
                let verdict = match rules.decide_spoken(spoken) {
                    Verdict::Watched | Verdict::Pass if http_only => Verdict::Refused(Why::HttpServer),
                    verdict => verdict,
                };
                let stream = Prefixed::new(begun, stream);
                // What its greeting names may be another than who was dialled.
                let server = server.filter(|_| named.is_none());
                Box::pin(self.serve_bytes(stream, server, behind, (verdict, BegunBytes { spoken, agreed })))
                    .await
            }
            (_, None) => {
                let error = ProxyError::malformed(self.nowhere().to_string());
                Box::pin(self.refuse_bytes(stream, None, error)).await
            }
        };
        served.map(|()| None)
    }

    /// Waits for the request that a server of HTTP expects, although it spoke first. `None`: the process drains.
    async fn request_after_greeting<S>(
        &self,
        detector: &mut Detector,
        stream: &mut S,
    ) -> Result<Option<Spoken>, ConnectionError>
    where
        S: AsyncRead + Unpin,
    {
        tokio::select! {
            biased;
            spoken = detector.spoken(stream) => Ok(Some(spoken?)),
            () = self.draining() => Ok(None),
            () = sleep(HEADER_TIMEOUT) => Err(NO_BYTE),
        }
    }

    /// Carries bytes, or refuses them.
    async fn serve_bytes<S>(
        &self,
        stream: S,
        server: Option<Box<Server>>,
        behind: &LocalCluster,
        (verdict, begun): (Verdict, BegunBytes),
    ) -> Result<(), ConnectionError>
    where
        S: AsyncRead + AsyncWrite + Unpin + 'static,
    {
        let watch = match verdict {
            Verdict::Refused(why) => {
                let error = ProxyError::malformed(format!("{why}; {}", self.remedy()));
                return self.refuse_bytes(stream, Some(behind), error).await;
            }
            Verdict::Watched => RequestWatch::default(),
            Verdict::Pass => RequestWatch::off(),
        };
        if let Some(server) = server {
            let Server { io, in_use: _in_use, said } = *server;
            return self.carry(stream, Prefixed::new(said, io), behind, (watch, begun)).await;
        }
        let bare = self.outward().is_some() && begun.spoken == Spoken::Tls && redirected::is_simple(behind);
        let (upstream, _in_use) = match bare {
            true => Box::pin(connect::dial_bare(self, behind)).await?,
            false => Box::pin(connect::dial(self, behind)).await?,
        };
        self.carry(stream, upstream, behind, (watch, begun)).await
    }

    /// What holds for bytes on this connection.
    pub(super) fn byte_rules(&self, behind: &LocalCluster, agreed: bool) -> ByteRules {
        let view = self.worker.view();
        let config = &view.snapshot.config;
        let policy = || behind.cluster.request_policy(&config.runtime.observe);
        let request_policy = match &self.side {
            Side::Inbound => view.snapshot.inbound_request_policy().or_else(policy),
            // By CONNECT other bytes get connect, limit and idle policy only (product contract, 4.2).
            Side::Outbound if self.tunnel_to.is_some() => None,
            Side::Upstream(_) | Side::Outbound => policy(),
        };
        ByteRules {
            protocol: behind.cluster.settings.protocol,
            agreed,
            peer_identity: self.side == Side::Inbound && self.peer_identity.is_some(),
            request_policy,
            own_tls: self.side == Side::Outbound,
        }
    }

    /// What to write so that bytes pass.
    pub(super) fn remedy(&self) -> String {
        match &self.side {
            Side::Inbound => {
                let config = &self.worker.view().snapshot.config;
                let port = self.redirected_to.map_or(config.inbound.forward_to.port, |to| to.port());
                format!(
                    "`protocol = \"tcp\"` in an `[[inbound.port]]` with `port = {port}` lets them pass unread"
                )
            }
            Side::Upstream(_) | Side::Outbound => {
                "`protocol = \"tcp\"` in the `[[upstream]]` lets them pass unread".to_owned()
            }
        }
    }

    /// Answers bytes that may not pass with 400, and closes.
    async fn refuse_bytes<S>(
        &self,
        mut stream: S,
        behind: Option<&LocalCluster>,
        error: ProxyError,
    ) -> Result<(), ConnectionError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        if let Some(behind) = behind {
            behind.upstream.shared.guards.counts.rejected.add(error.cause.word());
        }
        // Repetitions are held back by the log.
        tracing::warn!(peer = ?self.peer, "a connection was refused: {}", error.detail);
        let view = self.worker.view();
        let response = respond(&error, &Context { deployment: &view.names.deployment, ..Context::default() });
        let (mut parts, body) = response.into_parts();
        parts.headers.insert(CONNECTION, HeaderValue::from_static("close"));
        let body = match body {
            ResponseBody::Whole(Some(body)) => body,
            _ => Bytes::new(),
        };
        let mut out = Vec::with_capacity(512 + body.len());
        write_status_line(&mut out, parts.status, http::Version::HTTP_11, None);
        write_fields(&mut out, &parts.headers, None);
        write_field(&mut out, b"content-length", body.len().to_string().as_bytes());
        out.extend_from_slice(b"\r\n");
        out.extend_from_slice(&body);
        let said = async {
            stream.write_all(&out).await?;
            stream.shutdown().await?;
            tokio::io::copy(&mut stream.take(MOST_LINGERING as u64), &mut tokio::io::sink()).await
        };
        // Whoever does not read on or hang up is not waited for.
        let _ = timeout(LINGER, said).await;
        Ok(())
    }

    pub(super) async fn carry<S, U>(
        &self,
        stream: S,
        upstream: U,
        to: &LocalCluster,
        (watch, begun): (RequestWatch, BegunBytes),
    ) -> Result<(), ConnectionError>
    where
        S: AsyncRead + AsyncWrite + Unpin + 'static,
        U: AsyncRead + AsyncWrite + Unpin + 'static,
    {
        if self.side == Side::Inbound {
            // It may have been silent while the configuration changed.
            if let Some(why) = self.refusal_by_now() {
                return Err(why);
            }
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
        let relayed = relay(stream, upstream, watch, policy.tunnel_idle_timeout.limit(), over_at);
        let ended = tokio::select! {
            ended = relayed => ended,
            error = Box::pin(self.no_longer_allowed(begun)) => return Err(error),
            () = Box::pin(self.stream_distrusted()) => return Err(DISTRUSTED),
        };
        match ended {
            tunnel::End::Closed(result) => Ok(result.map(drop)?),
            tunnel::End::Idle => Err(ConnectionError::Cut("nothing moved for tunnel_idle_timeout")),
            tunnel::End::Over => Err(ConnectionError::Cut("max_duration is over")),
            tunnel::End::Request(error) => {
                to.upstream.shared.guards.counts.rejected.add("malformed");
                tracing::warn!(peer = ?self.peer, "a connection was cut: {error}; {}", self.remedy());
                Err(ConnectionError::Cut("a request was hidden in bytes"))
            }
        }
    }

    /// Serves what came through a CONNECT tunnel; bytes go to the server that was dialled for it. `None`: it takes no
    /// byte streams. Calls have connections of their own.
    pub async fn serve_tunnel(
        self: &Rc<Self>,
        mut stream: Box<dyn Io>,
        dialled: Option<(UpstreamIo, Dialled)>,
        to: &LocalCluster,
    ) -> Result<(), ConnectionError> {
        let mut detector = Detector::default();
        let idle = to.cluster.settings.policy.tunnel_idle_timeout.limit();
        let ended = async {
            let too_late = async {
                match idle {
                    Some(limit) => sleep(limit).await,
                    None => pending().await,
                }
            };
            tokio::select! {
                () = self.draining() => Ended::Drains,
                () = too_late => Ended::TooLate,
            }
        };
        let mut takes_bytes = dialled.is_some();
        let first = match dialled {
            Some((io, in_use)) => {
                let server = Server { io, in_use, said: Bytes::new() };
                Box::pin(first_of(&mut detector, &mut stream, server, ended)).await?
            }
            None => tokio::select! {
                spoken = detector.spoken(&mut stream) => First::Client(spoken?),
                ended = ended => match ended {
                    Ended::TooLate => return Err(NO_BYTE),
                    Ended::Drains | Ended::GivesWay => First::Nobody,
                },
            },
        };
        let (spoken, server) = match first {
            First::Nobody => return Ok(()),
            First::Client(spoken) => (spoken, None),
            First::ClientDialled(spoken, server) => (spoken, Some(server)),
            First::Server(server) => (Spoken::Nothing, Some(server)),
            First::HttpServer => {
                takes_bytes = false;
                match Box::pin(self.request_after_greeting(&mut detector, &mut stream)).await? {
                    Some(spoken) => (spoken, None),
                    None => return Ok(()),
                }
            }
        };
        let begun = detector.into_bytes();
        match spoken {
            Spoken::Nothing if server.is_none() => Ok(()),
            Spoken::Http1 | Spoken::H2 if to.cluster.settings.protocol != Protocol::Tcp => {
                drop(server);
                match spoken {
                    Spoken::H2 => Box::pin(self.serve_http2(Prefixed::new(begun, stream))).await,
                    _ => self.serve_http1(stream, begun).await,
                }
            }
            _ => {
                let verdict = match self.byte_rules(to, false).decide_spoken(spoken) {
                    Verdict::Watched if !takes_bytes => Verdict::Refused(Why::HttpServer),
                    verdict => verdict,
                };
                let stream = Prefixed::new(begun, stream);
                Box::pin(self.serve_bytes(
                    stream,
                    server,
                    to,
                    (verdict, BegunBytes { spoken, agreed: false }),
                ))
                .await
            }
        }
    }
}
