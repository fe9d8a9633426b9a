//! An HTTP/1.1 connection to an endpoint, and the request on it.
//!
//! There is no driver task: the task of the request polls the connection, and nothing polls an idle one. The one
//! exception is a request that is still being sent when its response starts: a separate task sends the rest, see
//! [`Http1Connection::send`].
//!
//! # States
//!
//! ```text
//!           start_request           all written
//! opened --> IDLE ---------> SENDING -----------> WAITING
//!            ^  |               |                    |
//!            |  |               | final head         | final head
//!            |  |               |                    |
//!            |  |               v     all written    v    take_upgraded_stream
//!            |  |           UPLOADING ----------> READING ----------------------> UPGRADED
//!            |  |               |                    |
//!            |  |               | end of response    |
//!            |  |               v                    |
//!            |  |          UPLOAD ONLY               |
//!            |  |                                    |
//!            |  +--> CLOSED <-- each other state     |
//!            |                                       |
//!            +------- finish_exchange: Reusable -----+
//! ```
//!
//! The two directions proceed independently: the request is sent or not (`is_sent`), the response is at a
//! `ResponseStage`. `ClientConnection::state` names the combinations:
//!
//! | state | meaning | `is_sent` | response | closed by |
//! | --- | --- | --- | --- | --- |
//! | IDLE | in the pool | yes | ended | the endpoint, unsolicited bytes, expiry, eviction |
//! | SENDING | `send` writes the request and reads the response head | no | head awaited | an error, a dropped `send` |
//! | WAITING | `send` waits for the response head | yes | head awaited | an error, a dropped `send` |
//! | UPLOADING | the response is read, a separate task writes the request | no | body | `abort`: the response is not read to its end, [`UPLOAD_STALL`], an upgrade |
//! | UPLOAD ONLY | the same task writes the request, its response has ended | no | ended | the end of the request, an error, [`UPLOAD_STALL`] |
//! | READING | the response body is read | yes | body | `abort`: it is not read to its end; `finish_exchange`: not reusable |
//! | UPGRADED | the byte stream is handed out, `io` is `None` | | | its owner |
//! | CLOSED | dropped; after `abort` `io` is `None` | | | |
//!
//! - `is_persistent` is false as soon as it is known that no other request follows. The exchange continues.
//! - A request that `start_request` rejects does not change the state: nothing of it is written.
//! - An interim response (1xx except 101) does not change the state.
//! - A reused connection is not read before the first byte of the request is written: an earlier byte cannot belong to
//!   its response.
//! - A write error by which the endpoint has closed the connection ends writing only: SENDING becomes WAITING. The
//!   endpoint may have sent a response before, so `send` reads on; the connection is not reused.
//!
//! # Wakers
//!
//! A socket keeps one waker for each direction: that of the last poll. So at most one task may wait to read and one to
//! write:
//!
//! - SENDING, WAITING: the request's task polls both directions. It is polled again when the socket is readable or
//!   writable, or when the client has sent more of the request body.
//! - UPLOADING, UPLOAD ONLY: the upload task polls the request body and the write direction, the request's task, in
//!   UPLOADING, the read direction.
//!   The first poll of the upload task replaces the wakers that the request's task left in the body and in the write
//!   direction.
//! - READING: the request's task polls the read direction.
//! - `abort` drops the socket together with its wakers. So the upload task also leaves its waker in `upload_waker`, and
//!   `abort` wakes it. The task then finds no `io`, ends, and drops its reference to the connection, which releases the
//!   slot.
//! - IDLE: no task waits. The pool checks the connection before reuse and about once a second, with a no-op waker.

mod client_connection;
#[cfg(test)]
mod conformance_tests;
#[cfg(test)]
mod state_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod upload_tests;

use std::{
    cell::RefCell,
    future::poll_fn,
    io,
    net::SocketAddr,
    num::NonZeroU64,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, Method, StatusCode, Uri};
use http_body::Frame;
use tokio::{
    task::spawn_local,
    time::{Instant, timeout},
};

use self::client_connection::ClientConnection;
pub use self::client_connection::NoBodyReason;
use super::{
    RequestBody,
    connect::{ConnectError, NewConnection, PeerVerification, connect},
    local::LocalEndpoint,
    policy_state::{ConnectionSlot, PolicyState},
    pool::{ConnectionSettings, retire_at},
    stream::{IdleState, UpstreamIo},
};

use crate::{
    config::HeaderCase,
    header_names::X_OUTRIGGER_ATTEMPT,
    http1::{
        Error,
        head::{ResponseHead, Spelling, format_decimal, write_field},
        target::RawTarget,
    },
    net::{alpn::ApplicationProtocol, io::SharedTcp},
    resilience::deadline::REQUEST_TIMEOUT,
};

/// How long an upload that continues after its response may make no progress.
const UPLOAD_STALL: Duration = Duration::from_secs(300);

/// How long a connection settles before reuse if unsolicited bytes may be on their way: the body that some services
/// send with a response to HEAD, or with a 204 or 304, follows right behind its head.
const SETTLE: Duration = Duration::from_millis(10);

/// Whether a connection can carry another exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReuseVerdict {
    Reusable,
    /// It is closed: one side does not keep it alive, or the exchange was incomplete.
    Close,
    /// It is closed because more than the response was received.
    Unsolicited,
}

/// An HTTP/1.1 connection. When it is dropped idle, it closes gracefully (TLS `close_notify`) as far as that does not
/// block.
#[derive(Debug)]
pub struct Http1Connection {
    // Shared with the upload task. One pointer, because the connection is moved around often.
    inner: Rc<ConnectionInner>,
    /// When the last response ended.
    pub idle_since: Instant,
    /// It settles until then, see [`SETTLE`].
    pub reusable_from: Instant,
    /// The idle timeout that `Keep-Alive: timeout=` announced.
    pub announced_idle_timeout: Option<Duration>,
}

#[derive(Debug)]
struct ConnectionInner {
    /// Borrowed within one poll only, never across an `await`: the request's task and the upload task share it.
    connection: RefCell<ClientConnection>,
    tcp: SharedTcp,
    keep_spelling: bool,
    retire_at: Option<Instant>,
    /// See [`ConnectionSettings`].
    clear_user_timeout_on_upgrade: bool,
    /// The verified server identity, if TLS.
    verification: Option<Box<PeerVerification>>,
    // Last: the slot is released after everything else.
    slot: ConnectionSlot,
}

/// The head of a request to be sent, borrowed from the caller of [`Http1Connection::send`].
#[derive(Clone, Copy, Debug)]
pub struct OutgoingHead<'a> {
    pub method: &'a Method,
    pub target: &'a Uri,
    /// Path and query as the client sent them, if `target` has a normalized form.
    pub raw_target: Option<&'a RawTarget>,
    pub fields: &'a HeaderMap,
    pub spelling: Option<&'a Spelling>,
    pub attempt_fields: AttemptFields,
}

/// Header fields of one attempt that are written directly, without a copy of the request's header map.
#[derive(Clone, Copy, Debug, Default)]
pub struct AttemptFields {
    /// The number of the attempt, from 1.
    pub attempt: Option<u32>,
    /// The time until the deadline, in milliseconds.
    pub millis_left: Option<NonZeroU64>,
}

impl AttemptFields {
    /// Writes the header fields.
    pub fn write(self, out: &mut Vec<u8>) {
        let mut write = |name: &HeaderName, number: u64| {
            write_field(out, name.as_str().as_bytes(), format_decimal(&mut [0; 20], number));
        };
        if let Some(attempt) = self.attempt {
            write(&X_OUTRIGGER_ATTEMPT, attempt.into());
        }
        if let Some(millis) = self.millis_left {
            write(&REQUEST_TIMEOUT, millis.get());
        }
    }
}

impl Http1Connection {
    /// Waits for a connection slot and opens a connection.
    ///
    /// # Errors
    ///
    /// If no slot is free in time, or the connection or its TLS handshake fails.
    pub async fn open(
        endpoint: &LocalEndpoint,
        settings: &ConnectionSettings,
        policy_state: &Arc<PolicyState>,
    ) -> Result<Self, ConnectError> {
        let address = endpoint.shared.address;
        settings.queued.set(true);
        let slot = ConnectionSlot::acquire(policy_state).await;
        settings.queued.set(false);
        let slot = slot?;
        let connected =
            connect(address, settings.tcp, settings.tls.as_ref(), ApplicationProtocol::Http1).await?;
        let slot = slot.mark_open(connected.protection());
        let NewConnection { io, tcp, verification: proof } = connected;
        let now = Instant::now();
        let opened = ConnectionInner {
            connection: RefCell::new(ClientConnection::new(io)),
            tcp,
            keep_spelling: settings.header_case == HeaderCase::Preserve,
            retire_at: retire_at(settings, proof.as_deref(), now),
            clear_user_timeout_on_upgrade: settings.clear_user_timeout_on_upgrade,
            verification: proof,
            slot,
        };
        Ok(Self { inner: Rc::new(opened), idle_since: now, reusable_from: now, announced_idle_timeout: None })
    }

    /// Sends a request and waits for the head of its response. `interim` receives the interim responses (1xx) before
    /// it.
    ///
    /// After an early response a task of its own sends the rest of the request, whether or not the response is read:
    /// a server may wait for the rest of the request before it sends the rest of the response.
    pub async fn send(
        &mut self,
        head: OutgoingHead<'_>,
        body: RequestBody,
        mut interim: impl FnMut(StatusCode, HeaderMap),
    ) -> Result<ResponseHead, Error> {
        let connection = &self.inner.connection;
        connection.borrow_mut().start_request(head, body)?;
        // The pool has checked the connection in this very poll. If the first write has to wait, it is checked again.
        let (mut checked, mut broken) = (true, false);
        let response = poll_fn(|cx| {
            let connection = &mut *connection.borrow_mut();
            if !checked && connection.is_reused_and_unsent() && connection.check_idle() != IdleState::Quiet {
                return Poll::Ready(Err(Error::Closed));
            }
            checked = false;
            if !broken {
                match connection.poll_request(cx) {
                    // The endpoint has closed the connection. It may have sent a response before (413 in the middle
                    // of an upload, or a TLS alert about our certificate): this is in the kernel's receive buffer,
                    // followed by the end.
                    Poll::Ready(Err(Error::Io(error)))
                        if is_peer_close(&error) && !connection.is_reused_and_unsent() =>
                    {
                        broken = true
                    }
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                    _ => {}
                }
            }
            if connection.is_reused_and_unsent() {
                // `poll_request` is pending: the socket, or the request body, has stored the waker.
                return Poll::Pending;
            }
            connection.poll_response_head(cx, head.method, self.inner.keep_spelling, &mut interim)
        })
        .await?;
        let mut connection = connection.borrow_mut();
        if !broken && !connection.is_sent() {
            // Its first poll replaces this task's wakers in the request body and in the write direction of the socket.
            spawn_local(upload(Rc::clone(&self.inner)));
        } else if response.status == StatusCode::REQUEST_TIMEOUT
            && connection.is_reused
            && !connection.is_persistent
            && head.method.is_idempotent()
        {
            // The service timed out waiting for a request just before this one arrived (RFC 9110 §15.5.9).
            connection.has_received_bytes = false;
            return Err(Error::Closed);
        }
        Ok(response)
    }

    /// Polls the next frame of the response body.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        self.inner.connection.borrow_mut().poll_frame(cx)
    }

    /// Whether the response body is known to be complete without reading on.
    pub fn is_end_stream(&self) -> bool {
        self.inner.connection.borrow().response.has_ended()
    }

    /// The remaining length of the response body, if known.
    pub fn remaining_length(&self) -> Option<u64> {
        self.inner.connection.borrow().response.remaining_length()
    }

    /// The byte stream after an upgrade, and the bytes already received on it.
    pub fn take_upgraded_stream(&mut self) -> Option<(UpstreamIo, Bytes)> {
        let mut connection = self.inner.connection.borrow_mut();
        connection.is_persistent = false;
        if !connection.is_sent() {
            // The endpoint would take the rest of the request for the new protocol.
            connection.abort();
            return None;
        }
        if self.inner.clear_user_timeout_on_upgrade {
            self.inner.tcp.set_user_timeout(None);
        }
        let unread = std::mem::take(&mut connection.read_buffer).into_unread();
        connection.io.take().map(|io| (io, unread))
    }

    /// Ends an exchange whose response was read to its end. `settles`: unsolicited bytes may follow.
    pub fn finish_exchange(&mut self, settles: bool, now: Instant) -> ReuseVerdict {
        self.idle_since = now;
        let mut connection = self.inner.connection.borrow_mut();
        self.reusable_from = if settles { now + SETTLE } else { now };
        let persisted = connection.is_persistent;
        if connection.check_idle_readiness() == IdleState::Unsolicited && persisted {
            return ReuseVerdict::Unsolicited;
        }
        let reusable = connection.is_usable() && !self.inner.slot.claim_eviction() && !self.is_retired(now);
        connection.is_reused = true;
        if reusable { ReuseVerdict::Reusable } else { ReuseVerdict::Close }
    }

    /// Why the last response had no body regardless of its header fields.
    pub fn no_body_reason(&self) -> Option<NoBodyReason> {
        self.inner.connection.borrow().no_body_reason
    }

    /// Records what was received while idle, as far as the runtime already knows of it: session tickets, or the end.
    pub fn check_idle_readiness(&mut self) -> IdleState {
        self.inner.connection.borrow_mut().check_idle_readiness()
    }

    /// Asks the kernel whether anything was received while idle. Must be called just before a request is sent, in the
    /// same poll of the task: what is received later cannot be distinguished from its response.
    pub fn check_idle(&mut self) -> IdleState {
        self.inner.connection.borrow_mut().check_idle()
    }

    /// Whether it is known to be closed.
    pub fn is_closed(&self) -> bool {
        !self.inner.connection.borrow().is_persistent
    }

    /// The endpoint's address, for messages.
    pub fn peer(&self) -> Option<SocketAddr> {
        self.inner.tcp.peer_addr().ok()
    }

    /// Whether it has reached its maximum age, or the server's certificate has expired.
    pub fn is_retired(&self, now: Instant) -> bool {
        self.inner.retire_at.is_some_and(|at| now >= at)
    }

    /// The verified server identity, if TLS.
    pub fn peer_verification(&self) -> Option<&PeerVerification> {
        self.inner.verification.as_deref()
    }

    /// Whether a byte of a response was received.
    pub fn has_received_bytes(&self) -> bool {
        self.inner.connection.borrow().has_received_bytes
    }

    /// Whether a byte of the request may have reached the endpoint.
    pub fn has_sent_bytes(&self) -> bool {
        self.inner.connection.borrow().has_sent_bytes
    }
}

/// Whether a write error means that the endpoint has closed the connection, so that reading ends as well.
fn is_peer_close(error: &io::Error) -> bool {
    use io::ErrorKind as K;
    matches!(error.kind(), K::BrokenPipe | K::ConnectionReset | K::ConnectionAborted | K::NotConnected)
}

/// Sends the rest of a request after an early response, as long as the endpoint accepts it.
async fn upload(opened: Rc<ConnectionInner>) {
    loop {
        let before = opened.connection.borrow().write_buffer.total_written();
        let sent = poll_fn(|cx| {
            let mut connection = opened.connection.borrow_mut();
            // For `abort`, which drops the socket and with it the waker that is stored there.
            connection.upload_waker = Some(cx.waker().clone());
            connection.poll_request(cx).map(drop)
        });
        if timeout(UPLOAD_STALL, sent).await.is_ok() {
            return;
        }
        let mut connection = opened.connection.borrow_mut();
        // The timeout only counts if nothing at all was written meanwhile.
        if connection.write_buffer.total_written() == before {
            return connection.abort();
        }
    }
}

impl Drop for Http1Connection {
    fn drop(&mut self) {
        let mut connection = self.inner.connection.borrow_mut();
        if !connection.response.has_ended() {
            // The response is not read to its end, so the rest of the request is not sent either.
            connection.abort();
        }
    }
}
