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
    Connection, ConnectionError, HEADER_TIMEOUT, PEER_REVOKED,
    first_bytes::{DialledServer, FirstBytes, NO_BYTE, WaitOutcome, wait_for_either_side},
};
use crate::{
    config::{Mtls, Protocol},
    http1::head::{write_field, write_fields, write_status_line},
    model::{Side, WorkerCluster},
    net::io::{Io, Prefixed},
    proxy::{
        authorize,
        body::ResponseBody,
        detect::{DetectedProtocol, Detector, RequestWatch},
        dial::{self, ByteStreamGuard},
        error::{ErrorContext, ProxyError, respond},
        opaque::{ByteStreamRefusal, ByteStreamRules, ByteStreamVerdict},
        redirection,
        tunnel::{self, relay},
    },
    telemetry::metrics::{DetectionOutcome, EntryPoint},
    upstream::stream::UpstreamIo,
};

/// How long, and how many bytes, are read and dropped after a refusal: closing with unread bytes could destroy it.
const LINGER_TIMEOUT: Duration = Duration::from_secs(1);
const MAX_LINGER_BYTES: usize = 256 * 1024;

/// How to serve a connection whose TLS, if any, was terminated here.
#[derive(Clone, Copy)]
pub(super) struct PlaintextOptions<'a> {
    /// The destination of bytes that are not HTTP; `None`: there is none.
    pub destination: Option<&'a Rc<WorkerCluster>>,
    pub mtls: Mtls,
    /// The client is a sidecar that negotiated a byte stream by ALPN.
    pub is_negotiated: bool,
}

/// How a byte stream began, to check it again when the configuration changes.
#[derive(Clone, Copy, Debug)]
pub(super) struct ByteStreamOrigin {
    pub detected: DetectedProtocol,
    /// The client is a sidecar that negotiated a byte stream by ALPN.
    pub is_negotiated: bool,
}

impl Default for ByteStreamOrigin {
    /// The protocol is not detected on a port that is declared `tcp`.
    fn default() -> Self {
        Self { detected: DetectedProtocol::Other, is_negotiated: false }
    }
}

impl Connection {
    /// Detects the client's protocol and serves it: HTTP request by request, anything else as a byte stream. TLS that
    /// is to be terminated here is returned, with the bytes that were read.
    pub(super) async fn serve_plain<S>(
        self: &Rc<Self>,
        mut stream: S,
        plain: PlaintextOptions<'_>,
    ) -> Result<Option<(S, Bytes)>, ConnectionError>
    where
        S: AsyncRead + AsyncWrite + Unpin + 'static,
    {
        let PlaintextOptions { destination, mtls, is_negotiated } = plain;
        let mut detector = Detector::default();
        // Boxed, so that its memory is freed before the connection is served.
        let first = Box::pin(self.wait_for_first_bytes(&mut detector, &mut stream, plain)).await?;
        let (detected, server, http_only) = match first {
            // A request that has begun to arrive is still served.
            FirstBytes::Draining if detector.has_bytes() => {
                (detector.detect(&mut stream).await?, None, false)
            }
            FirstBytes::Draining => return Ok(None),
            FirstBytes::Client(detected) => (detected, None, false),
            FirstBytes::ClientAfterDial(detected, server) => (detected, Some(server), false),
            FirstBytes::Server(server) => (DetectedProtocol::Nothing, Some(server), false),
            FirstBytes::HttpServer => {
                match Box::pin(self.request_after_greeting(&mut detector, &mut stream)).await? {
                    Some(detected) => (detected, None, true),
                    None => return Ok(None),
                }
            }
        };
        if detected == DetectedProtocol::Tls && mtls != Mtls::Off {
            return Ok(Some((stream, detector.into_bytes())));
        }
        match (&server, detected) {
            (Some(_), DetectedProtocol::Nothing) => self.note_detected(DetectionOutcome::ServerFirst),
            _ => self.note_protocol(detected),
        }
        let named = match self.outbound_destination() {
            Some(original) if detected == DetectedProtocol::Tls => {
                Box::pin(self.destination_by_server_name(&mut detector, &mut stream, original, destination))
                    .await?
            }
            _ => None,
        };
        let read_ahead = detector.into_bytes();
        // Requests use pooled connections instead.
        let server = server
            .filter(|_| is_negotiated || !matches!(detected, DetectedProtocol::Http1 | DetectedProtocol::H2));
        let served = match (detected, named.as_ref().or(destination)) {
            (DetectedProtocol::Nothing, _) if server.is_none() => Ok(()),
            _ if mtls == Mtls::Strict => Box::pin(self.refuse_plaintext(detected, stream, read_ahead)).await,
            (DetectedProtocol::Http1, _) if !is_negotiated => {
                self.serve_http1(Box::new(stream), read_ahead).await
            }
            (DetectedProtocol::H2, _) if !is_negotiated => {
                Box::pin(self.serve_http2(Prefixed::new(read_ahead, stream))).await
            }
            (_, Some(destination)) => {
                let rules = self.byte_stream_rules(destination, is_negotiated);
                let verdict = match rules.decide(detected) {
                    ByteStreamVerdict::Watched | ByteStreamVerdict::Pass if http_only => {
                        ByteStreamVerdict::Refused(ByteStreamRefusal::HttpServer)
                    }
                    verdict => verdict,
                };
                let stream = Prefixed::new(read_ahead, stream);
                // The SNI may name another upstream than the one that was dialled.
                let server = server.filter(|_| named.is_none());
                Box::pin(self.serve_byte_stream(
                    stream,
                    server,
                    destination,
                    verdict,
                    ByteStreamOrigin { detected, is_negotiated },
                ))
                .await
            }
            (_, None) => {
                let error = ProxyError::malformed(self.no_destination_error().to_string());
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
    ) -> Result<Option<DetectedProtocol>, ConnectionError>
    where
        S: AsyncRead + Unpin,
    {
        tokio::select! {
            biased;
            detected = detector.detect(stream) => Ok(Some(detected?)),
            () = self.wait_for_drain() => Ok(None),
            () = sleep(HEADER_TIMEOUT) => Err(NO_BYTE),
        }
    }

    /// Relays a byte stream, or refuses it.
    async fn serve_byte_stream<S>(
        &self,
        stream: S,
        server: Option<Box<DialledServer>>,
        destination: &WorkerCluster,
        verdict: ByteStreamVerdict,
        origin: ByteStreamOrigin,
    ) -> Result<(), ConnectionError>
    where
        S: AsyncRead + AsyncWrite + Unpin + 'static,
    {
        let watch = match verdict {
            ByteStreamVerdict::Refused(why) => {
                let error = ProxyError::malformed(format!("{why}; {}", self.remedy()));
                return self.refuse_byte_stream(stream, Some(destination), error).await;
            }
            ByteStreamVerdict::Watched => RequestWatch::default(),
            ByteStreamVerdict::Pass => RequestWatch::off(),
        };
        if let Some(server) = server {
            let DialledServer { io, guard: _in_use, received: said } = *server;
            return self.relay_byte_stream(stream, Prefixed::new(said, io), destination, watch, origin).await;
        }
        let bare = self.outbound_destination().is_some()
            && origin.detected == DetectedProtocol::Tls
            && redirection::is_tls_server(destination);
        let (upstream, _in_use) = match bare {
            true => Box::pin(dial::dial_without_tls(self, destination)).await?,
            false => Box::pin(dial::dial(self, destination)).await?,
        };
        self.relay_byte_stream(stream, upstream, destination, watch, origin).await
    }

    /// The rules for byte streams on this connection.
    pub(super) fn byte_stream_rules(
        &self,
        destination: &WorkerCluster,
        is_negotiated: bool,
    ) -> ByteStreamRules {
        let view = self.worker.view();
        let config = &view.snapshot.config;
        let policy = || destination.cluster.request_policy(&config.runtime.observe);
        let request_policy = match &self.side {
            Side::Inbound => view.snapshot.inbound_request_policy().or_else(policy),
            // Byte streams inside CONNECT get connect, limit and idle policy only (product contract, 4.2).
            Side::Outbound if self.tunnel_destination.is_some() => None,
            Side::Upstream(_) | Side::Outbound => policy(),
        };
        ByteStreamRules {
            protocol: destination.cluster.settings.protocol,
            is_negotiated,
            has_peer_identity: self.side == Side::Inbound && self.peer_identity.is_some(),
            request_policy,
            allows_own_tls: self.side == Side::Outbound,
        }
    }

    /// The configuration that lets byte streams pass, for messages.
    pub(super) fn remedy(&self) -> String {
        match &self.side {
            Side::Inbound => {
                let config = &self.worker.view().snapshot.config;
                let port = self.original_destination.map_or(config.inbound.forward_to.port, |to| to.port());
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
        destination: Option<&WorkerCluster>,
        error: ProxyError,
    ) -> Result<(), ConnectionError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        if let Some(destination) = destination {
            destination.upstream.shared.policy_state.counters.rejected.increment(error.cause.word());
        }
        // The log suppresses repetitions.
        tracing::warn!(peer = ?self.peer, "byte stream refused: {}", error.detail);
        let view = self.worker.view();
        let response = respond(
            &error,
            &ErrorContext { deployment: &view.proxy_names.deployment, ..ErrorContext::default() },
        );
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

    pub(super) async fn relay_byte_stream<S, U>(
        &self,
        stream: S,
        upstream: U,
        to: &WorkerCluster,
        watch: RequestWatch,
        origin: ByteStreamOrigin,
    ) -> Result<(), ConnectionError>
    where
        S: AsyncRead + AsyncWrite + Unpin + 'static,
        U: AsyncRead + AsyncWrite + Unpin + 'static,
    {
        if self.side == Side::Inbound {
            // The configuration may have changed while the connection was silent.
            if let Some(why) = self.refusal_by_current_config() {
                return Err(why);
            }
            authorize::check_byte_stream(self, &self.worker.view(), to)?;
        }
        // A byte stream inside CONNECT was counted with its request.
        let entry_point = match &self.side {
            Side::Inbound => Some(EntryPoint::Inbound),
            Side::Upstream(_) => Some(EntryPoint::Listen),
            Side::Outbound => self.original_destination.map(|_| EntryPoint::Redirect),
        };
        if let Some(entry_point) = entry_point {
            self.worker.shared.metrics.entry_points.record(entry_point, Instant::now().into_std());
        }
        let policy = &to.cluster.settings.policy;
        let over_at = policy.max_duration.limit().map(|limit| Instant::now() + limit);
        let relayed = relay(stream, upstream, watch, policy.tunnel_idle_timeout.limit(), over_at);
        let ended = tokio::select! {
            ended = relayed => ended,
            error = Box::pin(self.wait_until_disallowed(origin)) => return Err(error),
            () = Box::pin(self.wait_until_revoked()) => return Err(PEER_REVOKED),
        };
        match ended {
            tunnel::TunnelEnd::Closed(result) => Ok(result.map(drop)?),
            tunnel::TunnelEnd::Idle => Err(ConnectionError::Cut("no byte moved for tunnel_idle_timeout")),
            tunnel::TunnelEnd::MaxDuration => Err(ConnectionError::Cut("max_duration has elapsed")),
            tunnel::TunnelEnd::HiddenRequest(error) => {
                to.upstream.shared.policy_state.counters.rejected.increment("malformed");
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
        dialled: Option<(UpstreamIo, ByteStreamGuard)>,
        to: &WorkerCluster,
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
                () = self.wait_for_drain() => WaitOutcome::Draining,
                () = too_late => WaitOutcome::Timeout,
            }
        };
        let mut takes_bytes = dialled.is_some();
        let first = match dialled {
            Some((io, in_use)) => {
                let server = DialledServer { io, guard: in_use, received: Bytes::new() };
                Box::pin(wait_for_either_side(&mut detector, &mut stream, server, ended)).await?
            }
            None => tokio::select! {
                detected = detector.detect(&mut stream) => FirstBytes::Client(detected?),
                ended = ended => match ended {
                    WaitOutcome::Timeout => return Err(NO_BYTE),
                    WaitOutcome::Draining | WaitOutcome::SlotReclaimed => FirstBytes::Draining,
                },
            },
        };
        let (detected, server) = match first {
            FirstBytes::Draining => return Ok(()),
            FirstBytes::Client(detected) => (detected, None),
            FirstBytes::ClientAfterDial(detected, server) => (detected, Some(server)),
            FirstBytes::Server(server) => (DetectedProtocol::Nothing, Some(server)),
            FirstBytes::HttpServer => {
                takes_bytes = false;
                match Box::pin(self.request_after_greeting(&mut detector, &mut stream)).await? {
                    Some(detected) => (detected, None),
                    None => return Ok(()),
                }
            }
        };
        let read_ahead = detector.into_bytes();
        match detected {
            DetectedProtocol::Nothing if server.is_none() => Ok(()),
            DetectedProtocol::Http1 | DetectedProtocol::H2
                if to.cluster.settings.protocol != Protocol::Tcp =>
            {
                drop(server);
                match detected {
                    DetectedProtocol::H2 => {
                        Box::pin(self.serve_http2(Prefixed::new(read_ahead, stream))).await
                    }
                    _ => self.serve_http1(stream, read_ahead).await,
                }
            }
            _ => {
                let verdict = match self.byte_stream_rules(to, false).decide(detected) {
                    ByteStreamVerdict::Watched if !takes_bytes => {
                        ByteStreamVerdict::Refused(ByteStreamRefusal::HttpServer)
                    }
                    verdict => verdict,
                };
                let stream = Prefixed::new(read_ahead, stream);
                Box::pin(self.serve_byte_stream(
                    stream,
                    server,
                    to,
                    verdict,
                    ByteStreamOrigin { detected, is_negotiated: false },
                ))
                .await
            }
        }
    }
}
