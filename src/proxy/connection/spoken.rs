//! Serves a connection by the protocol of its first bytes: HTTP request by request, anything else as a byte stream
//! where that is allowed.

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

/// How long, and how many bytes, are read and dropped after a refusal: closing with unread bytes could destroy it.
const LINGER_TIMEOUT: Duration = Duration::from_secs(1);
const MAX_LINGER_BYTES: usize = 256 * 1024;

/// How to serve a connection whose TLS, if any, was terminated here.
#[derive(Clone, Copy)]
pub(super) struct Plain<'a> {
    /// The destination of bytes that are not HTTP; `None`: there is none.
    pub destination: Option<&'a Rc<LocalCluster>>,
    pub mtls: Mtls,
    /// The client is a sidecar that negotiated a byte stream by ALPN.
    pub is_negotiated: bool,
}

/// How a byte stream began, to check it again when the configuration changes.
#[derive(Clone, Copy, Debug)]
pub(super) struct BegunBytes {
    pub detected: Spoken,
    /// The client is a sidecar that negotiated a byte stream by ALPN.
    pub is_negotiated: bool,
}

impl Default for BegunBytes {
    /// The protocol is not detected on a port that is declared `tcp`.
    fn default() -> Self {
        Self { detected: Spoken::Other, is_negotiated: false }
    }
}

impl Connection {
    /// Detects the client's protocol and serves it: HTTP request by request, anything else as a byte stream. TLS that
    /// is to be terminated here is returned, with the bytes that were read.
    pub(super) async fn serve_plain<S>(
        self: &Rc<Self>,
        mut stream: S,
        plain: Plain<'_>,
    ) -> Result<Option<(S, Bytes)>, ConnectionError>
    where
        S: AsyncRead + AsyncWrite + Unpin + 'static,
    {
        let Plain { destination, mtls, is_negotiated } = plain;
        let mut detector = Detector::default();
        // Boxed, so that its memory is freed before the connection is served.
        let first = Box::pin(self.first(&mut detector, &mut stream, plain)).await?;
        let (detected, server, http_only) = match first {
            // A request that has begun to arrive is still served.
            First::Nobody if detector.has_begun() => (detector.spoken(&mut stream).await?, None, false),
            First::Nobody => return Ok(None),
            First::Client(detected) => (detected, None, false),
            First::ClientDialled(detected, server) => (detected, Some(server), false),
            First::Server(server) => (Spoken::Nothing, Some(server), false),
            First::HttpServer => {
                match Box::pin(self.request_after_greeting(&mut detector, &mut stream)).await? {
                    Some(detected) => (detected, None, true),
                    None => return Ok(None),
                }
            }
        };
        if detected == Spoken::Tls && mtls != Mtls::Off {
            return Ok(Some((stream, detector.into_bytes())));
        }
        match (&server, detected) {
            (Some(_), Spoken::Nothing) => self.note_detected(Detected::ServerFirst),
            _ => self.note_spoken(detected),
        }
        let named = match self.outward() {
            Some(original) if detected == Spoken::Tls => {
                Box::pin(self.by_server_name(&mut detector, &mut stream, original, destination)).await?
            }
            _ => None,
        };
        let read_ahead = detector.into_bytes();
        // Requests use pooled connections instead.
        let server = server.filter(|_| is_negotiated || !matches!(detected, Spoken::Http1 | Spoken::H2));
        let served = match (detected, named.as_ref().or(destination)) {
            (Spoken::Nothing, _) if server.is_none() => Ok(()),
            _ if mtls == Mtls::Strict => Box::pin(self.refuse_plaintext(detected, stream, read_ahead)).await,
            (Spoken::Http1, _) if !is_negotiated => self.serve_http1(Box::new(stream), read_ahead).await,
            (Spoken::H2, _) if !is_negotiated => {
                Box::pin(self.serve_http2(Prefixed::new(read_ahead, stream))).await
            }
            (_, Some(destination)) => {
                let rules = self.byte_rules(destination, is_negotiated);
                let verdict = match rules.decide_spoken(detected) {
                    Verdict::Watched | Verdict::Pass if http_only => Verdict::Refused(Why::HttpServer),
                    verdict => verdict,
                };
                let stream = Prefixed::new(read_ahead, stream);
                // The SNI may name another upstream than the one that was dialled.
                let server = server.filter(|_| named.is_none());
                Box::pin(self.serve_byte_stream(
                    stream,
                    server,
                    destination,
                    (verdict, BegunBytes { detected, is_negotiated }),
                ))
                .await
            }
            (_, None) => {
                let error = ProxyError::malformed(self.nowhere().to_string());
                Box::pin(self.refuse_byte_stream(stream, None, error)).await
            }
        };
        served.map(|()| None)
    }

    /// Waits for a request after an HTTP server has sent first. `None`: the process drains.
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
            detected = detector.spoken(stream) => Ok(Some(detected?)),
            () = self.draining() => Ok(None),
            () = sleep(HEADER_TIMEOUT) => Err(NO_BYTE),
        }
    }

    /// Relays a byte stream, or refuses it.
    async fn serve_byte_stream<S>(
        &self,
        stream: S,
        server: Option<Box<Server>>,
        destination: &LocalCluster,
        (verdict, origin): (Verdict, BegunBytes),
    ) -> Result<(), ConnectionError>
    where
        S: AsyncRead + AsyncWrite + Unpin + 'static,
    {
        let watch = match verdict {
            Verdict::Refused(why) => {
                let error = ProxyError::malformed(format!("{why}; {}", self.remedy()));
                return self.refuse_byte_stream(stream, Some(destination), error).await;
            }
            Verdict::Watched => RequestWatch::default(),
            Verdict::Pass => RequestWatch::off(),
        };
        if let Some(server) = server {
            let Server { io, in_use: _in_use, said } = *server;
            return self.carry(stream, Prefixed::new(said, io), destination, (watch, origin)).await;
        }
        let bare =
            self.outward().is_some() && origin.detected == Spoken::Tls && redirected::is_simple(destination);
        let (upstream, _in_use) = match bare {
            true => Box::pin(connect::dial_bare(self, destination)).await?,
            false => Box::pin(connect::dial(self, destination)).await?,
        };
        self.carry(stream, upstream, destination, (watch, origin)).await
    }

    /// The rules for byte streams on this connection.
    pub(super) fn byte_rules(&self, destination: &LocalCluster, is_negotiated: bool) -> ByteRules {
        let view = self.worker.view();
        let config = &view.snapshot.config;
        let policy = || destination.cluster.request_policy(&config.runtime.observe);
        let request_policy = match &self.side {
            Side::Inbound => view.snapshot.inbound_request_policy().or_else(policy),
            // Byte streams inside CONNECT get connect, limit and idle policy only (product contract, 4.2).
            Side::Outbound if self.tunnel_to.is_some() => None,
            Side::Upstream(_) | Side::Outbound => policy(),
        };
        ByteRules {
            protocol: destination.cluster.settings.protocol,
            is_negotiated,
            peer_identity: self.side == Side::Inbound && self.peer_identity.is_some(),
            request_policy,
            own_tls: self.side == Side::Outbound,
        }
    }

    /// The configuration that lets byte streams pass, for messages.
    pub(super) fn remedy(&self) -> String {
        match &self.side {
            Side::Inbound => {
                let config = &self.worker.view().snapshot.config;
                let port = self.redirected_to.map_or(config.inbound.forward_to.port, |to| to.port());
                format!(
                    "`protocol = \"tcp\"` in an `[[inbound.port]]` with `port = {port}` lets byte streams pass"
                )
            }
            Side::Upstream(_) | Side::Outbound => {
                "`protocol = \"tcp\"` in the `[[upstream]]` lets byte streams pass".to_owned()
            }
        }
    }

    /// Refuses a byte stream with a 400 response, and closes.
    async fn refuse_byte_stream<S>(
        &self,
        mut stream: S,
        destination: Option<&LocalCluster>,
        error: ProxyError,
    ) -> Result<(), ConnectionError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        if let Some(destination) = destination {
            destination.upstream.shared.guards.counts.rejected.add(error.cause.word());
        }
        // The log suppresses repetitions.
        tracing::warn!(peer = ?self.peer, "byte stream refused: {}", error.detail);
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
        let send = async {
            stream.write_all(&out).await?;
            stream.shutdown().await?;
            tokio::io::copy(&mut stream.take(MAX_LINGER_BYTES as u64), &mut tokio::io::sink()).await
        };
        // A client that neither reads nor closes is not waited for.
        let _ = timeout(LINGER_TIMEOUT, send).await;
        Ok(())
    }

    pub(super) async fn carry<S, U>(
        &self,
        stream: S,
        upstream: U,
        to: &LocalCluster,
        (watch, origin): (RequestWatch, BegunBytes),
    ) -> Result<(), ConnectionError>
    where
        S: AsyncRead + AsyncWrite + Unpin + 'static,
        U: AsyncRead + AsyncWrite + Unpin + 'static,
    {
        if self.side == Side::Inbound {
            // The configuration may have changed while the connection was silent.
            if let Some(why) = self.refusal_by_now() {
                return Err(why);
            }
            authorize::bytes(self, &self.worker.view(), to)?;
        }
        // A byte stream inside CONNECT was counted with its request.
        let entry_point = match &self.side {
            Side::Inbound => Some(Way::Inbound),
            Side::Upstream(_) => Some(Way::Listen),
            Side::Outbound => self.redirected_to.map(|_| Way::Redirect),
        };
        if let Some(entry_point) = entry_point {
            self.worker.shared.metrics.ways.note(entry_point, Instant::now().into_std());
        }
        let policy = &to.cluster.settings.policy;
        let over_at = policy.max_duration.limit().map(|limit| Instant::now() + limit);
        let relayed = relay(stream, upstream, watch, policy.tunnel_idle_timeout.limit(), over_at);
        let ended = tokio::select! {
            ended = relayed => ended,
            error = Box::pin(self.no_longer_allowed(origin)) => return Err(error),
            () = Box::pin(self.stream_distrusted()) => return Err(DISTRUSTED),
        };
        match ended {
            tunnel::End::Closed(result) => Ok(result.map(drop)?),
            tunnel::End::Idle => Err(ConnectionError::Cut("no byte moved for tunnel_idle_timeout")),
            tunnel::End::Over => Err(ConnectionError::Cut("max_duration has elapsed")),
            tunnel::End::Request(error) => {
                to.upstream.shared.guards.counts.rejected.add("malformed");
                tracing::warn!(peer = ?self.peer, "byte stream cut: {error}; {}", self.remedy());
                Err(ConnectionError::Cut("the byte stream could be read as an HTTP request"))
            }
        }
    }

    /// Serves the inside of a CONNECT tunnel. A byte stream goes to the server that was dialled (`None`: it accepts no
    /// byte streams), requests use pooled connections.
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
                detected = detector.spoken(&mut stream) => First::Client(detected?),
                ended = ended => match ended {
                    Ended::TooLate => return Err(NO_BYTE),
                    Ended::Drains | Ended::GivesWay => First::Nobody,
                },
            },
        };
        let (detected, server) = match first {
            First::Nobody => return Ok(()),
            First::Client(detected) => (detected, None),
            First::ClientDialled(detected, server) => (detected, Some(server)),
            First::Server(server) => (Spoken::Nothing, Some(server)),
            First::HttpServer => {
                takes_bytes = false;
                match Box::pin(self.request_after_greeting(&mut detector, &mut stream)).await? {
                    Some(detected) => (detected, None),
                    None => return Ok(()),
                }
            }
        };
        let read_ahead = detector.into_bytes();
        match detected {
            Spoken::Nothing if server.is_none() => Ok(()),
            Spoken::Http1 | Spoken::H2 if to.cluster.settings.protocol != Protocol::Tcp => {
                drop(server);
                match detected {
                    Spoken::H2 => Box::pin(self.serve_http2(Prefixed::new(read_ahead, stream))).await,
                    _ => self.serve_http1(stream, read_ahead).await,
                }
            }
            _ => {
                let verdict = match self.byte_rules(to, false).decide_spoken(detected) {
                    Verdict::Watched if !takes_bytes => Verdict::Refused(Why::HttpServer),
                    verdict => verdict,
                };
                let stream = Prefixed::new(read_ahead, stream);
                Box::pin(self.serve_byte_stream(
                    stream,
                    server,
                    to,
                    (verdict, BegunBytes { detected, is_negotiated: false }),
                ))
                .await
            }
        }
    }
}
