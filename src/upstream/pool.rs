//! The connections of one worker to one endpoint.
//!
//! HTTP/1.1: a connection carries one request at a time and is idle in between ([`super::idle_connections`]).
//! HTTP/2: a few connections that carry many streams ([`super::http2::pool`]).

use std::{
    cell::Cell,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame};
use tokio::time::Instant;

use super::{
    connect::{ConnectError, PeerVerification, TcpTimeouts, TlsTarget},
    http1::Http1Connection,
    http2::{Http2Stream, PingSettings, pool::Http2Pool},
    idle_connections::IdleConnections,
    idle_timeout::keep_alive_timeout,
    local::LocalEndpoint,
    policy_state::PolicyState,
    stream::UpstreamIo,
};
use crate::{
    config::{HeaderCase, PoolIdleTimeout},
    http1,
    identity::tls::ClientTls,
    resilience::classify::ConnectionLoss,
};

/// The settings of a connection.
#[derive(Clone, Debug)]
pub struct ConnectionSettings {
    pub tcp: TcpTimeouts,
    /// An upgraded connection gets the kernel's default TCP_USER_TIMEOUT back: it may be silent for longer.
    pub clear_user_timeout_on_upgrade: bool,
    pub pool_idle: PoolIdleTimeout,
    pub header_case: HeaderCase,
    /// Randomized for each connection, so that they do not all expire at once.
    pub max_age: Option<Duration>,
    /// None: plain TCP.
    pub tls: Option<TlsTarget>,
    pub ping: PingSettings,
    /// How long a request waits for an HTTP/2 stream if the endpoint's limit is reached on all connections.
    pub stream_wait: Duration,
    /// The attempt waits in a queue of this process: the endpoint is not to blame for the delay.
    pub queued: Cell<bool>,
}

/// The connections to one endpoint.
#[derive(Debug, Default)]
pub struct Pool {
    idle: IdleConnections,
    pub h2: Http2Pool,
}

/// A connection, or a stream of one, in use by a request.
#[derive(Debug)]
pub enum Lease {
    H1 { connection: Http1Connection, endpoint: Rc<LocalEndpoint>, reused: bool },
    H2 { stream: Box<Http2Stream>, reused: bool },
}

/// Part of the message of `h2` when it refuses to send a request because of its header fields.
const MALFORMED_HEADERS: &str = "malformed headers";

/// Why there is no response, or why it broke off.
#[derive(Debug, thiserror::Error)]
pub enum ResponseError {
    #[error(transparent)]
    Http1(#[from] http1::Error),
    #[error(transparent)]
    Http2(#[from] h2::Error),
}

impl ResponseError {
    /// Whether the received bytes are not valid HTTP.
    pub fn is_malformed(&self) -> bool {
        match self {
            Self::Http1(error) => error.is_malformed(),
            // `h2` resets a stream with this reason if its response violates HTTP/2.
            Self::Http2(error) => {
                error.is_reset() && error.is_library() && error.reason() == Some(h2::Reason::PROTOCOL_ERROR)
            }
        }
    }

    /// Whether the request is at fault, so that the endpoint is not to blame.
    pub fn is_request_fault(&self) -> bool {
        match self {
            Self::Http1(error) => error.is_sender_fault(),
            // `h2` distinguishes kinds of misuse by message only.
            Self::Http2(error) => error.to_string().contains(MALFORMED_HEADERS),
        }
    }

    /// The HTTP/2 error, if it is one.
    pub fn h2(&self) -> Option<&h2::Error> {
        match self {
            Self::Http1(_) => None,
            Self::Http2(error) => Some(error),
        }
    }
}

impl Pool {
    /// An HTTP/1.1 connection: an idle one that is still alive, else a new one.
    pub async fn h1(
        endpoint: &Rc<LocalEndpoint>,
        settings: &ConnectionSettings,
        policy_state: &Arc<PolicyState>,
        now: Instant,
    ) -> Result<Lease, ConnectError> {
        if let Some(connection) = endpoint.pool.idle.pop(settings, now) {
            return Ok(Lease::H1 { connection, endpoint: Rc::clone(endpoint), reused: true });
        }
        let opened = Box::pin(Http1Connection::open(endpoint, settings, policy_state)).await;
        let connection = opened.inspect_err(|error| {
            if matches!(error, ConnectError::Refused { .. } | ConnectError::Timeout { .. }) {
                endpoint.pool.idle.record_connect_failure();
            }
        })?;
        Ok(Lease::H1 { connection, endpoint: Rc::clone(endpoint), reused: false })
    }

    /// Closes an idle connection, if there is one; its slot is released when its task has ended.
    pub fn close_one_idle(&self) {
        if self.idle.close_oldest() {
            return;
        }
        self.h2.close_one_idle();
    }

    /// Closes connections that have been idle for too long. Called about once a second.
    pub fn sweep(&self, setting: PoolIdleTimeout, tls: Option<&Arc<ClientTls>>) {
        let now = Instant::now();
        self.idle.sweep(setting, tls, now);
        self.h2.sweep(tls);
    }

    /// How many connections are idle.
    pub fn idle_count(&self) -> usize {
        self.idle.len() + self.h2.idle_count()
    }
}

/// Whether a connection has the peer identity and TLS settings that a request needs.
pub(super) fn matches_settings(proof: Option<&PeerVerification>, settings: &ConnectionSettings) -> bool {
    match (proof, &settings.tls) {
        (None, None) => true,
        (Some(proof), Some(target)) => proof.matches_target(target),
        _ => false,
    }
}

/// Whether a connection was opened with the current TLS settings.
pub(super) fn uses_current_tls(proof: Option<&PeerVerification>, tls: Option<&Arc<ClientTls>>) -> bool {
    match (proof, tls) {
        (None, None) => true,
        (Some(proof), Some(client)) => proof.uses_settings(client),
        _ => false,
    }
}

/// When a connection is retired: at its maximum age, or when the server's certificate expires, whichever is first.
pub(super) fn retire_at(
    settings: &ConnectionSettings,
    proof: Option<&PeerVerification>,
    now: Instant,
) -> Option<Instant> {
    let expiry = proof.and_then(|proof| now.checked_add(proof.expires_in()));
    let aged = settings.max_age.map(|age| now + age);
    match (expiry, aged) {
        (Some(expiry), Some(aged)) => Some(expiry.min(aged)),
        (at, None) | (None, at) => at,
    }
}

impl Lease {
    /// Whether the connection has carried a request before: if so, a close without a response says nothing about the
    /// upstream.
    pub fn is_reused(&self) -> bool {
        match self {
            Self::H1 { reused, .. } => *reused,
            // With other streams on it, it was not idle.
            Self::H2 { stream, reused } => *reused && stream.is_only_stream(),
        }
    }

    /// The verified server identity, if TLS.
    pub fn peer_verification(&self) -> Option<&PeerVerification> {
        match self {
            Self::H1 { connection, .. } => connection.peer_verification(),
            Self::H2 { stream, .. } => stream.peer_verification(),
        }
    }

    /// Counts the loss of a multiplexed connection once, however many requests it fails.
    pub fn loss(&self) -> Option<&ConnectionLoss> {
        match self {
            Self::H1 { .. } => None,
            Self::H2 { stream, .. } => Some(stream.loss()),
        }
    }

    /// Whether a byte of a response was received, if known: bytes on an HTTP/2 connection may belong to any stream.
    pub fn has_received_bytes(&self) -> bool {
        matches!(self, Self::H1 { connection, .. } if connection.has_received_bytes())
    }

    /// Whether a byte of the request may have reached the endpoint; HTTP/1.1 only.
    pub fn has_sent_bytes(&self) -> bool {
        matches!(self, Self::H1 { connection, .. } if connection.has_sent_bytes())
    }

    /// Polls the next frame of the response body.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, ResponseError>>> {
        match self {
            Self::H1 { connection, .. } => connection.poll_frame(cx).map_err(ResponseError::from),
            Self::H2 { stream, .. } => match stream.body() {
                Some(body) => Pin::new(body).poll_frame(cx).map_err(ResponseError::from),
                None => Poll::Ready(None),
            },
        }
    }

    /// Whether the response body is known to be complete without reading on.
    pub fn is_end_stream(&self) -> bool {
        match self {
            Self::H1 { connection, .. } => connection.is_end_stream(),
            Self::H2 { stream, .. } => stream.peek_body().is_none_or(Body::is_end_stream),
        }
    }

    /// The remaining length of the response body, if known.
    pub fn remaining_length(&self) -> Option<u64> {
        match self {
            Self::H1 { connection, .. } => connection.remaining_length(),
            Self::H2 { stream, .. } => stream.peek_body().map_or(Some(0), |body| body.size_hint().exact()),
        }
    }

    /// The byte stream after an upgrade, and the bytes already received on it. None for HTTP/2.
    pub fn take_upgraded_stream(&mut self) -> Option<(UpstreamIo, Bytes)> {
        match self {
            Self::H1 { connection, .. } => connection.take_upgraded_stream(),
            Self::H2 { .. } => None,
        }
    }

    /// Takes the idle timeout from the response's `Keep-Alive: timeout=`.
    pub fn record_keep_alive(&mut self, headers: &HeaderMap) {
        if let Self::H1 { connection, .. } = self
            && let Some(announced) =
                headers.get("keep-alive").and_then(|value| keep_alive_timeout(value.to_str().ok()?))
        {
            // The upstream's timer starts when it writes, this one when the response is read; and the next request must
            // still arrive in time.
            let margin = (announced / 10).clamp(Duration::from_millis(100), Duration::from_secs(1));
            connection.announced_idle_timeout = Some(announced.saturating_sub(margin));
        }
    }

    /// Releases the connection after the response was read to its end. `whole_request`: the request was written
    /// completely.
    pub fn release(self, whole_request: bool, now: Instant) {
        match self {
            Self::H1 { connection, endpoint, .. } if whole_request => {
                endpoint.pool.idle.put_back(connection, now)
            }
            Self::H1 { .. } => {}
            Self::H2 { mut stream, .. } => stream.mark_complete(),
        }
    }
}

#[cfg(test)]
mod tests {
    use http::Request;
    use tokio::io::duplex;

    use super::*;

    /// The message that `is_request_fault` matches is not part of the API of `h2`.
    #[tokio::test]
    async fn a_request_that_http2_cannot_carry_is_a_request_fault() {
        let (client, _server) = duplex(1 << 16);
        let (mut sender, _connection) = h2::client::handshake(client).await.unwrap();
        let request = Request::builder().uri("http://a/").header("connection", "close").body(()).unwrap();
        let error = ResponseError::from(sender.send_request(request, true).unwrap_err());
        assert!(error.is_request_fault(), "{error}");
        assert!(!ResponseError::from(h2::Error::from(h2::Reason::PROTOCOL_ERROR)).is_request_fault());
    }

    #[test]
    fn an_unsendable_request_is_not_the_fault_of_its_endpoint() {
        use http1::framing::FramingError;
        for error in [http1::Error::Unsendable(FramingError::Length), http1::Error::LengthMismatch] {
            let error = ResponseError::from(error);
            assert!(error.is_request_fault() && !error.is_malformed(), "{error}");
        }
        let response = ResponseError::from(http1::Error::Framing(FramingError::Length));
        assert!(response.is_malformed() && !response.is_request_fault());
    }
}
