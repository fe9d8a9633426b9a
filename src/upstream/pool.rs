//! The connections of one worker to one endpoint.
//!
//! HTTP/1.1: a connection carries one exchange at a time, and lies idle in between ([`super::idle_connections`]).
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
    connect::{ConnectError, Proof, TcpLimits, TlsTarget},
    guards::Guards,
    http1::Http1,
    http2::{PingSettings, Stream, pool::Http2Pool},
    idle::keep_alive_timeout,
    idle_connections::IdleConnections,
    local::LocalEndpoint,
    stream::UpstreamIo,
};
use crate::{
    config::{HeaderCase, PoolIdle},
    http1,
    identity::tls::ClientTls,
    resilience::classify::Loss,
};

/// What a connection must be like.
#[derive(Clone, Debug)]
pub struct ConnectionSettings {
    pub tcp: TcpLimits,
    /// A connection that was upgraded may stand still for longer: the kernel's default holds for it.
    pub lifts_user_timeout: bool,
    pub pool_idle: PoolIdle,
    pub header_case: HeaderCase,
    /// Drawn anew for each connection, so that not all end at once.
    pub max_age: Option<Duration>,
    /// None: plain.
    pub tls: Option<TlsTarget>,
    pub ping: PingSettings,
    /// How long a request waits for a stream where the endpoint takes no more on the connections that there are.
    pub stream_wait: Duration,
    /// The attempt that uses them waits for its turn in this process: no endpoint is to blame for that.
    pub queued: Cell<bool>,
}

/// The connections to one endpoint.
#[derive(Debug, Default)]
pub struct Pool {
    idle: IdleConnections,
    pub h2: Http2Pool,
}

/// A connection, or a stream of one, held by a call.
#[derive(Debug)]
pub enum Lease {
    H1 { connection: Http1, endpoint: Rc<LocalEndpoint>, reused: bool },
    H2 { stream: Box<Stream>, reused: bool },
}

/// What `h2` says where it does not send a request because of its header fields.
const MALFORMED_HEADERS: &str = "malformed headers";

/// Why there is no answer, or no more of it.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    #[error(transparent)]
    Http1(#[from] http1::Error),
    #[error(transparent)]
    Http2(#[from] h2::Error),
}

impl AnswerError {
    /// Whether what came is not HTTP.
    pub fn is_malformed(&self) -> bool {
        match self {
            Self::Http1(error) => error.is_malformed(),
            // `h2` resets a stream by this where its response breaks the rules of HTTP/2.
            Self::Http2(error) => {
                error.is_reset() && error.is_library() && error.reason() == Some(h2::Reason::PROTOCOL_ERROR)
            }
        }
    }

    /// Whether the request is at fault, so that its endpoint has no part in it.
    pub fn is_of_request(&self) -> bool {
        match self {
            Self::Http1(error) => error.is_of_sender(),
            // `h2` tells its kinds of misuse apart by their texts alone.
            Self::Http2(error) => error.to_string().contains(MALFORMED_HEADERS),
        }
    }

    /// What HTTP/2 says of it.
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
        guards: &Arc<Guards>,
        now: Instant,
    ) -> Result<Lease, ConnectError> {
        if let Some(connection) = endpoint.pool.idle.pop(settings, now) {
            return Ok(Lease::H1 { connection, endpoint: Rc::clone(endpoint), reused: true });
        }
        let opened = Box::pin(Http1::open(endpoint, settings, guards)).await;
        let connection = opened.inspect_err(|error| {
            if matches!(error, ConnectError::Refused { .. } | ConnectError::Timeout { .. }) {
                endpoint.pool.idle.connect_failed();
            }
        })?;
        Ok(Lease::H1 { connection, endpoint: Rc::clone(endpoint), reused: false })
    }

    /// Closes a connection that lies idle, if there is one; its place is free when its task has ended.
    pub fn close_idle(&self) {
        if self.idle.close_oldest() {
            return;
        }
        self.h2.close_idle();
    }

    /// Closes what has been idle for too long. Called about once a second.
    pub fn sweep(&self, setting: PoolIdle, tls: Option<&Arc<ClientTls>>) {
        let now = Instant::now();
        self.idle.sweep(setting, tls, now);
        self.h2.sweep(tls);
    }

    /// How many connections lie idle.
    pub fn idle_connections(&self) -> usize {
        self.idle.len() + self.h2.idle()
    }
}

/// Whether a connection leads to whom a call wants.
pub(super) fn fits(proof: Option<&Proof>, settings: &ConnectionSettings) -> bool {
    match (proof, &settings.tls) {
        (None, None) => true,
        (Some(proof), Some(target)) => proof.fits(target),
        _ => false,
    }
}

/// Whether a connection was made by the settings of now.
pub(super) fn is_of(proof: Option<&Proof>, tls: Option<&Arc<ClientTls>>) -> bool {
    match (proof, tls) {
        (None, None) => true,
        (Some(proof), Some(client)) => proof.is_of(client),
        _ => false,
    }
}

/// No connection is used for longer than the certificate of who answered is good for.
pub(super) fn retire_at(
    settings: &ConnectionSettings,
    proof: Option<&Proof>,
    now: Instant,
) -> Option<Instant> {
    let proven = proof.and_then(|proof| now.checked_add(proof.expires_in()));
    let aged = settings.max_age.map(|age| now + age);
    match (proven, aged) {
        (Some(proven), Some(aged)) => Some(proven.min(aged)),
        (at, None) | (None, at) => at,
    }
}

impl Lease {
    /// Whether the connection has carried a request before: then its silent end says nothing about the upstream.
    pub fn reused(&self) -> bool {
        match self {
            Self::H1 { reused, .. } => *reused,
            // With other streams on it, it did not lie idle.
            Self::H2 { stream, reused } => *reused && stream.is_alone(),
        }
    }

    /// Who answered by TLS.
    pub fn proof(&self) -> Option<&Proof> {
        match self {
            Self::H1 { connection, .. } => connection.proof(),
            Self::H2 { stream, .. } => stream.proof(),
        }
    }

    /// What sees to it that the loss of a connection with many calls on it counts once.
    pub fn loss(&self) -> Option<&Loss> {
        match self {
            Self::H1 { .. } => None,
            Self::H2 { stream, .. } => Some(stream.loss()),
        }
    }

    /// Whether a byte of an answer came, where that can be told: what an HTTP/2 connection says may be for any stream.
    pub fn heard_anything(&self) -> bool {
        matches!(self, Self::H1 { connection, .. } if connection.heard_anything())
    }

    /// Whether any of the request may have reached the endpoint, where HTTP/1.1 carries it.
    pub fn sent_anything(&self) -> bool {
        matches!(self, Self::H1 { connection, .. } if connection.sent_anything())
    }

    /// Polls the next part of the answer's body.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, AnswerError>>> {
        match self {
            Self::H1 { connection, .. } => connection.poll_frame(cx).map_err(AnswerError::from),
            Self::H2 { stream, .. } => match stream.body() {
                Some(body) => Pin::new(body).poll_frame(cx).map_err(AnswerError::from),
                None => Poll::Ready(None),
            },
        }
    }

    /// Whether the answer's body is over, as far as can be told without reading on.
    pub fn is_end_stream(&self) -> bool {
        match self {
            Self::H1 { connection, .. } => connection.is_end_stream(),
            Self::H2 { stream, .. } => stream.peek_body().is_none_or(Body::is_end_stream),
        }
    }

    /// How long the rest of the answer's body is, where that was told.
    pub fn length(&self) -> Option<u64> {
        match self {
            Self::H1 { connection, .. } => connection.length(),
            Self::H2 { stream, .. } => stream.peek_body().map_or(Some(0), |body| body.size_hint().exact()),
        }
    }

    /// What the connection is once it was upgraded, and what has come on it already. HTTP/2 has no such thing.
    pub fn take_stream(&mut self) -> Option<(UpstreamIo, Bytes)> {
        match self {
            Self::H1 { connection, .. } => connection.take_stream(),
            Self::H2 { .. } => None,
        }
    }

    /// Learns from the response's `Keep-Alive: timeout=`.
    pub fn heard(&mut self, headers: &HeaderMap) {
        if let Self::H1 { connection, .. } = self
            && let Some(told) =
                headers.get("keep-alive").and_then(|value| keep_alive_timeout(value.to_str().ok()?))
        {
            // The upstream counts from when it wrote, we from when we read; and our next request must still arrive.
            let margin = (told / 10).clamp(Duration::from_millis(100), Duration::from_secs(1));
            connection.told = Some(told.saturating_sub(margin));
        }
    }

    /// The response has been read to its end. `whole_request`: so has the request been written.
    pub fn finished(self, whole_request: bool, now: Instant) {
        match self {
            Self::H1 { connection, endpoint, .. } if whole_request => {
                endpoint.pool.idle.put_back(connection, now)
            }
            Self::H1 { .. } => {}
            Self::H2 { mut stream, .. } => stream.finished(),
        }
    }
}

#[cfg(test)]
mod tests {
    use http::Request;
    use tokio::io::duplex;

    use super::*;

    /// The text by which `h2` says so is not part of its interface.
    #[tokio::test]
    async fn a_request_that_http2_cannot_carry_is_at_fault_itself() {
        let (client, _server) = duplex(1 << 16);
        let (mut sender, _connection) = h2::client::handshake(client).await.unwrap();
        let request = Request::builder().uri("http://a/").header("connection", "close").body(()).unwrap();
        let error = AnswerError::from(sender.send_request(request, true).unwrap_err());
        assert!(error.is_of_request(), "{error}");
        assert!(!AnswerError::from(h2::Error::from(h2::Reason::PROTOCOL_ERROR)).is_of_request());
    }

    #[test]
    fn what_is_wrong_with_a_request_to_be_sent_is_not_its_endpoints() {
        use http1::framing::FramingError;
        for error in [http1::Error::Unsendable(FramingError::Length), http1::Error::WrongLength] {
            let error = AnswerError::from(error);
            assert!(error.is_of_request() && !error.is_malformed(), "{error}");
        }
        let response = AnswerError::from(http1::Error::Framing(FramingError::Length));
        assert!(response.is_malformed() && !response.is_of_request());
    }
}
