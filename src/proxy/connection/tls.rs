//! Callers that speak TLS to us: meeting them, and asking those to leave who are no longer believed.

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
    Connection, ConnectionError, Found, HEADER_TIMEOUT,
    leaving::looked_at,
    spoken::{BegunBytes, Plain},
};
use crate::{
    config::{Mtls, Protocol},
    identity::{
        handshake::{self, FailureKind, Met, PortOffer, Proven, TlsFailure},
        tls::Offer,
        trust::{Refusal, Role},
    },
    model::{LocalCluster, Side},
    net::{
        alpn::{Speaks, Tls},
        io::{Prefixed, SharedTcp},
    },
    proxy::{
        authorize, connect,
        detect::{RequestWatch, Spoken},
        error::ProxyError,
        opaque::Verdict,
        target,
    },
};

/// How often a caller's certificate is looked at again.
const LOOK_AGAIN: Duration = Duration::from_secs(600);

fn not_ready() -> TlsFailure {
    let reason = "there is no valid certificate to show it yet".to_owned();
    TlsFailure { kind: FailureKind::NotReady, reason }
}

fn too_slow() -> TlsFailure {
    let reason = format!("its TLS handshake took longer than {HEADER_TIMEOUT:?}");
    TlsFailure { kind: FailureKind::Broken, reason }
}

impl Connection {
    /// The connection inside of TLS, which this one has turned out to be.
    fn inside_tls(&self, proven: Option<Proven>, tls12: bool) -> Rc<Self> {
        let (peer_identity, presented) = match proven {
            Some(Proven { peer, chain, .. }) => (Some(Arc::new(peer)), Some(chain.into())),
            None => (None, None),
        };
        self.inside(Found {
            tls: true,
            tls12,
            peer_identity,
            presented,
            redirected_to: self.redirected_to,
            tunnel_to: None,
        })
    }

    /// Meets a caller by TLS and serves what comes inside of it.
    pub(super) async fn serve_tls(
        &self,
        stream: SharedTcp,
        begun: Bytes,
        mtls: Mtls,
        behind: &Rc<LocalCluster>,
    ) -> Result<(), ConnectionError> {
        let worker = &self.worker;
        let counts = &worker.shared.identity.handshakes.inbound;
        let protocol = behind.cluster.settings.protocol;
        let http = match protocol {
            Protocol::Auto | Protocol::Http1 => Offer::Http1First,
            Protocol::H2 => Offer::H2First,
            Protocol::Tcp => Offer::Nothing,
        };
        let offer = PortOffer { http, byte_streams: self.byte_rules(behind, true).takes_bytes() };
        let handshake = async {
            let Ok(_leave) = worker.handshakes.acquire().await else { return Err(not_ready()) };
            let server = worker.shared.identity.server().clone().ok_or_else(not_ready)?;
            handshake::accept(&server, mtls == Mtls::Strict, offer, Prefixed::new(begun, stream)).await
        };
        // Kilobytes that are free again when it is over, and so lie apart from what an idle connection holds.
        let met = Box::pin(timeout(HEADER_TIMEOUT, handshake)).await.unwrap_or_else(|_| Err(too_slow()));
        let Met { stream, proven, speaks, tls12, resumed } = met.map_err(|failure| {
            counts.failed(failure.kind);
            // Repetitions are held back by the log.
            tracing::warn!(peer = ?self.peer, "a caller was refused: {failure}");
            ConnectionError::Cut("no TLS")
        })?;
        counts.done(resumed);
        let by = if proven.is_some() { Tls::Mutual } else { Tls::Server };
        let _protected = worker.shared.metrics.inbound.protected(by);
        let inside = self.inside_tls(proven, tls12);
        // Futures hold what they are given more than once: a pointer, rather than all the state of TLS.
        let stream = Box::new(stream);
        match speaks {
            _ if protocol == Protocol::Tcp => {
                let (upstream, _in_use) = Box::pin(connect::dial(&inside, behind)).await?;
                Box::pin(inside.carry(stream, upstream, behind, (RequestWatch::off(), BegunBytes::default())))
                    .await
            }
            Some(Speaks::H2) => Box::pin(inside.serve_http2(stream)).await,
            Some(Speaks::Http1) => inside.serve_http1(stream, Bytes::new()).await,
            Some(Speaks::Bytes | Speaks::ByteStream) | None => {
                let agreed = speaks == Some(Speaks::ByteStream);
                let plain = Plain { behind: Some(behind), mtls: Mtls::Off, agreed };
                Box::pin(inside.serve_plain(stream, plain)).await.map(drop)
            }
        }
    }

    /// Tells a caller who came without TLS that only TLS is taken; in HTTP, if that is what it speaks.
    pub(super) async fn refuse_plaintext<S>(
        self: &Rc<Self>,
        spoken: Spoken,
        stream: S,
        begun: Bytes,
    ) -> Result<(), ConnectionError>
    where
        S: AsyncRead + AsyncWrite + Unpin + 'static,
    {
        self.worker.shared.identity.handshakes.plaintext_refused.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(peer = ?self.peer, "a caller was refused: it came without TLS, and `inbound.mtls` is \"strict\"");
        self.refused_plaintext.set(true);
        match spoken {
            Spoken::Http1 => self.serve_http1(Box::new(stream), begun).await,
            Spoken::H2 => self.serve_http2(Prefixed::new(begun, stream)).await,
            _ => Err(ConnectionError::Cut("plaintext")),
        }
    }

    /// Waits until the configuration asks for a client certificate that this connection has not shown, or for a newer
    /// version of TLS.
    pub(super) async fn outdated(&self) {
        let why = looked_at(&self.worker.shared.phase, || self.refusal_by_now()).await;
        tracing::info!(peer = ?self.peer, "asked to leave: {why}");
    }

    /// Waits until a tunnel of bytes, which began like this, would not be let in any more by the configuration of then.
    pub(super) async fn no_longer_allowed(&self, begun: BegunBytes) -> ConnectionError {
        let mut applied = self.worker.shared.phase.subscribe();
        loop {
            if applied.changed().await.is_err() {
                return pending().await;
            }
            if let Some(why) = self.refusal_by_now() {
                return why;
            }
            let Some(behind) = target::behind(self) else { continue };
            if self.side == Side::Inbound
                && let Err(error) = authorize::bytes(self, &self.worker.view(), &behind)
            {
                return error.into();
            }
            let rules = self.byte_rules(&behind, begun.agreed);
            if let Verdict::Refused(why) = rules.decide_spoken(begun.spoken) {
                return ProxyError::malformed(format!("a tunnel is cut: {why}; {}", self.remedy())).into();
            }
        }
    }

    /// Waits until the certificate of the peer of a byte stream is revoked. That it expires, or that its root is taken out
    /// when all have certificates of the next one, does not end a byte stream: a peer that has renewed in time cannot show
    /// the new certificate on it.
    pub async fn stream_distrusted(&self) {
        let store = &self.worker.shared.identity;
        let mut changes = store.changes();
        let began = UnixTime::now();
        let Some((peer, chain)) = self.peer_identity.as_ref().zip(self.presented.as_deref()) else {
            return pending().await;
        };
        while !matches!(self.distrust(chain, began), Some(Refusal::Revoked)) {
            if changes.changed().await.is_err() {
                return pending().await;
            }
        }
        tracing::info!(%peer, "a byte stream is cut: its peer's certificate was revoked");
    }

    /// Why a chain is not trusted; none where there is no identity of our own, and so no roots to judge it by.
    fn distrust(&self, chain: &[CertificateDer<'static>], at: UnixTime) -> Option<Refusal> {
        let (leaf, intermediates) = chain.split_first()?;
        let server = self.worker.shared.identity.server();
        server.as_ref()?.trust.verify(leaf, intermediates, at, Role::Client).err()
    }

    /// Waits until the caller's certificate has expired, or is not trusted any more.
    pub(super) async fn distrusted(&self, chain: &[CertificateDer<'static>]) {
        let store = &self.worker.shared.identity;
        let mut changes = store.changes();
        let Some(peer) = &self.peer_identity else { return pending().await };
        loop {
            let left = peer.not_after.duration_since(SystemTime::now()).unwrap_or_default();
            if let Some(refusal) = self.distrust(chain, UnixTime::now()) {
                tracing::info!(%peer, "a caller is asked to leave: {refusal}");
                return;
            }
            tokio::select! {
                _ = changes.changed() => {}
                // Clocks are set and machines sleep: so not for all that is left.
                () = sleep(left.clamp(Duration::from_secs(1), LOOK_AGAIN)) => {}
            }
        }
    }
}
