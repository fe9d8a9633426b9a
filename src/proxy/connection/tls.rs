//! TLS from clients: the handshake, and closing the connections of clients that are no longer trusted.

use std::{
    future::pending,
    rc::Rc,
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use rustls_pki_types::{CertificateDer, UnixTime};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{sleep, timeout},
};

use super::{
    Connection, ConnectionError, ConnectionInfo, HEADER_TIMEOUT,
    drain_watch::wait_until_some,
    protocol::{ByteStreamOrigin, PlaintextOptions},
};
use crate::{
    config::{Mtls, Protocol},
    identity::{
        handshake::{self, AcceptedTls, FailureKind, PortAlpn, TlsFailure, VerifiedPeer},
        tls::AlpnOffer,
        trust::{Role, VerifyError},
    },
    model::{Side, WorkerCluster},
    net::{
        alpn::{ApplicationProtocol, ConnectionTls},
        io::{Prefixed, SharedTcp},
    },
    proxy::{
        authorize,
        detect::{DetectedProtocol, RequestWatch},
        dial,
        error::ProxyError,
        opaque::ByteStreamVerdict,
        target,
    },
};

/// How often a client's certificate is verified again.
const VERIFY_INTERVAL: Duration = Duration::from_secs(600);

fn certificate_not_ready() -> TlsFailure {
    let reason = "this service has no valid certificate yet".to_owned();
    TlsFailure { kind: FailureKind::NotReady, reason }
}

fn handshake_timeout() -> TlsFailure {
    let reason = format!("the TLS handshake took longer than {HEADER_TIMEOUT:?}");
    TlsFailure { kind: FailureKind::Broken, reason }
}

impl Connection {
    /// The connection inside TLS on this one.
    fn inside_tls(&self, peer: Option<VerifiedPeer>, tls12: bool) -> Rc<Self> {
        let (peer_identity, presented) = match peer {
            Some(VerifiedPeer { peer, chain, .. }) => (Some(Arc::new(peer)), Some(chain.into())),
            None => (None, None),
        };
        self.inner(ConnectionInfo {
            tls: true,
            tls12,
            peer_identity,
            presented_chain: presented,
            original_destination: self.original_destination,
            tunnel_destination: None,
        })
    }

    /// Makes the TLS handshake with a client and serves the connection inside.
    pub(super) async fn serve_tls(
        &self,
        stream: SharedTcp,
        read_ahead: Bytes,
        mtls: Mtls,
        destination: &Rc<WorkerCluster>,
    ) -> Result<(), ConnectionError> {
        let worker = &self.worker;
        let counts = &worker.shared.identity.handshakes.inbound;
        let protocol = destination.cluster.settings.protocol;
        let http = match protocol {
            Protocol::Auto | Protocol::Http1 => AlpnOffer::Http1First,
            Protocol::H2 => AlpnOffer::H2First,
            Protocol::Tcp => AlpnOffer::NoAlpn,
        };
        let offer =
            PortAlpn { http, byte_streams: self.byte_stream_rules(destination, true).allows_client_first() };
        let handshake = async {
            let Ok(_permit) = worker.handshake_permits.acquire().await else {
                return Err(certificate_not_ready());
            };
            let server = worker.shared.identity.server().clone().ok_or_else(certificate_not_ready)?;
            handshake::accept(&server, mtls == Mtls::Strict, offer, Prefixed::new(read_ahead, stream)).await
        };
        // Boxed: the handshake's kilobytes are freed when it ends, and an idle connection does not hold them.
        let accepted =
            Box::pin(timeout(HEADER_TIMEOUT, handshake)).await.unwrap_or_else(|_| Err(handshake_timeout()));
        let AcceptedTls { stream, verified: peer, protocol: speaks, tls12, resumed } =
            accepted.map_err(|failure| {
                counts.record_failure(failure.kind);
                // The log suppresses repetitions.
                tracing::warn!(peer = ?self.peer, "client refused: {failure}");
                ConnectionError::Cut("the TLS handshake failed")
            })?;
        counts.record_success(resumed);
        let by = if peer.is_some() { ConnectionTls::Mutual } else { ConnectionTls::Server };
        let _protected = worker.shared.metrics.inbound.count_tls(by);
        let inside = self.inside_tls(peer, tls12);
        // An `async fn` stores its arguments twice: pass a pointer, not the whole TLS state.
        let stream = Box::new(stream);
        match speaks {
            _ if protocol == Protocol::Tcp => {
                let (upstream, _in_use) = Box::pin(dial::dial(&inside, destination)).await?;
                Box::pin(inside.relay_byte_stream(
                    stream,
                    upstream,
                    destination,
                    RequestWatch::off(),
                    ByteStreamOrigin::default(),
                ))
                .await
            }
            Some(ApplicationProtocol::H2) => Box::pin(inside.serve_http2(stream)).await,
            Some(ApplicationProtocol::Http1) => inside.serve_http1(stream, Bytes::new()).await,
            Some(ApplicationProtocol::Opaque | ApplicationProtocol::ByteStream) | None => {
                let is_negotiated = speaks == Some(ApplicationProtocol::ByteStream);
                let plain =
                    PlaintextOptions { destination: Some(destination), mtls: Mtls::Off, is_negotiated };
                Box::pin(inside.serve_plain(stream, plain)).await.map(drop)
            }
        }
    }

    /// Refuses a client that did not use TLS: every HTTP request gets an error response, anything else is closed.
    pub(super) async fn refuse_plaintext<S>(
        self: &Rc<Self>,
        detected: DetectedProtocol,
        stream: S,
        read_ahead: Bytes,
    ) -> Result<(), ConnectionError>
    where
        S: AsyncRead + AsyncWrite + Unpin + 'static,
    {
        self.worker.shared.identity.handshakes.plaintext_refused.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(peer = ?self.peer, "client refused: it came without TLS, and `inbound.mtls` is \"strict\"");
        self.refused_plaintext.set(true);
        match detected {
            DetectedProtocol::Http1 => self.serve_http1(Box::new(stream), read_ahead).await,
            DetectedProtocol::H2 => self.serve_http2(Prefixed::new(read_ahead, stream)).await,
            _ => Err(ConnectionError::Cut("plaintext is refused: `inbound.mtls` is \"strict\"")),
        }
    }

    /// Waits until the configuration requires a client certificate that this connection lacks, or newer TLS.
    pub(super) async fn wait_until_outdated(&self) {
        let reason = wait_until_some(&self.worker.shared.phase, || self.refusal_by_current_config()).await;
        tracing::info!(peer = ?self.peer, "closing a connection: {reason}");
    }

    /// Waits until the configuration no longer allows a byte stream of this origin.
    pub(super) async fn wait_until_disallowed(&self, origin: ByteStreamOrigin) -> ConnectionError {
        let mut applied = self.worker.shared.phase.subscribe();
        loop {
            if applied.changed().await.is_err() {
                return pending().await;
            }
            if let Some(reason) = self.refusal_by_current_config() {
                return reason;
            }
            let Some(destination) = target::byte_stream_destination(self) else { continue };
            if self.side == Side::Inbound
                && let Err(error) = authorize::check_byte_stream(self, &self.worker.view(), &destination)
            {
                return error.into();
            }
            let rules = self.byte_stream_rules(&destination, origin.is_negotiated);
            if let ByteStreamVerdict::Refused(reason) = rules.decide(origin.detected) {
                return ProxyError::malformed(format!("byte stream cut: {reason}; {}", self.remedy())).into();
            }
        }
    }

    /// Waits until the certificate of a byte stream's peer is revoked. Its expiry, or the removal of its root after a
    /// rotation, does not end a byte stream: a peer that has renewed in time cannot present the new certificate on it.
    pub async fn wait_until_revoked(&self) {
        let store = &self.worker.shared.identity;
        let mut changes = store.changes();
        let began = UnixTime::now();
        let Some((peer, chain)) = self.peer_identity.as_ref().zip(self.presented_chain.as_deref()) else {
            return pending().await;
        };
        while !matches!(self.trust_failure(chain, began), Some(VerifyError::Revoked)) {
            if changes.changed().await.is_err() {
                return pending().await;
            }
        }
        tracing::info!(%peer, "byte stream cut: its peer's certificate was revoked");
    }

    /// Why a chain is not trusted; `None` without an identity of this service, as there are no roots then.
    fn trust_failure(&self, chain: &[CertificateDer<'static>], at: UnixTime) -> Option<VerifyError> {
        let (leaf, intermediates) = chain.split_first()?;
        let server = self.worker.shared.identity.server();
        server.as_ref()?.trust.verify(leaf, intermediates, at, Role::Client).err()
    }

    /// Waits until the client's certificate has expired or is no longer trusted.
    pub(super) async fn wait_until_distrusted(&self, chain: &[CertificateDer<'static>]) {
        let store = &self.worker.shared.identity;
        let mut changes = store.changes();
        let Some(peer) = &self.peer_identity else { return pending().await };
        loop {
            let left = peer.not_after.duration_since(SystemTime::now()).unwrap_or_default();
            if let Some(refusal) = self.trust_failure(chain, UnixTime::now()) {
                tracing::info!(%peer, "closing a connection: its client is no longer trusted: {refusal}");
                return;
            }
            tokio::select! {
                _ = changes.changed() => {}
                // Clocks are set and machines sleep, so do not sleep for all the time that is left.
                () = sleep(left.clamp(Duration::from_secs(1), VERIFY_INTERVAL)) => {}
            }
        }
    }
}
